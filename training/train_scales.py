"""Train the bundled next-scale model, a small VAR, on the multi-scale codes of drawn scenes.

    python training/train_scales.py --tokenizer training/runs/pyramid/checkpoint.pt --out training/runs/scales

Paints and encodes scenes and their mirror images once, then trains; resumable by rerunning the same command. Muon for
the matrices inside the blocks, AdamW for the rest, bf16 autocast, moving average of the weights.

Inputs come from noisy codes: a share of each picture's codes is replaced at random, and the scales above are encoded
again from what is then missing, so that the model learns to repair what was drawn wrong. (Infinity's self-correction,
arXiv 2412.04431, carried from bits to codes.)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from torch import Tensor
from train_gpt import paint
from train_pyramid import CONFIG as VQ_CONFIG
from train_pyramid import PYRAMID, load_tokenizer
from train_vq import pictures

from linear_core.models.var import VAR, VARConfig
from linear_core.prompts import class_prompt
from linear_core.tokenizers.pyramid import PyramidTokenizer, ResidualPyramid

CONFIG = VARConfig(
    layers=6,
    width=256,
    heads=8,
    hidden=1024,
    codes=VQ_CONFIG.codes,
    classes=len(scenes.CLASSES),
    code_dim=VQ_CONFIG.code_dim,
    pyramid=PYRAMID,
    shared_adaln=True,
    unit_qk=True,
)
NOTHING = CONFIG.classes  # the unconditional class
FLIPPED = 0.08  # of the codes, at most


@torch.inference_mode()
def encode(folder: Path, shards: int, tokenizer: PyramidTokenizer, device: str) -> tuple[Tensor, Tensor]:
    """Features of every scene and of its mirror image, half N 2 Z h w, and labels int64 N."""
    features, labels = [], []
    for i in range(shards):
        file = folder / f"features_{i}.npz"
        data = np.load(folder / f"scenes_{i}.npz")
        if not file.exists():
            x = pictures(data["images"], "cpu")
            with torch.autocast(device, torch.bfloat16):
                both = [
                    torch.cat([tokenizer.features(p.to(device)).float().cpu() for p in side.split(16)])
                    for side in (x, x.flip(-1))
                ]
            with file.with_suffix(".part").open("wb") as part:
                np.savez(part, features=torch.stack(both, 1).half().numpy())
            file.with_suffix(".part").replace(file)
            print(f"encoded {i + 1}/{shards}", flush=True)
        features.append(torch.from_numpy(np.load(file)["features"]))
        labels.append(torch.from_numpy(data["labels"]))
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def scales_of(
    quantizer: ResidualPyramid, features: Tensor, flipped: Tensor | None = None
) -> tuple[list[Tensor], Tensor]:
    """Inputs of every scale but the first, B n Z each, and the codes that are to be drawn, B N.

    flipped  B, the share of each picture's codes that is replaced; the codes to be drawn are those that the canvas with
             the replaced ones asks for. None: none
    """
    canvas, below, codes = torch.zeros_like(features), [], []
    for stage in range(PYRAMID.stages):
        if stage:
            below.append(quantizer.shrink(PYRAMID, stage, canvas))
        small = F.interpolate(features - canvas, size=PYRAMID.sides[stage], mode="area").permute(0, 2, 3, 1)
        right = quantizer.nearest(small)
        codes.append(right.flatten(1))
        if flipped is not None:
            wrong = torch.rand(right.shape, device=right.device) < flipped[:, None, None]
            right = torch.where(wrong, torch.randint_like(right, quantizer.codes), right)
        canvas = quantizer.add(PYRAMID, stage, right, canvas)
    return below, torch.cat(codes, 1)


def loss_of(model: torch.nn.Module, below: list[Tensor], codes: Tensor, labels: Tensor) -> Tensor:
    """Mean nats a token."""
    logits = model(class_prompt(labels.tolist()).to(codes.device), below)
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def initialise(model: VAR) -> None:
    """As published: small matrices, residual branches that begin nearly closed, a head that begins flat."""
    for name, p in model.named_parameters():
        if p.dim() == 2 or name.startswith(("pos_", "lvl_")):
            torch.nn.init.normal_(p, std=0.02)
        elif name.endswith("ada_gss"):
            p.data.mul_(0.5)
    torch.nn.init.normal_(model.head.weight, std=1e-4)
    torch.nn.init.zeros_(model.head.bias)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("training/runs/pyramid/checkpoint.pt"))
    parser.add_argument("--out", type=Path, default=Path("training/runs/scales"), help="folder for checkpoints and log")
    parser.add_argument("--data", type=Path, default=Path("training/runs/gpt/data"), help="folder of painted scenes")
    parser.add_argument("--shards", type=int, default=12, help="thousands of scenes")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.02, help="peak learning rate of Muon; AdamW's is 0.15 of it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    paint(args.data, args.shards)
    tokenizer = load_tokenizer(args.tokenizer).to(args.device)
    quantizer = tokenizer.quantize.requires_grad_(False)
    features, labels = encode(args.data, args.shards, tokenizer, args.device)
    held = features[-64:, 0].float().to(args.device)
    held_below, held_codes = scales_of(quantizer, held)
    held_labels = labels[-64:]
    features, labels = features[:-64], labels[:-64]

    torch.manual_seed(0)
    model = VAR(CONFIG).to(args.device)
    initialise(model)
    inside = {n for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    matrices = [p for n, p in model.named_parameters() if n in inside]
    others = [p for n, p in model.named_parameters() if n not in inside]
    muon = torch.optim.Muon(matrices, lr=args.rate, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start, seconds, checkpoint = 0, 0.0, args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        average, start, seconds = state["average"], state["step"], state["seconds"]
        print(f"resumed at step {start}")

    clock, log = time.time(), args.out / "log.jsonl"
    for step in range(start, args.steps):
        left = 1 - step / args.steps
        rate = args.rate * min(1, (step + 1) / 50) * min(1, left / 0.5 + 0.02)  # flat, then linearly down
        for optimizer, factor in ((muon, 1.0), (adam, 0.15)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        torch.manual_seed(step)
        rng = np.random.default_rng(step)
        pick = torch.from_numpy(rng.integers(0, len(features), args.batch))
        side = torch.from_numpy(rng.integers(0, 2, args.batch))
        nameless = torch.from_numpy(rng.random(args.batch) < 0.1)
        flipped = torch.from_numpy(rng.random(args.batch) * FLIPPED).to(args.device)
        below, codes = scales_of(quantizer, features[pick, side].float().to(args.device), flipped)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(model, below, codes, torch.where(nameless, NOTHING, labels[pick]))
        muon.zero_grad(set_to_none=True)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()
        adam.step()
        decay = min(0.995, (step + 1) / (step + 20))
        for key, value in model.state_dict().items():
            average[key].lerp_(value.detach(), 1 - decay)
        if (step + 1) % 25 == 0:
            each = (time.time() - clock) / (step + 1 - start)
            print(f"step {step + 1}  loss {loss.item():.4f}  {each:.2f} s/step", flush=True)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            state = {
                "model": model.state_dict(),
                "average": average,
                "muon": muon.state_dict(),
                "adam": adam.state_dict(),
                "step": step + 1,
                "seconds": seconds + time.time() - clock,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            smooth = VAR(CONFIG).to(args.device)
            smooth.load_state_dict(average)
            with torch.inference_mode():
                parts = [
                    loss_of(smooth, [one[i : i + 16] for one in held_below], held_codes[i : i + 16],
                            held_labels[i : i + 16]).item()
                    for i in range(0, 64, 16)
                ]  # fmt: skip
            note = {"step": step + 1, "loss": loss.item(), "held_out_nats": sum(parts) / 4,
                    "seconds": seconds + time.time() - clock}  # fmt: skip
            with log.open("a") as file:
                file.write(json.dumps(note) + "\n")
            print(f"step {step + 1}  held-out {sum(parts) / 4:.4f} nats a token", flush=True)


if __name__ == "__main__":
    main()
