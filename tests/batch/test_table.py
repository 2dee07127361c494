"""Files of prompts: every kind gives the same rows, a bad row costs only itself, a bad file one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linear_core.batch.table import MAX_SEED, Row, Skipped, read_table
from linear_core.errors import UserError

WANTED = [Row(1, "a fox", None, 7, {"id": "x"}), Row(2, 'two, "quoted"\nlines', "blurry", None, {"id": "y"})]


def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path) -> None:
    csv, jsonl = tmp_path / "p.csv", tmp_path / "p.jsonl"
    csv.write_text('\ufeffid,caption,seed,negative\nx,a fox,7,\ny,"two, ""quoted""\nlines",,blurry\n', encoding="utf-8")
    rows = [{"id": "x", "caption": "a fox", "seed": 7}]
    rows += [{"id": "y", "caption": 'two, "quoted"\nlines', "negative": "blurry", "seed": None}]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_table(csv) == read_table(jsonl) == (WANTED, [])
    assert read_table(csv, "id")[0][1] == Row(2, "y", "blurry", None, {"caption": 'two, "quoted"\nlines'})


def test_parquet_gives_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed, so no .parquet was read")
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    table = {"id": ["x", "y"], "prompt": [WANTED[0].prompt, WANTED[1].prompt], "seed": [7.0, float("nan")]}
    parquet.write_table(pyarrow.table(table | {"negative": [None, "blurry"]}), path)
    assert read_table(path) == (WANTED, [])
    with pytest.raises(UserError, match=r"p\.parquet: it has no column 'what', but 'id', 'prompt', 'seed', 'neg"):
        read_table(path, "what")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"p\.parquet: it cannot be read as parquet"):
        read_table(path)


def test_lines_of_a_text_keep_their_numbers(tmp_path: Path) -> None:
    """An empty line is no row, but counts: the seeds of those below do not change when it is filled."""
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa fox\r\n\r\n  a\u2028bow  \r\n".encode())
    assert read_table(path) == ([Row(1, "a fox"), Row(3, "a\u2028bow")], [])


def test_a_bad_row_is_left_out_and_says_why(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = ['{"prompt": "a fox"}', "{oops", "[1]", '{"id": 3}', '{"prompt": "  "}', '{"prompt": ["a"]}',
             f'{{"prompt": "b", "seed": {MAX_SEED + 1}}}', '{"prompt": "b", "seed": "x"}', '"a bow"',
             '{"prompt": "b", "seed": 1.5}', '{"prompt": 5}', '{"prompt": "b", "negative": 3}']  # fmt: skip
    path.write_text("\n".join(lines))
    rows, skipped = read_table(path)
    assert [(row.number, row.prompt) for row in rows] == [(1, "a fox"), (9, "a bow"), (11, "5")]
    whole = f"not a whole number from 0 to {MAX_SEED}"
    assert skipped == [
        Skipped(2, "it is not JSON"),
        Skipped(3, "it is no JSON object but a list"),
        Skipped(4, "it has no prompt"),
        Skipped(5, "its prompt is empty"),
        Skipped(6, "its prompt is no text but a list"),
        Skipped(7, f"its seed is '{MAX_SEED + 1}', {whole}"),
        Skipped(8, f"its seed is 'x', {whole}"),
        Skipped(10, f"its seed is '1.5', {whole}"),
        Skipped(12, "its negative prompt is no text but a number"),
    ]
    path = tmp_path / "p.csv"
    path.write_text("prompt\na fox\na,b\n")
    assert read_table(path)[1] == [Skipped(2, "it has more than the 1 fields of the first line")]


@pytest.mark.parametrize(
    ("name", "content", "column", "words"),
    [
        ("p.txt", b"\n \n", None, "there is no prompt in it; write one a line"),
        ("p.csv", b"", None, "there is no prompt in it; write one a row"),
        ("p.csv", b"id,name\n1,a\n", None, "it has no column 'prompt', but 'id', 'name'; name the right one"),
        ("p.csv", b"prompt\na\n", "text", "it has no column 'text', but 'prompt'"),
        ("p.csv", b'prompt\n"a\n' + b"x" * 140000, None, "cannot be read as CSV"),
        ("p.jsonl", b'{"id": 1}\n{"id": 2}\n', None, "it has no column 'prompt', but 'id'"),
        ("p.txt", b"\xff\xfea fox", None, "it is not a text in UTF-8"),
        ("p.txt", b"a fox", "text", "column: p.txt is a text file"),
        ("p.xlsx", b"a fox", None, "files of prompts end in .txt, .csv, .jsonl or .parquet"),
        ("p.jsonl", None, None, "there is no such file"),
    ],
)
def test_a_bad_file_is_one_sentence(
    name: str, content: bytes | None, column: str | None, words: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_table(path, column)
    assert name in str(error.value) and words in str(error.value)
