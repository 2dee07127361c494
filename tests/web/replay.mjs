// Reads a trace on stdin and says what web/state.js makes of it after every line; for tests in Python.
import { readFileSync } from "node:fs";
import { EMPTY, cellsOf, evictedAfter, held, inScales, keptText, reduce, remembered, standsFor, statusText } from "../../web/state.js";

const events = JSON.parse(readFileSync(0, "utf8"));
const [run] = events;
const size = cellsOf(run);
const each = (n, f) => Array.from({ length: n }, (_, i) => f(i));
const answers = [];
let state = EMPTY;
for (const event of events) {
  state = reduce(state, event);
  if (event.kind !== "row") continue;
  const all = [...held(state)];
  answers.push({
    text: statusText(state),
    all: each(run.shown, (i) => all.slice(i * size, (i + 1) * size)),
    layers: each(run.layers, (layer) => [...held(state, { layer })]),
    heads: run.detail === "heads" ? each(run.layers, (layer) => each(run.heads, (head) => [...held(state, { layer, head })])) : [],
    stands: each(size, (cell) => standsFor(state, cell)),
    evicted: [...evictedAfter(state)].slice(0, size),
    over: inScales(run) ? each(run.shown, (i) => [...remembered(run, held(state), i)]) : [],
    kept: keptText(state, state.lines.length),
  });
}
console.log(JSON.stringify(answers));
