"""Chameleon's prompts for an image: a human's turn, then an answer that has been begun with an image.

Lumina-mGPT names the picture's size twice: in words, width first, and behind the begin-of-image token, height first, in
steps of 32 pixels. There it would draw these tokens itself; they are given to it, so that the picture has the size that
was asked for. It is guided away from the same answer to nothing: unconditional rows begin at the begin-of-image token.
Behaves as inference_solver.py of github.com/Alpha-VLLM/Lumina-mGPT, for Anole as chameleon/inference/chameleon.py of
github.com/facebookresearch/chameleon. Every id is looked up by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UserError
from ..grid import Grid
from ..prompts import Prompt, token_prompt
from ..sizes import STEP, Size
from .tokenizer import TextTokenizer

BEGIN, END_OF_TURN = "<s>", "<reserved08706>"
BEGIN_IMAGE, END_OF_LINE = "<racm3:break>", "<reserved08799>"


def lumina_prompt(words: TextTokenizer, texts: Sequence[str], size: Size, grid: Grid, negative: str = "") -> Prompt:
    """One picture of `size` pixels and `grid` for each text, guided from `negative`, or from no text at all."""
    width, height = size
    image = [words.id(BEGIN_IMAGE), words.id(_steps(height)), words.id(_steps(width))]

    def row(text: str) -> list[int]:
        asked = f"Generate an image of {width}x{height} according to the following prompt:\n{text.strip()}"
        return [words.id(BEGIN), *words.ids(asked), words.id(END_OF_TURN), *image]

    away = [row(negative) if negative else image] * len(texts)
    return token_prompt([row(text) for text in texts], tuple(texts), token_prompt(away), grid)


def anole_prompt(words: TextTokenizer, texts: Sequence[str], negative: str = "") -> Prompt:
    """One picture for each text. Anole was taught one size, which needs no words."""
    begin, image = words.id(BEGIN), words.id(BEGIN_IMAGE)

    def row(text: str) -> list[int]:
        return [begin, *words.ids(text.strip()), words.id(END_OF_TURN), image]

    away = [row(negative) if negative else [begin, image]] * len(texts)
    return token_prompt([row(text) for text in texts], tuple(texts), token_prompt(away))


def check_codes(words: TextTokenizer, first: int, codes: int) -> None:
    """Refuse a tokenizer that counts image codes otherwise than the model does."""
    if any(words.id(code_name(code)) != first + code for code in range(codes)):
        raise UserError(f"{words.path}: numbers image codes otherwise than the model does; take the model's own file.")


def code_name(code: int) -> str:
    """What Chameleon's vocabulary calls an image code: its digits as letters, between IMGIMG and Z."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _steps(pixels: int) -> str:
    """The token for so many pixels."""
    return f"<reserved{8800 + pixels // STEP:05d}>"
