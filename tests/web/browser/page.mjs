// ComfyUI's real page in a Chromium that runs already (chromium.py), and what every script does there.
//   PLAYWRIGHT: the folder with node_modules/playwright-core      ENDPOINT: where that Chromium listens
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const WAIT = 90000; // for what has to come; the machine may be busy with other things

const { chromium } = createRequire(pathToFileURL(`${process.env.PLAYWRIGHT}/x.js`))("playwright-core");

/** What a script was started with: URL legacy|vue [--shots FOLDER] [--theme light]. `file` is where a picture goes.
 * @param {string} [prefix] of the pictures' names */
export function options(prefix = "") {
  const [url, renderer, ...more] = process.argv.slice(2);
  const option = (name, otherwise) => (more.includes(name) ? more[more.indexOf(name) + 1] : otherwise);
  const shots = option("--shots", "");
  return { url, renderer, theme: option("--theme", "dark"), file: shots && ((name) => `${shots}/${prefix}${name}-${renderer}.png`) };
}

/** A page of `url` with nothing of earlier ones. Its console goes to stderr; `problems` are those that name this pack.
 * @param {string} url @param {{ vue?: boolean, theme?: string, width?: number, height?: number }} [how] */
export async function openPage(url, { vue = true, theme = "dark", width = 1280, height = 860 } = {}) {
  const post = (path, data) => fetch(url + path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(data) });
  await post("/api/settings", {
    "Comfy.TutorialCompleted": true, "Comfy.InstalledVersion": "1.58.1", "Comfy.Release.ShowUpdates": false, "Comfy.Workflow.Persist": true,
    "Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": theme, "Comfy.Minimap.Visible": false, "Comfy.Graph.CanvasInfo": false,
    "Comfy.Workflow.ShowMissingNodesWarning": false, "Comfy.Workflow.ShowMissingModelsWarning": false, // of the default graph
  });
  const browser = await chromium.connectOverCDP(process.env.ENDPOINT);
  const context = await browser.newContext({ viewport: { width, height } });
  const page = await context.newPage();
  page.setDefaultTimeout(WAIT);
  const problems = [];
  const ours = (text) => /linear|line_cache|ar-line-cache/i.test(text);
  const noted = (text, where) => {
    console.error(text.slice(0, 400));
    if (ours(text + where)) problems.push(text);
  };
  page.on("console", (m) => ["error", "warning"].includes(m.type()) && noted(m.text(), m.location().url));
  page.on("pageerror", (e) => noted(e.stack ?? e.message, ""));

  /** Load the page, to the point at which it could run a graph. */
  async function load() {
    await page.goto(url, { waitUntil: "domcontentloaded" });
    await page.waitForFunction(() => {
      const { app, LiteGraph } = window;
      return app?.graph && (app.vueAppReady ?? true) && app.api.socket?.readyState === 1 && app.api.clientId && LiteGraph?.registered_node_types?.LineAR_Generate;
    });
  }

  /** Take every node away, and wait until the page has: only then new ones may get their numbers. */
  async function clear() {
    await page.evaluate(() => window.app.graph.clear());
    await page.waitForFunction(() => !document.querySelector("[data-node-id]") && ![...document.querySelectorAll("div")].some((d) => d.shadowRoot?.querySelector("canvas")));
  }

  /** Two frames later everything that was asked for is on the screen. */
  const painted = () => page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));

  /** Wait until our widget's canvas has its place, and keeps it. */
  async function placed() {
    const canvas = page.locator("canvas[role=img], canvas[role=slider]").first();
    await canvas.waitFor({ state: "attached" });
    let last = "";
    await until(() => canvas.evaluate((c) => JSON.stringify(c.getBoundingClientRect())), (now) => {
      const same = now === last && JSON.parse(now).width > 100;
      last = now;
      return same;
    }, "the widget has its place", painted);
  }

  /** Wait until a widget's text line says so. @param {string} pattern */
  const says = (pattern) => page.waitForFunction((pattern) => [...document.querySelectorAll("div")].some((d) => new RegExp(pattern).test(d.shadowRoot?.querySelector(".status[role=status]")?.textContent ?? "")), pattern);

  /** Four nodes and a picture; `last`, the name of a node, draws. @param {string} last */
  async function build(last) {
    await clear();
    await page.evaluate((last) => {
      const { app, LiteGraph } = window;
      const make = (type, x, y, size) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        if (size) node.setSize([Math.max(size[0], node.size[0]), Math.max(size[1], node.size[1])]);
        return node;
      };
      const slot = (node, name) => node.inputs.findIndex((i) => i.name === name);
      const loader = make("LineAR_LoadModel", 90, 70, [300, 120]);
      const cache = (window.cache = make("LineAR_LineCache", 90, 300, [300, 130]));
      const prompt = make("LineAR_ClassPrompt", 90, 560, [300, 180]);
      const node = make(last, 430, 70, [440, 700]);
      loader.connect(0, node, slot(node, "model"));
      cache.connect(0, node, slot(node, "cache"));
      loader.connect(0, prompt, slot(prompt, "model"));
      prompt.connect(0, node, slot(node, "prompt"));
      if (last === "LineAR_Generate") {
        const decode = make("LineAR_Decode", 920, 70);
        const preview = make("PreviewImage", 920, 220, [280, 330]);
        loader.connect(0, decode, slot(decode, "model"));
        node.connect(0, decode, slot(decode, "tokens"));
        decode.connect(0, preview, 0);
      }
      app.canvas.ds.scale = 1;
      app.canvas.ds.offset = [-20, 10];
      app.canvas.setDirty(true, true);
      window.node = node;
    }, last);
    await placed();
  }

  /** Give a node (the name of a global) another width, as a user does; the page may keep it from getting too narrow.
   * @param {number} width @param {string} [name] */
  async function widen(width, name = "node") {
    if (vue) {
      const node = `[data-node-id="${await page.evaluate((name) => window[name].id, name)}"]`;
      const [box, corner] = await Promise.all([node, `${node} [aria-label="Resize from bottom-right corner"]`].map((place) => page.locator(place).boundingBox()));
      const [x, y] = [corner.x + corner.width / 2, corner.y + corner.height / 2];
      await page.mouse.move(x, y);
      await page.mouse.down();
      await page.mouse.move(x + width - box.width, y, { steps: 4 });
      await page.mouse.up();
    } else {
      await page.evaluate(([name, width]) => {
        const node = window[name];
        node.setSize([width, node.computeSize()[1]]);
        window.app.canvas.setDirty(true, true);
      }, [name, width]);
    }
    await painted();
    await placed();
  }

  /** What of our widgets cannot be read or pressed: text that is cut, what sticks out, what lies over something else. */
  const faults = () => page.evaluate(() => {
    const found = [];
    const rect = (thing) => thing.getBoundingClientRect();
    const inside = (a, b, by = 1) => a.left >= b.left - by && a.right <= b.right + by && a.top >= b.top - by && a.bottom <= b.bottom + by;
    const ink = document.createElement("canvas").getContext("2d");
    const { app } = window;
    /** Of the whole node on the screen. */
    function frame(host) {
      const element = host.closest("[data-node-id]");
      if (element) return rect(element);
      const node = (app.graph.nodes ?? app.graph._nodes).find((n) => n.widgets?.some((w) => w.element === host));
      const { ds, canvas } = app.canvas;
      const [left, top] = [0, 1].map((i) => (node.pos[i] + ds.offset[i]) * ds.scale + [rect(canvas).left, rect(canvas).top][i]);
      return { left, top, right: left + node.size[0] * ds.scale, bottom: top + node.size[1] * ds.scale };
    }
    for (const host of document.querySelectorAll("div")) {
      if (!host.shadowRoot?.querySelector(".status") || !host.checkVisibility()) continue;
      if (!inside(rect(host), frame(host))) found.push("the widget sticks out of its node");
      const all = [...host.shadowRoot.querySelectorAll("button, select, input, canvas, .status, .quiet, .track")];
      const shown = all.filter((e) => e.checkVisibility({ visibilityProperty: true }) && rect(e).width);
      const name = (e) => e.textContent.slice(0, 60) || e.getAttribute("aria-label") || e.className;
      for (const each of shown) {
        const room = [host, each, each.closest(".modes") ?? each].map(rect);
        const text = document.createRange();
        text.selectNodeContents(each);
        const parts = each.matches("select") ? [rect(each)] : [rect(each), ...text.getClientRects()];
        if (!parts.every((part) => room.every((place) => inside(part, place)))) found.push(`cut off: ${name(each)}`);
        if (each.matches("select")) {
          ink.font = getComputedStyle(each).font;
          if (ink.measureText(each.selectedOptions[0].text).width + 20 > each.clientWidth) found.push(`cut off: ${each.selectedOptions[0].text}`);
        }
      }
      shown.forEach((a, i) => shown.slice(i + 1).forEach((b) => {
        const [p, q] = [rect(a), rect(b)];
        const over = Math.min(p.right - q.left, q.right - p.left, p.bottom - q.top, q.bottom - p.top);
        if (over > 1) found.push(`${name(a)} and ${name(b)} overlap by ${over.toFixed(1)}`);
      }));
    }
    return found;
  });

  /** How many different colours the widget's canvas shows, and the mean of its grid. */
  const colours = () => page.locator("canvas[role=img]").evaluate((c) => {
    const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
    const seen = new Set();
    let [sum, count] = [0, 0];
    for (let i = 0; i < data.length; i += 4) {
      if (data[i + 3] < 255) continue; // beside the grid
      count += 3;
      seen.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
      sum += data[i] + data[i + 1] + data[i + 2];
    }
    return { seen: seen.size, mean: sum / count };
  });

  /** What the memory line says. */
  const memory = () => page.evaluate(() => [...document.querySelectorAll("div")].map((d) => d.shadowRoot?.querySelector(".memory")?.textContent).find(Boolean));

  /** Queue the graph; `end` then waits for how it ends. */
  const listen = () => page.evaluate(() => {
    window.ended = "";
    for (const type of ["execution_success", "execution_error", "execution_interrupted"]) window.app.api.addEventListener(type, () => (window.ended = type), { once: true });
  });
  async function queue() {
    await listen();
    await page.evaluate(() => window.app.queuePrompt(0));
  }
  const end = async () => (await page.waitForFunction(() => window.ended)).jsonValue();

  return { page, problems, post, load, clear, build, widen, faults, colours, painted, placed, says, memory, listen, queue, end, close: () => context.close() };
}

/** Read again and again until `good` says yes of what was read; returns that.
 * @template T @param {() => Promise<T>} read @param {(value: T) => boolean} good @param {string} what @param {() => Promise<any>} [pause] */
export async function until(read, good, what, pause = () => new Promise((done) => setTimeout(done, 30))) {
  const last = Date.now() + WAIT;
  for (;;) {
    const value = await read();
    if (good(value)) return value;
    if (Date.now() > last) throw new Error(`waited ${WAIT / 1000} s: ${what}; last was ${JSON.stringify(value)}`);
    await pause();
  }
}

/** At several widths of a node nothing of our widgets may be cut off or covered. Nodes 2.0 makes 225 of 220.
 * @param {Awaited<ReturnType<typeof openPage>>} opened @param {string} renderer @param {(name: string) => Promise<void>} shot */
export function fitting({ page, widen, faults, painted }, renderer, shot) {
  const WIDTHS = renderer === "vue" ? [220, 300, 340, 440] : [210, 220, 300, 340, 440];
  async function fits(name, nodes = ["node"], widths = [WIDTHS[0], 300]) {
    for (const width of widths) {
      for (const node of nodes) await widen(width, node);
      const wide = await page.evaluate(() => window.node.size[0]);
      assert.ok(Math.abs(wide - width) <= 10 || width < 225, `${name}: the node is ${wide} pixels wide, not ${width}`);
      await until(async () => (await painted(), await faults()), (found) => !found.length, `${name}: all is to be seen at ${width} pixels`);
      await shot(`${name}-${width}`);
    }
  }
  return { fits, WIDTHS };
}

/** What the tests print and keep: a line of JSON as each check begins and as it ends, the first that fails being the last; pictures.
 * @param {any} page @param {() => Promise<any>} painted @param {((name: string) => string) | undefined | ""} file where a picture goes; none: nowhere */
export function checks(page, painted, file) {
  async function shot(name) {
    if (!file) return;
    await painted();
    await page.screenshot({ path: file(name) });
  }
  async function check(name, body) {
    const started = Date.now();
    console.log(JSON.stringify({ name }));
    try {
      await body();
      console.log(JSON.stringify({ name, ok: true, ms: Date.now() - started }));
    } catch (error) {
      console.log(JSON.stringify({ name, ok: false, error: String(error.stack ?? error).slice(0, 1500) }));
      await shot("failed").catch(() => {});
      process.exit(1);
    }
  }
  return { check, shot };
}
