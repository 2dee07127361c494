"""Files to state dicts: safetensors, published `.pt` files and folders of shards, never running what they contain."""

from __future__ import annotations

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import UserError, quoted
from .untrusted import check_archive, check_header, inside, read_json

PIECE = 2**28  # bytes
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # of a folder: which weight is in which file
SINGLES = ("model.safetensors", "pytorch_model.bin")  # of a folder without an index
NESTS = ("model", "module", "state_dict")  # what published training scripts wrap a state dict in
READABLE = "a checkpoint that can be read safely"
HARMLESS: list[Any] = [argparse.Namespace]  # what they save beside it; it holds attributes and runs nothing


@dataclass(frozen=True)
class Weights:
    """A checkpoint: tensors by name (on the meta device when only shapes were asked for) and the file's own notes.

    files  that it consists of: itself, or the shards of a folder
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    files: tuple[Path, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def name(self) -> str:
        """What people call it: the folder's name, or the file's without its ending."""
        return self.path.stem if self.path.suffix.lower() in SUFFIXES else self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of a model's folder; nothing where there is none."""
        file = self.path / "config.json"
        return read_json(file, "is not what a model's config looks like") if file.is_file() else {}

    def stream(self, wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The `wanted` weights one by one. Files are mapped anew after every PIECE: until then what was read stays."""
        for file in self.files:
            read = _each_of_safetensors if file.suffix.lower() == ".safetensors" else _each_of_pickle
            left, taken = set(wanted), PIECE
            while taken >= PIECE:
                taken = 0
                for name, tensor in read(file, frozenset(left)):
                    yield name, tensor
                    left.discard(name)
                    taken += tensor.nbytes
                    if taken >= PIECE:
                        break

    def problem(self, what: str) -> UserError:
        """`what` as an error that names the file."""
        return UserError(f"{self.path.name}: {what}")


def read_weights(path: str | Path, *, shapes_only: bool = False) -> Weights:
    """The checkpoint at `path`, a file or a folder of shards, on the CPU; `shapes_only` reads no weights.

    Raises UserError naming the file.
    """
    path = Path(path)
    files = shards(path) if path.is_dir() else (path,)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}: there is no such file.")
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"{file.name}: not a checkpoint; expected a file ending in {', '.join(SUFFIXES)}.")
        if file.suffix.lower() == ".safetensors":
            found, notes = _read_safetensors(file, shapes_only)
        else:
            with _readable(file, READABLE):
                check_archive(file)
            found, notes = _read_pickle(file, shapes_only), {}
        if twice := tensors.keys() & found.keys():
            raise UserError(f"{file.name}: holds {quoted(min(twice))}, as another of the model's files does.")
        tensors |= found
        metadata |= notes
    weights = Weights(path, tensors, metadata, files)
    if weights.nbytes > 2 * (size := sum(file.stat().st_size for file in files)):  # twice: a weight may have two names
        raise weights.problem(f"says that it holds {weights.nbytes} bytes of weights and has {size} bytes.")
    return weights


def model_path(path: Path) -> Path:
    """The model that the file at `path` belongs to: its folder where that is one of several files, else the file."""
    folder = path.parent
    part = path.name in SINGLES or any((folder / name).is_file() for name in INDEXES)
    return folder if part and (folder / "config.json").is_file() else path


def shards(folder: Path) -> tuple[Path, ...]:
    """The files that a model's folder consists of, as its index lists them. Raises UserError where there are none."""
    for index in (folder / name for name in INDEXES):
        if index.is_file():
            return shards_in_index(index)
    for name in SINGLES:
        if (folder / name).is_file():
            return (folder / name,)
    raise UserError(f"{folder / SINGLES[0]}: there is no such file, and no index of several; download the model again.")


def shards_in_index(index: Path) -> tuple[Path, ...]:
    """The files that a model's index names, all below its folder. Raises UserError naming the index."""
    names = read_json(index, "does not list the model's files").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: does not list the model's files; download it again.")
    found = set()
    for name in names.values():
        try:
            found.add(inside(index.parent, name))
        except ValueError as error:
            raise UserError(f"{index}: {quoted(str(name))} in it {error}; download it again.") from error
    return tuple(sorted(found))


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


def _read_safetensors(path: Path, shapes_only: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _readable(path, "a complete safetensors file"):
        check_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            if not shapes_only:
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: _shape_of(name, part) for name, part in parts.items()}, metadata


def _shape_of(name: str, part: Any) -> Tensor:
    """A weight on the meta device. Raises ValueError where its numbers are of a kind that is not read here."""
    if (kind := part.get_dtype()) not in _DTYPES:
        raise ValueError(f"{quoted(name)} holds numbers of the kind {kind}, which is not read here")
    return torch.empty(part.get_shape(), dtype=_DTYPES[kind], device="meta")


def _each_of_safetensors(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    with _readable(path, "a complete safetensors file"), safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in wanted:
                yield name, file.get_tensor(name)


def _each_of_pickle(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in _read_pickle(path, False).items() if name in wanted)


def _read_pickle(path: Path, shapes_only: bool) -> dict[str, Tensor]:
    with _readable(path, READABLE), warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
        warnings.simplefilter("ignore")  # about storages of old files; nothing a user can act on
        content: Any = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True, mmap=True)
    for nest in NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
            break
    if not isinstance(content, Mapping):
        raise UserError(f"{path.name}: holds no named weights; choose a model file.")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path.name}: holds no named weights; choose a model file.")
    return tensors


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Whatever the readers raise for a foreign or broken file, which is of many kinds, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        # torch advises to read the file without its protection, which nobody should be told of a stranger's file
        reasons = [line for line in lines if line and "weights_only" not in line and "Weights only" not in line]
        reason = reasons[0] if reasons else type(error).__name__
        raise UserError(f"{path.name}: not {what} ({reason}); download it again or choose another file.") from error


@dataclass(frozen=True)
class Target:
    """Where a file's weight goes: the row block `part`, of `parts` equal ones, of the module's weight `name`.

    `take` says what of it goes there, where that is not all.
    """

    name: str
    part: int = 0
    parts: int = 1
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor


KeyMap = Callable[[str], Target | None]  # for a key of the file; None: not read


def all_except(*beginnings: str) -> KeyMap:
    """Every weight under its own name, but for those whose names begin so."""
    return lambda key: None if key.startswith(beginnings) else Target(key)


def match_keys(module: nn.Module, weights: Weights, places: KeyMap = Target) -> dict[str, Target]:
    """Where those of `weights` go that `module` takes, by the file's names.

    Every missing, unknown, doubled or mis-shaped weight is an error: half a model draws noise. What files are known to
    carry besides, `places` says, and only that is left where it is.
    """
    found = {key: place for key in weights.tensors if (place := places(key)) is not None}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if unknown := sorted(key for key, place in found.items() if place.name not in expected):
        raise weights.problem(
            f"has {len(unknown)} weights this model does not know, the first is {quoted(unknown[0])}."
        )
    taken = Counter((place.name, place.part) for place in found.values())
    parts = {place.name: place.parts for place in found.values()}
    missing = sorted(name for name in expected for part in range(parts.get(name, 1)) if not taken[name, part])
    if missing:
        raise weights.problem(f"lacks {len(missing)} of {len(expected)} weights, the first is '{missing[0]}'.")
    if double := [p.name for p in found.values() if taken[p.name, p.part] > 1 or p.parts != parts[p.name]]:
        raise weights.problem(f"holds '{double[0]}' twice, under two names.")
    for key, place in found.items():
        rows, *rest = expected[place.name] or (1,)
        shape = [rows // place.parts, *rest] if expected[place.name] else []
        try:
            taken_shape = list(place.take(weights.tensors[key]).shape)
        except (RuntimeError, IndexError, ZeroDivisionError):  # it cannot even be reshaped
            taken_shape = None
        if taken_shape != shape:
            raise weights.problem(f"{quoted(key)} is {list(weights.tensors[key].shape)} where {shape} was expected.")
        if not weights.tensors[key].is_floating_point():
            kind = weights.tensors[key].dtype
            raise weights.problem(f"{quoted(key)} holds {kind} where numbers with a fraction were expected.")
    return found


def load_into(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    places: KeyMap = Target,
    stored: Callable[[str, Tensor], torch.dtype | None] | None = None,
) -> None:
    """Put `weights` into `module`, built on the meta device, as `dtype`, or as what `stored` names for a weight.

    One of the file's tensors at a time is in memory beside the module. `matching` and `checked` say what is refused.
    """
    found = match_keys(module, weights, places)
    empty = module.state_dict()
    filled: dict[str, Tensor] = {}
    for key, tensor in weights.stream(found):
        place = found[key]
        if place.name not in filled:
            like = empty[place.name]
            kept = (stored(place.name, like) if stored else None) or dtype
            filled[place.name] = torch.empty(like.shape, dtype=kept)
        target = filled[place.name]
        part = target.chunk(place.parts)[place.part] if place.parts > 1 else target
        part.copy_(check_finite(weights, key, place.take(tensor)))
    module.load_state_dict(filled, assign=True)


def check_finite(weights: Weights, key: str, tensor: Tensor) -> Tensor:
    """`tensor`, of the weight called `key`. Raises UserError where it holds NaN or infinity: one is enough for noise.

    Takes 0.05 seconds a GB on a CPU's core, a third of what copying a file from memory takes, less from any disk.
    """
    try:
        numbers = tensor.float() if tensor.element_size() == 1 else tensor
        ends = torch.stack(numbers.aminmax())  # NaN where there is one; no copy, unlike isfinite
        finite = bool(ends.isfinite().all())
    except RuntimeError as error:  # sparse, or without numbers
        raise weights.problem(f"{quoted(key)} is not a plain weight ({error}).") from error
    if not finite:
        raise weights.problem(f"{quoted(key)} holds NaN or infinity, which draws noise; download it again.")
    return tensor
