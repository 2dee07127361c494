"""Model families. Each file says how checkpoints of one family are recognised, read and prompted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ...grid import Grid
from ...plan import CacheShape, SamplePlan
from ...prompts import Prompt
from ...prompts.tokenizer import TextTokenizer
from ...pyramid import Pyramid
from ...sizes import PIXELS, Size, nearest
from ...steps import MaskedPlan
from ..weights import Target, Weights


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read.

    config        its sizes, a dataclass of linear_core/models: layers, width, heads, codes, classes, cache_shape
    grid          of its pictures, unless a prompt asks for another of its `sizes`
    classes       names of the classes by id; empty if there are none, or none are known
    defaults      published sampling settings
    weight_bytes  size on disk
    tokenizer     file name of its VQ tokenizer, without suffix; "": it comes with the model
    sizes         picture sizes to choose from, width and height in pixels; empty: only that of `grid`
    pixels        per token, along each side
    context       most tokens of prompt and image together; 0: not limited by the model
    pyramid       the scales of a model that draws in scales; `grid` is then the last of them. None: it draws in lines
    pyramids      those of all its `sizes`
    masked        published settings of a model that draws masked tokens in steps; None: it does not
    """

    name: str
    family: Family = field(repr=False)
    config: Any
    grid: Grid
    classes: tuple[str, ...]
    defaults: SamplePlan
    weight_bytes: int
    tokenizer: str = ""
    sizes: tuple[Size, ...] = ()
    pixels: int = PIXELS
    context: int = 0
    pyramid: Pyramid | None = None
    pyramids: tuple[Pyramid, ...] = ()
    masked: MaskedPlan | None = None

    @property
    def text(self) -> bool:
        """Whether prompts are texts, not classes."""
        return not self.config.classes

    @property
    def own_tokenizer(self) -> bool:
        """Whether it reads texts with its own tokenizer, not with a text encoder."""
        return self.family.prompt is not None

    @property
    def features(self) -> tuple[str, ...]:
        """What features of a text encoder mean to it (`Origin.meaning`): of cleaned texts, or of what was written."""
        return ("features",) if self.family.cleaned else ("features", "as written")

    @property
    def cached(self) -> bool:
        """Whether it keeps keys and values; otherwise a state joins its scales, and there is nothing to evict."""
        return self.masked is not None or not self.cache_shape(torch.float32).state

    def with_size(self, size: Size) -> ModelInfo:
        """The model with the grid for pictures of `size`. Raises UserError listing sizes of similar shape."""
        width, height = size
        if size not in self.sizes:
            some = ", ".join(f"{w} x {h}" for w, h in nearest(size, self.sizes)[:4])
            raise UserError(
                f"size: {self.name} does not draw {width} x {height} pixels; "
                + (
                    f"of similar shape it draws {some}."
                    if some
                    else "it has only one size, so leave this to the model."
                )
            )
        return self.with_grid(replace(self.grid, rows=height // self.pixels, cols=width // self.pixels))

    def with_grid(self, grid: Grid | None) -> ModelInfo:
        """The model with the grid of a prompt; None: its own. Raises UserError for a grid that it does not draw."""
        if grid is None:
            return self
        size = grid.cols * self.pixels, grid.rows * self.pixels
        if size not in self.sizes or grid.eol != self.grid.eol:
            raise UserError(
                f"prompt: it asks for {size[0]} x {size[1]} pixels and was not made for {self.name}; connect this "
                "model to its Text Prompt."
            )
        last = grid.rows, grid.cols
        return replace(self, grid=grid, pyramid=next((p for p in self.pyramids if p.sides[-1] == last), None))

    def cache_shape(self, dtype: torch.dtype, prompt: int = 0) -> CacheShape:
        """Sizes that decide the cache's memory, for a prompt of `prompt` tokens; 0: of typical length."""
        return self.config.cache_shape(prompt or self.family.prompt_slots, dtype.itemsize)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    recognises         whether a checkpoint, by the names of its weights, is of this family
    describe           header and requested grid (rows, cols) -> ModelInfo; UserError for a broken checkpoint
    build              sizes, grid and layers -> the decoder, on the current device
    target             key of the file and sizes -> its target in the decoder; None: not read
    vq                 key of the file -> its key in a file of the tokenizer alone; None: not the tokenizer's. For
                       files that contain it
    prompt             text tokenizer, texts, negative prompt ("": none) and model -> one row per text; None: prompts
                       are classes, or come from a text encoder
    open_tokenizer     reads the text tokenizer at a path; raises UserError naming the file
    tokenizer_files    possible paths of the text tokenizer, relative to the model's folder, the most likely first
    tokenizer_release  name of the release with the tokenizer, if not the model's own
    prompt_slots       slots of a typical prompt of a sentence or two, to plan memory before the text is known
    cleaned            whether a text encoder gets texts as LlamaGen's captions were cleaned, not as they are written
    tokenizer_kind     of the VQ tokenizers of all its models (`VQConfig.kind`); "": their names say it
    precise            name of a weight in the decoder -> whether it is float32 whatever the decoder computes in
    averaged           whether of a training checkpoint the weights averaged over training are taken (ema)
    """

    name: str
    recognises: Callable[[Weights], bool]
    describe: Callable[[Weights, tuple[int, int] | None], ModelInfo]
    build: Callable[..., Any]
    target: Callable[[str, Any], Target | None]
    vq: Callable[[str], str | None] | None = None
    prompt: Callable[[TextTokenizer, Sequence[str], str, ModelInfo], Prompt] | None = None
    open_tokenizer: Callable[[Path], TextTokenizer] = TextTokenizer
    tokenizer_files: tuple[str, ...] = ("tokenizer.json",)
    tokenizer_release: str = ""
    prompt_slots: int = 32
    cleaned: bool = True
    tokenizer_kind: str = ""
    precise: Callable[[str], bool] = lambda name: False
    averaged: bool = False
