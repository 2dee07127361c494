"""Janus' prompt for an image, as its authors write it: the first turn of a chat, and an answer that begins an image.

Behaves as generation_inference.py of github.com/deepseek-ai/Janus. Ids of special tokens differ between uploads, so
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


def janus_prompt(tokenizer: TextTokenizer, texts: Sequence[str], negative: str = "") -> Prompt:
    """One image per text, guided away from `negative`, or by default from the text with all but its ends padded out."""
    rows = [_row(tokenizer, text) for text in texts]
    if negative:
        negatives = [_row(tokenizer, negative)] * len(rows)
    else:
        pad = tokenizer.id(PAD)
        negatives = [[row[0], *[pad] * (len(row) - 2), row[-1]] for row in rows]
    return token_prompt(rows, tuple(texts), token_prompt(negatives))


def _row(tokenizer: TextTokenizer, text: str) -> list[int]:
    user, assistant = ROLES if tokenizer.has(ROLES[0]) else OLD_ROLES
    chat = f"{user}: {text.strip()}\n\n{assistant}:"
    return [tokenizer.id(BEGIN), *tokenizer.ids(chat), tokenizer.id(IMAGE)]
