// The steps that were seen, to go back and forth in; what happened in each, as a line.

const MOST_FRAMES = 600;
const MOST_ENTRIES = 500000;  // of the block tables in them
const MOST_LINES = 60;

function describe(frame) {
  const said = [], letter = (seq) => names.letter(seq);
  for (const [parent, child] of frame.forks ?? []) said.push(`${letter(parent)} forked to ${letter(child)}`);
  for (const [from, to, writer, ...keepers] of frame.copies ?? []) {
    const keep = `, ${keepers.map(letter).join(" and ")} ${keepers.length > 1 ? "keep" : "keeps"} ${from}`;
    said.push(`block ${from} copied to ${to}: ${letter(writer)} writes` + (keepers.length ? keep : ""));
  }
  for (const request of frame.preempted ?? []) {
    const swapped = (frame.swapped ?? []).includes(request);
    said.push(`request ${short(request)} preempted: ${swapped ? "its blocks moved to the host" : "its blocks were taken, its tokens are kept"}`);
  }
  const moves = (pairs) => pairs.slice(0, 6).map((pair) => pair.join(" → ")).join(", ") + (pairs.length > 6 ? ", …" : "");
  if (frame.swap_out) said.push(`${count(frame.swap_out.length, "block")} swapped out (${moves(frame.swap_out)})`);
  if (frame.swap_in) said.push(`${count(frame.swap_in.length, "block")} swapped in (${moves(frame.swap_in)})`);
  const over = new Set((frame.finished ?? []).map(([request]) => request));
  const ended = (frame.ended ?? []).filter((seq) => !over.has(names.sequences.get(seq)?.request));
  if (ended.length) said.push(`${ended.map(letter).join(", ")} ended`);
  for (const [request, reason] of frame.finished ?? []) said.push(`request ${short(request)} finished (${reason})`);
  return said.join("; ");
}

const seen = {
  frames: [],
  entries: 0,
  place: null,  // of the frame that is shown; null shows the newest one
  start: null,  // first frame of the playground's last run
  timer: null,

  get shown() { return this.frames[this.place ?? this.frames.length - 1]; },
  // None where steps between the two were not told: what is new since then is not of one step.
  get before() {
    const before = this.frames[(this.place ?? this.frames.length - 1) - 1];
    return before && this.shown.step - before.step <= 1 ? before : undefined;
  },

  add(frame) {
    const full = this.frames.length >= MOST_FRAMES || this.entries >= MOST_ENTRIES;
    if (full && this.place !== null) return;  // who looks at something shall not lose it
    frame.size = frame.tables.reduce((sum, table) => sum + table.blocks.length, 0);
    this.frames.push(frame);
    this.entries += frame.size;
    while (this.frames.length > MOST_FRAMES || (this.entries > MOST_ENTRIES && this.frames.length > 2)) {
      this.entries -= this.frames.shift().size;
    }
    names.keep(this.frames);
  },

  begin() {  // the playground starts a run
    this.live();
    this.start = null;
    this.expects = true;
  },

  reset() {
    this.frames = [];
    this.entries = 0;
    this.start = null;
    this.live();
  },

  show(place) {
    if (!this.frames.length) return;
    this.place = Math.max(0, Math.min(this.frames.length - 1, place));
    draw();
  },

  live() {
    this.stop();
    this.place = null;
    draw();
  },

  get current() { return this.place ?? this.frames.length - 1; },

  stop() {
    clearInterval(this.timer);
    this.timer = null;
  },

  play() {
    if (this.timer) {
      this.stop();
      draw();
      return;
    }
    if (this.current >= this.frames.length - 1) this.place = Math.max(0, this.frames.indexOf(this.start));
    this.timer = setInterval(() => {
      if (this.current >= this.frames.length - 1) this.stop();
      this.show(this.current + 1);
    }, 200);
    draw();
  },

  act: {
    first() { seen.stop(); seen.show(0); },
    back() { seen.stop(); seen.show(seen.current - 1); },
    play() { seen.play(); },
    next() { seen.stop(); seen.show(seen.current + 1); },
    live() { seen.live(); },
  },

  drawPlayer() {
    const last = this.frames.length - 1, play = document.querySelector('[data-do="play"]'), scrub = $("scrub");
    scrub.max = Math.max(0, last);
    scrub.value = this.current;
    const step = this.shown ? this.shown.step : -1;
    setText($("where"), step < 0 ? "no step yet" : `step ${step.toLocaleString("en")}, ${this.current + 1} of ${last + 1} seen`);
    scrub.setAttribute("aria-valuetext", $("where").textContent);
    setText(play, this.timer ? "Pause" : "Play");
    play.setAttribute("aria-pressed", String(Boolean(this.timer)));
    document.querySelector('[data-do="live"]').setAttribute("aria-pressed", String(this.place === null));
  },

  drawLog() {
    const lines = [], box = $("log");
    for (let i = this.current; i >= 0 && lines.length < MOST_LINES; i--) {
      if (this.frames[i].said) lines.push(this.frames[i]);
    }
    const key = lines.map((frame) => frame.id).join() + "/" + this.shown?.id;
    if (box.dataset.key === key) return;
    box.dataset.key = key;
    box.replaceChildren(...lines.map((frame) => {
      const line = make("li", frame === this.shown ? "now" : "");
      line.append(make("b", "", `step ${frame.step}`), frame.said);
      return line;
    }));
    if (!lines.length) box.append(make("li", "hint", "Forks, copies on write, swaps and preemptions are told here."));
    box.scrollTop = 0;
  },
};

$("player").addEventListener("click", (event) => {
  const button = event.target.closest("button[data-do]");
  if (button) seen.act[button.dataset.do]();
});
$("player").addEventListener("keydown", (event) => {
  const action = { ArrowLeft: "back", ArrowRight: "next", Home: "first", End: "live" }[event.key];
  if (!action) return;
  event.preventDefault();
  seen.act[action]();
});
$("scrub").addEventListener("input", (event) => {
  seen.stop();
  seen.show(Number(event.target.value));
});
