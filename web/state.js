// @ts-check
/**
 * What the widget knows: events in, state out. Pure; nothing here touches the page.
 *
 * The events are those of linear_core/events.py: one "started", one "row" for each line with nothing but what has
 * changed, one "finished". They come one by one while a picture is drawn, and all together in the node's `ui`.
 *
 * A model that draws in scales tells of them as of lines. Its cells are the tokens of all scales, one after the other.
 */

/** The fields of each event. A Python test holds this table equal to linear_core/events.py. */
export const FIELDS = {
  "started": ["run", "rows", "cols", "stride", "images", "shown", "columns", "layers", "heads", "detail", "seed", "policy", "release", "lines", "anchors", "recent", "cache_bytes", "full_bytes", "codebook", "list_index", "sides", "seeds", "state_bytes", "beside", "kept"],
  "row": ["run", "row", "rows", "cols", "seconds", "tokens_per_second", "held", "lines", "cache_bytes", "full_bytes", "replayed", "tokens", "cells", "shares", "evicted", "by_layer", "merged", "stands", "passes", "accepted", "side"],
  "picture": ["run", "lines"],
  "finished": ["run", "rows", "seconds", "tokens_per_second", "held", "passes", "accepted"]
};

const NONE = 0xffff; // fills up lists of evictions of unequal length
const MIB = 2 ** 20;

/**
 * @typedef {{ row: number, seconds: number, speed: number, held: number, replayed: boolean, tokens: Uint16Array | Uint32Array | BigUint64Array,
 *   cells: Uint16Array, shares: Uint8Array, evicted: Uint16Array, byLayer: Uint8Array, merged: Uint16Array,
 *   stands: Uint16Array, passes: number }} Line
 * @typedef {{ run: any, lines: Line[], finished: any, stopped: boolean, partial: boolean }} State
 *   run       the "started" event; of a page that came late, what a "row" tells of it
 *   lines     one for each row told so far
 *   finished  the "finished" event
 *   stopped   the run ended before its last line
 *   partial   the page came too late for the first lines: text and picture only, until the run has finished
 * @typedef {{ row?: number, layer?: number, head?: number }} Look  what to look at; -1 or nothing: the latest, all
 */

/** @type {State} */
export const EMPTY = Object.freeze({ run: null, lines: [], finished: null, stopped: false, partial: false });

/** One event later. @param {State} state @param {any} event @returns {State} */
export function reduce(state, event) {
  switch (event.kind) {
    case "started":
      return { ...EMPTY, run: event };
    case "row": {
      const known = state.run?.run === event.run;
      const at = known ? state : { ...EMPTY, run: { ...event, kind: "started", shown: 0, columns: 1, detail: "", sides: event.side?.length ? [event.side] : [] } };
      const partial = at.partial || event.row !== (at.lines.at(-1)?.row ?? -1) + 1;
      const each = event.side?.length ? event.side[0] * event.side[1] : event.cols;
      return { ...at, partial, lines: [...at.lines, decode(event, at.run.images * each)] };
    }
    case "finished":
      if (state.run?.run !== event.run) return state;
      return { ...state, finished: event, stopped: event.rows < state.run.rows };
    case "stopped": // the page's own: the host said that the run was interrupted or failed
      return state.run && !state.finished ? { ...state, stopped: true } : state;
    default:
      return state;
  }
}

/** The state after all of `events`, such as a node's `ui` holds. @param {any[]} events */
export const replay = (events) => events.reduce(reduce, EMPTY);

/**
 * The runs of a node within one prompt, one event later: ComfyUI runs a node once for each entry of a list. A run that is
 * drawn in parts starts again with each; the first run of a prompt puts an end to those of the one before.
 * @param {State[]} runs @param {any} event @returns {State[]}
 */
export function reduceRuns(runs, event) {
  if (event.kind !== "started") return [...runs.slice(0, -1), reduce(runs.at(-1) ?? EMPTY, event)];
  const before = runs.filter((state) => state.run && indexOf(state) < (event.list_index ?? 0));
  return [...before, reduce(EMPTY, event)];
}

/** Which of its node's runs this is, from 0. @param {State} state */
export const indexOf = (state) => state.run?.list_index ?? 0;

/** All runs that a node left behind, which ComfyUI puts one after the other. @param {any[]} events @returns {State[]} */
export function replayRuns(events) {
  const starts = events.flatMap((event, i) => (event.kind === "started" ? [i] : []));
  return starts.map((start, i) => replay(events.slice(start, starts[i + 1])));
}

/** @param {any} event @param {number} count  codes of a row @returns {Line} */
function decode(event, count) {
  return {
    row: event.row,
    seconds: event.seconds,
    speed: event.tokens_per_second,
    held: event.held,
    replayed: event.replayed,
    tokens: codesOf(event.tokens, count),
    cells: words(event.cells),
    shares: bytes(event.shares),
    evicted: words(event.evicted),
    byLayer: bytes(event.by_layer),
    merged: words(event.merged ?? ""), // runs of the first release do not have these two
    stands: words(event.stands ?? ""),
    passes: event.passes ?? 0 // older runs have none
  };
}

/** @param {string} text */
function bytes(text) {
  const raw = atob(text);
  return Uint8Array.from(raw, (c) => c.charCodeAt(0));
}

/** Little-endian on every machine. @param {string} text */
function words(text) {
  const raw = bytes(text);
  return Uint16Array.from({ length: raw.length / 2 }, (_, i) => raw[2 * i] | (raw[2 * i + 1] << 8));
}

/** `count` codes: two bytes each, or four or eight where one of them needs it. @param {string} text @param {number} count */
function codesOf(text, count) {
  const raw = bytes(text);
  const view = new DataView(raw.buffer);
  if (raw.length === 4 * count) return Uint32Array.from({ length: count }, (_, i) => view.getUint32(4 * i, true));
  if (raw.length === 8 * count) return BigUint64Array.from({ length: count }, (_, i) => view.getBigUint64(8 * i, true));
  return words(text);
}

/** The same the other way. @param {(number | bigint)[]} codes */
function packed(codes) {
  const size = codes.some((code) => code > 0xffffffff) ? 8 : codes.some((code) => code > 0xffff) ? 4 : 2;
  const view = new DataView(new ArrayBuffer(size * codes.length));
  codes.forEach((code, i) => {
    if (size === 8) view.setBigUint64(8 * i, BigInt(code), true);
    else if (size === 4) view.setUint32(4 * i, Number(code), true);
    else view.setUint16(2 * i, Number(code), true);
  });
  let raw = "";
  for (const byte of new Uint8Array(view.buffer)) raw += String.fromCharCode(byte);
  return btoa(raw);
}

/** Which cells of the pictures shown keep the code of a picture that exists already: bool of each; null: none do.
 * @param {State} state */
export function keptCells(state) {
  const { kept, shown, rows, cols } = state.run ?? {};
  if (!kept || state.partial) return null;
  const bits = bytes(kept);
  return Array.from({ length: shown * rows * cols }, (_, cell) => ((bits[cell >> 3] >> (cell & 7)) & 1) === 1);
}

// -- scales -----------------------------------------------------------------------------------------------------------

/** Whether the picture is drawn in scales. @param {any} run */
export const inScales = (run) => !!run?.sides?.length;

/** What a stage is called. @param {any} run */
export const unitOf = (run) => (inScales(run) ? "scale" : "row");

/** The scales of an image, coarse to fine: their sides, and their first cell. @param {any} run
 * @returns {{ rows: number, cols: number, first: number }[]} */
export function scalesOf(run) {
  let first = 0;
  return run.sides.map(([rows, cols]) => {
    const scale = { rows, cols, first };
    first += rows * cols;
    return scale;
  });
}

/** Cells of an image. @param {any} run @returns {number} */
export const cellsOf = (run) => (inScales(run) ? run.sides.reduce((sum, [rows, cols]) => sum + rows * cols, 0) : run.rows * run.cols);

/** The stage that each cell of an image belongs to, from 0. @param {any} run @returns {number[]} */
function stagesOf(run) {
  if (!inScales(run)) return Array.from({ length: run.rows * run.cols }, (_, cell) => Math.floor(cell / run.cols));
  return run.sides.flatMap(([rows, cols], i) => Array(rows * cols).fill(i));
}

/** Tokens held of each scale of an image, on average over layers and heads. @param {any} run @param {Uint8Array} held @param {number} image */
export function heldOfScales(run, held, image = 0) {
  const start = image * cellsOf(run);
  return scalesOf(run).map(({ rows, cols, first }) => held.subarray(start + first, start + first + rows * cols).reduce((sum, share) => sum + share, 0) / 255);
}

/**
 * Which places of the picture the cache remembers, 0 to 255 for each token of the last scale: the mean over the scales
 * that are ever held, resized to it and weighted by the tokens held of each. As linear_core/pictures/heatmap.py has it.
 * @param {any} run @param {Uint8Array} held @param {number} image
 */
export function remembered(run, held, image = 0) {
  const scales = scalesOf(run);
  const last = scales[scales.length - 1];
  const counts = heldOfScales(run, held, image).slice(0, scales.length > 1 ? -1 : 1);
  const all = Math.max(1e-9, counts.reduce((sum, count) => sum + count, 0));
  const places = new Float64Array(last.rows * last.cols);
  counts.forEach((count, i) => {
    const { rows, cols, first } = scales[i];
    const start = image * cellsOf(run) + first;
    for (let row = 0; count && row < last.rows; row++)
      for (let col = 0; col < last.cols; col++)
        places[row * last.cols + col] += (count / all) * held[start + Math.floor((row * rows) / last.rows) * cols + Math.floor((col * cols) / last.cols)];
  });
  return Uint8Array.from(places, Math.round);
}

// -- what is held -----------------------------------------------------------------------------------------------------

/** The number of lines to look at, from a row number. @param {State} state @param {Look} look */
const upTo = (state, look) => (look.row === undefined || look.row < 0 ? state.lines.length : look.row + 1);

/** Whether the trace can tell layers apart, and heads. @param {State} state */
export const canChoose = (state) => ({
  layers: !state.partial && ["heads", "layers"].includes(state.run?.detail),
  heads: !state.partial && state.run?.detail === "heads"
});

/**
 * Share of layers and heads that hold each cell, 0 to 255; of one layer or head, those of the first image alone.
 * @param {State} state @param {Look} look
 */
export function held(state, look = {}) {
  const { run } = state;
  if (!run || state.partial) return new Uint8Array(0);
  const size = cellsOf(run);
  const { layer = -1, head = -1 } = look;
  if (layer >= 0 && head >= 0 && run.detail === "heads") return scaled(countHeads(state, look, [layer], [head]), 1);
  if (layer >= 0 && run.detail === "heads") return scaled(countHeads(state, look, [layer], range(run.heads)), run.heads);
  if (head >= 0 && run.detail === "heads") return scaled(countHeads(state, look, range(run.layers), [head]), run.layers);
  const all = new Uint8Array(layer >= 0 ? size : run.shown * size);
  for (const line of state.lines.slice(0, upTo(state, look))) {
    if (layer < 0) {
      line.cells.forEach((cell, i) => (all[cell] = line.shares[i]));
    } else {
      const first = line.cells.filter((cell) => cell < size);
      first.forEach((cell, i) => (all[cell] = line.byLayer[layer * first.length + i]));
    }
  }
  return all;
}

/**
 * How many tokens a cell stands for where it is held, mean over layers and heads: 1 unless others were folded into it.
 * @param {State} state @param {number} cell @param {Look} look
 */
export function standsFor(state, cell, look = {}) {
  let eighths = 8;
  for (const line of state.lines.slice(0, upTo(state, look))) {
    const at = line.merged.indexOf(cell);
    if (at >= 0) eighths = line.stands[at];
  }
  return Math.max(1, eighths / 8);
}

/** How many of these layers and heads hold each cell of the first image.
 * @param {State} state @param {Look} look @param {number[]} layers @param {number[]} heads */
function countHeads(state, look, layers, heads) {
  const { rows, cols, stride, heads: all, layers: deep } = state.run;
  const scales = inScales(state.run) && scalesOf(state.run);
  const count = new Uint16Array(scales ? cellsOf(state.run) : rows * stride);
  for (const line of state.lines.slice(0, upTo(state, look))) {
    const each = line.evicted.length / (deep * all);
    const [from, to] = scales ? [scales[line.row].first, scales[line.row + 1]?.first ?? 0] : [line.row * stride, (line.row + 1) * stride]; // the last scale is never held
    count.fill(layers.length * heads.length, from, to);
    for (const layer of layers)
      for (const head of heads)
        for (let i = 0; i < each; i++) {
          const token = line.evicted[(layer * all + head) * each + i];
          if (token !== NONE) count[token]--;
        }
  }
  if (scales) return count;
  return Uint16Array.from({ length: rows * cols }, (_, cell) => count[Math.floor(cell / cols) * stride + (cell % cols)]);
}

const range = (/** @type {number} */ n) => Array.from({ length: n }, (_, i) => i);

/** @param {Uint16Array} counts @param {number} of */
const scaled = (counts, of) => Uint8Array.from(counts, (n) => Math.round((n * 255) / of));

/**
 * After which row each cell was gone altogether; -1 where it is still held or not there yet.
 * @param {State} state @param {Look} look
 */
export function evictedAfter(state, look = {}) {
  const until = upTo(state, look);
  const now = held(state, look);
  const after = new Int16Array(now.length).fill(-1);
  if (!now.length) return after;
  const stages = stagesOf(state.run);
  for (let row = until - 1; row >= 0; row--) {
    const then = row === until - 1 ? now : held(state, { ...look, row });
    for (let cell = 0; cell < now.length; cell++) {
      const born = stages[cell % stages.length];
      if (now[cell] === 0 && then[cell] === 0 && born <= row && (after[cell] === row + 1 || row === until - 1)) after[cell] = row;
    }
  }
  return after;
}

// -- words ------------------------------------------------------------------------------------------------------------

/** "5.1 MiB" @param {number} n */
export const mib = (n) => (n >= 100 * MIB ? (n / MIB).toFixed(0) : (n / MIB).toFixed(n < MIB ? 2 : 1));

/** "3 s", "2 min 5 s" @param {number} seconds */
export function duration(seconds) {
  if (seconds < 9.5) return `${seconds < 0.95 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const whole = Math.round(seconds);
  return whole < 100 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

/** Tokens a second over the lines drawn so far. @param {State} state */
export function speed(state) {
  const drawn = state.lines.filter((line) => !line.replayed);
  const seconds = drawn.reduce((sum, line) => sum + line.seconds, 0);
  return seconds ? drawn.reduce((sum, line) => sum + line.speed * line.seconds, 0) / seconds : 0;
}

/** Seconds until the last line, from the last few. @param {State} state */
export function eta(state) {
  const last = state.lines.filter((line) => !line.replayed).slice(-8);
  if (!last.length) return null;
  if (inScales(state.run)) { // by their tokens, and by the newest two: the first ones take as long as a pass does
    const newest = last.slice(-2);
    const size = (/** @type {number[]} */ [rows, cols]) => rows * cols;
    const each = newest.reduce((sum, line) => sum + line.seconds, 0) / newest.reduce((sum, line) => sum + size(state.run.sides[line.row] ?? [1, 1]), 0);
    return each * state.run.sides.slice(last[last.length - 1].row + 1).reduce((sum, side) => sum + size(side), 0);
  }
  const left = state.run.rows - 1 - state.lines[state.lines.length - 1].row;
  return (left * last.reduce((sum, line) => sum + line.seconds, 0)) / last.length;
}

/** Codes that a pass with drafts gave each image, over the lines so far; 0 without. @param {State} state */
export function tokensPerPass(state) {
  const drafted = state.lines.filter((line) => line.passes);
  const passes = drafted.reduce((sum, line) => sum + line.passes, 0);
  return passes ? (drafted.length * state.run.cols) / passes : 0;
}

/** "4 of 24 lines", "43 of 255 tokens"; "" where everything is kept, or where there is no cache.
 * @param {any} run @param {boolean} [partial]  the scales are not known */
export function keptOf(run, partial = false) {
  if (!inScales(run)) return run.lines < run.rows ? `${run.lines} of ${run.rows} lines` : "";
  if (partial) return `${run.lines} tokens`;
  const [rows, cols] = run.sides[run.sides.length - 1];
  const all = cellsOf(run) - rows * cols;
  return run.lines < all && run.cache_bytes < run.full_bytes ? `${run.lines} of ${all} tokens` : "";
}

/** "row 14/24, 3.1 tokens a pass · 412 tok/s · cache 4 of 24 lines · 5.1 MiB of 24.3 · ETA 3 s" @param {State} state */
export function statusText(state) {
  const { run, lines, finished } = state;
  if (!run) return "";
  const last = lines[lines.length - 1];
  const ahead = tokensPerPass(state);
  const kept = keptOf(run, state.partial);
  const parts = [`${unitOf(run)} ${last ? last.row + 1 : 0}/${run.rows}${ahead ? `, ${ahead.toFixed(1)} tokens a pass` : ""}`];
  const rate = finished ? finished.tokens_per_second : speed(state);
  if (rate) parts.push(`${Math.round(rate)} tok/s`);
  if (kept) parts.push(`cache ${kept}`, `${mib(run.cache_bytes)} MiB of ${mib(run.full_bytes)}`);
  else if (run.state_bytes) parts.push(`no cache: a state of ${mib(run.state_bytes)} MiB`);
  else parts.push(`full cache · ${mib(run.full_bytes)} MiB`);
  const left = state.partial && inScales(run) ? null : eta(state);
  if (finished) parts.push(`${duration(finished.seconds)}${state.stopped ? " · stopped" : ""}`);
  else if (state.stopped) parts.push("stopped");
  else if (left !== null) parts.push(`ETA ${duration(left)}`);
  return parts.join(" · ");
}

/** "row 3, column 7 · kept by 42 % of heads", "scale 5 of 9: 3 of 25 tokens · row 2, column 1 · kept by 8 % of heads"
 * @param {State} state @param {number} cell @param {Look} look */
export function hoverText(state, cell, look = {}) {
  const { run } = state;
  const [image, at] = [Math.floor(cell / cellsOf(run)), cell % cellsOf(run)];
  const stage = stagesOf(run)[at];
  const now = held(state, look);
  const which = run.shown > 1 ? `picture ${image + 1}, ` : "";
  if (!inScales(run)) {
    const name = `${which}row ${stage + 1}, column ${(at % run.cols) + 1}`;
    return stage >= upTo(state, look) ? `${name} · not drawn yet` : name + fate(state, cell, now, look, stage);
  }
  const { rows, cols, first } = scalesOf(run)[stage];
  const name = `${which}scale ${stage + 1} of ${run.rows}`;
  if (stage >= upTo(state, look)) return `${name}, ${rows} × ${cols} · not drawn yet`;
  if (run.state_bytes) return `${name}, ${rows} × ${cols} · no cache, so no token is held: a state joins the scales`;
  if (stage === run.rows - 1) return `${name}, ${rows} × ${cols} · drawn and never kept`;
  const count = now.length > cell ? `${Math.round(heldOfScales(run, now, image)[stage])} of ` : "";
  const place = `row ${Math.floor((at - first) / cols) + 1}, column ${((at - first) % cols) + 1}`;
  return `${name}: ${count}${rows * cols} tokens · ${place}${fate(state, cell, now, look, stage)}`;
}

/** " · kept by 42 % of heads", " · evicted after row 9, 2 lines later"
 * @param {State} state @param {number} cell @param {Uint8Array} now  held @param {Look} look @param {number} stage  of the cell */
function fate(state, cell, now, look, stage) {
  const { run } = state;
  const given = keptCells(state)?.[cell] ? " · outside the mask" : "";
  if (!now.length) return given;
  if (cell >= now.length) return " · layers and heads are told of the first picture only";
  const gone = evictedAfter(state, look)[cell];
  const { layer = -1, head = -1 } = look;
  const of = head >= 0 ? (layer >= 0 ? "" : "layers") : "heads";
  if (gone < 0) {
    const tokens = standsFor(state, cell, look);
    const more = tokens > 1 ? ` · stands for ${tokens < 10 ? tokens.toFixed(1).replace(".0", "") : Math.round(tokens)} tokens` : "";
    return `${given} · ${of ? `kept by ${now[cell] === 255 ? "all" : `${Math.max(1, Math.round(now[cell] / 2.55))} % of`} ${of}` : "kept"}${more}`;
  }
  const line = inScales(run) ? "scale" : "line";
  if (line === "line" && cell % (run.rows * run.cols) === run.rows * run.cols - 1) return " · the last token is drawn and never kept";
  return `${given} · evicted after ${unitOf(run)} ${gone + 1}${gone > stage ? `, ${gone - stage} ${line}${gone - stage > 1 ? "s" : ""} later` : ""}`;
}

/** What the model chooses where a widget says −1, as the nodes name it. */
const OWN = ["guidance", "temperature", "top_k", "top_p"];

/**
 * "−1 is the model's own: guidance 3 · temperature 1 · top_k all · top_p 1", of those that are left to the model.
 * @param {Record<string, unknown>} values  by widget  @param {Record<string, number> | undefined} own  undefined: not known
 */
export function ownText(values, own) {
  const names = OWN.filter((name) => Number(values[name]) < 0);
  if (!names.length) return "";
  const each = names.map((name) => `${name} ${name === "top_k" && own?.[name] === 0 ? "all" : own?.[name]}`);
  return `−1 is the model's own${own ? `: ${each.join(" · ")}` : ""}`;
}

// -- lines to keep ----------------------------------------------------------------------------------------------------

/**
 * The first `rows` lines of every picture as the text that the Generate node takes back: "images x rows x cols : base64",
 * or of scales "images x tokens : base64", as linear_core/events.py packs them. @param {State} state @param {number} rows
 */
export function keptText(state, rows) {
  const { images, cols } = state.run;
  if (state.partial || rows < 1 || rows > state.lines.length) return "";
  /** @type {(number | bigint)[]} */
  const codes = [];
  for (let image = 0; image < images; image++)
    for (const { tokens } of state.lines.slice(0, rows)) {
      const each = tokens.length / images;
      for (const code of tokens.subarray(image * each, (image + 1) * each)) codes.push(code);
    }
  const of = state.run.codebook; // whose codes they are, so that no other model takes them
  const sizes = inScales(state.run) ? [images, codes.length / images] : [images, rows, cols];
  return `${sizes.join("x")}:${packed(codes)}${of ? `:${of}` : ""}`;
}

/**
 * The same of a node that runs several times, or whose seed comes through a link: "list index @ seed | lines to keep" of
 * the run that is shown, then of the others all that can be kept, with their own seeds, so that they stay as they are.
 * @param {State[]} runs @param {number} shown  which of them @param {number} rows  to keep of it
 * @param {number | string} seed  for the rest of it, or several between commas, one for each picture
 * @param {boolean} linked  whether the node gets its seed through a link, or has seeds for each picture
 */
export function keptTextOfRuns(runs, shown, rows, seed, linked) {
  const text = keptText(runs[shown], rows);
  if (!text || (runs.length < 2 && !linked)) return text;
  const others = runs.filter((_, i) => i !== shown).map((state) => ({ state, rows: Math.min(state.lines.length, state.run.rows - 1) }));
  const parts = others.map(({ state, rows }) => [indexOf(state), state.run.seeds || state.run.seed, keptText(state, rows)]).filter((part) => part[2]);
  return [[indexOf(runs[shown]), seed, text], ...parts].map(([index, seed, kept]) => `${index}@${wholeSeed(seed)}|${kept}`).join(";");
}

/** A seed in full; the largest were rounded up, beyond what a seed can be. @param {number | string} seed */
const wholeSeed = (seed) => (typeof seed === "string" ? seed : seed < 2 ** 64 ? BigInt(seed) : 2n ** 64n - 1n);

/** Which run a kept text is about; -1 where the node has only one. @param {unknown} text */
export const keptRun = (text) => Number(/^(\d+)@/.exec(String(text ?? ""))?.[1] ?? -1);

/** How many lines a kept text holds, of the run that it is about; of scales, how many tokens. @param {unknown} text */
export const keptRows = (text) => Number(/^(?:\d+@[\d,]+\|)?\d+x(\d+)(?:x\d+)?:/.exec(String(text ?? ""))?.[1] ?? 0);

// -- memory -----------------------------------------------------------------------------------------------------------

/** Policies that share the budget out unevenly have room for twice the budget in every head: plan.py's UNEVEN. */
const UNEVEN = ["adakv", "amskv", "cake", "hack", "headkv", "heatkv", "prefixkv", "pyramidkv", "scalekv"];
/** Of these, those that share it among all layers: plan.py's ACROSS_LAYERS. */
const ACROSS_LAYERS = ["amskv", "cake", "hack", "heatkv", "prefixkv", "pyramidkv", "scalekv"];
/** Of these, those under which a layer may keep all: plan.py's WHOLE. */
const WHOLE = ["heatkv", "scalekv"];
/** Over scales, heads of unequal room are grouped by quarters of the budget: plan.py's ROOMS. */
const ROOMS = 4;
const LINES = 24; // of a picture whose budget is stated in lines while it is drawn in scales

/**
 * A picture's size as far as memory goes: `scales` of one that is drawn in scales are tokens of the first, of all but the
 * last, and of the last.
 * @typedef {{ rows: number, cols?: number, stride: number, scales?: [number, number, number] }} Grid
 */

/** Rounded as Python does: halves to the even number. @param {number} x */
const toEven = (x) => (x % 1 === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));

/** Share of a picture drawn in scales that is kept: CachePlan.ratio. @param {any} plan @returns {number} */
const ratioOf = (plan) => (plan.policy === "full" ? 1 : Math.min(plan.share || plan.budget / LINES, 1));

/** Tokens that each head keeps of it: CachePlan.keeps. @param {any} plan @param {[number, number, number]} scales */
const keepsOf = (plan, [first, kept]) => Math.min(Math.max(1, first, toEven(ratioOf(plan) * kept)), kept);

/**
 * The size of a picture of which a drafter draws only the first `count` scales; 0: all but the last two.
 * @param {Grid} grid @param {number[]} [tokens]  of each scale, at the model's own size @param {number} [count] @returns {Grid}
 */
export function draftedGrid(grid, tokens = [], count = 0) {
  if (!grid.scales || tokens[tokens.length - 1] !== grid.scales[2]) return grid; // another size: too much, if anything
  const [first, kept] = grid.scales;
  return { ...grid, scales: [first, kept, tokens[(count || Math.max(1, tokens.length - 2)) - 1] ?? grid.scales[2]] };
}

/** Of the plans that one budget makes for several models that draw in turn, the one that keeps least; it is used for all.
 * @template P @param {P[]} plans @returns {P} */
export const leastPlan = (plans) => plans.reduce((least, plan) => (ratioOf(plan) < ratioOf(least) ? plan : least));

/** Slots for each head and the last scale, in the layer that is computed: CachePlan.work_slots. @param {any} plan @param {[number, number, number]} scales */
function workSlots(plan, scales) {
  const [keeps, [, kept, last]] = [keepsOf(plan, scales), scales];
  if (WHOLE.includes(plan.policy)) return kept + last;
  if (ACROSS_LAYERS.includes(plan.policy)) return Math.min(2 * keeps, kept) + last;
  const room = plan.policy === "fold" || UNEVEN.includes(plan.policy) ? Math.ceil(keeps / ROOMS) : 0;
  return Math.min(keeps + room, kept) + last;
}

/** CacheShape.scales_bytes. @param {any} shape @param {[number, number, number]} scales @param {any} plan @param {number} sequences */
function scalesBytes(shape, scales, plan, sequences) {
  // No cache: what each layer carries from scale to scale, in float32 or better.
  if (shape.state) return shape.layers * sequences * shape.state * Math.max(shape.bytes_per_element, 4);
  const [keeps, heads] = [keepsOf(plan, scales), 2 * sequences * shape.heads];
  const slot = slotBytes(shape, plan.storage, 4);
  let held = shape.layers * heads * keeps * slot;
  if (ACROSS_LAYERS.includes(plan.policy) && keeps < scales[1]) held += WHOLE.includes(plan.policy) ? held : Math.floor(held / 2);
  return held + heads * workSlots(plan, scales) * shape.head_dim * shape.bytes_per_element;
}

/** linear_core.loop.memory.scales_run_bytes. @param {any} model @param {[number, number, number]} scales @param {any} plan @param {number} sequences */
function scalesRunBytes(model, scales, plan, sequences) {
  const { heads, bytes_per_element: wide } = model;
  const [keeps, slots, size] = [keepsOf(plan, scales), workSlots(plan, scales), scales[2]];
  let settling = 0;
  if (!model.state && keeps < scales[1]) {
    const together = Math.min(sequences, Math.max(1, Math.floor(pairsAtOnce(model) / (heads * slots ** 2))));
    settling = together * heads * (folds(plan) ? slots ** 2 : 64 * slots) * 4 * 3;
  }
  const activations = sequences * size * model.hidden * (wide * 2 + 4);
  const sampling = sequences * size * model.logits * (4 * 3 + 8 * 2);
  return scalesBytes(model, scales, plan, sequences) + (model.state ? 0 : model.layers * sequences * heads * keeps * 12) + Math.max(activations, settling, sampling);
}

const PAIRS = 2 ** 21; // of slots, whose distances and vectors fit a CPU's cache

/** Pairs of slots that folding compares at once. @param {{ device: string }} model */
const pairsAtOnce = (model) => (model.device === "cpu" ? PAIRS : 2 ** 25);

/** @param {{ policy: string, release?: string }} plan */
const folds = (plan) => plan.release === "fold" || (plan.release === "auto" && plan.policy === "fold");

/** Lines that each head has room for: CachePlan.lines. @param {{ policy: string, budget: number }} plan @param {{ rows: number }} grid */
function linesOf(plan, grid) {
  const kept = UNEVEN.includes(plan.policy) ? 2 * plan.budget : plan.budget;
  return plan.policy === "full" ? grid.rows : Math.min(kept + 1, grid.rows);
}

/**
 * A key, or a value, of one head, with a scale of so many bytes where the storage has one: CacheShape.slot_bytes.
 * @param {{ head_dim: number, bytes_per_element: number }} shape @param {string | undefined} storage @param {number} scale
 */
function slotBytes(shape, storage, scale) {
  if (storage === "int8") return shape.head_dim + scale;
  if (storage === "int4") return Math.floor(shape.head_dim / 2) + 2 * Math.ceil(shape.head_dim / 16) + scale;
  return shape.head_dim * shape.bytes_per_element;
}

/**
 * Bytes of the whole cache, as linear_core.plan.CacheShape has it; a test holds the two equal.
 * @param {{ layers: number, heads: number, head_dim: number, prompt: number, bytes_per_element: number }} shape
 * @param {Grid} grid
 * @param {{ policy: string, budget: number }} plan
 * @param {number} sequences  images, twice with guidance
 */
export function cacheBytes(shape, grid, plan, sequences) {
  if (grid.scales) return scalesBytes(shape, grid.scales, plan, sequences);
  const slots = shape.prompt + linesOf(plan, grid) * grid.stride;
  const heads = 2 * shape.layers * sequences * shape.heads; // keys and values
  return heads * slots * slotBytes(shape, plan.storage, shape.bytes_per_element);
}

/** A preset, or settings of one's own, with the budget of the two widgets below in its place: nodes/plan.py.
 * @template {{ policy: string, budget: number, share?: number, mib?: number }} P
 * @param {P} plan @param {string} unit  lines, share or MiB @param {number} amount  0: the plan's own @returns {P} */
export const withBudget = (plan, unit, amount) =>
  amount > 0 && plan.policy !== "full" ? { ...plan, share: 0, mib: 0, [{ share: "share", MiB: "mib" }[unit] ?? "budget"]: amount } : plan;

/**
 * The plan with its budget in lines, of scales as a share, as CachePlan.resolve has it; a test holds the two equal. Its
 * budget is 0 where the memory is not enough for one line, or one scale.
 * @template {{ policy: string, budget: number, share?: number, mib?: number }} P
 * @param {Parameters<typeof cacheBytes>[0]} shape @param {Grid} grid @param {P} plan
 * @param {number} sequences @returns {P}
 */
export function resolved(shape, grid, plan, sequences) {
  if (shape.state) return { ...plan, policy: "full", budget: 4, share: 0, mib: 0 }; // no cache: nothing to evict
  if (plan.policy === "full" || !(plan.share || plan.mib)) return plan;
  const { scales } = grid;
  const keeping = (/** @type {number} */ count) =>
    scales ? { ...plan, budget: count && plan.budget, share: count / Math.max(scales[1], 1), mib: 0 } : { ...plan, budget: count, share: 0, mib: 0 };
  if (plan.share) return scales ? plan : keeping(Math.max(1, toEven(plan.share * grid.rows)));
  let count = scales ? scales[1] : grid.rows;
  while (count > 0 && cacheBytes(shape, grid, keeping(count), sequences) > (plan.mib ?? 0) * MIB) count--;
  return keeping(count);
}

/** "4 of 24 lines (1/6)", "43 of 255 tokens (1/6)"; "" where everything is kept.
 * @param {{ policy: string, budget: number, share?: number }} plan @param {Grid} grid */
export function budgetText(plan, grid) {
  const [kept, all, unit] = grid.scales ? [keepsOf(plan, grid.scales), grid.scales[1], "tokens"] : [plan.budget, grid.rows, "lines"];
  if (plan.policy === "full" || kept + (grid.scales ? 0 : 1) >= all) return "";
  const times = Math.round(all / kept);
  const exact = grid.scales ? toEven(all / times) === kept : all / kept === times; // a share is rounded to whole tokens
  const share = exact ? `1/${times}` : `${Math.round((100 * kept) / all)} %`;
  return `${kept} of ${all} ${unit} (${share})`;
}

/**
 * Bytes of a run beside the weights, as linear_core.loop.memory.run_bytes has it; a test holds the two equal.
 * @param {{ layers: number, heads: number, head_dim: number, prompt: number, bytes_per_element: number, group?: number, codes: number, logits?: number, hidden?: number, device: string }} model
 * @param {Grid} grid
 * @param {{ policy: string, budget: number, release?: string, anchors: number, recent: number }} plan
 * @param {number} sequences
 */
export function runBytes(model, grid, plan, sequences) {
  const { heads, head_dim: dim, bytes_per_element: wide, group = 1 } = model;
  if (grid.scales) return scalesRunBytes(model, grid.scales, plan, sequences);
  const held = cacheBytes(model, grid, plan, sequences);
  const line = cacheBytes({ ...model, prompt: 0 }, { rows: 1, stride: grid.stride }, { policy: "full", budget: 1 }, sequences);
  const beside = Math.floor(held / (2 * dim * wide)) * (wide + 16) + Math.floor((line * group) / 2);
  const each = model.prompt + linesOf(plan, grid) * grid.stride;
  const evicts = plan.policy !== "full" && plan.budget + 1 < grid.rows;
  const parts = evicts && plan.policy === "fold" && folds(plan) && plan.budget <= 3; // room is made within a line: values are compared, too
  const pairs = heads * each * Math.max(each, (parts ? 4 : 2) * dim); // of a sequence in one layer
  const together = evicts ? Math.min(model.layers * sequences, Math.floor(PAIRS / pairs)) : 0; // of several layers, at most
  let attention = Math.max(sequences, together) * heads * group * grid.stride * each * 8;
  if (evicts && folds(plan)) {
    const atOnce = Math.max(Math.min(sequences, Math.max(1, Math.floor(pairsAtOnce(model) / pairs))), together);
    const near = Math.min(Math.max(2 * grid.stride + plan.anchors + plan.recent * grid.stride, Math.floor(each / 2)), each);
    const queries = (parts ? 6 : 4) * group * grid.stride;
    attention = atOnce * heads * each * ((parts ? 6 : 3) * dim + 2 * near + queries) * 4;
  }
  return held + beside + attention + sequences * model.codes * 32;
}

/** How many pictures, of so many sequences each, a run in `room` bytes can draw at once; up to `most`. */
export function picturesThatFit(/** @type {number} */ room, /** @type {(sequences: number) => number} */ needed, each = 2, most = 512) {
  let count = 0;
  while (count < most && needed((count + 1) * each) <= room) count++;
  return count;
}

/**
 * The grid of a picture of "832 x 1216" pixels; where no size is chosen, the model's own.
 * @param {{ rows: number, cols: number, stride: number, pixels?: number, scales?: Record<string, [number, number, number]> }} own
 * @param {string | undefined} size @returns {Grid}
 */
export function gridOf(own, size) {
  const [width, height] = String(size ?? "").split(" x ").map((pixels) => Number(pixels) / (own.pixels ?? 16));
  const { scales, ...grid } = width && height ? { ...own, rows: height, cols: width, stride: width + own.stride - own.cols } : own;
  const { rows, cols, stride } = grid;
  const of = scales?.[`${rows} x ${cols}`];
  return of ? { rows, cols, stride, scales: of } : { rows, cols, stride };
}

/**
 * "KV cache 5.1 MiB of 24.3 MiB, −79 % · weights 3.0 GB · room for 40 pictures at once", and whether the batch fits.
 * @param {number} bytes @param {number} full @param {number} weights @param {number | null} fitting  pictures that fit; null: not known
 * @param {number} images  @param {string[]} unknown  inputs that decide how many there are, and come through a link; then
 *   the numbers are those of one picture
 * @param {boolean} [state]  the model keeps no cache, and the bytes are those of a state
 */
export function memoryText(bytes, full, weights, fitting, images, unknown = [], most = 512, state = false) {
  const each = unknown.length ? " a picture" : "";
  const parts = [state ? `no cache: a state of ${mib(bytes)} MiB${each}` : `KV cache ${mib(bytes)} MiB` + (bytes < full ? ` of ${mib(full)} MiB${each}, −${Math.round((1 - bytes / full) * 100)} %` : `${each}, everything kept`)];
  if (unknown.length) parts.push(`${unknown.join(" and ")} unknown until it runs`);
  if (weights) parts.push(`weights ${(weights / 1e9).toFixed(2)} GB`);
  const fits = fitting === null || images <= fitting;
  if (fitting === 0) parts.push("too little memory is free for one picture");
  else if (!fits) parts.push(`room for ${fitting} of ${images} pictures at once`);
  else if (fitting !== null) parts.push(`room for ${fitting >= most ? `${most} pictures or more` : fitting === 1 ? "one picture" : `${fitting} pictures`} at once`);
  return { text: parts.join(" · "), fits, share: state ? 0 : bytes / full };
}
