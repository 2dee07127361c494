"""Targets of a Llama layer's weights: from transformers' names to LlamaGen's, which our blocks use."""

from __future__ import annotations

import re

from torch import Tensor

from ...models.lumina import LuminaConfig
from ..weights import Target

QKV = ("q", "k", "v")  # share one matrix here


def rows_of_codes(head: Tensor, config: LuminaConfig) -> Tensor:
    """The output head's rows for codes. Nothing else is drawn, so the others, mostly nine tenths, are not read."""
    return head[config.first_code : config.first_code + config.codes]


RENAMED = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}


def layer_target(layer: str, name: str, kind: str, group: int = 1) -> Target:
    """Target of a weight: `layer` is layers.N, `name` what follows it in the file, `kind` weight or bias.

    group  query heads that share a key head
    """
    if part := re.fullmatch(r"self_attn\.([qkv])_proj", name):
        return Target(f"{layer}.attention.wqkv.{kind}", QKV.index(part[1]), (group, 1, 1))
    return Target(f"{layer}.{RENAMED.get(name, name)}.{kind}")
