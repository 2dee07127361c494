"""Key names of VQ tokenizers that were published in another layout than LlamaGen's: data, and one renaming.

Chameleon's (Lumina-mGPT, Anole) is taming-transformers': `decoder.up.0` is the *full* resolution, levels and the three
blocks of the middle have names, and only the middle has attention (github.com/CompVis/taming-transformers,
taming/modules/diffusionmodules/model.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def is_taming(names: Iterable[str]) -> bool:
    return any(re.match(r"decoder\.up\.0\.block\.0\.", name) for name in names)


def taming_to_ours(names: Iterable[str]) -> dict[str, str]:
    """Each name of a taming-transformers file and what `VQTokenizer` calls it; other names stay as they are.

    Levels of the decoder are counted from the lowest resolution here and from the highest there.
    """
    names = list(names)
    top = max(int(found[1]) for name in names if (found := re.match(r"decoder\.up\.(\d+)\.", name)))

    def ours(name: str) -> str:
        name = re.sub(r"^(encoder|decoder)\.mid\.(\w+)", lambda m: f"{m[1]}.mid.{MIDDLE.get(m[2], m[2])}", name)
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.conv_blocks.{top - int(m[1])}", name)
        name = re.sub(r"^encoder\.down\.(\d+)", r"encoder.conv_blocks.\1", name)
        return re.sub(r"^((?:en|de)coder\.conv_blocks\.\d+)\.block\.", r"\1.res.", name)

    return {name: ours(name) for name in names}
