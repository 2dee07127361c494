// web/state.js: events in, state out. Whether it equals Python is test_events.py's question; here are hand-made events.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import * as web from "../../web/state.js";

const { EMPTY, FIELDS, cacheBytes, canChoose, draftedGrid, eta, evictedAfter, gridOf, held, heldOfScales, hoverText, keptCells, keptRows, keptRun, keptText, keptTextOfRuns, leastPlan, memoryText, ownText, picturesThatFit, reduce, reduceRuns, remembered, replay, replayRuns, statusText } = web;
const MIB = 2 ** 20;

const b64 = (...numbers) => Buffer.from(Uint8Array.from(numbers)).toString("base64");
const b16 = (...numbers) => Buffer.from(Uint16Array.from(numbers).buffer).toString("base64");

// Two lines of three columns and an end-of-line token, two layers of one head; line 0 loses its first token in layer 0.
const started = {
  kind: "started", run: "a", rows: 3, cols: 3, stride: 4, images: 2, shown: 2, columns: 2, layers: 2, heads: 1,
  detail: "heads", seed: 7, policy: "line", release: "strict", lines: 1, anchors: 0, recent: 0, cache_bytes: 5.1 * MIB, full_bytes: 24.3 * MIB, codebook: "",
  list_index: 0, sides: [], seeds: "", state_bytes: 0, beside: "", kept: "",
};
const row = (n, more) => ({
  kind: "row", run: "a", row: n, rows: 3, cols: 3, seconds: 0.5, tokens_per_second: 12, held: 3, lines: 1, cache_bytes: 5.1 * MIB,
  full_bytes: 24.3 * MIB, replayed: false, tokens: b16(n, n + 1, n + 2, n + 10, n + 11, 300), cells: "", shares: "", evicted: "", by_layer: "", merged: "", stands: "", passes: 0, accepted: 0, side: [],
  ...more,
});
const first = row(0, { cells: b16(0, 1, 2, 9, 10, 11), shares: b64(128, 255, 255, 255, 255, 255), evicted: b16(0, 0xffff) });
const second = row(1, { cells: b16(0, 1, 3, 4, 5), shares: b64(0, 0, 255, 255, 128), evicted: b16(1, 6, 0, 1) });
const finished = { kind: "finished", run: "a", rows: 3, seconds: 1.5, tokens_per_second: 12.4, held: 3, passes: 0, accepted: 0 };

test("the events above have the fields that Python sends", () => {
  assert.deepEqual(Object.keys(started).sort(), [...FIELDS.started, "kind"].sort());
  assert.deepEqual(Object.keys(first).sort(), [...FIELDS.row, "kind"].sort());
  assert.deepEqual(Object.keys(finished).sort(), [...FIELDS.finished, "kind"].sort());
});

test("one by one is the same as all together, and no state is changed in place", () => {
  const events = [started, first, second];
  let state = EMPTY;
  for (const event of events) {
    const before = structuredClone(state);
    const next = reduce(state, event);
    assert.deepEqual(structuredClone(state), before);
    state = next;
  }
  assert.deepEqual(state, replay(events));
  assert.equal(EMPTY.lines.length, 0);
});

test("shares of all, of a layer, of a head, at every moment", () => {
  const state = replay([started, first, second]);
  assert.deepEqual([...held(state, { row: 0 })].slice(0, 4), [128, 255, 255, 0]);
  assert.deepEqual([...held(state)].slice(0, 9), [0, 0, 255, 255, 255, 128, 0, 0, 0]);
  assert.deepEqual([...held(state, { layer: 0, head: 0 })], [0, 0, 255, 255, 255, 0, 0, 0, 0]);
  assert.deepEqual([...held(state, { layer: 1 })], [0, 0, 255, 255, 255, 255, 0, 0, 0]);
  assert.deepEqual([...held(state, { layer: 0, row: 0 })], [0, 255, 255, 0, 0, 0, 0, 0, 0]);
  assert.deepEqual([...held(state, { head: 0 })].slice(0, 6), [0, 0, 255, 255, 255, 128]);
  assert.deepEqual(canChoose(state), { layers: true, heads: true });
});

test("by layer where that is what is told", () => {
  const by = { ...started, detail: "layers" };
  const state = replay([by, { ...first, evicted: "", by_layer: b64(0, 255, 255, 255, 255, 255) }]);
  assert.deepEqual([...held(state, { layer: 0 })].slice(0, 4), [0, 255, 255, 0]);
  assert.deepEqual([...held(state, { layer: 1 })].slice(0, 4), [255, 255, 255, 0]);
  assert.deepEqual(canChoose(state), { layers: true, heads: false });
});

test("when a cell was evicted", () => {
  const state = replay([started, first, second]);
  assert.deepEqual([...evictedAfter(state)].slice(0, 9), [1, 1, -1, -1, -1, -1, -1, -1, -1]);
  assert.deepEqual([...evictedAfter(state, { layer: 0, head: 0 })].slice(0, 6), [0, 1, -1, -1, -1, 1]);
});

test("the text line", () => {
  const running = replay([started, first, second]);
  assert.equal(statusText(running), "row 2/3 · 12 tok/s · cache 1 of 3 lines · 5.1 MiB of 24.3 MiB · ETA 0.5 s".replace("24.3 MiB", "24.3"));
  assert.equal(statusText(reduce(running, finished)), "row 2/3 · 12 tok/s · cache 1 of 3 lines · 5.1 MiB of 24.3 · 2 s");
  assert.equal(statusText(reduce(running, { kind: "stopped" })), "row 2/3 · 12 tok/s · cache 1 of 3 lines · 5.1 MiB of 24.3 · stopped");
  const drafted = replay([started, row(0, { replayed: true }), row(1, { passes: 2 }), row(2, { passes: 1 })]);
  assert.match(statusText(drafted), /^row 3\/3, 2\.0 tokens a pass · 12 tok\/s · /);
  assert.equal(statusText(replay([{ ...started, lines: 3 }])), "row 0/3 · full cache · 24.3 MiB");
  assert.equal(statusText(EMPTY), "");
});

test("time left goes by the lines that were drawn", () => {
  assert.equal(eta(replay([started, { ...first, replayed: true, seconds: 9 }])), null);
  assert.equal(eta(replay([started, { ...first, replayed: true, seconds: 9 }, second])), 0.5);
});

test("hover says where, how much and since when", () => {
  const state = replay([started, first, second]);
  assert.equal(hoverText(state, 5), "picture 1, row 2, column 3 · kept by 50 % of heads");
  assert.equal(hoverText(state, 2), "picture 1, row 1, column 3 · kept by all heads");
  assert.equal(hoverText(state, 0), "picture 1, row 1, column 1 · evicted after row 2, 1 line later");
  assert.equal(hoverText(state, 7), "picture 1, row 3, column 2 · not drawn yet");
  assert.equal(hoverText(state, 9, { layer: 1 }), "picture 2, row 1, column 1 · layers and heads are told of the first picture only");
  const folded = replay([started, { ...first, merged: b16(2), stands: b16(8 * 3) }, { ...second, merged: b16(2, 5), stands: b16(8 * 14, 20) }]);
  assert.equal(hoverText(folded, 2, { row: 0 }), "picture 1, row 1, column 3 · kept by all heads · stands for 3 tokens");
  assert.equal(hoverText(folded, 2), "picture 1, row 1, column 3 · kept by all heads · stands for 14 tokens");
  assert.equal(hoverText(folded, 5), "picture 1, row 2, column 3 · kept by 50 % of heads · stands for 2.5 tokens");
  const one = replay([{ ...started, shown: 1, images: 1 }, first]);
  assert.equal(hoverText(one, 1, { layer: 0, head: 0 }), "row 1, column 2 · kept");
});

test("a page that comes in the middle tells what it can, and everything once the run has ended", () => {
  const late = reduce(EMPTY, second);
  assert.ok(late.partial);
  assert.equal(held(late).length, 0);
  assert.match(statusText(late), /^row 2\/3 · 12 tok\/s · cache 1 of 3 lines/);
  assert.equal(keptText(late, 1), "");
  assert.ok(!replay([started, first, second, finished]).partial);
});

test("a new run, and news of an old one", () => {
  const state = replay([started, first, { ...started, run: "b" }]);
  assert.equal(state.lines.length, 0);
  assert.equal(reduce(state, finished), state);
  assert.ok(replay([started, first, { ...finished, rows: 2 }]).stopped);
  assert.equal(reduce(EMPTY, { kind: "stopped" }), EMPTY);
  assert.equal(reduce(state, { kind: "from a later version" }), state);
});

test("what −1 stands for: the model's own, of those that are left to it", () => {
  const own = { guidance: 7.5, temperature: 1, top_k: 0, top_p: 0.9 };
  const left = { seed: 3, guidance: -1, temperature: -1, top_k: -1, top_p: -1, guidance_interval: -1 };
  assert.equal(ownText(left, own), "−1 is the model's own: guidance 7.5 · temperature 1 · top_k all · top_p 0.9");
  assert.equal(ownText({ ...left, guidance: 0, top_p: 1 }, { ...own, top_k: 2000 }), "−1 is the model's own: temperature 1 · top_k 2000");
  assert.equal(ownText(left, undefined), "−1 is the model's own");
  assert.equal(ownText({ guidance: 4, guidance_interval: -1 }, own), "");
  assert.equal(ownText({}, undefined), "");
});

test("lines to keep travel as text", () => {
  const state = replay([started, first, second]);
  const text = keptText(state, 2);
  assert.equal(text, "2x2x3:" + b16(0, 1, 2, 1, 2, 3, 10, 11, 300, 11, 12, 300));
  assert.equal(keptRows(text), 2);
  assert.equal(keptRows(""), 0);
  assert.equal(keptText(state, 3), "");
  const of = keptText(replay([{ ...started, codebook: "0123456789abcdef" }, first, second]), 2);
  assert.equal(of, `${text}:0123456789abcdef`);
  assert.equal(keptRows(of), 2);
});

// Scales of 1, 4 and 9 tokens, two layers of one head, one token kept: the second scale loses the first token in layer 0
// and two of its own, and one is folded. Tokens are 56 bits.
const big = (...numbers) => Buffer.from(BigUint64Array.from(numbers, BigInt).buffer).toString("base64");
const pyramid = { ...started, rows: 3, cols: 3, stride: 3, images: 1, shown: 1, columns: 1, lines: 3, sides: [[1, 1], [2, 2], [3, 3]], policy: "fold", release: "fold" };
const scale = (n, more) => row(n, { cols: n + 1, side: [n + 1, n + 1], lines: 3, tokens: big(...Array.from({ length: (n + 1) ** 2 }, (_, i) => 2 ** 50 + i)), ...more });
const coarse = scale(0, { cells: b16(0), shares: b64(255), evicted: "" });
const middle = scale(1, { cells: b16(0, 1, 2, 4), shares: b64(128, 255, 128, 255), evicted: b16(0, 3, 2, 3), merged: b16(4), stands: b16(8 * 2) });
const fine = scale(2, { seconds: 0.9 });

test("scales: what is held of each, over the picture, and in words", () => {
  const state = replay([pyramid, coarse, middle, fine]);
  assert.deepEqual([...held(state)], [128, 255, 128, 0, 255, ...Array(9).fill(0)]);
  assert.deepEqual([...held(state, { layer: 0, head: 0 })].slice(0, 6), [0, 255, 255, 0, 255, 0]);
  assert.deepEqual([...held(state, { row: 0 })].slice(0, 3), [255, 0, 0]);
  const counts = heldOfScales(state.run, held(state));
  assert.deepEqual(counts.map((count) => count.toFixed(2)), ["0.50", "2.50", "0.00"]);
  const places = [...remembered(state.run, held(state))];
  assert.equal(places[0], Math.round((counts[0] * 128 + counts[1] * 255) / 3.004), "the scales count by what is held of them");
  assert.equal(places[6], Math.round((counts[0] * 128) / 3.004));
  assert.deepEqual([...evictedAfter(state)].slice(0, 6), [-1, -1, -1, 1, -1, 2]);
  assert.equal(hoverText(state, 1), "scale 2 of 3: 3 of 4 tokens · row 1, column 1 · kept by all heads");
  assert.equal(hoverText(state, 3), "scale 2 of 3: 3 of 4 tokens · row 2, column 1 · evicted after scale 2");
  assert.equal(hoverText(state, 4), "scale 2 of 3: 3 of 4 tokens · row 2, column 2 · kept by all heads · stands for 2 tokens");
  assert.equal(hoverText(state, 8), "scale 3 of 3, 3 × 3 · drawn and never kept");
  assert.equal(hoverText(state, 2, { row: 0 }), "scale 2 of 3, 2 × 2 · not drawn yet");
  assert.equal(statusText(replay([pyramid, coarse, middle])), "scale 2/3 · 12 tok/s · cache 3 of 5 tokens · 5.1 MiB of 24.3 · ETA 2 s");
  assert.match(statusText(replay([{ ...pyramid, lines: 5, cache_bytes: pyramid.full_bytes }, coarse])), /^scale 1\/3 · 12 tok\/s · full cache · 24\.3 MiB/);
  const without = { ...pyramid, lines: 5, state_bytes: 3 * MIB, cache_bytes: 3 * MIB, full_bytes: 3 * MIB };
  assert.match(statusText(replay([without, coarse])), /^scale 1\/3 · 12 tok\/s · no cache: a state of 3\.0 MiB/);
  assert.equal(hoverText(replay([without, coarse]), 0), "scale 1 of 3, 1 × 1 · no cache, so no token is held: a state joins the scales");
});

test("scales to keep travel as text, 8 bytes a token where they need it", () => {
  const state = replay([pyramid, coarse, middle, fine]);
  assert.deepEqual(state.lines[1].tokens, BigUint64Array.from([0, 1, 2, 3], (i) => 2n ** 50n + BigInt(i)));
  const text = keptText(state, 2);
  assert.equal(text, `1x5:${big(2 ** 50, 2 ** 50, 2 ** 50 + 1, 2 ** 50 + 2, 2 ** 50 + 3)}`);
  assert.equal(keptRows(text), 5);
  assert.equal(keptRun(`1@99|${text}`), 1);
  const small = replay([{ ...pyramid, images: 2 }, scale(0, { tokens: b16(7, 9) }), scale(1, { tokens: b16(1, 2, 3, 4, 5, 6, 7, 8) })]);
  assert.equal(keptText(small, 2), `2x5:${b16(7, 1, 2, 3, 4, 9, 5, 6, 7, 8)}`);
});

test("a page that comes in the middle of scales says so, and no nonsense", () => {
  const late = reduce(EMPTY, middle);
  assert.ok(late.partial);
  assert.equal(statusText(late), "scale 2/3 · 12 tok/s · cache 3 tokens · 5.1 MiB of 24.3");
});

/** The events of one of a node's runs, for an entry of a list. */
const entry = (index, ...more) => [{ ...started, run: `r${index}`, list_index: index, seed: 7 + index }, ...[first, second, ...more].map((event) => ({ ...event, run: `r${index}` }))];

test("a node that runs for each entry of a list: every run is kept, live and afterwards", () => {
  const events = [...entry(0, finished), ...entry(1, finished), ...entry(2)];
  const live = events.reduce(reduceRuns, []);
  assert.deepEqual(live.map((state) => [state.run.run, state.lines.length, !!state.finished]), [["r0", 2, true], ["r1", 2, true], ["r2", 2, false]]);
  assert.deepEqual(replayRuns(events), live);
  assert.deepEqual(replayRuns(entry(0)), [replay(entry(0))]);
  const parts = [...entry(0), ...entry(1), { ...started, run: "second part", list_index: 1 }].reduce(reduceRuns, []);
  assert.deepEqual(parts.map((state) => state.run.run), ["r0", "second part"], "a run in parts starts again with each");
  assert.deepEqual(reduceRuns(live, { ...started, run: "next prompt" }).map((state) => state.run.run), ["next prompt"]);
  const { list_index: _, ...before } = started; // as earlier versions tell it
  assert.deepEqual(reduceRuns(live, before).map((state) => state.run.run), ["a"]);
  assert.ok(reduceRuns(live, { kind: "stopped" })[2].stopped && !reduceRuns(live, { kind: "stopped" })[1].stopped);
  assert.deepEqual(reduceRuns([], { kind: "stopped" }).length, 1);
});

test("codes of a codebook with more than 65,536", () => {
  const codes = Uint32Array.of(131071, 2, 3, 4, 65536, 6); // two images of three columns
  const row = { ...first, tokens: Buffer.from(codes.buffer).toString("base64") };
  const state = replay([started, row]);
  assert.deepEqual(state.lines[0].tokens, codes);
  assert.equal(keptText(state, 1), `2x1x3:${row.tokens}`);
});

test("lines to keep of one of several runs: the others stay as they are, with their own seeds", () => {
  const runs = [...entry(0, finished), ...entry(1, finished), ...entry(2)].reduce(reduceRuns, []);
  const text = keptTextOfRuns(runs, 1, 1, 99, false);
  assert.deepEqual(text.split(";").map((part) => part.split(":")[0]), ["1@99|2x1x3", "0@7|2x2x3", "2@9|2x2x3"]);
  assert.equal(keptRun(text), 1);
  assert.equal(keptRows(text), 1);
  assert.equal(keptTextOfRuns([runs[1]], 0, 2, 99, false), keptText(runs[1], 2), "of one run nothing else is said");
  assert.equal(keptRun(keptText(runs[1], 2)), -1);
  assert.equal(keptTextOfRuns([runs[0]], 0, 2, 99, true), `0@99|${keptText(runs[0], 2)}`, "unless its seed is not the node's to set");
  assert.equal(keptTextOfRuns(runs, 1, 3, 99, false), "");
  const listed = keptTextOfRuns([runs[0]], 0, 2, "18446744073709551615,3", true);
  assert.equal(listed, `0@18446744073709551615,3|${keptText(runs[0], 2)}`, "a seed for each picture, to the last digit");
  assert.equal(keptRows(listed), 2);
  assert.match(keptTextOfRuns([runs[0]], 0, 1, 2 ** 64 - 2 ** 11, true), /^0@18446744073709549568[|]/);
  assert.match(keptTextOfRuns([runs[0]], 0, 1, 2 ** 64, true), /^0@18446744073709551615[|]/);
});

test("cells that a mask keeps are known, and named", () => {
  const bits = b64(0b11011111, 0xff, 0b11); // of two pictures of 3 x 3, all but cell 5
  const state = replay([{ ...started, kept: bits }, first]);
  assert.deepEqual(keptCells(state).flatMap((kept, cell) => (kept ? [] : [cell])), [5]);
  assert.match(hoverText(state, 0), /outside the mask/);
  assert.equal(keptCells(replay([started, first])), null);
});

test("two models that draw one picture in turn", () => {
  const grid = { rows: 5, cols: 6, stride: 6, scales: [1, 30, 36] };
  const tokens = [1, 4, 9, 16, 36];
  assert.deepEqual([0, 1, 4, 9].map((count) => draftedGrid(grid, tokens, count).scales), [[1, 30, 9], [1, 30, 1], [1, 30, 16], [1, 30, 36]]);
  assert.deepEqual(draftedGrid(grid, [1, 4, 9], 1), grid, "of another size nothing is known");
  const [full, half, few] = [{ policy: "full", budget: 4 }, { policy: "fold", budget: 4, share: 0.5 }, { policy: "fold", budget: 2 }];
  assert.equal(leastPlan([full, half, few]), few);
  assert.equal(leastPlan([half, full]), half);
});

test("memory before anything runs", () => {
  const shape = { layers: 6, heads: 6, head_dim: 32, prompt: 1, bytes_per_element: 4 };
  const full = cacheBytes(shape, { rows: 24, stride: 24 }, { policy: "full", budget: 4 }, 2);
  assert.equal(full, 2 * 6 * 2 * 6 * 32 * 577 * 4);
  const few = cacheBytes(shape, { rows: 24, stride: 24 }, { policy: "line", budget: 4 }, 2);
  assert.deepEqual(memoryText(few, full, 0, null, 4), { text: "KV cache 2.1 MiB of 10.1 MiB, −79 %", fits: true, share: few / full });
  assert.match(memoryText(few, full, 0, 5, 5).text, / · room for 5 pictures at once$/);
  assert.match(memoryText(few, full, 0, 1, 1).text, / · room for one picture at once$/);
  assert.match(memoryText(few, full, 0, 512, 1).text, / · room for 512 pictures or more at once$/);
  const tight = memoryText(few, full, 0, 3, 4);
  assert.ok(!tight.fits && tight.text.endsWith("room for 3 of 4 pictures at once"));
  assert.match(memoryText(few, full, 0, 0, 4).text, /too little memory is free for one picture$/);
  assert.equal(picturesThatFit(100, (sequences) => 10 * sequences), 5);
  assert.equal(picturesThatFit(100, (sequences) => 10 * sequences, 1), 10);
  assert.equal(picturesThatFit(5, (sequences) => 10 * sequences), 0);
  const square = { rows: 64, cols: 64, stride: 65 };
  assert.deepEqual(gridOf(square, "832 x 1216"), { rows: 76, cols: 52, stride: 53 });
  assert.deepEqual(gridOf({ ...square, pixels: 8 }, "512 x 768"), { rows: 96, cols: 64, stride: 65 });
  assert.deepEqual(gridOf(square, undefined), square);
  assert.match(memoryText(few, full, 7.1e9, null, 1).text, /−79 % · weights 7.10 GB$/);
  assert.equal(memoryText(full, full, 0, null, 1).text, "KV cache 10.1 MiB, everything kept");
  assert.deepEqual(memoryText(full, full, 0, 3, 1, [], 512, true), { text: "no cache: a state of 10.1 MiB · room for 3 pictures at once", fits: true, share: 0 });
  assert.match(memoryText(few, full, 0, 9, 1, ["batch_size"]).text, /^KV cache 2.1 MiB of 10.1 MiB a picture, −79 % · batch_size unknown until it runs · room for 9 pictures at once$/);
  assert.equal(memoryText(full, full, 0, null, 1, ["text", "batch_size"]).text, "KV cache 10.1 MiB a picture, everything kept · text and batch_size unknown until it runs");
});

test("the module is pure: it imports nothing and touches no page", () => {
  for (const name of ["state.js", "draw.js"]) {
    const text = readFileSync(new URL(`../../web/${name}`, import.meta.url), "utf8");
    assert.ok(text.startsWith("// @ts-check"));
    assert.doesNotMatch(text, /^import|\b(window|document|globalThis|app|fetch)\./m);
  }
});
