"""What a file from a stranger may not do: held to these rules before anything that it says is believed.

Models come from anywhere. Names that lead out of their folder, archives that unpack to more than they are, pickles that
name anything but weights, headers and configs that are too large to be any: each is refused here, by the file's name.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import UserError

MIB = 2**20
JSON_BYTES = 16 * MIB  # the largest published, Lumina-mGPT's config with its vocabulary, takes 2
HEADER_BYTES = 8 * MIB  # the largest published take a tenth of one
PICKLE_BYTES = 2 * MIB  # the same, of a pickled list of weights; seconds to read at worst
LONGEST = 255  # letters of a file's name, on every system

# All that a pickle of weights, and of what training scripts save beside them, has to name. torch allows more, some of
# which takes any amount of memory (a bytearray of so many bytes).
NAMED = re.compile(
    r"torch (\w+Storage|Size|device|b?float\d+\w*|u?int\d+|complex\d+|bool)|torch\.storage (Untyped|Typed)Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v[23]|parameter|parameter_with_state)|torch\.nn\.parameter Parameter"
    r"|collections (OrderedDict|Counter)|(__builtin__|builtins) set|argparse Namespace"
)


def inside(folder: Path, name: object) -> Path:
    """`name`, as a file or a workflow says it, below `folder`. Raises ValueError where it is no name or leads out.

    Only the name counts, as any system would read it. Links may lead anywhere: whoever has made one in a model folder,
    to keep models on another disk, may do that.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError("is not the name of a file")
    parts = PureWindowsPath(name).parts  # takes both slashes for what they are
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts:
        raise ValueError("leads out of the folder")
    if max(map(len, parts), default=0) > LONGEST:
        raise ValueError("is too long for the name of a file")
    return folder / name


def parse_json(text: str) -> Any:
    """Raises ValueError for whatever is wrong with it, nesting without an end included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, otherwise: str) -> dict[str, Any]:
    """The object in a small JSON file. Raises UserError that says `otherwise` of the file, and why."""
    try:
        if (size := path.stat().st_size) > JSON_BYTES:
            raise ValueError(f"it takes {size / MIB:.0f} MiB")
        found = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {otherwise} ({error}); download it again.") from error
    return found


def number(told: Mapping[str, Any], name: str, default: float) -> Any:
    """What a config says of `name`, `default` where it does not. Raises ValueError where that is no number above 0."""
    value = told.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
        raise ValueError(f"its config.json says {name}: {value!r:.60}")
    if isinstance(default, int) and value != int(value):
        raise ValueError(f"its config.json says {name}: {value}, which is not whole")
    return type(default)(value)


def section(told: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The part of a config that has one of these names, empty where none has. Raises ValueError where it is no part."""
    for name in names:
        if told.get(name):
            if not isinstance(told[name], dict):
                raise ValueError(f"its config.json says {name}: {told[name]!r:.60}")
            return told[name]
    return {}


def check_header(path: Path) -> None:
    """Refuse, with a ValueError, a safetensors file whose header is longer than any model's."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < length <= path.stat().st_size:  # where it is longer than the file, safetensors says so
        raise ValueError(f"its header takes {length / MIB:.0f} MiB, more than any model's")


def check_archive(path: Path) -> None:
    """Refuse, with a ValueError, a .pt file that is not what torch.save writes of weights.

    Nothing in it may be packed, so that it takes no more memory than it has bytes, and nothing may be named in it but
    weights. torch runs nothing of the rest either; but it says so in other words, and not all of it is cheap.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":
            raise ValueError("it does not begin as what torch.save has written since PyTorch 1.6")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            lists = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
            if any(r.compress_type or r.file_size != r.compress_size for r in records):
                raise ValueError("it is compressed, which torch.save never does")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("it says that it holds more than its size")
            if len(lists) != 1 or len({record.filename for record in records}) != len(records):
                raise ValueError("it does not hold one list of weights")
            if lists[0].file_size > PICKLE_BYTES:
                raise ValueError(f"its list of weights takes {lists[0].file_size / MIB:.0f} MiB")
            pickled = archive.read(lists[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError) as error:
        raise ValueError(f"it is incomplete or damaged: {error}") from error
    for code, argument, _ in pickletools.genops(pickled):
        if code.name in ("GLOBAL", "INST") and not NAMED.fullmatch(named := str(argument)):
            raise ValueError(f"it asks for {named.replace(' ', '.')}, which no weights need and is not run here")
