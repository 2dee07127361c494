"""Key names of VQ tokenizers that were published in other layouts than LlamaGen's.

transformers (Janus) and taming-transformers (Chameleon's, for Lumina-mGPT and Anole) call the levels and the middle
otherwise. The latter also counts the decoder's levels from the full resolution, where the others count from the lowest
(github.com/CompVis/taming-transformers, taming/modules/diffusionmodules/model.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection

MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def renamed(key: str, top: int | None = None) -> str:
    """What `VQTokenizer` calls a weight; `top` is the lowest resolution's level where the decoder counts downwards."""
    key = re.sub(r"\bmid\.(block_1|attn_1|block_2)\b", lambda found: f"mid.{MIDDLE[found[1]]}", key)
    if top is not None:
        key = re.sub(r"\bdecoder\.up\.(\d+)\.", lambda found: f"decoder.up.{top - int(found[1])}.", key)
    key = re.sub(r"\.(?:up|down)\.(\d+)\.block\.", r".conv_blocks.\1.res.", key)
    return re.sub(r"\.(?:up|down)\.(\d+)\.", r".conv_blocks.\1.", key)


def taming_top(keys: Collection[str]) -> int | None:
    """The lowest resolution's level in a taming-transformers file, whose level 0 has nothing to enlarge; else None."""
    levels = [int(found[1]) for key in keys if (found := re.match(r"decoder\.up\.(\d+)\.", key))]
    return None if not levels or "decoder.up.0.upsample.conv.weight" in keys else max(levels)
