r"""Masked models: what a step of MAR takes, and how far keeping keys and values moves what it says.

    python bench/masked.py                                MAR-B's size with random weights: time alone
    python bench/masked.py --against PATH                 the published code too, from a checkout of LTH14/mar
    python bench/masked.py --model FILE --errors          a file's weights, and errors besides
    python bench/masked.py --size small --errors --out small   also writes bench/results/masked-small.json

Time is the process's own CPU time, which other programs change little, of single passes in turns, at three places of a
picture; over its 64 steps it is interpolated. `--whole` draws whole pictures instead.

Errors are teacher-forced: every rule sees the same latents, so what differs comes from what was kept. The number is the
relative error of the conditions z, |z - z'| / |z|, over the steps between two full ones; a step that is full begins
each stretch, so a stretch stands for the whole picture there. Latents are those of `--latents FILE.pt` (1 Z h w, as the
model sees them), or random. With random weights errors rank nothing: attention is nearly even then.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import check_out, circumstances, in_any_case
from linear_core.checkpoints import library
from linear_core.checkpoints.weights import load_into
from linear_core.loop.masked import Masked, generate_masked
from linear_core.models.denoise import schedule
from linear_core.models.mar import MAR, MARConfig
from linear_core.models.packed import pack
from linear_core.plan import SamplePlan
from linear_core.prompts import class_prompt
from linear_core.steps import RULES, STEP_CACHES, MaskedPlan, StepCachePlan

RESULTS = Path(__file__).parent / "results"
SIZES = {
    "B": MARConfig(12, 12, 768, 12, 3072, 1000, 256, 64, 16, 1024, 6),
    "L": MARConfig(16, 16, 1024, 16, 4096, 1000, 256, 64, 16, 1280, 8),
    "small": MARConfig(6, 6, 192, 3, 768, 1000, 256, 64, 16, 256, 3),
    "tiny": MARConfig(2, 2, 32, 2, 64, 10, 64, 4, 16, 16, 1),
}
PLACES = (8, 32, 58)  # steps of 64 that are measured
REFRESH = (0, 32, 64, 128)
OFF = STEP_CACHES["Off"]
# As published (100 denoising steps), and DiSA's: from 50 to 5, from t = 950.
PUBLISHED, DISA = MaskedPlan(), MaskedPlan(denoising=50, denoising_last=5, start=950)


def random_model(config: MARConfig) -> MAR:
    """Weights as before training, except that the head's last layers are not zero, so that they do something."""
    torch.manual_seed(0)
    model = MAR(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "emb." not in name and "latent" not in name:
            torch.nn.init.xavier_uniform_(weight)
        elif weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.02)
    return model


class Published:
    """The published modules with our weights, unchanged but for `.cuda()`, which does nothing here."""

    def __init__(self, against: str, model: MAR, plan: MaskedPlan):
        sys.path.insert(0, against)
        for kind in (Tensor, torch.nn.Module):
            kind.cuda = lambda self, *args, **more: self  # type: ignore[method-assign]
        c = model.config
        self.model = importlib.import_module("models.mar").MAR(
            img_size=16 * c.grid.rows, encoder_embed_dim=c.width, encoder_depth=c.layers, encoder_num_heads=c.heads,
            decoder_embed_dim=c.width, decoder_depth=c.decoder_layers, decoder_num_heads=c.heads,
            mlp_ratio=c.hidden / c.width, class_num=c.classes, buffer_size=c.copies, diffloss_d=c.head_blocks,
            diffloss_w=c.head_width, num_sampling_steps=str(plan.denoising),
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        )  # fmt: skip
        self.model.load_state_dict(model.state_dict())
        self.model.eval()
        self.config = c

    def conditions(self, tokens: Tensor, known: Tensor, label: Tensor) -> Tensor:
        """Of all places: 2 N W, as its loop computes them in a step. tokens 1 N C, known bool 1 N."""
        classes = torch.cat([self.model.class_emb(label), self.model.fake_latent])
        mask = (~known).float().repeat(2, 1)
        x = self.model.forward_mae_encoder(tokens.repeat(2, 1, 1), mask, classes)
        return self.model.forward_mae_decoder(x, mask)

    def draw(self, z: Tensor, guidance: float, noise: Tensor) -> Tensor:
        """Its head on conditions (2 n) W: n C. noise: ours, T n C, in place of its own."""
        given = iter(noise)
        keep = torch.randn, torch.randn_like
        torch.randn = lambda *shape, **more: next(given)  # type: ignore[assignment]
        torch.randn_like = lambda x, **more: next(given, torch.zeros_like(noise[0])).repeat(2, 1)  # type: ignore
        try:
            return self.model.diffloss.sample(z, 1.0, guidance)[: len(z) // 2]
        finally:
            torch.randn, torch.randn_like = keep


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU seconds of this process that `work` takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


@dataclass
class Bench:
    model: MAR
    latents: Tensor
    args: argparse.Namespace

    def run(self, step: int, cache: StepCachePlan, plan: MaskedPlan = PUBLISHED) -> Masked:
        """A picture of which all is known that is drawn before `step`."""
        order = Masked(self.model, class_prompt([1]), SamplePlan(), plan, OFF, None).groups[0].order
        known = (0, *plan.known(self.model.config.tokens))[step]
        tokens = self.model.to_tokens(self.latents).clone()
        tokens[:, order[0, known:]] = float("nan")
        given = self.model.to_latents(tokens)
        return Masked(self.model, class_prompt([1]), SamplePlan(guidance=2.9), plan, cache, given)

    def feed(self, run: Masked) -> None:
        tokens = self.model.to_tokens(self.latents).to(run.tokens)
        run.feed(torch.cat([tokens[image, places] for image, places in run.wanted()]))

    # -- time ----------------------------------------------------------------------------------------------------------

    def transformer(self, step: int, plans: dict[str, StepCachePlan]) -> dict[str, float]:
        """CPU seconds of the pass of one step under each plan, the least of as many as asked.

        A full pass of the step before has filled the cache.
        """
        keeps = StepCachePlan(0, "oldest", 0, 1, 0)
        run = self.run(step - 1, keeps)
        run.conditions(step - 1)
        self.feed(run)
        found, (group,) = dict.fromkeys(plans, 1e9), run.groups
        passed = group.passed
        for _ in range(self.args.repeats):
            for name, plan in plans.items():
                run.cache_plan, group.passed = plan, passed
                cache, group.cache = group.cache, group.cache if plan.keeps(64) else None
                found[name] = min(found[name], cpu_seconds(lambda: run.conditions(step)))
                group.cache = cache
        return found

    def published_pass(self, step: int, published: Published) -> float:
        run = self.run(step, OFF)
        tokens, known = run.tokens.nan_to_num(), run.known
        label = torch.tensor([1])
        return min(cpu_seconds(lambda: published.conditions(tokens, known, label)) for _ in range(self.args.repeats))

    def heads(self, step: int, plan: MaskedPlan, published: Published | None) -> dict[str, float]:
        """CPU seconds of a step's denoising, by our head, and by the published one, and how far they are apart."""
        run = self.run(step, OFF, replace(plan, steps=PUBLISHED.steps))
        (group,) = run.groups  # no pass: conditions are random
        group.drawn = plan.known(self.model.config.tokens)[step]
        z = torch.randn(2 * (group.drawn - group.known), self.model.config.width)
        timesteps = plan.timesteps(step)
        noise, guidance = run.noise(timesteps), run.guidance(step)
        steps = schedule(timesteps, self.model.device)
        found = {"tokens": noise.shape[1], "ours": 1e9}
        theirs = None
        for _ in range(self.args.repeats):
            started = time.process_time()
            drawn = self.model.head(z, noise, steps, guidance)
            found["ours"] = min(found["ours"], time.process_time() - started)
            if published is not None:
                started = time.process_time()
                theirs = published.draw(z, guidance, noise)
                found["published"] = min(found.get("published", 1e9), time.process_time() - started)
        if theirs is not None:
            found["apart"] = float((drawn - theirs).abs().max() / theirs.abs().max())
        return found

    # -- errors --------------------------------------------------------------------------------------------------------

    def stretch(self, first: int, cache: StepCachePlan) -> list[Tensor]:
        """z of the steps from a full one on, up to the next."""
        run, found = self.run(first, cache), []
        for step in range(first, first + self.args.stretch):
            found.append(run.conditions(step))
            self.feed(run)
        return found

    def error(self, first: int, cache: StepCachePlan, plain: list[Tensor]) -> float:
        """Relative error of z, weighted by tokens."""
        kept = torch.cat(self.stretch(first, cache))
        whole = torch.cat(plain)
        return float((kept - whole).norm() / whole.norm())


def over_steps(at: dict[int, float]) -> list[float]:
    """Seconds of each of 64 steps, interpolated between those measured; even beyond the first and the last."""
    steps, found = sorted(at), []
    for step in range(PUBLISHED.steps):
        above = next((s for s in steps if s >= step), steps[-1])
        below = next((s for s in reversed(steps) if s <= step), steps[0])
        share = (step - below) / (above - below) if above > below else 0.0
        found.append(at[below] + share * (at[above] - at[below]))
    return found


def picture(full: list[float], partial: list[float], cache: StepCachePlan) -> float:
    """Seconds of the transformer for a picture under a plan."""
    steps = len(full)
    return sum(full[step] if cache.full(step, steps) else partial[step] for step in range(steps))


def times(bench: Bench, published: Published | None) -> dict[str, Any]:
    tokens = bench.model.config.tokens
    places = [step * PUBLISHED.steps // 64 for step in PLACES]
    plans = {f"K = {count}": StepCachePlan(count, "oldest", 0, 1, 0) for count in REFRESH if count < tokens}
    passes: dict[str, dict[int, float]] = {name: {} for name in ("full", *plans)}
    heads: dict[str, dict[int, dict[str, float]]] = {"100 steps": {}, "DiSA": {}}
    for step in places:
        for name, seconds in bench.transformer(step, {"full": OFF, **plans}).items():
            passes[name][step] = seconds
        if published is not None:
            passes.setdefault("published", {})[step] = bench.published_pass(step, published)
        heads["100 steps"][step] = bench.heads(step, PUBLISHED, published)
        heads["DiSA"][step] = bench.heads(step, DISA, None)
        row = "  ".join(f"{name} {at[step]:.2f}" for name, at in passes.items())
        head = heads["100 steps"][step]
        print(f"step {step}: {row}; head {head['ours']:.2f}"
              + (f", published {head['published']:.2f}, {head['apart']:.0e} apart" if published else "")
              + f", DiSA {heads['DiSA'][step]['ours']:.2f}", flush=True)  # fmt: skip
    return {"passes": passes, "heads": heads} | summary(passes, heads, published is not None)


def summary(
    passes: dict[str, dict[int, float]], heads: dict[str, dict[int, dict[str, float]]], published: bool
) -> dict[str, Any]:
    """Seconds of a picture of 64 steps, transformer and head, for each choice."""
    full = over_steps(passes["full"])
    head = sum(over_steps({s: found["ours"] for s, found in heads["100 steps"].items()}))
    disa = sum(over_steps({s: found["ours"] for s, found in heads["DiSA"].items()}))
    rows = [{"choice": "all steps full", "transformer": sum(full), "head": head}]
    for name, at in passes.items():
        if name.startswith("K"):
            partial, count = over_steps(at), int(name[4:])
            for every, first, last in ((0, 1, 0), (8, 1, 0), (4, 10, 2)):
                cache = StepCachePlan(count, "oldest", every, first, last)
                ends = f", first {first} and last {last} full" if last else ""
                often = f", every {every}th full" if every else ""
                rows.append({"choice": name + often + ends, "transformer": picture(full, partial, cache), "head": head})
    few = MaskedPlan(steps=32)  # twice the tokens a step, which the head does not take twice the time for
    rows.append(
        {"choice": "32 steps, all full, at least", "transformer": sum(full[::2]), "head": head * few.steps / 64}
    )
    rows.append({"choice": "all steps full, DiSA", "transformer": sum(full), "head": disa})
    rows.append({"choice": "32 steps, all full, DiSA, at least", "transformer": sum(full[::2]), "head": disa / 2})
    for row in [row for row in rows if row["choice"].startswith("K = 64, every")]:
        rows.append({"choice": f"{row['choice']}, DiSA", "transformer": row["transformer"], "head": disa})
    if published:
        theirs = over_steps({s: found["published"] for s, found in heads["100 steps"].items()})
        rows.append(
            {"choice": "published code", "transformer": sum(over_steps(passes["published"])),
             "head": sum(theirs)}
        )  # fmt: skip
    base = rows[-1] if published else rows[0]
    print(f"{'a picture of 64 steps, CPU seconds':48}{'transformer':>12}{'head':>8}{'sum':>8}{'times faster':>14}")
    for row in rows:
        row["sum"] = row["transformer"] + row["head"]
        row["faster"] = (base["transformer"] + base["head"]) / row["sum"]
        print(
            f"{row['choice']:48}{row['transformer']:>12.1f}{row['head']:>8.1f}{row['sum']:>8.1f}{row['faster']:>14.2f}"
        )
    return {"picture": rows, "base": base["choice"]}


def errors(bench: Bench) -> list[dict[str, Any]]:
    """Each rule with as many refreshed slots, at three stretches of a picture."""
    found = []
    plain = {first: bench.stretch(first, OFF) for first in bench.args.stretches}
    cases = [("none", 0)] + [(rule, count) for rule in bench.args.rules for count in bench.args.refresh]
    for rule, count in cases:
        cache = StepCachePlan(count, rule if count else "oldest", 0, 1, 0)
        at = {first: bench.error(first, cache, z) for first, z in plain.items()}
        found.append({"rule": rule, "refresh": count, "z error": at})
        print(f"{rule:16}{count:>5}  " + "  ".join(f"from {first}: {one:.4f}" for first, one in at.items()), flush=True)
    return found


def whole(bench: Bench) -> list[dict[str, Any]]:
    """Whole pictures by our loop, the plans one after the other."""
    found = []
    kept = StepCachePlan(64, "oldest", 8, 1, 0)
    for name, cache, plan in (("all steps full", OFF, PUBLISHED), ("K = 64, every 8th full, DiSA", kept, DISA)):
        started = time.process_time()
        steps = list(generate_masked(bench.model, class_prompt([1]), SamplePlan(guidance=2.9), plan, cache))
        seconds = time.process_time() - started
        found.append({"choice": name, "seconds": seconds, "steps": len(steps), "added": steps[-1].cache_bytes})
        print(f"{name}: {seconds:.1f} CPU seconds", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FILE", help="a MAR file, instead of random weights")
    parser.add_argument("--size", default="B", choices=SIZES, help="of the random weights (default: B)")
    parser.add_argument("--against", metavar="PATH", help="a checkout of LTH14/mar, timed in turns with ours")
    parser.add_argument("--no-times", action="store_true", help="no times")
    parser.add_argument("--errors", action="store_true", help="errors of z as well")
    parser.add_argument("--whole", action="store_true", help="whole pictures as well")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES, help="default: all")
    parser.add_argument("--refresh", nargs="+", type=int, default=REFRESH[1:], metavar="TOKENS",
                        help="for the errors (default: 32 64 128)")  # fmt: skip
    parser.add_argument("--stretches", nargs="+", type=int, default=[2, 26, 50], metavar="STEP",
                        help="where a full step is followed by others (default: 2 26 50)")  # fmt: skip
    parser.add_argument("--stretch", type=int, default=8, metavar="N", help="steps of a stretch (default: 8)")
    parser.add_argument("--latents", metavar="FILE.pt", help="real latents, for errors")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="the least of so many passes counts")
    parser.add_argument("--out", metavar="NAME", help="also write bench/results/masked-NAME.json")
    args = parser.parse_args()
    out = RESULTS / f"masked-{args.out}.json" if args.out else None
    if out:
        check_out(out, parser)
    if args.model:
        weights = library.read_checkpoint(args.model)
        info = library.describe(weights)
        with torch.device("meta"):
            model = MAR(info.config)
        load_into(model, weights, torch.float32)
        model = model.eval().requires_grad_(False)
    else:
        model = random_model(SIZES[args.size])
    grid, patch = model.grid, model.config.patch
    shape = (1, model.config.channels, grid.rows * patch, grid.cols * patch)
    torch.manual_seed(1)
    latents = torch.load(args.latents, weights_only=True) if args.latents else torch.randn(shape)
    published = Published(args.against, model, PUBLISHED) if args.against else None
    pack(model)
    bench = Bench(model, latents.reshape(shape), args)
    results: dict[str, Any] = {}
    command = ["bench/masked.py", *("PATH" if word == args.against else word for word in sys.argv[1:])]

    def write(stopped: dict[str, str]) -> None:
        if out and results:
            document = {"circumstances": circumstances("cpu"), "command": command}
            out.write_text(json.dumps(document | results | stopped, indent=1) + "\n")

    with in_any_case(write), torch.inference_mode():
        if not args.no_times:
            results["times"] = times(bench, published)
        if args.errors:
            results["errors"] = errors(bench)
        if args.whole:
            results["whole"] = whole(bench)
    return 0


if __name__ == "__main__":
    sys.exit(main())
