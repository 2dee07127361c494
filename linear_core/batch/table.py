"""Files of prompts: one a line (.txt), or tables (.csv, .jsonl, .parquet) with a column of prompts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, quoted
from ..plan import MAX_SEED

COLUMNS = ("prompt", "text", "caption", "class")  # which of a table's columns is what to draw: the first that is there
NEGATIVE, SEED = "negative", "seed"
SUFFIXES = (".txt", ".csv", ".jsonl", ".parquet")


class BadRow(Exception):
    """Why a row cannot be drawn."""


@dataclass(frozen=True)
class Row:
    """What to draw.

    number    of the row in its file, from 1; of a .txt, the line
    negative  the negative prompt of guidance; None: as for all
    seed      its own; None: by its number
    more      the other columns of a table, which go along into the metadata
    """

    number: int
    prompt: str
    negative: str | None = None
    seed: int | None = None
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A row that is not drawn, and why."""

    number: int
    reason: str


def read_table(path: Path, column: str | None = None) -> tuple[list[Row], list[Skipped]]:
    """The rows of a file of prompts, and those that cannot be drawn.

    column  the column of prompts, if it is none of COLUMNS. A table's columns `negative` and `seed` count too

    A .txt file has a prompt a line; empty lines count, but are no rows. Raises UserError if the file cannot be read,
    has no such column, or no row that can be drawn.
    """
    reader = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: files of prompts end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}.")
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    if column is not None and reader is _lines:
        raise UserError(f"column: {path.name} is a text file, which has none; leave --column out.")
    rows: list[Row] = []
    skipped: list[Skipped] = []
    try:
        for number, found in reader(path, column):
            try:
                rows.append(_row(number, found))
            except BadRow as error:
                skipped.append(Skipped(number, str(error)))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: it is not a text in UTF-8 ({error.reason}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path}: it cannot be read ({error.strerror or error}).") from error
    if not rows and not skipped:
        raise UserError(f"{path}: there is no prompt in it; write one a {'line' if reader is _lines else 'row'}.")
    return rows, skipped


def _row(number: int, found: dict[str, Any] | BadRow) -> Row:
    """The row of a table; `found` has the prompt under "". Raises BadRow."""
    if isinstance(found, BadRow):
        raise found
    values = dict(found)
    prompt, negative, seed = values.pop(""), values.pop(NEGATIVE, None), values.pop(SEED, None)
    if isinstance(prompt, bool) or not isinstance(prompt, (str, int)):
        raise BadRow("it has no prompt" if prompt is None else f"its prompt is no text but {_kind(prompt)}")
    prompt = str(prompt).strip()
    if not prompt:
        raise BadRow("its prompt is empty")
    if negative is not None and not isinstance(negative, str):
        raise BadRow(f"its negative prompt is no text but {_kind(negative)}")
    more = {name: _as_json(value) for name, value in values.items()}
    return Row(number, prompt, (negative or "").strip() or None, _seed(seed), more)


def _seed(value: Any) -> int | None:
    """A seed, from a number or, in a .csv, its digits; None where there is none."""
    if value is None or value == "" or value != value:  # NaN: a gap in a column of numbers
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        number = -1
    if isinstance(value, bool) or (isinstance(value, float) and number != value) or not 0 <= number <= MAX_SEED:
        raise BadRow(f"its seed is {quoted(str(value))}, not a whole number from 0 to {MAX_SEED}")
    return number


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a table"}
    return names.get(type(value), f"a {type(value).__name__}")


def _as_json(value: Any) -> Any:
    """A value of any column as JSON can hold it."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value


def _lines(path: Path, column: str | None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip():
            yield number, {"": line}


def _csv(path: Path, column: str | None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        table = csv.DictReader(file, restkey="")
        try:
            names = [name for name in table.fieldnames or () if name]
            if not names:
                return
            prompt = _prompt_column(path, names, column)
            for number, values in enumerate(table, 1):
                if "" in values:
                    yield number, BadRow(f"it has more than the {len(names)} fields of the first line")
                else:
                    yield number, _named(values, prompt)
        except csv.Error as error:
            raise UserError(f"{path}: line {table.line_num} cannot be read as CSV ({error}).") from error


def _jsonl(path: Path, column: str | None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    seen: dict[str, None] = {}
    any_prompt = False
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            yield number, BadRow("it is not JSON")
            continue
        if isinstance(values, str):
            any_prompt = True
            yield number, {"": values}
        elif not isinstance(values, dict):
            yield number, BadRow(f"it is no JSON object but {_kind(values)}")
        else:
            seen.update(dict.fromkeys(values))
            name = column or next((name for name in COLUMNS if name in values), None)
            any_prompt = any_prompt or name in values
            yield number, _named(values, name) if name in values else BadRow("it has no prompt")
    if seen and not any_prompt:
        _prompt_column(path, list(seen), column)


def _parquet(path: Path, column: str | None) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    parquet = pyarrow_parquet(f"{path.name}: reading it")
    try:
        table = parquet.ParquetFile(path)
        prompt = _prompt_column(path, list(table.schema_arrow.names), column)
        number = 0
        for batch in table.iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield number, _named(values, prompt)
    except (UserError, OSError):
        raise
    except Exception as error:  # pyarrow has exceptions of its own
        what = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"{path}: it cannot be read as parquet ({what}); write it again.") from error


def pyarrow_parquet(what: str) -> Any:
    """The module pyarrow.parquet. Raises UserError if it is missing; `what` needs it."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{what} needs the Python package pyarrow; run pip install pyarrow.") from error
    return parquet


def _named(values: dict[Any, Any], prompt: str | None) -> dict[str, Any]:
    """A table's row with the prompt under the name ""."""
    return {"": values.get(prompt), **{str(name): value for name, value in values.items() if name != prompt}}


def _prompt_column(path: Path, names: list[str], column: str | None) -> str:
    """Which column has the prompts. Raises UserError if there is none."""
    wanted = COLUMNS if column is None else (column,)
    if found := next((name for name in wanted if name in names), None):
        return found
    there = ", ".join(quoted(name) for name in names[:12]) + (", …" if len(names) > 12 else "")
    raise UserError(f"{path}: it has no column {quoted(wanted[0])}, but {there}; name the right one with --column.")
