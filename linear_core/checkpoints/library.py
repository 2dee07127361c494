"""From files to an ImageModel: finds a checkpoint's family, sizes and tokenizer, and loads it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, quoted
from ..models.blocks import Ops
from ..prompts import Prompt
from ..prompts.tokenizer import TextTokenizer
from ..tokenizers.bits import BitConfig, BitTokenizer, file_key
from ..tokenizers.bits import read_config as read_bit_config
from ..tokenizers.layouts import rename_key, taming_top_level
from ..tokenizers.pyramid import PyramidConfig, PyramidTokenizer
from ..tokenizers.pyramid import read_config as read_pyramid_config
from ..tokenizers.tokenizer import VQConfig, VQTokenizer
from ..tokenizers.tokenizer import read_config as read_vq_config
from . import published
from .families import Family, ModelInfo, infinity, janus, llamagen, lumina, var
from .weights import SUFFIXES, KeyMap, Target, Weights, all_except, load_into, model_path, read_weights

FAMILIES = (llamagen.FAMILY, janus.FAMILY, lumina.FAMILY, var.FAMILY, infinity.FAMILY)
UNNORMALIZED = "chameleon-vq"  # family in a converted file's metadata: our layout with Chameleon's codebook
ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = "landscapes"

# What a VQ tokenizer's file contains besides its weights: a counter and losses of training.
VQ_NOT_WEIGHTS = ("quantize.codebook_used", "quantize.ema_vocab_hit_SV", "loss.", "quantize.lfq.", "quantizer.lfq.")

PYRAMID_KEY = "quantize.quant_resi.qresi_ls.0.weight"  # only multi-scale tokenizers have it


@dataclass(frozen=True)
class ModelFiles:
    """A model's two checkpoints, files or folders; equal if the decoder's contains the tokenizer."""

    decoder: Path
    tokenizer: Path


@dataclass(frozen=True)
class ImageModel:
    """A decoder and the VQ tokenizer of its codes."""

    info: ModelInfo
    decoder: Any  # a linear_core.loop.generate.Decoder, or a linear_core.loop.scales.ScaleDecoder
    tokenizer: Any  # a VQTokenizer; for models that draw in scales a PyramidTokenizer or a BitTokenizer
    files: ModelFiles = field(repr=False)

    def label(self, name: str) -> int:
        """The class id of a class's name or number. Raises UserError for an unknown one."""
        return class_label(self.info, name)

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The model's own text tokenizer. Raises UserError naming the file if it is missing."""
        decoder = model_path(self.files.decoder)
        folder = decoder if decoder.is_dir() else decoder.parent
        paths = [folder / name for name in self.info.family.tokenizer_files]
        found = next((path for path in paths if path.is_file()), paths[0])
        if not found.is_file() and (source := published.download_hint(self.info.family.tokenizer_release)):
            raise UserError(f"{found}: there is no such file, but {self.info.name} needs it to read texts; {source}.")
        return TextTokenizer(found)

    def prompt(self, texts: Sequence[str], negative: str = "") -> Prompt:
        """One image per text, guided away from `negative`; for models with a text tokenizer of their own.

        Raises UserError for other models, or without texts.
        """
        make_prompt = self.info.family.prompt
        if make_prompt is None:
            raise UserError(f"text: {self.info.name} cannot read texts by itself; it needs a text encoder.")
        if not texts:
            raise UserError("text: it is empty; describe what to draw.")
        return make_prompt(self.text_tokenizer, texts, negative, self.info)


def bundled_files() -> ModelFiles:
    """The bundled model."""
    return ModelFiles(ASSETS / f"{BUNDLED}.safetensors", ASSETS / f"{BUNDLED}_vq.safetensors")


def class_label(info: ModelInfo, name: str) -> int:
    """The id of the class with this name or number. Raises UserError listing classes.

    The exact spelling is tried first: ImageNet's 'Cardigan' is a dog and 'cardigan' is not.
    """
    wanted = name.strip()
    if wanted in info.classes:
        return info.classes.index(wanted)
    lowered = [c.lower() for c in info.classes]
    if wanted.lower() in lowered:
        return lowered.index(wanted.lower())
    count = info.config.classes
    if wanted.isdecimal() and int(wanted) < count:
        return int(wanted)
    some = (
        ", ".join(info.classes[:12]) + (", …" if len(info.classes) > 12 else "")
        if info.classes
        else f"0 to {count - 1}"
    )
    raise UserError(f"class: {info.name} has no class '{name}'; choose one of {some}.")


def read_info(path: str | Path, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes, grid and classes of the decoder checkpoint at `path`, a file or a folder, from its header alone.

    grid  rows and cols, for files that do not state their own
    Raises UserError naming the file, also if the two grids differ.
    """
    return describe(_read(path, shapes_only=True), grid)


def _read(path: str | Path, *, shapes_only: bool = False) -> Weights:
    path = model_path(Path(path))
    if not path.exists() and (source := published.download_hint(path.name)):
        raise UserError(f"{path}: there is no such file; {source}.")
    return read_weights(path, shapes_only=shapes_only)


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """`read_info` for a checkpoint that has been read."""
    info = family_of(weights).describe(weights, grid)
    _check_sizes(weights, info.config)
    return info


def _check_sizes(weights: Weights, config: Any) -> None:
    """Refuse impossible sizes before anything is built with them, because a file can claim any."""
    may_be_zero = ("first_code", *(("caption_dim", "caption_slots") if config.classes else ("classes",)))
    sizes = {name: size for name, size in vars(config).items() if type(size) is int and name not in may_be_zero}
    if empty := [name for name, size in sizes.items() if size < 1]:
        raise weights.problem(f"has an impossible size: {empty[0]} is {sizes[empty[0]]}; download it again.")
    if config.layers > len(weights.tensors):
        raise weights.problem(f"names a layer {config.layers - 1} but holds only {len(weights.tensors)} weights.")
    if config.width % config.heads or config.width // config.heads % 4:  # RoPE rotates pairs, by row and by column
        raise weights.problem(
            f"a width of {config.width} cannot be divided into {config.heads} heads; download it again."
        )


def family_of(weights: Weights) -> Family:
    """The family of a checkpoint. Raises UserError if it is none that is supported."""
    for family in FAMILIES:
        if family.recognises(weights):
            return family
    raise weights.problem(
        f"is not an image decoder that LineAR supports ({_looks_like(weights.shapes)}); choose a "
        f"{' or '.join(family.name for family in FAMILIES)} model."
    )


def _looks_like(shapes: dict[str, tuple[int, ...]]) -> str:
    if "quantize.embedding.weight" in shapes or _decodes_bits(shapes):
        return "it looks like a VQ tokenizer"
    if "pos_1LC" in shapes and any(".mamba." in k for k in shapes):
        return "it looks like M-VAR, which remembers earlier scales in a Mamba state instead of a cache"
    if any(k.startswith(("model.diffusion_model.", "double_blocks.", "transformer_blocks.")) for k in shapes):
        return "it looks like a diffusion model"
    if any(".lora_" in k for k in shapes):
        return "it looks like a LoRA"
    first = next(iter(shapes), "nothing")
    return f"{len(shapes)} weights, the first is {quoted(first)}"


def load_model(
    files: ModelFiles,
    *,
    grid: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    ops: Ops = nn,
) -> ImageModel:
    """Load both checkpoints and build the model. The tokenizer stays in float32, as published.

    grid          rows and cols, for files that do not state their own
    dtype         compute dtype of the decoder
    weight_dtype  storage dtype of its large matrices, if `ops` are layers that cast; None: dtype
    ops           namespace of the layers: torch.nn, or a host's casting layers
    Raises UserError naming the file.
    """
    weights = _read(files.decoder, shapes_only=True)
    info = describe(weights, grid)
    tokenizer = load_tokenizer(files.tokenizer, device=device, ops=ops)
    _check_tokenizer(info, tokenizer, files)
    decoder = _decoder(info, ops)
    storage_dtype = _storage_dtype(info, dtype, weight_dtype)
    load_into(decoder, weights, dtype, lambda key: info.family.target(key, info.config), storage_dtype)
    decoder.compute_dtype = dtype if weight_dtype else None
    return ImageModel(info, decoder.eval().requires_grad_(False).to(device), tokenizer, files)


def decoder_bytes(info: ModelInfo, dtype: torch.dtype, weight_dtype: torch.dtype | None = None) -> int:
    """Memory of a decoder's weights when loaded with these dtypes (see `load_model`)."""
    storage_dtype = _storage_dtype(info, dtype, weight_dtype)
    weights = _decoder(info, nn).state_dict().items()
    return sum(tensor.numel() * (storage_dtype(name, tensor) or dtype).itemsize for name, tensor in weights)


def _decoder(info: ModelInfo, ops: Ops) -> Any:
    with torch.device("meta"):
        return info.family.build(info.config, info.grid, ops)


def _storage_dtype(
    info: ModelInfo, dtype: torch.dtype, weight_dtype: torch.dtype | None
) -> Callable[[str, torch.Tensor], torch.dtype | None]:
    """What a weight of the decoder is stored as, if not as `dtype`."""

    def storage_dtype(name: str, tensor: torch.Tensor) -> torch.dtype | None:
        if info.family.precise(name):
            return torch.promote_types(dtype, torch.float32)
        return weight_dtype if weight_dtype and _is_large(name, tensor) else None

    return storage_dtype


def _is_large(name: str, tensor: torch.Tensor) -> bool:
    """Whether a weight is one of the matrices that make up nearly all of a decoder."""
    return name.startswith(("layers.", "blocks.")) and tensor.ndim == 2 and "norm" not in name and "ada_" not in name


def _check_tokenizer(
    info: ModelInfo, tokenizer: VQTokenizer | PyramidTokenizer | BitTokenizer, files: ModelFiles
) -> None:
    """Refuse another model's tokenizer, even with the same number of codes: its codes have other meanings."""
    in_scales = isinstance(tokenizer, PyramidTokenizer | BitTokenizer)
    if in_scales != (info.pyramid is not None):
        kinds = ("one map of codes", "maps of codes from coarse to fine")
        raise UserError(
            f"{files.tokenizer.name}: decodes {kinds[in_scales]}, but {files.decoder.name} draws "
            f"{kinds[not in_scales]}; choose the tokenizer that belongs to the model."
        )
    if info.family.vq is not None:
        if model_path(files.tokenizer) == model_path(files.decoder):
            return
        raise UserError(
            f"{files.tokenizer.name}: is another model's tokenizer, but {info.name} comes with its own; choose "
            "automatic."
        )
    if isinstance(tokenizer, BitTokenizer) or info.family is infinity.FAMILY:
        _check_bits(info, tokenizer, files)
        return
    if tokenizer.config.codes != info.config.codes:
        raise UserError(
            f"{files.tokenizer.name}: has {tokenizer.config.codes} codes, but {files.decoder.name} draws from "
            f"{info.config.codes}; choose the tokenizer that belongs to the model."
        )
    if isinstance(tokenizer, PyramidTokenizer) and tokenizer.config.code_dim != info.config.code_dim:
        raise UserError(
            f"{files.tokenizer.name}: its codes have {tokenizer.config.code_dim} numbers, but {files.decoder.name} "
            f"reads {info.config.code_dim}; choose the tokenizer that belongs to the model."
        )
    if files.tokenizer.stem == info.tokenizer or info.config.codes != published.CODES:
        return
    ours, theirs = published.kind_from_name(info.tokenizer), published.kind_from_name(files.tokenizer.stem)
    other = files.tokenizer.is_dir() or (ours and theirs and ours != theirs)
    if tokenizer.config.factor != published.FACTOR or other:
        raise UserError(
            f"{files.tokenizer.name}: is another model's tokenizer; {files.decoder.name} draws the codes of "
            f"{info.tokenizer}: choose that one"
            + (f", or {source}." if (source := published.download_hint(info.tokenizer)) else ".")
        )


def _check_bits(info: ModelInfo, tokenizer: Any, files: ModelFiles) -> None:
    """Refuse another number of bits, and by its name another tokenizer with as many: d32 for d32reg draws noise."""
    found, wanted = (getattr(config, "bits", 0) for config in (tokenizer.config, info.config))
    other = files.tokenizer.stem in published.INFINITY_VAES and files.tokenizer.stem != info.tokenizer
    if found == wanted and not other:
        return
    source = published.download_hint(info.tokenizer)
    what = [f"tokens of {bits} bits" if bits else "codes of a table" for bits in (found, wanted)]
    raise UserError(
        f"{files.tokenizer.name}: "
        + (f"decodes {what[0]}, but" if found != wanted else "is another model's tokenizer;")
        + f" {files.decoder.name} draws {what[1]} of {info.tokenizer}: choose that one"
        + (f", or {source}." if source else ".")
    )


def find_tokenizer(decoder: str | Path, grid: tuple[int, int] | None = None, among: Iterable[Path] = ()) -> Path:
    """The VQ tokenizer of the checkpoint at `decoder`: inside it, next to it, or one of `among`.

    Raises UserError saying where it was expected and where to get it.
    """
    decoder = Path(decoder)
    info = read_info(decoder, grid)
    if info.family.vq is not None:
        return decoder
    stem = info.tokenizer
    next_to_it = (decoder.with_name(stem + suffix) for suffix in SUFFIXES)
    for path in (*next_to_it, *among):
        if path.stem == stem and path.is_file():
            return path
    source = published.download_hint(stem)
    raise UserError(
        f"{decoder.with_name(stem + SUFFIXES[0])}: there is no such file, but {decoder.name} needs this tokenizer; "
        + (f"{source}, or choose another." if source else "put it there or choose another.")
    )


def load_tokenizer(path: str | Path, *, device: torch.device | str = "cpu", ops: Ops = nn) -> Any:
    """The tokenizer at `path`, or the one in a model's checkpoint, with its encoder if there is one.

    A PyramidTokenizer or a BitTokenizer for models that draw in scales, else a VQTokenizer. Raises UserError naming the
    file.
    """
    weights = _read(path, shapes_only=True)
    config, key_map = describe_tokenizer(weights)
    tokenizer: VQTokenizer | PyramidTokenizer | BitTokenizer
    with torch.device("meta"):
        if isinstance(config, VQConfig):
            tokenizer = VQTokenizer(config, ops)
        else:
            tokenizer = BitTokenizer(config, ops) if isinstance(config, BitConfig) else PyramidTokenizer(config, ops)
    load_into(tokenizer, weights, torch.float32, key_map)
    return tokenizer.eval().requires_grad_(False).to(device)


def is_tokenizer(weights: Weights) -> bool:
    """Whether a checkpoint is a VQ tokenizer."""
    return "quantize.embedding.weight" in weights.tensors or _decodes_bits(weights.tensors)


def _decodes_bits(keys: Collection[str]) -> bool:
    """Whether a file is an autoencoder of Infinity's: without a table, and without the attention that others have."""
    parts = {key.removesuffix(".weight").removesuffix(".conv") for key in keys}
    return (
        {"decoder.conv_in", "decoder.mid.block_1.conv1", "decoder.up.0.block.0.conv1"} <= parts
        and "quantize.embedding" not in parts
        and not any(".attn" in part for part in parts)
    )


def describe_tokenizer(weights: Weights) -> tuple[VQConfig | PyramidConfig | BitConfig, KeyMap]:
    """Sizes of a VQ tokenizer's checkpoint, and its key map. Raises UserError naming the file."""
    rename = next((family.vq for family in FAMILIES if family.vq and family.recognises(weights)), None)
    bits = rename is None and _decodes_bits(weights.tensors)
    top = taming_top_level(weights.tensors) if rename is None else None  # Chameleon's
    if top is not None:
        rename = partial(file_key if bits else rename_key, top=top)
    ours = {key: rename(key) if rename else key for key in weights.tensors}
    shapes = {name: shape for key, shape in weights.shapes.items() if (name := ours[key]) is not None}
    if "decoder.conv_in.weight" not in shapes or not (bits or "quantize.embedding.weight" in shapes):
        raise weights.problem(
            f"is not a VQ tokenizer that LineAR supports ({len(weights.tensors)} weights); "
            "choose the tokenizer that belongs to the model."
        )
    config: VQConfig | PyramidConfig | BitConfig
    try:
        if bits:
            config = read_bit_config(shapes)
        elif PYRAMID_KEY in shapes:
            config = read_pyramid_config(shapes)
        else:
            config = read_vq_config(shapes, normalized=top is None and weights.metadata.get("family") != UNNORMALIZED)
    except (KeyError, ValueError, IndexError) as error:
        raise weights.problem(f"its weights do not fit a VQ tokenizer ({error}).") from error
    wanted = all_except(*VQ_NOT_WEIGHTS, *(() if config.encoder_widths else ("encoder.", "quant_conv.")))

    def key_map(key: str) -> Target | None:
        return None if (name := ours[key]) is None else wanted(name)

    return config, key_map


def find_checkpoints(folders: list[Path]) -> list[Path]:
    """Every checkpoint below `folders`, sorted by name; a model of several files is its folder."""
    found = {p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES}
    return sorted({model_path(path) for path in found})
