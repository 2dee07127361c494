"""From the names in the widgets to checkpoints on the disk."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ..linear_core.checkpoints import published
from ..linear_core.checkpoints.families import ModelInfo
from ..linear_core.checkpoints.families.llamagen import imagenet_classes
from ..linear_core.checkpoints.library import (
    BUNDLED,
    BUNDLED_SCALES,
    ModelFiles,
    bundled_files,
    decoder_bytes,
    find_tokenizer,
    is_tokenizer,
    read_checkpoint,
    read_info,
)
from ..linear_core.checkpoints.text import TextFiles, encoder_width, find_text_encoder
from ..linear_core.checkpoints.untrusted import inside
from ..linear_core.checkpoints.weights import INDEX_FILES, model_path, shards
from ..linear_core.errors import UserError, quoted
from . import host

BUNDLED_NAME = f"{BUNDLED} (bundled)"
BUNDLED_NAMES = {BUNDLED_NAME: BUNDLED, f"{BUNDLED} in scales (bundled)": BUNDLED_SCALES}
AUTOMATIC = "automatic"
SAMPLING = ("guidance", "temperature", "top_k", "top_p")  # which nodes can leave to the model


@lru_cache(maxsize=256)
def _kind(path: str, size: int, changed: int) -> str:
    """What a checkpoint is. Reads its header; `size` and `changed` are there so that one replaced is read again."""
    try:
        weights = read_checkpoint(path)
    except UserError:  # it is listed among the models, and choosing it says what is wrong
        return "decoder"
    if encoder_width([Path(path)]):
        return "text encoder"
    return "tokenizer" if is_tokenizer(weights) else "decoder"


def _checkpoints() -> dict[str, Path]:
    """What lies in the model folders, by the names that the widgets list; a model of several files is its folder.

    A model's files may lie straight in a model folder (models/Janus-Pro), whose name is then the model's.
    """
    found: dict[str, Path] = {}
    straight: dict[str, Path] = {}
    for name in host.filenames():
        path = Path(host.full_path(name) or name)
        if not path.is_file():
            continue
        folder, above = model_path(path), Path(name).parents
        parent = above[min(len(path.relative_to(folder).parts), len(above)) - 1]
        if folder != path:
            (found if parent.name else straight).setdefault(parent.as_posix() if parent.name else folder.name, folder)
        elif path.suffix != ".bin":  # by themselves these are seldom ours
            found.setdefault(name, path)
    for name, folder in straight.items():
        found.setdefault(f"{name}/." if name in found else name, folder)
    return found


def _listed() -> tuple[list[str], list[str]]:
    """Names of the decoders and of the tokenizers in the model folders."""
    found: dict[str, list[str]] = {"decoder": [], "tokenizer": [], "text encoder": []}
    for name, path in _checkpoints().items():
        found[_kind(str(path), *_state(path))].append(name)
    return found["decoder"], found["tokenizer"]


def _state(path: Path) -> tuple[int, int]:
    """Changes when a checkpoint does: bytes, and the time of the newest of its files.

    A folder whose index is broken is listed like any other: choosing it says what is wrong, and the rest still works.
    """
    try:
        files = shards(path) if path.is_dir() else (path,)
    except UserError:
        files = tuple(path / name for name in INDEX_FILES)
    stats = [file.stat() for file in files if file.is_file()]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def fingerprint(files: ModelFiles) -> str:
    """Changes when a file of the model does."""
    return " ".join(str(number) for path in (files.decoder, files.tokenizer) for number in _state(path))


def fingerprint_of_all() -> str:
    """Changes when any file of the model folders does."""
    return " ".join(str(number) for path in _checkpoints().values() for number in _state(path))


def _bundled() -> dict[str, ModelFiles]:
    """The models that come with the pack, by the names that the widget lists."""
    found = {name: bundled_files(stem) for name, stem in BUNDLED_NAMES.items()}
    return {name: files for name, files in found.items() if files.decoder.is_file()}


def model_names() -> list[str]:
    return [*_bundled(), *_listed()[0]]


def tokenizer_names() -> list[str]:
    return [AUTOMATIC, *_listed()[1]]


@lru_cache(maxsize=256)
def _sizes(path: str, dtype: torch.dtype, size: int, changed: int) -> dict[str, Any] | None:
    try:
        info = read_info(path)
    except UserError:  # choosing it says what is wrong
        return None
    weights = {name: decoder_bytes(info, dtype, kept) for name, kept in host.WEIGHT_DTYPES.items()}
    grid = {"rows": info.grid.rows, "cols": info.grid.cols, "stride": info.grid.stride, "pixels": info.pixels}
    guided = int(info.defaults.guided)
    sampling = {name: getattr(info.defaults, name) for name in SAMPLING}
    if info.masked is not None:  # it has no cache of this kind, and nothing to plan
        return {**grid, "masked": True, "guided": guided, "weights": weights, "sampling": sampling}
    run = {"codes": info.config.codes, "device": host.device_type()}
    return {
        **asdict(info.cache_shape(dtype)), **grid, **run, **_scales(info), "guided": guided, "weights": weights,
        "sampling": sampling,
    }  # fmt: skip


def _scales(info: ModelInfo) -> dict[str, Any]:
    """Of a model that draws in scales, what decides the memory of a picture, by its size in tokens: tokens of the first
    scale, of all but the last, and of the last. And at the model's own size, tokens of each."""
    if info.pyramid is None:
        return {}
    sizes = {
        f"{rows} x {cols}": [pyramid.size(0), pyramid.kept, pyramid.size(-1)]
        for pyramid in (info.pyramid, *info.pyramids)
        for rows, cols in (pyramid.sides[-1],)
    }
    each = [info.pyramid.size(stage) for stage in range(info.pyramid.stages)]
    return {"scales": sizes, "scale_tokens": each, "logits": info.config.logits, "hidden": info.config.hidden}


def model_facts() -> dict[str, dict[str, Any]]:
    """What the page shows of every model listed: what decides its memory, cache and weights, and how it samples."""
    dtype, sizes, places, bundled = host.compute_dtype(), {}, _checkpoints(), _bundled()
    for name in model_names():
        path = bundled[name].decoder if name in bundled else places.get(name)
        if path and (found := _sizes(str(path), dtype, *_state(path))):
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
    decoder = find_decoder(model)
    if tokenizer != AUTOMATIC:
        return ModelFiles(decoder, find_vq(tokenizer))
    if model in BUNDLED_NAMES:
        return bundled_files(BUNDLED_NAMES[model])
    return ModelFiles(decoder, find_tokenizer(decoder, grid, [_find(name) for name in _listed()[1]]))


def find_decoder(model: str) -> Path:
    """Where the chosen model is, without a look inside. Raises UserError where it is missing."""
    _check_name("model", model)
    bundled = _bundled()
    return bundled[model].decoder if model in bundled else _find(model)


def find_vq(tokenizer: str) -> Path:
    """Where the chosen tokenizer, not the automatic one, is. Raises UserError where it is missing."""
    _check_name("tokenizer", tokenizer)
    return _find(tokenizer)


def _check_name(widget: str, name: object) -> None:
    """A workflow may hold anything where a name belongs, and ComfyUI leaves the check of these widgets to us."""
    if not isinstance(name, str):
        raise UserError(f"{widget}: {str(name)[:40]!r} is not a file name; choose one from the list.")


def _find(name: str) -> Path:
    name = _in_the_folders(name)
    path = _named(_checkpoints(), name) or host.full_path(name)
    if path is None:
        there = [folder for folder in host.folders() if Path(folder).is_dir()] or host.folders()[:1]
        places = " or ".join(str(Path(folder) / name) for folder in there)
        hint = published.download_hint(name) or "put it there, or choose another file"
        raise UserError(f"{places}: there is no such file; {hint}.")
    return Path(path)


def _in_the_folders(name: str) -> str:
    """`name`, as a workflow says it, maybe one saved on Windows. Raises UserError where it would lead out of the model
    folders."""
    try:
        inside(Path(), name)
    except ValueError as error:
        raise UserError(f"{quoted(str(name))} {error}; choose one from the list.") from error
    return name.replace("\\", "/")


def _named(listed: dict[str, Path], name: str) -> Path | None:
    """What is listed under `name`, with either kind of slash."""
    return next((path for known, path in listed.items() if known.replace("\\", "/") == name), None)


# -- text encoders -----------------------------------------------------------------------------------------------------

TEXT_FOLDER = "text_encoders"


@lru_cache(maxsize=256)
def _encoder_width(path: str, size: int, changed: int) -> int:
    return encoder_width([Path(path)])


@lru_cache(maxsize=256)
def _caption_width(path: str, size: int, changed: int) -> int:
    """Features per token that a LlamaGen or an Infinity takes; 0 for anything else."""
    try:
        shapes = read_checkpoint(path).shapes
    except UserError:
        return 0
    return shapes.get("cls_embedding.uncond_embedding", shapes.get("cfg_uncond", (0,)))[-1]


def _text_encoders() -> dict[str, tuple[Path, int]]:
    """The T5 encoders of the model folders and their features per token, by the names that the widget lists: files, and
    folders with a config.json."""
    found: dict[str, tuple[Path, int]] = {}
    for kind in (TEXT_FOLDER, host.FOLDER):
        for name in host.filenames(kind):
            path = Path(host.full_path(name, kind) or name)
            in_folder = (path.parent / "config.json").is_file()
            if not path.is_file() or not (path.suffix == ".safetensors" or (in_folder and path.suffix == ".bin")):
                continue
            stat, parent = path.stat(), Path(name).parent
            if width := _encoder_width(str(path), stat.st_size, stat.st_mtime_ns):
                if in_folder:
                    found.setdefault(parent.as_posix() if parent.name else path.parent.name, (path.parent, width))
                else:
                    found.setdefault(name, (path, width))
    return found


def _fits_a_model(width: int) -> bool:
    """Whether a model takes so many features per token: a published one, or one that is there."""
    return width == published.FEATURES or any(
        width == _caption_width(str(path), *_state(path)) for path in _checkpoints().values()
    )


NO_ENCODER = "none"


def text_encoder_names() -> list[str]:
    fitting = [name for name, (_, width) in _text_encoders().items() if _fits_a_model(width)]
    return [*(fitting or [published.TEXT_ENCODER]), NO_ENCODER]


def text_encoder_paths() -> list[Path]:
    """All T5 encoders of the model folders."""
    return [path for path, _ in _text_encoders().values()]


def find_text_files(name: str, width: int = 0) -> TextFiles:
    """The files of the chosen text encoder. Raises UserError where one is missing, or if it gives other than `width`
    features per token (0: as many as any model takes)."""
    _check_name("text_encoder", name)
    if name == NO_ENCODER:
        raise UserError(
            "text_encoder: 'none' is for models that read text themselves (Janus, Lumina-mGPT, Emu3); connect one, or "
            "choose FLAN-T5-XL."
        )
    name = _in_the_folders(name)
    listed = _text_encoders()
    path = _named({known: path for known, (path, _) in listed.items()}, name)
    path = path or Path(host.folders(TEXT_FOLDER)[0]) / Path(name).name
    found = next((found for known, found in listed.values() if known == path), 0)
    if not width and found and not _fits_a_model(found):
        width = published.FEATURES
    return find_text_encoder(path, host.t5_tokenizer(), width)
