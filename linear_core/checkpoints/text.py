"""From texts and a text encoder's files to prompts. Features are cached; the encoder is not kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..prompts import Origin, Prompt
from ..prompts.caption import clean
from ..prompts.t5 import LENGTH, PROBE, T5Tokenizer, build, encode, text_prompt
from . import published
from .families import ModelInfo
from .weights import INDEX_FILES, Weights, check_finite, read_weights, shards

INDEX = INDEX_FILES[0]
TOKENIZERS = ("tokenizer.json", "spiece.model")
MAX_CACHED = 256  # texts, of at most two megabytes each
_features: OrderedDict[tuple[object, str], Tensor] = (
    OrderedDict()
)  # by encoder and cleaned text, most recently used last


@dataclass(frozen=True)
class TextFiles:
    """A T5 encoder's checkpoint, in one file or several, and its tokenizer (None: inside the checkpoint)."""

    path: Path  # as chosen: a file or a folder
    weights: tuple[Path, ...]
    tokenizer: Path | None = field(repr=False)

    @property
    def key(self) -> object:
        """A cache key that changes when a file does."""
        stats = [p.stat() for p in (*self.weights, *([self.tokenizer] if self.tokenizer else []))]
        return self.path, tuple((s.st_size, s.st_mtime_ns) for s in stats)


def find_text_encoder(path: str | Path, tokenizer: Path | None = None, width: int = 0) -> TextFiles:
    """The files of the encoder at `path`: a folder as published (google/flan-t5-xl), or a ComfyUI text-encoder file.

    The tokenizer is looked for next to them; `tokenizer` is used if there is none. Raises UserError naming the file
    that is missing, or an encoder that gives other than `width` features per token (0: any), by its header alone.
    """
    path = Path(path)
    if path.is_dir():
        weights, folder = _shards(path), path
    elif path.is_file():
        weights, folder = (path,), path.parent
    else:
        source = published.download_hint(path.name)
        raise UserError(f"{path}: there is no such file or folder" + (f"; {source}." if source else "."))
    found = encoder_width(weights)
    if width and found and found != width:
        raise UserError(
            f"{path.name}: gives {found} features per token, but the model takes {width}; choose FLAN-T5-XL's encoder."
        )
    own = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), tokenizer)
    if own is None and not _carries_tokenizer(weights):
        raise UserError(
            f"{folder / TOKENIZERS[0]}: there is no such file, but {path.name} needs a tokenizer; get it from "
            f"{published.T5.url(TOKENIZERS[0])}."
        )
    return TextFiles(path, weights, own)


def _shards(folder: Path) -> tuple[Path, ...]:
    if any((folder / index).is_file() for index in INDEX_FILES):
        found = shards(folder)
    else:
        found = tuple(sorted(p for p in folder.iterdir() if p.suffix == ".safetensors")) or tuple(
            sorted(p for p in folder.glob("pytorch_model*.bin"))
        )
    for shard in found or (folder / "model.safetensors",):
        if not shard.is_file():
            raise UserError(f"{shard}: there is no such file; get it from {published.T5.url(shard.name)}.")
    return found


def _carries_tokenizer(weights: tuple[Path, ...]) -> bool:
    return any("spiece_model" in read_weights(path, shapes_only=True).tensors for path in weights)


def encoder_width(files: Sequence[Path]) -> int:
    """Features per token of the T5 encoder in `files`, from their headers alone; 0 if there is none to be read."""
    for path in files:
        try:
            shapes = read_weights(path, shapes_only=True).shapes
        except UserError:  # loading it says what is wrong
            continue
        if found := next((shape for key, shape in shapes.items() if key.endswith(PROBE)), ()):
            return found[-1]
    return 0


def is_text_encoder(path: Path) -> bool:
    """Whether a checkpoint contains a T5 encoder, from its header alone."""
    return encoder_width([path]) > 0


def load_encoder(files: TextFiles) -> tuple[nn.Module, T5Tokenizer]:
    """The encoder, in bfloat16 on the CPU, and its tokenizer. Raises UserError naming the file."""
    tensors = {k: v for path in files.weights for k, v in read_weights(path).tensors.items()}
    try:
        tokenizer = T5Tokenizer(files.tokenizer or bytes(tensors["spiece_model"].tolist()))
    except UserError:
        raise
    except Exception as error:  # tokenizers and sentencepiece raise exceptions of their own
        name = files.tokenizer or files.path
        raise UserError(f"{name}: cannot be read as a tokenizer ({error}); download it again.") from error
    weights = Weights(files.path, tensors, {})
    try:
        encoder = build(tensors)
    except ValueError as error:
        raise weights.problem(f"{error}; choose FLAN-T5-XL's encoder.") from error
    for key, tensor in encoder.state_dict().items():
        check_finite(weights, key, tensor)
    return encoder, tokenizer


def prompt(
    texts: Sequence[str],
    files: TextFiles,
    to_device: Callable[[nn.Module], torch.device | str] = lambda encoder: "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    negative: str = "",
    model: ModelInfo | None = None,
    load: Callable[[TextFiles], tuple[nn.Module, T5Tokenizer]] | None = None,
) -> Prompt:
    """One image per text, guided away from `negative`, or by default from the model's own unconditional features.

    model      whose length of texts, spelling and size of pictures count; None: any LlamaGen's
    to_device  moves the encoder to a device and returns it; called only if a text is not cached
    progress   called with the number of new texts encoded so far, and their total
    load       in place of `load_encoder`; whoever has many texts gives a function that keeps it
    Raises UserError if `texts` is empty or a file cannot be read.
    """
    if not texts:
        raise UserError("text: it is empty; describe what to draw.")
    length = model.config.caption_slots if model else LENGTH
    key = files.key, length
    spell: Callable[[str], str]
    if model is None or model.family.cleaned:
        spell, origin = clean, Origin("", ("features",))
    else:
        spell, origin = str, Origin(model.name, model.features)
    cleaned = [(key, spell(text)) for text in [*texts, *([negative] if negative else [])]]
    features = {name: _features[name] for name in cleaned if name in _features}
    missing = [name for name in dict.fromkeys(cleaned) if name not in features]
    if missing:
        encoder, tokenizer = (load or load_encoder)(files)
        device = to_device(encoder)
        for i, name in enumerate(missing):
            features[name] = encode(name[1], tokenizer, encoder, device, length)
            progress(i + 1, len(missing))
    for name in cleaned:
        _features[name] = features[name]
        _features.move_to_end(name)
    while len(_features) > MAX_CACHED:
        _features.popitem(last=False)
    rows = [features[name] for name in cleaned]
    negatives = text_prompt(rows[len(texts) :] * len(texts), length=length) if negative else None
    made = text_prompt(rows[: len(texts)], tuple(texts), length)
    grid = model.grid if model and model.sizes else None
    return replace(made, negative=negatives, grid=grid, origin=origin)


def clear_features() -> None:
    """Empty the cache of features."""
    _features.clear()
