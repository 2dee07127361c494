"""From files to an ImageModel: which family a checkpoint is, how large, with which tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import nn

from . import published
from .blocks import Ops
from .errors import UserError
from .grid import Grid
from .models.llamagen import LlamaGen, LlamaGenConfig, read_config
from .plan import CacheShape, SamplePlan
from .vq.tokenizer import VQConfig, VQTokenizer
from .vq.tokenizer import read_config as read_vq_config
from .weights import SUFFIXES, Weights, fill, read_weights

ASSETS = Path(__file__).parent / "assets"
BUNDLED = "landscapes"
SIDES = {pixels: pixels // published.FACTOR for sides in published.PIXELS.values() for pixels in sides}

# What files carry besides the weights of a network: the rotary table, a counter and losses of training.
NOT_WEIGHTS = ("freqs_cis",)
VQ_NOT_WEIGHTS = ("quantize.codebook_used", "loss.")


@dataclass(frozen=True)
class ModelFiles:
    """A model's two checkpoints."""

    decoder: Path
    tokenizer: Path


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    name: str
    config: LlamaGenConfig
    grid: Grid
    classes: tuple[str, ...]
    defaults: SamplePlan
    weight_bytes: int  # on disk
    tokenizer: str = ""  # name of the tokenizer that belongs to it, without a file's ending

    @property
    def text(self) -> bool:
        """Whether a text says what to draw, not a class."""
        return not self.config.classes

    def cache_shape(self, dtype: torch.dtype) -> CacheShape:
        c = self.config
        return CacheShape(c.layers, c.heads, c.width // c.heads, LlamaGen.prompt_slots, dtype.itemsize)


@dataclass(frozen=True)
class ImageModel:
    """A decoder and the tokenizer whose codes it draws."""

    info: ModelInfo
    decoder: LlamaGen
    tokenizer: VQTokenizer
    files: ModelFiles = field(repr=False)

    def label(self, name: str) -> int:
        """The class id of a class's name or number."""
        return class_label(self.info, name)


def bundled_files() -> ModelFiles:
    """The model that comes with the pack."""
    return ModelFiles(ASSETS / f"{BUNDLED}.safetensors", ASSETS / f"{BUNDLED}_vq.safetensors")


def class_label(info: ModelInfo, name: str) -> int:
    """The id of the class called `name`, or numbered so. Raises UserError listing what there is.

    As it is written first: ImageNet's 'Cardigan' is a dog and 'cardigan' is not.
    """
    wanted = name.strip()
    if wanted in info.classes:
        return info.classes.index(wanted)
    lowered = [c.lower() for c in info.classes]
    if wanted.lower() in lowered:
        return lowered.index(wanted.lower())
    count = info.config.classes
    if wanted.isdigit() and int(wanted) < count:
        return int(wanted)
    some = (
        ", ".join(info.classes[:12]) + (", …" if len(info.classes) > 12 else "")
        if info.classes
        else f"0 to {count - 1}"
    )
    raise UserError(f"class: {info.name} has no class '{name}'; choose one of {some}.")


def read_info(path: str | Path, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes, grid and classes of the decoder checkpoint at `path`, from its header alone.

    The grid is not among a published file's weights: it comes from our own files' metadata, else from the file's name
    (c2i_B_256, …), else from `grid` (rows, cols). Two that disagree are an error.
    """
    return describe(_read(path, shapes_only=True), grid)


def _read(path: str | Path, *, shapes_only: bool = False) -> Weights:
    path = Path(path)
    if not path.is_file() and (source := published.where(path.name)):
        raise UserError(f"{path}: there is no such file; {source}.")
    return read_weights(path, shapes_only=shapes_only)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, by id: what published class-conditional files draw."""
    return tuple(json.loads((ASSETS / "imagenet_classes.json").read_text(encoding="utf-8"))["names"])


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """What `read_info` tells, of a checkpoint that was read."""
    shapes = weights.shapes
    if "tok_embeddings.weight" not in shapes or not any(k.startswith("cls_embedding.") for k in shapes):
        raise weights.problem(
            f"is not an image decoder that LineAR knows ({_looks_like(shapes)}); choose a LlamaGen file."
        )
    notes = weights.metadata
    try:
        config = read_config(shapes, int(notes["heads"]) if "heads" in notes else None)
        classes = tuple(json.loads(notes["classes"])) if "classes" in notes else _class_names(config)
        defaults = SamplePlan(**json.loads(notes["sampling"])) if "sampling" in notes else _defaults(config)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise weights.problem(f"its header does not describe a LlamaGen ({error}).") from error
    except UserError as error:
        raise weights.problem(str(error)) from error
    kind = _kind(config)
    tokenizer = Path(notes.get("tokenizer", published.TOKENIZERS[kind])).stem
    return ModelInfo(
        weights.path.stem, config, _grid(weights, kind, grid), classes, defaults, weights.nbytes, tokenizer
    )


def _kind(config: LlamaGenConfig) -> str:
    return "c2i" if config.classes else "t2i"


def _class_names(config: LlamaGenConfig) -> tuple[str, ...]:
    names = imagenet_classes()
    return names if config.classes == len(names) else ()


def _defaults(config: LlamaGenConfig) -> SamplePlan:
    """LlamaGen's published sampling settings."""
    return SamplePlan(guidance=4.0, top_k=2000) if config.classes else SamplePlan(guidance=7.5, top_k=1000)


def _grid(weights: Weights, kind: str, asked: tuple[int, int] | None) -> Grid:
    """From our own metadata, else from the file's name, else as asked; two answers that differ are an error."""
    noted, pixels = weights.metadata.get("grid"), published.pixels_in(weights.path.stem, kind)
    if noted is not None:
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", noted)
        if match is None:
            raise weights.problem(f"its note of the grid, '{noted}', is not one such as 24x24; convert the file again.")
        found, source = (int(match[1]), int(match[2])), "was made for"
    elif pixels is not None:
        found, source = (SIDES[pixels],) * 2, f"says {pixels} pixels in its name, which is"
    elif asked is not None:
        return Grid(*asked)
    else:
        sizes = " or ".join(str(side) for side in published.PIXELS[kind])
        raise weights.problem(
            f"does not say which grid it was made for; name the file after its pixels ({sizes}, as in "
            f"{kind}_XL_{published.PIXELS[kind][-1]}) or give the grid."
        )
    if asked and asked != found:
        raise weights.problem(
            f"{source} a grid of {found[0]} x {found[1]} tokens, not {asked[0]} x {asked[1]}; leave the grid "
            "to the file" + ("." if noted else ", or rename it.")
        )
    return Grid(*found)


def _looks_like(shapes: dict[str, tuple[int, ...]]) -> str:
    if "quantize.embedding.weight" in shapes:
        return "it looks like a VQ tokenizer"
    if any(k.startswith(("model.diffusion_model.", "double_blocks.", "transformer_blocks.")) for k in shapes):
        return "it looks like a diffusion model"
    first = next(iter(shapes), "nothing")
    return f"{len(shapes)} weights, the first is '{first}'"


def load_model(
    files: ModelFiles,
    *,
    grid: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    ops: Ops = nn,
) -> ImageModel:
    """Read both checkpoints and build the model, ready to draw. The tokenizer stays in float32, as published.

    dtype         what the decoder computes in
    weight_dtype  what its large matrices are kept in, where `ops` are layers that cast; None: the same
    """
    weights = _read(files.decoder)
    info = describe(weights, grid)
    tokenizer = load_tokenizer(files.tokenizer, device=device, ops=ops)
    _check_tokenizer(info, tokenizer, files)
    with torch.device("meta"):
        decoder = LlamaGen(info.config, info.grid, ops)
    stored = (lambda name, tensor: weight_dtype if _is_large(name, tensor) else None) if weight_dtype else None
    fill(decoder, weights, dtype, ignore=NOT_WEIGHTS, stored=stored)
    decoder.compute_dtype = dtype if weight_dtype else None
    return ImageModel(info, decoder.eval().requires_grad_(False).to(device), tokenizer, files)


def _is_large(name: str, tensor: torch.Tensor) -> bool:
    """Whether a weight is one of the matrices that make up nearly all of a decoder; the rest is worth its bytes."""
    return name.startswith("layers.") and tensor.ndim == 2


def _check_tokenizer(info: ModelInfo, tokenizer: VQTokenizer, files: ModelFiles) -> None:
    """Refuse another model's tokenizer, even one with as many codes: its codes mean something else."""
    if tokenizer.config.codes != info.config.codes:
        raise UserError(
            f"{files.tokenizer.name}: has {tokenizer.config.codes} codes, but {files.decoder.name} draws from "
            f"{info.config.codes}; choose the tokenizer that belongs to the model."
        )
    if files.tokenizer.stem == info.tokenizer or info.config.codes != published.CODES:
        return
    ours, theirs = published.kind_in(info.tokenizer), published.kind_in(files.tokenizer.stem)
    if tokenizer.config.factor != published.FACTOR or (ours and theirs and ours != theirs):
        raise UserError(
            f"{files.tokenizer.name}: is another model's tokenizer; {files.decoder.name} draws the codes of "
            f"{info.tokenizer}: choose that one"
            + (f", or {source}." if (source := published.where(info.tokenizer)) else ".")
        )


def find_tokenizer(decoder: str | Path, grid: tuple[int, int] | None = None, among: Iterable[Path] = ()) -> Path:
    """The tokenizer that belongs to the checkpoint at `decoder`: beside it, or one of `among`.

    Raises UserError that says where it was expected and where to get it.
    """
    decoder = Path(decoder)
    stem = read_info(decoder, grid).tokenizer
    beside = (decoder.with_name(stem + suffix) for suffix in SUFFIXES)
    for path in (*beside, *among):
        if path.stem == stem and path.is_file():
            return path
    source = published.where(stem)
    raise UserError(
        f"{decoder.with_name(stem + SUFFIXES[0])}: there is no such file, and {decoder.name} needs this tokenizer; "
        + (f"{source}, or choose another." if source else "put it there or choose another.")
    )


def load_tokenizer(path: str | Path, *, device: torch.device | str = "cpu", ops: Ops = nn) -> VQTokenizer:
    """A VQ tokenizer in LlamaGen's layout, with its encoder where the file has one."""
    weights = _read(path)
    config, ignore = describe_tokenizer(weights)
    with torch.device("meta"):
        tokenizer = VQTokenizer(config, ops)
    fill(tokenizer, weights, torch.float32, ignore=ignore)
    return tokenizer.eval().requires_grad_(False).to(device)


def is_tokenizer(weights: Weights) -> bool:
    return "quantize.embedding.weight" in weights.tensors


def describe_tokenizer(weights: Weights) -> tuple[VQConfig, tuple[str, ...]]:
    """Sizes of a VQ tokenizer's checkpoint, and what its keys begin with that are no weights of it."""
    shapes = weights.shapes
    if not is_tokenizer(weights) or "decoder.conv_in.weight" not in shapes:
        raise weights.problem(
            f"is not a VQ tokenizer that LineAR knows ({len(shapes)} weights); "
            "choose the tokenizer that belongs to the model."
        )
    try:
        config = read_vq_config(shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise weights.problem(f"its weights do not fit a VQ tokenizer ({error}).") from error
    return config, VQ_NOT_WEIGHTS + (() if config.encoder_widths else ("encoder.", "quant_conv."))


def find_checkpoints(folders: list[Path]) -> list[Path]:
    """Every checkpoint below `folders`, sorted by name."""
    found = {p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES}
    return sorted(found)
