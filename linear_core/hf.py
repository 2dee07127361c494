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

import copy
import inspect
import itertools
import math
import operator
import sys
import warnings
from types import SimpleNamespace
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .cache import attention
from .cache.line_cache import LineCache as Slots
from .cache.storage import STORAGE
from .errors import UserError
from .grid import Grid
from .loop.generate import room_after
from .plan import CachePlan, CacheShape
from .policies import get_policy

try:
    from transformers import (
        AttentionInterface,
        AttentionMaskInterface,
        PreTrainedModel,
        UnbatchedClassifierFreeGuidanceLogitsProcessor,
    )
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
PASSING = ("_model", "_decoder", "_handle", "policy", "_reads")  # what belongs to a running program
REPLACES_CACHES = ("PREFIX_TUNING", "CARTRIDGE")  # peft's names
NO_MODEL = "cache: it was loaded without its model; call attach(model) first."
PREFIX_TUNING = (
    "prefix tuning (peft) replaces it with a full cache of its own; use prompt tuning or LoRA, or no line cache."
)


class LineCache(Cache):
    """Keys and values of one image per row of the batch: the prompt, `plan.budget` lines and the one being written.

    model   a transformers model that contains a Llama-like decoder; its attention is switched to NAME
    grid    rows and columns of the image's tokens, or a Grid if lines end with a token of their own
    plan    policy, budget, anchors, recent lines, release
    prompt  how many tokens the prompt has, padding included. Needed if it comes in several forward passes (generate's
            `prefill_chunk_size`), or if image tokens are fed several at a time; without it, the first forward pass is
            the whole prompt, and several tokens at once after it are refused, as nobody could tell what they are

    After the prompt, every token is an image token: one at a time, or several of one line. When the grid is complete,
    further tokens (end of image, end of text) come one at a time and are kept in full. Tokens that the prompt's last
    token does not see are padding, and no later token sees them either; what later masks say is ignored. Guidance that
    doubles the batch needs nothing else; for guidance inside an ordinary `generate` see `guidance`. Call `reset` before
    the next image.

    If several query heads share a key head, policies see the queries of all of them.

    `slots` is the cache itself, once the prompt is in; its `index` L B H S says which tokens are held. A copy
    (`copy.deepcopy`) shares the model; a file (`torch.save`) has the slots only, and `attach` gives what is loaded its
    model back. Raises UserError if the model, the grid or the order of tokens does not fit. What is refused before a
    layer has attended leaves the cache as it was.
    """

    def __init__(self, model: nn.Module, grid: tuple[int, int] | Grid, plan: CachePlan, prompt: int | None = None):
        # Not the base class's, which makes a list of layers: see `layers`.
        self.layer_class_to_replicate, self.offloading = None, False
        self.grid, self.plan = _grid(grid), plan
        if not plan.mib:  # else the number of sequences decides
            plan.in_lines(self.grid).check(self.grid)
        self.prompt: int | None = None
        self._choose()
        self.reset(prompt)
        self.attach(model)

    def _choose(self) -> None:
        self._handle = torch.tensor(next(NUMBERS))  # a tensor, as a compiled model would be compiled anew for a number
        CACHES[int(self._handle)] = self
        self.policy = get_policy(self.plan.policy)
        self._reads = self.policy.reads | ({"ahead"} if self.plan.release == "fold" else set())

    def attach(self, model: nn.Module) -> None:
        """Use this model, switching its attention; for a cache that was loaded from a file."""
        decoder = _switch(model, self.grid)
        if "ahead" in self._reads and not _rotates(decoder):
            raise UserError(
                f"model: this plan looks ahead by rotating queries, and how {type(decoder).__name__} rotates "
                "them is not known; choose another policy, with release strict or lazy."
            )
        layers = decoder.config.num_hidden_layers
        if self.slots is not None and self.slots.shape.layers != layers:
            raise UserError(f"model: it has {layers} layers and the cache holds {self.slots.shape.layers}.")
        self._model: nn.Module | None = model
        self._decoder: PreTrainedModel | None = decoder
        self._layers = layers

    def reset(self, prompt: int | None = None) -> None:
        """Drop the image; the next forward pass is a prompt.

        prompt  how many tokens it has; None: as many as announced before, if any were
        """
        if prompt is not None:
            self.prompt = _length(prompt)
        self.slots: Slots | None = None
        # Keys and values B H T D a layer: of a prompt that is not complete, then of tokens after the last line.
        self._loose: list[tuple[Tensor, Tensor]] = []
        self._prompted = 0  # tokens of the prompt so far
        self._fed = 0  # tokens since
        self._stage = "prompt"  # what the tokens of this forward pass are: prompt, line or closing
        self._index = self._column = torch.empty(0, dtype=torch.int64)  # of the tokens in this forward pass
        self._announced = self._attended = 0  # layers of this forward pass
        self._resumed = False  # this forward pass is the first of a `generate`

    def guidance(
        self, scale: float, negative_ids: Tensor | None = None, negative_mask: Tensor | None = None
    ) -> UnbatchedClassifierFreeGuidanceLogitsProcessor:
        """Guidance for one ordinary `generate`, as its `guidance_scale` and `negative_prompt_ids`, in a line cache.

            model.generate(ids, cache=cache, logits_processor=[cache.guidance(3.0, negative_ids)])

        `generate` would compute the negative prompt's sequence in a full cache of its own. Here it has a line cache
        with the same grid and plan, `processor.line_cache`.

        scale          1: none
        negative_ids   B N; None: the last token of the prompt
        negative_mask  B N, 0 for padding; None: there is none
        """
        if self._model is None:
            raise UserError(NO_MODEL)
        processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, self._model, negative_ids, negative_mask)
        processor.line_cache = LineCache(self._model, self.grid, self.plan)
        processor.unconditional_context[CACHE_ARGUMENT] = processor.line_cache
        return processor

    @property
    def _held(self) -> Slots:
        assert self.slots is not None, "the prompt is not in yet"
        return self.slots

    @property
    def nbytes(self) -> int:
        """Keys and values as allocated; 0 before the prompt."""
        slots = 0 if self.slots is None else self.slots.nbytes
        return slots + sum(k.nbytes + v.nbytes for k, v in self._loose)

    # -- copies and files --------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> LineCache:
        for shared in (self._model, self._decoder):
            memo[id(shared)] = shared
        memo[id(self)] = copied = object.__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied._choose()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in PASSING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = self._decoder = None
        self._choose()

    # -- what transformers calls --------------------------------------------------------------------------------------

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys, rotated, and values, B H T D; return them marked, so that `attend` finds us."""
        if not torch.compiler.is_compiling():
            self._announce(layer_idx)
        key_states.line_cache = self  # type: ignore[attr-defined]  # the mark by which `line_attention` finds us
        return key_states, value_states

    def _announce(self, layer: int) -> None:
        """A layer's keys are on their way to `attend`."""
        if self._decoder is None:
            raise UserError(NO_MODEL)
        if layer != self._announced:
            raise UserError(
                f"cache: layer {layer} comes where layer {self._announced} is due; a forward was broken off, or "
                "not every layer keeps keys; call reset() and begin the image again."
            )
        if self._announced != self._attended:
            raise UserError(
                f"model: layer {self._attended} did not attend through the line cache, so this model does not use the "
                "attention that its config names; a line cache cannot serve it."
            )
        if (found := self._decoder.config._attn_implementation) != NAME:
            raise UserError(
                f"model: its attention was changed to '{found}' after the LineCache was made; make a new one after the "
                "last change."
            )
        self._announced += 1

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, held or not: positions continue from here."""
        return self._prompted + self._fed

    def get_mask_sizes(self, query_length: int | Tensor, layer_idx: int = 0) -> tuple[int, int]:
        """Number of keys that a mask would cover. transformers 4 passes the new tokens' positions, 5 their number."""
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        if new == 0:
            raise UserError(
                f"cache: no new token comes, as {self.get_seq_length()} are in the cache already; call reset() before "
                "another prompt, or pass all tokens so far and their attention mask to go on."
            )
        return self.get_seq_length() + new, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """The most tokens a sequence may have: -1, no maximum, as tokens that close an image are kept in full."""
        return -1

    get_max_cache_shape = get_max_length  # its name up to 5.12

    @property
    def is_initialized(self) -> bool:
        return self.slots is not None

    @property
    def is_compileable(self) -> bool:
        return False  # lines end on the host; `generate` must not compile the model of its own accord

    @property
    def is_croppable(self) -> bool:
        return False  # overwritten tokens are gone

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._layers

    is_linear = is_dummy = is_sliding  # every layer keeps keys

    @property
    def batch_size(self) -> int:
        """Sequences in the cache; -1 before the prompt."""
        if self.slots is not None:
            return self.slots.rows
        return self._loose[0][0].shape[0] if self._loose else -1

    max_batch_size = batch_size  # its name up to 5.12

    @property
    def _is_user_defined(self) -> bool:
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:  # which `generate` does when it begins, from 5.23 on
        self._resumed = True

    @property
    def max_cache_len(self) -> int:
        """Refused: only static caches have it, and peft asks for it to put a cache of its own in our place."""
        raise RefusedAttribute(f"cache: a line cache has no max_cache_len; {PREFIX_TUNING}")

    @property
    def layers(self) -> list[Layer]:
        """A description of each layer, as the base class and others go through them; their slots are in `slots`."""
        return [Layer(self.is_initialized) for _ in range(self._layers)]

    def __len__(self) -> int:
        return self._layers

    def __repr__(self) -> str:
        return f"LineCache({self.grid.rows} x {self.grid.cols}, {self.plan})"

    def _refuse_rows(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            "cache: the rows of a line cache stay as they are; use num_beams=1 and the same batch from the prompt on."
        )

    def crop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused, even within a line: assisted generation feeds drafts across the end of a line, where we evict."""
        raise UserError(
            "cache: a line cache cannot take back tokens that it was fed, because it evicts at the end of a line; "
            "generate without assistant_model and prompt_lookup_num_tokens."
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse_rows

    def _refuse_states(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError("cache: a line cache holds keys and values only; this model keeps states of another kind.")

    get_conv_state = update_conv_state = get_recurrent_state = update_recurrent_state = _refuse_states
    has_previous_state = update_indexer = _refuse_states

    def _refuse_device(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UserError(
            "cache: its slots are made when the prompt is in, on the model's device, and stay there; they cannot be "
            "made earlier or moved to another."
        )

    early_initialization = offload = prefetch = _refuse_device

    def __getitem__(self, layer_idx: int) -> NoReturn:
        raise UserError("cache: its slots are not in the order of the tokens; read LineCache.slots, and slots.index.")

    __iter__ = None  # of transformers 4; there is nothing to go through

    # -- a forward pass ----------------------------------------------------------------------------------------------

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        positions: Tensor | None = None,
        scaling: float | None = None,
        covered: int | None = None,
    ) -> Tensor:
        """Write one layer's k, v B H T D to its slots and attend with q B Q T D, Q a multiple of H -> B T Q D.

        mask       of the prompt: B 1 T S, bool or added to the scores; None: causal
        positions  B T, where the tokens stand, if that is known
        covered    tokens that the mask was made for, if they are too few
        """
        layer = self._attended
        if layer == 0:
            try:
                self._check(k, v, mask, positions, covered)
                self._place(k)
            except UserError:
                self._announced = 0  # nothing has been written
                raise
            self._begin(q, k)
        if self.slots is not None and k.device != (device := self.slots.bias.device):
            raise UserError(f"model: its layers lie on {device} and {k.device}; put them on one device.")
        if self._stage == "prompt":
            keys, values = self._append(layer, k, v)
            if self.slots is not None:
                self.slots.write_prompt(layer, keys, values, _prompt_weights(mask, keys))
            shared = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1])
            out: Tensor = sdpa_attention_forward(shared, q, keys, values, mask, scaling=scaling)[0]
        else:
            out = self._attend_slots(layer, _scaled(q, scaling), k, v)
        self._attended += 1
        if self._attended == self._layers:
            self._end()
        return out

    def _check(self, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None, covered: int | None) -> None:
        """Refuse what a line cache cannot serve, wherever the tokens belong."""
        if getattr(_peft(self._model), "peft_type", None) in REPLACES_CACHES:
            raise UserError(f"cache: a line cache does not work with it, as {PREFIX_TUNING}")
        if torch.is_grad_enabled() and k.requires_grad:
            raise UserError("cache: slots are written over, so gradients are lost; decode under torch.no_grad().")
        if v.shape != k.shape:
            raise UserError(
                f"model: keys have {k.shape[3]} numbers a head and values {v.shape[3]}; a line cache needs equal."
            )
        if covered is not None:
            raise UserError(
                f"attention_mask: it ends after {covered} tokens, and with these there are "
                f"{self.get_seq_length() + k.shape[2]}; call reset() before another prompt, or pass the mask of all "
                "tokens so far."
            )
        if self._resumed and self.slots is not None and mask is None:
            self._check_position(positions)
        self._resumed = False

    def _check_position(self, positions: Tensor | None) -> None:
        """Refuse a `generate` that begins again with another prompt, one token of which is left over as an image token.

        positions  B T, as `generate` counts them for prompts without padding
        """
        due = self.get_seq_length()
        if positions is not None and positions.ndim == 2 and (first := int(positions[0, 0])) != due:
            raise UserError(
                f"cache: generate goes on at token {first}, and {due} are in the cache; call reset() before another "
                "prompt, or pass all tokens so far."
            )

    def _place(self, k: Tensor) -> None:
        """Find out where the tokens of this forward pass belong; refuse those that belong nowhere.

        k  B H T D, the first layer's keys
        """
        rows, heads, count, dim = k.shape
        if self.batch_size not in (rows, -1):
            raise UserError(
                f"cache: it holds {self.batch_size} sequences and {rows} are fed; call reset() before another batch."
            )
        if self.slots is None:
            prompt = self.prompt or count
            if self._prompted + count > prompt:
                raise UserError(
                    f"cache: {count} tokens come where {prompt - self._prompted} of a prompt of {prompt} are due; feed "
                    "the prompt to its end before any image token, or announce its true length with reset(prompt=...)."
                )
            self._stage, self._column = "prompt", torch.arange(count)
            return
        shape = self.slots.shape
        if (found := (heads, dim, k.dtype)) != (held := (shape.heads, shape.head_dim, self.slots.bias.dtype)):
            raise UserError(f"model: heads, size and type of its keys are {found}, and of those in the cache {held}.")
        if count > 1 and getattr(_peft(self._model), "is_prompt_learning", False):
            raise UserError(
                f"model: {count} tokens come where one is due, as peft feeds its virtual tokens with each; it does not "
                f"find a cache under the name {CACHE_ARGUMENT}=, so use a newer peft, or transformers before 5.24."
            )
        if count > 1 and self.prompt is None:
            raise UserError(
                f"cache: {count} tokens come at once after a prompt of {self._prompted}; call reset() before another "
                "prompt. If they are the rest of the prompt or several image tokens, announce how many tokens the "
                "whole prompt has: LineCache(..., prompt=...) or reset(prompt=...)."
            )
        stride, left = self.grid.stride, self.grid.tokens - self._fed
        if count > max(left, 1):
            raise UserError(
                f"grid: {self.grid.rows} x {self.grid.cols} ends after {self.grid.tokens} tokens, and {self._fed} are "
                f"in the cache when {count} more come; call reset() before another image, or give the model's grid."
            )
        column = self._fed % stride
        if left > 0 and column + count > (end := next(n for n in self._ends() if n > column)):
            raise UserError(
                f"cache: {count} tokens come at column {column} of a line of {stride}, and after column {end} room has "
                f"to be made for more; feed {end - column} or fewer, and call reset() before another prompt."
            )
        self._stage = "line" if left > 0 else "closing"
        self._column = torch.arange(column, column + count, device=k.device)

    def _begin(self, q: Tensor, k: Tensor) -> None:
        """Make the slots when the prompt is complete; evict when a line is."""
        count = len(self._column)
        if self._stage == "prompt" and self.prompt in (None, self._prompted + count):
            rows, heads, _, dim = k.shape
            prompt = self._prompted + count
            shape = CacheShape(self._layers, heads, dim, prompt, k.element_size(), q.shape[1] // heads)
            grid = self.grid.after(prompt)
            plan = self.plan.resolve(shape, grid, rows)
            plan.check(grid)
            with torch.inference_mode(False):  # an image that is begun in inference mode may go on without it
                self.slots = Slots(
                    shape,
                    rows,
                    grid,
                    plan,
                    dtype=k.dtype,
                    device=k.device,
                    reads=self._reads,
                )
        elif self._stage == "line":
            row, column = divmod(self._fed, self.grid.stride)
            if column == 0 and row > 0:
                room_after(self._held, self.policy, self._rotate, row - 1, self.grid.stride)
            elif column in self._ends()[:-1]:
                room_after(self._held, self.policy, self._rotate, row, column)
            self._index = self._column + self._held.grid.index(row)
            if count == 1:
                self._held.advance(self._index, self._column)
        elif self._stage == "closing" and self._fed == self.grid.tokens + self.grid.stride:
            warnings.warn(
                f"grid: {self.grid.rows} x {self.grid.cols} ended {self.grid.stride} tokens ago and more come; they "
                "are kept in full. If they belong to the image, give the model's grid; call reset() before another "
                "image.",
                stacklevel=2,
            )

    def _ends(self) -> list[int]:
        """Where room is made in the line that the next token belongs to."""
        return self._held.plan.ends(self.grid, self._fed // self.grid.stride)

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the layer that lie in no slot yet, with the new ones; kept unless the slots take them."""
        if layer < len(self._loose):
            k, v = (torch.cat(pair, 2) for pair in zip(self._loose[layer], (k, v), strict=True))
            self._loose[layer] = k, v
        elif self.slots is None or self._stage == "closing":
            self._loose.append((k.clone(), v.clone()))
        return k, v

    def _attend_slots(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slots = self._held
        if self._stage == "closing":
            loose = self._append(layer, k, v)
            keys, values, bias = slots.read(layer)
            keys, values = (torch.cat(pair, 2) for pair in zip((keys, values), loose, strict=True))
            out = attention.attend(q, keys, values, torch.nn.functional.pad(bias, (0, loose[0].shape[2])))
        elif len(self._column) == 1:
            slots.write(layer, self._column, k, v, q)
            out = slots.attend(layer, q)
        else:
            out = attention.attend(q, *slots.feed(layer, self._column, k, v, q))
        return out.transpose(1, 2).contiguous()

    def _rotate(self, queries: Tensor, lines: int, columns: int) -> Tensor:
        """Rotated queries L B H C D as they would be so many lines further down and columns to the right."""
        assert self._decoder is not None
        return _rotated(self._decoder, queries, lines * self.grid.stride + columns)

    def _end(self) -> None:
        """Finish the forward pass: every layer has its tokens."""
        self._announced = self._attended = 0
        if self._stage == "prompt":
            self._prompted += len(self._column)
            if self.slots is not None:
                self.slots.extend()
                self._loose = []
            return
        if self._stage == "line" and len(self._column) > 1:
            self._held.advance(self._index, self._column)
        self._fed += len(self._column)


class Layer:
    """One layer of a line cache, as transformers describes those of its own caches. Other names are refused."""

    is_sliding = is_compileable = is_croppable = supports_early_init = False

    def __init__(self, is_initialized: bool):
        self.is_initialized = is_initialized

    def __getattr__(self, name: str) -> NoReturn:
        raise RefusedAttribute(f"cache: a layer of a line cache has no {name}; all layers are in LineCache.slots.")


class RefusedAttribute(UserError, AttributeError):
    """A sentence for who reads the attribute, and a plain no for `hasattr`."""


def _unsuited(cache: LineCache, given: dict[str, Any]) -> str:
    """What a line cache cannot serve among the arguments that a model gives to its attention; empty if it can."""
    if given.get("dropout"):
        return "model: it is in training mode; call model.eval() before generating."
    if foreign := [name for name in FOREIGN if given.get(name) is not None]:
        return f"model: its attention uses {foreign[0]}, which a line cache does not know."
    if second := [name for name, value in given.items() if isinstance(value, Cache) and value is not cache]:
        return f"cache: another cache comes beside it, as {second[0]}=; {PREFIX_TUNING}"
    return ""


def line_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function of the model: a LineCache's own for its keys, transformers' "sdpa" for all others."""
    cache: LineCache | None = getattr(key, "line_cache", None)
    if cache is None:
        # Models pass on arguments that they do not know, so a cache under another name arrives here, unused.
        if unknown := [name for name, given in kwargs.items() if isinstance(given, LineCache)]:
            raise UserError(f"cache: this model takes its cache as {CACHE_ARGUMENT}=, not as {unknown[0]}=.")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if why := _unsuited(cache, kwargs):
        cache._announced = cache._attended  # nothing has been written
        raise UserError(why)
    covered = getattr(attention_mask, "covered", None)
    given = query, key, value, attention_mask, kwargs.get("position_ids"), kwargs.get("scaling"), covered
    if torch.compiler.is_compiling():
        return torch.ops.linear_core.line_attention(cache._handle, *given), None
    return cache.attend(*given), None


# A compiled model calls the cache without looking inside: what it read there, it would be compiled anew for.
CACHES: WeakValueDictionary[int, LineCache] = WeakValueDictionary()
NUMBERS = itertools.count()


@torch.library.custom_op(
    "linear_core::line_attention",
    mutates_args=(),
    schema="(Tensor handle, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? positions, float? scaling, "
    "SymInt? covered) -> Tensor",
)
def _compiled_attention(handle: Tensor, *given: Any) -> Tensor:
    cache = CACHES[int(handle)]
    cache._announce(cache._attended)
    return cache.attend(*given)


@_compiled_attention.register_fake
def _(handle: Tensor, q: Tensor, *given: Any) -> Tensor:
    rows, heads, count, dim = q.shape
    return q.new_empty(rows, count, heads, dim)


def line_mask(*args: Any, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """transformers' own mask for "sdpa"; marked if the tokens' mask is too short for them, which is filled up there."""
    mask: Tensor | None = sdpa_mask(*args, kv_length=kv_length, attention_mask=attention_mask, **kwargs)
    if mask is not None and attention_mask is not None and (covered := attention_mask.shape[-1]) < kv_length:
        mask.covered = covered  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(NAME, line_attention)
AttentionMaskInterface.register(NAME, line_mask)
# torch.load reads a line cache with weights_only=True, its default.
torch.serialization.add_safe_globals([LineCache, Slots, CacheShape, CachePlan, Grid, *STORAGE.values()])


def _grid(given: tuple[int, int] | Grid) -> Grid:
    if isinstance(given, Grid):
        return given
    try:
        rows, cols = given
    except (TypeError, ValueError) as error:
        raise UserError(f"grid: {given!r} is not a number of rows and one of columns, such as (24, 24).") from error
    return Grid(rows, cols)


def _length(prompt: int) -> int:
    try:
        length = operator.index(prompt)
    except TypeError:
        length = 0
    if length < 1:
        raise UserError(f"prompt: {prompt!r} is not a number of tokens; give the length of the prompt, 1 or more.")
    return length


def _peft(model: nn.Module | None) -> Any:
    """The settings of the adapter that is in use, if peft has wrapped the model or is generating with it."""
    wrapper = getattr(getattr(model, "prepare_inputs_for_generation", None), "__self__", None)
    return getattr(model, "active_peft_config", None) or getattr(wrapper, "active_peft_config", None)


def _switch(model: nn.Module, grid: Grid) -> PreTrainedModel:
    """Switch the decoder inside `model` to our attention and return it. Raises UserError if that cannot work."""
    if getattr(_peft(model), "peft_type", None) in REPLACES_CACHES:
        raise UserError(f"model: a line cache cannot serve it, as {PREFIX_TUNING}")
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
