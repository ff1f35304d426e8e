// Letters for sequences and colours for requests, and small helpers that all parts use.

const $ = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const COLORS = 7;
const PATTERNS = 6;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function setText(element, text) {
  text = String(text);
  if (element.textContent !== text) element.textContent = text;
}

// "cmpl-0123456789abcdef01234567-0" to "012345": enough to tell requests apart.
function short(request) {
  const parts = /^(?:[a-z]+-)?([0-9a-f]{6})[0-9a-f]*(?:-(\d+))?$/.exec(request);
  if (!parts) return request.length > 12 ? request.slice(0, 11) + "…" : request;
  return parts[1] + (Number(parts[2]) ? "-" + parts[2] : "");
}

function count(n, word) { return `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`; }

function seconds(s) {
  if (s < 0.001) return `${(s * 1e6).toFixed(0)} µs`;
  if (s < 0.1) return `${(s * 1e3).toFixed(1)} ms`;
  return s < 1 ? `${(s * 1e3).toFixed(0)} ms` : `${s.toFixed(1)} s`;
}

// A sequence keeps its letter; letters are taken in turn, so that one is not soon used again.
// With nobody on the device, they begin again at A.
const names = {
  sequences: new Map(),  // number -> {letter, request, index}
  requests: new Map(),  // id -> {color, sequences}
  live: new Map(),  // letter -> sequence, in the newest frame
  turn: 0,

  meet(frame) {
    const live = new Map();
    if (!this.live.size) this.turn = 0;
    for (const table of frame.tables) {
      const known = this.sequences.get(table.seq);
      if (known) live.set(known.letter, table.seq);
    }
    for (const table of [...frame.tables].sort((a, b) => a.seq - b.seq)) {
      if (this.sequences.has(table.seq)) continue;
      let letter = "#" + table.seq;
      for (let i = 0; i < LETTERS.length; i++) {
        const candidate = LETTERS[(this.turn + i) % (live.size < 20 ? 26 : LETTERS.length)];
        if (live.has(candidate) || this.live.has(candidate)) continue;
        letter = candidate;
        this.turn = LETTERS.indexOf(letter) + 1;
        break;
      }
      if (!this.requests.has(table.request)) {
        this.requests.set(table.request, { color: this.freeColor(frame), sequences: [] });
      }
      const siblings = this.requests.get(table.request).sequences;
      this.sequences.set(table.seq, { letter, request: table.request, index: siblings.length });
      siblings.push(table.seq);
      live.set(letter, table.seq);
    }
    this.live = live;
  },

  // The colour that fewest of the frame's requests have.
  freeColor(frame) {
    const uses = new Array(COLORS).fill(0);
    for (const request of new Set(frame.tables.map((table) => table.request))) {
      const known = this.requests.get(request);
      if (known) uses[known.color]++;
    }
    return uses.indexOf(Math.min(...uses));
  },

  // Forget whoever is in none of these frames.
  keep(frames) {
    if (this.sequences.size < 4000) return;
    const kept = new Set(frames.flatMap((frame) => frame.tables.map((table) => table.seq)));
    for (const [seq, { request }] of this.sequences) {
      if (kept.has(seq)) continue;
      this.sequences.delete(seq);
      const known = this.requests.get(request);
      if (known && !known.sequences.some((other) => kept.has(other))) this.requests.delete(request);
    }
  },

  reset() {
    for (const known of [this.sequences, this.requests, this.live]) known.clear();
    this.turn = 0;
  },

  letter(seq) { return this.sequences.get(seq)?.letter ?? "#" + seq; },
  color(request) { return this.requests.get(request)?.color ?? COLORS - 1; },
  badge(seq) {
    const known = this.sequences.get(seq);
    const color = known ? this.color(known.request) : COLORS - 1;
    return make("span", `name owner-${color} pattern-${(known?.index ?? 0) % PATTERNS}`, this.letter(seq));
  },
};
