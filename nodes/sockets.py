"""What nodes pass to each other, and the types of their sockets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from comfy_api.latest import io
from torch import Tensor

from ..linear_core.checkpoints.library import ImageModel
from ..linear_core.errors import UserError
from ..linear_core.grid import Grid
from ..linear_core.pictures.preview import decode
from ..linear_core.plan import CachePlan
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

    def with_grid(self, grid: Grid | None) -> Model:
        """The model with the grid that a prompt asks for; None: its own."""
        return replace(self, image=replace(self.image, info=self.image.info.with_grid(grid)))

    def picture_bytes(self, rows: int, cols: int) -> int:
        """Bytes for decoding one picture of rows x cols tokens: about twelve feature maps of the widest level."""
        config = self.image.tokenizer.config
        return 12 * rows * cols * config.factor**2 * config.decoder_widths[-1] * 4

    def pictures(self, codes: Tensor) -> Tensor:
        """Codes B rows cols as an IMAGE, float32 B H W 3: as many at a time as fit into half of the free memory."""
        images, rows, cols = codes.shape
        each = self.picture_bytes(rows, cols)
        host.load(self.tokenizer, memory=each)
        at_once = max(1, min(images, 16, host.free_memory() // 2 // each))
        return host.to_intermediate(decode(self.image.tokenizer, codes, at_once))


@dataclass(frozen=True)
class Tokens:
    """Finished pictures as codes, and what is worth telling of how they were drawn. All on the CPU.

    codes     int64 B rows cols
    shares    float32 B lines rows cols, share of layers and heads that held each token after each line
    names     what each picture shows
    model     name of the model that drew them
    codebook  number of codes that model draws from
    meaning   what they stand for, as ImageModel.codebook says it; "": not stated
    pixels    height and width of the image that was encoded, before it was scaled and cropped; None: none was
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
    pixels: tuple[int, int] | None = None

    def select(self, rows: list[int]) -> Tokens:
        """The pictures with these numbers."""
        names = tuple(self.names[row] for row in rows)
        return replace(self, codes=self.codes[rows], shares=self.shares[rows], names=names)

    def check(self, image: ImageModel) -> None:
        """Raise UserError if these are codes of another codebook than the model's."""
        if self.codebook != image.tokenizer.config.codes:
            raise UserError(
                f"tokens: they come from {self.model}, whose codebook has {self.codebook} codes, but {image.info.name} "
                f"has {image.tokenizer.config.codes}; connect its model, or encode the image with {image.info.name}."
            )
        if self.meaning and self.meaning != image.codebook:
            raise UserError(
                f"tokens: they come from {self.model}, whose codes stand for other pieces of images than those of "
                f"{image.info.name}; connect its model, or encode the image with this one."
            )
