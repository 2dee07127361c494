// The widgets in the real page, over host.py or a live ComfyUI. One line of JSON for each check; exit status 1 if one fails.
//   node widget.mjs URL legacy|vue [--shots FOLDER] [--theme light]      PLAYWRIGHT: where playwright-core is
import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, renderer, ...more] = process.argv.slice(2);
const option = (name, otherwise) => (more.includes(name) ? more[more.indexOf(name) + 1] : otherwise);
const shots = option("--shots", "");
const require = createRequire(pathToFileURL(`${process.env.PLAYWRIGHT ?? import.meta.dirname}/x.js`));
const { chromium } = require("playwright-core");

const post = (path, data) => fetch(url + path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(data) });
await post("/api/settings", {
  "Comfy.TutorialCompleted": true, "Comfy.InstalledVersion": "1.58.1", "Comfy.Release.ShowUpdates": false, "Comfy.Workflow.Persist": true,
  "Comfy.VueNodes.Enabled": renderer === "vue", "Comfy.ColorPalette": option("--theme", "dark"), "Comfy.Minimap.Visible": false,
  "Comfy.Workflow.ShowMissingNodesWarning": false, "Comfy.Workflow.ShowMissingModelsWarning": false, // of the default graph
});
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 1280, height: 860 } });
page.setDefaultTimeout(45000);
const problems = [];
const ours = (text) => /linear|line_cache|ar-line-cache/i.test(text);
page.on("console", (m) => ["error", "warning"].includes(m.type()) && ours(m.text() + m.location().url) && problems.push(m.text()));
page.on("pageerror", (e) => ours(e.stack ?? "") && problems.push(e.stack));
await page.route("**/*", (r) => (new URL(r.request().url()).hostname === "127.0.0.1" || /^(data|blob):/.test(r.request().url()) ? r.continue() : r.abort()));

let failed = 0;
async function check(name, body) {
  const started = Date.now();
  try {
    await body();
    console.log(JSON.stringify({ name, ok: true, ms: Date.now() - started }));
  } catch (error) {
    failed++;
    console.log(JSON.stringify({ name, ok: false, error: String(error.stack ?? error).slice(0, 1500) }));
  }
}
const shot = async (name) => shots && (await page.screenshot({ path: `${shots}/${name}-${renderer}.png` }));

async function open() {
  await page.goto(url, { waitUntil: "domcontentloaded" });
  await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types?.LineAR_Generate);
  await page.waitForFunction(() => window.app.vueAppReady ?? true);
  await page.waitForTimeout(300);
}

/** Four nodes and a picture; `last` draws. */
async function build(last) {
  await page.evaluate(async (last) => {
    const { app, LiteGraph } = window;
    app.graph.clear();
    await new Promise((done) => setTimeout(done, 300)); // the page takes the old nodes off before new ones get their ids
    const make = (type, x, y, size) => {
      const node = LiteGraph.createNode(type);
      node.pos = [x, y];
      app.graph.add(node);
      if (size) node.setSize([Math.max(size[0], node.size[0]), Math.max(size[1], node.size[1])]);
      return node;
    };
    const slot = (node, name) => node.inputs.findIndex((i) => i.name === name);
    const loader = make("LineAR_LoadModel", 90, 70, [300, 120]);
    const cache = make("LineAR_LineCache", 90, 300, [300, 130]);
    const prompt = make("LineAR_ClassPrompt", 90, 500, [300, 180]);
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
    window.ended = () => new Promise((done) => {
      for (const type of ["execution_success", "execution_error", "execution_interrupted"]) app.api.addEventListener(type, () => done(type), { once: true });
    });
  }, last);
  await page.waitForTimeout(700);
}

const text = (selector) => page.locator(selector).first().innerText();
const queue = () => page.evaluate(() => { window.end = window.ended(); return window.app.queuePrompt(0); });
const end = () => page.evaluate(() => window.end);
const canvas = page.locator("canvas[role=img]");
const status = page.locator(".status[role=status]").first();

/** Wait until a widget's text line says so. */
const says = (pattern) => page.waitForFunction((pattern) => [...document.querySelectorAll("div")].some((d) => new RegExp(pattern).test(d.shadowRoot?.querySelector(".status[role=status]")?.textContent ?? "")), pattern);

/** How many different colours the widget's canvas shows, and the mean of its grid. */
const colours = () => canvas.evaluate((c) => {
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

await open();
await build("LineAR_Generate");

await check("before a run: a hint, no controls, and the memory line", async () => {
  assert.match(await text(".empty"), /Rows appear here/);
  await page.waitForFunction(() => [...document.querySelectorAll("div")].some((d) => /KV cache [\d.]+ MiB of [\d.]+ MiB, −\d+ %/.test(d.shadowRoot?.textContent ?? "")));
  await shot("before");
});

await check("the memory line follows preset and batch", async () => {
  const read = () => page.evaluate(() => [...document.querySelectorAll("div")].map((d) => d.shadowRoot?.querySelector(".memory")?.textContent).find(Boolean));
  const before = await read();
  await page.evaluate(() => { window.node.widgets.find((w) => w.name === "batch_size").value = 4; });
  await page.waitForTimeout(700);
  const four = await read();
  const number = (t) => Number(/cache ([\d.]+)/.exec(t)[1]);
  assert.ok(Math.abs(number(four) / number(before) - 4) < 0.2, `${before} → ${four}`);
  await page.evaluate(() => { window.node.widgets.find((w) => w.name === "batch_size").value = 1; });
});

await check("mid-run: the rows so far, the text line, the line being written", async () => {
  await post("/test/hold", { row: 14 });
  await queue();
  await says(String.raw`^row 1[4-9]/24 · `);
  await page.waitForTimeout(500);
  assert.match(await status.innerText(), /^row 1\d\/24 · \d+ tok\/s · cache 4 of 24 lines · [\d.]+ MiB of [\d.]+ · ETA /);
  assert.ok((await colours()).seen > 60, "a picture is shown");
  await shot("mid");
  await post("/test/go", {});
  assert.equal(await end(), "execution_success");
});

await check("after the run: everything is there, and the host shows no second picture on the node", async () => {
  await page.waitForTimeout(600);
  assert.match(await status.innerText(), /^row 24\/24 · \d+ tok\/s · cache 4 of 24 lines/);
  await shot("after");
  const pictures = await page.evaluate(() => document.querySelectorAll(`[data-node-id="${window.node.id}"] img`).length + (window.node.imgs?.length ?? 0));
  assert.equal(pictures, 0);
});

await check("Image, Kept, Both: three looks, by pointer and by arrow keys", async () => {
  const seen = [];
  for (const name of ["Image", "Kept", "Both"]) {
    await page.getByRole("radio", { name, exact: true }).click();
    await page.waitForTimeout(150);
    seen.push((await colours()).mean);
    await shot(name.toLowerCase());
  }
  assert.equal(new Set(seen.map((m) => m.toFixed(2))).size, 3, String(seen));
  await page.getByRole("radio", { name: "Both", exact: true }).press("ArrowRight");
  assert.equal(await page.getByRole("radio", { name: "Image", exact: true }).getAttribute("aria-checked"), "true");
  await page.getByRole("radio", { name: "Image", exact: true }).press("ArrowLeft");
});

await check("hover names row, column and fate", async () => {
  const box = await canvas.boundingBox();
  await page.mouse.move(box.x + box.width / 2, box.y + box.height * 0.3);
  assert.match(await text(".tip"), /^row \d+, column \d+ · (kept by|evicted after row \d+)/);
  await shot("hover");
});

await check("the scrubber goes back in time, and layer and head can be chosen", async () => {
  const slider = page.locator("input[type=range][aria-label*='after row']");
  const now = await colours();
  await slider.focus();
  for (let i = 0; i < 12; i++) await slider.press("ArrowLeft");
  await page.waitForTimeout(150);
  assert.equal(await text(".row > span.quiet"), await page.locator(".row > span.quiet").first().innerText());
  const then = await colours();
  assert.notEqual(then.mean.toFixed(2), now.mean.toFixed(2));
  await page.locator("select[aria-label=layer]").selectOption("1");
  await page.locator("select[aria-label=head]").selectOption("0");
  await page.waitForTimeout(150);
  assert.notEqual((await colours()).mean.toFixed(2), then.mean.toFixed(2));
  await shot("layer");
  await page.locator("select[aria-label=layer]").selectOption("-1");
  await page.locator("select[aria-label=head]").selectOption("-1");
  await slider.press("End");
});

await check("reroll: arrow keys choose a row, the button queues with those rows and a new seed", async () => {
  await canvas.focus();
  await page.keyboard.press("ArrowDown");
  const button = page.getByRole("button", { name: /^Reroll from row 13/ });
  await button.waitFor();
  await shot("reroll");
  const seed = await page.evaluate(() => window.node.widgets.find((w) => w.name === "seed").value);
  await page.evaluate(() => { window.end = window.ended(); });
  await button.click();
  assert.equal(await end(), "execution_success");
  const asked = (await (await fetch(url + "/test/prompts")).json()).at(-1);
  const inputs = Object.values(asked).find((n) => n.class_type === "LineAR_Generate").inputs;
  assert.equal(inputs.keep_rows, 12);
  assert.equal(inputs.stop_after, 0);
  assert.notEqual(inputs.seed, seed);
  assert.match(inputs.view, /^1x12x24:/);
  const saved = await page.evaluate(() => window.app.graph.serialize().nodes.find((n) => n.type === "LineAR_Generate").widgets_values);
  assert.equal((Array.isArray(saved) ? saved : Object.values(saved)).filter((v) => /^1x12x24:/.test(String(v))).length, 1);
  await page.getByRole("button", { name: "Start over" }).click();
  assert.equal(await page.evaluate(() => window.node.widgets.find((w) => w.name === "keep_rows").value), 0);
});

await check("Stop: the rows so far can be kept or gone on from", async () => {
  await post("/test/hold", { row: 9 });
  await queue();
  await says(String.raw`^row 9/24`);
  await post("/interrupt", {});
  assert.equal(await end(), "execution_interrupted");
  await page.getByRole("button", { name: "Continue" }).waitFor();
  assert.match(await status.innerText(), /stopped$/);
  await shot("stopped");
  await page.evaluate(() => { window.end = window.ended(); });
  await page.getByRole("button", { name: "Keep 9 rows" }).click();
  await end();
  const inputs = Object.values((await (await fetch(url + "/test/prompts")).json()).at(-1)).find((n) => n.class_type === "LineAR_Generate").inputs;
  assert.deepEqual([inputs.keep_rows, inputs.stop_after, inputs.view.slice(0, 7)], [9, 9, "1x9x24:"]);
  await page.getByRole("button", { name: "Start over" }).click();
});

await check("a reload draws the same picture from what the node left behind", async () => {
  await queue();
  await end();
  await page.waitForTimeout(500);
  const before = await colours();
  const graph = await page.evaluate(() => JSON.stringify(window.app.graph.serialize()));
  await open();
  await page.evaluate(async (graph) => { await window.app.loadGraphData(JSON.parse(graph)); window.node = window.app.graph.nodes?.find((n) => n.type === "LineAR_Generate") ?? window.app.graph._nodes.find((n) => n.type === "LineAR_Generate"); }, graph);
  await says(String.raw`^row 24/24`);
  await page.waitForTimeout(800);
  const after = await colours();
  assert.ok(Math.abs(after.mean - before.mean) < 8 && after.seen > 60, JSON.stringify([before, after]));
});

await check("inside a subgraph the events find their widget", async () => {
  await build("LineAR_Generate");
  const made = await page.evaluate(async () => {
    const { app, node } = window;
    if (!app.graph.convertToSubgraph) return false;
    const { node: outer } = app.graph.convertToSubgraph(new Set([node]));
    const inner = outer.subgraph.nodes[0];
    window.inner = inner;
    await new Promise((done) => setTimeout(done, 500));
    app.canvas.setGraph(outer.subgraph);
    window.end = window.ended();
    await new Promise((done) => setTimeout(done, 800));
    await app.queuePrompt(0);
    return await window.end;
  });
  if (made === false) return;
  assert.equal(made, "execution_success");
  await page.waitForTimeout(800);
  await shot("subgraph");
  await says("^row 24/24");
});

await open();
await build("LineAR_Compare");
await check("Compare: both grow under one slider, then each pair of the batch", async () => {
  const slide = page.locator("canvas[role=slider]");
  await post("/test/hold", { row: 14 });
  await queue();
  await says(String.raw`^row 1[4-9]/24`);
  await page.waitForTimeout(300);
  await shot("compare-mid");
  await post("/test/go", {});
  assert.equal(await end(), "execution_success");
  await page.getByRole("button", { name: "next picture" }).waitFor();
  await slide.focus();
  await page.keyboard.press("ArrowLeft");
  await page.waitForTimeout(150);
  assert.equal(await slide.getAttribute("aria-valuenow"), "45");
  await page.getByRole("button", { name: "next picture" }).click();
  await page.getByText("2/2").waitFor();
  await shot("compare-after");
});

await check("no error or warning that names this pack", async () => assert.deepEqual(problems, []));
await browser.close();
process.exit(failed ? 1 : 0);
