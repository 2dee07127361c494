"""Converts published checkpoints to safetensors with metadata: family, grid, heads, codebook, tokenizer, sampling."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.llamagen import LlamaGen
from ..tokenizers.tokenizer import KINDS, VQConfig, VQTokenizer
from . import library
from .families import llamagen
from .weights import KeyMap, Weights, check_finite, match_keys, unfilled

Metadata = dict[str, str]
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # names in safetensors


def convert(
    source: str | Path,
    target: str | Path,
    *,
    grid: tuple[int, int] | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Metadata:
    """Write the decoder or VQ tokenizer at `source` to `target`, and return the metadata written with it.

    grid       rows and cols, if neither the file nor its name tells
    tokenizer  file name of the VQ tokenizer that a decoder belongs to; None: the published one
    dtype      float32, bfloat16 or float16; None: as in the file
    progress   called with bytes written and total bytes

    Every weight is checked first, and the target appears only when it is complete. One tensor at a time is in memory.
    Raises UserError naming the file that cannot be read, converted or written.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() != ".safetensors":
        raise UserError(f"{target.name}: the target's name must end in .safetensors.")
    if target.exists():
        raise UserError(f"{target}: already exists; choose another name, or remove it first.")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: there is no such folder.")
    weights = library.read_checkpoint(source)
    if library.is_tokenizer(weights):
        tensors, metadata = _tokenizer(weights, grid, tokenizer)
    else:
        tensors, metadata = _decoder(weights, grid, tokenizer)
    metadata = {"format": "pt", **metadata, "source": source.name}
    _write(target, tensors, metadata, dtype, progress)
    return metadata


def _decoder(
    weights: Weights, grid: tuple[int, int] | None, tokenizer: str | None
) -> tuple[dict[str, Tensor], Metadata]:
    info = library.describe(weights, grid)
    if info.family is not llamagen.FAMILY:
        raise weights.problem(
            f"belongs to {info.family.name}, whose files describe themselves; only LlamaGen's need converting."
        )
    with unfilled():
        network = LlamaGen(info.config, info.grid, nn)
    sampling = {name: getattr(info.defaults, name) for name in llamagen.SAMPLING}  # a seed belongs to a picture
    metadata = {
        "family": "llamagen",
        "grid": f"{info.grid.rows}x{info.grid.cols}",
        "heads": str(info.config.heads),
        "codes": str(info.config.codes),
        "tokenizer": tokenizer or f"{info.tokenizer}.safetensors",
        "sampling": json.dumps(sampling),
    }
    kept = {k: weights.metadata[k] for k in ("classes", "licence", "rope") if k in weights.metadata}
    return _matching(network, weights, llamagen.key_map), metadata | kept


def _tokenizer(
    weights: Weights, grid: tuple[int, int] | None, tokenizer: str | None
) -> tuple[dict[str, Tensor], Metadata]:
    if grid or tokenizer:
        raise weights.problem("is a tokenizer, which has no grid and no tokenizer of its own; leave them out.")
    config, key_map = library.describe_tokenizer(weights)
    if not isinstance(config, VQConfig):
        raise weights.problem("is a tokenizer whose files describe themselves; only LlamaGen's need converting.")
    with unfilled():
        network = VQTokenizer(config, nn)
    metadata = {
        "family": _tokenizer_family(config),
        "codes": str(config.codes),
        "code_dim": str(config.code_dim),
        "factor": str(config.factor),
    }
    kept = {k: weights.metadata[k] for k in ("licence",) if k in weights.metadata}
    return _matching(network, weights, key_map), metadata | kept


def _tokenizer_family(config: VQConfig) -> str:
    if config.kind in KINDS:
        return library.VQ_FAMILY.format(config.kind)
    return "llamagen-vq" if config.normalized else library.UNNORMALIZED


def _matching(network: nn.Module, weights: Weights, key_map: KeyMap) -> dict[str, Tensor]:
    targets = match_keys(network, weights, key_map)
    return {
        targets[key].name: check_finite(weights, key, targets[key].transform(tensor))
        for key, tensor in weights.stream(targets)
    }


def _write(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: Metadata,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
) -> None:
    """Write a safetensors file tensor by tensor; safetensors' own writer needs all of them converted at once.

    The format: eight bytes with the header's length, the header (JSON, padded with spaces to a multiple of eight), then
    the data, little-endian. Wider dtypes come first, so that every tensor is aligned.
    """
    dtypes = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    for name, kind in dtypes.items():
        if kind not in DTYPES:
            raise UserError(f"{path.name}: '{name}' is {kind}, which cannot be kept; choose a format with --dtype.")
    names = sorted(tensors, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": DTYPES[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            done = 0
            for name in names:
                data = tensors[name].detach().to(dtypes[name]).contiguous()
                done += file.write(data.flatten().view(torch.uint8).numpy().data)
                progress(done, end)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror}); nothing was kept.") from error
    finally:
        part.unlink(missing_ok=True)
