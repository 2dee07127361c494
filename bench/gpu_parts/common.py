"""What the parts of bench/gpu.py share: sizes, timing on the device, and measurements that fail alone."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bench.gpu import Ask
from bench.machine import Peak, circumstances, resident, spread, synchronize, timed
from bench.shapes import SHAPES, ModelShape, count
from bench.speed import Ours, sampled_rows
from linear_core.cache.attention import no_kernel
from linear_core.grid import Grid
from linear_core.loop.graph import cuda_graph
from linear_core.loop.memory import run_bytes
from linear_core.models.janus import Janus, JanusConfig
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.plan import CachePlan, SamplePlan

GB = 1e9
DTYPE = torch.bfloat16
Result = dict[str, Any]


def about(device: str, commit: str = "") -> Result:
    """Circumstances of everything that a part measures."""
    told = circumstances(device)
    if commit:
        told["commit"] = commit
    for package in ("triton", "transformers"):
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            told[package] = "not installed"
    return told


def on_gpu(ask: Ask) -> bool:
    return ask.device.startswith("cuda")


def shape_of(ask: Ask, name: str) -> ModelShape:
    """A published model's shape; in a dry run a tiny model of the same kind."""
    if not ask.dry:
        return SHAPES[name]
    if SHAPES[name].network is Janus:
        config = JanusConfig(2, 48, 3, 80, codes=40, vocabulary=60, head_hidden=48)
        return ModelShape(name, Janus, config, Grid(4, 5), SamplePlan(guidance=5.0), prompt_tokens=9)
    small = LlamaGenConfig(2, 32, 2, 48, 64, classes=1000)
    return ModelShape(name, LlamaGen, small, Grid(6, 5), SamplePlan(guidance=4.0, top_k=20))


def plan_of(ask: Ask, policy: str, storage: str = "full") -> CachePlan:
    """4 of 24 lines; in a dry run 2 of a tiny model's."""
    if policy == "full":
        return CachePlan("full", storage=storage)
    budget = 2 if ask.dry else 4
    return CachePlan(policy, budget, recent=0 if policy == "fold" else 1 if ask.dry else 2, storage=storage)


def name_of(plan: CachePlan, grid: Grid) -> str:
    name = "full" if plan.policy == "full" else f"{plan.policy} {plan.budget}/{grid.rows}"
    return name if plan.storage == "full" else f"{name} {plan.storage}"


def bandwidth_of(ask: Ask) -> float:
    """Bytes read and written per second by a copy that no cache of a GPU holds."""
    source = torch.ones(2**20 if ask.dry else 2**29, dtype=DTYPE, device=ask.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(ask, lambda: target.copy_(source))


def why_no_kernel(ask: Ask, dtype: torch.dtype = DTYPE) -> str:
    return no_kernel(torch.device(ask.device), dtype)


def release(ask: Ask) -> None:
    """Give all memory back that nothing holds any more."""
    gc.collect()
    if on_gpu(ask):
        torch.cuda.empty_cache()


def attempts(ask: Ask, works: list[tuple[Result, Callable[[], Result]]]) -> Iterator[Result]:
    """The result of each work, with what it is called. One that fails says so, and the next is tried.

    An error that CUDA reports late leaves nothing usable behind, so it ends the part.
    """
    for number, (called, work) in enumerate(works):
        if ask.left <= 0:
            yield {"left_out": [what for what, _ in works[number:]]}
            return
        try:
            result = work()
        except Exception as error:
            if "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
                raise
            result = {"failed": f"{type(error).__name__}: {error}"[:600]}
        yield called | result
        release(ask)


def seconds_of(ask: Ask, work: Callable[[], Any], repeat: int = 7) -> float:
    """Median seconds that the device needs for `work`, after a run that is not counted."""
    work()
    synchronize(ask.device)
    if not on_gpu(ask):  # a dry run, whose numbers mean nothing
        return timed(ask.device, work)
    taken = []
    for _ in range(repeat):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        work()
        last.record()
        last.synchronize()
        taken.append(first.elapsed_time(last) / 1e3)
    return statistics.median(taken)


def recorded(ask: Ask, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work` as a CUDA graph, so that launching costs nothing; itself in a dry run. It runs once before."""
    work()
    synchronize(ask.device)
    return cuda_graph(work) if on_gpu(ask) else work


def drawing(
    ask: Ask,
    model: Any,
    shape: ModelShape,
    plan: CachePlan,
    images: int,
    step: str,
    attention: str,
    bandwidth: float,
    lines: int = 3,
) -> Result:
    """Time, memory and bandwidth of one way to draw, extrapolated from a few lines of the image.

    Steps are timed a line at a time, without waiting for the device in between, as the loop draws.
    """
    before = 0.0 if on_gpu(ask) else resident()
    peak = Peak(ask.device)
    one = Ours("", model, shape, plan, images, step, attention)
    one.allocate()
    grid, rows = one.grid, sampled_rows(one.grid.rows, 1 if ask.dry else lines)
    one.prefill()
    prefill = [timed(ask.device, one.prefill) for _ in range(1 if ask.dry else 3)]
    one.warm()
    steps: list[float] = []
    ends: list[float] = []
    read: list[int] = []
    stop = time.monotonic() + 12  # enough for a median, and the next ways want their turn
    for row in rows:
        for _ in range(1 if ask.dry else 3):
            one.prepare(row)
            one.steps(0, 1)
            steps.append(timed(ask.device, partial(one.steps, 1, grid.cols - 1)) / (grid.cols - 1))
            read.append(one.cache_read())
            if row + 1 < grid.rows:
                ends.append(timed(ask.device, one.end))
            if min(ask.ends, stop) < time.monotonic():
                break
    step_s, end_s = statistics.median(steps), statistics.median(ends or [0.0])
    line = grid.cols * step_s + end_s
    image = statistics.median(prefill) + grid.rows * line
    weights, weights_read = (n * model.dtype.itemsize for n in count(model))
    device = ask.device.partition(":")[0]
    cache = model.cache_shape(one.rows.length)
    planned = weights + run_bytes(cache, grid, plan, one.rows.rows, model.codes, device)
    found = (peak.bytes - before) + (0 if on_gpu(ask) else weights)
    achieved = (weights_read + statistics.mean(read)) / step_s
    return {
        "prefill_ms": round(1e3 * statistics.median(prefill), 3),
        "step_ms": spread(steps),
        "line_end_ms": round(1e3 * end_s, 3),
        "line_end_share": round(end_s / line, 4) if plan.evicts(grid) else None,
        "image_seconds": round(image, 4),
        "images_per_second": images / image,
        "extrapolated_from_lines": len(rows),
        "of_copy_bandwidth": round(achieved / bandwidth, 4),
        "of_weight_bound": round(weights_read / bandwidth / step_s, 4),
        "copy_bytes_per_second": bandwidth,
        "peak_gb": found / GB,
        "plan_gb": planned / GB,
        "peak_over_plan": round(found / planned, 4) if on_gpu(ask) else None,
        "cache_bytes": one.cache.nbytes,
        "planned_cache_bytes": cache.bytes(grid, plan, one.rows.rows),
        "not_recorded": one.not_recorded() if step == "graph" else {},
    }


def ways(ask: Ask, wanted: list[tuple[str, str, str, str]]) -> list[tuple[CachePlan, str, str]]:
    """(policy, storage, step, attention) as plans; those with the kernel are left out where it cannot run."""
    return [
        (plan_of(ask, policy, storage), step, attention)
        for policy, storage, step, attention in wanted
        if attention == "sdpa" or not why_no_kernel(ask)
    ]
