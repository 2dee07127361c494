r"""Drafts: how many passes an image takes, whether its codes stay the same, and which tokens are guessed right.

    python bench/drafts.py                               16 images, windows of 8, 16, 24 and 48 tokens
    python bench/drafts.py --images 200 --drafts 24      how many of 200 images differ from those drawn without drafts
    python bench/drafts.py --out landscapes              also writes bench/results/drafts-landscapes.json

The model is the bundled one, with a class and a seed for each image. Counts do not depend on the machine, so they can
be taken next to other programs; `bench/speed.py --drafts` is about time.

Logits of a pass over many tokens differ from those of a step in their last digits. An image in which that decides
between two codes is listed with the first token that differs and by how much the code drawn without drafts had won
there, in nats.

`by_entropy` sorts all tokens by the entropy of their distribution, with guidance and before noise, and says what share
of the drafts for them that were checked was right: for groups of equal size, from the smallest entropies on.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import check_out, circumstances, in_any_case
from linear_core.checkpoints.library import bundled_files, load_model
from linear_core.loop.drafts import Drafts, check
from linear_core.loop.generate import Run, generate, scores
from linear_core.loop.sampling import Noise
from linear_core.models.packed import pack
from linear_core.plan import STORAGES, CachePlan, SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import Prompt, class_prompt

RESULTS = Path(__file__).parent / "results"
GROUPS = 6  # of tokens, by entropy
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


class Plain:
    """Images drawn one token after another, with the entropy of every token and by how much its code won: B tokens."""

    def __init__(self, model: Any, prompt: Prompt, plan: CachePlan, sample: SamplePlan):
        entropy, margin = [], []
        noise = Noise(sample.seed, prompt.rows, model.codes, model.device)

        def look(number: int, logits: Tensor) -> Tensor:
            given = scores(logits, number, prompt.rows, sample).float() / (sample.temperature or 1.0)
            entropy.append(torch.special.entr(given.softmax(-1)).sum(-1))
            race = given if sample.temperature == 0 else given - noise.exponential(number).log()
            first, second = race.topk(2).values.unbind(-1)
            margin.append(first - second)
            return logits

        def step(token: Tensor, index: Tensor, *given: Any) -> Tensor:
            return look(len(entropy), model.step(token, index, *given))

        first = model.prefill

        def prefill(*given: Any) -> Tensor:
            return look(0, first(*given))

        model.prefill = prefill
        try:
            self.codes = torch.cat([line.tokens for line in generate(model, prompt, plan, sample, step=step)], 1)
        finally:
            del model.prefill
        self.entropy, self.margin = torch.stack(entropy, 1), torch.stack(margin, 1)


class Drafted:
    """The same images drawn with drafts, and for every token whether a draft of it was checked, and right: B tokens."""

    def __init__(self, model: Any, prompt: Prompt, plan: CachePlan, sample: SamplePlan):
        tokens = model.grid.tokens
        self.checked, self.right = (torch.zeros(prompt.rows, tokens, dtype=torch.bool) for _ in range(2))

        def watched(drafts: Drafts, stop: int) -> None:
            before = drafts.number.tolist()
            check(drafts, stop)
            for image, (first, last) in enumerate(zip(before, drafts.number.tolist(), strict=True)):
                self.right[image, first + 1 : last] = True
                self.checked[image, first + 1 : min(last + 1, stop, first + drafts.size)] = True

        self.run = Run()
        for line in generate(model, prompt, plan, sample, check_drafts=watched):
            self.run.add(line)
        self.codes = self.run.tokens.flatten(1)


def by_entropy(entropy: Tensor, checked: Tensor, right: Tensor) -> list[dict[str, float]]:
    """Groups of equally many tokens: their mean entropy in nats, and the share of drafts that were right."""
    groups = entropy.flatten().argsort().chunk(GROUPS)
    found = []
    for group in groups:
        some = group[checked.flatten()[group]]
        found.append(
            {
                "entropy": round(float(entropy.flatten()[group].mean()), 3),
                "drafts": len(some),
                "right": round(float(right.flatten()[some].float().mean()), 3) if len(some) else 0.0,
            }
        )
    return found


def differences(plain: Plain, drafted: Drafted, seed: int) -> list[dict[str, Any]]:
    """Images whose codes differ: seed, the first token that differs, and by how many nats it had won."""
    found = []
    for image in range(len(plain.codes)):
        different = (plain.codes[image] != drafted.codes[image]).nonzero()
        if len(different):
            number = int(different[0])
            found.append({"seed": seed + image, "token": number, "won_by": float(plain.margin[image, number])})
    return found


def measure(model: Any, info: Any, args: argparse.Namespace, size: int, plain: dict[int, Plain]) -> dict[str, Any]:
    """All images with one window."""
    runs, different, parts = [], [], []
    for first in range(0, args.images, args.at_once):
        images = range(first, min(first + args.at_once, args.images))
        prompt = class_prompt([image % info.config.classes for image in images])
        sample = replace(info.defaults, seed=args.seed + first, guidance=args.guidance, temperature=args.temperature)
        if first not in plain:
            plain[first] = Plain(model, prompt, args.plan, sample)
        drafted = Drafted(model, prompt, args.plan, replace(sample, drafts=size))
        different += differences(plain[first], drafted, args.seed + first)
        runs.append(drafted.run)
        parts.append((plain[first].entropy, drafted.checked, drafted.right))
        print(f"window {size}: {images.stop} images, {len(different)} differ", file=sys.stderr, flush=True)
    entropy, checked, right = (torch.cat(each) for each in zip(*parts, strict=True))
    passes = sum(run.passes for run in runs) / len(runs)
    return {
        "drafts": size,
        "images": args.images,
        "at_once": min(args.at_once, args.images),
        "passes": passes,
        "passes_per_token": round(passes / info.grid.tokens, 4),
        "tokens_per_pass": round(info.grid.tokens / passes, 3),
        "accepted": round(float(right.sum() / checked.sum()), 3) if checked.any() else 0.0,
        "different": different,
        "by_entropy": by_entropy(entropy, checked, right),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--at-once", type=int, default=1, metavar="N",
                        help="images of a batch; they wait for each other at a line's end (default: 1)")  # fmt: skip
    parser.add_argument("--drafts", nargs="+", type=int, default=[8, 16, 24, 48], metavar="TOKENS",
                        help="default: 8 16 24 48")  # fmt: skip
    parser.add_argument("--policy", default="fold", choices=POLICIES, help="default: fold")
    parser.add_argument("--budget", type=int, default=4, metavar="LINES", help="default: 4")
    parser.add_argument("--storage", default="full", choices=STORAGES)
    parser.add_argument("--guidance", type=float, default=3.0, help="default: 3")
    parser.add_argument("--temperature", type=float, default=1.0, help="default: 1")
    parser.add_argument("--seed", type=int, default=0, help="image i uses seed + i (default: 0)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--out", metavar="NAME", help="also write bench/results/drafts-NAME.json")
    args = parser.parse_args()
    out = RESULTS / f"drafts-{args.out}.json" if args.out else None
    if out:
        check_out(out, parser)
    args.plan = CachePlan(args.policy, budget=args.budget, recent=0, storage=args.storage)
    model = load_model(bundled_files(), dtype=DTYPES[args.dtype])
    pack(model.decoder)
    results: list[dict[str, Any]] = []
    plain: dict[int, Plain] = {}

    def write(stopped: dict[str, str]) -> None:
        if out and results:
            document = {"circumstances": circumstances("cpu"), "command": ["bench/drafts.py", *sys.argv[1:]]}
            out.write_text(json.dumps(document | {"results": results} | stopped, indent=1) + "\n")

    print(
        f"{'window':>6}{'passes':>9}{'a token':>9}{'tokens a pass':>15}{'right':>7}{'different':>11}  right by entropy"
    )
    with in_any_case(write), torch.inference_mode():
        for size in args.drafts:
            results.append(found := measure(model.decoder, model.info, args, size, plain))
            groups = "  ".join(f"{group['entropy']:.2f}: {group['right']:.0%}" for group in found["by_entropy"])
            print(
                f"{size:>6}{found['passes']:>9.1f}{found['passes_per_token']:>9.3f}{found['tokens_per_pass']:>15.2f}"
                f"{found['accepted']:>7.0%}{len(found['different']):>11}  {groups}",
                flush=True,
            )
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
