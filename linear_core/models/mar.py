"""MAR: an image of continuous tokens, drawn in any order from a class (github.com/LTH14/mar, models/mar.py, MIT).

An encoder reads copies of the class and the tokens that are known; a decoder reads what it says, and a mask token for
every other place, and gives each place a condition from which the diffusion head (`denoise.py`) draws its numbers.
Attention is over all of them, and places are known by learned embeddings alone. So the order in which tokens stand in
a tensor is ours to choose: slots are the copies of the class, then the tokens in the order in which they are drawn.
What is known is then always the first so many slots, and what a step adds is the next few.

Key names are those of the published files; every size but the number of heads is read from their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.look_ahead import upcast
from ..cache.step_cache import Rows, StepCache, put, take
from ..errors import UserError
from ..grid import Grid
from ..prompts import Prompt
from ..steps import VALUE_LAYERS, StepCacheShape
from .blocks import Ops
from .denoise import EPS, Denoiser

HEADS = {768: 12, 1024: 16, 1280: 16}  # of the published widths; else heads of HEAD_DIM
HEAD_DIM = 64


@dataclass(frozen=True)
class MARConfig:
    """Sizes.

    layers        of the encoder; `decoder_layers` of the decoder
    copies        of the class, which stand in front of the tokens
    numbers       of a token: channels of the latents x patch x patch
    head_width, head_blocks  of the diffusion head
    """

    layers: int
    decoder_layers: int
    width: int
    heads: int
    hidden: int
    classes: int
    tokens: int
    copies: int
    numbers: int
    head_width: int
    head_blocks: int
    patch: int = 1

    @property
    def head_dim(self) -> int:
        """Head size."""
        return self.width // self.heads

    @property
    def channels(self) -> int:
        """Of the latents."""
        return self.numbers // self.patch**2

    @property
    def grid(self) -> Grid:
        """Pictures are square."""
        return Grid(isqrt(self.tokens), isqrt(self.tokens))

    def step_cache_shape(self, bytes_per_element: int) -> StepCacheShape:
        """Sizes that decide a step cache's memory."""
        slots = self.copies + self.tokens
        return StepCacheShape(
            self.layers, self.decoder_layers, self.heads, self.head_dim, slots, bytes_per_element
        )  # fmt: skip


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, ops: Ops):
        super().__init__()
        self.heads = heads
        self.qkv = ops.Linear(width, 3 * width)
        self.proj = ops.Linear(width, width)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, ops: Ops):
        super().__init__()
        self.fc1 = ops.Linear(width, hidden)
        self.fc2 = ops.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block whose residual stream is float32. In two halves, as rows may leave in between."""

    def __init__(self, config: MARConfig, ops: Ops):
        super().__init__()
        self.norm1 = ops.LayerNorm(config.width, eps=EPS)
        self.attn = Attention(config.width, config.heads, ops)
        self.norm2 = ops.LayerNorm(config.width, eps=EPS)
        self.mlp = FeedForward(config.width, config.hidden, ops)

    def project(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values R H n D of x R n W."""
        q, k, v = self.attn.qkv(self.norm1(x).to(dtype)).unflatten(-1, (3, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def finish(self, x: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
        """x R m W and what its queries have seen, R H m D -> R m W."""
        x = x + self.attn.proj(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x).to(dtype))


@dataclass(frozen=True)
class State:
    """What all steps of some images share, in the order in which their tokens are drawn. R rows: see `MAR`.

    encoder   inputs of the encoder, R S W: filled in as tokens become known
    decoder   inputs of the decoder, without its places, R S+1 W: what the encoder said last, or the mask token. The
              last slot is nobody's: see StepCache
    encoder_places, decoder_places  embeddings of the slots, B S W
    head_places                     those of the diffusion head, B N W. None of either: nothing is added
    """

    encoder: Tensor
    decoder: Tensor
    encoder_places: Tensor
    decoder_places: Tensor | None
    head_places: Tensor | None


@dataclass(frozen=True)
class Active:
    """What a pass computes. All but the slots named here are used as the cache has them.

    known    slots that are known: the first so many
    wanted   slots whose conditions are asked for: those that follow
    new      of the known ones, the first that was not known in the pass before; None: everything is computed
    extra    other slots that are computed again: int64 B K in ascending order; None: none
    choose   instead: from the values of all slots in one of the decoder's layers, R H S D, to the slots that go on from
             there. The encoder computes the copies of the class again
    """

    known: int
    wanted: int
    new: int | None = None
    extra: Tensor | None = None
    choose: Callable[[int, Tensor], Tensor] | None = None


class MAR(nn.Module):
    """Masked model of every published size. R rows are B images, twice with guidance: conditional rows first."""

    def __init__(self, config: MARConfig, ops: Ops = nn):
        super().__init__()
        self.config = config
        # Set by a host whose layers cast and move their weights when they are used.
        self.compute_dtype: torch.dtype | None = None
        self.compute_device: torch.device | None = None
        width, slots = config.width, config.copies + config.tokens
        self.class_emb = ops.Embedding(config.classes, width)
        self.fake_latent = nn.Parameter(torch.zeros(1, width))
        self.z_proj = ops.Linear(config.numbers, width)
        self.z_proj_ln = ops.LayerNorm(width, eps=EPS)
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, width))
        self.encoder_blocks = nn.ModuleList(Block(config, ops) for _ in range(config.layers))
        self.encoder_norm = ops.LayerNorm(width, eps=EPS)
        self.decoder_embed = ops.Linear(width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, width))
        self.decoder_blocks = nn.ModuleList(Block(config, ops) for _ in range(config.decoder_layers))
        self.decoder_norm = ops.LayerNorm(width, eps=EPS)
        self.diffusion_pos_embed_learned = nn.Parameter(torch.zeros(1, config.tokens, width))
        head = Denoiser(config.numbers, width, config.head_width, config.head_blocks, ops)
        self.diffloss = nn.ModuleDict({"net": head})

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer; the diffusion head is float32 whatever it is."""
        return self.compute_dtype or self.mask_token.dtype

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.mask_token.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    @property
    def grid(self) -> Grid:
        return self.config.grid

    @property
    def head(self) -> Any:
        """The diffusion head, a `denoise.Denoiser`."""
        return self.diffloss["net"]

    @property
    def stacks(self) -> tuple[list[Any], list[Any]]:
        """The blocks of the encoder and of the decoder."""
        return [*self.encoder_blocks], [*self.decoder_blocks]

    # -- prompt and tokens ---------------------------------------------------------------------------------------------

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for another model's prompt."""
        if prompt.tokens.is_floating_point() or prompt.tokens.ndim != 2 or prompt.length != 1:
            raise UserError("prompt: this model draws from classes, not texts; connect a Class Prompt.")
        if (largest := int(prompt.tokens.max())) >= self.config.classes:
            raise UserError(
                f"prompt: it asks for class {largest}, but this model has {self.config.classes} classes; connect a "
                "Class Prompt made with this model."
            )

    def to_tokens(self, latents: Tensor) -> Tensor:
        """Latents B Z h w -> tokens in raster order, B N C: channel, row and column of a patch, as published."""
        patch = self.config.patch
        tokens = latents.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # B Z rows p cols p
        return tokens.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def to_latents(self, tokens: Tensor) -> Tensor:
        """The inverse: tokens B N C -> latents B Z h w."""
        patch, grid = self.config.patch, self.grid
        latents = tokens.unflatten(1, (grid.rows, grid.cols)).unflatten(3, (-1, patch, patch))
        return latents.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def begin(self, prompt: Prompt, order: Tensor, guided: bool) -> State:
        """The state of B images before anything is known; R is 2 B if `guided`.

        order  int64 B N: places in raster order, in the order in which their tokens are drawn
        """
        self.check(prompt)
        copies = self.config.copies
        slots = torch.cat([torch.arange(copies, device=order.device).expand(len(order), -1), copies + order], 1)

        def ordered(embedding: Tensor, index: Tensor) -> Tensor:
            return upcast(embedding).to(order.device)[0][index]

        label = upcast(self.class_emb(prompt.tokens[:, 0].to(order.device)))
        if guided:
            label = torch.cat([label, upcast(self.fake_latent).to(label.device).expand(len(label), -1)])
        places = ordered(self.encoder_pos_embed_learned, slots)
        inputs = places.new_zeros(len(label), slots.shape[1], self.config.width)
        inputs[:, :copies] = self.z_proj_ln(label[:, None] + repeated(places[:, :copies], label))
        mask = upcast(self.mask_token).to(order.device).repeat(len(label), slots.shape[1] + 1, 1)
        return State(
            inputs, mask, places, ordered(self.decoder_pos_embed_learned, slots),
            ordered(self.diffusion_pos_embed_learned, order),
        )  # fmt: skip

    def feed(self, state: State, tokens: Tensor, first: int) -> None:
        """Tokens B n C, number `first` and on in the order of drawing, are known from now on."""
        slots = slice(self.config.copies + first, self.config.copies + first + tokens.shape[1])
        x = self.z_proj_ln(upcast(self.z_proj(tokens.to(self.dtype))) + state.encoder_places[:, slots])
        state.encoder[:, slots] = repeated(x, state.encoder)

    # -- a pass --------------------------------------------------------------------------------------------------------

    def conditions(self, state: State, active: Active, cache: StepCache | None = None) -> Tensor:
        """The conditions of the wanted slots, float32 R m W.

        cache  keys and values of slots that are not computed; what is computed is written into it. None: everything is
               computed, and nothing kept
        """
        for_encoder, for_decoder = self.rows(active, len(state.encoder_places))
        self._encode(state, active, for_encoder, cache)
        return self._decode(state, active, for_decoder, cache)

    def rows(self, active: Active, images: int) -> tuple[Rows, Rows]:
        """The slots that encoder and decoder compute: ranges, unless there are extra ones.

        The encoder has only slots that are known. Where images have different numbers of these among the extra ones,
        the spare slot takes what is too much.
        """
        slots, new, known = self.config.copies + self.config.tokens, active.new, active.known
        if new is None:
            return slice(0, known), slice(0, slots)
        if active.choose is not None:
            copies = torch.arange(self.config.copies, device=self.device)
            both = torch.cat([copies, torch.arange(new, known, device=self.device)])
            return both.expand(images, -1), slice(0, slots)
        end = known + active.wanted
        if active.extra is None:
            return slice(new, known), slice(new, end)
        extra = active.extra
        again = extra[:, : int((extra < new).sum(1).max())]
        again = torch.where(again < new, again, slots)
        middle, wanted = (
            torch.arange(*ends, device=extra.device).expand(images, -1) for ends in ((new, known), (known, end))
        )
        return torch.cat([middle, again], 1), torch.cat([middle, extra, wanted], 1)

    def _encode(self, state: State, active: Active, rows: Rows, cache: StepCache | None) -> None:
        """What the encoder says about slots, as the decoder reads it."""
        within = rows if isinstance(rows, slice) else rows.clamp(max=state.encoder.shape[1] - 1)
        x = take(state.encoder, within)
        for layer, block in enumerate(self.stacks[0]):
            q, k, v = block.project(x, self.dtype)
            seen = attend(q, k, v) if cache is None else cache.attend(layer, q, k, v, rows, active.known)
            x = block.finish(x, seen, self.dtype)
        put(state.decoder, rows, self.between(x))

    def between(self, x: Tensor) -> Tensor:
        """From the encoder's last layer to the decoder's input, float32 R n W."""
        return upcast(self.decoder_embed(self.encoder_norm(x).to(self.dtype)))

    def said(self, x: Tensor) -> Tensor:
        """From the decoder's last layer to conditions, float32 R n W."""
        return upcast(self.decoder_norm(x))

    def _decode(self, state: State, active: Active, rows: Rows, cache: StepCache | None) -> Tensor:
        x = take(state.decoder, rows)
        if state.decoder_places is not None:
            x = x + repeated(take(state.decoder_places, rows), x)
        # Where the wanted slots are among the rows: behind the known ones, or last.
        whole = isinstance(rows, slice) and rows.start == 0
        wanted = slice(active.known, active.known + active.wanted) if whole else slice(-active.wanted, None)
        blocks = self.stacks[1]
        for number, block in enumerate(blocks):
            layer = self.config.layers + number
            q, k, v = block.project(x, self.dtype)
            if active.choose is not None and number == min(VALUE_LAYERS, len(blocks) - 1):
                assert cache is not None
                extra = active.choose(layer, v)
                _, chosen = self.rows(replace(active, extra=extra, choose=None), len(extra))
                q, x, wanted = take(q, chosen, 2), take(x, chosen), slice(-active.wanted, None)
            else:
                chosen = rows
            look = wanted
            if number + 1 == len(blocks):  # nobody reads the last layer's other rows
                q, x, look = q[:, :, wanted], x[:, wanted], slice(None)
            seen = attend(q, k, v) if cache is None else cache.attend(layer, q, k, v, rows, look=look)
            x, rows = block.finish(x, seen, self.dtype), chosen
        z = self.said(x)
        if state.head_places is None:
            return z
        first = active.known - self.config.copies
        return z + repeated(state.head_places[:, first : first + active.wanted], x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention without a cache."""
    return F.scaled_dot_product_attention(q, k, v)


def repeated(places: Tensor, x: Tensor) -> Tensor:
    """What is the same for both rows of an image, B n W, for as many rows as x has."""
    return places.repeat(len(x) // len(places), 1, 1)


def read_config(shapes: Mapping[str, tuple[int, ...]], heads: int = 0, channels: int = 16) -> MARConfig:
    """Every size of a MAR file from its keys and shapes.

    heads     if the file states them; 0: those of the published width
    channels  of the latents, which tell how many numbers a patch has
    Raises KeyError, IndexError or ValueError if the shapes are not a MAR's.
    """

    def layers(prefix: str) -> int:
        return 1 + max(int(key.split(".")[prefix.count(".")]) for key in shapes if key.startswith(prefix))

    width, numbers = shapes["z_proj.weight"]
    tokens = shapes["diffusion_pos_embed_learned"][1]
    if isqrt(tokens) ** 2 != tokens:
        raise ValueError(f"{tokens} tokens are no square")
    patch = isqrt(numbers // channels) or 1
    if numbers != channels * patch**2:
        raise ValueError(f"{numbers} numbers of a token are no patch of {channels} channels")
    return MARConfig(
        layers=layers("encoder_blocks."),
        decoder_layers=layers("decoder_blocks."),
        width=width,
        heads=heads or HEADS.get(width, max(1, width // HEAD_DIM)),
        hidden=shapes["encoder_blocks.0.mlp.fc1.weight"][0],
        classes=shapes["class_emb.weight"][0],
        tokens=tokens,
        copies=shapes["encoder_pos_embed_learned"][1] - tokens,
        numbers=numbers,
        head_width=shapes["diffloss.net.input_proj.weight"][0],
        head_blocks=layers("diffloss.net.res_blocks."),
        patch=patch,
    )
