"""Published checkpoints to safetensors that say what they are: family, grid, heads, codebook, tokenizer, sampling."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.llamagen import LlamaGen
from ..tokenizers.tokenizer import VQTokenizer
from . import library
from .families import llamagen
from .weights import KeyMap, Weights, check_finite, match_keys, read_weights

Notes = dict[str, str]
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of number formats, in safetensors


def convert(
    source: str | Path,
    target: str | Path,
    *,
    grid: tuple[int, int] | None = None,
    tokenizer: str | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Notes:
    """Write the decoder or VQ tokenizer at `source` to `target`, and return the metadata written with it.

    grid       rows and cols, where neither the file nor its name tells
    tokenizer  name of the file of codes that a decoder belongs to; None: the published one
    dtype      float32, bfloat16 or float16; None: as in the file
    progress   is told bytes written and bytes in all

    Every weight is checked first, and the file appears under its name only when it is complete. One tensor at a time is
    in memory.
    """
    source, target = Path(source), Path(target)
    if target.suffix.lower() != ".safetensors":
        raise UserError(f"{target.name}: is not a name for the result; end it in .safetensors.")
    if target.exists():
        raise UserError(f"{target}: exists already; choose another name, or remove it first.")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: there is no such folder.")
    weights = read_weights(source)
    if library.is_tokenizer(weights):
        tensors, notes = _tokenizer(weights, grid, tokenizer)
    else:
        tensors, notes = _decoder(weights, grid, tokenizer)
    notes = {"format": "pt", **notes, "source": source.name}
    _write(target, tensors, notes, dtype, progress)
    return notes


def _decoder(weights: Weights, grid: tuple[int, int] | None, tokenizer: str | None) -> tuple[dict[str, Tensor], Notes]:
    info = library.describe(weights, grid)
    if info.family is not llamagen.FAMILY:
        raise weights.problem(f"is a {info.family.name}, which says what it is; only LlamaGen's files need converting.")
    with torch.device("meta"):
        network = LlamaGen(info.config, info.grid, nn)
    sampling = asdict(info.defaults)
    del sampling["seed"]  # a picture's own
    notes = {
        "family": "llamagen",
        "grid": f"{info.grid.rows}x{info.grid.cols}",
        "heads": str(info.config.heads),
        "codes": str(info.config.codes),
        "tokenizer": tokenizer or f"{info.tokenizer}.safetensors",
        "sampling": json.dumps(sampling),
    }
    kept = {k: weights.metadata[k] for k in ("classes", "licence") if k in weights.metadata}
    return _matching(network, weights, llamagen.place), notes | kept


def _tokenizer(
    weights: Weights, grid: tuple[int, int] | None, tokenizer: str | None
) -> tuple[dict[str, Tensor], Notes]:
    if grid or tokenizer:
        raise weights.problem("is a tokenizer, which has neither a grid nor a tokenizer; leave them out.")
    config, places = library.describe_tokenizer(weights)
    with torch.device("meta"):
        network = VQTokenizer(config, nn)
    notes = {
        "family": "llamagen-vq" if config.normalized else library.UNSCALED,
        "codes": str(config.codes),
        "code_dim": str(config.code_dim),
        "factor": str(config.factor),
    }
    kept = {k: weights.metadata[k] for k in ("licence",) if k in weights.metadata}
    return _matching(network, weights, places), notes | kept


def _matching(network: nn.Module, weights: Weights, places: KeyMap) -> dict[str, Tensor]:
    found = match_keys(network, weights, places)
    return {place.name: check_finite(weights, key, weights.tensors[key]) for key, place in found.items()}


def _write(
    path: Path,
    tensors: dict[str, Tensor],
    notes: Notes,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None],
) -> None:
    """A safetensors file, written tensor by tensor: safetensors' own writer wants all of them converted at once.

    The format: eight bytes with the header's length, the header (JSON, padded with blanks to a multiple of eight), then
    the numbers, little end first. Widest formats come first, so that every tensor is aligned.
    """
    kinds = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    for name, kind in kinds.items():
        if kind not in NAMES:
            raise UserError(f"{path.name}: '{name}' holds {kind}, which is not kept; give --dtype.")
    names = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": notes}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * kinds[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": NAMES[kinds[name]], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            done = 0
            for name in names:
                data = tensors[name].detach().to(kinds[name]).contiguous()
                done += file.write(data.flatten().view(torch.uint8).numpy().data)
                progress(done, end)
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: could not be written ({error.strerror}); nothing was kept.") from error
    finally:
        part.unlink(missing_ok=True)
