// @ts-check
/**
 * How the widget looks: state and a picture onto a 2d context. Pure; no page, no clock.
 *
 * Each image of the preview is a grid of cells. In "kept" a cell's colour is the share of layers and heads that hold
 * it; in "both" the picture is lit where it is held and dimmed where it was evicted. Beside each grid a bar for every
 * line says how much of that line is left.
 */

/** Cividis, nine points: linear_core/pictures/heatmap.py has the same, and a test holds the two equal. */
export const CIVIDIS = [
  [0.000, 0.135, 0.304], [0.000, 0.213, 0.430], [0.207, 0.289, 0.420], [0.348, 0.367, 0.425], [0.476, 0.448, 0.445],
  [0.607, 0.530, 0.438], [0.747, 0.620, 0.406], [0.889, 0.717, 0.338], [0.996, 0.909, 0.217],
];

/**
 * @typedef {{ background: string, foreground: string, muted: string, border: string }} Theme
 * @typedef {{ x: number, y: number, width: number, height: number, cell: number }} Box  one image's grid
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
    if (kept) region(ctx, box, at, kept, image);
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

/** What a mask keeps is hatched, and a line goes around the rest. @param {any} ctx @param {Box} box @param {Layout} at @param {boolean[]} kept @param {number} image */
function region(ctx, box, at, kept, image) {
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
  stroke(paths.hatch, "rgb(255 255 255 / 0.28)", 1);
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
