// @ts-check
/**
 * LineAR on the page: three widgets, declared in the nodes' schemas as types without a socket.
 *
 *   LINEAR_VIEW     on Generate: the rows so far, what the cache holds of them, and Reroll
 *   LINEAR_COMPARE  on Compare: two pictures under one slider
 *   LINEAR_MEMORY   on Line Cache: what the cache will take, before anything runs
 *
 * What is known is in state.js, how it looks in draw.js; here is what touches the page. One listener for each of the
 * host's events finds the widget by node id, through subgraphs.
 */
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { cellAt, cellOfScales, draw, drawScales, layout, layoutScales, pictureAt, scaleOfCell } from "./draw.js";
import { EMPTY, budgetText, cacheBytes, canChoose, draftedGrid, gridOf, held, heldOfScales, hoverText, inScales, keptCells, keptOf, keptRows, keptRun, keptTextOfRuns, leastPlan, memoryText, mib, ownText, picturesThatFit, reduceRuns, remembered, replayRuns, resolved, runBytes, statusText, unitOf, withBudget } from "./state.js";

const EVENT = "linear_ar.line";
/** The view on a node; it lives with its widget. @param {any} node */
const viewOf = (node) => node?.widgets?.find((/** @type {any} */ widget) => widget.linearView)?.linearView;
const allViews = () => allNodes().map(viewOf).filter(Boolean);

/** What the schemas say: sizes of every model's cache, how it samples by itself, and the presets. */
const known = { /** @type {Record<string, any>} */ models: {}, /** @type {Record<string, any>} */ presets: {} };

// -- the page's own things --------------------------------------------------------------------------------------------

const CSS = `
:host { display: flex; flex-direction: column; gap: 5px; width: 100%; height: 100%; min-height: var(--least, 0); box-sizing: border-box; padding: 2px 4px 4px;
  font: 12px/1.35 system-ui, sans-serif; color: var(--fg-color); }
.row { display: flex; gap: 6px; align-items: center; flex: none; min-height: 24px; }
.row.wraps { flex-wrap: wrap; justify-content: space-between; }
.row.actions { flex-wrap: wrap; min-height: 32px; }
.group { display: flex; gap: 6px; align-items: center; }
[hidden] { display: none !important; }
.later { visibility: hidden; }
.paper { position: relative; flex: 1; min-height: 0; }
canvas { position: absolute; inset: 0; width: 100%; height: 100%; border-radius: 4px; }
canvas.pick { cursor: crosshair; }
canvas.slide { cursor: ew-resize; }
button, select { font: inherit; color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color);
  border-radius: 5px; padding: 2px 8px; cursor: pointer; max-width: 100%; }
select { padding: 2px 3px; }
button:hover:not(:disabled), select:hover { border-color: var(--fg-color); }
button:disabled { opacity: 0.5; cursor: default; }
:focus-visible { outline: 2px solid #4a9df8; outline-offset: 1px; }
.modes { display: inline-flex; flex: none; border: 1px solid var(--border-color); border-radius: 6px; overflow: hidden; }
.modes button { border: 0; border-radius: 0; background: transparent; color: var(--descrip-text); padding: 2px 10px; }
.modes button[aria-checked=true] { background: var(--comfy-input-bg); color: var(--input-text); font-weight: 600; }
.modes button:focus-visible { outline-offset: -2px; }
input[type=range] { accent-color: #e3b341; min-width: 0; flex: 1; height: 16px; margin: 0; cursor: pointer; }
.status { font-size: 11px; font-variant-numeric: tabular-nums; flex: none; }
.status span { display: inline-block; }
.row .status { flex: 1 1 180px; min-width: 0; }
.quiet { color: var(--descrip-text); }
.moment { flex: none; }
.note { flex: 1 1 120px; min-width: 0; }
.tip { position: absolute; pointer-events: none; z-index: 1; background: var(--comfy-menu-bg); color: var(--fg-color);
  border: 1px solid var(--border-color); border-radius: 5px; padding: 2px 7px; width: max-content; max-width: 100%;
  box-sizing: border-box; box-shadow: 0 2px 8px rgb(0 0 0 / 0.35); }
.empty { position: absolute; inset: 0; display: grid; place-items: center; text-align: center; color: var(--descrip-text); padding: 12px;
  border: 1px dashed var(--border-color); border-radius: 6px; }
.track { flex: none; height: 6px; border-radius: 3px; background: var(--border-color); overflow: hidden; }
.fill { height: 100%; width: 0; border-radius: 3px; background: #3fa34d; }
.tight .fill { background: #e09b24; }
.tight .status { color: #e09b24; }
.memory { justify-content: center; }
.memory .status { flex: initial; text-align: center; }
`;

/** @param {string} tag @param {Record<string, any>} [more] @param {...(Node | string)} inside @returns {any} */
function el(tag, more = {}, ...inside) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(more)) {
    if (name in element && name !== "role") /** @type {any} */ (element)[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...inside);
  return element;
}

/** A text, which breaks where one of its parts ends when there is too little room for a line. @param {any} element @param {string} text */
function say(element, text) {
  if (element.textContent === text) return;
  element.replaceChildren(...text.split(/(?<=[,:·]) /).flatMap((part, i) => [i ? " " : "", el("span", { textContent: part })]));
}

/** An element of our own with our style, which neither leaks nor is leaked into. @param {...Node} inside */
function host(...inside) {
  const root = el("div");
  const shadow = root.attachShadow({ mode: "open" });
  shadow.append(el("style", { textContent: CSS }), ...inside);
  // Keys and presses meant for the widget are not the graph's; the wheel, and what we do not use, go on to it.
  for (const type of ["pointerdown", "mousedown", "dblclick", "contextmenu"]) {
    root.addEventListener(type, (event) => event.composedPath()[0] !== root && event.stopPropagation());
  }
  root.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey) event.stopPropagation();
  });
  return root;
}

/** Colours of the page's theme. @param {Element} element */
function themeOf(element) {
  const style = getComputedStyle(element);
  const get = (/** @type {string} */ name, /** @type {string} */ otherwise) => style.getPropertyValue(name).trim() || otherwise;
  return {
    background: get("--comfy-input-bg", "#222"),
    foreground: get("--fg-color", "#fff"),
    muted: get("--descrip-text", "#999"),
    border: get("--border-color", "#4e4e4e"),
  };
}

/** A canvas that is drawn at most once a frame, in CSS pixels. @param {(ctx: any, width: number, height: number) => void} paint */
function paper(paint) {
  const canvas = el("canvas", { tabIndex: 0 });
  const tip = el("div", { className: "tip", hidden: true });
  const box = el("div", { className: "paper" }, canvas, tip);
  let asked = false;
  const redraw = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      const [width, height, ratio] = [canvas.clientWidth, canvas.clientHeight, Math.max(1, window.devicePixelRatio)];
      if (!width || !height) return;
      const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
      if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
      const ctx = canvas.getContext("2d");
      ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
      ctx.clearRect(0, 0, width, height);
      paint(ctx, width, height);
    });
  };
  const observer = new ResizeObserver(redraw);
  observer.observe(box);
  /** The pointer in CSS pixels of the canvas, whatever the graph's zoom. @param {PointerEvent} event */
  const point = (event) => {
    const rect = canvas.getBoundingClientRect();
    return [((event.clientX - rect.left) * canvas.clientWidth) / rect.width, ((event.clientY - rect.top) * canvas.clientHeight) / rect.height];
  };
  return { box, canvas, tip, redraw, point };
}

/** Modes that exclude each other, for pointer and keyboard. @param {string[]} names @param {string} label @param {(name: string) => void} choose */
function modes(names, label, choose) {
  const buttons = names.map((name) => el("button", { type: "button", role: "radio", textContent: name, onclick: () => set(name, true) }));
  const set = (/** @type {string} */ name, focus = false) => {
    buttons.forEach((button, i) => {
      button.setAttribute("aria-checked", String(names[i] === name));
      button.tabIndex = names[i] === name ? 0 : -1;
      if (focus && names[i] === name) button.focus();
    });
    choose(name);
  };
  const group = el("div", { className: "modes", role: "radiogroup", "aria-label": label }, ...buttons);
  group.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const now = buttons.findIndex((button) => button.getAttribute("aria-checked") === "true");
    set(names[(now + step + names.length) % names.length], true);
  });
  return { group, set };
}

/** @param {any} node @param {string} name @param {any} value */
function setWidget(node, name, value) {
  const widget = node.widgets?.find((/** @type {any} */ w) => w.name === name);
  if (!widget || widget.value === value) return;
  widget.value = value;
  widget.callback?.(value);
}

const widgetValue = (/** @type {any} */ node, /** @type {string} */ name) => node?.widgets?.find((/** @type {any} */ w) => w.name === name)?.value;

// -- the graph around a node -------------------------------------------------------------------------------------------

/** The link into an input. @param {any} node @param {string} name */
function linkInto(node, name) {
  const slot = node?.graph ? (node.inputs ?? []).findIndex((/** @type {any} */ i) => i.name === name) : -1;
  if (slot < 0) return null;
  if (!node.subgraph) return node.getInputLink(slot);
  // Asked for its links, a subgraph tells of those inside it.
  const links = node.graph.links?.values?.() ?? Object.values(node.graph.links ?? {});
  return [...links].find((link) => link?.target_slot === slot && String(link.target_id) === String(node.id)) ?? null;
}

/** Whether a widget's value comes through its socket. @param {any} node @param {string} name */
const isLinked = (node, name) => !!linkInto(node, name);

/** Every node of a graph and of the subgraphs in it. @param {any} graph @returns {any[]} */
const everyNode = (graph) => (graph?.nodes ?? graph?._nodes ?? []).flatMap((/** @type {any} */ node) => [node, ...everyNode(node.subgraph)]);
const allNodes = () => everyNode(app.rootGraph ?? app.graph);

/**
 * Where the links into an input begin, through reroutes, into subgraphs and out of them: a node, and the name of its own
 * input where that is not linked any further. null: they end nowhere. @param {any} node @param {string | undefined} name
 * @returns {{ node: any, name?: string } | null}
 */
function origin(node, name) {
  for (let hops = 0; node && name && hops < 40; hops++) {
    const link = linkInto(node, name);
    if (!link) return { node, name };
    if (Number(link.origin_id) === SUBGRAPH_INPUT) {
      const outside = allNodes().filter((each) => each.subgraph === node.graph); // several: each may bring something else
      [node, name] = [outside.length === 1 ? outside[0] : null, node.graph.inputs?.[link.origin_slot]?.name];
      continue;
    }
    let [from, slot, graph] = [node.graph.getNodeById(link.origin_id), link.origin_slot, node.graph];
    while (from?.subgraph) {
      graph = from.subgraph;
      const inner = graph.getLink?.(graph.outputs?.[slot]?.linkIds?.[0]);
      [from, slot] = [inner && graph.getNodeById(inner.origin_id), inner?.origin_slot];
    }
    if (from?.type !== "Reroute") return from ? { node: from } : null;
    [node, name] = [from, from.inputs?.[0]?.name];
  }
  return null;
}

const SUBGRAPH_INPUT = -10; // what the page says in place of a node's id
const OFF = [2, 4]; // modes of a node that is muted or bypassed

/** What an input gets when the graph runs; undefined where only the run can tell. Known is what stands in a widget, and
 * what a node brings through a link that does nothing but hold a value. @param {any} node @param {string} name */
function valueOf(node, name) {
  const from = origin(node, name);
  if (!from || from.name) return from?.name && widgetValue(from.node, from.name);
  const values = (from.node.widgets ?? []).filter((/** @type {any} */ w) => w.name !== "control_after_generate");
  const holds = values.length === 1 && (from.node.type === "PrimitiveNode" || values[0].name === "value");
  return holds && !OFF.includes(from.node.mode) && !isLinked(from.node, values[0].name) ? values[0].value : undefined;
}

const LOADER = "LineAR_LoadModel";

/** What the schema says of the model that a node draws with; undefined where the graph leaves that open. @param {any} node */
function modelOf(node) {
  const from = origin(node, "model")?.node;
  const loaders = allNodes().filter((each) => each.type === LOADER);
  const loader = from?.type === LOADER ? from : loaders.length === 1 ? loaders[0] : null;
  return known.models[valueOf(loader, "model")];
}

const goesOn = (/** @type {import("./state.js").State} */ state) => !!state.run && !state.finished && !state.stopped;

/** A picture that a node left behind. @param {any} ref */
const askPicture = ({ filename, subfolder, type }) => api.fetchApi(`/view?${new URLSearchParams({ filename, subfolder, type })}`);

/** Buttons that go to the one before and the one after, and between them which one it is.
 * @param {string} what @param {(step: number) => void} turn */
function pager(what, turn) {
  const button = (/** @type {string} */ sign, /** @type {string} */ label, /** @type {number} */ step) => el("button", { type: "button", textContent: sign, title: label, "aria-label": label, onclick: () => turn(step) });
  const count = el("span", { className: "quiet" });
  const group = el("div", { className: "group", hidden: true }, button("‹", `previous ${what}`, -1), count, button("›", `next ${what}`, 1));
  /** @param {number} at @param {number} of @param {string} [name] */
  const tell = (at, of, name = "") => {
    group.hidden = of < 2;
    count.textContent = `${name}${at + 1}/${of}`;
  };
  return { group, tell };
}

// -- what both views share --------------------------------------------------------------------------------------------

/** A widget that is told of runs: `fresh` clears what it shows of the last one, `show` brings it up to date. */
class Told {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    /** @type {import("./state.js").State[]} */
    this.states = []; // the node's runs in one prompt: one for each entry, where it gets a list
    this.at = 0; // the run that is shown
    this.wanted = -1; // the run that was chosen; -1: the last
    this.staying = false; // it was chosen while others were still to come
    this.kept = ""; // the widget's value
    this.pending = new Map();
    this.own = el("div", { className: "status quiet own" });
  }

  begin() {
    clearInterval(this.watch);
    this.watch = setInterval(() => this.showOwn(), 400); // as the memory line does
    this.showOwn();
  }

  end() {
    clearInterval(this.watch);
  }

  /** What the model does where a widget says −1. */
  showOwn() {
    const values = Object.fromEntries((this.node.widgets ?? []).map((/** @type {any} */ w) => [w.name, valueOf(this.node, w.name)]));
    say(this.own, ownText(values, modelOf(this.node)?.sampling));
    this.own.hidden = !this.own.textContent;
  }

  /** The run that is shown. */
  get state() {
    return this.states[this.at] ?? EMPTY;
  }

  /** The run that is drawn, or was drawn last. */
  get last() {
    return this.states.at(-1) ?? EMPTY;
  }

  /** Whether the run that is shown goes on. */
  get running() {
    return goesOn(this.state);
  }

  /** Whether any run of the node goes on. */
  get busy() {
    return goesOn(this.last);
  }

  /** @param {any} event */
  event(event) {
    const before = this.last.run?.run;
    this.states = reduceRuns(this.states, event);
    if (event.kind === "started" && !event.list_index) this.staying = false;
    if (!this.staying) this.at = this.states.length - 1;
    if (!this.staying && (event.kind === "started" || this.last.run?.run !== before)) this.fresh();
    this.show();
  }

  /** All runs that the node left behind; the one that was chosen is shown, or the last. @param {any[]} events */
  replaced(events) {
    this.states = replayRuns(events);
    this.at = this.states.length - 1;
    if (this.wanted >= 0 && this.wanted < this.at) this.at = this.wanted;
  }

  /** A picture of a run; null where it is none, or a newer one has come meanwhile. @param {Blob} blob @param {string} run */
  async newest(blob, run) {
    const number = (this.pending.get(run) ?? 0) + 1;
    this.pending.set(run, number);
    const bitmap = await createImageBitmap(blob).catch(() => null);
    if (number === this.pending.get(run)) return bitmap;
    bitmap?.close();
    return null;
  }

  fresh() {}

  show() {}
}

// -- Generate: the view -----------------------------------------------------------------------------------------------

const LEAST = 400; // pixels of height

class View extends Told {
  /** @param {any} node */
  constructor(node) {
    super(node);
    this.mode = "both";
    this.look = { row: -1, layer: -1, head: -1 };
    this.hover = -1;
    this.cut = -1;
    this.where = /** @type {[number, number]} */ ([0, 0]);
    this.image = 0; // the picture whose scales are shown
    /** @type {Map<string, { bitmap: ImageBitmap, lines: number }[]>} */
    this.pictures = new Map(); // of each run, and how many lines each shows; of scales all, for the replay, else the newest
    this.refs = new Map(); // finished pictures that the node left behind, until they are fetched
    this.coming = 0; // lines the next preview will show

    this.paper = paper((ctx, width, height) => this.paint(ctx, width, height));
    const { canvas } = this.paper;
    canvas.setAttribute("role", "img");
    canvas.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.setHover(-1));
    canvas.addEventListener("click", (/** @type {PointerEvent} */ event) => this.choose(event));
    canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => this.key(event));

    this.modes = modes(["Image", "Kept", "Both"], "what to show", (name) => {
      this.mode = name.toLowerCase();
      this.paper.redraw();
    });
    this.layer = el("select", { title: "layer", "aria-label": "layer", onchange: () => this.setLook({ layer: Number(this.layer.value) }) });
    this.head = el("select", { title: "head", "aria-label": "head", onchange: () => this.setLook({ head: Number(this.head.value) }) });
    this.empty = el("div", { className: "empty" }, "Rows, or scales, appear here as they are drawn, and which of their tokens the cache still holds.");
    this.paper.box.append(this.empty);
    this.status = el("div", { className: "status", role: "status" });
    this.play = el("button", { type: "button", textContent: "▶", title: "replay", "aria-label": "replay", onclick: () => this.toggle() });
    this.scrub = el("input", { type: "range", min: "1", value: "1", "aria-label": "look at the cache after row", oninput: () => this.setLook({ row: Number(this.scrub.value) - 1 }) });
    this.moment = el("span", { className: "quiet moment" });
    this.reroll = el("button", { type: "button", onclick: () => this.again(this.cut, 0, true) });
    this.keep = el("button", { type: "button", onclick: () => this.again(this.state.lines.length, this.state.lines.length) });
    this.goOn = el("button", { type: "button", textContent: "Continue", title: "draw the rest, as if it had not been stopped", onclick: () => this.again(this.state.lines.length, 0) });
    this.over = el("button", { type: "button", textContent: "Start over", title: "keep no rows: the next run draws the whole picture", onclick: () => this.startOver() });
    this.note = el("span", { className: "quiet note" });
    this.runs = pager("run", (step) => this.turn(step));
    this.head_ = el("div", { className: "row wraps" }, this.modes.group, this.runs.group, el("div", { className: "group" }, this.layer, this.head));
    this.time = el("div", { className: "row" }, this.play, this.scrub, this.moment);
    this.actions = el("div", { className: "row actions" }, this.reroll, this.keep, this.goOn, this.over, this.note);
    this.root = host(this.own, this.head_, this.paper.box, this.status, this.time, this.actions);
    this.modes.set("Both");
    new ResizeObserver(() => this.fit()).observe(this.paper.box);
    this.show();
  }

  /** The narrower the node, the more lines its controls take, and the higher it gets to leave room for the picture. */
  fit() {
    this.least = LEAST + Math.max(0, 300 - this.paper.box.clientWidth);
    this.root.style.setProperty("--least", `${this.least}px`);
    if (!this.root.closest("[data-node-id]") && this.node.graph) {
      const needed = this.node.computeSize()[1]; // the canvas gives a node no more height by itself
      if (needed > this.node.size[1]) this.node.setSize([this.node.size[0], needed]);
    }
    app.canvas?.setDirty(true, true);
  }

  /** @param {any} event */
  event(event) {
    super.event(event);
    if (event.kind === "picture") this.coming = event.lines;
  }

  fresh() {
    this.stop();
    Object.assign(this, { cut: -1, hover: -1, image: 0, look: { row: -1, layer: -1, head: -1 } });
    const { run } = this.state;
    const options = (/** @type {any} */ select, /** @type {string} */ name, /** @type {number} */ count) =>
      select.replaceChildren(...[-1, ...Array(count).keys()].map((i) => el("option", { value: String(i), textContent: i < 0 ? `all ${name}s` : `${name} ${i + 1}` })));
    options(this.layer, "layer", run.layers ?? 0);
    options(this.head, "head", run.heads ?? 0);
    this.scrub.max = String(run.rows);
  }

  /** What the node left behind, after the run or long after it. @param {any} output */
  load(output) {
    const events = output?.linear_ar;
    if (!events?.length) return;
    const { run, partial } = this.state;
    this.replaced(events);
    this.refs = new Map((output.linear_ar_picture ?? []).map((/** @type {any} */ ref, /** @type {number} */ i) => [ref.run ?? this.states[i]?.run.run, ref]));
    if (partial || run?.run !== this.state.run?.run) this.fresh();
    void this.fetch();
    this.show();
  }

  /** The finished picture of the run that is shown. */
  async fetch() {
    const { run, lines } = this.state;
    const ref = this.refs.get(run?.run);
    this.refs.delete(run?.run);
    const answer = ref && (await askPicture(ref));
    if (answer?.ok) await this.setPicture(await answer.blob(), lines.length, run.run);
  }

  /** A preview of the host, or a finished picture. @param {Blob} blob @param {number} [lines] @param {string} [run] */
  async setPicture(blob, lines = this.coming, run = this.last.run?.run ?? "") {
    const bitmap = await this.newest(blob, run);
    if (!bitmap) return;
    const before = this.pictures.get(run) ?? [];
    const stays = inScales(this.state.run) ? before.filter((picture) => picture.lines < lines) : [];
    before.filter((picture) => !stays.includes(picture)).forEach((picture) => picture.bitmap.close());
    this.pictures.set(run, [...stays, { bitmap, lines }]);
    for (const [other, pictures] of this.pictures) {
      if (this.states.some((state) => state.run?.run === other)) continue; // else of an earlier prompt
      this.pictures.delete(other);
      this.pending.delete(other);
      pictures.forEach(({ bitmap }) => bitmap.close());
    }
    this.show();
  }

  /** Another of the node's runs. @param {number} step */
  turn(step) {
    this.wanted = this.at = (this.at + step + this.states.length) % this.states.length;
    this.staying = this.busy;
    this.fresh();
    void this.fetch();
    this.show();
  }

  /** @param {Partial<typeof this.look>} look */
  setLook(look) {
    Object.assign(this.look, look);
    if (this.look.row >= this.state.lines.length - 1) this.look.row = -1;
    this.show();
  }

  /** @param {number} cell */
  setHover(cell) {
    if (cell !== this.hover) {
      this.hover = cell;
      this.paper.redraw();
    }
    if (cell < 0) this.paper.tip.hidden = true;
  }

  /** @param {PointerEvent} event */
  point(event) {
    if (!this.state.run || !this.place) return;
    const [x, y] = this.paper.point(event);
    const cell = this.cellAt(x, y);
    this.setHover(cell);
    this.where = /** @type {[number, number]} */ ([x, y]);
    if (cell >= 0) this.tell(cell, x, y);
  }

  /** @param {number} x @param {number} y */
  cellAt(x, y) {
    return this.place.maps ? cellOfScales(this.place, x, y) : cellAt(this.place, x, y);
  }

  /** @param {number} cell @param {number} x @param {number} y */
  tell(cell, x, y) {
    const { tip, canvas } = this.paper;
    tip.textContent = hoverText(this.state, cell, this.look);
    tip.hidden = false;
    const [width, height] = [tip.offsetWidth, tip.offsetHeight];
    tip.style.left = `${Math.max(0, Math.min(x + 12, canvas.clientWidth - width))}px`;
    tip.style.top = `${y + 16 + height > canvas.clientHeight ? Math.max(0, y - height - 8) : y + 16}px`;
  }

  /** A row, or a scale, to draw anew from; of several pictures, whose scales to show. @param {PointerEvent} event */
  choose(event) {
    if (!this.place || !this.state.lines.length) return;
    const [x, y] = this.paper.point(event);
    const picture = this.place.maps ? pictureAt(this.place, x, y) : -1;
    if (picture >= 0) {
      this.image = picture;
      return this.show();
    }
    if (this.busy) return;
    const cell = this.cellAt(x, y);
    if (this.place.maps) return this.setCut(cell < 0 ? -1 : scaleOfCell(this.place, cell));
    this.setCut(cell < 0 ? -1 : Math.floor((cell % (this.place.rows * this.place.cols)) / this.place.cols));
  }

  /** @param {number} row */
  setCut(row) {
    const most = Math.min(this.state.lines.length, this.state.run.rows - 1);
    this.cut = row < 1 || row > most || row === this.cut ? -1 : row;
    this.show();
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    if (!this.state.run || this.busy) return;
    const { rows } = this.state.run;
    const more = this.place?.maps ? { ArrowRight: 1, ArrowLeft: -1 } : { PageDown: 4, PageUp: -4 };
    const step = { ArrowDown: 1, ArrowUp: -1, ...more }[event.key];
    if (step) {
      const most = Math.min(this.state.lines.length, rows - 1);
      const next = this.cut < 0 ? Math.ceil(most / 2) : Math.min(most, Math.max(1, this.cut + step));
      if (next !== this.cut) this.setCut(next);
    } else if (event.key === "Escape") this.setCut(-1);
    else if (event.key === "Enter" && this.cut > 0) void this.again(this.cut, 0, true);
    else return;
    event.preventDefault();
  }

  /** Queue a run that keeps rows of this one. @param {number} rows @param {number} stop @param {boolean} [anew] */
  async again(rows, stop, anew = false) {
    const seed = anew ? Math.floor(Math.random() * 2 ** 32) : this.state.run.seed;
    const own = this.state.run.seeds; // one for each picture
    const listed = own || widgetValue(this.node, "seeds") || isLinked(this.node, "seeds");
    const text = keptTextOfRuns(this.states, this.at, rows, anew ? seed : own || seed, !!listed || isLinked(this.node, "seed"));
    if (!text) return;
    this.kept = text;
    this.wanted = this.states.length > 1 ? this.at : -1;
    setWidget(this.node, "keep_rows", rows);
    setWidget(this.node, "stop_after", stop);
    setWidget(this.node, "seed", seed);
    this.show();
    const control = this.node.widgets?.find((/** @type {any} */ w) => w.name === "control_after_generate");
    const was = control?.value;
    if (control) control.value = "fixed"; // the page would draw another seed, after queueing or (by its settings) before
    await app.queuePrompt(0, 1);
    if (control) control.value = was;
  }

  startOver() {
    this.kept = "";
    setWidget(this.node, "keep_rows", 0);
    setWidget(this.node, "stop_after", 0);
    this.show();
  }

  toggle() {
    if (this.timer) return this.stop();
    const last = this.state.lines.length - 1;
    this.look.row = this.look.row < 0 ? 0 : this.look.row;
    const pause = inScales(this.state.run) ? 450 : 140;
    this.timer = setInterval(() => {
      const next = this.look.row < 0 ? last : this.look.row + 1;
      if (next >= last) this.stop();
      this.setLook({ row: next });
    }, pause);
    this.show();
  }

  stop() {
    clearInterval(this.timer);
    this.timer = undefined;
    if (this.play) this.play.textContent = "▶";
  }

  /** Everything but the canvas. */
  show() {
    const { state, look } = this;
    const lines = state.lines.length;
    const unit = unitOf(state.run);
    const can = canChoose(state);
    const after = !!lines && !this.running;
    const free = after && !this.busy; // to draw anew
    this.runs.tell(this.at, this.states.length, "run ");
    this.empty.hidden = !!state.run;
    this.head_.hidden = this.status.hidden = !state.run;
    say(this.status, statusText(state));
    this.paper.canvas.setAttribute("aria-label", `${statusText(state)}. Arrow keys choose a ${unit} to draw anew from.`);
    this.paper.canvas.classList.toggle("pick", free);
    this.layer.hidden = !can.layers;
    this.head.hidden = !can.heads;
    this.layer.parentElement.classList.toggle("later", !after);
    this.layer.value = String(look.layer);
    this.head.value = String(look.head);
    this.time.hidden = this.actions.hidden = !state.run && !keptRows(this.kept);
    this.time.classList.toggle("later", !after || lines < 2 || state.partial); // their places are kept, so that nothing jumps
    const row = look.row < 0 ? lines : look.row + 1;
    this.scrub.max = String(lines);
    this.scrub.value = String(row);
    this.moment.textContent = `after ${unit} ${row}`;
    this.scrub.setAttribute("aria-label", `look at the cache after ${unit}`);
    this.play.textContent = this.timer ? "❚❚" : "▶";
    const keptNow = keptRows(this.kept) && widgetValue(this.node, "keep_rows") > 0;
    this.actions.classList.toggle("later", !free && !keptNow);
    this.reroll.hidden = !free || state.partial;
    this.reroll.disabled = this.cut < 1;
    const again = unit === "scale" ? "Draw again" : "Reroll";
    this.reroll.textContent = this.cut > 0 ? `${again} from ${unit} ${this.cut + 1}` : again;
    this.reroll.title = this.cut > 0 ? `keep ${unit}s 1 to ${this.cut}, draw the rest with a new seed` : `click a ${unit}${unit === "row" ? " of the picture" : ""} first, or choose one with the arrow keys`;
    const partly = free && !state.partial && lines < state.run.rows;
    this.keep.hidden = !partly || !state.stopped || !!state.finished;
    this.keep.textContent = `Keep ${lines} ${unit}${lines > 1 ? "s" : ""}`;
    this.keep.title = `send the ${unit}s finished so far on through the graph, as a ${unit === "row" ? "picture cut off there" : "less sharp picture"}`;
    this.goOn.hidden = !partly;
    this.over.hidden = !keptNow;
    const which = this.states.length > 1 && keptNow ? keptRun(this.kept) : -1;
    this.note.textContent = keptNow ? `next run keeps ${unit}s 1–${widgetValue(this.node, "keep_rows")}${which < 0 ? "" : ` of run ${which + 1}`}` : free && this.cut < 1 && !state.partial && !partly ? `click a ${unit} to draw anew from there` : "";
    if (!this.paper.tip.hidden && this.hover >= 0) this.tell(this.hover, ...this.where);
    this.paper.redraw();
  }

  /** @param {any} ctx @param {number} width @param {number} height */
  paint(ctx, width, height) {
    const { state, look } = this;
    if (!state.run) return;
    const pictures = this.pictures.get(state.run.run) ?? [];
    const done = look.row < 0 ? state.lines.length : look.row + 1;
    const shown = held(state, look);
    if (inScales(state.run)) return this.paintScales(ctx, width, height, pictures, done, shown);
    this.place = layout(width, height, state.run);
    const { bitmap: picture = null, lines: pictured = 0 } = pictures.at(-1) ?? {};
    draw(ctx, {
      at: this.place,
      theme: themeOf(this.root),
      mode: /** @type {any} */ (state.partial ? "image" : this.mode),
      held: shown,
      done: state.partial ? (state.lines.at(-1)?.row ?? -1) + 1 : done,
      drawn: state.partial ? pictured || state.run.rows : pictured,
      running: this.running,
      picture,
      size: picture ? { width: picture.width, height: picture.height } : undefined,
      hover: this.hover,
      cut: this.cut,
      kept: keptCells(state),
    });
  }

  /** @param {any} ctx @param {number} width @param {number} height @param {{ bitmap: ImageBitmap, lines: number }[]} pictures
   * @param {number} done @param {Uint8Array} shown */
  paintScales(ctx, width, height, pictures, done, shown) {
    const { run, partial } = this.state;
    const mode = /** @type {any} */ (partial ? "image" : this.mode);
    this.place = layoutScales(width, height, run, mode, Math.max(0, Math.min(this.image, run.shown - 1)));
    const picture = pictures.findLast(({ lines }) => lines <= Math.max(done, 1)) ?? null;
    drawScales(ctx, {
      at: this.place,
      theme: themeOf(this.root),
      mode,
      held: shown,
      counts: shown.length > this.place.image * this.place.cells ? heldOfScales(run, shown, this.place.image) : [],
      over: mode === "both" ? this.place.boxes.filter((_, i) => shown.length > i * this.place.cells).map((_, i) => remembered(run, shown, i)) : [],
      done,
      running: this.running,
      picture: picture?.bitmap ?? null,
      size: picture ? { width: picture.bitmap.width, height: picture.bitmap.height } : undefined,
      final: !this.running && picture === pictures.at(-1),
      hover: this.hover,
      cut: this.cut,
    });
  }

  end() {
    super.end();
    this.stop();
  }
}

// -- Compare: the slider ----------------------------------------------------------------------------------------------

class Slider extends Told {
  /** @param {any} node */
  constructor(node) {
    super(node);
    this.split = 0.5; // where the two meet, as a share of the picture's width
    this.number = 0;
    /** @type {[ImageBitmap, ImageBitmap, string][]} */ // and the run that they are of
    this.pairs = [];
    /** @type {ImageBitmap | null} */
    this.live = null;
    this.paper = paper((ctx, width, height) => this.paint(ctx, width, height));
    const { canvas } = this.paper;
    canvas.classList.add("slide");
    canvas.setAttribute("role", "slider");
    canvas.setAttribute("aria-label", "full cache on the left, few lines or tokens on the right");
    canvas.setAttribute("aria-valuemin", "0");
    canvas.setAttribute("aria-valuemax", "100");
    canvas.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => this.box && this.slide((this.paper.point(event)[0] - this.box.x) / this.box.width));
    canvas.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      const step = { ArrowRight: 0.05, ArrowLeft: -0.05, Home: -1, End: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      this.slide(this.split + step);
    });
    this.pictures = pager("picture", (step) => this.turn(step));
    this.status = el("div", { className: "status", role: "status" });
    this.empty = el("div", { className: "empty" }, "The same seeds twice: with the full cache on the left, with what Line Cache keeps on the right.");
    this.paper.box.append(this.empty);
    this.root = host(this.own, this.paper.box, el("div", { className: "row wraps" }, this.status, this.pictures.group));
    this.show();
  }

  fresh() {
    this.pairs.forEach(([full, few]) => [full, few].forEach((bitmap) => bitmap.close()));
    this.pairs = [];
    this.live?.close();
    this.live = null;
    this.number = 0;
  }

  /** @param {any} output */
  async load(output) {
    if (!output?.linear_ar_pairs) return;
    this.replaced(output.linear_ar ?? []);
    const bitmap = async (/** @type {any} */ ref) => createImageBitmap(await (await askPicture(ref)).blob());
    const number = (this.pending.get("pairs") ?? 0) + 1;
    this.pending.set("pairs", number);
    const pairs = await Promise.all(output.linear_ar_pairs.map(async (/** @type {any[]} */ [full, few]) => [await bitmap(full), await bitmap(few), few.run])).catch(() => null);
    if (!pairs || number !== this.pending.get("pairs")) return;
    this.fresh();
    this.pairs = /** @type {any} */ (pairs);
    this.turn(0);
  }

  /** @param {Blob} blob */
  async setPicture(blob) {
    const bitmap = await this.newest(blob, "");
    if (!bitmap) return;
    this.live?.close();
    this.live = bitmap;
    this.show();
  }

  /** @param {number} share */
  slide(share) {
    this.split = Math.min(1, Math.max(0, share));
    this.paper.redraw();
  }

  /** @param {number} step */
  turn(step) {
    this.number = (this.number + step + this.pairs.length) % this.pairs.length;
    const run = this.states.findIndex((state) => state.run.run === this.pairs[this.number][2]);
    this.at = run < 0 ? this.states.length - 1 : run; // its text and its numbers go with the picture
    this.show();
  }

  show() {
    const { length } = this.pairs;
    this.empty.hidden = !!this.state.run || length > 0;
    this.pictures.tell(this.number, length);
    say(this.status, statusText(this.state));
    this.paper.redraw();
  }

  /** @param {any} ctx @param {number} width @param {number} height */
  paint(ctx, width, height) {
    const pair = this.pairs[this.number];
    if (!pair && !this.live) return;
    const theme = themeOf(this.root);
    // While it runs, both are halves of one preview.
    const [w, h] = pair ? [pair[0].width, pair[0].height] : [/** @type {any} */ (this.live).width / 2, /** @type {any} */ (this.live).height];
    const scale = Math.min(width / w, height / h);
    const box = (this.box = { width: w * scale, height: h * scale, x: (width - w * scale) / 2, y: (height - h * scale) / 2 });
    ctx.imageSmoothingEnabled = scale * Math.max(1, window.devicePixelRatio) < 1;
    const split = Math.round(w * this.split);
    const [left, right, offset] = pair ? [pair[0], pair[1], 0] : [this.live, this.live, w];
    if (split > 0) ctx.drawImage(left, 0, 0, split, h, box.x, box.y, split * scale, box.height);
    if (split < w) ctx.drawImage(right, offset + split, 0, w - split, h, box.x + split * scale, box.y, (w - split) * scale, box.height);
    const x = box.x + split * scale;
    ctx.fillStyle = "#000";
    ctx.fillRect(x - 2, box.y, 4, box.height);
    ctx.fillStyle = "#fff";
    ctx.fillRect(x - 1, box.y, 2, box.height);
    ctx.beginPath();
    ctx.arc(x, box.y + box.height / 2, 6, 0, 7);
    ctx.fill();
    const { run } = this.state;
    ctx.font = "600 11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    const words = [run?.beside || "full cache", (run && keptOf(run)) || (run?.beside ? "full cache" : "few lines")];
    const [wide, wideRight] = words.map((text) => ctx.measureText(text).width + 12);
    const label = (/** @type {string} */ text, /** @type {number} */ x, /** @type {number} */ y, /** @type {number} */ width) => {
      ctx.fillStyle = "rgb(0 0 0 / 0.6)";
      ctx.fillRect(x, y, width, 18);
      ctx.fillStyle = "#fff";
      ctx.fillText(text, x + 6, y + 9.5);
    };
    const below = wide + wideRight + 18 > box.width; // no room for both side by side
    if (this.split > 0.1) label(words[0], box.x + 6, box.y + 6, wide);
    if (this.split < 0.9) label(words[1], box.x + box.width - wideRight - 6, below ? box.y + box.height - 24 : box.y + 6, wideRight);
    ctx.strokeStyle = theme.border;
    ctx.strokeRect(box.x - 0.5, box.y - 0.5, box.width + 1, box.height + 1);
    this.paper.canvas.setAttribute("aria-valuenow", String(Math.round(this.split * 100)));
  }
}

// -- Line Cache: the memory line --------------------------------------------------------------------------------------

const PROMPTS = ["LineAR_ClassPrompt", "LineAR_TextPrompt"];
const STREAMED_ROOM = 2 ** 30; // bytes of the card for weights that pass through it, as loop/memory.py has it
const FREE = { /** @type {number | null} */ bytes: null, asked: 0 };

/** Free memory of the host's device, asked for now and then. */
async function askFree() {
  if (Date.now() - FREE.asked < 15000) return;
  FREE.asked = Date.now();
  const stats = await (await api.fetchApi("/system_stats")).json();
  const device = stats.devices?.[0];
  FREE.bytes = (device && device.type !== "cpu" ? device.vram_free : stats.system?.ram_free) ?? null;
}

class Memory {
  /** @param {any} node */
  constructor(node) {
    this.node = node;
    this.status = el("div", { className: "status" });
    this.fill = el("div", { className: "fill" });
    this.root = host(el("div", { className: "row memory" }, this.status), el("div", { className: "track" }, this.fill));
    new ResizeObserver(() => this.fit()).observe(this.status);
    this.begin();
  }

  /** Room for as many lines as the text takes at the node's width. */
  fit() {
    const height = Math.max(24, this.status.offsetHeight) + 17; // what is around and below it
    this.least = height + 20; // the margin that the canvas draws around it
    this.root.style.setProperty("--least", `${height}px`);
    app.canvas?.setDirty(true, true);
  }

  begin() {
    clearInterval(this.timer);
    // Links, widgets and other nodes all count; looking at them now and then is cheaper than following each.
    this.timer = setInterval(() => this.show(), 400);
    this.show();
  }

  /** What the graph says, as numbers, and the inputs that only the run can tell: `lacking` where nothing can be said then,
   * `unknown` where only the number of pictures cannot. */
  sizes() {
    const nodes = allNodes();
    const users = nodes.filter((n) => ["LineAR_Generate", "LineAR_Compare"].includes(n.type));
    const user = users.find((n) => origin(n, "cache")?.node === this.node) ?? users[0];
    const from = origin(user, "model")?.node;
    const loader = from?.type === LOADER ? from : nodes.find((n) => n.type === LOADER);
    const prompt = isLinked(user, "prompt") ? origin(user, "prompt")?.node : null;
    /** @type {string[]} */
    const missed = [];
    /** Its value, or what is used in its place where there is no such widget or it is not known. */
    const read = (/** @type {any} */ node, /** @type {string} */ name, /** @type {any} */ otherwise) => {
      if (!node?.widgets?.some((/** @type {any} */ w) => w.name === name)) return otherwise;
      const value = valueOf(node, name);
      if (value === undefined) missed.push(name.replace(/.*\./, ""));
      return value ?? otherwise;
    };
    const model = read(loader, "model", Object.keys(known.models)[0]);
    const preset = read(this.node, "preset", "");
    const own = (/** @type {string} */ name) => read(this.node, `preset.${name}`, undefined) ?? read(this.node, name, undefined);
    const chosen = known.presets[preset] ?? { policy: own("policy"), budget: Number(own("budget")), storage: own("storage"), release: own("release"), anchors: Number(own("anchors")), recent: Number(own("recent")) };
    const plan = withBudget(chosen, read(this.node, "budget_in", "lines"), Number(read(this.node, "amount", 0)));
    const pixels = read(prompt, "size.pixels", undefined);
    /** What takes memory of a model besides its cache. @param {any} node */
    const weightsOf = (node, shape = known.models[read(node, "model", "")]) => ({ weights: shape?.weights?.[read(node, "weight_dtype", "default")] ?? 0, streamed: read(node, "stream_weights", false) === true });
    const shape = known.models[model];
    const drawers = [{ shape, grid: shape && gridOf(shape, pixels), ...weightsOf(loader, shape) }];
    const drafter = isLinked(user, "drafter") ? origin(user, "drafter")?.node : null; // draws the first scales, and then waits
    const drafts = drafter?.type === LOADER && !OFF.includes(drafter.mode) ? known.models[read(drafter, "model", "")] : null;
    if (drafts?.scale_tokens && shape?.scale_tokens) { // else the run refuses it
      const grid = draftedGrid(drawers[0].grid, drafts.scale_tokens, Number(valueOf(user, "drafter_scales") ?? 0));
      drawers.push({ shape: drafts, grid, ...weightsOf(drafter) });
      if (drafter === loader) drawers[1].weights = 0; // the same weights
    }
    if (missed.length) return { lacking: missed };
    if (shape?.masked) return { masked: true };
    if (!shape || !plan.policy || !plan.budget) return null;
    if (isLinked(user, "prompt") && !PROMPTS.includes(prompt?.type)) missed.push("prompt");
    const more = String(read(prompt, "more_classes", "")).split("\n").filter((line) => line.trim()).length;
    const named = read(prompt, "class_name", "") === "(only those below)" ? 0 : 1;
    const texts = read(prompt, "text", undefined);
    const rows = texts === undefined ? named + more : String(texts).split(/^\s*-{3,}\s*$/m).filter((part) => part.trim()).length;
    const images = Math.max(1, rows) * (Number(read(user, "batch_size", 1)) || 1);
    const guidance = Number(read(user, "guidance", -1));
    const guided = guidance < 0 || guidance > 1; // below 0: the model's own, and every model has some
    return { drawers, plan, images: missed.length ? 1 : images, each: guided ? 2 : 1, unknown: missed };
  }

  show() {
    if (!this.root.isConnected) return;
    void askFree().catch(() => {});
    const sizes = this.sizes();
    let text = "KV cache: choose a model to see its memory";
    let memory = { text, fits: true, share: 0 };
    if (sizes?.lacking) {
      memory.text = `KV cache: unknown until it runs, as ${sizes.lacking.join(" and ")} ${sizes.lacking.length > 1 ? "come" : "comes"} through a link`;
    } else if (sizes?.masked) {
      memory.text = "no KV cache: this model draws tokens in any order; use Masked Generate";
    } else if (sizes) {
      const { drawers, images, each, unknown } = sizes;
      const { grid } = drawers[0];
      const most = (/** @type {(drawer: any) => number} */ needed) => Math.max(...drawers.map(needed)); // one draws after the other
      const plan = leastPlan(drawers.map(({ shape }) => resolved(shape, grid, sizes.plan, images * each)));
      const bytes = (/** @type {any} */ plan) => most(({ shape, grid }) => cacheBytes(shape, grid, plan, images * each));
      // The weights may be among what is taken already; nobody tells, so that what is said is the least there is.
      const weights = drawers.reduce((sum, { weights }) => sum + weights, 0);
      const resident = drawers.reduce((sum, { weights, streamed }) => sum + (streamed ? Math.min(weights, STREAMED_ROOM) : weights), 0);
      const room = FREE.bytes === null ? null : FREE.bytes * 0.9 - resident;
      const fitting = room === null ? null : picturesThatFit(room, (sequences) => most(({ shape, grid }) => runBytes(shape, grid, plan, sequences)), each);
      const state = drawers.every(({ shape }) => shape.state);
      memory = memoryText(bytes(plan), bytes({ policy: "full", budget: 1 }), weights, fitting, images, unknown, 512, state);
      const budget = state ? "" : budgetText(plan, grid);
      const [kept, one] = grid.scales ? ["tokens", "one scale"] : ["lines", "one line"];
      if (budget) memory.text = `${budget} · ${memory.text}`;
      if (!state && sizes.plan.mib && unknown.length) memory.text = `KV cache of at most ${sizes.plan.mib} MiB: how many ${kept} that is depends on ${unknown.join(" and ")}, unknown until it runs`;
      if (!plan.budget) memory = { text: `${sizes.plan.mib} MiB are not enough for ${one}, which takes ${mib(bytes({ ...plan, budget: grid.scales ? 1e-9 : 1, share: 0 }))} MiB`, fits: false, share: 0 };
    }
    if (this.status.textContent === memory.text) return;
    say(this.status, memory.text);
    const sequences = sizes?.images ? sizes.images * sizes.each : 0;
    this.status.title = sequences ? `${memory.text}. ${sequences} sequence${sequences > 1 ? "s" : ""}, guidance included. A larger batch is drawn in parts.` : memory.text;
    this.fill.style.width = `${(memory.share * 100).toFixed(1)}%`;
    this.root.shadowRoot.host.classList.toggle("tight", !memory.fits);
    this.fill.parentElement.classList.toggle("tight", !memory.fits);
  }

  end() {
    clearInterval(this.timer);
  }
}

// -- registration -----------------------------------------------------------------------------------------------------

/** The node of an id such as "3:1": node 1 in the subgraph of node 3. @param {unknown} id */
function findNode(id) {
  let graph = app.rootGraph ?? app.graph;
  const parts = String(id ?? "").split(":");
  for (const part of parts.slice(0, -1)) graph = byId(graph, part)?.subgraph;
  return byId(graph, parts[parts.length - 1]);
}

const byId = (/** @type {any} */ graph, /** @type {string} */ id) => graph?.getNodeById(Number(id)) ?? graph?.getNodeById(id);

/** @param {any} make @param {number} height @param {boolean} live */
const widgetOf = (make, height, live) => (/** @type {any} */ node, /** @type {string} */ name, /** @type {any} */ data) => {
  const view = new make(node);
  view.root.style.setProperty("--least", `${height}px`);
  const keeps = make === View;
  const widget = node.addDOMWidget(name, data[0], view.root, {
    serialize: keeps,
    hideOnZoom: false,
    getValue: () => view.kept ?? "",
    setValue: (/** @type {unknown} */ value) => {
      if (!keeps) return;
      view.kept = keptRows(value) ? String(value) : "";
      view.show();
    },
    getMinHeight: () => Math.max(height, view.least ?? 0),
    ...(live ? {} : { getMaxHeight: () => Math.max(height, view.least ?? 0) }),
  });
  widget.serialize = keeps;
  if (live) widget.linearView = view;
  const [added, removed] = [node.onAdded, node.onRemoved];
  node.onAdded = function () {
    view.begin?.();
    return added?.apply(this, arguments);
  };
  node.onRemoved = function () {
    view.end();
    return removed?.apply(this, arguments);
  };
  if (live) {
    node.setSize?.([Math.max(400, node.size[0]), node.size[1]]);
  }
  return { widget };
};

/** Draw what nodes left behind in an earlier session of the page. */
async function restore() {
  const empty = allViews().filter((view) => !view.state.run);
  if (!empty.length) return;
  const graphId = (app.rootGraph ?? app.graph)?.id;
  const history = await (await api.fetchApi("/history?max_items=20")).json();
  const runs = Object.values(history)
    .filter((/** @type {any} */ run) => run.prompt?.[3]?.extra_pnginfo?.workflow?.id === graphId)
    .sort((/** @type {any} */ a, /** @type {any} */ b) => b.prompt[0] - a.prompt[0]);
  for (const run of /** @type {any[]} */ (runs))
    for (const [id, output] of Object.entries(run.outputs ?? {})) {
      const view = viewOf(findNode(id));
      if (view && !view.state.run) void view.load(output);
    }
}

app.registerExtension({
  name: "linear_ar.line_cache",

  getCustomWidgets() {
    return {
      LINEAR_VIEW: widgetOf(View, LEAST, true),
      LINEAR_COMPARE: widgetOf(Slider, 280, true),
      LINEAR_MEMORY: widgetOf(Memory, 44, false),
    };
  },

  /** @param {any} _type @param {any} data */
  beforeRegisterNodeDef(_type, data) {
    if (data.name === LOADER) known.models = data.input?.required?.model?.[1]?.linear_ar ?? {};
    if (data.name === "LineAR_LineCache") known.presets = data.input?.optional?.memory?.[1]?.presets ?? {};
  },

  setup() {
    const view = (/** @type {any} */ ...ids) => ids.map((id) => id !== undefined && viewOf(findNode(id))).find(Boolean);
    api.addEventListener(EVENT, ({ detail }) => view(detail.node)?.event(detail));
    api.addEventListener("b_preview_with_metadata", ({ detail }) => void view(detail.nodeId)?.setPicture(detail.blob));
    api.addEventListener("executed", ({ detail }) => void view(detail.node, detail.display_node)?.load(detail.output));
    const stopped = () => allViews().forEach((each) => each.busy && each.event({ kind: "stopped" }));
    api.addEventListener("execution_interrupted", stopped);
    api.addEventListener("execution_error", stopped);
  },

  /** A workflow was opened. */
  afterConfigureGraph() {
    void restore().catch(() => {});
  },
});
