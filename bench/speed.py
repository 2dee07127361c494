r"""Speed of drawing, and what share of the machine's memory bandwidth it reaches.

    python bench/speed.py                                       LlamaGen-B, full cache against 4 of 24 lines
    python bench/speed.py --lines 2 --against ~/LlamaGen        next to LlamaGen's own loop, two lines of each image
    python bench/speed.py --models Janus-Pro-1B --lines 2 --against transformers
    python bench/speed.py --models Janus-Pro-1B LlamaGen-XL --plans full fold:4 line:2:int8 --steps eager compiled
    python bench/speed.py --dtype bfloat16 --plans full line:4 full:24:int8 line:4:int8 --steps eager graph \
        --attention sdpa kernel                                 our kernel for NVIDIA GPUs next to PyTorch's attention
    python bench/speed.py --models landscapes --plans fold:4 --images 1 --drafts 0 8 16 24 48
                                                                whole images with drafts, next to none
    python bench/speed.py --images 1 --lines 2 --drafts 0 8 24  what a pass over 8 or 24 tokens costs
    python bench/speed.py --models LlamaGen-XL --images 1 --lines 2 --plans full --dtype float32 bfloat16 \
        --weights default int8 int4                             matrices in 8 and 4 bits next to none
    python bench/speed.py --out cpu-b16                         also writes bench/results/speed-cpu-b16.json
    python bench/speed.py --out ~/found.json                    also writes that file

Weights are random, with the published sizes: shapes decide the time, values do not. The contenders take turns of one
step each, so that other load on the machine affects all of them alike; medians and quartiles are reported. Against
transformers, whose loop starts every run with the prompt and cannot be interrupted, a turn is up to eight steps; a
logits processor measures the time of every token.

With `--steps graph`, the step and the end of a line are CUDA graphs; `not_recorded` in a result says why one is not.

With `--drafts`, a forward pass checks so many tokens of each image (0: none). How many of them are right depends on
the weights, and random ones are as good as none: whole images count only for `landscapes`, the bundled model. With
--lines, the step of such a contender is one pass, and `steps_a_pass` says how many steps without drafts it takes: the
tokens that a pass must give to win. `bench/drafts.py` counts them. Nothing is extrapolated from it.

Without --lines, whole images are drawn by the real loop. With --lines N, only N lines of an image are timed, each with
the cache filled up to there, and the time of an image is extrapolated from them: the prompt, then for each line its
steps and its end. Extrapolated results say so. The last line of the output is the whole result as one JSON document.
--out writes it too, even if the run is interrupted or fails: then `stopped` says why, and it holds what was measured
until then.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import Peak, check_out, circumstances, copy_bandwidth, in_any_case, load, resident, spread, timed
from bench.peer import WHICH, Peer, chosen, problem
from bench.shapes import SHAPES, ModelShape
from linear_core.cache.attention import ATTENTIONS, SWITCH, no_kernel
from linear_core.cache.line_cache import LineCache
from linear_core.checkpoints.library import stored_in
from linear_core.grid import Grid
from linear_core.loop.drafts import Drafts, check
from linear_core.loop.generate import Run, draw, evict, generate, room_after
from linear_core.loop.graph import Captured, CapturedCheck, CapturedEnd, CapturedStep
from linear_core.loop.memory import run_bytes
from linear_core.loop.sampling import Noise
from linear_core.loop.threads import limit_threads
from linear_core.models.packed import pack
from linear_core.models.quantised import QUANTISATIONS, quantise_model
from linear_core.plan import STORAGES, CachePlan
from linear_core.policies import POLICIES, get_policy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIB = 2**20
RESULTS = Path(__file__).parent / "results"


def plan_of(text: str, parser: argparse.ArgumentParser) -> CachePlan:
    """A plan from full, policy:lines or policy:lines:storage."""
    policy, *rest = text.split(":")
    lines, storage = (*rest, "4", "full")[:2] if rest else ("4", "full")
    if len(rest) == 1:
        storage = "full"
    if policy not in POLICIES or not lines.isdigit() or storage not in STORAGES:
        parser.error(f"--plans: '{text}' is not a plan; write full, policy:lines or policy:lines:int8.")
    return CachePlan(
        policy, budget=int(lines), recent=0 if policy == "fold" else 1 if lines == "2" else 2, storage=storage
    )


compiled = partial(torch.compile, dynamic=False)


class Ours:
    """A plan in use: the loop of `generate` in separate pieces that can be timed."""

    def __init__(
        self,
        name: str,
        model: Any,
        shape: ModelShape,
        plan: CachePlan,
        images: int,
        kind: str,
        attention: str = "sdpa",
        window: int = 0,
        weights: str = "default",
    ):
        self.weights = weights
        self.name, self.model, self.shape, self.plan, self.images, self.kind = name, model, shape, plan, images, kind
        self.attention, self.window = attention, window
        self.policy, self.sample = get_policy(plan.policy), replace(shape.sample, drafts=window)
        self.prompt = shape.prompt(images).to(model.device)
        self.rows = model.with_unconditional(self.prompt) if self.sample.guided else self.prompt
        self.grid = model.grid.after(self.rows.length)
        self.static = kind != "eager"
        self.step = {"eager": lambda step: step, "compiled": compiled, "graph": CapturedStep}[kind](model.step)
        self.line_end = CapturedEnd(evict) if kind == "graph" else evict
        self.check = CapturedCheck(check) if kind == "graph" else check

    def allocate(self) -> None:
        """Everything that exists before the first token; the cache is filled with random values."""
        os.environ[SWITCH] = self.attention
        reads = self.policy.reads | ({"ahead"} if self.plan.release == "fold" else set())
        device, shape = self.model.device, self.model.cache_shape(self.rows.length)
        make = partial(LineCache, shape, self.rows.rows, self.grid, self.plan, dtype=self.model.dtype, device=device)
        self.cache = make(reads=reads, static=self.static)
        for stored in (self.cache.keys, self.cache.values):
            for tensor in vars(stored).values():
                if not isinstance(tensor, torch.Tensor):
                    continue
                if tensor.dtype in (torch.int8, torch.uint8):
                    tensor.random_(0, 127)
                elif tensor.is_floating_point():
                    tensor.normal_(0, 0.01)
        if self.cache.queries is not None:
            self.cache.queries.normal_()
        self.noise = Noise(0, self.images, self.model.codes, device)
        self.columns = torch.arange(self.grid.stride, device=device)
        self.index = torch.arange(self.grid.prompt, self.grid.prompt + self.grid.tokens, device=device)
        given = (self.model, self.cache, self.sample, self.noise, self.rows.pad, self.images, self.window)
        self.drafts = Drafts(*given) if self.window else None

    def prefill(self) -> None:
        self.logits = self.model.prefill(self.rows, self.cache)

    def prepare(self, row: int) -> None:
        """Bring the cache to its state when line `row` begins: full, or with all the tokens before it."""
        cache, stride, prompt = self.cache, self.grid.stride, self.cache.shape.prompt
        cache.extent, cache.part = min(prompt + (row + 1) * stride, cache.slots), (0, stride)
        held = cache.extent - prompt - stride
        cache.bias[..., prompt:].fill_(float("-inf"))
        cache.index[..., prompt:].fill_(-1)
        cache.bias[..., prompt : prompt + held] = 0.0
        first = self.grid.index(row) - held
        cache.index[..., prompt : prompt + held] = torch.arange(first, first + held, device=cache.index.device)
        cache.target.copy_(torch.arange(prompt + held, cache.extent, device=cache.target.device))
        self.row = row

    def steps(self, first: int, steps: int) -> None:
        """Sample and feed `steps` tokens of the line from column `first` on. With drafts: so many passes from there."""
        if self.drafts:
            number = self.row * self.grid.stride + first
            for _ in range(steps):
                self.drafts.begin(number, torch.zeros_like(self.drafts.number))
                self.check(self.drafts, (self.row + 1) * self.grid.stride)
                self.drafts.number.tolist()  # as the loop does
            return
        for column in range(first, first + steps):
            number = self.row * self.grid.stride + column
            token = draw(self.logits, number, self.images, self.sample, self.noise)
            fed = token.repeat(self.cache.rows // self.images)
            index, columns = self.index[number : number + 1], self.columns[column : column + 1]
            self.logits = self.step(fed, index, self.rows.pad, columns, self.cache)

    def end(self) -> None:
        rotate = partial(self.model.rotate_ahead, self.grid)
        for column in self.plan.ends(self.grid, self.row):
            room_after(self.cache, self.policy, rotate, self.row, column, self.line_end)

    def warm(self) -> None:
        """Run a token and a line's end, so that compilation and capture happen before anything is timed."""
        self.prepare(max(self.grid.rows - 2, 0))
        self.steps(0, 1)
        self.end()

    def without_drafts(self, other: Ours) -> bool:
        """Whether this is `other` without drafts."""
        mine, theirs = ((x.plan, x.kind, x.attention, x.images, x.model) for x in (self, other))
        return not self.window and mine == theirs

    def not_recorded(self) -> dict[str, str]:
        """Why a requested CUDA graph was not used: for the step or the drafts, and for the end of a line."""
        works = {"step": self.step, "line's end": self.line_end, "drafts": self.check}
        return {name: work.why for name, work in works.items() if isinstance(work, Captured) and work.why}

    def cache_read(self) -> int:
        """Bytes of keys and values that a step of the current line reads."""
        return self.cache.nbytes if self.static else self.cache.nbytes * self.cache.extent // self.cache.slots

    def picture(self) -> tuple[list[float], int]:
        """Draw with the real loop: seconds of each line, bytes of the cache."""
        os.environ[SWITCH] = self.attention
        drawing = generate(
            self.model, self.prompt, self.plan, self.sample,
            step=self.step, line_end=self.line_end, check_drafts=self.check, static=self.static,
        )  # fmt: skip
        self.run = Run()
        for line in drawing:
            self.run.add(line)
        lines = self.run.lines
        return [line.seconds for line in lines], lines[0].cache_bytes


def sampled_rows(rows: int, lines: int) -> list[int]:
    """The middle lines of `lines` equal parts of an image, each of which is timed for its part."""
    lines = min(lines, rows)
    return [int((i + 0.5) * rows / lines) for i in range(lines)]


def time_lines(ours: list[Ours], peer: Peer | None, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Time all contenders on a few lines of an image; yields the results after each line."""
    device, grid = args.device, ours[0].grid
    for one in ours:
        one.allocate()
    everyone: list[Any] = [*ours, *([peer] if peer else [])]
    prefill = {one.name: [timed(device, one.prefill) for _ in range(args.repeat + 1)][1:] for one in everyone}
    steps: dict[str, list[list[float]]] = {one.name: [] for one in everyone}
    ends: dict[str, list[list[float]]] = {one.name: [] for one in ours}
    read: dict[str, list[int]] = {one.name: [] for one in ours}
    block = peer.block if peer else 1
    columns = [1 + i % (grid.cols - 1) for i in range(args.repeat)]  # a pass with drafts is timed from there on
    if peer:
        peer.seconds(1)  # warm-up
    for one in ours:
        one.warm()
    for row in sampled_rows(grid.rows, args.lines):
        for one in everyone:
            steps[one.name].append([])
        for one in ours:
            one.prepare(row)
            one.steps(0, 1)  # warm-up
            read[one.name].append(one.cache_read())
            ends[one.name].append([])
        for first in range(0, args.repeat, block):
            turn = columns[first : first + block]
            for one in ours:
                steps[one.name][-1] += [timed(device, partial(one.steps, column, 1)) for column in turn]
            if peer:
                steps[peer.name][-1] += peer.seconds(len(turn))
        if row + 1 < grid.rows:
            for repeat in range(max(args.repeat // 2, 1)):
                for one in ours:
                    if repeat:
                        one.prepare(row)
                        one.steps(0, grid.cols if args.device != "cpu" else 1)
                    ends[one.name][-1].append(timed(device, one.end))
        yield from_lines(everyone, grid, prefill, steps, ends, read)


def from_lines(
    everyone: list[Any],
    grid: Grid,
    prefill: dict[str, list[float]],
    steps: dict[str, list[list[float]]],
    ends: dict[str, list[list[float]]],
    read: dict[str, list[int]],
) -> list[dict[str, Any]]:
    """Extrapolate from the times of some lines to an image."""
    results = []
    for one in everyone:
        end = [statistics.median(e) if e else 0.0 for e in ends.get(one.name, [])] or [0.0]
        step = [statistics.median(s) for s in steps[one.name]]
        every = [s for line in steps[one.name] for s in line]
        line = [grid.cols * s + e for s, e in zip(step, end * (len(step) // len(end)), strict=True)]
        image = statistics.median(prefill[one.name]) + grid.rows * statistics.mean(line)
        bytes_read = statistics.mean(read[one.name]) if one.name in read else None
        result = {"name": one.name, "prefill_ms": spread(prefill[one.name]), "step_ms": spread(every)}
        result |= {"extrapolated_from_lines": len(step), "cache_read": bytes_read}
        if getattr(one, "window", 0):
            base = next((o for o in everyone if isinstance(o, Ours) and o.without_drafts(one)), None)
            result["drafts"] = one.window
            if base:
                alone = statistics.median(s for line in steps[base.name] for s in line)
                result["steps_a_pass"] = round(statistics.median(every) / alone, 3)
        else:
            result |= {
                "line_ms": round(1e3 * statistics.mean(line), 2),
                "line_end_share": round(statistics.mean(end) / statistics.mean(line), 4),
                "image_seconds": round(image, 3),
            }
        results.append(result)
    return results


def time_images(ours: list[Ours], peer: Peer | None, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """Time all contenders on whole images, drawn in turns by the real loops; yields the results after each turn."""
    everyone: list[Any] = [*ours, *([peer] if peer else [])]
    seconds: dict[str, list[float]] = {one.name: [] for one in everyone}
    lines: dict[str, list[float]] = {one.name: [] for one in ours}
    for repeat in range(args.repeat + 1):
        for one in everyone:
            taken = timed(args.device, lambda one=one: lines.__setitem__(one.name, one.picture()[0]))
            if repeat:  # the first is a warm-up
                seconds[one.name].append(taken)
        if repeat:
            found = [
                {
                    "name": one.name,
                    "line_ms": round(1e3 * statistics.median(lines[one.name]), 2) if isinstance(one, Ours) else None,
                    "image_seconds": round(statistics.median(seconds[one.name]), 3),
                    "image_spread_ms": spread(seconds[one.name]),
                    "extrapolated_from_lines": 0,
                }
                for one in everyone
            ]
            for one, result in zip(ours, found, strict=False):
                base = next((o for o in ours if o.without_drafts(one)), None)
                if one.window:
                    result |= {"drafts": one.window, "passes": one.run.passes, "accepted": one.run.accepted}
                    result["tokens_per_pass"] = round(one.run.tokens_per_pass, 3)
                if one.window and base:  # of each turn, whose images were drawn right after one another
                    ratios = [a / b for a, b in zip(seconds[base.name], seconds[one.name], strict=True)]
                    result["times_without"] = round(statistics.median(ratios), 3)
            yield found


def peak_memory(one: Ours, before: float, weights: int, device: str) -> dict[str, float]:
    """Peak memory of a prompt, a token and a line's end, and the prediction for a run."""
    peak = Peak(device)
    one.allocate()
    one.prefill()
    row = min(one.plan.budget, one.grid.rows - 2)
    one.prepare(row)
    one.steps(0, 1)
    one.end()
    shape = one.model.cache_shape(one.rows.length)
    kind = device.partition(":")[0]
    predicted = weights + run_bytes(shape, one.grid, one.plan, one.rows.rows, one.model.codes, kind, one.window)
    found = {"peak_mib": (peak.bytes - before) / MIB, "predicted_mib": predicted / MIB}
    found |= {"cache_bytes": one.cache.nbytes, "planned_bytes": shape.bytes(one.grid, one.plan, one.rows.rows)}
    del one.cache, one.logits, one.drafts
    return found


def measure(
    shape: ModelShape, images: int, args: argparse.Namespace, bandwidth: float
) -> Iterator[list[dict[str, Any]]]:
    """Every plan and kind of step for one model and batch size; yields the results so far, the last time all."""
    before = 0.0 if args.device.startswith("cuda") else resident()
    published: dict[str, torch.Tensor] = {}
    ours, read, stored = [], {}, {}
    for dtype, weights in product(args.dtype, args.weights):
        model = shape.make(DTYPES[dtype], args.device)
        if args.against:  # before packing, which changes the matrices
            published = dict(model.state_dict())
        if weights != "default":
            quantise_model(model, stored_in(QUANTISATIONS[weights]))
        tables = sum(p.nbytes for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
        size = sum(p.nbytes for p in model.parameters())
        if args.device == "cpu" and not args.unpacked and pack(model) and args.against:
            before += size - tables  # the peer keeps the unpacked matrices
        for plan in args.plans:
            name = plan.policy if plan.policy == "full" else f"{plan.policy} {plan.budget}/{shape.grid.rows}"
            for kind, attention, window in product(args.steps, args.attention, args.drafts):
                label = name + f" {plan.storage}" * (plan.storage != "full")
                label += "".join(f" {word}" for word in (kind, attention) if word not in ("eager", "sdpa"))
                label += f" drafts {window}" * (window > 0)
                label += f", {dtype}" * (len(args.dtype) > 1) + f", {weights} weights" * (weights != "default")
                ours.append(Ours(label, model, shape, plan, images, kind, attention, window, weights))
                read[label], stored[label] = size - tables, size
    others = sum({id(one.model): stored[one.name] for one in ours}.values())
    held = {}
    for one in ours:
        found = peak_memory(one, before + others - stored[one.name], stored[one.name], args.device)
        dtype = str(one.model.dtype).removeprefix("torch.")
        about = {"attention": one.attention, "dtype": dtype, "weights": one.weights, "weight_bytes": stored[one.name]}
        held[one.name] = found | about
    peer = None
    if args.against:
        peer = chosen(args.against)(args.against, model, published, shape, images)
        same_logits(ours[0], peer)
    for results in (time_lines if args.lines else time_images)(ours, peer, args):
        base = next((r["image_seconds"] for r in results if peer and r["name"] == peer.name), None)
        for result in results:
            seconds = result.get("image_seconds")
            result |= {"model": shape.name, "images": images}
            if seconds:
                result["images_per_second"] = images / seconds
                result["tokens_per_second"] = images * shape.grid.rows * shape.grid.cols / seconds
            if base and seconds:
                result["times_published"] = round(base / seconds, 2)
            if result.get("cache_read") is not None:
                achieved = (read[result["name"]] + result["cache_read"]) / (result["step_ms"]["median"] / 1e3)
                result |= {"bytes_per_second": achieved, "of_copy_bandwidth": round(achieved / bandwidth, 3)}
            result |= held.get(result["name"], {"dtype": args.dtype[0]})
        for one, result in zip(ours, results, strict=False):  # the peer comes last
            result["not_recorded"] = one.not_recorded()
        yield results


def same_logits(one: Ours, peer: Peer) -> None:
    """Exit unless the peer computes the same logits: otherwise there is nothing to compare."""
    one.allocate()
    one.prefill()
    off = float((one.logits - peer.prefill()).abs().max())
    del one.cache
    if off > (1e-3 if one.model.dtype == torch.float32 else 0.5):
        raise SystemExit(f"--against: the logits of {peer.label} differ from ours by {off:.2g}; is it unmodified?")


HEAD = (
    f"{'model':17}{'images':>7} {'cache':31}{'prefill ms':>11}{'step ms':>9}{'quartiles':>17}{'line ms':>9}{'end':>6}"
    f"{'tok/s':>9}{'img/s':>9}{'of copy':>8}{'MiB':>8}{'predict.':>9}{'x publ.':>8}{'a pass':>16}"
)


def row_of(r: dict[str, Any]) -> str:
    step, prefill = r.get("step_ms"), r.get("prefill_ms")

    def some(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    a_pass = "-"
    if r.get("steps_a_pass"):
        a_pass = f"{r['steps_a_pass']:.2f} steps"
    elif r.get("passes"):
        a_pass = f"{r['tokens_per_pass']:.2f} tokens" + (f" x{r['times_without']:.2f}" if "times_without" in r else "")
    quartiles = f"{step['low']:.1f} - {step['high']:.1f}" if step else "-"
    return (
        f"{r['model']:17}{r['images']:>7} {r['name']:31}{some(prefill and prefill['median'], '.1f'):>11}"
        f"{some(step and step['median'], '.1f'):>9}{quartiles:>17}{some(r.get('line_ms'), '.0f'):>9}"
        f"{some(r.get('line_end_share'), '.1%'):>6}{some(r.get('tokens_per_second'), '.1f'):>9}"
        f"{some(r.get('images_per_second'), '.4f'):>9}"
        f"{some(r.get('of_copy_bandwidth'), '.0%'):>8}{some(r.get('peak_mib'), '.0f'):>8}"
        f"{some(r.get('predicted_mib'), '.0f'):>9}{some(r.get('times_published'), '.2f'):>8}{a_pass:>16}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["LlamaGen-B"], choices=SHAPES, metavar="MODEL",
                        help=", ".join(SHAPES))  # fmt: skip
    parser.add_argument("--images", nargs="+", type=int, default=[16], metavar="N", help="batch sizes (default: 16)")
    parser.add_argument("--plans", nargs="+", default=["full", "line:4", "fold:4"], metavar="PLAN",
                        help="full, policy:lines or policy:lines:int8 (default: full line:4 fold:4)")  # fmt: skip
    parser.add_argument("--steps", nargs="+", default=["eager"], choices=["eager", "compiled", "graph"],
                        help="default: eager")  # fmt: skip
    parser.add_argument("--attention", nargs="+", default=["sdpa"], choices=ATTENTIONS,
                        help="for a token: PyTorch's, or our kernel for NVIDIA GPUs (default: sdpa)")  # fmt: skip
    parser.add_argument("--drafts", nargs="+", type=int, default=[0], metavar="TOKENS",
                        help="tokens that one pass checks; 0: no drafts (default: 0)")  # fmt: skip
    parser.add_argument("--lines", type=int, default=0, metavar="N", help="time N lines only and extrapolate")
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help="steps per line, or images (default: 7)")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="default: float32")
    parser.add_argument("--weights", nargs="+", default=["default"], choices=["default", *QUANTISATIONS],
                        help="how matrices are stored (default: as computed)")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--unpacked", action="store_true", help="do not pack the weight matrices (CPU)")
    parser.add_argument("--against", metavar="PATH", help=f"published loop to compare with, using our weights. {WHICH}")
    parser.add_argument(
        "--out", metavar="NAME|FILE.json", help="also write bench/results/speed-NAME.json, or that file"
    )
    args = parser.parse_args()
    out = output_file(args.out, parser)
    args.plans = [plan_of(text, parser) for text in args.plans]
    if args.against and (why := problem(args.against, [SHAPES[name] for name in args.models])):
        parser.error(f"--against: {why}")
    if args.against and len(args.dtype) + len(args.weights) > 2:
        parser.error("--against: choose one --dtype and one kind of --weights.")
    for dtype in args.dtype if "kernel" in args.attention else ():
        if why := no_kernel(torch.device(args.device), DTYPES[dtype]):
            parser.error(f"--attention: the kernel cannot be used because {why}.")
    torch.manual_seed(0)
    if args.device == "cpu" and (note := limit_threads()):
        print(f"note: {note}. Timings taken next to other programs prove little.", file=sys.stderr)
    about = circumstances(args.device)
    if "kernel" in args.attention:
        about["triton"] = import_module("triton").__version__
    if args.against == "transformers":
        about["transformers"] = version("transformers")
    bandwidth = copy_bandwidth(args.device)
    print(
        f"{about['device']}, {about['threads']} of {about['cores']} cores, torch {about['torch']}, "
        f"load {about['load']}, {', '.join(args.dtype)}, copies {bandwidth / 1e9:.1f} GB/s"
    )
    print(HEAD)
    measured: dict[tuple[str, int], list[dict[str, Any]]] = {}

    def document() -> dict[str, Any]:
        return {
            "circumstances": about | {"load_after": load(), "copy_bytes_per_second": bandwidth},
            "command": ["bench/speed.py", *_public_arguments(sys.argv[1:], args)],
            "results": [result for results in measured.values() for result in results],
        }

    def write(stopped: dict[str, str]) -> None:
        if out and measured:
            out.write_text(json.dumps(document() | stopped, indent=1) + "\n")
            if stopped:
                print(f"The results so far are in {out}.", file=sys.stderr)

    with in_any_case(write), torch.inference_mode():
        for name in args.models:
            for images in args.images:
                for results in measure(SHAPES[name], images, args, bandwidth):
                    measured[name, images] = results
                print("\n".join(map(row_of, measured[name, images])), flush=True)
    if args.against:
        print(chosen(args.against).description)
    if args.lines:
        print(f"Lines, images and their ratios are extrapolated from {args.lines} lines of each image.")
    print(json.dumps(document()))
    return 0


def output_file(out: str | None, parser: argparse.ArgumentParser) -> Path | None:
    """The file that --out names, which can be written; None: none."""
    if out is None:
        return None
    path = Path(out).expanduser()
    if path.suffix != ".json":
        if path.name != out:
            parser.error(f"--out: '{out}' is neither a name nor a file; end a file's name in .json.")
        path = RESULTS / f"speed-{out}.json"
    check_out(path, parser)
    return path


def _public_arguments(words: list[str], args: argparse.Namespace) -> list[str]:
    """The command as given, without the path of the peer on this machine."""
    return [chosen(args.against).label if args.against and word == args.against else word for word in words]


if __name__ == "__main__":
    sys.exit(main())
