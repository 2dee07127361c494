"""From files to an ImageModel: which family a checkpoint is, how large, with which tokenizer."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .blocks import Ops
from .errors import UserError
from .grid import Grid
from .models.llamagen import LlamaGen, LlamaGenConfig, read_config
from .plan import CacheShape, SamplePlan
from .vq.tokenizer import VQTokenizer
from .vq.tokenizer import read_config as read_vq_config
from .weights import SUFFIXES, Weights, fill, read_weights

ASSETS = Path(__file__).parent / "assets"
BUNDLED = "landscapes"
SIDES = {256: 16, 384: 24, 512: 32}  # LlamaGen's file names give pixels; its tokens are 16 pixels wide


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
    """The id of the class called `name`, or numbered so. Raises UserError listing what there is."""
    wanted = name.strip()
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
    return _info(read_weights(path, shapes_only=True), grid)


def _info(weights: Weights, grid: tuple[int, int] | None) -> ModelInfo:
    shapes = weights.shapes
    if "tok_embeddings.weight" not in shapes or not any(k.startswith("cls_embedding.") for k in shapes):
        raise weights.problem(
            f"is not an image decoder that LineAR knows ({_looks_like(shapes)}); choose a LlamaGen file."
        )
    notes = weights.metadata
    try:
        config = read_config(shapes, int(notes["heads"]) if "heads" in notes else None)
        classes = tuple(json.loads(notes["classes"])) if "classes" in notes else ()
        defaults = SamplePlan(**json.loads(notes["sampling"])) if "sampling" in notes else _defaults(config)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise weights.problem(f"its header does not describe a LlamaGen ({error}).") from error
    except UserError as error:
        raise weights.problem(str(error)) from error
    return ModelInfo(weights.path.stem, config, _grid(weights, grid), classes, defaults, weights.nbytes)


def _defaults(config: LlamaGenConfig) -> SamplePlan:
    """LlamaGen's published sampling settings."""
    return SamplePlan(guidance=4.0, top_k=2000) if config.classes else SamplePlan(guidance=7.5, top_k=1000)


def _grid(weights: Weights, asked: tuple[int, int] | None) -> Grid:
    found = None
    if match := re.fullmatch(r"(\d+)x(\d+)", weights.metadata.get("grid", "")):
        found = int(match[1]), int(match[2])
    elif match := re.search(r"(?<!\d)(256|384|512)(?!\d)", weights.path.stem):
        found = (SIDES[int(match[1])],) * 2
    if found and asked and found != asked:
        raise weights.problem(
            f"was made for a grid of {found[0]} x {found[1]} tokens, not {asked[0]} x {asked[1]}; "
            "leave the grid to the file."
        )
    rows_cols = found or asked
    if rows_cols is None:
        raise weights.problem(
            "does not say which grid it was made for; name the file after its pixels (…_384.pt) or give the grid."
        )
    return Grid(*rows_cols)


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
    ops: Ops = nn,
) -> ImageModel:
    """Read both checkpoints and build the model, ready to draw. The tokenizer stays in float32, as published."""
    weights = read_weights(files.decoder)
    info = _info(weights, grid)
    tokenizer = load_tokenizer(files.tokenizer, device=device, ops=ops)
    if tokenizer.config.codes != info.config.codes:
        raise UserError(
            f"{files.tokenizer.name}: has {tokenizer.config.codes} codes, but {files.decoder.name} draws from "
            f"{info.config.codes}; choose the tokenizer that belongs to the model."
        )
    with torch.device("meta"):
        decoder = LlamaGen(info.config, info.grid, ops)
    fill(decoder, weights, dtype, ignore=("freqs_cis",))
    return ImageModel(info, decoder.eval().requires_grad_(False).to(device), tokenizer, files)


def load_tokenizer(path: str | Path, *, device: torch.device | str = "cpu", ops: Ops = nn) -> VQTokenizer:
    """A VQ tokenizer in LlamaGen's layout, with its encoder where the file has one."""
    weights = read_weights(path)
    shapes = weights.shapes
    if "quantize.embedding.weight" not in shapes or "decoder.conv_in.weight" not in shapes:
        raise weights.problem(
            f"is not a VQ tokenizer that LineAR knows ({len(shapes)} weights); "
            "choose the tokenizer that belongs to the model."
        )
    try:
        config = read_vq_config(shapes)
    except (KeyError, ValueError, IndexError) as error:
        raise weights.problem(f"its weights do not fit a VQ tokenizer ({error}).") from error
    with torch.device("meta"):
        tokenizer = VQTokenizer(config, ops)
    ignore = ("quantize.codebook_used", "loss.") + (() if config.encoder_widths else ("encoder.", "quant_conv."))
    fill(tokenizer, weights, torch.float32, ignore=ignore)
    return tokenizer.eval().requires_grad_(False).to(device)


def find_checkpoints(folders: list[Path]) -> list[Path]:
    """Every checkpoint below `folders`, sorted by name."""
    found = {p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES}
    return sorted(found)
