"""Train the multi-scale VQ tokenizer of the bundled next-scale model on drawn scenes.

    python training/train_pyramid.py --out training/runs/pyramid --steps 2400

Resumable: rerun the same command. AdamW on L1, squared error and edges; gradients pass the quantizer straight through
the sum of all scales. The codebook follows its codes by moving averages, and codes that nobody uses are moved to where
the encoder's output is; the convolutions between scale and canvas learn by gradients. CPU with bf16 autocast by
default.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from torch import Tensor
from train_gpt import SHARD, paint
from train_vq import edges, pictures

from linear_core.pyramid import Pyramid
from linear_core.tokenizers.pyramid import PyramidConfig, PyramidTokenizer, ResidualPyramid

PYRAMID = Pyramid.square(1, 2, 3, 4, 5, 6, 8, 10, 12)
CONFIG = PyramidConfig(
    codes=512,
    code_dim=16,
    decoder_widths=(96, 96, 64, 32),
    decoder_blocks=2,
    phis=4,
    encoder_widths=(32, 48, 64, 96),
    encoder_blocks=1,
)
COMMITMENT = 0.25


class Codebook:
    """Moving averages of what each code was used for (van den Oord et al. 2017, appendix A.1)."""

    def __init__(self, table: Tensor, decay: float = 0.98):
        self.table, self.decay = table, decay
        self.count = torch.zeros(len(table), device=table.device)  # all dead: the first steps move them to the data
        self.total = torch.zeros_like(table)

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor) -> None:
        """vectors N Z and the codes N that they got."""
        used = torch.bincount(codes, minlength=len(self.table)).float()
        total = torch.zeros_like(self.total).index_add_(0, codes, vectors)
        self.count.mul_(self.decay).add_(used, alpha=1 - self.decay)
        self.total.mul_(self.decay).add_(total, alpha=1 - self.decay)
        dead = (self.count < 0.03).nonzero().flatten()[:64]
        pick = vectors[torch.randint(len(vectors), (len(dead),), device=vectors.device)]
        self.total[dead], self.count[dead] = pick * 0.5, 0.5
        alive = self.count > 0
        self.table[alive] = self.total[alive] / self.count[alive, None]


def quantize(quantizer: ResidualPyramid, features: Tensor, codebook: Codebook | None) -> tuple[Tensor, Tensor]:
    """The canvas of features B Z h w, and the mean over scales of how far the canvas so far is from the features.

    The second term teaches the convolutions, and with COMMITMENT the encoder. Updates the codebook.
    """
    target, canvas, loss = features.detach(), torch.zeros_like(features), features.new_zeros(())
    vectors, codes = [], []
    for stage in range(PYRAMID.stages):
        with torch.no_grad():
            rest = target - canvas
            small = F.interpolate(rest, size=PYRAMID.sides[stage], mode="area").permute(0, 2, 3, 1)
            tokens = quantizer.nearest(small)
        canvas = canvas + quantizer.rise(PYRAMID, stage, quantizer.entries(tokens).detach())
        loss = loss + (canvas - target).square().mean() + COMMITMENT * (canvas.detach() - features).square().mean()
        vectors.append(small.flatten(0, 2))
        codes.append(tokens.flatten())
    if codebook is not None:
        codebook.update(torch.cat(vectors), torch.cat(codes))
    return canvas, loss / PYRAMID.stages


def load_tokenizer(path: Path) -> PyramidTokenizer:
    """The averaged weights of a checkpoint."""
    model = PyramidTokenizer(CONFIG)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["average"])
    return model.eval()


@torch.no_grad()
def evaluate(model: PyramidTokenizer, images: np.ndarray, device: str) -> float:
    """Mean PSNR in dB over held-out scenes, float32."""
    errors = []
    for x in pictures(images, device).split(16):
        canvas = model.quantize.canvas(PYRAMID, model.encode(x, PYRAMID))
        errors.append((model.decode(canvas).clamp(-1, 1) - x).square().mean((1, 2, 3)))
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("training/runs/pyramid"), help="folder for checkpoints, log")
    parser.add_argument("--data", type=Path, default=Path("training/runs/gpt/data"), help="folder of painted scenes")
    parser.add_argument("--shards", type=int, default=12, help="thousands of scenes")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    paint(args.data, args.shards)

    torch.manual_seed(0)
    model = PyramidTokenizer(CONFIG).to(args.device)
    table = model.quantize.embedding.weight.requires_grad_(False)
    codebook = Codebook(table)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.98), weight_decay=1e-4
    )
    start, seconds = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, codebook.count, codebook.total = state["average"], state["count"], state["total"]
        start, seconds = state["step"], state["seconds"]
        print(f"resumed at step {start}")

    images = np.concatenate([np.load(args.data / f"scenes_{i}.npz")["images"] for i in range(args.shards)])
    held_out, _ = scenes.batch(999_983, 96)
    clock, log = time.time(), args.out / "log.jsonl"
    for step in range(start, args.steps):
        rate = args.rate * min(1, (step + 1) / 80) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = images[np.random.default_rng(step).integers(0, args.shards * SHARD, args.batch)]
        if step % 2:
            chosen = np.ascontiguousarray(chosen[:, :, ::-1])
        x = pictures(chosen, args.device)
        with torch.autocast(args.device, torch.bfloat16):
            features = model.features(x)
        features = features.float()
        canvas, distance = quantize(model.quantize, features, codebook)
        with torch.autocast(args.device, torch.bfloat16):
            y = model.decode(features + (canvas - features).detach())
        y = y.float()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        loss = (y - x).abs().mean() + 2 * (y - x).square().mean() + 0.5 * edge + distance
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.998, (step + 1) / (step + 20))
        for key, value in model.state_dict().items():
            average[key].lerp_(value.detach(), 1 - decay)
        average["quantize.embedding.weight"].copy_(table)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1}  loss {loss.item():.4f}  canvas {distance.item():.4f}  "
                f"used {int((codebook.count > 0.05).sum())}  {(time.time() - clock) / (step + 1 - start):.2f} s/step",
                flush=True,
            )
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            state = {
                "model": model.state_dict(),
                "average": average,
                "optimizer": optimizer.state_dict(),
                "count": codebook.count,
                "total": codebook.total,
                "step": step + 1,
                "seconds": seconds + time.time() - clock,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
        if (step + 1) % 400 == 0 or step + 1 == args.steps:
            smooth = PyramidTokenizer(CONFIG).to(args.device)
            smooth.load_state_dict(average)
            psnr = evaluate(smooth, held_out, args.device)
            note = {"step": step + 1, "loss": loss.item(), "psnr_db": psnr, "seconds": seconds + time.time() - clock}
            with log.open("a") as file:
                file.write(json.dumps(note) + "\n")
            print(f"step {step + 1}  held-out PSNR {psnr:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
