"""NOVA: an image of continuous tokens, drawn in any order from a text (github.com/baaivision/NOVA, Apache-2.0).

MAR's idea with another front. What the video model calls its encoder reads the text and one start token for each cell
of 2 x 2 tokens, once for a picture, and what it says about the cells stands where MAR has copies of the class. The
image encoder is one stack: its first half reads these and the known tokens, its second half also a mask token for every
other place. Blocks normalise what attention and feed-forward say, not what they read. Places are sinusoids, so a
file's shapes do not tell how large its pictures are. Only still images: the time of the first frame, and no motion.

diffnext/models/transformers/transformer_3d.py (`generate_frame`), vision_transformer.py, diffusion_mlp.py,
embeddings.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.look_ahead import upcast
from ..errors import UserError
from ..prompts import Prompt
from .blocks import Ops
from .denoise import EPS, FREQUENCIES, Modulations, Schedule, modulated_steps, time_features
from .mar import MAR, Attention, FeedForward, MARConfig, State, repeated

HEADS = {768: 12, 1024: 16, 1536: 16}  # of the published widths; else heads of 64
TEXT_TOKENS = 256  # that a published model reads of a text; its table of empty ones has more
EMPTY_TOKENS = 512  # in the table
NORM_EPS = 1e-5
CELL = 2  # tokens along each side of a cell of the condition


@dataclass(frozen=True)
class NovaConfig(MARConfig):
    """Sizes. `layers` and `decoder_layers` are the halves of the image encoder, `copies` the cells of the condition.

    condition_layers  of the encoder that reads the text
    caption_dim       features of a text token
    text_tokens       that are read
    """

    condition_layers: int = 16
    caption_dim: int = 2560
    text_tokens: int = TEXT_TOKENS


class Block(nn.Module):
    """Transformer block that normalises what is added. In two halves, as rows may leave in between."""

    def __init__(self, config: NovaConfig, ops: Ops):
        super().__init__()
        self.norm1 = ops.LayerNorm(config.width, eps=NORM_EPS)
        self.attn = Attention(config.width, config.heads, ops)
        self.norm2 = ops.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = FeedForward(config.width, config.hidden, ops)

    def project(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values R H n D of x R n W."""
        q, k, v = self.attn.qkv(x.to(dtype)).unflatten(-1, (3, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def finish(self, x: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """x R m W and what its queries have seen, R H m D -> R m W."""
        x = x + self.norm1(upcast(self.attn.proj(seen.transpose(1, 2).flatten(2))))
        return x + self.norm2(upcast(self.mlp(x.to(dtype))))


class Stack(nn.Module):
    def __init__(self, config: NovaConfig, layers: int, ops: Ops):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(layers))
        self.norm = ops.LayerNorm(config.width, eps=NORM_EPS)


class ImageStack(Stack):
    def __init__(self, config: NovaConfig, ops: Ops):
        super().__init__(config, config.layers + config.decoder_layers, ops)
        self.patch_embed = Patches(config.numbers, config.width, ops)


class Patches(nn.Module):
    """A convolution over patches, as a product: the numbers of a token are its channels, rows and columns."""

    def __init__(self, numbers: int, width: int, ops: Ops):
        super().__init__()
        self.proj = ops.Linear(numbers, width)


class TextEmbed(nn.Module):
    def __init__(self, config: NovaConfig, ops: Ops):
        super().__init__()
        self.proj = ops.Linear(config.caption_dim, config.width)
        self.norm = ops.LayerNorm(config.width, eps=NORM_EPS)
        self.weight = nn.Parameter(torch.zeros(EMPTY_TOKENS, config.caption_dim))


class TimeEmbed(nn.Module):
    """Which frame it is; a still image is the first."""

    def __init__(self, width: int, ops: Ops):
        super().__init__()
        self.time_proj = nn.Sequential(ops.Linear(FREQUENCIES, width), nn.SiLU(), ops.Linear(width, width))
        self.norm = ops.LayerNorm(width, eps=NORM_EPS)

    def forward(self, like: Tensor) -> Tensor:
        """Of the first frame, whose sines are 0 and whose cosines are 1: W, of the device of `like`."""
        first = like.new_zeros(FREQUENCIES)
        first[FREQUENCIES // 2 :] = 1
        return self.norm(self.time_proj(first))


class MaskEmbed(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.bos_token = nn.Parameter(torch.zeros(1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))


def places(rows: int, cols: int, width: int, device: torch.device) -> Tensor:
    """Sinusoids of the places of a grid in raster order, columns first: float32 N W."""
    quarter = width // 4
    frequency = 1 / 10000 ** (torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    place = torch.arange(rows * cols, device=device)[:, None]
    col, row = place % cols * frequency, place // cols * frequency
    return torch.cat([col.sin(), col.cos(), row.sin(), row.cos()], -1)


class Nova(MAR):
    """Text-to-image NOVA of every published size. R rows are B images, twice with guidance: conditional rows first."""

    config: NovaConfig

    def __init__(self, config: NovaConfig, ops: Ops = nn):
        nn.Module.__init__(self)
        self.config = config
        self.compute_dtype = self.compute_device = None
        width = config.width
        self.text_embed = TextEmbed(config, ops)
        self.video_pos_embed = TimeEmbed(width, ops)
        self.mask_embed = MaskEmbed(width)
        self.video_encoder = Stack(config, config.condition_layers, ops)
        self.image_encoder = ImageStack(config, ops)
        self.image_decoder = NovaHead(config.numbers, width, config.head_width, config.head_blocks, ops)

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.mask_embed.mask_token.dtype

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.mask_embed.mask_token.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    @property
    def head(self) -> NovaHead:
        """The diffusion head."""
        return self.image_decoder

    @property
    def stacks(self) -> tuple[list[Any], list[Any]]:
        """The halves of the image encoder."""
        blocks = [*self.image_encoder.blocks]
        return blocks[: self.config.layers], blocks[self.config.layers :]

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for another model's prompt."""
        if not prompt.tokens.is_floating_point() or prompt.tokens.shape[-1] != self.config.caption_dim:
            raise UserError("prompt: this model draws from texts that Phi-2 has read; connect such a Text Prompt.")

    def texts(self, prompt: Prompt) -> Tensor:
        """What the text tokens are, R T F: those of a text, and then the empty ones that the model has learned."""
        empty = upcast(self.text_embed.weight)[: self.config.text_tokens].to(self.device)
        found = empty.repeat(prompt.rows, 1, 1)
        for row, features, pad in zip(found, prompt.tokens, prompt.pad.tolist(), strict=True):
            features = features[pad:][: len(row)]
            row[: len(features)] = features.to(row)
        return found

    def read(self, prompt: Prompt, guided: bool) -> Tensor:
        """What the first encoder says about the cells: float32 R cells W."""
        texts = self.texts(prompt)
        if guided:
            without = upcast(self.text_embed.weight)[: self.config.text_tokens].to(texts).expand_as(texts)
            texts = torch.cat([texts, self.texts(prompt.negative) if prompt.negative else without])
        text = self.text_embed.norm(upcast(self.text_embed.proj(texts.to(self.dtype))))
        rows, cols = self.grid.rows // CELL, self.grid.cols // CELL
        cells = upcast(self.mask_embed.bos_token).to(text) + self.video_pos_embed(text)
        cells = cells + places(rows, cols, self.config.width, text.device)
        x = torch.cat([text, cells.expand(len(text), -1, -1)], 1)
        blocks: list[Any] = [*self.video_encoder.blocks]
        for block in blocks:
            q, k, v = block.project(x, self.dtype)
            x = block.finish(x, F.scaled_dot_product_attention(q, k, v), self.dtype)
        return upcast(self.video_encoder.norm(x[:, text.shape[1] :]))

    def begin(self, prompt: Prompt, order: Tensor, guided: bool) -> State:
        """The state of B images before anything is known; R is 2 B if `guided`.

        order  int64 B N: places in raster order, in the order in which their tokens are drawn
        """
        self.check(prompt)
        condition = self.read(prompt, guided)
        copies = self.config.copies
        where = places(self.grid.rows, self.grid.cols, self.config.width, order.device)[order]
        slots = torch.cat([where.new_zeros(len(order), copies, self.config.width), where], 1)
        inputs = slots.new_zeros(len(condition), slots.shape[1], self.config.width)
        inputs[:, :copies] = condition
        masks = F.pad(slots + upcast(self.mask_embed.mask_token).to(slots), (0, 0, 0, 1))
        return State(inputs, repeated(masks, condition).clone(), slots, None, None)

    def feed(self, state: State, tokens: Tensor, first: int) -> None:
        """Tokens B n C, number `first` and on in the order of drawing, are known from now on."""
        slots = slice(self.config.copies + first, self.config.copies + first + tokens.shape[1])
        x = upcast(self.image_encoder.patch_embed.proj(tokens.to(self.dtype))) + state.encoder_places[:, slots]
        state.encoder[:, slots] = repeated(x, state.encoder)

    def between(self, x: Tensor) -> Tensor:
        """One stack: nothing is between its halves."""
        return x

    def said(self, x: Tensor) -> Tensor:
        return upcast(self.image_encoder.norm(x))


class Projector(nn.Module):
    def __init__(self, inner: int, width: int, ops: Ops):
        super().__init__()
        self.fc1 = ops.Linear(inner, width)
        self.fc2 = ops.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class Modulation(nn.Module):
    def __init__(self, width: int, stats: int, ops: Ops):
        super().__init__()
        self.stats = stats
        self.proj = ops.Linear(width, stats * width)

    def forward(self, activated: Tensor) -> tuple[Tensor, ...]:
        """SiLU(condition) ... D -> scale, shift and, of a block, the gate."""
        scale, *rest = self.proj(activated).chunk(self.stats, -1)
        return (scale + 1, *rest)


class HeadBlock(nn.Module):
    def __init__(self, width: int, ops: Ops):
        super().__init__()
        self.norm1 = Modulation(width, 3, ops)
        self.proj = Projector(width, width, ops)
        self.norm2 = ops.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        h = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale)
        return torch.addcmul(x, gate, self.norm2(self.proj(h)))


class TimeCondition(nn.Module):
    def __init__(self, condition: int, width: int, ops: Ops):
        super().__init__()
        self.timestep_proj = Projector(FREQUENCIES, width, ops)
        self.condition_proj = Projector(condition, width, ops)


class NovaHead(nn.Module):
    """The diffusion head: the noise alone is learned, its variance is fixed. Float32, as `denoise.Denoiser`."""

    def __init__(self, numbers: int, condition: int, width: int, blocks: int, ops: Ops = nn):
        super().__init__()
        self.numbers, self.width = numbers, width
        self.patch_embed = Patches(numbers, width, ops)
        self.time_cond_embed = TimeCondition(condition, width, ops)
        self.blocks = nn.ModuleList(HeadBlock(width, ops) for _ in range(blocks))
        self.norm = Modulation(width, 2, ops)
        self.head = ops.Linear(width, numbers)

    def modulations(self, activated: Tensor) -> Modulations:
        """SiLU(time + condition) T R D -> what each block, and the end, is modulated with."""
        blocks: list[Any] = [*self.blocks]
        return [part(activated) for part in (*(block.norm1 for block in blocks), self.norm)]

    def look(self, x: Tensor, modulations: Modulations, step: int) -> Tensor:
        """The network once: x R C at one of the denoising steps of `modulations` -> noise R C."""
        h = self.patch_embed.proj(x)
        *blocks, (scale, shift) = ([vector[step] for vector in vectors] for vectors in modulations)
        h = h.repeat(len(scale) // len(h), 1)
        for block, vectors in zip(self.blocks, blocks, strict=True):
            h = block(h, *vectors)
        return self.head(torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=EPS), scale))

    def forward(
        self, z: Tensor, noise: Tensor, schedule: Schedule, guidance: Tensor | float = 1.0, temperature: float = 1.0
    ) -> Tensor:
        """Draw n tokens: float32 n C. Arguments are those of `denoise.Denoiser`."""
        count, rows = noise.shape[1], len(z)
        condition = self.time_cond_embed.condition_proj(upcast(z))
        time = self.time_cond_embed.timestep_proj(time_features(schedule.timesteps.to(condition)))
        noise = noise.to(condition)
        vectors = 3 * len(self.blocks) + 2
        x = noise[0]
        for step, ahead, at in modulated_steps(self.modulations, time, condition, vectors):
            eps = self.look(x, ahead, at)
            if rows > count:
                eps = torch.lerp(eps[count:], eps[:count], guidance)
            x = schedule.keep[step] * x - schedule.take[step] * eps
            if step + 1 < schedule.steps:
                x = torch.addcmul(x, (schedule.least[step] / 2).exp(), noise[step + 1], value=temperature)
        return x


def read_config(shapes: Mapping[str, tuple[int, ...]], side: int, text_tokens: int = TEXT_TOKENS) -> NovaConfig:
    """Every size of a NOVA file from its keys and shapes, but for two.

    side         tokens along each side of its pictures
    text_tokens  that it reads
    Raises KeyError, IndexError or ValueError if the shapes are not those of a NOVA that draws still images.
    """

    def layers(prefix: str) -> int:
        return 1 + max(int(key.split(".")[prefix.count(".")]) for key in shapes if key.startswith(prefix))

    width, channels, patch, _ = shapes["image_encoder.patch_embed.proj.weight"]
    stack = layers("image_encoder.blocks.")
    if side % CELL:
        raise ValueError(f"{side} tokens are no cells of {CELL}")
    return NovaConfig(
        layers=stack // 2,
        decoder_layers=stack - stack // 2,
        width=width,
        heads=HEADS.get(width, max(1, width // 64)),
        hidden=shapes["image_encoder.blocks.0.mlp.fc1.weight"][0],
        classes=0,
        tokens=side * side,
        copies=(side // CELL) ** 2,
        numbers=channels * patch * patch,
        head_width=shapes["image_decoder.patch_embed.proj.weight"][0],
        head_blocks=layers("image_decoder.blocks."),
        patch=patch,
        condition_layers=layers("video_encoder.blocks."),
        caption_dim=shapes["text_embed.proj.weight"][1],
        text_tokens=text_tokens,
    )
