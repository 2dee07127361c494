"""Prompts of Emu3 and of Emu3.5's kind: a text, then the begin of an image with its rows and columns.

Emu3.5's kind would write a text of its own first, and then begin an image and name its size itself. These tokens are
given to it, in both rows of guidance, so that the image begins at once and has the requested size. Behaves as
emu3/mllm/processing_emu3.py and image_generation.py of github.com/baaivision/Emu3, and as configs/example_config_t2i.py
of github.com/baaivision/Emu3.5. Every id is looked up by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from ..grid import Grid
from ..prompts import Prompt, token_prompt
from .tokenizer import TextTokenizer

BEGIN, BEGIN_IMAGE, BEGIN_CODES, END_OF_LINE = "<|extra_203|>", "<|image start|>", "<|image token|>", "<|extra_200|>"
BEGIN_ANSWER = "<|extra_100|>"
SUFFIX = " masterpiece, film grained, best quality."  # what Emu3's authors append to every text
NEGATIVE = (  # and what they guide away from
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)


def emu3_prompt(tokenizer: TextTokenizer, texts: Sequence[str], grid: Grid, negative: str = "") -> Prompt:
    """One picture of `grid` per text, guided away from `negative`, or by default from the published negative prompt."""
    begin, image = tokenizer.id(BEGIN), _image(tokenizer, grid)

    def row(text: str) -> list[int]:
        return [begin, *tokenizer.ids(text), *image]

    rows = [row(text.strip().removesuffix(SUFFIX) + SUFFIX) for text in texts]
    negatives = [row(negative.strip() or NEGATIVE)] * len(texts)
    return token_prompt(rows, tuple(texts), token_prompt(negatives), grid)


def emu35_prompt(
    tokenizer: TextTokenizer, texts: Sequence[str], grid: Grid, negative: str = "", always_task: bool = False
) -> Prompt:
    """One picture of `grid` per text, guided away from `negative`, or by default from no text.

    always_task  whether rows without a text name the task too, as those of Xiaomi-Robotics-U0 do and Emu3.5's do not
    """
    begin, end, image = tokenizer.id(BEGIN), tokenizer.id(BEGIN_ANSWER), _image(tokenizer, grid)

    def row(text: str) -> list[int]:
        task = " for t2i task" if text or always_task else ""
        chat = f"You are a helpful assistant{task}. USER: {text} ASSISTANT: "
        return [begin, *tokenizer.ids(chat), end, *image]

    negatives = [row(negative.strip())] * len(texts)
    return token_prompt([row(text.strip()) for text in texts], tuple(texts), token_prompt(negatives), grid)


def _image(tokenizer: TextTokenizer, grid: Grid) -> list[int]:
    """The begin of an image: its rows and columns in figures."""
    size = tokenizer.ids(f"{grid.rows}*{grid.cols}")
    return [tokenizer.id(BEGIN_IMAGE), *size, tokenizer.id(BEGIN_CODES)]


def code_name(code: int) -> str:
    return f"<|visual token {code:06d}|>"


def check_ids(tokenizer: TextTokenizer, first: int, codes: int, eol: int) -> None:
    """Raise UserError if the tokenizer's ids of image codes or of the end of a line are not the model's."""
    ids = {code_name(0): first, code_name(codes - 1): first + codes - 1, END_OF_LINE: eol}
    if wrong := [name for name, number in ids.items() if not tokenizer.has(name) or tokenizer.id(name) != number]:
        raise UserError(f"{tokenizer.path}: its id of {wrong[0]} is not the model's; use the model's own file.")
