// Pictures of the Generate node, one after every row, and one while it draws in scales, for pictures.py.
//   node capture.mjs URL FOLDER      PLAYWRIGHT, ENDPOINT: see page.mjs
import { openPage, until } from "./page.mjs";

const [url, folder] = process.argv.slice(2);
const { page, post, load, clear, colours, painted, placed, says, queue, end, close } = await openPage(url, { width: 1180, height: 940 });
await load();
await clear();
await page.evaluate(() => {
  const { app, LiteGraph } = window;
  const make = (type, x, y, size) => {
    const node = LiteGraph.createNode(type);
    node.pos = [x, y];
    app.graph.add(node);
    if (size) node.setSize(size);
    return node;
  };
  const slot = (node, name) => node.inputs.findIndex((i) => i.name === name);
  const load = (window.loader = make("LineAR_LoadModel", 20, 20, [290, 150]));
  const cache = make("LineAR_LineCache", 20, 230, [290, 240]);
  const prompt = make("LineAR_ClassPrompt", 20, 530, [290, 190]);
  const node = make("LineAR_Generate", 370, 20, [470, 760]);
  const decode = make("LineAR_Decode", 900, 20, [200, 90]);
  load.connect(0, node, slot(node, "model"));
  cache.connect(0, node, slot(node, "cache"));
  load.connect(0, prompt, 0);
  prompt.connect(0, node, slot(node, "prompt"));
  load.connect(0, decode, slot(decode, "model"));
  node.connect(0, decode, slot(decode, "tokens"));
  app.canvas.ds.scale = 1;
  app.canvas.ds.offset = [70, 140];
  app.canvas.setDirty(true, true);
});
await placed();
const box = await page.evaluate(() => {
  const all = [...document.querySelectorAll("div")].find((d) => d.shadowRoot?.querySelector("canvas[role=img]"));
  const { x, y, width, height } = all.getBoundingClientRect();
  return { x, y, width, height };
});
await post("/test/hold", { row: 1 });
await queue();
for (let row = 1; row <= 24; row++) {
  await says(`^row ${row}/24`);
  await painted();
  await page.screenshot({ path: `${folder}/row-${String(row).padStart(2, "0")}.png`, clip: box });
  if (row === 15) await page.screenshot({ path: `${folder}/widget.png`, clip: { x: 76, y: 112, width: 840, height: 826 } }); // without the host's own progress, above
  await post("/test/hold", { row: row + 1 });
}
const kept = page.waitForResponse(/\/view\?filename=linear_/);
await post("/test/go", {});
await Promise.all([kept, end()]);
await page.getByRole("button", { name: "replay" }).waitFor();
for (const [i, mode] of ["Kept", "Image", "Both"].entries()) {
  await page.getByRole("radio", { name: mode, exact: true }).click();
  await painted();
  await page.screenshot({ path: `${folder}/row-9${i}.png`, clip: box });
}
await page.evaluate(() => { window.loader.widgets.find((w) => w.name === "model").value = "landscapes in scales (bundled)"; });
await post("/test/hold", { row: 7 });
await queue();
await says("^scale 7/9");
await until(colours, ({ seen }) => seen > 60, "a picture is shown");
await page.screenshot({ path: `${folder}/scales.png`, clip: { ...box, height: box.height - 70 } }); // without the place for buttons
await post("/test/go", {});
await end();
await close();
process.exit(0);
