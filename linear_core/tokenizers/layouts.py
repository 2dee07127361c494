"""Key names of VQ tokenizers published in other layouts than LlamaGen's.

transformers (Janus) and taming-transformers (Chameleon's, for Lumina-mGPT and Anole) name the levels and the middle
differently. taming-transformers also counts the decoder's levels from the full resolution, where the others count from
the lowest (github.com/CompVis/taming-transformers, taming/modules/diffusionmodules/model.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection

MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def rename_key(key: str, top: int | None = None) -> str:
    """`VQTokenizer`'s name of a key; `top` is the level of the lowest resolution if the decoder counts downwards."""
    key = re.sub(r"\bmid\.(block_1|attn_1|block_2)\b", lambda found: f"mid.{MIDDLE[found[1]]}", key)
    if top is not None:
        key = re.sub(r"\bdecoder\.up\.(\d+)\.", lambda found: f"decoder.up.{top - int(found[1])}.", key)
    key = re.sub(r"\.(?:up|down)\.(\d+)\.block\.", r".conv_blocks.\1.res.", key)
    return re.sub(r"\.(?:up|down)\.(\d+)\.", r".conv_blocks.\1.", key)


def taming_top_level(keys: Collection[str]) -> int | None:
    """The level of the lowest resolution in a taming-transformers file (its level 0 has no upsampling); else None."""
    levels = [int(found[1]) for key in keys if (found := re.match(r"decoder\.up\.(\d+)\.", key))]
    return None if not levels or "decoder.up.0.upsample.conv.weight" in keys else max(levels)
