"""From files to state dicts: safetensors, published `.pt` files and folders of shards. Never runs their content."""

from __future__ import annotations

import argparse
import re
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

CHUNK_BYTES = 2**28
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")  # list the shards of a folder
SHARD = re.compile(r".*-\d{5}-of-\d{5}")  # a shard's name, as those in an index usually are
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder without an index
WRAPPERS = (
    "model",
    "module",
    "state_dict",
    "trainer",
    "var_wo_ddp",
    "gpt_fsdp",
    "vae",
)  # keys under which published training scripts save a state dict
SAFE_CHECKPOINT = "a checkpoint that can be read safely"
SAFE_GLOBALS: list[Any] = [argparse.Namespace]  # saved by those scripts too; it holds attributes and runs nothing


@dataclass(frozen=True)
class Weights:
    """A checkpoint: tensors by name (on the meta device if only shapes were read) and the file's metadata.

    files  the checkpoint itself, or the shards of a folder
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
        """The name for people: the folder's, or the file's without its suffix."""
        return self.path.stem if self.path.suffix.lower() in SUFFIXES else self.path.name

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of a model's folder; empty without one."""
        file = self.path / "config.json"
        return read_json(file, "is not a model's config") if file.is_file() else {}

    def stream(self, wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The `wanted` weights one by one. Files are remapped every CHUNK_BYTES, to free memory of what was read."""
        for file in self.files:
            read = _each_of_safetensors if file.suffix.lower() == ".safetensors" else _each_of_pickle
            left, size = set(wanted), CHUNK_BYTES
            while size >= CHUNK_BYTES:
                size = 0
                for name, tensor in read(file, frozenset(left)):
                    yield name, tensor
                    left.discard(name)
                    size += tensor.nbytes
                    if size >= CHUNK_BYTES:
                        break

    def problem(self, what: str) -> UserError:
        """A UserError that names the file."""
        return UserError(f"{self.path.name}: {what}")


def read_weights(path: str | Path, *, shapes_only: bool = False) -> Weights:
    """The checkpoint at `path`, a file or a folder of shards, on the CPU. `shapes_only` reads no weights.

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
            with _readable(file, SAFE_CHECKPOINT):
                check_archive(file)
            found, notes = _read_pickle(file, shapes_only), {}
        if duplicates := tensors.keys() & found.keys():
            raise UserError(f"{file.name}: contains {quoted(min(duplicates))}, but so does another file of the model.")
        tensors |= found
        metadata |= notes
    weights = Weights(path, tensors, metadata, files)
    if weights.nbytes > 2 * (size := sum(file.stat().st_size for file in files)):  # twice: a weight may have two names
        raise weights.problem(f"claims to hold {weights.nbytes} bytes of weights, but has only {size} bytes.")
    return weights


def model_path(path: Path) -> Path:
    """The model that the file at `path` belongs to: its folder if the model has several files, else the file."""
    folder = path.parent
    indexed = any((folder / name).is_file() for name in INDEX_FILES)
    if indexed and SHARD.fullmatch(path.stem):  # Infinity's folders have no config.json
        return folder
    is_shard = indexed or path.name in SINGLE_FILES
    return folder if is_shard and (folder / "config.json").is_file() else path


def shards(folder: Path) -> tuple[Path, ...]:
    """The files of a model's folder, as its index lists them. Raises UserError if there are none."""
    for index in (folder / name for name in INDEX_FILES):
        if index.is_file():
            return shards_in_index(index)
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return (folder / name,)
    raise UserError(
        f"{folder / SINGLE_FILES[0]}: there is no such file and no index of shards; download the model again."
    )


def shards_in_index(index: Path) -> tuple[Path, ...]:
    """The files that a model's index names, all inside its folder. Raises UserError naming the index."""
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
    """A weight on the meta device. Raises ValueError for an unsupported dtype."""
    if (kind := part.get_dtype()) not in _DTYPES:
        raise ValueError(f"{quoted(name)} has dtype {kind}, which is not supported")
    return torch.empty(part.get_shape(), dtype=_DTYPES[kind], device="meta")


def _each_of_safetensors(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    with _readable(path, "a complete safetensors file"), safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in wanted:
                yield name, file.get_tensor(name)


def _each_of_pickle(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in _read_pickle(path, False).items() if name in wanted)


def _read_pickle(path: Path, shapes_only: bool) -> dict[str, Tensor]:
    with _readable(path, SAFE_CHECKPOINT), warnings.catch_warnings(), torch.serialization.safe_globals(SAFE_GLOBALS):
        warnings.simplefilter("ignore")  # about storages of old files; nothing a user can act on
        content: Any = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True, mmap=True)
    for _ in range(2):  # a VAR's training checkpoint nests twice
        inner = (content[w] for w in WRAPPERS if isinstance(content, Mapping) and isinstance(content.get(w), Mapping))
        content = next(inner, content)
    if not isinstance(content, Mapping):
        raise UserError(f"{path.name}: holds no named weights; choose a model file.")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"{path.name}: holds no named weights; choose a model file.")
    return tensors


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Turn any exception of the readers about a foreign or broken file into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines()]
        # torch suggests reading the file unprotected, which nobody should be advised to do
        reasons = [line for line in lines if line and "weights_only" not in line and "Weights only" not in line]
        reason = reasons[0] if reasons else type(error).__name__
        raise UserError(f"{path.name}: not {what} ({reason}); download it again or choose another file.") from error


@dataclass(frozen=True)
class Target:
    """Where a file's weight goes: row block `part` of `parts` equal ones in the module's weight `name`.

    transform  maps the file's tensor to what is stored there
    """

    name: str
    part: int = 0
    parts: int = 1
    transform: Callable[[Tensor], Tensor] = lambda tensor: tensor


KeyMap = Callable[[str], Target | None]  # from a key of the file; None: not read


def all_except(*prefixes: str) -> KeyMap:
    """A key map that keeps every name, but skips those with one of these prefixes."""
    return lambda key: None if key.startswith(prefixes) else Target(key)


def match_keys(module: nn.Module, weights: Weights, key_map: KeyMap = Target) -> dict[str, Target]:
    """The targets of those of `weights` that `module` takes, by the file's keys.

    Raises UserError for every missing, unknown, duplicate or misshapen weight: a model with half its weights draws
    noise. Keys for which `key_map` returns None are skipped.
    """
    targets = {key: target for key in weights.tensors if (target := key_map(key)) is not None}
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    if unknown := sorted(key for key, target in targets.items() if target.name not in expected):
        raise weights.problem(
            f"has {len(unknown)} weights this model does not have, the first is {quoted(unknown[0])}."
        )
    counts = Counter((target.name, target.part) for target in targets.values())
    parts = {target.name: target.parts for target in targets.values()}
    missing = sorted(name for name in expected for part in range(parts.get(name, 1)) if not counts[name, part])
    if missing:
        raise weights.problem(f"lacks {len(missing)} of {len(expected)} weights, the first is '{missing[0]}'.")
    if twice := [t.name for t in targets.values() if counts[t.name, t.part] > 1 or t.parts != parts[t.name]]:
        raise weights.problem(f"holds '{twice[0]}' twice, under two names.")
    for key, target in targets.items():
        rows, *rest = expected[target.name] or (1,)
        shape = [rows // target.parts, *rest] if expected[target.name] else []
        try:
            found = list(target.transform(weights.tensors[key]).shape)
        except (RuntimeError, IndexError, ZeroDivisionError):  # it cannot even be reshaped
            found = None
        if found != shape:
            raise weights.problem(f"{quoted(key)} is {list(weights.tensors[key].shape)} where {shape} was expected.")
        if not weights.tensors[key].is_floating_point():
            kind = weights.tensors[key].dtype
            raise weights.problem(f"{quoted(key)} is {kind} where floating-point numbers were expected.")
    return targets


def load_into(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    key_map: KeyMap = Target,
    storage_dtype: Callable[[str, Tensor], torch.dtype | None] | None = None,
) -> None:
    """Load `weights` into `module`, which was built on the meta device, as `dtype`.

    storage_dtype  may name another dtype for a weight, by its name and its tensor on the meta device

    One of the file's tensors at a time is in memory besides the module. Raises UserError as `match_keys` and
    `check_finite` do.
    """
    targets = match_keys(module, weights, key_map)
    expected = module.state_dict()
    loaded: dict[str, Tensor] = {}
    for key, tensor in weights.stream(targets):
        target = targets[key]
        if target.name not in loaded:
            meta = expected[target.name]
            kept = (storage_dtype(target.name, meta) if storage_dtype else None) or dtype
            loaded[target.name] = torch.empty(meta.shape, dtype=kept)
        weight = loaded[target.name]
        part = weight.chunk(target.parts)[target.part] if target.parts > 1 else weight
        part.copy_(check_finite(weights, key, target.transform(tensor)))
    module.load_state_dict(loaded, assign=True)


def check_finite(weights: Weights, key: str, tensor: Tensor) -> Tensor:
    """`tensor`, the weight called `key`. Raises UserError if it has a NaN or an infinity: one is enough for noise.

    Takes 0.05 seconds per GB on one CPU core, a third of copying a file from memory, and less than any disk.
    """
    try:
        numbers = tensor.float() if tensor.element_size() == 1 else tensor
        ends = torch.stack(numbers.aminmax())  # NaN if there is one; makes no copy, unlike isfinite
        finite = bool(ends.isfinite().all())
    except RuntimeError as error:  # sparse or empty, for example
        raise weights.problem(f"{quoted(key)} is not a plain weight ({error}).") from error
    if not finite:
        raise weights.problem(f"{quoted(key)} holds NaN or infinity, which would draw noise; download it again.")
    return tensor
