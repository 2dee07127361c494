"""transformers' decoding loop for Janus, with our weights: `generate(generation_mode="image")`, unchanged.

Runs with its defaults: eager, scaled_dot_product_attention, a static cache for the whole image. Every token reads that
cache completely, so a step costs the same anywhere in the image.
"""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from torch import Tensor, nn

from bench.machine import synchronize
from bench.shapes import ModelShape
from linear_core.checkpoints.families.janus import target
from linear_core.models.janus import Janus


class Clock:
    """A logits processor that changes nothing, but keeps the time of each token's logits, and the first logits."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, list[float]()

    def __call__(self, tokens: Tensor, logits: Tensor) -> Tensor:
        synchronize(self.device.type)
        self.times.append(time.perf_counter())
        if len(self.times) == 1:
            self.first = logits.float()
        return logits


class Transformers:
    """transformers' model and loop. `weights` are those of `model`, under our names; they are shared, not copied.

    `against` is not used: the class is chosen by its name.
    """

    name = label = "transformers"
    description = (
        "transformers: generate(generation_mode='image') with our weights and its static cache for the whole image; "
        "with --lines, a logits processor measures the time of every token."
    )
    block = 8  # every run starts with the prompt, which has to pay off

    @staticmethod
    def fits(shape: ModelShape) -> bool:
        return shape.network is Janus

    @staticmethod
    def missing(against: str) -> str:
        """What has to be installed; empty if nothing."""
        try:
            from transformers import JanusForConditionalGeneration, __version__  # noqa: F401
        except ImportError:
            return "it takes transformers with Janus; pip install 'transformers>=4.57'."
        return "transformers 5.4 draws no Janus images; take another." if __version__.startswith("5.4.") else ""

    def __init__(self, against: str, model: Janus, weights: dict[str, Tensor], shape: ModelShape, images: int):
        from transformers import GenerationConfig

        prompt, self.tokens, self.device = shape.prompt(images).to(model.device), model.grid.tokens, model.device
        self.ids = prompt.tokens
        self.guidance, self.top_k = shape.sample.guidance, shape.sample.top_k
        self.network = network(shape, weights)
        begin, *_, image = prompt.tokens[0].tolist()
        self.network.generation_config = GenerationConfig(
            bos_token_id=begin, pad_token_id=int(prompt.negative.tokens[0, 1]), max_length=prompt.length + self.tokens
        )
        self.network.generation_config.generation_kwargs = {"boi_token_id": image}

    def run(self, tokens: int) -> tuple[Tensor, Clock]:
        """Draw the first `tokens` tokens of every image, int B N, with a cache for the whole image."""
        from transformers import LogitsProcessorList

        clock = Clock(self.device)
        self.network.model.vision_model.config.num_image_tokens = tokens  # the loop's number of tokens
        codes = self.network.generate(
            self.ids, attention_mask=torch.ones_like(self.ids), logits_processor=LogitsProcessorList([clock]),
            generation_mode="image", do_sample=True, guidance_scale=self.guidance, top_k=self.top_k,
        )  # fmt: skip
        return codes, clock

    def picture(self) -> Tensor:
        """Draw whole images: int B N."""
        return self.run(self.tokens)[0]

    def prefill(self) -> Tensor:
        """Logits B V of the first token of all sequences, after everything that `generate` does for one token."""
        return self.run(1)[1].first

    def seconds(self, count: int) -> list[float]:
        """Time from one token's logits to the next: sampling, embedding, layers and head."""
        times = self.run(1 + count)[1].times
        return [after - before for before, after in pairwise(times)]


def network(shape: ModelShape, weights: dict[str, Tensor]) -> nn.Module:
    """transformers' Janus of this shape. Its vision and VQ parts are tiny, because drawing tokens does not use them."""
    import transformers

    c, first = shape.config, weights["norm.weight"]
    config = transformers.JanusConfig(
        text_config={
            "model_type": "llama", "vocab_size": c.vocabulary, "hidden_size": c.width, "intermediate_size": c.hidden,
            "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "num_key_value_heads": c.heads,
            "rms_norm_eps": c.eps, "rope_theta": c.rope_base, "max_position_embeddings": 16384,
        },
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "projection_dim": 16},
        vq_config={
            "embed_dim": c.code_dim, "num_embeddings": c.codes, "projection_dim": c.head_hidden,
            "image_token_embed_dim": c.width, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1],
            "num_res_blocks": 1,
        },
    )  # fmt: skip
    with torch.device("meta"):
        made = transformers.JanusForConditionalGeneration(config)
    named = {}
    for name, empty in made.state_dict().items():
        found = target(name, c)
        if found is not None:
            named[name] = weights[found.name].chunk(found.parts)[found.part]
        elif name == "lm_head.weight":
            named[name] = weights["embed_tokens.weight"]  # writes text; not a second table for that
        else:
            named[name] = torch.zeros_like(empty, dtype=first.dtype, device=first.device)
    made.load_state_dict(named, assign=True)
    llama = made.model.language_model
    llama.rotary_emb = type(llama.rotary_emb)(llama.config).to(first.device)  # its table is not among the weights
    return made.eval()
