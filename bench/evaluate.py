"""How good the pictures of a `batch` folder are.

    python bench/evaluate.py FOLDER                          everything that is possible with what is at hand
    python bench/evaluate.py FOLDER --metrics accuracy kl
    python bench/evaluate.py FOLDER --metrics fid --real PICTURES --inception pt_inception-2015-12-05-6726825d.pth
    python bench/evaluate.py FOLDER --metrics clip --clip models/clip-vit-large-patch14
    python bench/evaluate.py FOLDER --metrics objects --detector models/owlv2-base-patch16-ensemble

    accuracy  of the bundled model: the classes that a small classifier sees (bench/classifier.safetensors)
    frechet   of the bundled model: distance of the classifier's features to those of held-out scenes
    kl        models with classes or a text tokenizer of their own: next-token distributions under the run's cache and
              the full one, given the run's pictures, nats. Needs `batch --codes`
    fid       any model: torchmetrics' FID to the pictures below --real, with the weights --inception (as torch-fidelity
              publishes them)
    clip      texts: 100 times the cosine of picture and text, by transformers' CLIPModel in the folder --clip
    objects   GenEval's texts: whether all objects are there, as often as the text says, by a zero-shot detector for
              transformers in the folder --detector (OWLv2, Grounding DINO). The rows need GenEval's column `include`
              ([{"class": "dog", "count": 2}]), which `batch` passes on from its evaluation_metadata.jsonl. Colours and
              positions are not looked at, so it is not GenEval's score

Nothing is downloaded. What is not at hand is left out, and said. Results go to evaluation.json in the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import machine
from bench.uncertainty import frechet, half_width, share_interval
from linear_core.batch.folder import METADATA, RUN
from linear_core.check import FULL, divergences
from linear_core.checkpoints.library import (
    ModelFiles,
    bundled_files,
    class_label,
    find_tokenizer,
    load_model,
    read_info,
)
from linear_core.errors import UserError
from linear_core.plan import CachePlan

BATCH = 16
SCENES = 30_011, 256  # seed and number of held-out scenes; nothing else is trained or measured on them


class Missing(Exception):
    """What a metric needs and is not at hand."""


class Pictures:
    """The pictures of a folder, and what is known of them."""

    def __init__(self, folder: Path, model: Path | None):
        try:
            self.run: dict[str, Any] = json.loads((folder / RUN).read_text(encoding="utf-8"))
            lines = (folder / METADATA).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise UserError(f"{folder}: has no pictures of `batch` ({error.strerror}).") from error
        self.folder, self.rows = folder, [json.loads(line) for line in lines]
        if not self.rows:
            raise UserError(f"{folder}: has no pictures yet.")
        self.files = ModelFiles(model, find_tokenizer(model)) if model else bundled_files()
        self.info = read_info(self.files.decoder)

    def batches(self) -> Iterator[tuple[list[dict[str, Any]], list[Image.Image]]]:
        for start in range(0, len(self.rows), BATCH):
            rows = self.rows[start : start + BATCH]
            yield rows, [Image.open(self.folder / row["file_name"]).convert("RGB") for row in rows]

    @property
    def bundled(self) -> bool:
        return self.files == bundled_files() and self.run["weight_bytes"] == self.info.weight_bytes


def as_tensor(images: list[Image.Image]) -> Tensor:
    """float32 B 3 H W in -1..1"""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def features(pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
    """Features N F of the small classifier, and the classes that it sees, N."""
    if not pictures.bundled:
        raise Missing("the classifier knows only the bundled model's pictures")
    from training.train_classifier import load_classifier

    classifier, found, seen = load_classifier(), [], []
    with torch.inference_mode():
        for _, images in pictures.batches():
            found.append(classifier.features(as_tensor(images)))
            seen.append(classifier.head(found[-1]).argmax(1))
    return torch.cat(found).double().numpy(), torch.cat(seen).numpy()


def accuracy(pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    _, seen = features(pictures)
    asked = np.array([class_label(pictures.info, row["prompt"]) for row in pictures.rows])
    right = int((seen == asked).sum())
    return {"accuracy": right / len(asked), "interval": share_interval(right, len(asked))}


def frechet_distance(pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    """To scenes that went through the tokenizer and back, the best that codes can look like."""
    from training.scenes import batch
    from training.train_classifier import load_classifier, through_tokenizer
    from training.train_classifier import pictures as scenes_of

    ours, _ = features(pictures)
    if len(ours) <= ours.shape[1]:
        raise Missing(f"{len(ours)} pictures are too few for {ours.shape[1]} features")
    scenes = scenes_of(batch(*SCENES)[0])
    with torch.inference_mode():
        decoded = through_tokenizer(load_model(pictures.files).tokenizer, scenes)
        real = torch.cat([load_classifier().features(part) for part in decoded.split(BATCH)]).double().numpy()
    return {"frechet": frechet(ours, real), "scenes": len(real)}


def kl(pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    """The run's cache against the full one, given the run's own pictures."""
    if "codes" not in pictures.rows[0]:
        raise Missing("the codes were not kept; draw with --codes")
    if pictures.info.text and not pictures.info.own_tokenizer:
        raise Missing(f"{pictures.info.name} needs a text encoder")
    names = CachePlan.__dataclass_fields__
    plan = CachePlan(**{name: pictures.run[name] for name in names if name in pictures.run})
    model, each = load_model(pictures.files), []
    for start in range(0, min(len(pictures.rows), args.kl_pictures), BATCH):
        rows = pictures.rows[start : start + BATCH]
        codes = torch.tensor([row["codes"] for row in rows])
        if pictures.info.pyramid is None:
            codes = codes.unflatten(1, (model.info.grid.rows, model.info.grid.cols))
        texts = [row["prompt"] for row in rows]
        prompt = model.prompt(texts) if pictures.info.text else model.class_prompt(texts)
        each.append(divergences(model, prompt, codes, [FULL, plan], lambda tokens: None)[1])
    found = torch.cat(each).numpy()
    return {"kl": float(found.mean()), "half_width": half_width(found), "pictures": len(found)}


def fid(pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    """torchmetrics' Fréchet Inception Distance."""
    if not (args.real and args.inception):
        raise Missing("it needs --real PICTURES and --inception WEIGHTS")
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise Missing(f"it needs the packages torchmetrics and torch-fidelity ({error})") from error
    extractor = FeatureExtractorInceptionV3("fid", ["2048"], feature_extractor_weights_path=str(args.inception))
    metric = FrechetInceptionDistance(feature=extractor, normalize=False)
    for _, images in pictures.batches():
        metric.update(((as_tensor(images) + 1) * 127.5).round().byte(), real=False)
    count = 0
    for path in sorted(p for p in args.real.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")):
        metric.update(((as_tensor([Image.open(path).convert("RGB")]) + 1) * 127.5).round().byte(), real=True)
        count += 1
    if count < 2:
        raise Missing(f"there are no pictures in {args.real}")
    return {"fid": float(metric.compute()), "real": count}


def clip(pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    """100 times the cosine of a picture's and its text's embedding, at least 0, as torchmetrics' CLIPScore."""
    if not args.clip:
        raise Missing("it needs --clip FOLDER")
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(args.clip, local_files_only=True).eval()
    processor, scores = CLIPProcessor.from_pretrained(args.clip, local_files_only=True), []
    with torch.inference_mode():
        for rows, images in pictures.batches():
            texts = [row["prompt"] for row in rows]
            given = processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)
            out = model(**given)
            cosine = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            scores.append(100 * cosine.clamp(min=0))
    each = torch.cat(scores).double().numpy()
    return {"clip": float(each.mean()), "half_width": half_width(each)}


def objects(pictures: Pictures, args: argparse.Namespace) -> dict[str, Any]:
    """Pictures that show every object of `include`, as often as it says."""
    if not args.detector:
        raise Missing("it needs --detector FOLDER")
    if "include" not in pictures.rows[0]:
        raise Missing("the rows have no column 'include', as those of GenEval's evaluation_metadata.jsonl")
    from transformers import pipeline

    folder = str(args.detector)
    detect = pipeline("zero-shot-object-detection", model=folder, image_processor=folder, tokenizer=folder)
    return objects_by(pictures, detect)


def objects_by(pictures: Pictures, detect: Callable[..., list[dict[str, Any]]], least: float = 0.3) -> dict[str, Any]:
    """`objects` with this detector: a picture and labels -> [{"label", "score"}]."""
    right, by_tag = 0, {}
    for rows, images in pictures.batches():
        for row, image in zip(rows, images, strict=True):
            wanted = {entry["class"]: int(entry["count"]) for entry in row["include"]}
            seen = [found["label"] for found in detect(image, candidate_labels=list(wanted)) if found["score"] >= least]
            fine = all(seen.count(name) == count if count > 1 else name in seen for name, count in wanted.items())
            right += fine
            by_tag.setdefault(str(row.get("tag", "")), []).append(fine)
    tags = {tag: sum(each) / len(each) for tag, each in by_tag.items()}
    return {
        "objects": right / len(pictures.rows),
        "interval": share_interval(right, len(pictures.rows)),
        "by_tag": tags,
    }


METRICS = {"accuracy": accuracy, "frechet": frechet_distance, "kl": kl, "fid": fid, "clip": clip, "objects": objects}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `batch` drew")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--model", type=Path, help="the model that drew them (default: the bundled one)")
    parser.add_argument("--kl-pictures", type=int, default=256, help="pictures that kl is measured on at most")
    parser.add_argument("--real", type=Path, help="folder of real pictures, for fid")
    parser.add_argument("--inception", type=Path, help="Inception's weights as torch-fidelity publishes them, for fid")
    parser.add_argument("--clip", type=Path, help="folder of a CLIPModel")
    parser.add_argument("--detector", type=Path, help="folder of a zero-shot object detector")
    args = parser.parse_args()
    try:
        pictures = Pictures(args.folder, args.model)
    except UserError as error:
        sys.exit(f"error: {error}")
    found: dict[str, Any] = {"pictures": len(pictures.rows), "run": pictures.run, **machine.circumstances("cpu")}
    for name in args.metrics:
        try:
            found[name] = METRICS[name](pictures, args)
        except Missing as missing:
            found[name] = {"left_out": str(missing)}
        print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    (args.folder / "evaluation.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: found[name] for name in args.metrics}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
