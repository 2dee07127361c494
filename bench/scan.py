r"""M-VAR's carried state: time per scale against scanning the past again, and against VAR with a full cache.

    python bench/scan.py                     4 layers as wide as d16's, one picture with guidance
    python bench/scan.py --depth 12 --images 2
    python bench/scan.py --out d16           also writes bench/results/scan-d16.json

Weights are random and the canvases noise: neither matters to time. The three take turns scale by scale, and the best of
several rounds counts. `again` does what the published code does: it keeps what every scale fed to the scan, and scans
all of it at each scale. Its logits are compared with those of the carried state.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import check_out, circumstances, in_any_case
from linear_core.loop.scales import scale_cache, scale_policy
from linear_core.models.mvar import MVAR, MVARConfig
from linear_core.models.packed import pack
from linear_core.models.var import PYRAMIDS, VAR, VARConfig
from linear_core.plan import CachePlan
from linear_core.prompts import class_prompt

RESULTS = Path(__file__).parent / "results"
PYRAMID, FULL = PYRAMIDS[680], CachePlan("full")
KINDS = ("carried", "again", "var")


class Again(nn.Module):
    """A scan that carries nothing: it goes over all tokens so far, and answers for the newest."""

    def __init__(self, mamba: nn.Module):
        super().__init__()
        self.mamba, self.past = mamba, [torch.empty(0)]

    def forward(self, u: Tensor, carried: Any) -> Tensor:
        self.past = [u] if u.shape[1] == PYRAMID.size(0) else [*self.past, u]
        return self.mamba(torch.cat(self.past, 1))[:, -u.shape[1] :]


def models(depth: int, layers: int) -> dict[str, VAR]:
    """By kind, with as few of the published layers as asked; the first two share their weights."""
    width = 64 * depth
    sizes = (layers, width, depth, 4 * width, 4096, 1000, 32, PYRAMID)
    config = MVARConfig(*sizes, inner=2 * width, scan_heads=width // 32, scan_size=64, span=4)
    carried, again = MVAR(config), MVAR(config)
    for block in carried.blocks:  # as at the start of training: steps of 0.001 to 0.1, decays of 1 to 16
        block.mamba.dt_bias.data.uniform_(-7, -2)
        block.mamba.A_log.data.uniform_(0, 2.8)
    again.load_state_dict(carried.state_dict())
    found = {"carried": carried, "again": again, "var": VAR(VARConfig(*sizes))}
    for model in found.values():
        pack(model.eval().requires_grad_(False))
    for block in again.blocks:
        block.mamba = Again(block.mamba)
    return found


def measure(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    decoders = models(args.depth, args.layers)
    below = [torch.randn(args.images, PYRAMID.size(n), 32) for n in range(PYRAMID.stages)]
    best = {kind: [float("inf")] * PYRAMID.stages for kind in KINDS}
    off, clock = 0.0, time.process_time if args.own else time.perf_counter
    for _ in range(args.rounds):
        runs = {}
        for kind, decoder in decoders.items():
            prompt = decoder.with_unconditional(class_prompt([1] * args.images))
            cache = scale_cache(decoder, prompt.rows, FULL, scale_policy(FULL, PYRAMID))
            runs[kind] = decoder, cache, decoder.begin(prompt)
        for stage in range(PYRAMID.stages):
            logits = {}
            for kind, (decoder, cache, state) in runs.items():
                cache.begin(stage)
                started = clock()
                logits[kind] = decoder.stage(stage, below[stage] if stage else None, state, cache)
                best[kind][stage] = min(best[kind][stage], clock() - started)
            largest = logits["again"].abs().max()
            off = max(off, float((logits["carried"] - logits["again"]).abs().max() / largest))
    held = {kind: cache.peak for kind, (_, cache, _) in runs.items() if kind != "again"}
    return {
        "depth": args.depth, "layers": args.layers, "images": args.images, "rounds": args.rounds, "own": args.own,
        "seconds": {kind: [round(x, 5) for x in times] for kind, times in best.items()},
        "largest_relative_difference": off, "bytes": held,
    }  # fmt: skip


def table(found: dict[str, Any]) -> str:
    """A row for each scale and one for all: milliseconds, and how many times those of the carried state."""
    times = found["seconds"]
    rows = [
        *((f"{rows} x {cols}", *(times[kind][n] for kind in KINDS)) for n, (rows, cols) in enumerate(PYRAMID.sides)),
        ("all", *(sum(times[kind]) for kind in KINDS)),
    ]
    lines = [f"{'scale':>8}{'carried ms':>12}{'again ms':>10}{'x':>6}{'VAR ms':>9}{'x':>6}"]
    for name, carried, again, var in rows:
        lines.append(
            f"{name:>8}{1e3 * carried:>12.1f}{1e3 * again:>10.1f}{again / carried:>6.2f}{1e3 * var:>9.1f}"
            f"{var / carried:>6.2f}"
        )
    state, cache = (found["bytes"][kind] / 2**20 for kind in ("carried", "var"))
    return "\n".join([*lines, f"state {state:.1f} MiB; VAR's full cache {cache:.1f} MiB"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16, help="of the file whose width is taken (default: 16)")
    parser.add_argument("--layers", type=int, default=4, help="that are built (default: 4)")
    parser.add_argument("--images", type=int, default=1, help="all with guidance (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--own", action="store_true",
                        help="count the seconds of computing instead of the clock's: for a busy machine")  # fmt: skip
    parser.add_argument("--out", metavar="NAME", help="also write bench/results/scan-NAME.json")
    args = parser.parse_args()
    out = RESULTS / f"scan-{args.out}.json" if args.out else None
    if out:
        check_out(out, parser)
    results: list[dict[str, Any]] = []

    def write(stopped: dict[str, str]) -> None:
        if out and results:
            document = {"circumstances": circumstances("cpu"), "command": ["bench/scan.py", *sys.argv[1:]]}
            out.write_text(json.dumps(document | {"results": results} | stopped, indent=1) + "\n")

    with in_any_case(write), torch.inference_mode():
        results.append(measure(args))
        print(table(results[0]))
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
