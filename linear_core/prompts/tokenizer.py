"""TextTokenizer: a model's own text tokenizer, from its tokenizer.json. What is special in it is looked up by name.

The package tokenizers comes with ComfyUI (transformers needs it) and is imported only when a text is to be read.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError


class TextTokenizer:
    """Ids of texts. Raises UserError naming the file where it cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: there is no such file, and the model reads texts with it; download it again.")
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError(
                f"text prompts need a Python package that ComfyUI brings ({error}); without ComfyUI, run "
                "pip install tokenizers."
            ) from error
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UserError(f"{path}: is not a tokenizer that can be read ({error}); download it again.") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def ids(self, text: str) -> list[int]:
        """The ids of a text, special tokens written out in it included, and none added."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # as above: of a tokenizer that has no token for what it meets
            raise UserError(f"{self.path}: cannot read the text ({error}); take the model's own file.") from error

    def knows(self, token: str) -> bool:
        return self._tokenizer.token_to_id(token) is not None

    def id(self, token: str) -> int:
        """The id of one special token by its name."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"{self.path}: has no token {token}, which the model needs; take the model's own file.")
        return found
