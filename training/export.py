"""Write the bundled model: two safetensors files in LlamaGen's layout, half precision, with metadata.

    python training/export.py --vq training/runs/vq/checkpoint.pt --gpt training/runs/gpt/checkpoint.pt
    python training/export.py --rope 1d --vq linear_core/assets/landscapes_vq.safetensors \
        --gpt out/landscapes-1d/checkpoint.pt --out out/landscapes-1d
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import scenes
import torch
from safetensors.torch import save_file
from train_gpt import CONFIGS, GRID, load_tokenizer

ASSETS = Path(__file__).parents[1] / "linear_core" / "assets"
SAMPLING = {"guidance": 3.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.detach().to(torch.float16).contiguous() for k, v in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vq", type=Path, default=Path("training/runs/vq/checkpoint.pt"))
    parser.add_argument("--gpt", type=Path, default=Path("training/runs/gpt/checkpoint.pt"))
    parser.add_argument("--rope", choices=CONFIGS, default="2d")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    config, name = CONFIGS[args.rope], "landscapes" if args.rope == "2d" else f"landscapes_{args.rope}"

    tokenizer = load_tokenizer(args.vq)
    notes = {"format": "pt", "family": "llamagen-vq", "licence": "MIT"}
    save_file(half(tokenizer.state_dict()), args.out / "landscapes_vq.safetensors", notes)

    decoder = torch.load(args.gpt, map_location="cpu", weights_only=True)["average"]
    notes = {
        "format": "pt",
        "family": "llamagen",
        "licence": "MIT",
        "heads": str(config.heads),
        "grid": f"{GRID.rows}x{GRID.cols}",
        "classes": json.dumps(scenes.CLASSES),
        "sampling": json.dumps(SAMPLING),
        "tokenizer": "landscapes_vq.safetensors",
    }
    if args.rope != "2d":  # what a file that names none has
        notes["rope"] = args.rope
    save_file(half(decoder), args.out / f"{name}.safetensors", notes)
    for file in sorted(args.out.glob("*.safetensors")):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
