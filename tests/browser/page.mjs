// ComfyUI's real page in a Chromium that runs already (chromium.py), and what every script does there.
//   PLAYWRIGHT: the folder with node_modules/playwright-core      ENDPOINT: where that Chromium listens
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const { chromium } = createRequire(pathToFileURL(`${process.env.PLAYWRIGHT}/x.js`))("playwright-core");

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
  page.setDefaultTimeout(40000);
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

  return { page, problems, post, load, clear, painted, placed, says, listen, queue, end, close: () => context.close() };
}

/** Read again and again until `good` says yes of what was read; returns that.
 * @template T @param {() => Promise<T>} read @param {(value: T) => boolean} good @param {string} what @param {() => Promise<any>} [pause] */
export async function until(read, good, what, pause = () => new Promise((done) => setTimeout(done, 30))) {
  const last = Date.now() + 40000;
  for (;;) {
    const value = await read();
    if (good(value)) return value;
    if (Date.now() > last) throw new Error(`waited 40 s: ${what}; last was ${JSON.stringify(value)}`);
    await pause();
  }
}
