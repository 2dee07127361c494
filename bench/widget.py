"""What the widget costs the sampler: a picture of 64 rows with and without everything the page is told.

    python bench/widget.py [--rows 64] [--repeat 5]

Events are made and encoded to JSON as a host would send them. Previews are made on their thread: their share of the
time is bounded (nodes/live.py), and is told apart. Random weights: a LlamaGen of 12 layers of 8 heads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from linear_core.events import Started, Trace, detail
from linear_core.generate import generate
from linear_core.grid import Grid
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt


def run(model: LlamaGen, told: bool) -> tuple[float, float, int]:
    """Seconds of the whole run, seconds of it spent on telling, bytes told."""
    grid, shape, plan = model.grid, model.cache_shape(), CachePlan(budget=8)
    started = Started(
        run="bench", rows=grid.rows, cols=grid.cols, stride=grid.stride, images=1, shown=1, columns=1,
        layers=shape.layers, heads=shape.heads, detail=detail(shape.layers, shape.heads, grid.tokens), seed=0,
        policy=plan.policy, release=plan.release, lines=plan.budget, anchors=plan.anchors, recent=plan.recent,
        cache_bytes=shape.bytes(grid, plan, 2), full_bytes=shape.bytes(grid, CachePlan("full"), 2),
    )  # fmt: skip
    trace, telling, size = Trace(started), 0.0, 0
    begun = time.perf_counter()
    for line in generate(model, class_prompt([0]), plan, SamplePlan(guidance=2.0)):
        if told:
            start = time.perf_counter()
            size += len(json.dumps(trace.add(line)))
            telling += time.perf_counter() - start
    return time.perf_counter() - begun, telling, size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64, metavar="LINES")
    parser.add_argument("--cols", type=int, default=24, metavar="TOKENS")
    parser.add_argument("--repeat", type=int, default=3, metavar="N")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = LlamaGen(LlamaGenConfig(12, 256, 8, 704, 1024, classes=4), Grid(args.rows, args.cols)).eval()
    run(model, False)  # warm up
    times: dict[bool, list[float]] = {True: [], False: []}
    shares = []
    for _ in range(args.repeat):
        for told in (False, True):
            whole, telling, size = run(model, told)
            times[told].append(whole)
            if told:
                shares.append(telling / whole)
    share = statistics.median(shares)
    print(f"{args.rows} rows of {args.cols}, 12 layers of 8 heads, CPU with {torch.get_num_threads()} threads")
    print(f"without: {min(times[False]):.2f} s, with: {min(times[True]):.2f} s (best of {args.repeat})")
    print(f"telling: {share:.2%} of the time, {size / args.rows / 1e3:.1f} kB a row, {size / 1e3:.0f} kB in all")
    return int(share >= 0.02)


if __name__ == "__main__":
    sys.exit(main())
