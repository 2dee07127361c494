"""Train the VQ tokenizer of the bundled model on drawn scenes.

    python training/train_vq.py --out runs/vq --steps 2600

Resumable: rerun the same command. Adam on L1, squared error and edges; the codebook follows its codes by moving
averages, and codes that nobody uses are moved to where the encoder's output is. CPU with bf16 autocast by default.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.tokenizers.tokenizer import VQConfig, VQTokenizer

CONFIG = VQConfig(
    codes=1024,
    code_dim=8,
    z=64,
    decoder_widths=(128, 64, 32),
    decoder_blocks=2,
    encoder_widths=(32, 64, 128),
    encoder_blocks=1,
)


def pictures(images: np.ndarray, device: str) -> Tensor:
    """uint8 B H W 3 -> float B 3 H W in -1..1."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


class Codebook:
    """Moving averages of what each code was used for (van den Oord et al. 2017, appendix A.1), on the unit sphere."""

    def __init__(self, table: Tensor, decay: float = 0.98):
        self.table, self.decay = table, decay
        self.count = torch.ones(len(table), device=table.device)
        self.total = table.clone()

    @torch.no_grad()
    def update(self, features: Tensor, codes: Tensor) -> None:
        flat, codes = features.reshape(-1, features.shape[-1]).float(), codes.reshape(-1)
        used = torch.bincount(codes, minlength=len(self.table)).float()
        total = torch.zeros_like(self.total).index_add_(0, codes, flat)
        self.count.mul_(self.decay).add_(used, alpha=1 - self.decay)
        self.total.mul_(self.decay).add_(total, alpha=1 - self.decay)
        dead = (self.count < 0.03).nonzero().flatten()[:32]
        pick = flat[torch.randint(len(flat), (len(dead),), device=flat.device)]
        self.total[dead], self.count[dead] = pick * 0.5, 0.5
        self.table.copy_(F.normalize(self.total, dim=-1))


@torch.no_grad()
def evaluate(model: VQTokenizer, images: np.ndarray, device: str) -> float:
    """Mean PSNR in dB over held-out scenes, float32."""
    x = pictures(images, device)
    errors = [(model.decode(model.encode(part)).clamp(-1, 1) - part).square().mean((1, 2, 3)) for part in x.split(16)]
    return float((10 * torch.log10(4 / torch.cat(errors))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("training/runs/vq"), help="folder for checkpoints and log")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--scenes", type=int, default=12_000, help="how many pictures are painted before training")
    parser.add_argument("--rate", type=float, default=1.2e-3, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = VQTokenizer(CONFIG).to(args.device)
    table = model.quantize.embedding.weight.requires_grad_(False)
    table.copy_(F.normalize(torch.randn_like(table), dim=-1))
    codebook = Codebook(table)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], betas=(0.9, 0.98), weight_decay=1e-4
    )
    start = 0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, codebook.count, codebook.total, start = state["average"], state["count"], state["total"], state["step"]
        print(f"resumed at step {start}")

    images, _ = scenes.batch(1, args.scenes)
    held_out, _ = scenes.batch(999_983, 96)
    clock, log = time.time(), args.out / "log.jsonl"
    for step in range(start, args.steps):
        rate = args.rate * min(1, (step + 1) / 80) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        pick = np.random.default_rng(step).integers(0, len(images), args.batch)
        chosen = images[pick]
        if step % 2:
            chosen = np.ascontiguousarray(chosen[:, :, ::-1])
        x = pictures(chosen, args.device)
        with torch.autocast(args.device, torch.bfloat16):
            features = model.features(x)
        features = F.normalize(features.float(), dim=-1)
        codes = model.nearest(features.detach())
        entries = F.embedding(codes, table)
        with torch.autocast(args.device, torch.bfloat16):
            y = model.decode_features(features + (entries - features).detach())
        y = y.float()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        commit = (features - entries).square().mean()
        loss = (y - x).abs().mean() + 2 * (y - x).square().mean() + 0.5 * edge + 0.5 * commit
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        codebook.update(features.detach(), codes)
        decay = min(0.998, (step + 1) / (step + 20))
        for key, value in model.state_dict().items():
            average[key].lerp_(value.detach(), 1 - decay)
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            print(
                f"step {step + 1}  loss {loss.item():.4f}  used {int((codebook.count > 0.05).sum())}  "
                f"{(time.time() - clock) / (step + 1 - start):.2f} s/step",
                flush=True,
            )
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            state = {
                "model": model.state_dict(),
                "average": average,
                "optimizer": optimizer.state_dict(),
                "count": codebook.count,
                "total": codebook.total,
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            smooth = VQTokenizer(CONFIG).to(args.device)
            smooth.load_state_dict(average)
            smooth.quantize.embedding.weight.data.copy_(table)
            psnr = evaluate(smooth, held_out, args.device)
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": loss.item(), "psnr_db": psnr}) + "\n")
            print(f"step {step + 1}  held-out PSNR {psnr:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
