"""Write the bundled model: two safetensors files in LlamaGen's layout, half precision, with metadata.

python training/export.py --vq training/runs/vq/checkpoint.pt --gpt training/runs/gpt/checkpoint.pt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import scenes
import torch
from safetensors.torch import save_file
from train_gpt import CONFIG, GRID, load_tokenizer

ASSETS = Path(__file__).parents[1] / "linear_core" / "assets"
SAMPLING = {"guidance": 3.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.detach().to(torch.float16).contiguous() for k, v in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vq", type=Path, default=Path("training/runs/vq/checkpoint.pt"))
    parser.add_argument("--gpt", type=Path, default=Path("training/runs/gpt/checkpoint.pt"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)

    tokenizer = load_tokenizer(args.vq)
    notes = {"format": "pt", "family": "llamagen-vq", "licence": "MIT"}
    save_file(half(tokenizer.state_dict()), args.out / "landscapes_vq.safetensors", notes)

    decoder = torch.load(args.gpt, map_location="cpu", weights_only=True)["average"]
    notes = {
        "format": "pt",
        "family": "llamagen",
        "licence": "MIT",
        "heads": str(CONFIG.heads),
        "grid": f"{GRID.rows}x{GRID.cols}",
        "classes": json.dumps(scenes.CLASSES),
        "sampling": json.dumps(SAMPLING),
        "tokenizer": "landscapes_vq.safetensors",
    }
    save_file(half(decoder), args.out / "landscapes.safetensors", notes)
    for file in sorted(args.out.glob("*.safetensors")):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
