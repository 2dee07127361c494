"""From a text encoder's files and texts to prompts: what was encoded once is remembered, the encoder is not kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..prompts import Prompt
from ..prompts.caption import clean
from ..prompts.t5 import PROBE, T5Tokenizer, build, encode, text_prompt
from . import published
from .weights import Weights, check_finite, read_weights, shards_in_index

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "spiece.model")
REMEMBERED = 256  # texts, at most half a megabyte each
_features: OrderedDict[tuple[object, str], Tensor] = OrderedDict()  # by encoder and cleaned text, most recent last


@dataclass(frozen=True)
class TextFiles:
    """A T5 encoder's checkpoint, in one file or several, and its tokenizer (None: inside the checkpoint)."""

    path: Path  # as chosen: a file or a folder
    weights: tuple[Path, ...]
    tokenizer: Path | None = field(repr=False)

    @property
    def key(self) -> object:
        """Changes when a file does."""
        stats = [p.stat() for p in (*self.weights, *([self.tokenizer] if self.tokenizer else []))]
        return self.path, tuple((s.st_size, s.st_mtime_ns) for s in stats)


def find_text_encoder(path: str | Path, tokenizer: Path | None = None) -> TextFiles:
    """The files of the encoder at `path`: a folder as published (google/flan-t5-xl), or one ComfyUI text-encoder file.

    A file's tokenizer is looked for beside it; `tokenizer` is used where there is none. Raises UserError naming the
    file that is missing.
    """
    path = Path(path)
    if path.is_dir():
        weights, beside = _shards(path), path
    elif path.is_file():
        weights, beside = (path,), path.parent
    else:
        source = published.where(path.name)
        raise UserError(f"{path}: there is no such file or folder" + (f"; {source}." if source else "."))
    own = next((beside / name for name in TOKENIZERS if (beside / name).is_file()), tokenizer)
    if own is None and not _carries_tokenizer(weights):
        raise UserError(
            f"{beside / TOKENIZERS[0]}: there is no such file, and {path.name} needs a tokenizer; get it from "
            f"{published.T5.url(TOKENIZERS[0])}."
        )
    return TextFiles(path, weights, own)


def _shards(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    if index.is_file():
        found = shards_in_index(index)
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


def is_text_encoder(path: Path) -> bool:
    """Whether a checkpoint is a T5 with its encoder, from its header alone."""
    try:
        return any(k.endswith(PROBE) for k in read_weights(path, shapes_only=True).tensors)
    except UserError:
        return False


def load_encoder(files: TextFiles) -> tuple[nn.Module, T5Tokenizer]:
    """The encoder, in bfloat16 on the CPU, and its tokenizer. Raises UserError naming the file."""
    tensors = {k: v for path in files.weights for k, v in read_weights(path).tensors.items()}
    try:
        tokenizer = T5Tokenizer(files.tokenizer or bytes(tensors["spiece_model"].tolist()))
    except UserError:
        raise
    except Exception as error:  # tokenizers and sentencepiece raise kinds of their own
        name = files.tokenizer or files.path
        raise UserError(f"{name}: is not a tokenizer that can be read ({error}); download it again.") from error
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
    place: Callable[[nn.Module], torch.device | str] = lambda encoder: "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    negative: str = "",
) -> Prompt:
    """One image for each text, guided away from `negative`; without one, from what the model has learnt instead.

    place     brings the encoder to the device it shall run on, and says which; called only if a text is new
    progress  is told how many of the new texts are encoded, and of how many
    """
    if not texts:
        raise UserError("text: it is empty; write what the picture shall show.")
    key = files.key
    cleaned = [(key, clean(text)) for text in [*texts, *([negative] if negative else [])]]
    known = {name: _features[name] for name in cleaned if name in _features}
    missing = [name for name in dict.fromkeys(cleaned) if name not in known]
    if missing:
        encoder, tokenizer = load_encoder(files)
        device = place(encoder)
        for i, name in enumerate(missing):
            known[name] = encode(name[1], tokenizer, encoder, device)
            progress(i + 1, len(missing))
    for name in cleaned:
        _features[name] = known[name]
        _features.move_to_end(name)
    while len(_features) > REMEMBERED:
        _features.popitem(last=False)
    rows = [known[name] for name in cleaned]
    away = text_prompt(rows[len(texts) :] * len(texts)) if negative else None
    return replace(text_prompt(rows[: len(texts)], tuple(texts)), negative=away)


def clear_features() -> None:
    """Encode everything anew."""
    _features.clear()
