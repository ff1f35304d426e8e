// The block map: a pool as a grid of cells on a canvas.

const MOST_CELLS = 2048;

// Who holds each block of a pool: block -> [{seq, request, index, filled}, ...].
function holders(frame, host, blockSize) {
  const held = new Map();
  for (const table of frame.tables) {
    if (table.host !== host) continue;
    table.blocks.forEach((block, i) => {
      const index = i + table.dropped;
      const filled = Math.min(blockSize, table.tokens - index * blockSize);
      if (!held.has(block)) held.set(block, []);
      held.get(block).push({ seq: table.seq, request: table.request, index, filled });
    });
  }
  return held;
}

function isCached(frame, block) {
  const ranges = frame.cached;
  let low = 0, high = ranges.length / 2;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ranges[2 * middle] + ranges[2 * middle + 1] <= block) low = middle + 1;
    else high = middle;
  }
  return 2 * low < ranges.length && ranges[2 * low] <= block;
}

function cachedCount(frame) {
  let total = 0;
  for (let i = 1; i < frame.cached.length; i += 2) total += frame.cached[i];
  return total;
}

class BlockMap {
  constructor(canvas, host, tell) {
    Object.assign(this, { canvas, host, tell, chosen: null, cells: [], top: 0, columns: 1 });
    canvas.addEventListener("pointermove", (event) => this.choose(this.at(event)));
    canvas.addEventListener("pointerdown", (event) => this.choose(this.at(event)));
    canvas.addEventListener("pointerleave", () => {
      if (document.activeElement !== canvas) this.choose(null);
    });
    canvas.addEventListener("focus", () => this.choose(this.chosen ?? this.cells[0] ?? null));
    canvas.addEventListener("blur", () => this.choose(null));
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  // Which blocks have a cell: all up to the highest that was ever in use, if they are not too many.
  pick(held, frame, size) {
    for (const block of held.keys()) this.top = Math.max(this.top, block + 1);
    const last = frame.cached.length;
    if (!this.host && last) this.top = Math.max(this.top, frame.cached[last - 2] + frame.cached[last - 1]);
    const least = this.host ? 0 : size <= 256 ? size : 128;
    const end = Math.min(size, Math.max(least, Math.ceil(this.top / 32) * 32));
    if (end <= MOST_CELLS) {
      this.cells = Array.from({ length: end }, (_, block) => block);
      if (!end) return `All ${count(size, "block")} have been free so far.`;
      return end < size ? `Blocks ${end.toLocaleString("en")} to ${(size - 1).toLocaleString("en")} are free and not drawn.` : "";
    }
    const used = [...held.keys()].sort((a, b) => a - b);
    this.cells = used.slice(0, MOST_CELLS);
    const more = used.length - this.cells.length;
    return "Only blocks in use are drawn" + (more ? `, and ${count(more, "more block")} in use not.` : ".");
  }

  // `before` is the frame of the step before, if it is known; returns what is not drawn.
  draw(frame, before, about) {
    const size = this.host ? about.num_host_blocks : about.num_blocks;
    Object.assign(this, { frame, before, about });
    this.held = holders(frame, this.host, about.block_size);
    this.then = before ? holders(before, this.host, about.block_size) : null;
    const undrawn = this.pick(this.held, frame, size);
    this.paint();
    return undrawn;
  }

  paint() {
    const { canvas, cells } = this, width = canvas.clientWidth;
    if (!this.frame || !width) return;
    const wish = cells.length > 800 ? 15 : cells.length > 288 ? 24 : cells.length > 96 || width < 480 ? 36 : 46;
    const columns = this.columns = Math.max(1, Math.min(cells.length || 1, Math.floor(width / wish)));
    const side = this.side = Math.min(width / columns, wish * 1.4), tall = this.tall = Math.min(side, 44);
    const scale = devicePixelRatio || 1, height = Math.ceil(cells.length / columns) * tall;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale);
      canvas.height = Math.round(height * scale);
      canvas.style.height = `${height}px`;
    }
    const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const paint = (name) => style.getPropertyValue(`--${name}`).trim();
    this.inks = { fg: paint("fg"), dim: paint("dim"), line: paint("line"), free: paint("free"), used: paint("used"), ink: paint("ink"), accent: paint("accent") };
    this.owners = Array.from({ length: COLORS }, (_, i) => paint(`owner-${i}`));
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    cells.forEach((block, i) => {
      this.cell(pen, block, (i % columns) * side + 1.5, Math.floor(i / columns) * tall + 1.5, side - 3, tall - 3);
    });
  }

  cell(pen, block, x, y, w, h) {
    const held = this.held.get(block), inks = this.inks, large = h >= 28;
    const cached = !held && !this.host && isCached(this.frame, block);
    pen.fillStyle = held ? inks.used : inks.free;
    pen.fillRect(x, y, w, h);
    if (held) {
      const first = held[0], part = (w * Math.max(...held.map((one) => one.filled))) / this.about.block_size;
      pen.fillStyle = this.owners[names.color(first.request)];
      pen.fillRect(x, y, part, h);
      if (held.length === 1) this.pattern(pen, names.sequences.get(first.seq)?.index ?? 0, x, y, part, h);
    } else if (cached) this.hatch(pen, x, y, w, h, inks.dim, 5, 0.55);
    const mark = held ? this.mark(block, held) : "";
    pen.setLineDash(cached ? [2, 2] : []);
    pen.lineWidth = held && (held.length > 1 || mark) ? 2.5 : 1;
    pen.strokeStyle = block === this.chosen ? inks.accent : held ? inks.fg : cached ? inks.dim : inks.line;
    if (block === this.chosen) pen.lineWidth = 4;
    pen.strokeRect(x, y, w, h);
    pen.setLineDash([]);
    if (large && (!mark || w >= 36)) {
      pen.font = "9px system-ui, sans-serif";
      pen.textAlign = "left"; pen.textBaseline = "top";
      pen.fillStyle = held ? inks.ink : inks.dim;
      pen.fillText(block, x + 3, y + 2.5);
    }
    if (!held) return;
    pen.textBaseline = "middle"; pen.textAlign = "center";
    pen.fillStyle = inks.ink;
    if (h >= 17) {
      pen.font = `700 ${large ? 13 : 11}px system-ui, sans-serif`;
      const letters = held.map((one) => names.letter(one.seq)).join("");
      const label = large ? (letters.length > 3 ? letters.slice(0, 2) + "…" : letters) + held[0].index : letters.slice(0, 1);
      pen.fillText(label, x + w / 2, y + h / 2 + (large ? 4 : 0.5), w - 4);
    }
    if (large && mark) {
      pen.font = "700 10.5px system-ui, sans-serif";
      pen.textAlign = "right"; pen.textBaseline = "top";
      pen.fillText(mark, x + w - 3, y + 2);
    }
  }

  // What is told in the corner of a cell.
  mark(block, held) {
    if ((this.frame[this.host ? "swap_out" : "swap_in"] ?? []).some((pair) => pair[1] === block)) return "↘";
    if (!this.host && (this.frame.copies ?? []).some((pair) => pair[1] === block)) return "c";
    if (held.length > 1) return `${held.length}×`;
    return this.then && !this.then.has(block) ? "+" : "";
  }

  pattern(pen, index, x, y, w, h) {
    const kind = index % PATTERNS;
    if (!kind || w < 2) return;
    pen.save();
    pen.beginPath(); pen.rect(x, y, w, h); pen.clip();
    pen.strokeStyle = pen.fillStyle = this.inks.ink;
    pen.globalAlpha = 0.26; pen.lineWidth = 1.6;
    pen.beginPath();
    if (kind === 1) for (let i = -h; i < w; i += 7) { pen.moveTo(x + i, y + h); pen.lineTo(x + i + h, y); }
    if (kind === 3) for (let i = -h; i < w; i += 7) { pen.moveTo(x + i, y); pen.lineTo(x + i + h, y + h); }
    if (kind === 4) for (let i = 3; i < h; i += 6) { pen.moveTo(x, y + i); pen.lineTo(x + w, y + i); }
    if (kind === 5) for (let i = 3; i < w; i += 6) { pen.moveTo(x + i, y); pen.lineTo(x + i, y + h); }
    pen.stroke();
    if (kind === 2) for (let i = 4; i < w; i += 8) for (let j = 4; j < h; j += 8) { pen.beginPath(); pen.arc(x + i, y + j, 1.7, 0, 7); pen.fill(); }
    pen.restore();
  }

  hatch(pen, x, y, w, h, color, gap, alpha) {
    pen.save();
    pen.beginPath(); pen.rect(x, y, w, h); pen.clip();
    pen.strokeStyle = color; pen.globalAlpha = alpha; pen.lineWidth = 1;
    pen.beginPath();
    for (let i = -h; i < w; i += gap) { pen.moveTo(x + i, y + h); pen.lineTo(x + i + h, y); }
    pen.stroke();
    pen.restore();
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / this.side);
    if (column >= this.columns) return null;
    return this.cells[Math.floor((event.clientY - box.top) / this.tall) * this.columns + column] ?? null;
  }

  key(event) {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, Home: -1e9, End: 1e9 };
    if (!(event.key in moves) || !this.cells.length) return;
    event.preventDefault();
    const place = Math.max(0, this.cells.indexOf(this.chosen)) + moves[event.key];
    if (Math.abs(moves[event.key]) === this.columns && !(place in this.cells)) return;
    this.choose(this.cells[Math.max(0, Math.min(this.cells.length - 1, place))]);
  }

  choose(block) {
    if (block === this.chosen) return;
    this.chosen = block;
    this.paint();
    this.tell();
  }

  describe() {
    const block = this.chosen, held = this.held?.get(block), size = this.about.block_size;
    const where = this.host ? "Host block" : "Block";
    if (!held) {
      const cached = !this.host && isCached(this.frame, block);
      return `${where} ${block}: free` + (cached ? ", and the prefix cache can find it again." : ".");
    }
    const owners = held.slice(0, 8).map((one) => `${names.letter(one.seq)} of request ${short(one.request)} (logical block ${one.index})`);
    if (held.length > 8) owners.push(`${held.length - 8} more`);
    const filled = Math.max(...held.map((one) => one.filled));
    const said = [`${where} ${block}: ${owners.join(", ")}`, `reference count ${held.length}`, `${filled} of ${size} slots filled`];
    const copy = !this.host && (this.frame.copies ?? []).find((pair) => pair[1] === block);
    if (copy) said.push(`copied on write from block ${copy[0]} in this step`);
    const move = (this.frame[this.host ? "swap_out" : "swap_in"] ?? []).find((pair) => pair[1] === block);
    if (move) said.push(`moved from ${this.host ? "device" : "host"} block ${move[0]} in this step`);
    return said.join("; ") + ".";
  }
}
