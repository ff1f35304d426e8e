// The connection: events come in, everything is drawn; it comes back after the server was gone.

const LONGEST_PAUSE = 15;  // seconds
const KEY = "minipaged-key";

let about = null, newest = null, drawing = false, slowAt = 0, later = null;
const maps = [new BlockMap($("device"), false, tellBlock), new BlockMap($("host"), true, tellBlock)];

function tellBlock() {
  const map = maps.find((one) => one.chosen !== null);
  if (map?.frame) setText($("detail"), map.describe());
  else setText($("detail"), "Point at a block, or go there with the arrow keys.");
}

function draw() {
  if (drawing) return;
  drawing = true;
  const pause = calm.matches && seen.place === null ? 500 : 0;
  setTimeout(() => requestAnimationFrame(() => {
    drawing = false;
    if (about && seen.shown) paint();
  }), pause);
}

function paint() {
  const frame = seen.shown;
  $("host-box").hidden = !about.num_host_blocks;
  const undrawn = maps[0].draw(frame, seen.before, about);
  const ofHost = about.num_host_blocks ? maps[1].draw(frame, seen.before, about) : "";
  setText($("undrawn"), undrawn);
  setText($("host-empty"), ofHost);
  $("host").hidden = !maps[1].cells.length;
  panels.facts(frame, about);
  seen.drawPlayer();
  seen.drawLog();
  tellBlock();
  const rest = slowAt + 250 - performance.now();
  if (rest > 0) {  // no eye follows numbers faster than that
    later ??= setTimeout(draw, rest);
    return;
  }
  clearTimeout(later);
  later = null;
  slowAt = performance.now();
  panels.numbers(newest);
  panels.queues(newest);
  panels.times();
}

let frameId = 0;

function receive(event) {
  if (event.about) {
    if (about && about.created !== event.about.created) forget();
    about = event.about;
    panels.rates = [];  // this stream counts its tokens from 0
    setText($("model"), about.model);
    document.title = `${about.model} – minipaged`;
  }
  let cached = [];
  event.frames = event.frames.map(({ tables, ...frame }) => {
    cached = frame.cached ?? cached;
    const decoded = { ...frame, cached, id: frameId++ };
    decoded.tables = tables.map(([seq, request, tokens, dropped, host, ...blocks]) => (
      { seq, request: event.requests[request], tokens, dropped, host: host === 1, blocks }));
    for (const name of ["preempted", "swapped"]) if (frame[name]) decoded[name] = frame[name].map((i) => event.requests[i]);
    if (frame.finished) decoded.finished = frame.finished.map(([i, reason]) => [event.requests[i], reason]);
    return decoded;
  });
  event.frames.forEach((frame, i) => {
    names.meet(frame);
    frame.said = describe(frame);
    if (!i && event.skipped) frame.said = [`${count(event.skipped, "step")} not told`, frame.said].filter(Boolean).join("; ");
    if (seen.expects && frame.tables.length) Object.assign(seen, { expects: false, start: frame });
    seen.add(frame);
  });
  panels.follow(event);
  newest = event;
  draw();
}

function forget() {
  names.reset();
  panels.reset();
  for (const map of maps) map.top = 0;
  seen.reset();
}

function status(state, text) {
  $("connection").dataset.state = state;
  setText($("connection"), text);
}

const connection = {
  abort: null,
  pause: 0.5,
  timer: null,

  headers() {
    const key = sessionStorage.getItem(KEY);
    return key ? { Authorization: `Bearer ${key}` } : {};
  },

  async open() {
    this.close();
    const abort = this.abort = new AbortController();
    try {
      const response = await fetch("dashboard/events", { headers: this.headers(), signal: abort.signal, cache: "no-store" });
      if (response.status === 401) {
        status("gone", "an API key is needed");
        askForKey(sessionStorage.getItem(KEY) ? "The server does not accept this key." : "");
        return;
      }
      if (!response.ok) throw new Error(await problem(response));
      status("live", "live");
      for await (const data of eventsOf(response)) {
        this.pause = 0.5;
        receive(JSON.parse(data));
      }
      throw new Error("the server has gone");
    } catch (error) {
      if (abort.signal.aborted) return;
      this.later(error instanceof TypeError ? "the server cannot be reached" : error.message);
    }
  },

  later(why) {
    const pause = this.pause;
    this.pause = Math.min(LONGEST_PAUSE, pause * 2);
    status("gone", `${why}; trying again in ${pause.toFixed(pause < 1 ? 1 : 0)} s`);
    this.timer = setTimeout(() => this.open(), 1000 * pause);
  },

  close() {
    clearTimeout(this.timer);
    this.abort?.abort();
  },
};

function askForKey(why) {
  if (why) setText($("key-why"), why);
  if (!$("key-dialog").open) $("key-dialog").showModal();
  $("key").value = "";
  $("key").focus();
}

$("key-button").addEventListener("click", () => askForKey(""));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = $("key").value.trim();
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  $("key-dialog").close();
  connection.open();
});

// A page that nobody looks at holds nothing on the server.
document.addEventListener("visibilitychange", () => {
  if (document.hidden) {
    connection.close();
    status("paused", "paused while hidden");
  } else connection.open();
});
addEventListener("resize", draw);
for (const query of [calm, matchMedia("(prefers-color-scheme: dark)")]) query.addEventListener("change", draw);
if (!document.hidden) connection.open();
