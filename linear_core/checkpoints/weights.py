"""From files to state dicts: safetensors, published `.pt` files and folders of shards. Never runs their content."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import UserError, quoted
from .untrusted import NotWeightsAlone, check_archive, check_header, inside, read_json, stand_ins

CHUNK_BYTES = 2**28
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
INDEX_FILES = (  # list the shards of a folder
    "model.safetensors.index.json", "pytorch_model.bin.index.json", "diffusion_pytorch_model.safetensors.index.json",
)  # fmt: skip
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors")  # without an index
PIPELINE, TRANSFORMER = "model_index.json", "transformer"  # in a folder of diffusers: one folder for each part
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})")  # what savers call one file of several, without its suffix
SAFE_CHECKPOINT = "a checkpoint that can be read safely"
NESTED, MAX_NESTED = "/", 8  # between the keys of dictionaries within dictionaries, and so many at most


@dataclass(frozen=True)
class Weights:
    """A checkpoint: tensors by name (on the meta device if only shapes were read) and the file's metadata.

    Weights inside dictionaries are named by their path: the weight w of {"model": {"w": …}} is model/w.

    files  the checkpoint itself, or the shards of a folder
    keys   names in the files of weights that are called otherwise here (see `renamed`)
    scaled names in the files of matrices in 8 bits with a scale beside them: `stream` gives the numbers they stand for
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    files: tuple[Path, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    scaled: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def name(self) -> str:
        """The name for people: see `display_name`."""
        return display_name(self.path)

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of a model's folder; empty without one."""
        file = self.path / "config.json"
        return read_json(file, "is not a model's config") if file.is_file() else {}

    def stream(self, wanted: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The `wanted` weights one by one. Files are remapped every CHUNK_BYTES, to free memory of what was read."""
        names = {self.keys.get(name, name): name for name in wanted}
        scales = self._scales(self.scaled & names.keys())
        for file in self.files:
            read = _reader(file)
            left, size = set(names), CHUNK_BYTES
            while size >= CHUNK_BYTES:
                size = 0
                for key, tensor in read(file, frozenset(left)):
                    yield names[key], tensor.float() * scales[key] if key in scales else tensor
                    left.discard(key)
                    size += tensor.nbytes
                    if size >= CHUNK_BYTES:
                        break

    def _scales(self, keys: frozenset[str]) -> dict[str, Tensor]:
        """The scale of each matrix, one for each of its rows or for all. Raises UserError for other kinds of scales."""
        found: dict[str, Tensor] = {}
        for file in self.files if keys else ():
            for key, tensor in _reader(file)(file, _Beside(keys)):
                matrix, what = key.rpartition(".")[0] + ".weight", key.rpartition(".")[2]
                if what == SCALE:
                    found[matrix] = tensor.float().reshape(-1, 1)
                elif tensor.dtype == torch.uint8 and b'"convrot": true' in tensor.numpy().tobytes():
                    raise self.problem(f"{quoted(matrix)} is rotated before it is quantised; choose another file.")
        return found

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Those of the weights that `names` lists, by their present names, under new ones.

        Raises UserError if two would have the same name.
        """
        if twice := [name for name, count in Counter(names.values()).items() if count > 1]:
            raise self.problem(f"holds {quoted(twice[0])} twice, under two names.")
        return replace(
            self,
            tensors={new: self.tensors[old] for old, new in names.items()},
            keys={new: self.keys.get(old, old) for old, new in names.items()},
        )

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
            found, notes = _read_pickle(file, shapes_only), {}
        if duplicates := tensors.keys() & found.keys():
            raise UserError(f"{file.name}: contains {quoted(min(duplicates))}, but so does another file of the model.")
        tensors |= found
        metadata |= notes
    weights = Weights(path, tensors, metadata, files)
    if weights.nbytes > 2 * (size := sum(file.stat().st_size for file in files)):  # twice: a weight may have two names
        raise weights.problem(f"claims to hold {weights.nbytes} bytes of weights, but has only {size} bytes.")
    return _without_scales(weights) if shapes_only else weights


# How ComfyUI quantises files: a matrix `x.weight` in 8 bits has `x.weight_scale`, and may have the other two. Its nvfp4
# has two weights in a byte, so that their shapes alone say that such a file is refused (`match_keys`).
SCALE = "weight_scale"
HALF = torch.bfloat16  # what they are converted to
BESIDE = (SCALE, "input_scale", "comfy_quant")
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


class _Beside(frozenset[str]):
    """The names of what lies beside these matrices and says how to read them."""

    def __contains__(self, key: object) -> bool:
        place, _, what = str(key).rpartition(".")
        return what in (SCALE, "comfy_quant") and super().__contains__(f"{place}.weight")


def _without_scales(weights: Weights) -> Weights:
    """`weights` with scaled matrices as if they were bfloat16, and without what lies beside them."""
    tensors, scaled = dict(weights.tensors), set()
    for name, tensor in weights.tensors.items():
        place, _, what = name.rpartition(".")
        scale = tensors.get(f"{place}.{SCALE}")
        if what != "weight" or tensor.dtype not in EIGHT_BITS or tensor.ndim != 2 or scale is None:
            continue
        if not scale.is_floating_point() or scale.numel() not in (1, len(tensor)):
            raise weights.problem(
                f"{quoted(f'{place}.{SCALE}')} is not a scale of rows; choose a file that is not quantised."
            )
        scaled.add(name)
        tensors[name] = torch.empty(tensor.shape, dtype=HALF, device="meta")
        for beside in BESIDE:
            tensors.pop(f"{place}.{beside}", None)
    return replace(weights, tensors=tensors, scaled=frozenset(scaled)) if scaled else weights


def display_name(path: Path) -> str:
    """What a model is called: its folder, or its file without the suffix; in the hub's cache, the repository."""
    if path.suffix.lower() in SUFFIXES and not path.is_dir():
        return path.parent.name if path.name in SINGLE_FILES and path.parent.name else path.stem
    if path.parent.name == "snapshots":  # models--owner--name/snapshots/commit
        return path.parent.parent.name.rpartition("--")[2]
    return path.name


def model_path(path: Path) -> Path:
    """The model that the file at `path` belongs to: its folder if the model has several files, else the file."""
    folder = path.parent
    if path.is_dir():
        return path
    if path.name in SINGLE_FILES:
        whole = (folder / "config.json").is_file()
    else:
        whole = path.name in (*INDEX_FILES, "config.json") or _is_shard(path)
    if whole and folder.name == TRANSFORMER and (folder.parent / PIPELINE).is_file():
        return folder.parent
    return folder if whole else path


def _is_shard(path: Path) -> bool:
    if SHARD.fullmatch(path.stem):
        return True
    for index in (path.with_name(name) for name in INDEX_FILES):
        try:
            if index.is_file() and path in shards_in_index(index):
                return True
        except UserError:  # reading the model says what is wrong with its index
            continue
    return False


def shards(folder: Path) -> tuple[Path, ...]:
    """The files of a model's folder: those in its index, one by its usual name, numbered ones, or the only one.

    Raises UserError if there are none, or if a numbered one is missing.
    """
    if (folder / PIPELINE).is_file() and (folder / TRANSFORMER).is_dir():
        folder = folder / TRANSFORMER
    listed = [shards_in_index(folder / name) for name in INDEX_FILES if (folder / name).is_file()]
    if listed:
        return next((files for files in listed if all(file.is_file() for file in files)), listed[0])
    for name in SINGLE_FILES:
        if (folder / name).is_file():
            return (folder / name,)
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    numbered = [(p, found) for p in files if (found := SHARD.fullmatch(p.stem))]
    if numbered:
        first, found = next(((p, f) for p, f in numbered if p.suffix.lower() == ".safetensors"), numbered[0])
        names = (f"{found[1]}-{n:05d}-of-{found[3]}{first.suffix}" for n in range(1, int(found[3]) + 1))
        return tuple(first.with_name(name) for name in names)
    if len(files) == 1:
        return (files[0],)
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
            file = inside(index.parent, name)
            found.add(file if file.is_file() or "\\" not in name else index.parent / name.replace("\\", "/"))
        except ValueError as error:
            raise UserError(f"{index}: {quoted(str(name))} in it {error}; download it again.") from error
    return tuple(sorted(found))


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32,
    "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


def _read_safetensors(path: Path, shapes_only: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _readable(path, "a complete safetensors file"):
        check_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            if not shapes_only:
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: _shape_of(part) for name, part in parts.items()}, metadata


def _shape_of(part: Any) -> Tensor:
    """A weight on the meta device; as plain bytes if torch has no such dtype, which `match_keys` refuses if it is used.

    Models do not need every weight of a file, so an unknown kind is no reason to refuse the file.
    """
    return torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.uint8), device="meta")


def _reader(file: Path) -> Callable[[Path, Container[str]], Iterator[tuple[str, Tensor]]]:
    return _each_of_safetensors if file.suffix.lower() == ".safetensors" else _each_of_pickle


def _each_of_safetensors(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    with _readable(path, "a complete safetensors file"), safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            if name in wanted:
                yield name, file.get_tensor(name)


def _each_of_pickle(path: Path, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in _read_pickle(path, False).items() if name in wanted)


def _read_pickle(path: Path, shapes_only: bool) -> dict[str, Tensor]:
    with _readable(path, SAFE_CHECKPOINT), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about storages of old files; nothing a user can act on
        with torch.serialization.safe_globals(stand_ins(check_archive(path))):
            content: Any = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True, mmap=True)
    if not (tensors := _by_path(content)):
        raise UserError(f"{path.name}: holds no named weights; choose a model file.")
    return tensors


def _by_path(content: Any) -> dict[str, Tensor]:
    """Every tensor in nested dictionaries, by the keys that lead to it."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()  # a pickle can hold one dictionary a million times, or within itself
    left: list[tuple[str, Any, int]] = [("", content, 0)]
    while left:
        prefix, inner, depth = left.pop(0)
        if not isinstance(inner, Mapping) or id(inner) in seen or depth > MAX_NESTED:
            continue
        seen.add(id(inner))
        for key, value in inner.items():
            if not isinstance(key, str | int):
                continue
            if isinstance(value, Tensor):
                found[f"{prefix}{key}"] = value
            else:
                left.append((f"{prefix}{key}{NESTED}", value, depth + 1))
    return found


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
        advice = getattr(error, "advice", "download it again or choose another file")
        if reason.startswith("Can only"):  # torch, of kinds of objects that it does not make
            advice = NotWeightsAlone.advice
        raise UserError(f"{path.name}: not {what} ({reason}); {advice}.") from error


@dataclass(frozen=True)
class Target:
    """Where a file's weight goes: row block `part` of the module's weight `name`.

    shares     rows of its blocks, in proportion to each other
    transform  maps the file's tensor to what is stored there
    """

    name: str
    part: int = 0
    shares: tuple[int, ...] = (1,)
    transform: Callable[[Tensor], Tensor] = lambda tensor: tensor

    @property
    def parts(self) -> int:
        return len(self.shares)

    def block(self, rows: int) -> slice:
        """This block of a weight with so many rows."""
        one = rows // sum(self.shares)
        first = one * sum(self.shares[: self.part])
        return slice(first, first + one * self.shares[self.part])


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
    shares = {target.name: target.shares for target in targets.values()}
    missing = sorted(name for name in expected for part in range(len(shares.get(name, (1,)))) if not counts[name, part])
    if missing:
        raise weights.problem(f"lacks {len(missing)} of {len(expected)} weights, the first is '{missing[0]}'.")
    if twice := [t.name for t in targets.values() if counts[t.name, t.part] > 1 or t.shares != shares[t.name]]:
        raise weights.problem(f"holds '{twice[0]}' twice, under two names.")
    for key, target in targets.items():
        if not weights.tensors[key].is_floating_point():
            kind = str(weights.tensors[key].dtype).removeprefix("torch.")
            raise weights.problem(
                f"{quoted(key)} is {kind} where floating-point numbers were expected; choose a file that is not "
                "quantised."
            )
        rows, *rest = expected[target.name] or (1,)
        block = target.block(rows)
        shape = [block.stop - block.start, *rest] if expected[target.name] else []
        try:
            found = list(target.transform(weights.tensors[key]).shape)
        except (RuntimeError, IndexError, ZeroDivisionError):  # it cannot even be reshaped
            found = None
        if found != shape:
            raise weights.problem(f"{quoted(key)} is {list(weights.tensors[key].shape)} where {shape} was expected.")
    return targets


@contextmanager
def unfilled() -> Iterator[None]:
    """Modules that are made meanwhile have shapes and no numbers: they are on the meta device."""
    with torch.device("meta"), _NothingDrawn():
        yield


class _NothingDrawn(TorchFunctionMode):
    """No normal numbers are drawn: to do so on the meta device, torch would import its compiler, for two seconds."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, nn.init.normal_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_into(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    key_map: KeyMap = Target,
    storage_dtype: Callable[[str, Tensor], torch.dtype | None] | None = None,
    layers: Mapping[str, Any] | None = None,
) -> None:
    """Load `weights` into `module`, which was built on the meta device, as `dtype`.

    storage_dtype  may name another dtype for a weight, by its name and its tensor on the meta device
    layers         by the name of a matrix: layers that take the place of those which own it, and keep it in a way of
                   their own, given some of its rows at a time (`fill`; see models/quantised.py)

    One of the file's tensors at a time is in memory besides the module. Raises UserError as `match_keys` and
    `check_finite` do.
    """
    targets = match_keys(module, weights, key_map)
    expected, layers = module.state_dict(), layers or {}
    loaded: dict[str, Tensor] = {}
    for name, layer in layers.items():
        module.set_submodule(name.rpartition(".")[0], layer)
    for key, tensor in weights.stream(targets):
        target, meta = targets[key], expected[targets[key].name]
        rows = target.block(len(meta)) if target.parts > 1 else slice(0, len(meta) if meta.ndim else 1)
        numbers = check_finite(weights, key, target.transform(tensor))
        if target.name in layers:
            layers[target.name].fill(rows, numbers)
            continue
        if target.name not in loaded:
            kept = (storage_dtype(target.name, meta) if storage_dtype else None) or dtype
            loaded[target.name] = torch.empty(meta.shape, dtype=kept)
        (loaded[target.name][rows] if target.parts > 1 else loaded[target.name]).copy_(numbers)
    module.load_state_dict(loaded, assign=True, strict=not layers)  # layers have what else there is


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
