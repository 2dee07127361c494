"""Models by shape, which is what speed and memory depend on. Weights are random, with the published sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linear_core.checkpoints.library import bundled_files, load_model
from linear_core.grid import Grid
from linear_core.models.janus import Janus, JanusConfig
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.models.lumina import Lumina, LuminaConfig
from linear_core.plan import CacheShape, SamplePlan
from linear_core.prompts import Prompt, class_prompt, token_prompt

CODES = 16384
LLAMAGEN = {  # layers, width, heads, feed-forward
    "B": (12, 768, 12, 2048),
    "L": (24, 1024, 16, 2816),
    "XL": (36, 1280, 20, 3584),
    "XXL": (48, 1536, 24, 4096),
    "3B": (24, 3200, 32, 8704),
}
CHAMELEON = LuminaConfig(32, 4096, 32, 11008, 8192, 65536, 1e-5, qk_norm="layer")
LUMINA_2 = LuminaConfig(32, 4096, 32, 11008, 16384, 171384, 1e-5, qk_norm="layer", first_code=155000)
EMU3 = LuminaConfig(32, 4096, 32, 14336, 32768, 184622, 1e-5, 1e6, key_heads=8, head_dim=128, first_code=151854)
U0_4B, EMU35 = (  # the sizes of U0-4B are those of Qwen3-4B, which its number of weights agrees with
    LuminaConfig(layers, width, heads, hidden, 131072, 282926, 1e-5, 1e6, "rms", 8, 128, first_code=151854)
    for layers, width, heads, hidden in ((36, 2560, 32, 9728), (64, 5120, 64, 25600))
)
EOL = 8799  # of Lumina-mGPT, counted from code 0
PROMPT_TOKENS = 48  # about what a sentence takes as a chat


@dataclass(frozen=True)
class ModelShape:
    """A model without weights. `prompt_tokens`: tokens of a text prompt; 0: the prompt is a class."""

    name: str
    network: type[nn.Module]
    config: Any
    grid: Grid
    sample: SamplePlan
    prompt_tokens: int = 0

    def cache_shape(self, dtype: torch.dtype) -> CacheShape:
        return self.config.cache_shape(max(self.prompt_tokens, 1), dtype.itemsize)

    def parameters(self) -> tuple[int, int]:
        """Number of parameters, and of those that every step reads: embedding tables are looked up, not read."""
        with torch.device("meta"):
            return count(self.network(self.config, self.grid))

    def prompt(self, images: int) -> Prompt:
        """A prompt for so many images, guided from another one of the same length."""
        if not self.prompt_tokens:
            return class_prompt([i % self.config.classes for i in range(images)])
        rows = [[1, *[5] * (self.prompt_tokens - 2), 2]] * images
        return token_prompt(rows, negative=token_prompt([[1, *[3] * (self.prompt_tokens - 2), 2]] * images))

    def make(self, dtype: torch.dtype, device: str) -> nn.Module:
        """The bundled model, or a model with random weights of the magnitude of trained ones."""
        if self.name == "landscapes":
            return load_model(bundled_files(), device=device, dtype=dtype).decoder
        with torch.device("meta"):
            model = self.network(self.config, self.grid)
        model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
        for name, weight in model.state_dict().items():
            if weight.ndim == 1 or "norm" in name:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5)
        return model


def count(model: nn.Module) -> tuple[int, int]:
    """Number of parameters of a model, and of those that every step reads."""
    tables = sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    total = sum(p.numel() for p in model.parameters())
    return total, total - tables


def _shapes() -> list[ModelShape]:
    top_k = SamplePlan(guidance=4.0, top_k=2000)
    bundled = load_model(bundled_files())
    shapes = [
        ModelShape("landscapes", LlamaGen, bundled.info.config, bundled.info.grid, bundled.info.defaults),
    ]
    for size, (layers, width, heads, hidden) in LLAMAGEN.items():
        config = LlamaGenConfig(layers, width, heads, hidden, CODES, classes=1000)
        shapes.append(ModelShape(f"LlamaGen-{size}", LlamaGen, config, Grid(24, 24), top_k))
    for size, (layers, width, heads, hidden) in {"1B": (24, 2048, 16, 5632), "7B": (30, 4096, 32, 11008)}.items():
        config = JanusConfig(layers, width, heads, hidden, CODES, 102400, head_hidden=width)
        shapes.append(
            ModelShape(f"Janus-Pro-{size}", Janus, config, Grid(24, 24), SamplePlan(guidance=5.0), PROMPT_TOKENS)
        )
    for pixels in (768, 1024):
        grid = Grid(pixels // 16, pixels // 16, eol=EOL)
        shapes.append(ModelShape(f"Lumina-mGPT-{pixels}", Lumina, CHAMELEON, grid, top_k, PROMPT_TOKENS))
    for pixels in (512, 768):
        grid, sample = Grid(pixels // 8, pixels // 8, eol=151670 - 155000), SamplePlan(guidance=4.0, top_k=4096)
        shapes.append(ModelShape(f"Lumina-mGPT-2.0-{pixels}", Lumina, LUMINA_2, grid, sample, 64))
    for name, config, side, sample, prompt in (
        ("Emu3-Stage1", EMU3, 64, SamplePlan(guidance=3.0, top_k=2048), 128),
        ("Emu3-Gen", EMU3, 90, SamplePlan(guidance=3.0, top_k=2048), 128),
        ("Xiaomi-Robotics-U0-4B", U0_4B, 64, SamplePlan(guidance=3.0, top_k=5120), 64),
        ("Emu3.5-Image", EMU35, 64, SamplePlan(guidance=5.0, top_k=5120), 64),
    ):
        shapes.append(ModelShape(name, Lumina, config, Grid(side, side, eol=-8), sample, prompt))
    return shapes


SHAPES = {shape.name: shape for shape in _shapes()}
