"""Janus' prompt for an image, as its authors write it: the first turn of a chat, and an answer that begins an image.

Behaves as generation_inference.py of github.com/deepseek-ai/Janus; a question about an image, as inference.py and
janus/models/processing_vlm.py. Ids of special tokens differ between uploads, so they are looked up by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..prompts import Prompt, token_prompt
from .tokenizer import TextTokenizer

BEGIN = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
IMAGE = "<begin_of_image>"
ROLES = ("<|User|>", "<|Assistant|>")  # Janus-Pro's, which are tokens of its vocabulary
OLD_ROLES = ("User", "Assistant")  # Janus-1.3B's

PICTURE = "<image_placeholder>"  # which an image's features take the place of, between IMAGE and END
END = "<end_of_image>"
SYSTEM = (  # what a chat about images begins with
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
ASKED = 'Does this figure show "{}"? Please answer yes or no.'  # VQAScore's question (arXiv 2404.01291)
ANSWERS = ("Yes", "No")


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
    user, assistant = _roles(tokenizer)
    chat = f"{user}: {text.strip()}\n\n{assistant}:"
    return [tokenizer.id(BEGIN), *tokenizer.ids(chat), tokenizer.id(IMAGE)]


@dataclass(frozen=True)
class Question:
    """A question about an image: token ids before and behind the image's features, and those of yes and of no."""

    before: tuple[int, ...]
    behind: tuple[int, ...]
    answers: tuple[int, int]


def question(tokenizer: TextTokenizer, text: str) -> Question:
    """Whether an image shows what `text` says. Both answers go on from the same tokens, and differ in the next one."""
    user, assistant = _roles(tokenizer)
    chat = f"{SYSTEM}\n\n{user}: {PICTURE}\n{ASKED.format(text.strip())}\n\n{assistant}:"
    yes, no = (tokenizer.ids(f"{chat} {answer}") for answer in ANSWERS)
    here = yes.index(tokenizer.id(PICTURE))
    end = next(n for n, (one, other) in enumerate(zip(yes, no, strict=False)) if one != other)
    before = (tokenizer.id(BEGIN), *yes[:here], tokenizer.id(IMAGE))
    return Question(before, (tokenizer.id(END), *yes[here + 1 : end]), (yes[end], no[end]))


def _roles(tokenizer: TextTokenizer) -> tuple[str, str]:
    return ROLES if tokenizer.has(ROLES[0]) else OLD_ROLES
