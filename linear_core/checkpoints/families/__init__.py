"""Families: the kinds of model there are. One file each says how a checkpoint of that kind is read and prompted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...errors import UserError
from ...grid import Grid
from ...plan import CacheShape, SamplePlan
from ...prompts import Prompt
from ...prompts.tokenizer import TextTokenizer
from ...sizes import PIXELS, Size, nearest
from ..weights import Target, Weights


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read.

    config  its sizes, a dataclass of linear_core/models: layers, width, heads, codes, classes, cache_shape
    grid    of the picture it draws, unless the prompt asks for another of its `sizes`
    sizes   of the pictures it draws, width and height in pixels; empty: only the one that `grid` is
    """

    name: str
    family: Family = field(repr=False)
    config: Any
    grid: Grid
    classes: tuple[str, ...]
    defaults: SamplePlan
    weight_bytes: int  # on disk
    tokenizer: str = ""  # name of the tokenizer that belongs to it, without a file's ending; "": it brings its own
    sizes: tuple[Size, ...] = ()

    @property
    def text(self) -> bool:
        """Whether a text says what to draw, not a class."""
        return not self.config.classes

    @property
    def own_tokenizer(self) -> bool:
        """Whether texts are for its own tokenizer, not for a text encoder."""
        return self.family.prompt is not None

    def with_size(self, size: Size) -> ModelInfo:
        """The same with the grid of a picture of `size`. Raises UserError that lists the sizes most like it."""
        width, height = size
        if size not in self.sizes:
            some = ", ".join(f"{w} x {h}" for w, h in nearest(size, self.sizes)[:4])
            raise UserError(
                f"size: {self.name} does not draw {width} x {height} pixels; "
                + (f"of about this shape it draws {some}." if some else "it has one size, so leave the choice to it.")
            )
        return self.with_grid(replace(self.grid, rows=height // PIXELS, cols=width // PIXELS))

    def with_grid(self, grid: Grid | None) -> ModelInfo:
        """The same with the grid that a prompt asks for; None: its own. Raises UserError where it draws no such."""
        if grid is None:
            return self
        size = grid.cols * PIXELS, grid.rows * PIXELS
        if size not in self.sizes or grid.eol != self.grid.eol:
            raise UserError(
                f"prompt: it asks for {size[0]} x {size[1]} pixels and was made for another model than {self.name}; "
                "connect this model to its Text Prompt."
            )
        return replace(self, grid=grid)

    def cache_shape(self, dtype: torch.dtype, prompt: int = 0) -> CacheShape:
        """What decides the cache's memory; `prompt` is how many places the prompt has, 0: as many as is usual."""
        return self.config.cache_shape(prompt or self.family.prompt_slots, dtype.itemsize)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    knows     whether a checkpoint, by the names of its weights, is of this kind
    describe  a checkpoint's header and the grid asked for (rows, cols) -> what is known; UserError where it is broken
    build     sizes, grid and layers -> the decoder, on the device that is current
    place     a key of the file and the sizes -> where it goes in the decoder; None: not read
    vq        a key of the file -> its name in VQTokenizer, None: not of the tokenizer; where the file holds that too
    prompt    the model's tokenizer, texts, what to be guided from ("": nothing) and the model -> one row for each text;
              None: a class, or a text encoder, says what to draw
    tokenizer_files  where the model's tokenizer may be, seen from its folder, the likeliest first
    tokenizer_release  name of the release that has it, where that is not the model's own
    places    that the prompt of a text of a sentence or two takes, for memory before the text is known
    """

    name: str
    recognises: Callable[[Weights], bool]
    describe: Callable[[Weights, tuple[int, int] | None], ModelInfo]
    build: Callable[..., Any]
    target: Callable[[str, Any], Target | None]
    vq: Callable[[str], str | None] | None = None
    prompt: Callable[[TextTokenizer, Sequence[str], str, ModelInfo], Prompt] | None = None
    tokenizer_files: tuple[str, ...] = ("tokenizer.json",)
    tokenizer_release: str = ""
    prompt_slots: int = 32
