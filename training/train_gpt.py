"""Train the class-conditional decoder of the bundled model on the codes of drawn scenes.

    python training/train_gpt.py --tokenizer training/runs/vq/checkpoint.pt --out training/runs/gpt --steps 2600
    python training/train_gpt.py --rope 1d --tokenizer linear_core/assets/landscapes_vq.safetensors \
        --shards 3 --batch 8 --steps 800 --out out/landscapes-1d

The second makes a smaller model with 1-D RoPE. It is not shipped: bench/quality.py measures on it, too, what was chosen
on the bundled one.

Three stages, each resumable by rerunning the same command: paint scenes, encode them and their mirror images, train.
Muon for the matrices inside the blocks, AdamW for the rest, bf16 autocast, moving average of the weights.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import scenes
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from train_vq import CONFIG as VQ_CONFIG
from train_vq import pictures

from linear_core.grid import Grid
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.prompts import Prompt
from linear_core.tokenizers.tokenizer import VQTokenizer

GRID = Grid(24, 24)
CONFIG = LlamaGenConfig(layers=6, width=256, heads=8, hidden=768, codes=VQ_CONFIG.codes, classes=len(scenes.CLASSES))
CONFIGS = {"2d": CONFIG, "1d": replace(CONFIG, layers=4, width=192, heads=3, hidden=512, rope="1d")}
SHARD = 1000  # scenes a file
NOTHING = CONFIG.classes  # the unconditional class


def load_tokenizer(path: Path) -> VQTokenizer:
    """The averaged weights of a `train_vq.py` checkpoint, or those that `export.py` made of them."""
    if path.suffix == ".safetensors":
        model = VQTokenizer(VQ_CONFIG)
        model.load_state_dict(load_file(path))
        return model.eval()
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = VQTokenizer(VQ_CONFIG)
    model.load_state_dict(state["average"])
    model.quantize.embedding.weight.data.copy_(state["model"]["quantize.embedding.weight"])
    return model.eval()


def paint(folder: Path, shards: int) -> None:
    """Shard i holds the scenes of seed 1000 + i; written once."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(shards):
        file = folder / f"scenes_{i}.npz"
        if not file.exists():
            images, labels = scenes.batch(1000 + i, SHARD)
            with (folder / "part").open("wb") as part:
                np.savez(part, images=images, labels=labels)
            (folder / "part").replace(file)


@torch.inference_mode()
def encode(folder: Path, shards: int, tokenizer: VQTokenizer, device: str) -> tuple[Tensor, Tensor]:
    """Codes of every scene and of its mirror image: int16 N 2 576, and labels int64 N."""
    codes, labels = [], []
    for i in range(shards):
        file = folder / f"codes_{i}.npz"
        if not file.exists():
            data = np.load(folder / f"scenes_{i}.npz")
            x = pictures(data["images"], "cpu")
            with torch.autocast(device, torch.bfloat16):
                both = [
                    torch.cat([tokenizer.encode(p.to(device)).flatten(1).cpu() for p in side.split(16)])
                    for side in (x, x.flip(-1))
                ]
            np.savez(file, codes=torch.stack(both, 1).to(torch.int16).numpy(), labels=data["labels"])
            print(f"encoded {i + 1}/{shards}", flush=True)
        data = np.load(file)
        codes.append(torch.from_numpy(data["codes"]))
        labels.append(torch.from_numpy(data["labels"]))
    return torch.cat(codes), torch.cat(labels)


def loss_of(model: torch.nn.Module, codes: Tensor, labels: Tensor) -> Tensor:
    """Mean nats a token. codes int64 B 576, labels int64 B."""
    prompt = Prompt(labels[:, None], torch.zeros_like(labels))
    logits = model(prompt, codes[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("training/runs/vq/checkpoint.pt"))
    parser.add_argument(
        "--out", type=Path, default=Path("training/runs/gpt"), help="folder for data, checkpoints and log"
    )
    parser.add_argument("--rope", choices=CONFIGS, default="2d", help="2d: the bundled model's; 1d: a smaller one")
    parser.add_argument("--shards", type=int, default=12, help="thousands of scenes")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.02, help="peak learning rate of Muon; AdamW's is 0.15 of it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--paint-only", action="store_true", help="stop after painting")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    args = parser.parse_args()

    data = args.out / "data"
    paint(data, args.shards)
    if args.paint_only:
        return
    codes, labels = encode(data, args.shards, load_tokenizer(args.tokenizer).to(args.device), args.device)
    held_codes, held_labels = codes[-64:, 0].long().to(args.device), labels[-64:].to(args.device)
    codes, labels = codes[:-64], labels[:-64]

    torch.manual_seed(0)
    config = CONFIGS[args.rope]
    model = LlamaGen(config, GRID).to(args.device)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.02 if name != "output.weight" else 1e-4)
    matrices = [p for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2]
    others = [p for n, p in model.named_parameters() if not (n.startswith("layers.") and p.dim() == 2)]
    muon = torch.optim.Muon(matrices, lr=args.rate, weight_decay=0.01, momentum=0.95)
    adam = torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0)
    average = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start, checkpoint = 0, args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        average, start = state["average"], state["step"]
        print(f"resumed at step {start}")
    run = torch.compile(model) if args.compile else model

    clock, log = time.time(), args.out / "log.jsonl"
    for step in range(start, args.steps):
        left = 1 - step / args.steps
        rate = args.rate * min(1, (step + 1) / 50) * min(1, left / 0.5 + 0.02)  # flat, then linearly down
        for optimizer, factor in ((muon, 1.0), (adam, 0.15)):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        rng = np.random.default_rng(step)
        pick = torch.from_numpy(rng.integers(0, len(codes), args.batch))
        side = torch.from_numpy(rng.integers(0, 2, args.batch))
        nameless = torch.from_numpy(rng.random(args.batch) < 0.1)
        x = codes[pick, side].long().to(args.device)
        y = torch.where(nameless, NOTHING, labels[pick]).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = loss_of(run, x, y)
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
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            state = {"model": model.state_dict(), "average": average, "muon": muon.state_dict(),
                     "adam": adam.state_dict(), "step": step + 1}  # fmt: skip
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            smooth = LlamaGen(config, GRID).to(args.device)
            smooth.load_state_dict(average)
            with torch.inference_mode():
                parts = zip(held_codes.split(16), held_labels.split(16), strict=True)
                nats = sum(loss_of(smooth, c, y).item() for c, y in parts) / 4
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": loss.item(), "held_out_nats": nats}) + "\n")
            print(f"step {step + 1}  held out {nats:.4f} nats a token", flush=True)


if __name__ == "__main__":
    main()
