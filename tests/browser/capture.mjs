// Pictures of the Generate node, one after every row, for pictures.py.   node capture.mjs URL FOLDER
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [url, folder] = process.argv.slice(2);
const { chromium } = createRequire(pathToFileURL(`${process.env.PLAYWRIGHT}/x.js`))("playwright-core");
const post = (path, data) => fetch(url + path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(data) });
await post("/api/settings", {
  "Comfy.TutorialCompleted": true, "Comfy.InstalledVersion": "1.58.1", "Comfy.Release.ShowUpdates": false, "Comfy.VueNodes.Enabled": true,
  "Comfy.Workflow.ShowMissingNodesWarning": false, "Comfy.Minimap.Visible": false, "Comfy.Graph.CanvasInfo": false,
});
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage({ viewport: { width: 1180, height: 940 } });
await page.route("**/*", (r) => (new URL(r.request().url()).hostname === "127.0.0.1" || /^(data|blob):/.test(r.request().url()) ? r.continue() : r.abort()));
await page.goto(url, { waitUntil: "domcontentloaded" });
await page.waitForFunction(() => window.app?.graph && window.LiteGraph?.registered_node_types?.LineAR_Generate);
await page.waitForTimeout(1500);
await page.evaluate(async () => {
  const { app, LiteGraph } = window;
  app.graph.clear();
  await new Promise((done) => setTimeout(done, 400));
  const make = (type, x, y, size) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    app.graph.add(node);
    if (size) node.setSize(size);
    return node;
  };
  const slot = (node, name) => node.inputs.findIndex((i) => i.name === name);
  const load = make("LineAR_LoadModel", 20, 20, [290, 150]);
  const cache = make("LineAR_LineCache", 20, 250, [290, 150]);
  const prompt = make("LineAR_ClassPrompt", 20, 460, [290, 190]);
  const node = make("LineAR_Generate", 370, 20, [470, 760]);
  const decode = make("LineAR_Decode", 900, 20, [200, 90]);
  load.connect(0, node, slot(node, "model"));
  cache.connect(0, node, slot(node, "cache"));
  load.connect(0, prompt, 0);
  prompt.connect(0, node, slot(node, "prompt"));
  load.connect(0, decode, slot(decode, "model"));
  node.connect(0, decode, slot(decode, "tokens"));
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [70, 120];
  app.canvas.setDirty(true, true);
  await new Promise((done) => setTimeout(done, 1200));
});
const said = (row) => page.waitForFunction((row) => [...document.querySelectorAll("div")].some((d) => d.shadowRoot?.querySelector(".status[role=status]")?.textContent.startsWith(`row ${row}/`)), row);
const box = await page.evaluate(() => {
  const all = [...document.querySelectorAll("div")].find((d) => d.shadowRoot?.querySelector("canvas[role=img]"));
  const { x, y, width, height } = all.getBoundingClientRect();
  return { x, y, width, height };
});
await post("/test/hold", { row: 1 });
await page.evaluate(() => window.app.queuePrompt(0));
for (let row = 1; row <= 24; row++) {
  await said(row);
  await page.waitForTimeout(180);
  await page.screenshot({ path: `${folder}/row-${String(row).padStart(2, "0")}.png`, clip: box });
  if (row === 15) await page.screenshot({ path: `${folder}/widget.png`, clip: { x: 76, y: 84, width: 850, height: 830 } });
  await post("/test/hold", { row: row + 1 });
}
await post("/test/go", {});
await page.waitForTimeout(1500);
await page.getByRole("button", { name: "replay" }).waitFor();
for (const [i, mode] of ["Kept", "Image", "Both"].entries()) {
  await page.getByRole("radio", { name: mode, exact: true }).click();
  await page.waitForTimeout(250);
  await page.screenshot({ path: `${folder}/row-9${i}.png`, clip: box });
}
await browser.close();
