// @ts-check
/**
 * How the widget looks: state and a picture onto a 2d context. Pure; no page, no clock.
 *
 * Each image of the preview is a grid of cells. In "kept" a cell's colour is the share of layers and heads that hold
 * it; in "both" the picture is lit where it is held and dimmed where it was evicted. Beside each grid a bar for every
 * line says how much of that line is left.
 *
 * A picture drawn in scales has a small map of each below it, coarse to fine, with the number of tokens held; in "kept"
 * the maps are all there is.
 */

/** Cividis, nine points: linear_core/pictures/heatmap.py has the same, and a test holds the two equal. */
export const CIVIDIS = [
  [0.000, 0.135, 0.304], [0.000, 0.213, 0.430], [0.207, 0.289, 0.420], [0.348, 0.367, 0.425], [0.476, 0.448, 0.445],
  [0.607, 0.530, 0.438], [0.747, 0.620, 0.406], [0.889, 0.717, 0.338], [0.996, 0.909, 0.217],
];

/**
 * @typedef {{ background: string, foreground: string, muted: string, border: string }} Theme
 * @typedef {{ x: number, y: number, width: number, height: number, cell: number }} Box  one image's grid
 * @typedef {{ x: number, y: number, width: number, height: number, rows: number, cols: number, first: number }} Map  one scale's
 * @typedef {{ boxes: Box[], maps: Map[], columns: number, cells: number, image: number, large: boolean, legend: Layout["legend"] }} ScalesLayout
 * @typedef {{ boxes: Box[], columns: number, rows: number, cols: number, bar: number, legend: { x: number, y: number, right: number, height: number } | null }} Layout
 */

/** @param {number} value 0 to 1 @returns {[number, number, number]} 0 to 255 */
export function colour(value) {
  const place = Math.min(1, Math.max(0, value)) * (CIVIDIS.length - 1);
  const low = Math.min(CIVIDIS.length - 2, Math.floor(place));
  const at = (/** @type {number} */ i) => Math.round((CIVIDIS[low][i] + (CIVIDIS[low + 1][i] - CIVIDIS[low][i]) * (place - low)) * 255);
  return [at(0), at(1), at(2)];
}

const RAMP = Array.from({ length: 256 }, (_, i) => colour(i / 255));

const GAP = 10;
const LEGEND = 20; // pixels below the grids for the legend

/**
 * Where everything goes.
 * @param {number} width @param {number} height @param {{ rows: number, cols: number, shown: number, columns: number }} run
 * @param {boolean} legend @returns {Layout}
 */
export function layout(width, height, run, legend = true) {
  const { rows, cols } = run;
  const shown = Math.max(1, run.shown);
  const columns = Math.min(Math.max(1, run.columns), shown);
  const lines = Math.ceil(shown / columns);
  const bar = Math.max(6, Math.min(22, width * 0.05)); // the bars that say how much of each line is left
  const room = { width: width / columns - bar - GAP, height: (height - (legend ? LEGEND : 0)) / lines - GAP };
  const fits = Math.max(0.25, Math.min(room.width / cols, room.height / rows));
  const cell = fits > 6 ? Math.floor(fits) : fits; // whole pixels leave no seams
  const size = { width: cell * cols, height: cell * rows };
  const all = { width: columns * (size.width + bar + GAP) - GAP / 2, height: lines * (size.height + GAP) - GAP };
  const left = Math.round((width - all.width) / 2);
  const top = Math.round(Math.max(1, (height - (legend ? LEGEND : 0) - all.height) / 2));
  const boxes = Array.from({ length: shown }, (_, i) => ({
    x: left + (i % columns) * (size.width + bar + GAP),
    y: top + Math.floor(i / columns) * (size.height + GAP),
    ...size,
    cell,
  }));
  const foot = { x: left, y: height - LEGEND + 6, right: width, height: 8 };
  return { boxes, columns, rows, cols, bar, legend: legend ? foot : null };
}

/** The cell at a point, counted over all images; -1 beside them. @param {Layout} at @param {number} x @param {number} y */
export function cellAt(at, x, y) {
  for (let image = 0; image < at.boxes.length; image++) {
    const box = at.boxes[image];
    const col = Math.floor((x - box.x) / box.cell);
    const row = Math.floor((y - box.y) / box.cell);
    if (col >= 0 && col < at.cols && row >= 0 && row < at.rows) return (image * at.rows + row) * at.cols + col;
  }
  return -1;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {object} what
 * @param {Layout} what.at
 * @param {Theme} what.theme
 * @param {"image" | "kept" | "both"} what.mode
 * @param {Uint8Array} what.held     share held of each cell; shorter than the grids where nothing is known of the rest
 * @param {number} what.done         lines there are at the moment looked at
 * @param {number} what.drawn        lines the picture shows
 * @param {boolean} what.running     the line after them is being written
 * @param {CanvasImageSource | null} what.picture  the preview, all images of it, empty below `drawn`
 * @param {{ width: number, height: number }} [what.size]  of the picture, in its own pixels
 * @param {number} [what.hover]      cell under the pointer; -1 none
 * @param {number} [what.cut]        first line to be drawn anew; -1 none
 * @param {boolean[] | null} [what.kept]  cells that a mask keeps
 */
export function draw(ctx, { at, theme, mode, held, done, drawn, running, picture, size, hover = -1, cut = -1, kept = null }) {
  const { boxes, columns, rows, cols } = at;
  const lines = Math.ceil(boxes.length / columns);
  boxes.forEach((box, image) => {
    ctx.fillStyle = theme.background;
    ctx.fillRect(box.x, box.y, box.width, box.height);
    const seen = Math.min(done, drawn); // of a replayed moment, only the lines there were
    if (mode !== "kept" && picture && size && seen > 0) {
      const [w, h] = [size.width / columns, size.height / lines];
      ctx.imageSmoothingEnabled = w > 2 * box.width; // whole pixels, unless there are far more than fit
      const [sx, sy] = [(image % columns) * w, Math.floor(image / columns) * h];
      ctx.drawImage(picture, sx, sy, w, (h * seen) / rows, box.x, box.y, box.width, box.cell * seen);
    }
    const known = held.length >= (image + 1) * rows * cols;
    if (mode !== "image" && known) cells(ctx, box, at, held, image, done, mode === "kept" ? 0 : drawn, mode === "kept" ? 1 : 0.5);
    if (kept) region(ctx, box, at, kept, image, mode !== "image" || running || done < rows);
    if (known) bars(ctx, box, at, held, image, done, theme);
    if (running && done < rows) scan(ctx, box, at, done, theme);
    if (cut >= 0) knife(ctx, box, at, cut, theme);
    ctx.strokeStyle = theme.border;
    ctx.lineWidth = 1;
    ctx.strokeRect(box.x - 0.5, box.y - 0.5, box.width + 1, box.height + 1);
  });
  if (hover >= 0) {
    const box = boxes[Math.floor(hover / (rows * cols))];
    const row = Math.floor((hover % (rows * cols)) / cols);
    outline(ctx, box.x + (hover % cols) * box.cell, box.y + row * box.cell, box.cell, box.cell);
  }
  if (at.legend && mode !== "image") legend(ctx, at.legend, theme);
}

/** @param {any} ctx @param {Box} box @param {Layout} at @param {Uint8Array} held @param {number} image @param {number} done @param {number} drawn lines below which there is no picture to light @param {number} alpha  there */
function cells(ctx, box, at, held, image, done, drawn, alpha) {
  const { rows, cols } = at;
  const inset = box.cell >= 7 ? 0.5 : 0; // a hairline between large cells
  for (let row = 0; row < Math.min(done, rows); row++) {
    for (let col = 0; col < cols; col++) {
      const share = held[(image * rows + row) * cols + col];
      const [x, y] = [box.x + col * box.cell, box.y + row * box.cell];
      const [r, g, b] = RAMP[share];
      if (row >= drawn) {
        ctx.fillStyle = alpha === 1 ? `rgb(${r} ${g} ${b})` : `rgb(${r} ${g} ${b} / ${alpha})`;
        ctx.fillRect(x, y, box.cell - inset, box.cell - inset);
      } else {
        const [w, h] = [box.cell, box.cell];
        const light = Math.sqrt(share / 255);
        ctx.fillStyle = `rgb(8 12 24 / ${(0.7 * (1 - light)).toFixed(3)})`; // dimmed where it is gone
        if (light < 1) ctx.fillRect(x, y, w, h);
        ctx.fillStyle = `rgb(${r} ${g} ${b} / ${(0.22 * light).toFixed(3)})`; // lit where it is kept
        if (share) ctx.fillRect(x, y, w, h);
      }
    }
  }
}

/** A line goes around what a mask leaves to draw; what it keeps is hatched, but for a finished picture that is looked at.
 * @param {any} ctx @param {Box} box @param {Layout} at @param {boolean[]} kept @param {number} image @param {boolean} hatched */
function region(ctx, box, at, kept, image, hatched) {
  const { rows, cols } = at;
  const of = (/** @type {number} */ row, /** @type {number} */ col) => kept[(image * rows + row) * cols + col];
  const paths = { hatch: /** @type {number[][]} */ ([]), edge: /** @type {number[][]} */ ([]) };
  for (let row = 0; row < rows; row++)
    for (let col = 0; col < cols; col++) {
      const [x, y, c] = [box.x + col * box.cell, box.y + row * box.cell, box.cell];
      if (of(row, col)) paths.hatch.push([x, y + c, x + c, y]);
      if (col + 1 < cols && of(row, col) !== of(row, col + 1)) paths.edge.push([x + c, y, x + c, y + c]);
      if (row + 1 < rows && of(row, col) !== of(row + 1, col)) paths.edge.push([x, y + c, x + c, y + c]);
    }
  const stroke = (/** @type {number[][]} */ lines, /** @type {string} */ style, /** @type {number} */ width) => {
    ctx.strokeStyle = style;
    ctx.lineWidth = width;
    ctx.beginPath();
    for (const [x1, y1, x2, y2] of lines) {
      ctx.moveTo(x1, y1);
      ctx.lineTo(x2, y2);
    }
    ctx.stroke();
  };
  if (hatched) {
    stroke(paths.hatch, "rgb(0 0 0 / 0.2)", 2.5); // to be seen on snow, too
    stroke(paths.hatch, "rgb(255 255 255 / 0.35)", 1);
  }
  stroke(paths.edge, "#000", 3);
  stroke(paths.edge, "#fff", 1.5);
}

/** How much of each line is left. @param {any} ctx @param {Box} box @param {Layout} at @param {Uint8Array} held @param {number} image @param {number} done @param {Theme} theme */
function bars(ctx, box, at, held, image, done, theme) {
  const { rows, cols, bar } = at;
  for (let row = 0; row < Math.min(done, rows); row++) {
    let sum = 0;
    for (let col = 0; col < cols; col++) sum += held[(image * rows + row) * cols + col];
    const share = sum / (255 * cols);
    const y = box.y + row * box.cell + box.cell * 0.18;
    ctx.fillStyle = theme.border;
    ctx.fillRect(box.x + box.width + 4, y + box.cell * 0.25, 1, box.cell * 0.15);
    const [r, g, b] = RAMP[Math.round(80 + 175 * share)];
    ctx.fillStyle = `rgb(${r} ${g} ${b})`;
    if (share > 0) ctx.fillRect(box.x + box.width + 4, y, Math.max(1.5, (bar - 2) * share), Math.max(1, box.cell * 0.64));
  }
}

/** The line being written. @param {any} ctx @param {Box} box @param {Layout} at @param {number} row @param {Theme} theme */
function scan(ctx, box, at, row, theme) {
  const y = box.y + row * box.cell;
  const [r, g, b] = RAMP[255];
  ctx.fillStyle = `rgb(${r} ${g} ${b} / 0.22)`;
  ctx.fillRect(box.x, y, box.width, box.cell);
  ctx.fillStyle = `rgb(${r} ${g} ${b})`;
  ctx.fillRect(box.x, y, box.width, Math.max(1.5, box.cell * 0.12));
  const size = Math.max(4, Math.min(9, box.cell * 0.7));
  const middle = y + box.cell / 2;
  ctx.fillStyle = theme.foreground;
  ctx.beginPath(); // an arrow head beside it
  ctx.moveTo(box.x + box.width + 4, middle);
  ctx.lineTo(box.x + box.width + 4 + size, middle - size * 0.6);
  ctx.lineTo(box.x + box.width + 4 + size, middle + size * 0.6);
  ctx.fill();
}

/** Where drawing anew would begin. @param {any} ctx @param {Box} box @param {Layout} at @param {number} row @param {Theme} theme */
function knife(ctx, box, at, row, theme) {
  const y = box.y + row * box.cell;
  ctx.fillStyle = "rgb(0 0 0 / 0.35)";
  ctx.fillRect(box.x, y, box.width, (at.rows - row) * box.cell);
  ctx.setLineDash([5, 3]);
  ctx.lineWidth = 2;
  ctx.strokeStyle = "#fff";
  ctx.beginPath();
  ctx.moveTo(box.x, y);
  ctx.lineTo(box.x + box.width, y);
  ctx.stroke();
  ctx.setLineDash([]);
}

/** White in black: seen on every picture. @param {any} ctx @param {number} x @param {number} y @param {number} w @param {number} h */
function outline(ctx, x, y, w, h) {
  ctx.lineWidth = 3;
  ctx.strokeStyle = "#000";
  ctx.strokeRect(x, y, w, h);
  ctx.lineWidth = 1.5;
  ctx.strokeStyle = "#fff";
  ctx.strokeRect(x, y, w, h);
}

/** From `x` on; further left, and with a shorter ramp, where that would end beyond `right`.
 * @param {any} ctx @param {{ x: number, y: number, right: number, height: number }} place @param {Theme} theme */
function legend(ctx, { x, y, right, height }, theme) {
  ctx.font = "10px sans-serif";
  ctx.textBaseline = "middle";
  ctx.fillStyle = theme.muted;
  const words = ["evicted", "held by all heads"];
  const [before, after] = words.map((word) => ctx.measureText(word).width);
  const width = Math.min(80, Math.max(16, right - before - after - 12));
  const left = Math.max(0, Math.min(x, right - before - width - after - 12));
  const start = left + before + 6;
  ctx.fillText(words[0], left, y + height / 2);
  const steps = 24;
  for (let i = 0; i < steps; i++) {
    const [r, g, b] = RAMP[Math.round((i * 255) / (steps - 1))];
    ctx.fillStyle = `rgb(${r} ${g} ${b})`;
    ctx.fillRect(start + (i * width) / steps, y, width / steps + 0.5, height);
  }
  ctx.fillStyle = theme.muted;
  ctx.fillText(words[1], start + width + 6, y + height / 2);
}

// -- scales -----------------------------------------------------------------------------------------------------------

const SPACE = 4; // between maps
const LABEL = 13; // pixels below a map for the number of tokens held
const LEAST = 20; // a map's width, if there is room for two rows of them

/**
 * Where everything goes, of a picture drawn in scales.
 * @param {number} width @param {number} height @param {{ sides: number[][], shown: number, columns: number }} run
 * @param {string} mode @param {number} image  whose maps are shown @returns {ScalesLayout}
 */
export function layoutScales(width, height, run, mode, image = 0) {
  const { sides } = run;
  const [rows, cols] = sides[sides.length - 1];
  const [tall, count, large] = [rows / cols, sides.length, mode === "kept"];
  const foot = mode === "image" ? 0 : LEGEND;
  const across = (/** @type {number} */ n) => (width - (n - 1) * SPACE) / n; // a map's width, n of them in a row
  let [per, wide] = [count, 0];
  if (large) {
    for (let n = 1; n <= count; n++) {
      const fits = Math.min(across(n), ((height - foot) / Math.ceil(count / n) - LABEL - SPACE) / tall);
      if (fits > wide) [per, wide] = [n, fits];
    }
  } else {
    if (across(count) < LEAST) per = Math.ceil(count / 2);
    wide = Math.min(across(per), 44, (height / 3 / Math.ceil(count / per) - LABEL - SPACE) / tall);
  }
  wide = Math.max(2, Math.floor(wide));
  const [high, lines] = [Math.max(2, Math.round(wide * tall)), Math.ceil(count / per)];
  const strip = lines * (high + LABEL + SPACE);
  const [left, top] = [Math.max(0, Math.round((width - per * (wide + SPACE) + SPACE) / 2)), height - foot - strip];
  let first = 0;
  const maps = sides.map(([rows, cols], i) => {
    const map = { x: left + (i % per) * (wide + SPACE), y: Math.max(1, top) + Math.floor(i / per) * (high + LABEL + SPACE), width: wide, height: high, rows, cols, first };
    first += rows * cols;
    return map;
  });
  if (large) maps.forEach((map) => { map.y -= Math.max(0, Math.floor(top / 2)); }); // in the middle
  const shown = Math.max(1, run.shown);
  const columns = Math.min(Math.max(1, run.columns), shown);
  const down = Math.ceil(shown / columns);
  const room = [(width - (columns - 1) * GAP) / columns - 2, (top - SPACE - (down - 1) * GAP) / down - 2];
  const size = Math.max(4, Math.floor(Math.min(room[0], room[1] / tall)));
  const box = { width: size, height: Math.round(size * tall), cell: size / cols };
  const start = [Math.round((width - columns * (box.width + GAP) + GAP) / 2), Math.max(1, Math.round((top - SPACE - down * (box.height + GAP) + GAP) / 2))];
  const boxes = large ? [] : Array.from({ length: shown }, (_, i) => ({ x: start[0] + (i % columns) * (box.width + GAP), y: start[1] + Math.floor(i / columns) * (box.height + GAP), ...box }));
  const legend = foot ? { x: left, y: height - LEGEND + 6, right: width, height: 8 } : null;
  return { boxes, maps, columns, cells: first, image, large, legend };
}

const inside = (/** @type {{ x: number, y: number, width: number, height: number }} */ box, /** @type {number} */ x, /** @type {number} */ y) =>
  x >= box.x && x < box.x + box.width && y >= box.y && y < box.y + box.height;

/** The cell at a point of a map, counted over all images; -1 beside them. @param {ScalesLayout} at @param {number} x @param {number} y */
export function cellOfScales(at, x, y) {
  const map = at.maps.find((map) => inside(map, x, y));
  if (!map) return -1;
  const [row, col] = [Math.floor(((y - map.y) * map.rows) / map.height), Math.floor(((x - map.x) * map.cols) / map.width)];
  return at.image * at.cells + map.first + row * map.cols + col;
}

/** The picture at a point; -1 beside them. @param {ScalesLayout} at @param {number} x @param {number} y */
export const pictureAt = (at, x, y) => at.boxes.findIndex((box) => inside(box, x, y));

/** The scale of a cell, or at a point. @param {ScalesLayout} at @param {number} cell */
export const scaleOfCell = (at, cell) => at.maps.filter((map) => map.first <= cell % at.cells).length - 1;

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {object} what
 * @param {ScalesLayout} what.at
 * @param {Theme} what.theme
 * @param {"image" | "kept" | "both"} what.mode
 * @param {Uint8Array} what.held      share held of each cell; shorter than the pictures where nothing is known of the rest
 * @param {number[]} what.counts      tokens held of each scale of the image whose maps are shown
 * @param {Uint8Array[]} what.over    of each image, which places are remembered
 * @param {number} what.done          scales there are at the moment looked at
 * @param {boolean} what.running      the scale after them is being drawn
 * @param {CanvasImageSource | null} what.picture  the preview, all images of it
 * @param {{ width: number, height: number }} [what.size]  of the picture, in its own pixels
 * @param {boolean} [what.final]      it is the finished picture
 * @param {number} [what.hover]       cell under the pointer; -1 none
 * @param {number} [what.cut]         first scale to be drawn anew; -1 none
 */
export function drawScales(ctx, { at, theme, mode, held, counts, over, done, running, picture, size, final = true, hover = -1, cut = -1 }) {
  const { boxes, maps, columns } = at;
  const lines = Math.ceil(boxes.length / columns);
  boxes.forEach((box, image) => {
    ctx.fillStyle = theme.background;
    ctx.fillRect(box.x, box.y, box.width, box.height);
    if (picture && size && done > 0) {
      const [w, h] = [size.width / columns, size.height / lines];
      ctx.imageSmoothingEnabled = !final || w > 2 * box.width; // a sketch is to look like one
      ctx.drawImage(picture, (image % columns) * w, Math.floor(image / columns) * h, w, h, box.x, box.y, box.width, box.height);
    }
    if (mode === "both" && over[image] && done > 0) places(ctx, box, maps[maps.length - 1], over[image], !!picture);
    ctx.strokeStyle = boxes.length > 1 && image === at.image ? theme.foreground : theme.border;
    ctx.lineWidth = 1;
    ctx.strokeRect(box.x - 0.5, box.y - 0.5, box.width + 1, box.height + 1);
  });
  const known = held.length >= (at.image + 1) * at.cells;
  ctx.textBaseline = "top";
  maps.forEach((map, i) => {
    const never = i === maps.length - 1;
    ctx.fillStyle = theme.background;
    ctx.fillRect(map.x, map.y, map.width, map.height);
    if (never) hatch(ctx, map, theme);
    else if (i < done && known) cellsOfMap(ctx, map, held, at.image * at.cells);
    if (cut >= 0 && i >= cut) {
      ctx.fillStyle = "rgb(0 0 0 / 0.55)";
      ctx.fillRect(map.x, map.y, map.width, map.height);
    }
    ctx.strokeStyle = running && i === done ? `rgb(${RAMP[255].join(" ")})` : theme.border;
    ctx.lineWidth = running && i === done ? 2 : 1;
    ctx.strokeRect(map.x - 0.5, map.y - 0.5, map.width + 1, map.height + 1);
    ctx.font = "10px system-ui, sans-serif";
    ctx.fillStyle = i < done ? theme.foreground : theme.muted;
    label(ctx, map, labels(at, map, i, never, i < done && known ? counts[i] : -1));
  });
  if (cut >= 0) edge(ctx, maps[cut]);
  if (hover >= 0 && Math.floor(hover / at.cells) === at.image) {
    const map = maps[scaleOfCell(at, hover)];
    const place = (hover % at.cells) - map.first;
    const [w, h] = [map.width / map.cols, map.height / map.rows];
    outline(ctx, map.x + (place % map.cols) * w, map.y + Math.floor(place / map.cols) * h, w, h);
  }
  if (at.legend && mode !== "image") legend(ctx, at.legend, theme);
}

/** What may stand below a map, the longest first. @param {ScalesLayout} at @param {Map} map @param {number} i
 * @param {boolean} never  it is the last, which nobody reads @param {number} count  tokens held; -1: not known */
function labels(at, map, i, never, count) {
  const side = map.rows === map.cols ? `${map.rows}²` : `${map.rows}×${map.cols}`;
  if (never) return at.large ? [`${side}, never kept`, "never kept", side, "–"] : ["–"];
  if (count < 0) return [side, ""];
  const held = Math.round(count);
  const all = map.rows * map.cols;
  return at.large ? [`${side}: ${held} of ${all}`, `${held} of ${all}`, `${held}/${all}`, String(held)] : [String(held)];
}

/** The longest that fits, in the middle below. @param {any} ctx @param {Map} map @param {string[]} texts */
function label(ctx, map, texts) {
  const text = texts.find((text) => ctx.measureText(text).width <= map.width + SPACE - 1) ?? texts[texts.length - 1];
  ctx.fillText(text, map.x + (map.width - ctx.measureText(text).width) / 2, map.y + map.height + 2);
}

/** A scale's cells; where they are smaller than a pixel, as many as there are pixels. @param {any} ctx @param {Map} map @param {Uint8Array} held @param {number} start */
function cellsOfMap(ctx, map, held, start) {
  const [across, down] = [Math.min(map.cols, map.width), Math.min(map.rows, map.height)];
  const [w, h] = [map.width / across, map.height / down];
  const gap = w >= 7 ? 0.5 : -0.25; // a hairline between large cells, and none between small ones
  for (let y = 0; y < down; y++)
    for (let x = 0; x < across; x++) {
      const [rows, cols] = [[y, down, map.rows], [x, across, map.cols]].map(([n, of, all]) => [Math.floor((n * all) / of), Math.floor(((n + 1) * all) / of)]);
      let sum = 0;
      for (let row = rows[0]; row < rows[1]; row++) for (let col = cols[0]; col < cols[1]; col++) sum += held[start + map.first + row * map.cols + col];
      const [r, g, b] = RAMP[Math.round(sum / ((rows[1] - rows[0]) * (cols[1] - cols[0])))];
      ctx.fillStyle = `rgb(${r} ${g} ${b})`;
      ctx.fillRect(map.x + x * w, map.y + y * h, w - gap, h - gap);
    }
}

/** Lights the places that are remembered best, and dims the others. @param {any} ctx @param {Box} box @param {Map} last @param {Uint8Array} over @param {boolean} picture */
function places(ctx, box, last, over, picture) {
  const most = Math.max(1, over.reduce((a, b) => Math.max(a, b), 0));
  const [w, h] = [box.width / last.cols, box.height / last.rows];
  over.forEach((share, i) => {
    const light = Math.sqrt(share / most);
    const [x, y] = [box.x + (i % last.cols) * w, box.y + Math.floor(i / last.cols) * h];
    const [r, g, b] = RAMP[Math.round((255 * share) / most)];
    ctx.fillStyle = picture ? `rgb(8 12 24 / ${(0.6 * (1 - light)).toFixed(3)})` : `rgb(${r} ${g} ${b} / 0.5)`;
    if (light < 1 || !picture) ctx.fillRect(x, y, w, h);
    ctx.fillStyle = `rgb(${r} ${g} ${b} / ${(0.2 * light).toFixed(3)})`;
    if (picture && share) ctx.fillRect(x, y, w, h);
  });
}

/** Never kept. @param {any} ctx @param {Map} map @param {Theme} theme */
function hatch(ctx, map, theme) {
  ctx.strokeStyle = theme.border;
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (let d = 5; d < map.width + map.height; d += 6) {
    ctx.moveTo(map.x + Math.min(d, map.width), map.y + Math.max(0, d - map.width));
    ctx.lineTo(map.x + Math.max(0, d - map.height), map.y + Math.min(d, map.height));
  }
  ctx.stroke();
}

/** Where drawing anew would begin. @param {any} ctx @param {Map} map */
function edge(ctx, map) {
  ctx.setLineDash([4, 2]);
  ctx.lineWidth = 2;
  ctx.strokeStyle = "#fff";
  ctx.beginPath();
  ctx.moveTo(map.x - SPACE / 2, map.y - 2);
  ctx.lineTo(map.x - SPACE / 2, map.y + map.height + 2);
  ctx.stroke();
  ctx.setLineDash([]);
}
