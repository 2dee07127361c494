// The widgets over a picture drawn in scales, in the real page over host.py. Prints as widget.mjs does.
//   node scales.mjs URL legacy|vue [--shots FOLDER] [--theme light]      PLAYWRIGHT, ENDPOINT: see page.mjs
import assert from "node:assert/strict";
import { checks, fitting, openPage, options, until } from "./page.mjs";

const { url, renderer, theme, file } = options("scales-");
const opened = await openPage(url, { vue: renderer === "vue", theme, height: 1000 });
const { page, problems, post, load, build, colours, painted, says, memory, listen, queue, end, close } = opened;
const { check, shot } = checks(page, painted, file);
const { fits, WIDTHS } = fitting(opened, renderer, shot);

const canvas = page.locator("canvas[role=img]");
const status = page.locator(".status[role=status]").first();
const asked = async () => Object.values((await (await fetch(url + "/test/prompts")).json()).at(-1)).find((n) => n.class_type === "LineAR_Generate").inputs;

await check("the page loads, and the memory line knows scales", async () => {
  await load();
  await build("LineAR_Generate");
  await page.evaluate(() => {
    window.loader = (window.app.graph.nodes ?? window.app.graph._nodes).find((n) => n.type === "LineAR_LoadModel");
    window.loader.widgets.find((w) => w.name === "model").value = "landscapes in scales (bundled)";
  });
  await until(memory, (now) => /^42 of 255 tokens \(1\/6\) · KV cache 1\.8 MiB of 7\.5 MiB, −7\d % /.test(now), "the memory line knows scales");
});

await check("a drafter: the weights of both models count, and the larger of their caches", async () => {
  const weights = (text) => Number(/ weights ([\d.]+) GB/.exec(text)[1]);
  const one = await until(memory, (now) => now.includes(" · room for "), "all of the line is there");
  const connect = (from) => page.evaluate((from) => window[from].connect(0, window.node, window.node.inputs.findIndex((i) => i.name === "drafter")), from);
  await page.evaluate(() => {
    const { app, LiteGraph } = window;
    app.graph.add((window.other = LiteGraph.createNode("LineAR_LoadModel")));
    window.other.pos = [90, 800];
    window.other.widgets.find((w) => w.name === "model").value = "landscapes in scales (bundled)";
  });
  await connect("other");
  const two = await until(memory, (now) => now !== one, "the drafter counts");
  assert.ok(Math.abs(weights(two) - 2 * weights(one)) <= 0.01, two);
  assert.equal(two.split(" · ").slice(0, 2).join(), one.split(" · ").slice(0, 2).join(), "the same cache");
  await page.evaluate(() => { window.other.mode = 4; });
  await until(memory, (now) => weights(now) === weights(one), "a bypassed one does not");
  await page.evaluate(() => window.app.graph.remove(window.other));
  await until(memory, (now) => now === one, "as before");
});

await check("mid-run: the picture and a map of each scale; stopped after six; all can be read at every width", async () => {
  await post("/test/hold", { row: 6 });
  await queue();
  await says("^scale 6/9 · ");
  assert.match(await status.innerText(), /^scale 6\/9 · \d+ tok\/s · cache 42 of 255 tokens · 1\.8 MiB of 7\.5 · ETA /);
  await until(colours, ({ seen }) => seen > 60, "a picture is shown");
  await shot("mid");
  await fits("fits-mid", ["node"], WIDTHS);
  await post("/interrupt", {});
  assert.equal(await end(), "execution_interrupted");
  await page.getByRole("button", { name: "Continue" }).waitFor();
  assert.equal(await page.getByRole("button", { name: "Keep 6 scales" }).isVisible(), true);
  await shot("stopped");
});

await check("after the run: three looks, the fate of a token, back in time, and all can be read", async () => {
  await queue();
  assert.equal(await end(), "execution_success");
  await says("^scale 9/9 · ");
  await fits("fits-after", ["node"], [WIDTHS[0], 440]);
  const seen = [];
  for (const name of ["Image", "Kept", "Both"]) {
    await page.getByRole("radio", { name, exact: true }).click();
    await painted();
    seen.push((await colours()).mean.toFixed(2));
    await shot(name.toLowerCase());
  }
  assert.equal(new Set(seen).size, 3, String(seen));
  const [x, y] = await middle(4);
  await page.mouse.move(x, y);
  assert.match(await page.locator(".tip").first().innerText(), /^scale 5 of 9: \d+ of 25 tokens · row 3, column 3 · (kept by|evicted after scale \d)/);
  const slider = page.locator("input[type=range][aria-label*='after scale']");
  const now = await colours();
  await slider.focus();
  for (let i = 0; i < 4; i++) await slider.press("ArrowLeft");
  await painted();
  assert.equal(await page.locator(".row > span.quiet").first().innerText(), "after scale 5");
  assert.notEqual((await colours()).mean.toFixed(2), now.mean.toFixed(2));
  await slider.press("End");
});

await check("draw again: a click chooses a scale, the arrow keys another, and those before it stay", async () => {
  await page.mouse.click(...(await middle(4)));
  await canvas.press("ArrowRight");
  await shot("cut");
  await listen();
  await page.getByRole("button", { name: "Draw again from scale 6" }).click();
  assert.equal(await end(), "execution_success");
  const inputs = await asked();
  assert.equal(inputs.keep_rows, 5);
  assert.match(inputs.view, /^1x55:[\w+/=]+:[0-9a-f]{16}$/);
});

/** Where the middle of a scale's map is on the page. @param {number} scale */
async function middle(scale) {
  await painted();
  const map = await page.evaluate((scale) => window.node.widgets.find((w) => w.linearView).linearView.place.maps[scale], scale);
  const box = await canvas.boundingBox();
  return [box.x + map.x + map.width / 2, box.y + map.y + map.height / 2];
}

await check("no error or warning that names this pack", async () => assert.deepEqual(problems, []));
await close();
process.exit(0);
