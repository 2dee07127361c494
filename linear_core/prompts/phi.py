"""Text features for NOVA: the last hidden states of Phi-2 in float16, as published.

Attention is causal and padding comes behind, so that a text is encoded alone. transformers comes with ComfyUI and is
imported only when a text is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from .t5 import comfyui_package
from .tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PhiModel

DTYPE = torch.float16


def build(weights: Mapping[str, Tensor], heads: int, rotated: float) -> PhiModel:
    """transformers' PhiModel with `weights`, in their dtype; other keys are ignored.

    heads    of attention, which shapes do not tell
    rotated  share of each head that is rotated by place
    Raises ValueError that completes the sentence "the folder …".
    """
    try:
        vocabulary, width = weights["embed_tokens.weight"].shape
        hidden = weights["layers.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(f"is not a Phi text encoder ({error})") from error
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
    if layers > len(weights) or width % heads:
        raise ValueError(f"has {layers} layers and {heads} heads of a width of {width}")
    with comfyui_package():
        from transformers import PhiConfig, PhiModel
        from transformers.models.phi.modeling_phi import PhiRotaryEmbedding
    config = PhiConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, partial_rotary_factor=rotated, use_cache=False,
    )  # fmt: skip
    with torch.device("meta"):
        encoder = PhiModel(config)
    for name, expected in encoder.state_dict().items():
        if name not in weights:
            raise ValueError(f"lacks the weight '{name}'")
        if weights[name].shape != expected.shape or not weights[name].is_floating_point():
            raise ValueError(f"has '{name}' of {list(weights[name].shape)} where {list(expected.shape)} was expected")
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()}, assign=True)
    encoder.rotary_emb = PhiRotaryEmbedding(config)  # its frequencies are not in the file
    return encoder.eval().requires_grad_(False)


@torch.inference_mode()
def text_features(tokenizer: TextTokenizer, encoder: PhiModel, text: str, length: int) -> Tensor:
    """Features of a text N D, of at most `length` tokens; a longer text is truncated, as published."""
    ids = tokenizer.ids(text)[:length]
    if not ids:
        return torch.zeros(0, encoder.config.hidden_size)
    if max(ids) >= encoder.config.vocab_size:
        raise UserError("text encoder: the tokenizer next to it belongs to another model; download both again.")
    return encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].float()
