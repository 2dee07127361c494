"""Chameleon's prompts for an image: a user's turn, then an answer that begins with an image.

Lumina-mGPT names the picture's size twice: in words, width first, and after the begin-of-image token, height first, in
steps of 32 pixels. The model would draw the latter tokens itself; they are given to it, so that the picture has the
requested size. Guidance leads away from an answer to nothing: unconditional rows start at the begin-of-image token.
Behaves as inference_solver.py of github.com/Alpha-VLLM/Lumina-mGPT and of Lumina-mGPT-2.0, and for Anole as
chameleon/inference/chameleon.py of github.com/facebookresearch/chameleon. Every id is looked up by name.
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


def lumina_prompt(
    tokenizer: TextTokenizer, texts: Sequence[str], size: Size, grid: Grid, negative: str = "", begin: str = BEGIN
) -> Prompt:
    """One picture of `size` pixels and `grid` per text, guided away from `negative`, or from no text at all.

    begin  name of the token that begins a text
    """
    width, height = size
    image = [tokenizer.id(BEGIN_IMAGE), tokenizer.id(_size_token(height)), tokenizer.id(_size_token(width))]

    def row(text: str) -> list[int]:
        request = f"Generate an image of {width}x{height} according to the following prompt:\n{text.strip()}"
        return [tokenizer.id(begin), *tokenizer.ids(request), tokenizer.id(END_OF_TURN), *image]

    negatives = [row(negative) if negative else image] * len(texts)
    return token_prompt([row(text) for text in texts], tuple(texts), token_prompt(negatives), grid)


def anole_prompt(tokenizer: TextTokenizer, texts: Sequence[str], negative: str = "") -> Prompt:
    """One picture per text. Anole was trained on one size, which is not named in the prompt."""
    begin, image = tokenizer.id(BEGIN), tokenizer.id(BEGIN_IMAGE)

    def row(text: str) -> list[int]:
        return [begin, *tokenizer.ids(text.strip()), tokenizer.id(END_OF_TURN), image]

    negatives = [row(negative) if negative else [begin, image]] * len(texts)
    return token_prompt([row(text) for text in texts], tuple(texts), token_prompt(negatives))


def check_codes(tokenizer: TextTokenizer, first: int, codes: int) -> None:
    """Raise UserError if the tokenizer's ids of image codes are not the model's."""
    if any(tokenizer.id(code_name(code)) != first + code for code in range(codes)):
        raise UserError(f"{tokenizer.path}: its ids of image codes are not the model's; use the model's own file.")


def code_name(code: int) -> str:
    """Chameleon's name of an image code: its digits as letters, between IMGIMG and Z."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _size_token(pixels: int) -> str:
    """The token for a side of so many pixels."""
    return f"<reserved{8800 + pixels // STEP:05d}>"
