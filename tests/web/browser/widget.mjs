// The widgets in the real page, over host.py. A line of JSON as each check begins and as it ends; the first that fails is the last.
//   node widget.mjs URL legacy|vue [--shots FOLDER] [--theme light]      PLAYWRIGHT, ENDPOINT: see page.mjs
import assert from "node:assert/strict";
import { checks, fitting, openPage, options, until } from "./page.mjs";

const { url, renderer, theme, file } = options();
const opened = await openPage(url, { vue: renderer === "vue", theme, height: 1000 });
const { page, problems, post, load, build, colours, painted, placed, says, memory: read, listen, queue, end, close } = opened;
const { check, shot } = checks(page, painted, file);
const { fits, WIDTHS } = fitting(opened, renderer, shot);

const text = (selector) => page.locator(selector).first().innerText();
const canvas = page.locator("canvas[role=img]");
const status = page.locator(".status[role=status]").first();

const size = (text) => Number(/cache ([\d.]+)/.exec(text)[1]);

/** Connect a node that is made on the spot. */
const link = (type, to = "batch_size", node = "node") => page.evaluate(([type, to, node]) => {
  const { app, LiteGraph } = window;
  for (const name of ["Holds", "Computes"]) {
    class Made extends LiteGraph.LGraphNode {
      constructor() {
        super(name);
        this.addOutput("INT", "INT");
        this.addWidget("number", "value", 4, () => {}, {});
        if (name === "Computes") this.addWidget("number", "other", 1, () => {}, {});
      }
    }
    if (!LiteGraph.registered_node_types[`test/${name}`]) LiteGraph.registerNodeType(`test/${name}`, Made);
  }
  const from = (window.from = LiteGraph.createNode(type));
  app.graph.add(from);
  from.connect(0, window[node], window[node].inputs.findIndex((i) => i.name === to));
  const value = from.widgets?.[0];
  if (type === "PrimitiveNode") value.value = to === "batch_size" ? 4 : value.value;
}, [type, to, node]);

/** Pictures that the page itself shows on the node, beside our widget. */
const second = () => page.evaluate(() => document.querySelectorAll(`[data-node-id="${window.node.id}"] img`).length + (window.node.imgs?.length ?? 0));

await check("the page loads, and takes a graph", async () => {
  await load();
  await build("LineAR_Generate");
});

await check("before a run: a hint, no controls, and the memory line", async () => {
  assert.match(await text(".empty"), /appear here as they are drawn/);
  await page.waitForFunction(() => [...document.querySelectorAll("div")].some((d) => /KV cache [\d.]+ MiB of [\d.]+ MiB, −\d+ %/.test(d.shadowRoot?.textContent ?? "")));
  await shot("before");
});

await check("the memory line follows preset and batch", async () => {
  const before = await read();
  await page.evaluate(() => { window.node.widgets.find((w) => w.name === "batch_size").value = 4; });
  const four = await until(read, (now) => now !== before, "the memory line follows");
  const number = (t) => Number(/cache ([\d.]+)/.exec(t)[1]);
  assert.ok(Math.abs(number(four) / number(before) - 4) < 0.2, `${before} → ${four}`);
  await page.evaluate(() => { window.node.widgets.find((w) => w.name === "batch_size").value = 1; });
});

await check("the memory line follows a link to a value, and says what only the run can tell", async () => {
  const tells = (pattern) => until(read, (now) => pattern.test(now), String(pattern));
  const one = size(await tells(/cache [\d.]{3} MiB/)); // of one picture again
  const four = (text) => Math.abs(size(text) / one - 4) < 0.2;
  const cut = () => page.evaluate(() => window.app.graph.remove(window.from));
  for (const type of ["test/Holds", "PrimitiveNode"]) {
    await link(type);
    assert.ok(four(await until(read, four, `${type} is followed`)));
    await page.evaluate(() => { window.from.mode = 2; });
    await tells(/KV cache [\d.]+ MiB of [\d.]+ MiB a picture, −\d+ % · batch_size unknown until it runs/);
    assert.equal(size(await read()), one);
    await cut();
    await tells(/KV cache [\d.]+ MiB of [\d.]+ MiB, /);
  }
  await link("test/Computes");
  await tells(/a picture, −\d+ % · batch_size unknown until it runs/);
  await shot("unknown");
  await cut();
  await build("LineAR_Generate");
  await link("test/Computes", "preset", "cache").catch(() => {});
  if (await page.evaluate(() => window.from.outputs[0].links?.length)) await tells(/^KV cache: unknown until it runs, as preset comes through a link$/);
  await build("LineAR_Generate");
});

await check("what −1 stands for is told as far as the model is known, and nothing else is saved for it", async () => {
  const own = async () => (await page.locator(".own").first().isVisible()) ? text(".own") : "";
  const set = (name, value) => page.evaluate(([name, value]) => { window.node.widgets.find((w) => w.name === name).value = value; }, [name, value]);
  const saved = () => page.evaluate(() => Object.values(window.app.graph.serialize().nodes.find((n) => n.type === "LineAR_Generate").widgets_values));
  const tells = (words) => until(own, (now) => now === words, words || "nothing is left to the model");
  await tells("−1 is the model's own: guidance 3 · temperature 1 · top_k all · top_p 1");
  const before = await saved();
  assert.equal(before.filter((value) => value === -1).length, 5); // and guidance_interval
  await set("guidance", 4.5);
  await tells("−1 is the model's own: temperature 1 · top_k all · top_p 1");
  for (const name of ["temperature", "top_k", "top_p"]) await set(name, 1);
  await tells("");
  for (const name of ["guidance", "temperature", "top_k", "top_p"]) await set(name, -1);
  await page.evaluate(() => {
    const { app, node, LiteGraph } = window;
    node.disconnectInput(node.inputs.findIndex((i) => i.name === "model"));
    app.graph.add((window.other = LiteGraph.createNode("LineAR_LoadModel"))); // which of the two it will be is open
  });
  await tells("−1 is the model's own");
  await page.evaluate(() => {
    const { app, node, other } = window;
    app.graph.remove(other);
    const loader = (app.graph.nodes ?? app.graph._nodes).find((n) => n.type === "LineAR_LoadModel");
    loader.connect(0, node, node.inputs.findIndex((i) => i.name === "model"));
  });
  await tells("−1 is the model's own: guidance 3 · temperature 1 · top_k all · top_p 1");
  assert.deepEqual(await saved(), before);
});

await check("mid-run: the rows so far, the text line, the line being written", async () => {
  await post("/test/hold", { row: 14 });
  await queue();
  await says(String.raw`^row 1[4-9]/24 · `);
  assert.match(await status.innerText(), /^row 1\d\/24 · \d+ tok\/s · cache 4 of 24 lines · [\d.]+ MiB of [\d.]+ · ETA /);
  await until(colours, ({ seen }) => seen > 60, "a picture is shown");
  assert.equal(await second(), 0);
  await shot("mid");
  await post("/test/go", {});
  assert.equal(await end(), "execution_success");
});

await check("after the run: everything is there, and the host shows no second picture on the node", async () => {
  await says("^row 24/24 · ");
  assert.match(await status.innerText(), /^row 24\/24 · \d+ tok\/s · cache 4 of 24 lines/);
  await shot("after");
  assert.equal(await second(), 0);
});

await check("Image, Kept, Both: three looks, by pointer and by arrow keys", async () => {
  const seen = [];
  for (const name of ["Image", "Kept", "Both"]) {
    await page.getByRole("radio", { name, exact: true }).click();
    await painted();
    seen.push((await colours()).mean);
    await shot(name.toLowerCase());
  }
  assert.equal(new Set(seen.map((m) => m.toFixed(2))).size, 3, String(seen));
  await page.getByRole("radio", { name: "Both", exact: true }).press("ArrowRight");
  assert.equal(await page.getByRole("radio", { name: "Image", exact: true }).getAttribute("aria-checked"), "true");
  await page.getByRole("radio", { name: "Image", exact: true }).press("ArrowLeft");
});

await check("hover names row, column and fate", async () => {
  await placed();
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
  await painted();
  assert.equal(await page.locator(".row > span.quiet").first().innerText(), "after row 12");
  const then = await colours();
  assert.notEqual(then.mean.toFixed(2), now.mean.toFixed(2));
  await page.locator("select[aria-label=layer]").selectOption("1");
  await page.locator("select[aria-label=head]").selectOption("0");
  await painted();
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
  await listen();
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
  await listen();
  await page.getByRole("button", { name: "Keep 9 rows" }).click();
  await end();
  const inputs = Object.values((await (await fetch(url + "/test/prompts")).json()).at(-1)).find((n) => n.class_type === "LineAR_Generate").inputs;
  assert.deepEqual([inputs.keep_rows, inputs.stop_after, inputs.view.slice(0, 7)], [9, 9, "1x9x24:"]);
  await page.getByRole("button", { name: "Start over" }).click();
});

await check("at every width all can be read and pressed: while rows come, stopped, kept, and with a row chosen", async () => {
  await post("/test/hold", { row: 9 });
  await queue();
  await says(String.raw`^row 9/24`);
  await fits("fits-mid", ["node"], WIDTHS);
  await post("/interrupt", {});
  assert.equal(await end(), "execution_interrupted");
  await page.getByRole("button", { name: "Continue" }).waitFor();
  await fits("fits-stopped");
  await listen();
  await page.getByRole("button", { name: "Keep 9 rows" }).click();
  await end();
  await canvas.press("ArrowDown");
  await fits("fits-kept");
  await page.getByRole("button", { name: "Start over" }).click();
  await queue();
  assert.equal(await end(), "execution_success");
  await says("^row 24/24 · ");
  await fits("fits-after", ["node"], WIDTHS);
  await canvas.press("ArrowDown");
  await page.getByRole("button", { name: /^Reroll from row/ }).waitFor();
  await fits("fits-row");
});

await check("a node that runs for each entry of a list: one run is shown, any can be chosen, and Reroll is of that one", async () => {
  const shown = () => page.evaluate(() => {
    const view = window.node.widgets.find((w) => w.linearView).linearView;
    return { run: view.state.run.run, lines: view.state.lines.length, codes: view.state.lines.map((line) => [...line.tokens]), picture: view.pictures.get(view.state.run.run)?.at(-1).lines, seed: view.state.run.seed };
  });
  const which = page.getByText(/^run \d\/3$/);
  const [before, next] = ["previous run", "next run"].map((name) => page.getByRole("button", { name }));
  await post("/test/list", { entries: 3 });
  const kept = page.waitForResponse(/\/view\?filename=/);
  await queue();
  await Promise.all([kept, end()]);
  await says("^row 24/24 · ");
  assert.equal(await which.innerText(), "run 3/3");
  await painted();
  const [last, third] = [await shown(), await colours()];
  await shot("runs");
  await before.click();
  await until(colours, (now) => now.seen > 60 && now.mean !== third.mean, "the second run has a picture of its own");
  assert.equal(await which.innerText(), "run 2/3");
  const second = await shown();
  assert.notEqual(second.run, last.run);
  assert.notDeepEqual(second.codes, last.codes);
  await fits("fits-runs", ["node"], WIDTHS);
  await canvas.press("ArrowDown");
  await listen();
  await page.getByRole("button", { name: /^Reroll from row 13/ }).click();
  assert.equal(await end(), "execution_success");
  const inputs = Object.values((await (await fetch(url + "/test/prompts")).json()).at(-1)).find((n) => n.class_type === "LineAR_Generate").inputs;
  const [first, ...others] = inputs.view.split(";");
  assert.equal(inputs.keep_rows, 12);
  assert.match(first, new RegExp(`^1@${inputs.seed}[|]1x12x24:`));
  const bytes = Buffer.from(first.split(":")[1], "base64");
  assert.deepEqual([...new Uint16Array(bytes.buffer, bytes.byteOffset, 12 * 24)], second.codes.slice(0, 12).flat(), "rows of the picture that is shown");
  assert.deepEqual(others.map((part) => part.split(":")[0]), [`0@${second.seed - 1}|1x23x24`, `2@${second.seed + 1}|1x23x24`]);
  await page.getByText("next run keeps rows 1–12 of run 2").waitFor();
  await page.getByText("run 2/3").waitFor(); // the run that was chosen, afterwards too
  await page.getByRole("button", { name: "Start over" }).click();
  await post("/test/hold", { row: 9 });
  await queue();
  await says(String.raw`^row 9/24`);
  assert.equal(await which.count(), 0, "a new prompt: its first run");
  await post("/test/hold", { row: 24 });
  await says(String.raw`^row 24/24`);
  await post("/test/hold", { row: 9 }); // of the second
  await page.getByText("run 2/2").waitFor();
  await before.click();
  await says("^row 24/24 · ");
  assert.equal(await page.getByRole("button", { name: /^Reroll/ }).count(), 0, "not while others are drawn");
  await next.click();
  await says(String.raw`^row 9/24`);
  await post("/test/list", { entries: 1 });
  await post("/test/go", {});
  assert.equal(await end(), "execution_success");
  await page.getByText("run 2/3").waitFor();
  await queue();
  assert.equal(await end(), "execution_success");
  await says("^row 24/24 · ");
  assert.equal(await which.count(), 0);
});

await check("a mask: what it keeps is hatched while the rest is drawn, a line stays around the rest, and the pointer names it", async () => {
  const [rows, cols, hole] = [24, 24, { top: 10, bottom: 18, left: 6, right: 18 }]; // bottom and right: the first beyond
  const inside = (cell) => { const [row, col] = [Math.floor(cell / cols), cell % cols]; return row >= hole.top && row < hole.bottom && col >= hole.left && col < hole.right; };
  const bits = new Uint8Array((rows * cols) / 8);
  for (let cell = 0; cell < rows * cols; cell++) if (!inside(cell)) bits[cell >> 3] |= 1 << (cell & 7);
  const kept = (text) => post("/test/mask", { kept: text });
  /** How far colours differ along the edge above the hole, and along a line between cells further up. */
  const spreads = async () => {
    const { boxes: [box] } = await page.evaluate(() => window.node.widgets.find((w) => w.linearView).linearView.place);
    return canvas.evaluate((c, { box, hole: { top, left, right } }) => {
      const scale = c.width / c.clientWidth;
      const spread = (row) => {
        const [x, y] = [box.x + (left + 0.5) * box.cell, box.y + row * box.cell].map((v) => Math.round(v * scale));
        const { data } = c.getContext("2d").getImageData(x, y, Math.round((right - left - 1) * box.cell * scale), 1);
        const green = data.filter((_, i) => i % 4 === 1);
        return Math.max(...green) - Math.min(...green);
      };
      return { edge: spread(top), above: spread(top - 3) };
    }, { box, hole });
  };
  const look = async (name) => { await page.getByRole("radio", { name, exact: true }).click(); await painted(); return colours(); };
  await build("LineAR_Generate");
  await queue();
  assert.equal(await end(), "execution_success");
  await says("^row 24/24 · ");
  const [image, both] = [await look("Image"), await look("Both")];
  await kept(Buffer.from(bits).toString("base64"));
  await post("/test/hold", { row: 14 });
  await queue();
  await says(String.raw`^row 1[4-9]/24 · `);
  await until(colours, ({ seen }) => seen > 60, "a picture is shown");
  await shot("mask-mid");
  await post("/test/go", {});
  assert.equal(await end(), "execution_success");
  await says("^row 24/24 · ");
  const hatched = await until(() => look("Both"), (now) => now.mean !== both.mean, "what is kept is hatched");
  assert.notEqual(hatched.mean.toFixed(1), both.mean.toFixed(1));
  await shot("mask-both");
  const plain = await look("Image");
  assert.ok(Math.abs(plain.mean - image.mean) < 2, `a finished picture is seen as it is: ${plain.mean}, without a mask ${image.mean}`);
  const { edge, above } = await spreads();
  assert.ok(edge < 5 && above > 20, `a line around the region, in one colour: ${edge}, and ${above} in the picture`);
  await shot("mask-image");
  const box = await canvas.boundingBox();
  const at = await page.evaluate(() => { const { place } = window.node.widgets.find((w) => w.linearView).linearView; return place.boxes[0]; });
  const tip = async (row, col) => { await page.mouse.move(box.x + at.x + (col + 0.5) * at.cell, box.y + at.y + (row + 0.5) * at.cell); return text(".tip"); };
  assert.match(await tip(2, 3), /^row 3, column 4 · outside the mask/);
  assert.doesNotMatch(await tip(12, 12), /outside the mask/);
  await fits("fits-mask");
  await kept("");
});

await check("Compare: both grow under one slider, then each pair of the batch", async () => {
  await build("LineAR_Compare");
  const slide = page.locator("canvas[role=slider]");
  await post("/test/hold", { row: 14 });
  await queue();
  await says(String.raw`^row 1[4-9]/24`);
  await shot("compare-mid");
  await post("/test/go", {});
  assert.equal(await end(), "execution_success");
  await page.getByRole("button", { name: "next picture" }).waitFor();
  await slide.focus();
  await page.keyboard.press("ArrowLeft");
  await painted();
  assert.equal(await slide.getAttribute("aria-valuenow"), "45");
  await page.getByRole("button", { name: "next picture" }).click();
  await page.getByText("2/2").waitFor();
  await shot("compare-after");
  await fits("fits-compare", ["node", "cache"]);
});

await check("a reload draws the same picture from what the node left behind", async () => {
  await build("LineAR_Generate");
  const kept = page.waitForResponse(/\/view\?filename=linear_/);
  await queue();
  await Promise.all([kept, end()]);
  await says(String.raw`^row 24/24`);
  let before = await colours(); // of the finished picture: it may still be on its way
  await until(colours, (now) => { const settled = now.seen > 60 && now.seen === before.seen && now.mean === before.mean; before = now; return settled; }, "the picture is finished", () => page.waitForTimeout(1000));
  const graph = await page.evaluate(() => JSON.stringify(window.app.graph.serialize()));
  await load();
  await page.evaluate(async (graph) => { await window.app.loadGraphData(JSON.parse(graph)); window.node = window.app.graph.nodes?.find((n) => n.type === "LineAR_Generate") ?? window.app.graph._nodes.find((n) => n.type === "LineAR_Generate"); }, graph);
  await says(String.raw`^row 24/24`);
  await until(colours, (after) => Math.abs(after.mean - before.mean) < 8 && after.seen > 60, `the picture is back, ${JSON.stringify(before)}`);
});

await check("inside a subgraph the events find their widget, and the memory line what comes into it and out of it", async () => {
  await build("LineAR_Generate");
  const one = size(await until(read, (text) => /cache [\d.]{3} MiB/.test(text), "of one picture"));
  const four = (text) => Math.abs(size(text) / one - 4) < 0.2;
  await link("test/Holds");
  const inside = await page.evaluate(() => {
    const { app, node } = window;
    if (!app.graph.convertToSubgraph) return false;
    window.outer = app.graph.convertToSubgraph(new Set([node])).node;
    return true;
  });
  if (!inside) return;
  await until(read, four, "into a subgraph");
  await page.evaluate(() => { window.from.widgets[0].value = 1; });
  await until(read, (text) => size(text) === one, "into a subgraph, changed");
  await page.evaluate(() => {
    const { app, from } = window;
    from.widgets[0].value = 4;
    window.deeper = app.graph.convertToSubgraph(new Set([from])).node;
  });
  await until(read, four, "out of a subgraph");
  await page.evaluate(() => window.app.graph.remove(window.deeper));
  await painted(); // nobody opens it before it is on the screen
  await page.evaluate(() => window.app.canvas.setGraph(window.outer.subgraph));
  await placed();
  await queue();
  assert.equal(await end(), "execution_success");
  await says("^row 24/24");
  await shot("subgraph");
});

await check("no error or warning that names this pack", async () => assert.deepEqual(problems, []));
await close();
process.exit(0);
