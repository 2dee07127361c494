// web/draw.js: what is painted where, on a context that only writes down what it is asked.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { CIVIDIS, cellAt, cellOfScales, colour, draw, drawScales, layout, layoutScales, pictureAt, scaleOfCell } from "../../web/draw.js";

const theme = { background: "#111", foreground: "#eee", muted: "#999", border: "#444" };
const run = { rows: 4, cols: 4, shown: 1, columns: 1 };

class Paper {
  asked = [];
  fillStyle = "";
  fillRect(...box) { this.asked.push({ fill: this.fillStyle, box }); }
  strokeRect(...box) { this.asked.push({ stroke: this.strokeStyle, box }); }
  drawImage(...args) { this.asked.push({ image: args }); }
  fillText(text, x) { this.asked.push({ text, x }); }
  measureText(text) { return { width: text.length * 5 }; }
  beginPath() {}
  moveTo() {}
  lineTo() {}
  fill() { this.asked.push({ arrow: this.fillStyle }); }
  stroke() { this.asked.push({ line: this.strokeStyle }); }
  setLineDash() {}
  fills(colour) { return this.asked.filter((a) => a.fill === colour); }
}

const paint = (what) => {
  const paper = new Paper();
  const at = layout(200, 220, run);
  draw(paper, { at, theme, mode: "kept", held: new Uint8Array(16), done: 4, drawn: 4, running: false, picture: null, ...what });
  return { paper, at };
};
const rgb = (share) => `rgb(${colour(share).join(" ")})`;

test("the ramp is the heatmap's", () => {
  const text = readFileSync(new URL("../../linear_core/pictures/heatmap.py", import.meta.url), "utf8");
  const table = /_CIVIDIS = torch\.tensor\(\[(.*?)\]\)/s.exec(text)[1];
  const numbers = [...table.matchAll(/\[([^\]]+)\]/g)].map((m) => m[1].split(",").map(Number));
  assert.deepEqual(CIVIDIS, numbers);
});

test("the ramp grows lighter from end to end, so it reads in grey", () => {
  const light = Array.from({ length: 256 }, (_, i) => colour(i / 255)).map(([r, g, b]) => 0.2126 * r + 0.7152 * g + 0.0722 * b);
  assert.ok(light.every((l, i) => i === 0 || l > light[i - 1] - 1));
  assert.ok(light[255] - light[0] > 150);
  assert.deepEqual(colour(-1), colour(0));
  assert.deepEqual(colour(2), colour(1));
});

test("grids are square-celled, inside, apart, and every point finds its cell", () => {
  for (const [width, height, shown, columns, rows, cols] of [[300, 300, 1, 1, 24, 24], [180, 420, 4, 2, 24, 24], [600, 200, 3, 2, 16, 32], [60, 60, 1, 1, 64, 64]]) {
    const at = layout(width, height, { rows, cols, shown, columns });
    assert.equal(at.boxes.length, shown);
    for (const [image, box] of at.boxes.entries()) {
      assert.ok(box.x >= 0 && box.y >= 0 && box.x + box.width + at.bar <= width + 1, JSON.stringify([width, box]));
      assert.ok(Math.abs(box.width / cols - box.height / rows) < 1e-9);
      for (const [row, col] of [[0, 0], [rows - 1, cols - 1], [rows >> 1, cols >> 1]]) {
        const cell = cellAt(at, box.x + (col + 0.5) * box.cell, box.y + (row + 0.5) * box.cell);
        assert.equal(cell, (image * rows + row) * cols + col);
      }
      assert.equal(cellAt(at, box.x - 2, box.y), -1);
    }
  }
});

test("kept: each cell in the colour of its share, none below the lines there are", () => {
  const held = Uint8Array.from({ length: 16 }, (_, i) => (i === 5 ? 255 : 0));
  const { paper, at } = paint({ held, done: 2 });
  const box = at.boxes[0];
  const bright = paper.fills(rgb(1)).filter((a) => a.box[2] > box.cell / 2);
  assert.deepEqual(bright.map((a) => a.box.slice(0, 2)), [[box.x + box.cell, box.y + box.cell]]);
  const dark = paper.fills(rgb(0)).filter((a) => a.box[2] > box.cell / 2);
  assert.equal(dark.length, 7);
  assert.ok(dark.every((a) => a.box[1] < box.y + 2 * box.cell));
});

test("both: evicted cells are dimmed, kept ones are lit, the picture is below", () => {
  const held = new Uint8Array(16).fill(255, 4, 8);
  const { paper } = paint({ mode: "both", held, done: 2, drawn: 2, picture: {}, size: { width: 96, height: 96 } });
  const order = paper.asked.findIndex((a) => a.image);
  const dims = paper.fills("rgb(8 12 24 / 0.700)");
  assert.equal(dims.length, 4);
  assert.equal(paper.asked.filter((a) => a.fill?.endsWith("/ 0.220)")).length, 4);
  assert.ok(order >= 0 && paper.asked.indexOf(dims[0]) > order);
});

test("image: only the lines there were, cut out of the sheet, whole pixels", () => {
  const sheet = { ...run, shown: 4, columns: 2 };
  const paper = new Paper();
  const at = layout(400, 400, sheet);
  draw(paper, { at, theme, mode: "image", held: new Uint8Array(64), done: 2, drawn: 3, running: false, picture: {}, size: { width: 200, height: 200 } });
  const parts = paper.asked.filter((a) => a.image).map((a) => a.image.slice(1, 5));
  assert.deepEqual(parts, [[0, 0, 100, 50], [100, 0, 100, 50], [0, 100, 100, 50], [100, 100, 100, 50]]);
  assert.equal(paper.imageSmoothingEnabled, false);
  assert.equal(paper.asked.filter((a) => a.text).length, 0, "no legend where nothing is coloured");
});

test("the line being written is marked, and only while it is", () => {
  const marks = (paper) => paper.asked.filter((a) => a.arrow).length;
  assert.equal(marks(paint({ done: 2, running: true }).paper), 1);
  assert.equal(marks(paint({ done: 2, running: false }).paper), 0);
  assert.equal(marks(paint({ done: 4, running: true }).paper), 0);
});

test("bars say how much of each line is left", () => {
  const held = new Uint8Array(16).fill(255, 0, 4).fill(255, 4, 6);
  const { paper, at } = paint({ held, mode: "image" });
  const box = at.boxes[0];
  const bars = paper.asked.filter((a) => a.fill && a.box[0] === box.x + box.width + 4 && a.box[2] > 1.2).map((a) => a.box[2]);
  assert.equal(bars.length, 2);
  assert.ok(Math.abs(bars[0] - 2 * bars[1]) < 1e-9);
});

test("the legend stays on the paper, below the grid where there is room", () => {
  const words = (width, height) => {
    const paper = new Paper();
    draw(paper, { at: layout(width, height, run), theme, mode: "kept", held: new Uint8Array(16), done: 4, drawn: 4, running: false, picture: null });
    return paper.asked.filter((a) => a.text);
  };
  for (const [width, height] of [[190, 200], [160, 200], [190, 80], [400, 120], [300, 300]]) {
    const [evicted, held] = words(width, height);
    assert.ok(evicted.x >= 0 && held.x + 5 * held.text.length <= width, JSON.stringify([width, height, evicted, held]));
    assert.ok(held.x - evicted.x >= 5 * evicted.text.length + 12 + 16, "the ramp is between them");
  }
  assert.equal(words(400, 300)[0].x, layout(400, 300, run).boxes[0].x);
});

test("what a mask keeps is hatched, and a line goes around the rest", () => {
  const kept = Array.from({ length: 16 }, (_, cell) => ![5, 6].includes(cell)); // two cells in the middle
  const strokes = [];
  class Pen extends Paper {
    moveTo(x, y) { this.from = [x, y]; }
    lineTo(x, y) { strokes.push([...this.from, x, y]); }
  }
  const at = layout(200, 220, run);
  const drawn = (done) => draw(new Pen(), { at, theme, mode: "image", held: new Uint8Array(0), done, drawn: 4, running: false, picture: null, kept });
  drawn(3);
  const [{ x, y, cell }] = at.boxes;
  const has = (...line) => strokes.some((each) => each.every((n, i) => Math.abs(n - line[i]) < 1e-9));
  assert.ok(has(x, y + cell, x + cell, y), "the first cell is hatched");
  assert.ok(!has(x + cell, y + 2 * cell, x + 2 * cell, y + cell), "the region is not");
  for (const edge of [[1, 1, 1, 2], [3, 1, 3, 2], [1, 1, 2, 1], [2, 2, 3, 2]]) assert.ok(has(...edge.map((n, i) => (i % 2 ? y : x) + n * cell)), String(edge));
  assert.ok(!has(x + 2 * cell, y + cell, x + 2 * cell, y + 2 * cell), "nothing within it");
  strokes.length = 0;
  drawn(4);
  assert.ok(!has(x, y + cell, x + cell, y), "a finished picture is not hatched");
  assert.ok(has(x + cell, y + cell, x + cell, y + 2 * cell), "but the region has its line");
});

test("hover and the cut are drawn on top", () => {
  const { paper, at } = paint({ hover: 6, cut: 2 });
  const [cell] = paper.asked.filter((a) => a.stroke === "#fff");
  assert.deepEqual(cell.box.slice(0, 2), [at.boxes[0].x + 2 * at.boxes[0].cell, at.boxes[0].y + at.boxes[0].cell]);
  assert.equal(paper.asked.filter((a) => a.line === "#fff").length, 1);
});

test("an image of which nothing is known is a picture and no more", () => {
  const { paper } = paint({ held: new Uint8Array(0), mode: "kept" });
  assert.equal(paper.asked.filter((a) => a.fill && a.fill.startsWith("rgb") && a.box[2] > 10).length, 0);
});

const sides = [1, 2, 3, 4, 5, 6, 8, 10, 12].map((side) => [side, side]);

test("scales: maps and pictures are inside and apart at every width, and every point finds its cell", () => {
  const wide = [1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64].map((side) => [side, 2 * side]);
  for (const [width, height] of [[190, 200], [190, 300], [280, 220], [420, 400], [120, 120]])
    for (const run of [{ sides, shown: 1, columns: 1 }, { sides: wide, shown: 4, columns: 2 }, { sides: [[1, 1]], shown: 1, columns: 1 }])
      for (const mode of ["image", "kept", "both"]) {
        const at = layoutScales(width, height, run, mode);
        const all = [...at.boxes, ...at.maps];
        const said = JSON.stringify([width, height, mode, all]);
        assert.equal(at.maps.length, run.sides.length);
        assert.equal(at.boxes.length, mode === "kept" ? 0 : run.shown);
        assert.ok(all.every((box) => box.x >= 0 && box.y >= 0 && box.x + box.width <= width + 1 && box.y + box.height <= height), said);
        for (const [i, a] of all.entries()) for (const b of all.slice(i + 1)) assert.ok(a.x + a.width <= b.x || b.x + b.width <= a.x || a.y + a.height <= b.y || b.y + b.height <= a.y, said);
        for (const map of at.maps) {
          const cell = cellOfScales(at, map.x + map.width - 0.001, map.y + map.height - 0.001);
          assert.equal(cell, map.first + map.rows * map.cols - 1);
          assert.equal(scaleOfCell(at, cell), at.maps.indexOf(map));
        }
        for (const [i, box] of at.boxes.entries()) assert.equal(pictureAt(at, box.x + 1, box.y + 1), i);
        assert.equal(cellOfScales(at, -1, -1), -1);
      }
  assert.equal(cellOfScales(layoutScales(420, 400, { sides, shown: 2, columns: 2 }, "both", 1), -5, 0), -1);
});

const scales = (what) => {
  const paper = new Paper();
  const run = { sides: sides.slice(0, 3), shown: 1, columns: 1 };
  const at = layoutScales(300, 300, run, what.mode ?? "both");
  const held = Uint8Array.from({ length: 14 }, (_, i) => (i < 5 ? 255 * (i % 2) : 0));
  drawScales(paper, { at, theme, mode: "both", held, counts: [0, 2, 0], over: [new Uint8Array(9).fill(255, 0, 3)], done: 2, running: false, picture: null, ...what });
  return { paper, at, texts: paper.asked.filter((a) => a.text).map((a) => a.text) };
};

test("scales: the tokens held stand below each map, the last is never kept, and what is not drawn yet is empty", () => {
  assert.deepEqual(scales({}).texts.slice(0, 3), ["0", "2", "–"]);
  assert.deepEqual(scales({ mode: "kept" }).texts.slice(0, 3), ["1²: 0 of 1", "2²: 2 of 4", "3², never kept"]);
  const { paper, at, texts } = scales({ done: 1, mode: "kept" });
  assert.equal(texts[1], "2²");
  const cells = paper.asked.filter((a) => a.fill?.startsWith("rgb(") && a.box[1] >= at.maps[1].y && a.box[0] >= at.maps[1].x && a.box[0] < at.maps[1].x + at.maps[1].width);
  assert.equal(cells.length, 0);
  assert.equal(scales({ held: new Uint8Array(0), counts: [] }).texts[0], "1²", "of which nothing is known");
});

test("scales: the one being drawn is outlined, and what is drawn anew is dimmed behind a dashed line", () => {
  const bright = rgb(1);
  assert.equal(scales({ running: true }).paper.asked.filter((a) => a.stroke === bright).length, 1);
  assert.equal(scales({}).paper.asked.filter((a) => a.stroke === bright).length, 0);
  const { paper } = scales({ cut: 1 });
  assert.equal(paper.fills("rgb(0 0 0 / 0.55)").length, 2);
  assert.equal(paper.asked.filter((a) => a.line === "#fff").length, 1);
});

test("scales: places that are remembered are lit, the others dimmed, and sketches are smooth", () => {
  const what = { picture: {}, size: { width: 96, height: 96 } };
  const { paper } = scales(what);
  assert.equal(paper.fills("rgb(8 12 24 / 0.600)").length, 6);
  assert.equal(paper.asked.filter((a) => a.fill?.endsWith("/ 0.200)")).length, 3);
  assert.equal(paper.imageSmoothingEnabled, false);
  assert.equal(scales({ ...what, final: false }).paper.imageSmoothingEnabled, true);
  assert.equal(scales({ ...what, mode: "image" }).paper.fills("rgb(8 12 24 / 0.600)").length, 0);
});
