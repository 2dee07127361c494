"""Text features for LlamaGen and Infinity: the last hidden states of FLAN-T5-XL's encoder in bfloat16.

transformers, tokenizers and sentencepiece come with ComfyUI and are imported only when a text is encoded. Apart from
the tokenizer's own file, nothing here reads the disk or the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UserError
from ..prompts import Prompt

if TYPE_CHECKING:
    from transformers import T5EncoderModel

LENGTH = 120  # tokens of a caption, in every published LlamaGen
DTYPE = torch.bfloat16  # as published; T5 overflows in float16
END, PAD = 1, 0  # ids shared by every T5
SCALED = {
    "scale_weight",
    "weight_scale",
    "scaled_fp8",
    "comfy_quant",
}  # keys by which ComfyUI marks scaled 8-bit weights
PROBE = "encoder.block.0.layer.0.SelfAttention.q.weight"


class T5Tokenizer:
    """Ids of a text, from a tokenizer.json, a spiece.model or the bytes of one."""

    def __init__(self, source: Path | bytes):
        if isinstance(source, Path) and source.suffix == ".json":
            with comfyui_package():
                from tokenizers import Tokenizer
            tokenizer = Tokenizer.from_str(source.read_text(encoding="utf-8-sig"))
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._ids: Callable[[str], list[int]] = lambda text: tokenizer.encode(text, add_special_tokens=False).ids
        else:
            with comfyui_package():
                from sentencepiece import SentencePieceProcessor
            model = source.read_bytes() if isinstance(source, Path) else source
            self._ids = SentencePieceProcessor(model_proto=model).encode

    def ids(self, text: str, length: int = LENGTH) -> list[int]:
        """At most `length` ids, the last of them the end token; a longer text is truncated, as published.

        Raises UserError for a text that cannot be encoded, such as half a letter.
        """
        try:
            return [*self._ids(text)[: length - 1], END]
        except Exception as error:  # both packages have exceptions of their own
            raise UserError(f"text: the text encoder's tokenizer cannot encode it ({error}).") from error


def build(weights: Mapping[str, Tensor]) -> T5EncoderModel:
    """transformers' T5EncoderModel with `weights`: those of a T5 or its encoder, under any prefix. Other keys are
    ignored.

    Every size is read from shapes; the rest (gelu, epsilon, reach of the position bias) is that of T5 1.1 and FLAN.
    Raises ValueError that completes the sentence "the file …".
    """
    prefix = next((k.removesuffix(PROBE) for k in weights if k.endswith(PROBE)), None)
    if prefix is None:
        raise ValueError("is not a T5 text encoder")
    ours = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    if any(k.rpartition(".")[2] in SCALED for k in weights):
        raise ValueError("is scaled to 8 bits, which is not supported; use a bf16, fp16 or fp32 file")
    table = ours.get("shared.weight", ours.get("encoder.embed_tokens.weight"))
    gated = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight" in ours
    try:
        buckets, heads = ours["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
        hidden = ours[f"encoder.block.0.layer.1.DenseReluDense.wi{'_0' if gated else ''}.weight"].shape[0]
        inner = ours[PROBE].shape[0]
    except KeyError as error:
        raise ValueError(f"lacks the weight {error}") from error
    except IndexError as error:
        raise ValueError("has weights of the wrong shape for a T5") from error
    if table is None:
        raise ValueError("lacks the weight 'shared.weight'")
    layers = 1 + max(int(k.split(".")[2]) for k in ours if k.startswith("encoder.block."))
    if table.ndim != 2 or not all((*table.shape, buckets, heads, hidden, inner)) or inner % heads or layers > len(ours):
        raise ValueError("has weights of the wrong shape for a T5")
    with comfyui_package():
        from transformers import T5Config, T5EncoderModel
    config = T5Config(
        vocab_size=table.shape[0],
        d_model=table.shape[1],
        d_kv=inner // heads,
        d_ff=hidden,
        num_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
        use_cache=False,
    )
    with torch.device("meta"):
        encoder = T5EncoderModel(config)
    ours |= {"shared.weight": table, "encoder.embed_tokens.weight": table}
    for name, expected in encoder.state_dict().items():
        if name not in ours:
            raise ValueError(f"lacks the weight '{name}'")
        if ours[name].shape != expected.shape:
            raise ValueError(f"has '{name}' of {list(ours[name].shape)} where {list(expected.shape)} was expected")
        if not ours[name].is_floating_point():
            raise ValueError(f"has '{name}' of {ours[name].dtype} where floating-point numbers were expected")
    encoder.load_state_dict({k: ours[k].to(DTYPE) for k in encoder.state_dict()}, assign=True)
    encoder.set_input_embeddings(encoder.shared)  # one table, not two
    return encoder.eval().requires_grad_(False)


@torch.inference_mode()
def encode(
    text: str, tokenizer: T5Tokenizer, encoder: T5EncoderModel, device: torch.device | str, length: int = LENGTH
) -> Tensor:
    """Features of a cleaned text: bfloat16 N D on the CPU, N at most `length`.

    Texts are encoded one by one and padded to `length`, so that a text's features depend on nothing else. Raises
    UserError if the tokenizer's ids are not in the encoder's vocabulary.
    """
    ids = tokenizer.ids(text, length)
    if max(ids) >= encoder.config.vocab_size:
        raise UserError("text encoder: the tokenizer next to it belongs to another model; put FLAN-T5's there.")
    padded = torch.full((1, length), PAD, device=device)
    padded[0, : len(ids)] = torch.tensor(ids)
    mask = (torch.arange(length, device=device) < len(ids))[None].long()
    states = encoder(input_ids=padded, attention_mask=mask).last_hidden_state
    return states[0, : len(ids)].cpu()


def text_prompt(features: Sequence[Tensor], names: tuple[str, ...] = (), length: int = LENGTH) -> Prompt:
    """One image for each text's features N D, left-padded with zeros to `length` as in LlamaGen's sampler."""
    rows = torch.zeros(len(features), length, features[0].shape[-1])
    for row, states in zip(rows, features, strict=True):
        row[length - len(states) :] = states
    return Prompt(rows, torch.tensor([length - len(states) for states in features]), names)


@contextmanager
def comfyui_package() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"text prompts need a Python package that comes with ComfyUI ({error}); without ComfyUI, run "
            "pip install transformers sentencepiece."
        ) from error
