"""Keys and weights of VQ tokenizers published in other layouts than LlamaGen's.

transformers (Janus, Emu3) and taming-transformers (Chameleon's, MoVQ, IBQ, Emu3) name the levels and the middle
differently. taming-transformers also counts the decoder's levels from the full resolution, where the others count from
the lowest (github.com/CompVis/taming-transformers, taming/modules/diffusionmodules/model.py); so does transformers'
Emu3, which also keeps attention's convolutions of one pixel as matrices, as diffusers' KL autoencoders do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import partial

from torch import Tensor

from .still import flatten

# transformers' names of Emu3's layers, as taming-transformers has them
EMU3 = (
    (r"\bmiddle_block\.attn_norm\.", "mid.attn_1.norm."),
    (r"\bmiddle_block\.", "mid."),
    (r"\b(up|down)_block\.", ""),
    (r"\battn_norms\.(\d+)\.", r"attn.\1.norm."),
    (r"\b([qkv])_proj\.", r"\1."),
    (r"\bout_proj\.", "proj_out."),
)
# diffusers' names of a KL autoencoder's layers, as taming-transformers or `VQTokenizer` have them
DIFFUSERS = (
    (r"\bmid_block\.resnets\.0\.", "mid.block_1."),
    (r"\bmid_block\.resnets\.1\.", "mid.block_2."),
    (r"\bmid_block\.attentions\.0\.", "mid.attn_1."),
    (r"\battn_1\.group_norm\.", "attn_1.norm."),
    (r"\battn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"\battn_1\.to_out\.0\.", "attn_1.proj_out."),
    (r"\.(?:up|down)_blocks\.(\d+)\.resnets\.", r".conv_blocks.\1.res."),
    (r"\.(?:up|down)_blocks\.(\d+)\.(up|down)samplers\.0\.", r".conv_blocks.\1.\2sample."),
    (r"\bconv_norm_out\.", "norm_out."),
    (r"\bconv_shortcut\.", "nin_shortcut."),
)
IN_TIME = re.compile(r"((?:^|post_)quant_conv|time_conv\.\d+|time_res_stack\.\d+\.conv[12])(?:\.conv)+\.")
MATRIX = re.compile(r"\.attn\w*\.(?:\d+\.)?(?:[qkv]|proj_out)\.weight")
MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def rename_key(key: str, top: int | None = None) -> str:
    """`VQTokenizer`'s name of a key; `top` is the level of the lowest resolution if the decoder counts downwards."""
    key = IN_TIME.sub(r"\1.", taming_key(key))
    key = re.sub(r"\bmid\.(block_1|attn_1|block_2)\b", lambda found: f"mid.{MIDDLE[found[1]]}", key)
    if top is not None:
        key = re.sub(r"\bdecoder\.up\.(\d+)\.", lambda found: f"decoder.up.{top - int(found[1])}.", key)
    key = re.sub(r"\.(?:up|down)\.(\d+)\.block\.", r".conv_blocks.\1.res.", key)
    return re.sub(r"\.(?:up|down)\.(\d+)\.", r".conv_blocks.\1.", key)


def taming_key(key: str) -> str:
    """taming-transformers' name of a key in the layouts of transformers (Emu3's) and diffusers; others are unchanged.

    Levels of diffusers' are counted as ours, and so get our names.
    """
    for pattern, name in (*EMU3, *DIFFUSERS):
        key = re.sub(pattern, name, key)
    return key


def transform(key: str) -> Callable[[Tensor], Tensor]:
    """What turns the weight of this key into what `VQTokenizer` has under the name that `rename_key` gives."""
    key = taming_key(key)
    if IN_TIME.search(key):
        return partial(flatten, key)
    return _as_convolution if MATRIX.search(key) else _unchanged


def _as_convolution(matrix: Tensor) -> Tensor:
    return matrix.reshape(*matrix.shape[:2], 1, 1)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def taming_top_level(keys: Collection[str]) -> int | None:
    """The level of the lowest resolution in a taming-transformers file (its level 0 has no upsampling); else None."""
    keys = [taming_key(key) for key in keys]
    levels = [int(found[1]) for key in keys if (found := re.match(r"decoder\.up\.(\d+)\.", key))]
    return None if not levels or "decoder.up.0.upsample.conv.weight" in keys else max(levels)
