"""TiktokenTokenizer: the text tokenizer of Emu3's kind, from its .tiktoken file and its list of visual tokens.

A line of the first file is a token in base64 and its rank, which is its id; special tokens follow: three of Qwen's, 205
called extra, and the lines of the second. The package tiktoken does not come with ComfyUI. Its encoding is short: words
are split by a pattern, here by the package tokenizers, and in each word the adjacent pair that is the token of lowest
rank is merged until none is one. Behaves as tokenization_emu3.py in src/tokenizer_emu3_ibq of
github.com/baaivision/Emu3.5.
"""

from __future__ import annotations

import binascii
import re
import unicodedata
from pathlib import Path
from typing import Any

from ..errors import UserError
from .tokenizer import TextTokenizer, needs_package

# Qwen's: contractions; letters with what stands before them; one digit; other signs; line breaks; spaces
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{n}|>" for n in range(205)))
SPECIAL = re.compile(r"<\|[^|]*\|>")  # the form of every special token
VISUAL = "_vision_tokens.txt"  # what follows the stem of the .tiktoken file in the name of the other
MAX_BYTES = 16 * 2**20  # of a file; the largest published one takes 3 MB
NO_PAIR = 2**31  # higher than any rank


class TiktokenTokenizer(TextTokenizer):
    """Ids of texts. Raises UserError naming the file if one of the two is missing or cannot be read."""

    def __init__(self, path: Path):
        self.path = path
        visual = path.with_name(path.stem + VISUAL)
        lines, names = _lines(path), [line.decode() for line in _lines(visual)]
        try:
            self._ranks = {binascii.a2b_base64(token, strict_mode=True): int(rank) for token, rank in map(_pair, lines)}
        except ValueError as error:  # that of base64 is one too
            raise UserError(f"{path}: cannot be read as a tokenizer ({error}); download it again.") from error
        if [*self._ranks.values()] != [*range(len(lines))] or any(bytes([n]) not in self._ranks for n in range(256)):
            raise UserError(f"{path}: its tokens are not numbered in order, or bytes are missing; download it again.")
        self._ids = {name: len(lines) + n for n, name in enumerate((*SPECIALS, *names))}
        if len(self._ids) != len(SPECIALS) + len(names) or not all(map(SPECIAL.fullmatch, names)):
            raise UserError(f"{visual}: is not a list of visual tokens, one a line; download it again.")
        self._split = _splitter()

    def ids(self, text: str) -> list[int]:
        """The ids of a text, including special tokens written out in it; none are added."""
        text, found, start = unicodedata.normalize("NFC", text), list[int](), 0
        for special in SPECIAL.finditer(text):
            if (number := self._ids.get(special[0])) is not None:
                found += [*self._plain(text[start : special.start()]), number]
                start = special.end()
        return found + self._plain(text[start:])

    def has(self, token: str) -> bool:
        """Whether there is a special token of this name."""
        return token in self._ids

    def id(self, token: str) -> int:
        """The id of a special token. Raises UserError naming the file if there is none."""
        if token not in self._ids:
            raise UserError(f"{self.path}: has no token {token}, which the model needs; use the model's own file.")
        return self._ids[token]

    def _plain(self, text: str) -> list[int]:
        words = self._split.pre_tokenize_str(text) if text else []
        return [number for word, _ in words for number in self._merged(word.encode())]

    def _merged(self, word: bytes) -> list[int]:
        """Ids of a word's bytes, merged in order of rank, of equal ones the leftmost first."""
        parts = [word[n : n + 1] for n in range(len(word))]
        ranks = [self._rank(parts, n) for n in range(len(parts))]  # of each part with the next one
        while (lowest := min(ranks)) < NO_PAIR:
            n = ranks.index(lowest)
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
            del ranks[n]
            for changed in range(max(n - 1, 0), n + 1):
                ranks[changed] = self._rank(parts, changed)
        return [self._ranks[part] for part in parts]

    def _rank(self, parts: list[bytes], n: int) -> int:
        return self._ranks.get(parts[n] + parts[n + 1], NO_PAIR) if n + 1 < len(parts) else NO_PAIR


def _pair(line: bytes) -> tuple[bytes, bytes]:
    """A token and its rank. Raises ValueError for anything but two fields."""
    token, rank = line.split(b" ")
    return token, rank


def _lines(path: Path) -> list[bytes]:
    """The lines of a small text file in ASCII. Raises UserError naming it."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file, but the model needs it to read texts; download it again.")
    if path.stat().st_size > MAX_BYTES:
        raise UserError(f"{path}: is larger than any tokenizer; download it again.")
    content = path.read_bytes()
    if not content.isascii() or not content.strip():
        raise UserError(f"{path}: cannot be read as a tokenizer (it is no text); download it again.")
    return [line.strip() for line in content.splitlines() if line.strip()]


def _splitter() -> Any:
    try:
        from tokenizers import Regex
        from tokenizers.pre_tokenizers import Split
    except ImportError as error:
        raise UserError(needs_package(error)) from error
    return Split(Regex(WORDS), "isolated")


class QwenTokenizer(TextTokenizer):
    """A tokenizer.json of this vocabulary, with texts split as published.

    transformers' conversion of Emu3 writes GPT-2's pattern and no normal form into it: a hyphen, a bracket, a line
    break or a composed accent then gives other ids than the model was trained with.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        from tokenizers import normalizers, pre_tokenizers

        self._tokenizer.normalizer = normalizers.NFC()
        by_byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([_splitter(), by_byte])
