"""Janus' prompt for an image, as its authors write it: a chat's first turn, and the answer begun with an image.

Behaves as generation_inference.py of github.com/deepseek-ai/Janus. The ids of special tokens differ between uploads, so
they are looked up by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..prompts import Prompt, token_prompt
from .tokenizer import TextTokenizer

BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
IMAGE = "<begin_of_image>"
ROLES = ("<|User|>", "<|Assistant|>")  # Janus-Pro's, which are tokens of its vocabulary
OLD_ROLES = ("User", "Assistant")  # Janus-1.3B's


def janus_prompt(words: TextTokenizer, texts: Sequence[str], negative: str = "") -> Prompt:
    """One image for each text, guided from `negative`; without one from the text with all but its ends blotted out."""
    rows = [_row(words, text) for text in texts]
    if negative:
        away = [_row(words, negative)] * len(rows)
    else:
        pad = words.id(PAD)
        away = [[row[0], *[pad] * (len(row) - 2), row[-1]] for row in rows]
    return token_prompt(rows, tuple(texts), token_prompt(away))


def _row(words: TextTokenizer, text: str) -> list[int]:
    user, assistant = ROLES if words.knows(ROLES[0]) else OLD_ROLES
    chat = f"{user}: {text.strip()}\n\n{assistant}:"
    return [words.id(BEGIN), *words.ids(chat), words.id(IMAGE)]
