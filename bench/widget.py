"""Cost of the widget for the sampler: a picture of 64 rows, or one in scales, with and without events and previews.

    python bench/widget.py [--rows 64] [--repeat 1]
    python bench/widget.py --scales [--repeat 1]

Events are made and encoded to JSON as a host would send them. Previews are decoded by the bundled tokenizer and encoded
as JPEG on their thread, the last one at the end. All of that time counts, even if it overlaps with the sampler. Random
weights of the size of LlamaGen-B, the smallest that is published. Exit status 1: 2 % of the time or more.

With --scales, random weights of the size of VAR d16, the smallest that is published, and of its tokenizer, guided. Two
things are told apart and do not count: the finished picture, which Decode takes over instead of decoding it again, and
what the sketches of a model learn from, once, before its first run.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from linear_core.checkpoints.library import bundled_files, load_model
from linear_core.events import Line, Stage, Started, Trace, detail
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.loop.scales import generate_scales
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.models.packed import pack
from linear_core.models.var import PYRAMIDS, VAR, VARConfig
from linear_core.pictures.preview import CanvasPreview, CanvasWorker, Preview, PreviewWorker, Sketch
from linear_core.pictures.sheet import to_image
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from linear_core.tokenizers.pyramid import PyramidConfig, PyramidTokenizer
from linear_core.tokenizers.tokenizer import VQTokenizer

PYRAMID = PYRAMIDS[680]
D16 = VARConfig(16, 1024, 16, 4096, 4096, 1000, 32, PYRAMID)
ITS_TOKENIZER = PyramidConfig(4096, 32, (640, 320, 320, 160, 160), 3)


def run(model: LlamaGen, tokenizer: VQTokenizer, report: bool) -> tuple[float, float, float, int, int]:
    """Seconds of the run, of events and of pictures; bytes of events; number of pictures."""
    grid, shape, plan = model.grid, model.cache_shape(), CachePlan(budget=8)
    started = Started(
        run="bench", rows=grid.rows, cols=grid.cols, stride=grid.stride, images=1, shown=1, columns=1,
        layers=shape.layers, heads=shape.heads, detail=detail(shape.layers, shape.heads, grid.tokens), seed=0,
        policy=plan.policy, release=plan.release, lines=plan.budget, anchors=plan.anchors, recent=plan.recent,
        cache_bytes=shape.bytes(grid, plan, 2), full_bytes=shape.bytes(grid, CachePlan("full"), 2),
    )  # fmt: skip
    trace, reporting, size, lines, rendering = Trace(started), 0.0, 0, [], []

    def render(lines: tuple[Line, ...]) -> Image.Image:
        start = time.perf_counter()
        preview = Preview(tokenizer, grid.rows)
        for line in lines:
            preview.add(line)
        picture = to_image(preview.pictures()[0])
        picture.save(io.BytesIO(), "JPEG")
        rendering.append(time.perf_counter() - start)
        return picture

    begin = time.perf_counter()
    worker = PreviewWorker(render, lambda picture, lines: None, grid.rows)
    for line in generate(model, class_prompt([0]), plan, SamplePlan(guidance=2.0)):
        if report:
            start = time.perf_counter()
            lines.append(line)
            worker.submit(tuple(lines), len(lines))
            size += len(json.dumps(trace.add(line)))
            reporting += time.perf_counter() - start
    if report:
        worker.final(tuple(lines))
    worker.close()
    return time.perf_counter() - begin, reporting, sum(rendering), size, len(rendering)


def run_scales(model: VAR, tokenizer: PyramidTokenizer, sketch: Sketch, report: bool) -> dict[str, float]:
    """Seconds of the run, of events, of pictures and of the finished one; bytes of events; number of pictures."""
    shape, plan = model.cache_shape(), CachePlan("fold", share=1 / 6)
    cols = PYRAMID.sides[-1][1]
    trace = Trace(Started(
        run="bench", rows=PYRAMID.stages, cols=cols, stride=cols, images=1, shown=1, columns=1,
        layers=shape.layers, heads=shape.heads, detail=detail(shape.layers, shape.heads, PYRAMID.tokens), seed=0,
        policy=plan.policy, release=plan.release, lines=plan.keeps(PYRAMID), anchors=plan.anchors, recent=plan.recent,
        cache_bytes=shape.scales_bytes(PYRAMID, plan, 2), full_bytes=shape.scales_bytes(PYRAMID, CachePlan("full"), 2),
        sides=[list(side) for side in PYRAMID.sides],
    ))  # fmt: skip
    preview, found = CanvasPreview(tokenizer, PYRAMID, sketch), dict.fromkeys(("events", "bytes"), 0.0)
    rendering: list[float] = []

    def render(stage: Stage, elapsed: float | None) -> Image.Image:
        start = time.perf_counter()
        if elapsed is None:
            picture = to_image(sketch.decode(tokenizer, stage.canvas)[0])
        else:
            picture = to_image(preview.pictures(stage.stage, stage.canvas, elapsed)[0])
        picture.save(io.BytesIO(), "JPEG")
        rendering.append(time.perf_counter() - start)
        return picture

    begin = time.perf_counter()
    worker = CanvasWorker(render, lambda picture, scales: None, PYRAMID.stages)
    for stage in generate_scales(model, tokenizer.quantize, class_prompt([0]), plan, SamplePlan(guidance=5.0)):
        if report:
            start = time.perf_counter()
            worker.submit(stage, stage.stage + 1)
            found["bytes"] += len(json.dumps(trace.add(stage)))
            found["events"] += time.perf_counter() - start
    worker.close()
    found["run"] = time.perf_counter() - begin
    found["previews"], found["pictures"] = sum(rendering), len(rendering)
    if report:
        worker.final(stage)
        found["finished"] = rendering[-1]
    return found


def main_scales(repeat: int) -> int:
    model, tokenizer, sketch = VAR(D16).eval(), PyramidTokenizer(ITS_TOKENIZER).eval(), Sketch()
    pack(model.requires_grad_(False))
    start = time.perf_counter()
    sketch.prepare(tokenizer, PYRAMID)
    once = time.perf_counter() - start
    run_scales(model, tokenizer, sketch, False)  # warm up
    runs = {report: [run_scales(model, tokenizer, sketch, report) for _ in range(repeat)] for report in (False, True)}
    without, told = min(each["run"] for each in runs[False]), runs[True]
    events, previews = (statistics.median(each[kind] / each["run"] for each in told) for kind in ("events", "previews"))
    last = told[-1]
    threads = torch.get_num_threads()
    print(f"scales {PYRAMID.text}, {D16.layers} layers of {D16.heads} heads, CPU with {threads} threads")
    print(f"without: {without:.2f} s, with: {min(each['run'] for each in told):.2f} s (best of {repeat})")
    print(f"events: {events:.2%} of the time, {last['bytes'] / 1e3:.0f} kB in total")
    print(f"previews: {previews:.2%} of the time, {last['pictures']:.0f} of them; together {events + previews:.2%}")
    print(f"not counted: the finished picture, {last['finished']:.2f} s, and before a model's first run {once:.2f} s")
    return int(events + previews >= 0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, metavar="LINES")
    parser.add_argument("--cols", type=int, default=24, metavar="TOKENS")
    parser.add_argument("--repeat", type=int, default=1, metavar="N")
    parser.add_argument("--scales", action="store_true", help="of a picture that is drawn in scales")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.scales:
        return main_scales(args.repeat)
    tokenizer = load_model(bundled_files()).tokenizer
    config = LlamaGenConfig(12, 768, 12, 2048, tokenizer.config.codes, classes=4)
    model = LlamaGen(config, Grid(args.rows, args.cols)).eval()
    run(LlamaGen(config, Grid(2, args.cols)).eval(), tokenizer, True)  # warm up
    times: dict[bool, list[float]] = {True: [], False: []}
    shares = []
    for _ in range(args.repeat):
        for report in (False, True):
            total, reporting, rendering, size, pictures = run(model, tokenizer, report)
            times[report].append(total)
            if report:
                shares.append((reporting / total, rendering / total))
    events, previews = (statistics.median(kind) for kind in zip(*shares, strict=True))
    print(f"{args.rows} rows of {args.cols}, 12 layers of 12 heads, CPU with {torch.get_num_threads()} threads")
    print(f"without: {min(times[False]):.2f} s, with: {min(times[True]):.2f} s (best of {args.repeat})")
    print(f"events: {events:.2%} of the time, {size / args.rows / 1e3:.1f} kB per row, {size / 1e3:.0f} kB in total")
    print(f"previews: {previews:.2%} of the time, {pictures} of them; together {events + previews:.2%}")
    return int(events + previews >= 0.02)


if __name__ == "__main__":
    sys.exit(main())
