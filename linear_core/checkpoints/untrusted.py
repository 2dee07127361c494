"""Checks on files from strangers, made before anything that they say is believed.

Models come from anywhere. Names that lead out of their folder, archives that unpack to more than their size, pickles
that name anything but weights, headers and configs too large to be genuine: each is refused here, by the file's name.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import UserError

MIB = 2**20
JSON_BYTES = 16 * MIB  # the largest published one, Lumina-mGPT's config with its vocabulary, takes 2
HEADER_BYTES = 8 * MIB  # the largest published ones take a tenth of one
PICKLE_BYTES = 2 * MIB  # likewise, for the pickled list of weights; takes seconds to read at worst
MAX_NAME = 255  # characters of a file name, on every system

# The globals that a pickle of weights, and of what training scripts save with them, needs. torch allows more, some of
# which can take any amount of memory (a bytearray of a given size).
ALLOWED_GLOBALS = re.compile(
    r"torch (\w+Storage|Size|device|b?float\d+\w*|u?int\d+|complex\d+|bool)|torch\.storage (Untyped|Typed)Storage"
    r"|torch\._utils _rebuild_(tensor|tensor_v[23]|parameter|parameter_with_state)|torch\.nn\.parameter Parameter"
    r"|torch Tensor|torch\._tensor _rebuild_from_type_v2"  # of tensors that carried attributes: see `_check_calls`
    r"|collections (OrderedDict|Counter)|(__builtin__|builtins) set"
)
TENSOR, REBUILD = "torch Tensor", "torch._tensor _rebuild_from_type_v2"

# What training scripts save beside weights: settings, paths, times, numbers of numpy. None of it is imported or made:
# `stand_ins` takes its place, so a name in this list can do nothing, whatever it is called with.
BESIDE_WEIGHTS = re.compile(
    r"(argparse|collections|datetime|decimal|fractions|pathlib|typing|uuid|zoneinfo)(\._\w+)? \w+|types SimpleNamespace"
    r"|(numpy|omegaconf|yacs|easydict|addict|ml_collections|pytorch_lightning|lightning|lightning_fabric|transformers)"
    r"(\.\w+)* \w+|(__builtin__|builtins) (bytes|complex|dict|float|frozenset|int|list|object|range|slice|str|tuple)"
    r"|torch\.torch_version TorchVersion|torch layout|torch\.serialization _get_layout|__main__ \w+"
)
BYTES = "_codecs encode"  # how pickles of torch's version write bytes: a text, and the name of its encoding
ENCODING = "latin1"


def inside(folder: Path, name: object) -> Path:
    """The path `folder` / `name`, where `name` comes from a file or a workflow.

    Raises ValueError if it is not a name or leads out of the folder, judged by the name alone, on any system. Links may
    lead anywhere: whoever makes one in a model folder, to keep models on another disk, may do so.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError("is not a file name")
    parts = PureWindowsPath(name).parts  # understands both kinds of slashes
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts:
        raise ValueError("leads out of the folder")
    if max(map(len, parts), default=0) > MAX_NAME:
        raise ValueError("is too long for a file name")
    return folder / name


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for any fault, endless nesting included. Bytes may be UTF-8 or UTF-16, with their mark."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, problem: str) -> dict[str, Any]:
    """The object in a small JSON file. Raises UserError saying `problem` about the file, and why."""
    try:
        if (size := path.stat().st_size) > JSON_BYTES:
            raise ValueError(f"it takes {size / MIB:.0f} MiB")
        found = parse_json(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {problem} ({error}); download it again.") from error
    return found


def number(config: Mapping[str, Any], name: str, default: float) -> Any:
    """A config's number `name`, or `default` if it has none. Raises ValueError unless it is a number above 0."""
    value = config.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31:
        raise ValueError(f"its config.json says {name}: {value!r:.60}")
    if isinstance(default, int) and value != int(value):
        raise ValueError(f"its config.json says {name}: {value}, which is not an integer")
    return type(default)(value)


def section(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The part of a config with one of these names, empty without one. Raises ValueError if it is not an object."""
    for name in names:
        if config.get(name):
            if not isinstance(config[name], dict):
                raise ValueError(f"its config.json says {name}: {config[name]!r:.60}")
            return config[name]
    return {}


def check_header(path: Path) -> None:
    """Raise ValueError for a safetensors file whose header is longer than any model's."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if HEADER_BYTES < length <= path.stat().st_size:  # if it exceeds the file, safetensors says so
        raise ValueError(f"its header takes {length / MIB:.0f} MiB, more than any model's")


class Unread:
    """Stands for an object beside the weights: takes anything, keeps nothing."""

    def __new__(cls, *args: object) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class UnreadDict(Unread):
    """The same for kinds of dictionaries, which are read as plain ones: there may be weights inside."""

    def __new__(cls, *args: object) -> Any:
        return {}


class UnreadList(Unread):
    def __new__(cls, *args: object) -> Any:
        return []


CONTAINERS = {"defaultdict": UnreadDict, "AttributeDict": UnreadDict, "deque": UnreadList}


def stand_ins(names: Iterable[str]) -> list[Any]:
    """A class for each of `names`, "module name" as in a pickle, that torch takes for what is called so."""
    found: list[Any] = []
    for module, _, name in (each.partition(" ") for each in names):
        kind = CONTAINERS.get(name, Unread)
        module = "builtins" if module == "__builtin__" else module
        found.append(type(name, (kind,), {"__module__": module, "__qualname__": name}))
    return found


class NotWeightsAlone(ValueError):
    """A file that would be the same if it were downloaded again."""

    advice = "save its weights alone, with torch.save(model.state_dict(), …), or choose another file"


def check_archive(path: Path) -> set[str]:
    """Raise ValueError for a .pt file that is not what torch.save writes of weights.

    Nothing in it may be compressed, so that it takes no more memory than its size, and its pickle may name nothing but
    weights and BESIDE_WEIGHTS. torch does not run anything else either, but its errors are worded differently and not
    all of it is cheap. Returns the names of BESIDE_WEIGHTS that it has.
    """
    with path.open("rb") as file:
        if (first := file.read(4)) != b"PK\3\4":
            old = NotWeightsAlone if first[:2] == b"\x80\x02" else ValueError  # a pickle of an older torch
            raise old("it was not written by torch.save of PyTorch 1.6 or newer")
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            pickles = [record for record in records if record.filename.rpartition("/")[2] == "data.pkl"]
            if any(r.compress_type or r.file_size != r.compress_size for r in records):
                raise ValueError("it is compressed, which torch.save never does")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("it claims to hold more than its size")
            if len(pickles) != 1 or len({record.filename for record in records}) != len(records):
                raise ValueError("it does not hold exactly one list of weights")
            if pickles[0].file_size > PICKLE_BYTES:
                raise ValueError(f"its list of weights takes {pickles[0].file_size / MIB:.0f} MiB")
            pickled = archive.read(pickles[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OverflowError) as error:
        raise ValueError(f"it is incomplete or damaged: {error}") from error
    named = [str(argument) for code, argument, _ in pickletools.genops(pickled) if code.name in ("GLOBAL", "INST")]
    beside = set()
    for name in named:
        if ALLOWED_GLOBALS.fullmatch(name) or name == BYTES:
            continue
        if not BESIDE_WEIGHTS.fullmatch(name):
            raise _not_run(name)
        beside.add(name)
    if BYTES in named:
        _check_bytes(pickled)
    if TENSOR in named or REBUILD in named:
        _check_calls(pickled)
    return beside


def _not_run(named: str) -> ValueError:
    return NotWeightsAlone(f"it asks for {named.replace(' ', '.')}, which weights do not need and is not run")


def _check_bytes(pickled: bytes) -> None:
    """Raise ValueError unless all bytes are written as Python writes them: texts in Latin-1.

    torch runs the encoder, and other encodings take time, or double what they are given as often as they are asked to.
    """
    encoders: set[int] = set()  # places of the memo that hold the encoder
    texts: dict[int, str] = {}  # and those that hold a text
    top: object = None  # what was pushed last: BYTES, a text, or None for anything else
    expected = 0  # arguments of the encoder that are still to come, then its call
    for code, argument, _ in pickletools.genops(pickled):
        name, place = code.name, argument if isinstance(argument, int) else -1
        if name in ("BINPUT", "LONG_BINPUT"):
            if top == (BYTES,):
                encoders.add(place)
            elif isinstance(top, str):
                texts[place] = top
            else:
                texts.pop(place, None)
            continue
        get = name in ("BINGET", "LONG_BINGET")
        is_encoder = (name == "GLOBAL" and argument == BYTES) or (get and place in encoders)
        text = argument if name == "BINUNICODE" else texts.get(place) if get else None
        if expected:
            fits = {4: text is not None, 3: text == ENCODING, 2: name == "TUPLE2", 1: name == "REDUCE"}[expected]
            if is_encoder or not fits:
                raise _not_run(BYTES)
            expected -= 1
        elif is_encoder:
            expected = 4
        top = (BYTES,) if is_encoder else text
    if expected:
        raise _not_run(BYTES)


def _check_calls(pickled: bytes) -> None:
    """Raise ValueError for a pickle that calls torch.Tensor, itself or through `_rebuild_from_type_v2`.

    Called with a number it takes that much memory. Tensors with attributes, as Infinity's are, name it as the type to
    give to what torch rebuilds. So the pickle's stack is followed: names and tuples are kept, all else is None.
    """
    mark = object()
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for code, argument, _ in pickletools.genops(pickled):
        before, taken = code.stack_before, list[Any]()
        pushed: list[Any] = [None] * len(code.stack_after)
        if pickletools.markobject in before:
            while stack and (top := stack.pop()) is not mark:
                taken.append(top)
            before = before[: before.index(pickletools.markobject)]
        taken = (taken + [stack.pop() for _ in before if stack])[::-1]
        if code.name == "MARK":
            pushed = [mark]
        elif code.name == "GLOBAL":
            pushed = [str(argument)]
        elif code.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
            pushed = [tuple(taken)]
        elif code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1] if stack else None
        elif code.name == "MEMOIZE":
            pushed, memo[len(memo)] = taken, taken[-1] if taken else None
        elif code.name in ("GET", "BINGET", "LONG_BINGET"):
            pushed = [memo.get(argument)]
        elif code.name in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"):
            called, given = (taken[0] if taken else None), (taken[1] if len(taken) > 1 else None)
            rebuilt = given[0] if isinstance(given, tuple) and given else None
            if TENSOR in (called, argument) or (called == REBUILD and not str(rebuilt).startswith("torch._utils ")):
                raise _not_run(TENSOR)
        stack += pushed
