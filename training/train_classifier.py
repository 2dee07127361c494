"""Train the small classifier whose features measure drawn pictures (bench/quality.py).

    python training/train_classifier.py [--steps 1500]

It sees what a generated picture can look like at best: scenes that went through the bundled tokenizer and back, beside
the scenes themselves. A few minutes on one core. Writes bench/classifier.safetensors with its accuracy in the header.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from linear_core.checkpoints.library import bundled_files, load_tokenizer
from linear_core.tokenizers.tokenizer import VQTokenizer
from training import scenes

WEIGHTS = Path(__file__).parents[1] / "bench" / "classifier.safetensors"
SEED, HELD_OUT = 70_001, 70_002  # of scenes that nothing else is trained or measured on
FEATURES = 32


class Classifier(nn.Module):
    """Four strided convolutions, the mean over places as features, one linear layer."""

    def __init__(self, classes: int = len(scenes.CLASSES)):
        super().__init__()
        layers = []
        for a, b, kernel in ((3, 16, 5), (16, 24, 3), (24, 32, 3), (32, FEATURES, 3)):
            layers += [nn.Conv2d(a, b, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(4, b), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(FEATURES, classes)

    def features(self, pictures: Tensor) -> Tensor:
        """pictures float B 3 H W in -1..1 -> B FEATURES."""
        return self.body(pictures).mean((2, 3))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))


def load_classifier(path: Path = WEIGHTS) -> Classifier:
    model = Classifier()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return model.eval().requires_grad_(False)


def pictures(images: np.ndarray) -> Tensor:
    """uint8 B H W 3 -> float B 3 H W in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def through_tokenizer(tokenizer: VQTokenizer, x: Tensor, batch: int = 8) -> Tensor:
    """Pictures as the tokenizer gives them back: the best that its codes can look like."""
    return torch.cat([tokenizer.decode(tokenizer.encode(part)).clamp(-1, 1) for part in x.split(batch)])


def accuracy(model: Classifier, x: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        right = [(model(a).argmax(1) == b) for a, b in zip(x.split(32), labels.split(32), strict=True)]
    return float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--scenes", type=int, default=4000, help="painted for training")
    parser.add_argument("--decoded", type=int, default=800, help="of them also seen through the tokenizer")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokenizer = load_tokenizer(bundled_files().tokenizer)
    begun = time.perf_counter()
    images, labels = scenes.batch(SEED, args.scenes)
    x, y = pictures(images), torch.from_numpy(labels)
    x, y = torch.cat([x, through_tokenizer(tokenizer, x[: args.decoded])]), torch.cat([y, y[: args.decoded]])
    images, labels = scenes.batch(HELD_OUT, 384)
    held, held_labels = pictures(images), torch.from_numpy(labels)
    print(f"painted and decoded in {time.perf_counter() - begun:.0f} s")

    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=args.steps)
    for step in range(args.steps):
        rng = np.random.default_rng(step)
        pick = torch.from_numpy(rng.integers(0, len(x), args.batch))
        batch = x[pick]
        if step % 2:
            batch = batch.flip(-1)
        loss = F.cross_entropy(model(batch), y[pick])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}  {time.perf_counter() - begun:.0f} s", flush=True)
    model.eval()
    painted = accuracy(model, held, held_labels)
    decoded = accuracy(model, through_tokenizer(tokenizer, held[:192]), held_labels[:192])
    notes = {"accuracy_painted": f"{painted:.4f}", "accuracy_decoded": f"{decoded:.4f}", "licence": "MIT"}
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, args.out, notes)
    print(f"{painted:.1%} of 384 held-out scenes, {decoded:.1%} of 192 of them through the tokenizer: {args.out}")


if __name__ == "__main__":
    main()
