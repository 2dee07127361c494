"""The paper's efficiency table next to ours: six models, with the paper's budgets and batch sizes.

    python bench/paper_table.py                                memory by our formulas, predicted times
    python bench/paper_table.py --measure --models LlamaGen-XL  measured on a GPU, with random weights

A batch that does not fit the GPU's memory is measured in part and extrapolated; its row says from how many images.

Memory is exact: weights by shape, and the cache as it is allocated (CacheShape.bytes), in bfloat16, for both halves of
guidance. The column "run" adds what `run_bytes` estimates for a line's end and for sampling.

Times without --measure are PREDICTED from what a step has to read and compute, on a GPU with the given bandwidth and
operations per second (default: an H200 at four fifths of its bandwidth and 600 TFLOP/s): the longer of reading the
weights and multiplying with them, plus reading the keys and values. They are a lower bound that no loop reaches, not a
measurement. The paper's numbers are those of its table, "Autoregressive Image Generation Needs Only a Few Lines of
Cached Tokens" (arXiv 2512.04857), in decimal GB; it does not name its GPU, and its full cache is that of the published
loops.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import check_out, circumstances, in_any_case
from bench.shapes import SHAPES, ModelShape
from bench.speed import measure
from linear_core.loop.memory import run_bytes
from linear_core.plan import CachePlan

GB = 1e9
# Model -> batch size, then lines kept (0: all), GB and seconds in the paper.
PAPER = {
    "LlamaGen-XL": (256, [(0, 64.75, 331.52), (6, 25.51, 63.99), (4, 20.97, 43.78)]),
    "LlamaGen-XXL": (128, [(0, 51.37, 179.96), (6, 19.54, 50.05), (4, 15.87, 36.22)]),
    "Janus-Pro-1B": (128, [(0, 58.68, 143.64), (6, 37.04, 31.76), (4, 34.64, 24.52)]),
    "Janus-Pro-7B": (64, [(0, 74.01, 180.8), (6, 47.59, 40.3), (4, 44.66, 32.19)]),
    "Lumina-mGPT-768": (12, [(0, 55.48, 283.99), (8, 21.43, 146.82), (6, 19.64, 133.51)]),
    "Lumina-mGPT-1024": (8, [(0, 62.95, 655.52), (8, 20.50, 248.63)]),
}


def predicted(shape: ModelShape, plan: CachePlan, rows: int, bandwidth: float, operations: float) -> float:
    """Seconds per image: all steps, and nothing in between."""
    _, read = shape.parameters()
    cache, grid = shape.cache_shape(torch.bfloat16), shape.grid
    slot = cache.bytes(grid, plan, rows) / (cache.prompt + plan.lines(grid) * grid.stride)
    room = plan.lines(grid) * grid.stride
    slots = sum(min(token + 1, room) for token in range(grid.tokens)) + grid.tokens * cache.prompt
    products = max(2 * read / bandwidth, 2 * read * rows / operations)  # two bytes and two operations per parameter
    return grid.tokens * products + slots * slot / bandwidth


def rows_of(name: str, args: argparse.Namespace, shape: ModelShape | None = None) -> list[dict[str, Any]]:
    """The table's rows for a model; `shape` replaces the published one."""
    shape = shape or SHAPES[name]
    batch, published = PAPER[name]
    images = args.batch or batch
    rows = 2 * images
    parameters, _ = shape.parameters()
    cache = shape.cache_shape(torch.bfloat16)
    found = []
    for lines, memory, seconds in published:
        plan = CachePlan("line", budget=lines) if lines else CachePlan("full")
        held = cache.bytes(shape.grid, plan, rows)
        found.append(
            {
                "model": name,
                "images": images,
                "lines": lines or shape.grid.rows,
                "paper": {"images": batch, "gb": memory, "seconds": seconds},
                "cache_gb": held / GB,
                "weights_gb": 2 * parameters / GB,
                "run_gb": (2 * parameters + run_bytes(cache, shape.grid, plan, rows, shape.config.codes)) / GB,
                "predicted_seconds": predicted(shape, plan, rows, args.bandwidth * 1e12, args.operations * 1e12),
            }
        )
    if args.measure:
        for row, (lines, _, _) in zip(found, published, strict=True):
            plan = CachePlan("line", budget=lines) if lines else CachePlan("full")
            row |= measured(shape, plan, images, args)
    return found


def measured(shape: ModelShape, plan: CachePlan, images: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and GB of one plan. A batch that does not fit is measured in part, and its time is extrapolated."""
    cache, weights = shape.cache_shape(torch.bfloat16), 2 * shape.parameters()[0]
    room = torch.cuda.mem_get_info()[0] if args.device.startswith("cuda") else float("inf")
    at_once = images
    while at_once > 1 and weights + run_bytes(cache, shape.grid, plan, 2 * at_once, shape.config.codes) > 0.95 * room:
        at_once //= 2
    settings = argparse.Namespace(
        device=args.device, dtype=["bfloat16"], weights=["default"],
        plans=[plan], steps=["eager"], attention=["sdpa"], drafts=[0],
        lines=args.lines, repeat=3, against=None, unpacked=False,
    )  # fmt: skip
    with torch.inference_mode():
        *_, (one,) = measure(shape, at_once, settings, 1.0)  # what share of a bandwidth it reaches is not shown
    gc.collect()
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return {
        "measured_seconds": one["image_seconds"] * images / at_once,
        "measured_gb": one["peak_mib"] * 2**20 / GB,
        "measured_images": at_once,  # fewer than images: seconds are extrapolated from so many, and GB are theirs
        "extrapolated_from_lines": one["extrapolated_from_lines"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PAPER), choices=PAPER, metavar="MODEL")
    parser.add_argument("--bandwidth", type=float, default=4.8 * 0.8, metavar="TB/s", help="default: 3.84")
    parser.add_argument("--operations", type=float, default=600, metavar="TFLOP/s", help="default: 600")
    parser.add_argument("--measure", action="store_true", help="also draw (all of it needs an accelerator with 80 GB)")
    parser.add_argument("--lines", type=int, default=0, metavar="N", help="with --measure: time N lines of an image")
    parser.add_argument("--batch", type=int, default=0, metavar="N", help="batch size, instead of the paper's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the results there, as JSON")
    args = parser.parse_args()
    if args.out:
        check_out(args.out, parser)
    kind = "measured" if args.measure else "PREDICTED"
    print(f"{'':18}{'':>7}{'':>7}|{'paper':>27} |{'ours: GB':>32} |{f'ours: seconds, {kind}':>27}")
    print(
        f"{'model':18}{'images':>7}{'lines':>7}|{'GB':>8}{'saved':>7}{'s':>7}{'x':>5} |"
        f"{'weights':>8}{'cache':>8}{'run':>8}{'saved':>8} |{'s':>12}{'img/s':>10}{'x':>5}"
    )
    results = []
    about = {"kind": kind, "bandwidth_tb_s": args.bandwidth, "tflop_s": args.operations}
    about |= circumstances(args.device)

    def write(stopped: dict[str, str]) -> None:
        if args.out and results:
            args.out.write_text(json.dumps({"circumstances": about, "results": results} | stopped, indent=1) + "\n")

    with in_any_case(write):
        for name in args.models:
            rows = rows_of(name, args)
            results += rows
            full = rows[0]
            key = "measured_seconds" if args.measure else "predicted_seconds"
            for row in rows:
                images, paper, theirs = row["images"], row["paper"], full["paper"]
                saved = 1 - row["run_gb"] / full["run_gb"]
                print(
                    f"{name:18}{row['images']:>7}{row['lines']:>7}|{paper['gb']:>8.2f}"
                    f"{1 - paper['gb'] / theirs['gb']:>7.0%}{paper['seconds']:>7.0f}"
                    f"{theirs['seconds'] / paper['seconds']:>5.1f} |{row['weights_gb']:>8.2f}{row['cache_gb']:>8.2f}"
                    f"{row['run_gb']:>8.2f}{saved:>8.0%} |{row[key]:>12.2f}{row['images'] / row[key]:>10.2f}"
                    f"{full[key] / row[key]:>5.1f}"
                    + (f"  from {row['measured_images']} images" if row.get("measured_images", images) < images else "")
                )
    print(json.dumps({"circumstances": about, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
