"""From the names in the widgets to checkpoints on the disk."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import torch

from ..linear_core import published
from ..linear_core.errors import UserError
from ..linear_core.families import ModelInfo
from ..linear_core.families.llamagen import imagenet_classes
from ..linear_core.library import BUNDLED, ModelFiles, bundled_files, find_tokenizer, is_tokenizer, read_info
from ..linear_core.text import TextFiles, find_text_encoder, is_text_encoder
from ..linear_core.weights import read_weights
from . import host

BUNDLED_NAME = f"{BUNDLED} (bundled)"
AUTOMATIC = "automatic"


@lru_cache(maxsize=256)
def _is_tokenizer(path: str, size: int, changed: int) -> bool:
    """Reads the file's header. `size` and `changed` are there so that a file that was replaced is read again."""
    try:
        return is_tokenizer(read_weights(path, shapes_only=True))
    except UserError:  # it is listed among the models, and choosing it says what is wrong
        return False


def _listed() -> tuple[list[str], list[str]]:
    """Names of the decoders and of the tokenizers in the model folders."""
    decoders, tokenizers = [], []
    for name in host.filenames():
        if path := host.full_path(name):
            stat = Path(path).stat()
            (tokenizers if _is_tokenizer(path, stat.st_size, stat.st_mtime_ns) else decoders).append(name)
    return decoders, tokenizers


def model_names() -> list[str]:
    return [BUNDLED_NAME, *_listed()[0]]


def tokenizer_names() -> list[str]:
    return [AUTOMATIC, *_listed()[1]]


@lru_cache(maxsize=256)
def _cache_sizes(path: str, dtype: torch.dtype, size: int, changed: int) -> dict[str, int] | None:
    try:
        info = read_info(path)
    except UserError:  # choosing it says what is wrong
        return None
    grid = {"rows": info.grid.rows, "cols": info.grid.cols, "stride": info.grid.stride}
    return {**asdict(info.cache_shape(dtype)), **grid, "guided": int(info.defaults.guided)}


def cache_sizes() -> dict[str, dict[str, int]]:
    """What decides the cache's memory for every model listed, for the memory line on the page."""
    dtype, sizes = host.compute_dtype(), {}
    for name in model_names():
        path = bundled_files().decoder if name == BUNDLED_NAME else host.full_path(name)
        if path:
            stat = Path(path).stat()
            if found := _cache_sizes(str(path), dtype, stat.st_size, stat.st_mtime_ns):
                sizes[name] = found
    return sizes


def class_names() -> list[str]:
    """Every class that can be chosen by name: the bundled model's, then ImageNet's."""
    return list(dict.fromkeys([*bundled_info().classes, *imagenet_classes()]))


def bundled_info() -> ModelInfo:
    """The bundled model's class names and sampling settings."""
    return read_info(bundled_files().decoder)


def find_files(model: str, tokenizer: str, grid: tuple[int, int] | None = None) -> ModelFiles:
    """The checkpoints of the chosen model and tokenizer. Raises UserError where one is missing."""
    bundled = bundled_files()
    decoder = find_decoder(model)
    if tokenizer != AUTOMATIC:
        return ModelFiles(decoder, _find(tokenizer))
    if model == BUNDLED_NAME:
        return bundled
    return ModelFiles(decoder, find_tokenizer(decoder, grid, [_find(name) for name in _listed()[1]]))


def find_decoder(model: str) -> Path:
    """Where the chosen model is, without a look inside. Raises UserError where it is missing."""
    return bundled_files().decoder if model == BUNDLED_NAME else _find(model)


def _find(name: str) -> Path:
    path = host.full_path(name)
    if path is None:
        places = " or ".join(str(Path(folder) / name) for folder in host.folders())
        raise UserError(
            f"{places}: there is no such file; {published.where(name) or 'put it there, or choose another'}."
        )
    return Path(path)


# -- text encoders -----------------------------------------------------------------------------------------------------

TEXT_FOLDER = "text_encoders"


@lru_cache(maxsize=256)
def _is_text_encoder(path: str, size: int, changed: int) -> bool:
    return is_text_encoder(Path(path))


def _text_encoders() -> dict[str, Path]:
    """The T5 encoders of the model folders by the names the widget lists: files, and folders with a config.json."""
    found: dict[str, Path] = {}
    for kind in (TEXT_FOLDER, host.FOLDER):
        for name in host.filenames(kind):
            path = host.full_path(name, kind)
            if path is None or not name.endswith(".safetensors"):
                continue
            stat, parent = Path(path).stat(), Path(name).parent
            if _is_text_encoder(path, stat.st_size, stat.st_mtime_ns):
                whole = parent.name and (Path(path).parent / "config.json").is_file()
                found.setdefault(parent.as_posix() if whole else name, Path(path).parent if whole else Path(path))
    return found


def text_encoder_names() -> list[str]:
    return list(_text_encoders()) or [published.TEXT_ENCODER]


def find_text_files(name: str) -> TextFiles:
    """The files of the chosen text encoder. Raises UserError where one is missing."""
    path = _text_encoders().get(name) or Path(host.folders(TEXT_FOLDER)[0]) / Path(name).name
    return find_text_encoder(path, host.t5_tokenizer())
