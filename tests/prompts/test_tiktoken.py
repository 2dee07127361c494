"""The tokenizer of Emu3's kind gives the ids that the package tiktoken gives, for nine texts of all sorts.

The ids were recorded with tiktoken 0.14.0, the pattern and the special tokens of github.com/baaivision/Emu3.5 at commit
8fcf1da (2025-12-30, Apache-2.0), src/tokenizer_emu3_ibq, and its emu3.tiktoken. Of that the fixture holds the tokens
that occur in the texts, with their ranks; here others fill the gaps, which no text contains.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from pathlib import Path

import pytest

from linear_core.errors import UserError
from linear_core.prompts.tiktoken import QwenTokenizer, TiktokenTokenizer
from linear_core.prompts.tokenizer import TextTokenizer

TEXTS = (
    "a cat",
    "A portrait of a young girl, she's smiling. masterpiece, film grained, best quality.",
    'oil-painting (1889): "sky & sea" -- 3/4 view,no people!!',
    "two lines\nand\r\n\r\n  more\t tabs   ",
    "一只戴帽子的猫，坐在窗边。",
    "夕暮れの灯台、カメラは35mm",
    "cafe\u0301 na\u00efve \u00c5ngstr\u00f6m stra\u00dfe",
    "I'LL don't WE'VE x's 'tis \U0001f98a\U0001f3fd",
    "64*64<|image token|><|extra_200|><|nothing|>x",
)
FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiktoken.json"
RANKS = 151643
NAMES = ["<|image token|>", "<|image start|>", "<|image end|>", *(f"<|visual token {n:06d}|>" for n in range(9))]


def write(folder: Path, lines: list[str], names: list[str], stem: str = "emu3") -> Path:
    (folder / f"{stem}.tiktoken").write_text("\n".join(lines) + "\n")
    (folder / f"{stem}_vision_tokens.txt").write_text("\n".join(names) + "\n")
    return folder / f"{stem}.tiktoken"


def only_bytes() -> list[str]:
    """The smallest file: every byte is a token, and nothing is merged."""
    return [f"{b64encode(bytes([n])).decode()} {n}" for n in range(256)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TiktokenTokenizer:
    tokens = {rank: token for token, rank in json.loads(FIXTURE.read_text())["tokens"].items()}
    gaps = (b64encode(n.to_bytes(4, "big", signed=True)).decode() for n in range(-RANKS, 0))  # no text has a byte 255
    lines = [f"{tokens.get(rank, gap)} {rank}" for rank, gap in enumerate(gaps)]
    return TiktokenTokenizer(write(tmp_path_factory.mktemp("words"), lines, NAMES))


@pytest.mark.parametrize("number", range(len(TEXTS)))
def test_ids_of_texts(number: int, tokenizer: TiktokenTokenizer) -> None:
    assert tokenizer.ids(TEXTS[number]) == json.loads(FIXTURE.read_text())["ids"][number]


def test_special_tokens_have_the_published_ids(tokenizer: TiktokenTokenizer) -> None:
    published = {
        "<|endoftext|>": 151643, "<|extra_0|>": 151646, "<|extra_200|>": 151846, "<|extra_203|>": 151849,
        "<|image token|>": 151851, "<|image start|>": 151852, "<|visual token 000000|>": 151854,
    }  # fmt: skip
    assert {name: tokenizer.id(name) for name in published} == published
    assert tokenizer.has("<|visual token 000008|>") and not tokenizer.has("<|visual token 000009|>")
    with pytest.raises(UserError, match=r"emu3.tiktoken: has no token <\|visual token 000009\|>"):
        tokenizer.id("<|visual token 000009|>")


def test_a_missing_list_of_visual_tokens(tmp_path: Path) -> None:
    path = write(tmp_path, only_bytes(), NAMES)
    assert TiktokenTokenizer(path).ids("é") == [195, 169]
    (tmp_path / "emu3_vision_tokens.txt").unlink()
    with pytest.raises(UserError, match=r"emu3_vision_tokens.txt: there is no such file, but the model needs it"):
        TiktokenTokenizer(path)


@pytest.mark.parametrize(
    ("lines", "names", "problem"),
    [
        ([*only_bytes(), "!! 256"], NAMES, "emu3.tiktoken: cannot be read"),
        ([*only_bytes(), "QUI=256"], NAMES, "emu3.tiktoken: cannot be read"),
        ([*only_bytes(), "QUI= x"], NAMES, "emu3.tiktoken: cannot be read"),
        ([*only_bytes(), "QUI= 258"], NAMES, "emu3.tiktoken: its tokens are not numbered in order"),
        ([*only_bytes(), "QQ== 256"], NAMES, "emu3.tiktoken: its tokens are not numbered in order"),
        (only_bytes()[:255], NAMES, "bytes are missing"),
        (["é 0"], NAMES, "it is no text"),
        ([""], NAMES, "it is no text"),
        (only_bytes(), [*NAMES, "<|endoftext|>"], "emu3_vision_tokens.txt: is not a list of visual tokens"),
        (only_bytes(), ["visual token"], "emu3_vision_tokens.txt: is not a list of visual tokens"),
        (only_bytes(), ["x" * 2**24], "emu3_vision_tokens.txt: is larger than any tokenizer"),
    ],
)
def test_a_broken_file_is_named(lines: list[str], names: list[str], problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        TiktokenTokenizer(write(tmp_path, lines, names))


def test_transformers_conversion_is_split_as_published(tmp_path: Path) -> None:
    """A tokenizer.json with GPT-2's pattern, which by itself gives other ids for some of the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    recorded = json.loads(FIXTURE.read_text())
    tokens = {b64decode(token): rank for token, rank in recorded["tokens"].items()}
    splits = [(token[:n], token[n:]) for token in tokens for n in range(1, len(token))]  # in order of rank
    merges = [tuple(map(visible, pair)) for pair in splits if all(part in tokens for part in pair)]
    made = Tokenizer(models.BPE(vocab={visible(token): rank for token, rank in tokens.items()}, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    theirs, ours = (kind(tmp_path / "tokenizer.json") for kind in (TextTokenizer, QwenTokenizer))
    plain = slice(0, -1)  # the last text has special tokens
    assert [ours.ids(text) for text in TEXTS[plain]] == recorded["ids"][plain]
    assert sum(theirs.ids(text) != ids for text, ids in zip(TEXTS[plain], recorded["ids"][plain], strict=True)) > 1


def visible(token: bytes) -> str:
    """A token as byte-level tokenizers write it: the letters of GPT-2 for its bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte if byte in plain else 256 + others.index(byte)) for byte in token)
