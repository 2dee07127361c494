"""Files to state dicts: safetensors and published `.pt` files, never running anything they contain."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
NESTS = ("model", "module", "state_dict")  # what published training scripts wrap a state dict in
HARMLESS = [argparse.Namespace]  # what they save beside it; it holds attributes and runs nothing


@dataclass(frozen=True)
class Weights:
    """A checkpoint: tensors by name (on the meta device when only shapes were asked for) and the file's own notes."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def problem(self, what: str) -> UserError:
        """`what` as an error that names the file."""
        return UserError(f"{self.path.name}: {what}")


def read_weights(path: str | Path, *, shapes_only: bool = False) -> Weights:
    """The checkpoint at `path`, on the CPU; `shapes_only` reads no weights. Raises UserError naming the file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such file.")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path.name}: not a checkpoint; expected a file ending in {', '.join(SUFFIXES)}.")
    if path.suffix.lower() == ".safetensors":
        tensors, metadata = _read_safetensors(path, shapes_only)
    else:
        tensors, metadata = _read_pickle(path, shapes_only), {}
    return Weights(path, tensors, metadata)


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def _read_safetensors(path: Path, shapes_only: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            if not shapes_only:
                return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118 (not a dict)
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            tensors = {
                name: torch.empty(part.get_shape(), dtype=_DTYPES.get(part.get_dtype(), torch.float32), device="meta")
                for name, part in parts.items()
            }
            return tensors, metadata
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path.name}: not a complete safetensors file ({error}); download it again or choose another file."
        ) from error


def _read_pickle(path: Path, shapes_only: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(HARMLESS):
            warnings.simplefilter("ignore")  # about storages of old files; nothing a user can act on
            content: Any = torch.load(path, map_location="meta" if shapes_only else "cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for a foreign or broken file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path.name}: not a checkpoint that can be read safely ({reason}); "
            "download it again or choose another file."
        ) from error
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


def matching(module: nn.Module, weights: Weights, ignore: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Those of `weights` that `module` takes. Keys starting with one of `ignore` are skipped.

    Every missing, unknown or mis-shaped key is an error: half a model draws noise.
    """
    tensors = {k: v for k, v in weights.tensors.items() if not k.startswith(ignore)}
    expected = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing:
        raise weights.problem(f"lacks {len(missing)} of {len(expected)} weights, the first is '{missing[0]}'.")
    if unknown:
        raise weights.problem(f"has {len(unknown)} weights this model does not know, the first is '{unknown[0]}'.")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise weights.problem(f"'{name}' is {list(tensors[name].shape)} where {list(shape)} was expected.")
        if not tensors[name].is_floating_point():
            raise weights.problem(f"'{name}' holds {tensors[name].dtype} where numbers with a fraction were expected.")
    return {name: tensors[name] for name in expected}


def fill(
    module: nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    ignore: tuple[str, ...] = (),
    stored: Callable[[str, Tensor], torch.dtype | None] | None = None,
) -> None:
    """Put `weights` into `module`, built on the meta device, as `dtype`, or as what `stored` names for a tensor.

    See `matching` for what is refused.
    """
    tensors = matching(module, weights, ignore)
    kept = {k: (stored(k, v) if stored else None) or dtype for k, v in tensors.items()}
    module.load_state_dict({k: v.to(kept[k]) for k, v in tensors.items()}, assign=True)
