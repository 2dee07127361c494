// Reroll, Keep and going on downward in the real page of a live ComfyUI with this pack. Prints as widget.mjs does.
//   node live.mjs URL legacy|vue [--shots FOLDER]      PLAYWRIGHT, ENDPOINT: see page.mjs
import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { checks, openPage, until } from "./page.mjs";

const [url, renderer, , shots] = process.argv.slice(2);
const { page, problems, load, build, colours, painted, placed, says, listen, queue, end, close } = await openPage(url, { vue: renderer === "vue", width: 1400, height: 900 });
const { check, shot } = checks(page, painted, shots && ((name) => `${shots}/${name}-${renderer}.png`));

/** The codes of each row that the node shows. @param {string} [node] */
const codes = (node = "node") => page.evaluate((node) => window[node].widgets.find((w) => w.linearView).linearView.state.lines.map((line) => [...line.tokens].join(" ")), node);
/** Width and height of the picture that the graph has made last. */
const made = () => page.evaluate(async () => {
  const [output] = Object.values(window.app.nodeOutputs).filter((o) => o.images).slice(-1);
  const picture = await createImageBitmap(await (await window.app.api.fetchApi(`/view?${new URLSearchParams(output.images[0])}`)).blob());
  return [picture.width, picture.height];
});
const button = (name) => page.getByRole("button", { name });
const set = (name, value) => page.evaluate(([name, value]) => { window.node.widgets.find((w) => w.name === name).value = value; }, [name, value]);
let whole = [];

await check("a picture is drawn", async () => {
  await load();
  await build("LineAR_Generate");
  await set("seed", 1 + Math.floor(Math.random() * 1e9));
  await set("control_after_generate", "fixed");
  await queue();
  await says(String.raw`^row 1\d/24 · `);
  await until(colours, ({ seen }) => seen > 60, "a picture is shown");
  await shot("drawing");
  assert.equal(await end(), "execution_success");
  await says("^row 24/24");
  whole = await codes();
  assert.deepEqual(await made(), [96, 96]);
  await shot("drawn");
});

await check("Reroll from row 13: twelve rows stay, the others are new", async () => {
  await page.locator("canvas[role=img]").focus();
  await page.keyboard.press("ArrowDown");
  await listen();
  await button(/^Reroll from row 13/).click();
  await says(String.raw`^row 1[3-9]/24 · `);
  await shot("rerolling");
  assert.equal(await end(), "execution_success");
  const now = await codes();
  assert.deepEqual(now.slice(0, 12), whole.slice(0, 12));
  assert.notDeepEqual(now.slice(12), whole.slice(12));
  assert.deepEqual(await made(), [96, 96]);
  await shot("rerolled");
});

await check("Start over: all rows are drawn again", async () => {
  await button("Start over").click();
  await set("batch_size", 8); // so that it takes long enough to be stopped
  await set("seed", 2 + Math.floor(Math.random() * 1e9));
  await queue();
  assert.equal(await end(), "execution_success");
  whole = await codes();
});

await check("Stop, then Keep: the rows so far come out as a picture cut off there", async () => {
  await set("temperature", 1); // the same as the model's own, but nothing that the host has already
  await queue();
  await says(String.raw`^row ([5-9]|1\d)/24 · `);
  await page.evaluate(() => window.app.api.interrupt());
  assert.equal(await end(), "execution_interrupted");
  await button("Continue").waitFor();
  const rows = (await codes()).length;
  assert.ok(rows < 24);
  await shot("stopped");
  await listen();
  await button(`Keep ${rows} row`).click();
  assert.equal(await end(), "execution_success");
  assert.deepEqual(await codes(), whole.slice(0, rows));
  assert.deepEqual(await made(), [96, 4 * rows]);
  await shot("kept");
});

await check("then Continue: the pictures as if they had not been stopped", async () => {
  await listen();
  await button("Continue").click();
  assert.equal(await end(), "execution_success");
  // Lines that are fed at once add up in another order, so of eight pictures a few may differ where two codes are nearly equal.
  const pictures = (rows) => Array.from({ length: 8 }, (_, n) => rows.flatMap((row) => row.split(" ").slice(24 * n, 24 * (n + 1))).join(" "));
  const [now, before] = [pictures(await codes()), pictures(whole)];
  assert.ok(now.every((picture) => picture.split(" ").length === 24 * 24));
  assert.ok(now.filter((picture, n) => picture !== before[n]).length <= 2);
  assert.deepEqual(await made(), [96, 96]);
  await shot("continued");
});

await check("the workflow that goes on downward", async () => {
  const graph = JSON.parse(await readFile(new URL("../../../workflows/continue_downward.json", import.meta.url), "utf8"));
  await page.evaluate(async (graph) => {
    const { app } = window;
    await app.loadGraphData(graph);
    const all = app.graph.nodes ?? app.graph._nodes;
    [window.first, window.second] = all.filter((n) => n.type === "LineAR_Generate").sort((a, b) => a.id - b.id);
    for (const node of [window.first, window.second]) node.widgets.find((w) => w.name === "seed").value = Math.floor(Math.random() * 1e9);
  }, graph);
  await placed();
  await queue();
  await page.waitForFunction(() => (window.second.widgets.find((w) => w.linearView).linearView.state.lines.length ?? 0) >= 16);
  await shot("downward-mid");
  assert.equal(await end(), "execution_success");
  const [above, below] = [await codes("first"), await codes("second")];
  assert.equal(below.length, 24);
  assert.notDeepEqual(above.slice(12), below.slice(12));
  await shot("downward");
});

await check("no error or warning that names this pack", async () => assert.deepEqual(problems, []));
await close();
process.exit(0);
