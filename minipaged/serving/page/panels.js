// Numbers, block tables, queues and timelines.

const MOST_TABLES = 24;
const MOST_CHIPS = 40;
const MOST_ROWS = 16;
const MINUTE = 60;

const panels = {
  rates: [],  // [time, tokens so far], over the last minute
  requests: new Map(),  // id -> {id, arrived, first, ended, reason, spans: [[state, from, to]]}
  percentiles: null,  // told now and then
  at: 0,
  stepped: 0,  // when the newest step ended

  reset() {
    this.rates = [];
    this.requests.clear();
  },

  numbers(event) {
    const { counts } = event;
    const lately = this.rates.find(([when]) => when >= event.at - 3) ?? this.rates[0];
    const span = event.at - lately[0];
    const rate = span > 0 ? (counts.tokens - lately[1]) / span : 0;
    setText($("rate"), rate >= 100 ? Math.round(rate).toLocaleString("en") : rate.toFixed(1));
    for (const [id, name] of [["first-token", "first_token"], ["inter-token", "inter_token"]]) {
      const values = this.percentiles?.[name];
      $(id).replaceChildren(...["p50", "p90", "p99"].map((percentile, i) => {
        const value = make("span", "", values ? seconds(values[i]) : "–");
        value.prepend(make("small", "", percentile));
        return value;
      }));
    }
    setText($("hits"), counts.queried ? `${((100 * counts.hit) / counts.queried).toFixed(1)} %` : "–");
    setText($("hits-of"), counts.queried ? `of ${count(counts.queried, "prompt token")}` : "no prompt yet");
    setText($("preemptions"), counts.preemptions);
    setText($("moved"), counts.swapped_out ? `${counts.swapped_out} blocks out, ${counts.swapped_in} in` : "");
    this.spark();
  },

  spark() {
    const canvas = $("spark"), width = canvas.clientWidth, height = canvas.clientHeight;
    if (!width) return;
    const scale = devicePixelRatio || 1, bars = new Array(MINUTE).fill(0), newest = this.rates[this.rates.length - 1][0];
    for (let i = 1; i < this.rates.length; i++) {
      const ago = Math.floor(newest - this.rates[i][0]);
      if (ago < MINUTE) bars[MINUTE - 1 - ago] += this.rates[i][1] - this.rates[i - 1][1];
    }
    canvas.width = width * scale;
    canvas.height = height * scale;
    const pen = canvas.getContext("2d"), most = Math.max(1, ...bars);
    pen.scale(scale, scale);
    pen.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent");
    bars.forEach((n, i) => pen.fillRect((i * width) / MINUTE, height, width / MINUTE - 0.3, (-n / most) * (height - 1) - (n ? 1 : 0)));
    pen.fillRect(0, height - 0.5, width, 0.5);
  },

  // What can be seen in one frame: how the pool is used, and every block table.
  facts(frame, about) {
    const held = holders(frame, false, about.block_size), host = holders(frame, true, about.block_size);
    let shared = 0, filled = 0;
    for (const all of held.values()) {
      shared += all.length > 1;
      filled += Math.max(...all.map((one) => one.filled));
    }
    const cached = cachedCount(frame), slots = held.size * about.block_size;
    const facts = [["used", held.size], ["shared", shared], ["cached", cached], ["free", about.num_blocks - held.size - cached]];
    if (about.num_host_blocks) facts.push(["on the host", host.size]);
    $("facts").replaceChildren(...facts.map(([name, n]) => {
      const fact = make("span", "", name + " ");
      fact.append(make("b", "", n.toLocaleString("en")));
      fact.dataset.fact = name;
      return fact;
    }));
    setText($("wasted"), slots ? `${((100 * (slots - filled)) / slots).toFixed(1)} %` : "0 %");
    const rows = [...frame.tables].sort((a, b) => a.seq - b.seq);
    $("tables").replaceChildren(...rows.slice(0, MOST_TABLES).map((table) => this.table(table, held, about)));
    if (!rows.length) $("tables").append(make("li", "hint", "No sequence has a block."));
    if (rows.length > MOST_TABLES) $("tables").append(make("li", "hint", `${rows.length - MOST_TABLES} more`));
  },

  table(table, held, about) {
    const row = make("li"), { blocks } = table, half = MOST_CHIPS / 2;
    const shown = blocks.length > MOST_CHIPS ? [...blocks.slice(0, half), "…", ...blocks.slice(-half)] : blocks;
    const last = table.tokens - (table.dropped + blocks.length - 1) * about.block_size;
    row.dataset.letter = names.letter(table.seq);
    row.dataset.blocks = blocks.join();
    const entries = shown.map((block) => (!table.host && (held.get(block)?.length ?? 0) > 1 ? `${block}(${held.get(block).length}×)` : block));
    row.append(names.badge(table.seq), make("i", "", `${short(table.request)} ${table.host ? "host " : ""}`), `[${entries.join(", ")}]`, make("i", "", ` last block ${last}/${about.block_size} full`));
    if (table.dropped) row.append(make("i", "", `, ${table.dropped} out of the window`));
    row.title = table.request;
    return row;
  },

  queues(event) {
    const most = 24;
    for (const name of ["running", "waiting", "swapped"]) {
      const mine = event.queue.filter((one) => one[1] === name[0]), total = event.queued[name];
      setText($(`${name}-count`), total);
      const rows = mine.slice(0, most).map(([number, , prompt, output]) => {
        const row = make("li"), id = event.requests[number];
        const badge = make("span", `name owner-${names.color(id)}`, short(id));
        row.append(badge, `${prompt} + ${output}`);
        row.title = `${id}: ${prompt} tokens of prompt, ${output} of output`;
        return row;
      });
      if (total > rows.length) rows.push(make("li", "hint", `${total - rows.length} more`));
      $(name).replaceChildren(...rows);
    }
  },

  request(id, at) {
    if (!this.requests.has(id)) this.requests.set(id, { id, arrived: at, first: null, ended: null, reason: null, spans: [] });
    return this.requests.get(id);
  },

  // A request is somewhere at a time; whoever runs at once has waited until the step `began`.
  state(id, state, at, began = at) {
    const request = this.request(id, at), { spans } = request;
    if (request.ended !== null) return;
    if (!spans.length && state === "running" && began > request.arrived) spans.push(["waiting", request.arrived, began]);
    const last = spans[spans.length - 1];
    if (last && last[0] === state) last[2] = at;
    else {
      if (last) last[2] = state === "running" ? Math.max(last[1], began) : at;
      spans.push([state, last ? last[2] : request.arrived, at]);
    }
  },

  // When each request was where: to the step where a step was told, else to the event.
  follow(event) {
    this.at = event.at;
    this.percentiles = event.percentiles ?? this.percentiles;
    this.rates.push([event.at, event.counts.tokens]);
    while (this.rates[0][0] < event.at - MINUTE) this.rates.shift();
    for (const [number, arrived, first, ended, reason] of event.marks) {
      const request = this.request(event.requests[number], arrived);
      request.arrived = arrived;
      if (request.spans.length) request.spans[0][1] = Math.min(arrived, request.spans[0][2]);
      if (first !== null) request.first = first;
      if (ended !== null) Object.assign(request, { ended, reason });
    }
    for (const frame of event.frames) {
      for (const id of frame.preempted ?? []) {
        this.state(id, (frame.swapped ?? []).includes(id) ? "swapped" : "preempted", frame.at);
      }
      for (const table of frame.tables) {
        this.state(table.request, table.host ? "swapped" : "running", frame.at, Math.min(this.stepped, frame.at));
      }
      this.stepped = frame.at;
    }
    const states = { r: "running", s: "swapped" }, here = new Set();
    for (const [number, status] of event.queue) {
      const id = event.requests[number], had = this.requests.get(id)?.spans.length > 0;
      const last = had && this.requests.get(id).spans.at(-1)[0];
      here.add(id);
      this.state(id, states[status] ?? (last && last !== "waiting" ? "preempted" : "waiting"), event.at);
    }
    const all = event.queued.running + event.queued.waiting + event.queued.swapped;
    for (const [id, request] of this.requests) {
      const last = request.spans[request.spans.length - 1];
      if (request.ended !== null && last) {
        last[2] = request.ended;
        // What began after the end is the last step, seen before it was freed.
        while (request.spans.length > 1 && request.spans.at(-1)[1] > request.ended) request.spans.pop();
      } else if (request.ended === null && !here.has(id) && all <= event.queue.length) request.ended = event.at;
      if (request.ended !== null && request.ended < event.at - MINUTE) this.requests.delete(id);
    }
    for (const id of this.requests.keys()) {
      if (this.requests.size <= 400) break;
      this.requests.delete(id);
    }
  },

  times() {
    const now = this.at, all = [...this.requests.values()].sort((a, b) => (a.ended === null) - (b.ended === null) || a.arrived - b.arrived).reverse();
    // A minute, or less where less has been seen.
    const from = Math.max(now - MINUTE, Math.min(now - 5, ...all.map((request) => request.arrived)));
    const x = (when) => Math.max(0, Math.min(100, (100 * (when - from)) / (now - from)));
    const rows = all.slice(0, MOST_ROWS).map((request) => {
      const row = make("li"), bar = make("span", "bar");
      for (const [state, begin, end] of request.spans) {
        const piece = make("i", state);
        piece.style.left = `${x(begin)}%`;
        piece.style.width = `${x(end) - x(begin)}%`;
        bar.append(piece);
      }
      if (request.first !== null && request.first >= from) {
        const first = make("i", "first");
        first.style.left = `${x(request.first)}%`;
        bar.append(first);
      }
      const told = [`request ${request.id}: arrived ${seconds(now - request.arrived)} ago`];
      if (request.first !== null) told.push(`first token after ${seconds(request.first - request.arrived)}`);
      const stops = request.spans.filter(([state]) => state === "preempted" || state === "swapped").length;
      if (stops) told.push(`preempted ${stops} times`);
      told.push(request.ended === null ? request.spans.at(-1)?.[0] ?? "waiting" : `ended${request.reason ? ` (${request.reason})` : ""} after ${seconds(request.ended - request.arrived)}`);
      bar.setAttribute("role", "img");
      bar.setAttribute("aria-label", told.join(", "));
      row.title = told.join(", ");
      row.append(make("span", `name owner-${names.color(request.id)}`, short(request.id)), bar);
      return row;
    });
    if (!rows.length) rows.push(make("li", "hint", "None."));
    if (all.length > MOST_ROWS) rows.push(make("li", "hint", `${all.length - MOST_ROWS} more`));
    setText($("since"), `${Math.round(now - from)} s ago`);
    $("times").replaceChildren(...rows);
  },
};
