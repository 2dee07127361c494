"""Write the bundled next-scale model: two safetensors files under VAR's key names, half precision, with metadata.

python training/export_scales.py --vq training/runs/pyramid/checkpoint.pt --var training/runs/scales/checkpoint.pt
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import scenes
import torch
from export import ASSETS, half
from safetensors.torch import save_file
from train_pyramid import PYRAMID, load_tokenizer

SAMPLING = {"guidance": 3.0, "top_k": 0, "top_p": 0.95, "temperature": 1.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vq", type=Path, default=Path("training/runs/pyramid/checkpoint.pt"))
    parser.add_argument("--var", type=Path, default=Path("training/runs/scales/checkpoint.pt"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)

    notes = {"format": "pt", "family": "var-vq", "licence": "MIT"}
    tokenizer = half(load_tokenizer(args.vq).state_dict())
    save_file(tokenizer, args.out / "landscapes_var_vq.safetensors", notes)

    decoder = torch.load(args.var, map_location="cpu", weights_only=True)["average"]
    notes = {
        "format": "pt",
        "family": "var",
        "licence": "MIT",
        "sides": PYRAMID.text,
        "classes": json.dumps(scenes.CLASSES),
        "sampling": json.dumps(SAMPLING),
        "tokenizer": "landscapes_var_vq.safetensors",
    }
    save_file(half(decoder), args.out / "landscapes_var.safetensors", notes)
    for file in sorted(args.out.glob("landscapes_var*.safetensors")):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
