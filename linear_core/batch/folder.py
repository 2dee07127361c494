"""The folder that a run draws into. Whatever ends the run, what is drawn stays, and is not drawn again.

    run.json          the settings of the run
    pictures/         a PNG a picture: 000012.png is of row 12
    metadata.jsonl    a row a picture
    metadata.parquet  the same, once all are drawn and where pyarrow is installed
    skipped.jsonl     rows that were not drawn, and why

A picture is there once its row is in metadata.jsonl, which only grows during a run and is put in order at its end. So
a run that is killed loses at most what it was drawing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, quoted
from .table import Skipped

RUN, METADATA, SKIPPED, PICTURES = "run.json", "metadata.jsonl", "skipped.jsonl", "pictures"
LOCK = ".lock"


@dataclass(frozen=True)
class Drawn:
    """A picture: its row of metadata, and the PNG."""

    metadata: dict[str, Any]
    png: bytes


class Folder:
    """A folder of pictures, which one run at a time draws into (`opened`).

    rows  the metadata of what is there, by the picture's name in the folder
    """

    def __init__(self, path: Path, rows: dict[str, dict[str, Any]]):
        self.path, self.rows = path, rows

    @classmethod
    @contextmanager
    def opened(cls, path: Path, settings: dict[str, Any]) -> Iterator[Folder]:
        """The folder, made if it is missing, for a run with these settings.

        Raises UserError if it cannot be written, if another run draws into it, or if it has another run's pictures.
        """
        try:
            (path / PICTURES).mkdir(parents=True, exist_ok=True)
            lock = (path / LOCK).open("a")
        except OSError as error:
            raise UserError(
                f"out: the folder {path} cannot be written ({error.strerror or error}); choose another."
            ) from error
        with lock:
            if not _locked(lock.fileno()):
                raise UserError(f"out: another run is drawing into {path}; wait for it, or choose another folder.")
            _check_settings(path, settings)
            yield cls(path, _rows(path))

    def has(self, name: str, prompt: str, seed: int) -> bool:
        """Whether a picture is there. Raises UserError if it is one of another prompt or seed."""
        row = self.rows.get(name)
        if row is None:
            return False
        for key, wanted in (("prompt", prompt), ("seed", seed)):
            if row.get(key) != wanted:
                raise UserError(
                    f"out: in {self.path}, {name} has the {key} {quoted(str(row.get(key)))}, but the file of prompts "
                    f"now says {quoted(str(wanted))}; choose another folder."
                )
        return True

    def add(self, done: Iterable[Drawn | Skipped]) -> list[Skipped]:
        """Keep the pictures among these: first the files, then their rows. Returns the others.

        Raises OSError if the disk is full.
        """
        lines, skipped = [], []
        for each in done:
            if isinstance(each, Skipped):
                skipped.append(each)
                continue
            name = str(each.metadata["file_name"])
            _write(self.path / name, each.png)
            self.rows[name] = each.metadata
            lines.append(json.dumps(each.metadata, ensure_ascii=False) + "\n")
        if lines:
            with (self.path / METADATA).open("ab") as file:
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        return skipped

    def skip(self, rows: Iterable[Skipped]) -> None:
        """Note what is not drawn, in place of earlier notes."""
        rows = sorted(rows, key=lambda row: row.number)
        lines = [json.dumps({"row": row.number, "reason": row.reason}, ensure_ascii=False) + "\n" for row in rows]
        if lines or (self.path / SKIPPED).exists():
            _write(self.path / SKIPPED, "".join(lines).encode())

    def close(self) -> None:
        """Put the metadata in order, and write it as parquet too where pyarrow is installed."""
        rows = [self.rows[name] for name in sorted(self.rows)]
        _write(self.path / METADATA, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        with suppress(ImportError):
            import pyarrow
            from pyarrow import parquet

            part = self.path / "metadata.parquet.part"
            with suppress(pyarrow.ArrowException):  # columns that hold several types are only in metadata.jsonl
                parquet.write_table(pyarrow.Table.from_pylist(rows), part)
                part.replace(self.path / "metadata.parquet")
            part.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    """The file appears complete or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _locked(file: int) -> bool:
    """Lock a file until it is closed or the process ends, however that ends; False if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined, unused-ignore]
        except OSError:
            return False
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network drives have no locks
        return True
    return True


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder with another run's pictures, and state the settings in a new one."""
    file = path / RUN
    if not file.exists():
        if (path / METADATA).exists() or any((path / PICTURES).iterdir()):
            raise UserError(f"out: {path} has pictures of something else; choose another folder.")
        _write(file, json.dumps(settings, indent=1, ensure_ascii=False).encode())
        return
    try:
        before = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"out: {file} cannot be read; choose another folder.") from error
    now = json.loads(json.dumps(settings))
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            was, here = (quoted(str(values.get(name))) for values in (before, now))
            raise UserError(
                f"out: {path} has pictures of a run with other settings ({name} was {was} and is {here}); choose "
                "another folder, or the same settings."
            )


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    """The metadata of the pictures that are there. A last line that was cut off goes, so that more can follow."""
    file = path / METADATA
    if not file.exists():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            name = row["file_name"]
            if (path / name).is_file():
                rows[str(name)] = row
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"out: line {number} of {file} is damaged; take it out and run this again, which draws that picture "
                "again."
            ) from error
    if len(whole) < len(content) or len(rows) < whole.count(b"\n"):
        _write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()).encode())
    return rows


def as_settings(**parts: Any) -> dict[str, Any]:
    """Settings in one flat table; dataclasses among them by their fields."""
    flat: dict[str, Any] = {}
    for name, part in parts.items():
        flat.update(asdict(part) if hasattr(part, "__dataclass_fields__") else {name: part})
    return flat
