"""The line cache for transformers: a Cache to pass to a model.

    cache = LineCache(model, grid=(24, 24), plan=CachePlan(budget=4))
    model.generate(**inputs, generation_mode="image", cache=cache)

Before transformers 5.24 the argument is called `past_key_values`; CACHE_ARGUMENT is its name in the installed version.

transformers gives a cache the keys and values, and computes attention itself. A line cache must also see the queries,
and attention must see the weight of each slot. So the model is switched to an attention function of ours, registered as
NAME: `update` marks the keys with their cache, and for marked keys attention reads the slots instead. For all other
keys, and for the prompt, it is transformers' own "sdpa". Cache, policies and eviction are the loop's own.

Works with transformers 4.57 and with 5.5 and newer (5.4 generates no Janus images, with any cache).
"""

from __future__ import annotations

import inspect
import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .cache import attention
from .cache.line_cache import LineCache as Slots
from .errors import UserError
from .grid import Grid
from .loop.generate import end_line
from .plan import CachePlan, CacheShape
from .policies import get_policy

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.cache_utils import Cache
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import create_causal_mask, sdpa_mask
except ImportError as error:
    raise UserError(
        f"linear_core.hf: needs transformers 4.57 or newer ({error}); install it, or use linear_core.loop.generate, "
        "which needs none."
    ) from error

NAME = "line_cache"
# transformers renamed the argument everywhere at once, so one function shows which name is in use.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
FOREIGN = ("sliding_window", "softcap", "s_aux", "position_bias")  # what some models add to attention


class LineCache(Cache):
    """Keys and values of one image per row of the batch: the prompt, `plan.budget` lines and the one being written.

    model  a transformers model that contains a Llama-like decoder; its attention is switched to NAME
    grid   rows and columns of the image's tokens, or a Grid if lines end with a token of their own
    plan   policy, budget, anchors, recent lines, release

    The first forward pass is the whole prompt. Tokens that its last token does not see are padding, and no image token
    sees them either; later masks are ignored. Every token after that is an image token: one at a time, or several of
    one line. Guidance that doubles the batch needs nothing else. Call `reset` before the next image.

    If several query heads share a key head, policies see the mean of their queries.

    `slots` is the cache itself, once the prompt is in; its `index` L B H S says which tokens are held. Raises UserError
    if the model, the grid or the order of tokens does not fit.
    """

    def __init__(self, model: nn.Module, grid: tuple[int, int] | Grid, plan: CachePlan):
        super().__init__(layers=[])  # ours are kept together, and every method that would read this list is below
        self.grid, self.plan, self.policy = _grid(grid), plan, get_policy(plan.policy)
        plan.check(self.grid)
        self._decoder = _switch(model, self.grid)
        self._layers = self._decoder.config.num_hidden_layers
        self._reads = self.policy.reads | ({"ahead"} if plan.release == "fold" else set())
        if "ahead" in self._reads and not _rotates(self._decoder):
            raise UserError(
                f"model: this plan looks ahead by rotating queries, and how {type(self._decoder).__name__} rotates "
                "them is not known; choose another policy, with release strict or lazy."
            )
        self.reset()

    def reset(self) -> None:
        """Drop the image; the next forward pass is a prompt."""
        self.slots: Slots | None = None
        self._fed: int | None = None  # image tokens so far; None until the prompt is in
        self._index = self._column = torch.empty(0, dtype=torch.int64)  # of the image tokens in this forward pass
        self._announced = self._attended = 0  # layers of this forward pass

    @property
    def _held(self) -> Slots:
        assert self.slots is not None, "the prompt is not in yet"
        return self.slots

    @property
    def nbytes(self) -> int:
        """Keys and values as allocated; 0 before the prompt."""
        return 0 if self.slots is None else self.slots.nbytes

    # -- what transformers calls --------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys, rotated, and values, B H T D; return them marked, so that `attend` finds us."""
        if layer_idx != self._announced:
            raise UserError(
                f"cache: layer {layer_idx} comes where layer {self._announced} is due; a forward was broken off, or "
                "not every layer keeps keys; call reset() and begin the image again."
            )
        if self._announced != self._attended:
            raise UserError(
                f"model: layer {self._attended} did not attend through the line cache, so this model does not use the "
                "attention that its config names; a line cache cannot serve it."
            )
        if layer_idx == 0:
            self._begin(key_states, value_states)
        self._announced += 1
        key_states.line_cache = self  # type: ignore[attr-defined]  # the mark by which `line_attention` finds us
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, held or not: positions continue from here."""
        return 0 if self._fed is None else self._held.grid.prompt + self._fed

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that a mask would cover. transformers 4 passes the new tokens' positions, 5 their number."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.get_seq_length() + new, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens a sequence may have; -1 before the prompt's length is known."""
        return -1 if self.slots is None else self.slots.grid.prompt + self.grid.tokens

    get_max_cache_shape = get_max_length  # its name up to 5.12

    @property
    def is_initialized(self) -> bool:
        return self.slots is not None

    @property
    def is_croppable(self) -> bool:
        return False  # overwritten tokens are gone

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._layers

    is_linear = is_dummy = is_sliding  # every layer keeps keys

    def __len__(self) -> int:
        return self._layers

    def __repr__(self) -> str:
        return f"LineCache({self.grid.rows} x {self.grid.cols}, {self.plan})"

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "cache: the rows and tokens of a line cache stay as they are; use num_beams=1, no assistant model, and the "
            "same batch from the prompt on."
        )

    reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse

    # -- a forward pass ----------------------------------------------------------------------------------------------

    def _begin(self, k: Tensor, v: Tensor) -> None:
        """Find out where the tokens of this forward pass belong; evict if a line is complete."""
        if (found := self._decoder.config._attn_implementation) != NAME:
            raise UserError(
                f"model: its attention was changed to '{found}' after the LineCache was made; make a new one after the "
                "last change."
            )
        if torch.is_grad_enabled() and k.requires_grad:
            raise UserError("cache: slots are written over, so gradients are lost; decode under torch.no_grad().")
        rows, _, count, _ = k.shape
        if self._fed is None:
            self._open(k, v)
            return
        slots, stride = self._held, self.grid.stride
        if rows != slots.rows:
            raise UserError(
                f"cache: it holds {slots.rows} sequences and {rows} are fed; call reset() before another batch."
            )
        if self._fed + count > self.grid.tokens:
            raise UserError(
                f"grid: {self.grid.rows} x {self.grid.cols} ends after {self.grid.tokens} tokens, and {self._fed} are "
                f"in the cache when {count} more come; call reset() before another image, or give the model's grid."
            )
        row, column = divmod(self._fed, stride)
        if column + count > stride:
            raise UserError(
                f"cache: {count} tokens come at column {column} of a line of {stride}; feed tokens of one line at a "
                "time, and call reset() before another prompt."
            )
        if column == 0 and row > 0:
            end_line(slots, self.policy, row - 1, self._rotate)
        self._column = torch.arange(column, column + count, device=k.device)
        self._index = self._column + slots.grid.index(row)
        if count == 1:
            slots.advance(self._index, self._column)

    def _open(self, k: Tensor, v: Tensor) -> None:
        """Allocate the slots; k, v are those of the prompt."""
        rows, heads, prompt, dim = k.shape
        if v.shape != k.shape:
            raise UserError(f"model: keys have {dim} numbers a head and values {v.shape[3]}; a line cache needs equal.")
        shape = CacheShape(self._layers, heads, dim, prompt, k.element_size())
        self.slots = Slots(
            shape,
            rows,
            self.grid.after(prompt),
            self.plan,
            dtype=k.dtype,
            device=k.device,
            reads=self._reads,
        )

    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Write one layer's k, v B H T D to its slots and attend with q B Q T D, Q a multiple of H -> B T Q D."""
        if dropout:
            raise UserError("model: it is in training mode; call model.eval() before generating.")
        if foreign := [name for name in FOREIGN if kwargs.get(name) is not None]:
            raise UserError(f"model: its attention uses {foreign[0]}, which a line cache does not know.")
        slots, layer = self._held, self._attended
        if k.device != slots.bias.device:
            raise UserError(f"model: its layers lie on {slots.bias.device} and {k.device}; put them on one device.")
        if self._fed is None:
            slots.write_prompt(layer, k, v, _prompt_weights(mask, k))
            out, _ = sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
        else:
            out = self._attend_slots(layer, _scaled(q, scaling), k, v)
        self._attended += 1
        if self._attended == self._layers:
            self._end()
        return out, None

    def _attend_slots(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots, groups = self._held, q.shape[1] // k.shape[1]
        grouped = q.unflatten(1, (-1, groups))  # B H G T D
        mean = grouped.mean(2)
        if q.shape[2] == 1:
            slots.write(layer, self._column, k, v, mean)
            out = slots.attend(layer, grouped.flatten(2, 3))
        else:
            keys, values, bias = slots.feed(layer, self._column, k, v, mean)
            out = attention.attend(grouped.flatten(2, 3), keys, values, bias.repeat(1, 1, groups, 1))
        return out.unflatten(2, (groups, -1)).flatten(1, 2).transpose(1, 2).contiguous()

    def _rotate(self, queries: Tensor, lines: int) -> Tensor:
        """Rotated queries L B H C D as they would be so many lines further down."""
        return _rotated(self._decoder, queries, lines * self.grid.stride)

    def _end(self) -> None:
        """Finish the forward pass: every layer has its tokens."""
        self._announced = self._attended = 0
        if self._fed is None:
            self._held.extend()
            self._fed = 0
            return
        if len(self._index) > 1:
            self._held.advance(self._index, self._column)
        self._fed += len(self._index)


def line_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function of the model: a LineCache's own for its keys, transformers' "sdpa" for all others."""
    cache = getattr(key, "line_cache", None)
    if cache is not None:
        return cache.attend(module, query, key, value, attention_mask, **kwargs)
    # Models pass on arguments that they do not know, so a cache under another name arrives here, unused.
    if unknown := [name for name, given in kwargs.items() if isinstance(given, LineCache)]:
        raise UserError(f"cache: this model takes its cache as {CACHE_ARGUMENT}=, not as {unknown[0]}=.")
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, line_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it the prompt would get no mask


def _grid(given: tuple[int, int] | Grid) -> Grid:
    if isinstance(given, Grid):
        return given
    try:
        rows, cols = given
    except (TypeError, ValueError) as error:
        raise UserError(f"grid: {given!r} is not a number of rows and one of columns, such as (24, 24).") from error
    return Grid(rows, cols)


def _switch(model: nn.Module, grid: Grid) -> PreTrainedModel:
    """Switch the decoder inside `model` to our attention and return it. Raises UserError if that cannot work."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    decoders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config is text] if text else []
    if not decoders:
        raise UserError(f"model: {type(model).__name__} is no transformers model with a decoder; give the whole model.")
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(f"model: it has layers of kind {', '.join(sorted(kinds))}; a line cache needs full attention.")
    if config.model_type == "janus":
        side = config.vq_config.num_patches
        if (grid.rows, grid.cols) != (side, side):
            raise UserError(f"grid: this Janus draws {side} x {side} tokens, not {grid.rows} x {grid.cols}.")
    try:
        decoders[0].set_attn_implementation(NAME)
    except ValueError as error:
        raise UserError(f"model: its attention cannot be replaced ({error}).") from error
    if text._attn_implementation != NAME:
        raise UserError(f"model: {type(decoders[0]).__name__} does not let its attention be replaced.")
    return decoders[-1]


def _rotated(decoder: PreTrainedModel, queries: Tensor, tokens: int) -> Tensor:
    """Rotated queries L B H C D as they would be so many tokens later: the model's own rotation, applied once more.

    Most decoders with RoPE have a function of this form in their module. For others this raises; `_rotates` finds out.
    """
    rotary, rotate = decoder.rotary_emb, sys.modules[type(decoder).__module__].apply_rotary_pos_emb
    cos, sin = rotary(queries, torch.full((1, 1), tokens, device=queries.device))
    rotated, _ = rotate(flat := queries.flatten(0, 1), flat, cos, sin)
    # Some rotations also scale, which must not happen twice.
    return rotated.view_as(queries) / getattr(rotary, "attention_scaling", 1.0)


def _rotates(decoder: PreTrainedModel) -> bool:
    """Whether `_rotated` works with this decoder. Tried on one query, as models differ in names, order and sizes."""
    text = decoder.config
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    try:
        _rotated(decoder, torch.ones(1, 1, 1, 1, size, device=decoder.device), 1)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    return True


def _prompt_weights(mask: Tensor | None, k: Tensor) -> Tensor:
    """Weights B P of the prompt's tokens: 1 if the last token sees them, 0 for padding.

    mask  B 1 P P, bool or added to the scores; None: causal
    """
    rows, _, places, _ = k.shape
    if mask is None:
        return torch.ones(rows, places, device=k.device)
    last = mask[:, 0, -1, :places]
    seen = last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2
    return seen.expand(rows, -1).float()


def _scaled(q: Tensor, scaling: float | None) -> Tensor:
    """Queries scaled so that dividing by the root of the head size, as the core does, gives the model's scores."""
    usual = q.shape[-1] ** -0.5
    return q if scaling is None or math.isclose(scaling, usual, rel_tol=1e-6) else q * (scaling / usual)
