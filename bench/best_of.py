"""What choosing among several pictures of a prompt is worth, on the bundled model.

    python bench/best_of.py [--groups 192] [--minutes 7] [--workers 2]
    python bench/best_of.py --table

A group is 16 pictures of one class, each with a seed of its own; the classes take turns. They are drawn once, and all
figures are of these pictures: the best of 16 is one of a group, the best of 4 is one of each quarter of a group, and
the best of 1 is all of them. Scores: the model's guided log-likelihood of its own picture, and how much likelier the
prompt makes the picture than no prompt does (`prompt_match`).

Measured are the accuracy of the class and the Fréchet distance to held-out scenes, in the features of the small
classifier of training/train_classifier.py, which the model has never seen. The Fréchet distance is smaller the more
pictures there are, so it is always taken of one picture a group, and averaged: over 16 such sets of the best of 1, over
4 of the best of 4. Its 32 features need some hundred pictures; groups that leave a class behind the others wait.

Groups are written as they are done, so a run can be stopped at any time, and the next one goes on from there. A picture
takes about a second of a core of an Intel Xeon.
"""

from __future__ import annotations

import argparse
import base64
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import machine
from bench.uncertainty import frechet, share_interval
from linear_core.checkpoints.library import bundled_files, load_model
from linear_core.loop.generate import Run, generate
from linear_core.loop.redraw import best_of
from linear_core.loop.sampling import apply_guidance
from linear_core.loop.threads import limit_threads
from linear_core.models.packed import pack
from linear_core.plan import PRESETS, SamplePlan
from linear_core.prompts import Prompt, class_prompt
from training.scenes import CLASSES, batch
from training.train_classifier import load_classifier, pictures, through_tokenizer

OF = (1, 4, 16)
GROUP = max(OF)
TOGETHER = 3  # groups that are drawn at once: a larger batch saves little more
SCORES = ("likelihood", "match")
SETTINGS = {"preset": "Balanced", "seed": 770_000, "group": GROUP, "real": [880_000, 480]}  # seed and number of scenes
RESAMPLES = 400
OUT = Path(__file__).parent / "results" / "best-of-landscapes.json"


class Lab:
    """The bundled model and the classifier."""

    def __init__(self) -> None:
        self.model, self.plan = load_model(bundled_files()), PRESETS[SETTINGS["preset"]]
        pack(self.model.decoder)
        self.classifier = load_classifier()

    @torch.inference_mode()
    def features(self, images: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Features N F and classes N of pictures N 3 H W in -1..1."""
        found = torch.cat([self.classifier.features(part) for part in images.split(64)])
        return found.numpy(), self.classifier.head(found).argmax(1).numpy()

    def real(self) -> np.ndarray:
        """Features of held-out scenes, after the tokenizer: what drawn pictures can look like at best."""
        scenes = pictures(batch(*SETTINGS["real"])[0])
        return self.features(through_tokenizer(self.model.tokenizer, scenes))[0]

    @torch.inference_mode()
    def groups(self, first: int) -> list[dict[str, Any]]:
        """Draw TOGETHER groups from this one on: features, whether the classifier finds the class, and scores."""
        labels = np.repeat(np.arange(first, first + TOGETHER) % len(CLASSES), GROUP)
        sample, decoder = self.model.info.defaults, Scored(self.model.decoder, self.model.info.defaults, len(labels))
        run = Run()
        for line in generate(
            decoder, class_prompt(labels.tolist()), self.plan, replace(sample, seed=SETTINGS["seed"] + first * GROUP)
        ):
            run.add(line)
        decoder.count(run.tokens[:, -1, -1])  # nothing follows it, so it is not fed
        images = torch.cat([self.model.tokenizer.decode(part).clamp(-1, 1) for part in run.tokens.split(GROUP)])
        features, found = self.features(images)
        scores = {name: [round(x, 3) for x in getattr(decoder, name).tolist()] for name in SCORES}
        parts = [slice(n * GROUP, (n + 1) * GROUP) for n in range(TOGETHER)]
        return [
            {"features": packed(features[part]), "right": (found == labels)[part].astype(int).tolist()}
            | {name: each[part] for name, each in scores.items()}
            for part in parts
        ]


class Scored:
    """A decoder that adds up how likely the codes are that are drawn with it, by the logits they are drawn from.

    likelihood  of each image, as `log_likelihood` would find by feeding the picture again
    match       likewise, as `prompt_match`
    """

    def __init__(self, decoder: Any, sample: SamplePlan, images: int):
        self.decoder, self.guidance, self.images = decoder, sample.guidance, images
        self.likelihood, self.match = torch.zeros(images, dtype=torch.float64), torch.zeros(images, dtype=torch.float64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def prefill(self, prompt: Prompt, cache: Any) -> Tensor:
        self.logits = self.decoder.prefill(prompt, cache)
        return self.logits

    def step(self, token: Tensor, *rest: Any) -> Tensor:
        self.count(token[: self.images])
        self.logits = self.decoder.step(token, *rest)
        return self.logits

    def count(self, codes: Tensor) -> None:
        """Codes B that were drawn from the logits at hand."""

        def of(logits: Tensor) -> Tensor:
            return logits.log_softmax(-1).gather(-1, codes[:, None])[:, 0].double()

        self.likelihood += of(apply_guidance(self.logits, self.images, self.guidance))
        with_prompt, without = self.logits.split(self.images)
        self.match += of(with_prompt) - of(without)


def packed(features: np.ndarray) -> str:
    """Features N F, which JSON would write at length, as half-precision numbers in base64."""
    return base64.b64encode(features.astype("<f2").tobytes()).decode()


def unpacked(text: str, count: int) -> np.ndarray:
    """float64 count F."""
    return np.frombuffer(base64.b64decode(text), "<f2").reshape(count, -1).astype(np.float64)


def figures(groups: list[dict[str, Any]], real: np.ndarray, classes: int = len(CLASSES)) -> list[dict[str, Any]]:
    """Accuracy and Fréchet distance of what each score chooses, and how far they are from those of any picture, with
    95 % intervals of the differences: bootstrap over the groups of each class.
    """
    groups = groups[: len(groups) // classes * classes]  # as many of each class
    features = np.stack([unpacked(group["features"], GROUP) for group in groups])
    right = np.array([group["right"] for group in groups])
    source = np.random.default_rng(0)
    of_class = [np.arange(label, len(groups), classes) for label in range(classes)]
    picks = [np.concatenate([source.choice(own, len(own)) for own in of_class]) for _ in range(RESAMPLES)]

    def chosen(score: str, of: int) -> tuple[np.ndarray, np.ndarray]:
        """Features G 16/of F and whether the class is right G 16/of, of the best of each `of`."""
        best = np.array([best_of(torch.tensor(group[score]), of) for group in groups])
        return np.take_along_axis(features, best[..., None], 1), np.take_along_axis(right, best, 1)

    def distance(sets: np.ndarray) -> float:
        return float(np.mean([frechet(sets[:, n], real) for n in range(sets.shape[1])]))

    any_features, any_right = features, right
    base = [(any_right[pick].mean(), distance(any_features[pick])) for pick in picks]
    rows = []
    for score, of in [(SCORES[0], 1), *((score, of) for score in SCORES for of in OF[1:])]:
        own, hits = chosen(score, of)
        row: dict[str, Any] = {
            "score": score if of > 1 else "any",
            "of": of,
            "pictures": hits.size,
            "groups": len(groups),
            "accuracy": hits.mean(),
            "accuracy_ci": share_interval(int(hits.sum()), hits.size),
            "frechet": distance(own),
        }
        if of > 1:
            again = [(hits[p].mean() - a, distance(own[p]) - d) for p, (a, d) in zip(picks, base, strict=True)]
            row["accuracy_gain_ci"], row["frechet_gain_ci"] = np.quantile(again, (0.025, 0.975), axis=0).T.tolist()
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| chosen by | best of | pictures | class right (95 %) | Fréchet distance | minus that of any (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["accuracy_ci"]
        right = f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        less = "{:+.2f} to {:+.2f}".format(*row["frechet_gain_ci"]) if "frechet_gain_ci" in row else ""
        lines.append(f"| {row['score']} | {row['of']} | {row['pictures']} | {right} | {row['frechet']:.2f} | {less} |")
    return "\n".join(lines)


_lab: Lab | None = None  # of a worker process


def _begin() -> None:
    global _lab
    torch.set_num_threads(1)
    _lab = Lab()


def _groups(first: int) -> list[dict[str, Any]]:
    assert _lab is not None
    return _lab.groups(first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=192, help="of 16 pictures each; a multiple of 12")
    parser.add_argument("--minutes", type=float, default=0, help="begin no more groups after so long; 0: always go on")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=OUT, help=f"default: {OUT.name} in bench/results")
    parser.add_argument("--table", action="store_true", help="print the table of existing results")
    args = parser.parse_args()
    data = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    if data and data["settings"] != SETTINGS:
        parser.error(f"--out: {args.out.name} has results of other settings; give another file.")
    if not args.table:
        machine.check_out(args.out, parser)
        draw(data, args)
    print(table(data["figures"]) if "figures" in data else f"no figures yet: they need {2 * len(CLASSES)} groups")
    return 0


def draw(data: dict[str, Any], args: argparse.Namespace) -> None:
    """Draw the groups that are missing, as far as time allows, and write the figures."""
    began = time.monotonic()
    if not data:
        limit_threads()
        data |= {"settings": SETTINGS, "runs": [], "real": packed(Lab().real()), "groups": []}
    data["runs"].append(machine.circumstances("cpu") | {"from": len(data["groups"]), "workers": args.workers})
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), _begin) as workers:
        numbers = iter(range(len(data["groups"]), args.groups, TOGETHER))
        ahead = [workers.submit(_groups, number) for number in islice(numbers, args.workers)]
        while ahead:
            data["groups"] += ahead.pop(0).result()
            write(data, args.out)
            print(f"group {len(data['groups'])} of {args.groups}, {time.monotonic() - began:.0f} s", flush=True)
            late = args.minutes and time.monotonic() - began > 60 * args.minutes
            if not late and (number := next(numbers, None)) is not None:
                ahead.append(workers.submit(_groups, number))
    if len(data["groups"]) >= 2 * len(CLASSES):
        data["figures"] = figures(data["groups"], unpacked(data["real"], SETTINGS["real"][1]))
        write(data, args.out)


def write(data: dict[str, Any], path: Path) -> None:
    """The file is complete whenever the run is stopped."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
