"""TextTokenizer: a model's own text tokenizer, from its tokenizer.json. Special tokens are looked up by name.

The package tokenizers comes with ComfyUI (transformers needs it) and is imported only when a text is read.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


def needs_package(error: ImportError) -> str:
    """What to tell where the package tokenizers cannot be imported."""
    return (
        f"text prompts need a Python package that comes with ComfyUI ({error}); without ComfyUI, run "
        "pip install tokenizers."
    )


class TextTokenizer:
    """Ids of texts. Raises UserError naming the file if it is missing or cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: there is no such file, but the model needs it to read texts; download it again.")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(needs_package(error)) from error
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UserError(f"{path}: cannot be read as a tokenizer ({error}); download it again.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def ids(self, text: str) -> list[int]:
        """The ids of a text, including special tokens written out in it; none are added."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # as above: it has no token for part of the text
            raise UserError(f"{self.path}: cannot encode the text ({error}); use the model's own file.") from error

    def has(self, token: str) -> bool:
        """Whether there is a token of this name."""
        return self._tokenizer.token_to_id(token) is not None

    def id(self, token: str) -> int:
        """The id of a special token. Raises UserError naming the file if there is none."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"{self.path}: has no token {token}, which the model needs; use the model's own file.")
        return found
