"""From files to an ImageModel: finds a checkpoint's family, sizes and tokenizer, and loads it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError, quoted
from ..models.blocks import Ops
from ..models.quantised import INT8, QUANTISATIONS, Quantisation, quantised
from ..profile import profile_path, read_profile
from ..prompts import Origin, Prompt, class_prompt
from ..prompts.tokenizer import TextTokenizer
from ..tokenizers.bits import BitConfig, BitTokenizer, file_key
from ..tokenizers.bits import read_config as read_bit_config
from ..tokenizers.latents import LatentConfig, LatentTokenizer
from ..tokenizers.latents import read_config as read_latent_config
from ..tokenizers.layouts import rename_key, taming_top_level, transform
from ..tokenizers.pyramid import PyramidConfig, PyramidTokenizer
from ..tokenizers.pyramid import read_config as read_pyramid_config
from ..tokenizers.tokenizer import KINDS, VQConfig, VQTokenizer
from ..tokenizers.tokenizer import read_config as read_vq_config
from . import published
from .families import Family, ModelInfo, emu, infinity, janus, llamagen, lumina, mar, mvar, nova, var
from .weights import (
    NESTED,
    SUFFIXES,
    KeyMap,
    Target,
    Weights,
    display_name,
    load_into,
    model_path,
    read_weights,
    unfilled,
)

FAMILIES = (
    llamagen.FAMILY, janus.FAMILY, lumina.FAMILY, *emu.FAMILIES, var.FAMILY, mvar.FAMILY, infinity.FAMILY, mar.FAMILY,
    nova.FAMILY,
)  # fmt: skip
UNNORMALIZED = "chameleon-vq"  # family in a converted file's metadata: our layout with Chameleon's codebook
ASSETS = Path(__file__).parents[1] / "assets"
BUNDLED = "landscapes"
BUNDLED_SCALES = "landscapes_var"  # the same landscapes, drawn in scales

# What training wraps around a model, as parts of its weights' names: torch.compile, FSDP and the like anywhere in them;
# dictionaries, modules and averages in front.
WITHIN = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
IN_FRONT = re.compile(
    r"(?:_?(?:model|module|state|dict|checkpoint|weights?|params?|ema|averaged|avg|shadow|student|forward|inner|base|raw"
    r"|net|network|generator|gpt|transformer|decoder|lit|pl|vq|vae|gan|tokenizer|trainer|m?var|wo|ddp|fsdp|local))+"
)
MAX_IN_FRONT, MAX_WORD = 8, 64
# Which of several state dicts LlamaGen's scripts take: sample_c2i.py for decoders; reconstruction_vq_ddp.py, for
# tokenizers, takes the averaged one (ema) where there is one.
ORDER = ("model", "module", "state_dict")

# What a VQ tokenizer's file contains besides its weights: counters, losses and running averages of training.
VQ_NOT_WEIGHTS = (
    "quantize.codebook_used",
    "quantize.ema_vocab_hit_SV",
    "quantize.lfq.",
    "quantizer.lfq.",
    "loss.",
    "ema_",
)
VQ_COUNTER = ".num_batches_tracked"  # of batch norms
VQ_FAMILY = "{}-vq"  # family in a converted file's metadata, for each of KINDS
DIFFUSERS_MIDDLE = "decoder.mid_block.resnets.0.conv1.weight"  # of a KL autoencoder in diffusers' layout
PYRAMID_KEY = "quantize.quant_resi.qresi_ls.0.weight"  # only multi-scale VQ tokenizers have it

WeightDtype = torch.dtype | str | None
Tokenizer = VQTokenizer | PyramidTokenizer | BitTokenizer | LatentTokenizer
TokenizerConfig = VQConfig | PyramidConfig | BitConfig | LatentConfig
# Kinds of tokenizers that are no VQTokenizers: how sizes are read, what is built, and what it decodes.
LINES, SCALES, NUMBERS = "one map of codes", "maps of codes from coarse to fine", "numbers without a codebook"
OTHERS: dict[str, tuple[Callable[..., TokenizerConfig], Callable[..., Tokenizer], str]] = {
    "pyramid": (read_pyramid_config, PyramidTokenizer, SCALES),
    "bits": (read_bit_config, BitTokenizer, SCALES),
    "latents": (read_latent_config, LatentTokenizer, NUMBERS),
}


@dataclass(frozen=True)
class ModelFiles:
    """A model's two checkpoints, files or folders; equal if the decoder's contains the tokenizer."""

    decoder: Path
    tokenizer: Path


@dataclass(frozen=True)
class ImageModel:
    """A decoder and the VQ tokenizer of its codes.

    codebook   names the tokenizer's: codes of models with the same name mean the same
    """

    info: ModelInfo
    decoder: Any  # a linear_core.loop.generate.Decoder, a linear_core.loop.scales.ScaleDecoder or a MaskedDecoder
    tokenizer: (
        Any  # a VQTokenizer; for models that draw in scales a PyramidTokenizer or a BitTokenizer; a LatentTokenizer
    )
    files: ModelFiles = field(repr=False)
    codebook: str = ""

    def label(self, name: str) -> int:
        """The class id of a class's name or number. Raises UserError for an unknown one."""
        return class_label(self.info, name)

    @property
    def text_tokenizer_file(self) -> Path:
        """Where the model's own text tokenizer is, or should be."""
        decoder = model_path(self.files.decoder)
        folder = decoder if decoder.is_dir() else decoder.parent
        paths = [folder / name for name in self.info.family.tokenizer_files]
        return next((path for path in paths if path.is_file()), paths[0])

    @cached_property
    def text_tokenizer(self) -> TextTokenizer:
        """The model's own text tokenizer. Raises UserError naming the file if it is missing."""
        found = self.text_tokenizer_file
        if not found.is_file() and (source := published.download_hint(self.info.family.tokenizer_release)):
            raise UserError(f"{found}: there is no such file, but {self.info.name} needs it to read texts; {source}.")
        return self.info.family.open_tokenizer(found)

    def prompt(self, texts: Sequence[str], negative: str = "") -> Prompt:
        """One image per text, guided away from `negative`; for models with a text tokenizer of their own.

        Raises UserError for other models, or without texts.
        """
        make_prompt = self.info.family.prompt
        if make_prompt is None:
            raise UserError(f"text: {self.info.name} cannot read texts by itself; it needs a text encoder.")
        if not texts:
            raise UserError("text: it is empty; describe what to draw.")
        made = make_prompt(self.text_tokenizer, texts, negative, self.info)
        room = self.info.context - self.info.grid.tokens
        if self.info.context and made.max_length > room:
            raise UserError(
                f"text: it takes {made.max_length} tokens with what the model adds, but {self.info.name} has room for "
                f"{room} besides the image; shorten it."
            )
        return replace(made, origin=self.origin)

    def class_prompt(self, names: Sequence[str]) -> Prompt:
        """One image per class, by name or number. Raises UserError for an unknown class, and for a model of texts."""
        if self.info.text:
            raise UserError(f"class: {self.info.name} draws from texts, not classes; describe what to draw.")
        return class_prompt([self.label(name) for name in names], tuple(names), self.origin)

    @cached_property
    def origin(self) -> Origin:
        """What prompts for this model mean: prompts of models with the same meaning can be exchanged."""
        info = self.info
        if not info.text:
            return Origin(info.name, ("classes", *(info.classes or (info.name, str(info.config.classes)))))
        if not info.own_tokenizer:
            return Origin(info.name, info.features)  # the decoder asks how many
        file = self.text_tokenizer_file
        vocabulary = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else info.name
        return Origin(info.name, ("tokens", info.family.name, str(info.grid.eol), vocabulary))

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for a prompt that was made for another model."""
        theirs, ours = prompt.origin, self.origin
        if theirs is not None and theirs.meaning != ours.meaning:
            name = theirs.model or "LlamaGen's text models"
            other = f"another {name}" if name == ours.model else f"{name}, not for {ours.model}"
            kind = "Text Prompt" if self.info.text else "Class Prompt"
            raise UserError(f"prompt: it was made for {other}; connect a {kind} made with {ours.model}.")
        self.decoder.check(prompt)


def bundled_files(name: str = BUNDLED) -> ModelFiles:
    """The bundled model, or the one of this name."""
    return ModelFiles(ASSETS / f"{name}.safetensors", ASSETS / f"{name}_vq.safetensors")


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
    if wanted.isdecimal() and len(wanted) < 10 and int(wanted) < count:
        return int(wanted)
    some = (
        ", ".join(info.classes[:12]) + (", …" if len(info.classes) > 12 else "")
        if info.classes
        else f"0 to {count - 1}"
    )
    raise UserError(f"class: {info.name} has no class {quoted(name)}; choose one of {some}.")


def read_info(path: str | Path, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes, grid and classes of the decoder checkpoint at `path`, a file or a folder, from its header alone.

    grid  rows and cols, for files that do not state their own
    Raises UserError naming the file, also if the two grids differ.
    """
    return describe(read_checkpoint(path), grid)


def read_checkpoint(path: str | Path) -> Weights:
    """Names and shapes of the model at `path`, a file or a folder, without what training wraps around one.

    Raises UserError naming the file.
    """
    path = model_path(Path(path))
    if not path.exists() and (source := published.download_hint(path.name)):
        raise UserError(f"{path}: there is no such file; {source}.")
    return unwrapped(read_weights(path, shapes_only=True))


def unwrapped(weights: Weights) -> Weights:
    """`weights` under the names that a family or a VQ tokenizer has for them; as they are if none recognises them.

    They may be in dictionaries or modules of a training script ({"state_dict": {"model._orig_mod.layers.0…": …}}), and
    more than once: then those are taken that the models' authors take. What is outside is left out.
    """

    def below(prefix: str) -> dict[str, str]:
        names = {key: key.removeprefix(prefix) for key in weights.tensors if key.startswith(prefix)}
        return {
            key: ".".join(part for part in name.split(".") if part not in WITHIN)
            for key, name in names.items()
            if NESTED not in name
        }

    found: list[tuple[str, Family | None]] = []  # None: a tokenizer
    for prefix in _prefixes(weights.tensors):
        inner = replace(weights, tensors={new: weights.tensors[old] for old, new in below(prefix).items()})
        family = next((family for family in FAMILIES if family.recognises(inner)), None)
        if family or is_tokenizer(inner):
            found.append((prefix, None if is_tokenizer(inner) else family))
            if not prefix:
                break
    if not found:
        return weights
    if any(family for _, family in found):  # a whole model has a tokenizer inside, and not the other way round
        found = [(prefix, family) for prefix, family in found if family]

    def preference(candidate: tuple[str, Family | None]) -> tuple[bool, int, int]:
        prefix, family = candidate
        parts = _parts(prefix)[:-1]
        averaged = any(re.search(r"ema|averaged|avg|shadow", part) for part in parts)
        rank = ORDER.index(parts[0]) if parts and parts[0] in ORDER else len(ORDER)
        return averaged != (family is None or family.averaged), len(parts), rank

    return weights.renamed(below(min(found, key=preference)[0]))


def _prefixes(keys: Iterable[str]) -> list[str]:
    """What may be in front of a model's own names: nothing, words of training, or whatever all names share."""
    found = {"": None}
    split = {key: _parts(key) for key in keys}
    levels = zip(*(parts[:-1] for parts in split.values()), strict=False)
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, levels))
    for key, parts in split.items():
        end = 0
        for number, part in enumerate(parts[:MAX_IN_FRONT]):
            end += len(part) + 1
            if number >= min(shared, len(parts) - 1) and part not in WITHIN and not IN_FRONT.fullmatch(part[:MAX_WORD]):
                break
            if end < len(key):
                found[key[:end]] = None
    return list(found)


def _parts(key: str) -> list[str]:
    return re.split(f"[.{NESTED}]", key)


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
    of_width = config.width // config.heads
    if (dim := getattr(config, "head_dim", of_width)) % 4 or (dim == of_width and config.width % config.heads):
        raise weights.problem(  # RoPE rotates pairs, by row and by column
            f"a width of {config.width} cannot be divided into {config.heads} heads; download it again."
        )
    if config.heads % (keys := getattr(config, "key_heads", config.heads)):
        raise weights.problem(f"{config.heads} heads cannot share {keys} key heads; download it again.")


def family_of(weights: Weights) -> Family:
    """The family of a checkpoint. Raises UserError if it is none that is supported."""
    for family in FAMILIES:
        if family.recognises(weights):
            return family
    raise weights.problem(
        f"is not an image decoder that LineAR supports ({_looks_like(weights.shapes)}); choose a "
        f"{' or '.join(dict.fromkeys(family.name for family in FAMILIES))} model."
    )


def _looks_like(shapes: dict[str, tuple[int, ...]]) -> str:
    if "quantize.embedding.weight" in shapes or _decodes_bits(shapes):
        return "it looks like a VQ tokenizer"
    if _decodes_latents(shapes):
        return "it looks like a VAE"
    if any(re.search(r"(?:^|\.)(?:diffusion_model|double_blocks|transformer_blocks)\.", k) for k in shapes):
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
    weight_dtype: WeightDtype = None,
    ops: Ops = nn,
    compute_device: torch.device | str | None = None,
) -> ImageModel:
    """Load both checkpoints and build the model. The tokenizer stays in float32, as published.

    grid            rows and cols, for files that do not state their own
    dtype           compute dtype of the decoder
    weight_dtype    how its large matrices are stored: "int8" or "int4" (see models/quantised.py); a dtype, if `ops`
                    are layers that cast; None: dtype
    ops             namespace of the layers: torch.nn, or a host's casting layers
    compute_device  where it will compute, if a host moves it there from `device`
    Raises UserError naming the file.
    """
    weights = read_checkpoint(files.decoder)
    info = describe(weights, grid)
    tokenizer = load_tokenizer(files.tokenizer, device=device, ops=ops)
    _check_tokenizer(info, tokenizer, files)
    decoder = _decoder(info, ops)
    storage_dtype = _storage_dtype(info, dtype, weight_dtype)
    layers = _quantised(decoder, info, weight_dtype, ops)
    load_into(decoder, weights, dtype, lambda key: info.family.target(key, info.config), storage_dtype, layers)
    for layer in layers.values():
        layer.arrange(torch.device(compute_device or device))
    decoder.compute_dtype = dtype if isinstance(weight_dtype, torch.dtype) else None
    if info.pyramid is not None and (beside := profile_path(model_path(files.decoder))).is_file():
        decoder.profile = read_profile(beside)
    return ImageModel(info, decoder.eval().requires_grad_(False).to(device), tokenizer, files, name_codebook(tokenizer))


def _quantised(decoder: Any, info: ModelInfo, weight_dtype: WeightDtype, ops: Ops = nn) -> dict[str, Any]:
    """Layers for the matrices that `weight_dtype` quantises, by the matrices' names."""
    if not isinstance(weight_dtype, str):
        return {}
    if weight_dtype not in QUANTISATIONS:
        raise UserError(f"weight-dtype: {quoted(weight_dtype)} is unknown; choose {' or '.join(QUANTISATIONS)}.")

    by_name = stored_in(QUANTISATIONS[weight_dtype])
    return quantised(decoder, lambda name, matrix: None if info.family.precise(name) else by_name(name, matrix), ops)


def name_codebook(tokenizer: Any) -> str:
    """A name from the signs of its numbers, which converting a file to another dtype does not change.

    Where there is no table of codes, the layer that reads them says what they mean.
    """
    no_table = tokenizer.config.kind in ("bits", "latents")
    table = (tokenizer.decoder.conv_in if no_table else tokenizer.quantize.embedding).weight.detach().float().cpu()
    return hashlib.sha256(str(tuple(table.shape)).encode() + (table > 0).numpy().tobytes()).hexdigest()[:16]


def decoder_bytes(info: ModelInfo, dtype: torch.dtype, weight_dtype: WeightDtype = None) -> int:
    """Memory of a decoder's weights when loaded with these dtypes (see `load_model`)."""
    storage_dtype, decoder = _storage_dtype(info, dtype, weight_dtype), _decoder(info, nn)
    with unfilled():
        layers = _quantised(decoder, info, weight_dtype)
    return sum(
        layers[name].kind.bytes(*tensor.shape)
        if name in layers
        else tensor.numel() * (storage_dtype(name, tensor) or dtype).itemsize
        for name, tensor in decoder.state_dict().items()
    )


def _decoder(info: ModelInfo, ops: Ops) -> Any:
    with unfilled():
        return info.family.build(info.config, info.grid, ops)


def _storage_dtype(
    info: ModelInfo, dtype: torch.dtype, weight_dtype: WeightDtype
) -> Callable[[str, torch.Tensor], torch.dtype | None]:
    """What a weight of the decoder is stored as, if not as `dtype`."""

    def storage_dtype(name: str, tensor: torch.Tensor) -> torch.dtype | None:
        if info.family.precise(name):
            return torch.promote_types(dtype, torch.float32)
        return weight_dtype if isinstance(weight_dtype, torch.dtype) and is_large(name, tensor) else None

    return storage_dtype


MATRICES = (
    "layers.", "blocks.", "encoder_blocks.", "decoder_blocks.", "image_encoder.blocks.", "video_encoder.blocks.",
)  # fmt: skip


def is_large(name: str, tensor: torch.Tensor) -> bool:
    """Whether a weight is one of the matrices that make up nearly all of a decoder."""
    return name.startswith(MATRICES) and tensor.ndim == 2 and "norm" not in name and "ada_" not in name


HEADS = ("output.", "gen_head.", "lm_head.")  # of models that draw codes in lines


def stored_in(kind: Quantisation) -> Callable[[str, torch.Tensor], Quantisation | None]:
    """How each matrix of a decoder is stored if its large ones are to be stored in `kind`. None: as computed.

    The head in 8 bits in any case: they cost it 0.00002 nats a token (bench/NOTES.md), 4 bits would cost more.
    """

    def stored(name: str, matrix: torch.Tensor) -> Quantisation | None:
        if name.startswith(HEADS) and matrix.ndim == 2:
            return INT8
        return kind if is_large(name, matrix) else None

    return stored


def _check_tokenizer(info: ModelInfo, tokenizer: Tokenizer, files: ModelFiles) -> None:
    """Refuse another model's tokenizer, even with the same number of codes: its codes have other meanings."""
    decodes = OTHERS[tokenizer.config.kind][2] if tokenizer.config.kind in OTHERS else LINES
    draws = SCALES if info.pyramid else NUMBERS if info.masked else LINES
    if decodes != draws:
        raise UserError(
            f"{files.tokenizer.name}: decodes {decodes}, but {files.decoder.name} draws {draws}; choose the tokenizer "
            "that belongs to the model."
        )
    if isinstance(tokenizer, LatentTokenizer):
        _check_vae(info, tokenizer.config, files)
        return
    if info.family.vq is not None:
        if model_path(files.tokenizer) == model_path(files.decoder):
            return
        raise UserError(
            f"{files.tokenizer.name}: is another model's tokenizer, but {info.name} comes with its own; choose "
            "automatic."
        )
    if tokenizer.config.codes != info.config.codes:
        raise UserError(
            f"{files.tokenizer.name}: has {_many(tokenizer.config.codes)} codes, but {files.decoder.name} draws from "
            f"{_many(info.config.codes)}; choose the tokenizer that belongs to the model."
        )
    if info.sizes and tokenizer.config.factor != info.pixels:
        raise UserError(
            f"{files.tokenizer.name}: makes {tokenizer.config.factor} pixels a side of each code, but "
            f"{files.decoder.name} needs {info.pixels}; choose the tokenizer that belongs to the model."
        )
    if isinstance(tokenizer, PyramidTokenizer) and tokenizer.config.code_dim != info.config.code_dim:
        raise UserError(
            f"{files.tokenizer.name}: its codes have {tokenizer.config.code_dim} numbers, but {files.decoder.name} "
            f"reads {info.config.code_dim}; choose the tokenizer that belongs to the model."
        )
    name, same_kind = display_name(files.tokenizer), tokenizer.config.kind == _kind(info)
    if same_kind and (_plain(name) == _plain(info.tokenizer) or info.config.codes not in published.SHARED_CODES):
        return
    fits = _fits(info, name, tokenizer.config)
    if not fits or any(family.recognises(read_checkpoint(files.tokenizer)) for family in FAMILIES):
        raise UserError(
            f"{files.tokenizer.name}: is another model's tokenizer; {files.decoder.name} draws the codes of "
            f"{info.tokenizer}: choose that one"
            + (f", or {source}." if (source := published.download_hint(info.tokenizer)) else ".")
        )


def _check_vae(info: ModelInfo, config: LatentConfig, files: ModelFiles) -> None:
    """Refuse a VAE of another kind, such as Stable Diffusion's."""
    pixels = info.pixels // info.config.patch
    if (config.channels, config.factor) != (info.config.channels, pixels):
        raise UserError(
            f"{files.tokenizer.name}: is another VAE, of {config.channels} channels and {config.factor} pixels a side "
            f"of each; {files.decoder.name} needs {info.config.channels} and {pixels}: choose {info.tokenizer}"
            + (f", or {source}." if (source := published.download_hint(info.tokenizer)) else ".")
        )


def _many(codes: int) -> str:
    """A number of codes; those made of bits are many."""
    return str(codes) if codes < 2**20 else f"2^{codes.bit_length() - 1}"


def _plain(name: str) -> str:
    """A name as far as people mean the same by it: vq_ds16_c2i is published as vq-ds16-c2i too."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _kind(info: ModelInfo) -> str:
    """The kind of a model's tokenizer: `VQConfig.kind`."""
    return info.family.tokenizer_kind or published.VQ_KINDS.get(info.tokenizer, "vqgan")


def _fits(info: ModelInfo, name: str, config: TokenizerConfig) -> bool:
    """Whether a tokenizer can be the one of a model with a published codebook, by its sizes and its name."""
    ours, theirs = published.kind_from_name(info.tokenizer), published.kind_from_name(name)
    normalized = _kind(info) == "vqgan" and info.tokenizer != published.CHAMELEON_VQ
    if isinstance(config, LatentConfig):
        wanted = (info.config.channels, info.pixels // info.config.patch) if info.masked else ()
        return (config.channels, config.factor) == wanted
    return (
        info.masked is None
        and config.codes == info.config.codes
        and config.factor == info.pixels
        and config.kind == _kind(info)
        and config.normalized == normalized
        and not (ours and theirs and ours != theirs)
    )


def find_tokenizer(decoder: str | Path, grid: tuple[int, int] | None = None, among: Iterable[Path] = ()) -> Path:
    """The VQ tokenizer of the checkpoint at `decoder`: inside it, next to it, or one of `among`.

    It is known by its name, or if the decoder's file names none, by its sizes, provided that only one fits. Raises
    UserError saying where it was expected and where to get it.
    """
    decoder = Path(decoder)
    weights = read_checkpoint(decoder)
    info = describe(weights, grid)
    if info.family.vq is not None:
        return decoder
    stem = info.tokenizer
    next_to_it = [decoder.with_name(stem + suffix) for suffix in (*SUFFIXES, "")]
    candidates = list(dict.fromkeys([*next_to_it, *_next_to(decoder), *among]))
    for exact in (True, False):
        for path in candidates:
            name = display_name(path)
            if (name == stem if exact else _plain(name) == _plain(stem)) and path.exists():
                return path
    source = published.download_hint(stem)
    if source and "tokenizer" not in weights.metadata:
        fitting = [path for path in candidates if path.exists() and _may_belong(info, path)]
        if len(fitting) == 1:
            return fitting[0]
    raise UserError(
        f"{decoder.with_name(stem + SUFFIXES[0])}: there is no such file, but {decoder.name} needs this tokenizer; "
        + (f"{source}, or choose another." if source else "put it there or choose another.")
    )


def _next_to(decoder: Path) -> Iterator[Path]:
    """Checkpoints next to a decoder, in its folder and one level below; a model of several files is its folder."""
    decoder = model_path(decoder)
    for folder in dict.fromkeys((decoder if decoder.is_dir() else decoder.parent, decoder.parent)):
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        for path in [*inside, *(p for below in inside if below.is_dir() for p in _entries(below))]:
            if path.suffix.lower() in SUFFIXES and path.is_file() and (model := model_path(path)) != decoder:
                yield model


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # not ours to read
        return []


def _may_belong(info: ModelInfo, path: Path) -> bool:
    try:
        weights = read_checkpoint(path)
        return is_tokenizer(weights) and _fits(info, display_name(path), describe_tokenizer(weights)[0])
    except UserError:
        return False


def load_tokenizer(path: str | Path, *, device: torch.device | str = "cpu", ops: Ops = nn) -> Any:
    """The tokenizer at `path`, or the one in a model's checkpoint, with its encoder if there is one.

    A PyramidTokenizer or a BitTokenizer for models that draw in scales, a LatentTokenizer for masked ones, else a
    VQTokenizer. Raises UserError naming the file.
    """
    weights = read_checkpoint(path)
    config, key_map = describe_tokenizer(weights)
    build: Callable[..., Tokenizer] = OTHERS[config.kind][1] if config.kind in OTHERS else VQTokenizer
    with unfilled():
        tokenizer = build(config, ops)
    load_into(tokenizer, weights, torch.float32, key_map)
    return tokenizer.eval().requires_grad_(False).to(device)


def is_tokenizer(weights: Weights) -> bool:
    """Whether a checkpoint is a tokenizer."""
    keys = weights.tensors
    return "quantize.embedding.weight" in keys or _decodes_bits(keys) or _decodes_latents(keys)


def _decodes_bits(keys: Collection[str]) -> bool:
    """Whether a file is an autoencoder of Infinity's: without a table, and without the attention that others have."""
    parts = {key.removesuffix(".weight").removesuffix(".conv") for key in keys}
    return (
        {"decoder.conv_in", "decoder.mid.block_1.conv1", "decoder.up.0.block.0.conv1"} <= parts
        and "quantize.embedding" not in parts
        and not any(".attn" in part for part in parts)
    )


def _decodes_latents(keys: Collection[str]) -> bool:
    """Whether a file is a KL autoencoder in the layout of latent diffusion, diffusers or ours: without a table."""
    parts = {"decoder.conv_in.weight", "post_quant_conv.weight"}
    middle = {"decoder.mid.block_1.conv1.weight", "decoder.mid.0.conv1.weight", DIFFUSERS_MIDDLE}
    return parts <= set(keys) and bool(middle & set(keys)) and "quantize.embedding.weight" not in keys


def describe_tokenizer(weights: Weights) -> tuple[TokenizerConfig, KeyMap]:
    """Sizes of a VQ tokenizer's checkpoint, and its key map. Raises UserError naming the file."""
    own = next((family for family in FAMILIES if family.vq and family.recognises(weights)), None)
    bits = own is None and _decodes_bits(weights.tensors)
    latents = own is None and not bits and _decodes_latents(weights.tensors)
    names = ((key, own.vq(key) if own and own.vq else key) for key in weights.tensors)
    keys = {key: name for key, name in names if name is not None and not name.endswith(VQ_COUNTER)}
    top, rename = taming_top_level(keys.values()), file_key if bits else rename_key
    targets = {key: Target(rename(name, top), transform=transform(name)) for key, name in keys.items()}
    shapes = {target.name: weights.shapes[key] for key, target in targets.items()}
    if "decoder.conv_in.weight" not in shapes or not (bits or latents or "quantize.embedding.weight" in shapes):
        if own is not None:
            raise weights.problem(
                f"lacks the weights of the VQ tokenizer that belongs to a {own.name} model; download it again."
            )
        raise weights.problem(
            f"is not a VQ tokenizer that LineAR supports ({len(weights.tensors)} weights); "
            "choose the tokenizer that belongs to the model."
        )
    family = weights.metadata.get("family", "")
    kind = next((kind for kind in KINDS if family == VQ_FAMILY.format(kind)), "")
    if bits or latents or PYRAMID_KEY in shapes:
        kind = "bits" if bits else "latents" if latents else "pyramid"
    config: TokenizerConfig
    try:
        if DIFFUSERS_MIDDLE in weights.tensors:
            config = read_latent_config(shapes, _scale(weights))
        elif kind in OTHERS:
            config = OTHERS[kind][0](shapes)
        else:
            config = read_vq_config(shapes, normalized=top is None and family != UNNORMALIZED, kind=kind)
    except (KeyError, ValueError, IndexError) as error:
        raise weights.problem(f"its weights do not fit a VQ tokenizer ({error}).") from error
    unread = (*VQ_NOT_WEIGHTS, *(() if config.encoder_widths else ("encoder.", "quant_conv.")))

    def key_map(key: str) -> Target | None:
        target = targets.get(key)
        return None if target is None or target.name.startswith(unread) else target

    return config, key_map


def _scale(weights: Weights) -> float:
    """The scale of a KL autoencoder in diffusers' layout, which only its config.json tells."""
    found = weights.config.get("scaling_factor")
    if type(found) is not float or not 0 < found < 100 or weights.config.get("shift_factor"):
        raise weights.problem("its config.json, which has to tell the scale of a VAE, does not; download both again.")
    return found


def find_checkpoints(folders: list[Path]) -> list[Path]:
    """Every checkpoint below `folders`, sorted by name; a model of several files is its folder."""
    found = {p for folder in folders if folder.is_dir() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES}
    return sorted({model_path(path) for path in found})
