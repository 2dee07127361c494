"""What choosing among several pictures of a prompt is worth, on the bundled model.

    python bench/best_of.py [--rounds 8] [--out bench/results/best-of-landscapes.json]
    python bench/best_of.py --table

A round draws 16 pictures of each of the 12 classes. From each class's first 1, 4 and 16, the one with the highest score
is chosen, so all have the same seeds in common. Scores: the model's guided log-likelihood of its own picture, and how
much likelier the prompt makes the picture than no prompt does (`prompt_match`); `random` takes any, as a control.
Measured are the accuracy of the class and the Fréchet distance to held-out scenes, in the features of the small
classifier of training/train_classifier.py, which the model has never seen.

Results are written after every round, so it can be stopped at any time; a later run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import machine
from bench.uncertainty import frechet, share_interval
from linear_core.checkpoints.library import bundled_files, load_model
from linear_core.loop.forced import log_likelihood, prompt_match
from linear_core.loop.generate import Run, generate
from linear_core.loop.redraw import best_of
from linear_core.loop.threads import limit_threads
from linear_core.models.packed import pack
from linear_core.plan import PRESETS, CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from training.scenes import batch
from training.train_classifier import load_classifier, pictures

OF = (1, 4, 16)
SEED = 770_000
REAL, REAL_SEED = 480, 880_000  # held-out scenes
SCORES = ("likelihood", "match", "random")
OUT = Path(__file__).parent / "results" / "best-of-landscapes.json"


class Round:
    """Pictures of every class, what the scores say of them, and what the classifier does."""

    def __init__(self, plan: CachePlan, at_once: int):
        self.model, self.plan, self.at_once = load_model(bundled_files()), plan, at_once
        pack(self.model.decoder)
        self.classes, self.classifier = len(self.model.info.classes), load_classifier()

    @torch.inference_mode()
    def features(self, images: Tensor) -> tuple[np.ndarray, list[int]]:
        """Features N F and classes of pictures N 3 H W in -1..1."""
        found = torch.cat([self.classifier.features(part) for part in images.split(64)])
        return found.double().numpy(), self.classifier.head(found).argmax(1).tolist()

    @torch.inference_mode()
    def real(self) -> np.ndarray:
        """Features of held-out scenes, after the tokenizer."""
        tokenizer, scenes = self.model.tokenizer, pictures(batch(REAL_SEED, REAL)[0])
        return self.features(torch.cat([tokenizer.decode(tokenizer.encode(x)).clamp(-1, 1) for x in scenes.split(8)]))[
            0
        ]

    def draw(self, number: int) -> dict[str, Any]:
        """A round: by picture, class after class, features, class found and scores."""
        prompt = class_prompt(list(range(self.classes))).repeat(max(OF))
        sample = self.model.info.defaults
        seeds = [SEED + number * prompt.rows + i for i in range(prompt.rows)]
        codes = []
        for first in range(0, prompt.rows, self.at_once):
            part = range(first, min(first + self.at_once, prompt.rows))
            run, own = Run(), SamplePlan(**{**asdict(sample), "seeds": tuple(seeds[i] for i in part)})
            for line in generate(self.model.decoder, prompt.select(part), self.plan, own):
                run.add(line)
            codes.append(run.tokens)
        drawn = torch.cat(codes)
        likelihood = log_likelihood(self.model.decoder, prompt, drawn, self.plan, sample, self.at_once)
        match = prompt_match(self.model.decoder, prompt, drawn, self.plan, self.at_once)
        with torch.inference_mode():
            images = torch.cat([self.model.tokenizer.decode(c).clamp(-1, 1) for c in drawn.split(8)])
        features, found = self.features(images)
        return {
            "features": features.round(5).tolist(),
            "found": found,
            "likelihood": [round(float(x), 3) for x in likelihood.flatten(1).sum(1)],
            "match": [round(float(x), 3) for x in match.flatten(1).sum(1)],
            "random": np.random.default_rng(number).random(prompt.rows).round(6).tolist(),
        }


def figures(rounds: list[dict[str, Any]], real: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy and Fréchet distance of what each score chooses from the first 1, 4 and 16 pictures of each class."""
    rows = []
    for score in SCORES:
        for of in OF:
            features, right, count = [], 0, 0
            for one in rounds:
                each = torch.tensor(one[score]).view(-1, max(OF))[:, :of]
                chosen = [n // of * max(OF) + n % of for n in best_of(each.flatten(), of)]
                features += [one["features"][n] for n in chosen]
                right += sum(one["found"][n] == n // max(OF) for n in chosen)
                count += len(chosen)
            rows.append(
                {
                    "score": score,
                    "of": of,
                    "pictures": count,
                    "accuracy": right / count,
                    "accuracy_ci": share_interval(right, count),
                    "frechet": frechet(np.array(features), real),
                }
            )
    return rows


def table(data: dict[str, Any]) -> str:
    lines = ["| chosen by | best of | pictures | class right (95 %) | Fréchet distance |", "|---|---|---|---|---|"]
    for row in data["figures"]:
        low, high = row["accuracy_ci"]
        right = f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        lines.append(f"| {row['score']} | {row['of']} | {row['pictures']} | {right} | {row['frechet']:.3f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="of 12 x 16 pictures each")
    parser.add_argument("--at-once", type=int, default=16, help="pictures drawn together")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT.name} in bench/results")
    parser.add_argument("--table", action="store_true", help="print the table of existing results")
    args = parser.parse_args()
    if not args.table:
        machine.check_out(args.out, parser)
    data = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {"rounds": []}
    if not args.table:
        limit_threads()
        lab = Round(PRESETS["Balanced"], args.at_once)
        real = lab.real()
        while len(data["rounds"]) < args.rounds:
            data["rounds"].append(lab.draw(len(data["rounds"])))
            data["figures"] = figures(data["rounds"], real)
            data["circumstances"] = machine.circumstances("cpu") | {
                "preset": "Balanced",
                "seed": SEED,
                "real": [REAL_SEED, REAL],
            }
            args.out.write_text(json.dumps(data) + "\n", encoding="utf-8")
            print(f"round {len(data['rounds'])} of {args.rounds}", flush=True)
    print(table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
