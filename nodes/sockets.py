"""What nodes pass to each other, and the types of their sockets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from comfy_api.latest import io
from torch import Tensor

from ..linear_core.checkpoints.library import ImageModel
from ..linear_core.errors import UserError
from ..linear_core.grid import Grid
from ..linear_core.pictures.preview import Sketch, decode
from ..linear_core.plan import CachePlan
from ..linear_core.pyramid import Pyramid
from . import host

MODEL = io.Custom("LINEAR_MODEL")
CACHE = io.Custom("LINEAR_CACHE")  # a CachePlan
PROMPT = io.Custom("LINEAR_PROMPT")  # a Prompt
TOKENS = io.Custom("LINEAR_TOKENS")


@dataclass(frozen=True)
class Model:
    """An image model whose two networks are managed by ComfyUI."""

    image: ImageModel
    decoder: host.ModelPatcher
    tokenizer: host.ModelPatcher
    sketch: Sketch = field(default_factory=Sketch, repr=False)  # for previews of a model that draws in scales
    drafter: tuple[Model, int] | None = None  # another model that draws the first scales, and how many

    @property
    def in_turn(self) -> list[tuple[Model, int]]:
        """The models that draw a picture, one after the other, and the scale that each ends with; 0: the last."""
        return [*([] if self.drafter is None else [self.drafter]), (self, 0)]

    def with_drafter(self, drafter: Model, scales: int) -> Model:
        """The model with its first `scales` scales drawn by another; 0: all but the last two.

        Raises UserError if the two cannot draw one picture.
        """
        ours, theirs = self.image.info, drafter.image.info
        wants_generate(drafter, "drafter")
        if ours.pyramid is None or theirs.pyramid is None:
            name = (ours if ours.pyramid is None else theirs).name
            raise UserError(
                f"drafter: {name} draws line by line; only VAR, M-VAR and Infinity can share a picture. Disconnect it."
            )
        if self.image.codebook != drafter.image.codebook:
            raise UserError(
                f"drafter: {theirs.name}'s codes stand for other pieces of images than {ours.name}'s; connect a model "
                "with the same tokenizer."
            )
        if ours.pyramid != theirs.pyramid:
            raise UserError(
                f"drafter: {theirs.name} draws scales {theirs.pyramid.text}, {ours.name} {ours.pyramid.text}; connect "
                "a model of the same image size."
            )
        stages = ours.pyramid.stages
        if not scales < stages:
            raise UserError(
                f"drafter_scales: {scales} is out of range, as {ours.name} draws {stages} and has to draw one of them; "
                f"choose 1 to {stages - 1}, or 0 for all but the last two."
            )
        return replace(self, drafter=(drafter, scales or max(1, stages - 2)))

    def with_grid(self, grid: Grid | None) -> Model:
        """The model with the grid that a prompt asks for; None: its own."""
        return replace(self, image=replace(self.image, info=self.image.info.with_grid(grid)))

    def picture_bytes(self, rows: int, cols: int) -> int:
        """Bytes for decoding one picture of rows x cols tokens: about twelve feature maps of the widest level."""
        config = self.image.tokenizer.config
        return 12 * rows * cols * config.factor**2 * config.decoder_widths[-1] * 4

    def pictures(self, codes: Tensor, sides: tuple[tuple[int, int], ...] = ()) -> Tensor:
        """Codes B rows cols, or B N of scales with these `sides` (or of the first of them), or a canvas or latents
        B Z h w, as an IMAGE, float32 B H W 3: as many at a time as fit into half of the free memory."""
        rows, cols = sides[-1] if sides else codes.shape[-2:]
        each = self.picture_bytes(rows, cols)
        host.load(self.tokenizer, memory=each)
        at_once = max(1, min(len(codes), 16, host.free_memory() // 2 // each))
        drawn = self._canvas(codes, Pyramid(sides)) if sides else codes
        return host.to_intermediate(decode(self.image.tokenizer, drawn, at_once))

    @torch.inference_mode()
    def _canvas(self, codes: Tensor, pyramid: Pyramid) -> Tensor:
        """The canvas B Z h w of the tokens of the first scales, B N."""
        sizes = [pyramid.size(stage) for stage in range(pyramid.stages) if pyramid.index(stage) < codes.shape[1]]
        scales = codes.to(self.image.tokenizer.device).split(sizes, 1)
        maps = [one.unflatten(1, sides) for one, sides in zip(scales, pyramid.sides, strict=False)]
        return self.image.tokenizer.quantize.canvas(pyramid, maps)


def wants_generate(model: Model, where: str = "model") -> None:
    """Raise UserError, which names the input `where`, if the model draws masked tokens."""
    if model.image.info.masked is not None:
        raise UserError(f"{where}: {model.image.info.name} draws tokens in any order; connect it to Masked Generate.")


def wants_masked(model: Model) -> None:
    """Raise UserError if the model does not draw masked tokens."""
    if (info := model.image.info).masked is None:
        how = "line by line" if info.pyramid is None else "scale by scale"
        raise UserError(f"model: {info.name} draws {how}; connect it to Generate.")


@dataclass(frozen=True)
class Tokens:
    """Finished pictures as codes, and what is worth telling of how they were drawn. All on the CPU.

    codes     int64 B rows cols; of a picture drawn in scales B N, all tokens of its first scales
    shares    float32 B lines rows cols, share of layers and heads that held each token after each line; of scales
              B scales N, N being all of them
    names     what each picture shows
    model     name of the model that drew them
    codebook  number of codes that model draws from
    meaning   what they stand for, as ImageModel.codebook says it; "": not stated
    sides     rows and columns of each scale; empty: it was drawn in lines
    cached    whether the model keeps a cache, so that shares say something
    decoded   float32 B H W 3: the finished picture, where it was decoded already; by the tokenizer with this meaning
    pixels    height and width of the image that was encoded, before it was scaled and cropped; None: none was
    latents   float32 B Z h w: the numbers of continuous tokens, drawn in any order; there are no codes and shares then
    canvas    float32 B Z h w: the running picture, where it is a mixture that the codes alone do not give
    """

    codes: Tensor
    shares: Tensor
    names: tuple[str, ...]
    model: str
    codebook: int
    plan: CachePlan
    cache_bytes: int
    seconds: float
    meaning: str = ""
    sides: tuple[tuple[int, int], ...] = ()
    cached: bool = True
    decoded: Tensor | None = field(default=None, repr=False, compare=False)
    pixels: tuple[int, int] | None = None
    latents: Tensor | None = field(default=None, repr=False, compare=False)
    canvas: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def way(self) -> str:
        """How they were drawn, in words."""
        return "in any order" if self.latents is not None else "in scales" if self.sides else "in lines"

    @property
    def pyramid(self) -> Pyramid | None:
        """The scales; None: it was drawn in lines."""
        return Pyramid(self.sides) if self.sides else None

    def select(self, rows: list[int]) -> Tokens:
        """The pictures with these numbers."""
        names = tuple(self.names[row] for row in rows)
        latents, canvas = (None if each is None else each[rows] for each in (self.latents, self.canvas))
        codes, shares = self.codes[rows], self.shares[rows]
        return replace(self, codes=codes, shares=shares, names=names, decoded=None, latents=latents, canvas=canvas)

    def check(self, image: ImageModel) -> None:
        """Raise UserError if these are codes of another codebook than the model's, or drawn another way."""
        info = image.info
        way = "in any order" if info.masked is not None else "in scales" if info.pyramid is not None else "in lines"
        if self.way != way:
            raise UserError(
                f"tokens: they come from {self.model}, which draws {self.way}, but {info.name} draws {way}; connect "
                "its model."
            )
        if self.latents is None and self.codebook != image.tokenizer.config.codes:
            raise UserError(
                f"tokens: they come from {self.model}, whose codebook has {self.codebook} codes, but {image.info.name} "
                f"has {image.tokenizer.config.codes}; connect its model, or encode the image with {image.info.name}."
            )
        if self.meaning and self.meaning != image.codebook:
            raise UserError(
                f"tokens: they come from {self.model}, whose codes stand for other pieces of images than those of "
                f"{image.info.name}; connect its model, or encode the image with this one."
            )
