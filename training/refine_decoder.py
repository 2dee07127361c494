"""Sharpen the tokenizer's decoder while its codes stay as they are, so that a GPT trained on them stays valid.

    python training/refine_decoder.py --tokenizer training/runs/vq/checkpoint.pt --out training/runs/vq/refined.pt

The encoder and the codebook are frozen; the decoder goes on with the same loss, edges weighted more.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import scenes
import torch
from train_gpt import load_tokenizer
from train_vq import edges, evaluate, pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("training/runs/vq/checkpoint.pt"))
    parser.add_argument("--out", type=Path, default=Path("training/runs/vq/refined.pt"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=8e-4, help="peak learning rate")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = load_tokenizer(args.tokenizer).to(args.device)
    trained = [p for part in (model.decoder, model.post_quant_conv) for p in part.parameters()]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=1e-4)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    held_out, _ = scenes.batch(999_983, 96)
    print(f"before: held-out PSNR {evaluate(model, held_out, args.device):.2f} dB", flush=True)
    clock = time.time()
    for step in range(args.steps):
        rate = args.rate * min(1, (step + 1) / 40) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = pictures(scenes.batch(50_000 + step, args.batch)[0], args.device)
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            codes = model.encode(x)
        with torch.autocast(args.device, torch.bfloat16):
            y = model.decode(codes)
        y = y.float()
        edge = sum((a - b).abs().mean() for a, b in zip(edges(y), edges(x), strict=True))
        loss = (y - x).abs().mean() + 2 * (y - x).square().mean() + edge
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        decay = min(0.99, (step + 1) / (step + 20))
        for key, value in model.state_dict().items():
            average[key].lerp_(value.detach(), 1 - decay)
        if (step + 1) % 50 == 0:
            print(
                f"step {step + 1}  loss {loss.item():.4f}  {(time.time() - clock) / (step + 1):.2f} s/step", flush=True
            )
    model.load_state_dict(average)
    print(f"after: held-out PSNR {evaluate(model, held_out, args.device):.2f} dB", flush=True)
    torch.save({"model": average, "average": average}, args.out)


if __name__ == "__main__":
    main()
