"""LlamaGen's own decoding loop, from a checkout of github.com/FoundationVision/LlamaGen, with our weights.

Runs as published: `autoregressive/models/generate.py` and `gpt.py`, unchanged; nothing in them needs CUDA. What the
sampling script adds around them, such as the option torch.compile, is not used.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from bench.machine import timed
from bench.shapes import ModelShape
from linear_core.models.llamagen import LlamaGen


class Published:
    """The published model and loop, for `images` classes with the shape's guidance.

    weights  those of `model`, under their published names
    """

    name, label = "published", "LlamaGen"
    description = "published: LlamaGen's generate.py and gpt.py, uncompiled, with our weights."
    block = 1

    @staticmethod
    def fits(shape: ModelShape) -> bool:
        return shape.network is LlamaGen and shape.config.classes == 1000

    @staticmethod
    def missing(against: str) -> str:
        """What is missing at `against`; empty if nothing."""
        if (Path(against) / "autoregressive" / "models" / "generate.py").exists():
            return ""
        return f"{against} is not a checkout of LlamaGen: autoregressive/models/generate.py is missing."

    def __init__(self, against: str, model: LlamaGen, weights: dict[str, Tensor], shape: ModelShape, images: int):
        sys.path.insert(0, against)
        warnings.filterwarnings("ignore", message=".*sdp_kernel.*")  # it calls a function that has a newer name
        gpt = importlib.import_module("autoregressive.models.gpt")
        self.loop = importlib.import_module("autoregressive.models.generate")
        c, grid = model.config, model.grid
        settings = gpt.ModelArgs(
            dim=c.width, n_layer=c.layers, n_head=c.heads, vocab_size=c.codes, num_classes=c.classes,
            block_size=grid.rows * grid.cols, cls_token_num=1, norm_eps=c.eps,
        )  # fmt: skip
        settings.multiple_of = 1 if c.hidden % settings.multiple_of else settings.multiple_of
        self.model = gpt.Transformer(settings)
        self.model.load_state_dict(weights, assign=True)
        self.model.eval()
        self.images, self.guidance = images, shape.sample.guidance
        self.sampling = {"temperature": 1.0, "top_k": shape.sample.top_k, "top_p": 1.0}
        self.tokens, self.device = grid.tokens, model.device
        self.classes = torch.arange(images, device=model.device) % c.classes
        rows = images * (2 if self.guidance > 1 else 1)
        with torch.device(self.device):  # as `generate` does before its first token
            self.model.setup_caches(rows, 1 + self.tokens, self.model.tok_embeddings.weight.dtype)

    def picture(self) -> Tensor:
        """Draw whole images: int B N."""
        return self.loop.generate(self.model, self.classes, self.tokens, cfg_scale=self.guidance, **self.sampling)

    @torch.no_grad()
    def prefill(self) -> Tensor:
        """Logits B V of the first token of all sequences."""
        unconditional = torch.full_like(self.classes, self.model.num_classes)
        cond = torch.cat([self.classes, unconditional]) if self.guidance > 1 else self.classes
        return self.model(None, cond, torch.arange(1, device=self.device))[0][:, -1]

    def seconds(self, count: int) -> list[float]:
        """Time of each of `count` tokens."""
        return [timed(self.device.type, self.step) for _ in range(count)]

    @torch.no_grad()
    def step(self) -> None:
        """A token by the published loop, sampling included. Its cost does not depend on its position in the image."""
        token = torch.zeros(self.images, 1, dtype=torch.int64, device=self.device)
        position = torch.tensor([self.tokens // 2], device=self.device, dtype=torch.int)
        self.loop.decode_n_tokens(self.model, token, position, 1, self.guidance, -1, **self.sampling)
