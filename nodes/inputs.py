"""From whatever comes through a link or stands in a widget to what a node needs, or one sentence that names the input.

ComfyUI checks what is typed into a widget against the schema, but not what comes through a link, which may be any
object. `checked` holds both to the same schema. What it takes:

    INT, FLOAT    any number, if nothing is lost: numpy's, a tensor of no dimensions, 3.0 for 3, the text "3". Not True.
    BOOLEAN       True and False, numpy's too, 0 and 1, the texts "true" and "false"
    STRING        texts and numbers
    COMBO         one of the choices
    IMAGE         B H W 3 from 0 to 1 in any dtype. A fourth channel, alpha, is dropped, and what resampling leaves
                  a little below 0 or above 1 is clamped.
    MASK          B H W, or H W of one, from 0 to 1 in any dtype
    our sockets   the object that belongs there
    None          an optional input that is not given
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Real
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..linear_core.errors import UserError, quoted
from ..linear_core.plan import CachePlan
from ..linear_core.prompts import Prompt
from .sockets import Model, Tokens

SOURCES = {
    "LINEAR_MODEL": (Model, "Load AR Model"),
    "LINEAR_CACHE": (CachePlan, "Line Cache"),
    "LINEAR_PROMPT": (Prompt, "Class Prompt or Text Prompt"),
    "LINEAR_TOKENS": (Tokens, "Generate or Encode Image"),
}
HOSTS = {"CLIP": (("tokenize", "encode_from_tokens"), "Load CLIP"),
         "CLIP_VISION": (("encode_image",), "Load CLIP Vision")}  # fmt: skip
OURS = {Model: "a model", CachePlan: "a cache", Prompt: "a prompt", Tokens: "image tokens"}
FILES = {"model", "tokenizer", "text_encoder"}  # choices that the nodes find for themselves, to say what is missing
OVERSHOOT = 0.25  # bicubic and Lanczos resampling leave 0 to 1 by up to a fifth


def checked(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a node's `execute`, which then gets what its schema says. Raises UserError with the input's name.

    What the schema does not know is left out, as ComfyUI does with what is typed.
    """

    @wraps(execute)
    def held(cls: type[io.ComfyNode], **given: Any) -> Any:
        return execute(cls, **_taken(cls.define_schema().inputs, given))

    return held


def _taken(entries: list[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    taken: dict[str, Any] = {}
    for entry in entries:
        value = given.get(entry.id, None if entry.optional else getattr(entry, "default", None))
        if getattr(entry, "socketless", None):  # what our page keeps; whoever reads it checks it
            taken[entry.id] = value
        elif value is not None:
            taken[entry.id] = _take(entry, value)
        elif not entry.optional:
            raise UserError(f"{entry.id}: there is no value; {_advice(entry)}.")
    return taken


def _take(entry: Any, value: Any) -> Any:
    kind = entry.io_type
    if kind in SOURCES:
        if not isinstance(value, SOURCES[kind][0]):
            raise _wrong(entry, value)
        return value
    if kind == "IMAGE":
        return _image(entry, value)
    if kind == "MASK":
        return _mask(entry, value)
    if kind in HOSTS:
        if not all(hasattr(value, name) for name in HOSTS[kind][0]):
            raise _wrong(entry, value)
        return value
    if kind == "COMFY_DYNAMICCOMBO_V3":
        return _choice(entry, value)
    value = _plain(value)
    if kind in ("INT", "FLOAT"):
        return _number(entry, value)
    if kind == "BOOLEAN":
        return _truth(entry, value)
    if kind == "COMBO":
        if not isinstance(value, str) or (value not in entry.options and entry.id not in FILES):
            raise _wrong(entry, value)
        return str(value)
    if kind == "STRING":
        if not isinstance(value, (str, Real)) or isinstance(value, bool):
            raise _wrong(entry, value)
        return _text(value)
    raise TypeError(f"{entry.id}: inputs of type {kind} are held to nothing yet")


def _plain(value: Any) -> Any:
    """A number of numpy's, or a tensor of one, as Python's; everything else as it is."""
    try:
        return value.item() if getattr(value, "ndim", None) == 0 else value
    except (RuntimeError, ValueError, TypeError, NotImplementedError):  # a tensor without values
        return value


def _number(entry: Any, value: Any) -> int | float:
    number = None
    if _counts(value):
        number = _whole(value) if entry.io_type == "INT" else _float(value)
    if number is None:
        raise _wrong(entry, value)
    if not entry.min <= number <= entry.max:
        raise UserError(f"{entry.id}: {found(value)} is out of range; {_advice(entry)}.")
    return number


def _counts(value: Any) -> bool:
    """Whether it may be a real number: a text, or what Python can make one of, but no tensor of several."""
    if isinstance(value, (str, Real)):
        return not isinstance(value, bool)
    return hasattr(value, "__float__") and not hasattr(value, "shape") and not isinstance(value, complex)


def _whole(value: Any) -> int | None:
    try:
        return int(value) if isinstance(value, str) else operator.index(value)  # exact, however large
    except (TypeError, ValueError):
        number = _float(value)
        return None if number is None or number != math.floor(number) else int(number)


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _truth(entry: Any, value: Any) -> bool:
    if isinstance(value, str):
        value = {"true": True, "false": False}.get(value.strip().lower(), value)
    if isinstance(value, Real) and value in (0, 1):
        return bool(value)
    raise _wrong(entry, value)


def _text(value: Any) -> str:
    """Halves of a character, as a cut text may have, become question marks: no tokenizer and no file takes them."""
    return str(value).encode("utf-8", "replace").decode()


def _choice(entry: Any, value: Any) -> dict[str, Any]:
    """A choice with settings of its own, as ComfyUI puts them together: {"preset": "Custom", "budget": 4, …}.

    Through a link comes the choice alone, and what is set beside it on the node is not handed over.
    """
    settings = value if isinstance(value, dict) else {entry.id: value}
    chosen = _plain(settings.get(entry.id))
    option = next((option for option in entry.options if isinstance(chosen, str) and option.key == chosen), None)
    if option is None:
        raise _wrong(entry, chosen)
    if option.inputs and not isinstance(value, dict):
        raise UserError(
            f"{entry.id}: '{option.key}' has settings, which a link does not bring along; choose it on the node."
        )
    return {entry.id: option.key, **_taken(option.inputs, settings)}


def _image(entry: Any, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != 4 or value.is_complex():
        mask = isinstance(value, Tensor) and value.ndim == 3
        raise _wrong(entry, value, " Convert Mask to Image makes a picture of a mask." if mask else "")
    if value.shape[-1] not in (3, 4) or not value.numel():
        raise _wrong(entry, value)
    return _pixels(entry, value[..., :3].float(), "picture")


def _mask(entry: Any, value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim not in (2, 3) or value.is_complex() or not value.numel():
        image = isinstance(value, Tensor) and value.ndim == 4
        raise _wrong(entry, value, " Convert Image to Mask makes a mask of a picture." if image else "")
    return _pixels(entry, value.float() if value.ndim == 3 else value.float()[None], "mask").cpu()


def _pixels(entry: Any, image: Tensor, what: str) -> Tensor:
    """In 0..1, or a UserError."""
    low, high = (float(end) for end in torch.aminmax(image))
    if not math.isfinite(low) or not math.isfinite(high):
        raise UserError(f"{entry.id}: some of its pixels are NaN or infinite; connect a {what} that shows.")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise UserError(
            f"{entry.id}: its pixels go from {low:.3g} to {high:.3g}; connect a {what} whose pixels are 0 to 1."
        )
    return image.clamp(0, 1)


# -- words -------------------------------------------------------------------------------------------------------------


def _wrong(entry: Any, value: Any, hint: str = "") -> UserError:
    return UserError(f"{entry.id}: found {found(value)}; {_advice(entry)}.{hint}")


def _advice(entry: Any) -> str:
    """What to do, by the type of the input."""
    kind = entry.io_type
    if kind in SOURCES:
        return f"connect {SOURCES[kind][1]}"
    if kind == "IMAGE":
        return "connect a node that outputs images, which are B x H x W x 3"
    if kind in HOSTS:
        return f"connect {HOSTS[kind][1]}"
    if kind == "MASK":
        return "connect a node that outputs masks, which are B x H x W"
    if kind in ("INT", "FLOAT"):
        what = "whole number" if kind == "INT" else "number"
        return f"choose a {what} from {_shown(entry.min)} to {_shown(entry.max)}"
    if kind == "BOOLEAN":
        return "choose true or false"
    if kind == "STRING":
        return "connect a node that outputs one text, or write it here"
    names = [option if isinstance(option, str) else option.key for option in entry.options]
    return f"choose one of {', '.join(names)}" if len(names) <= 32 else "choose one from the list"


def _shown(number: float) -> str:
    return f"{number:g}" if isinstance(number, float) else str(number)


def found(value: Any) -> str:
    """A value in a few words, whatever it is."""
    if value is None:
        return "nothing"
    if isinstance(value, str):
        return quoted(str(value))
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (bool, int, float)):
        return str(value)
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        sizes = " x ".join(map(str, shape)) or "one number"
        return f"{'a tensor' if isinstance(value, Tensor) else 'an array'} of {sizes}"
    if isinstance(value, (list, tuple, set)):
        return f"a list of {len(value)}"
    if isinstance(value, Mapping):
        return "a dictionary"
    return next((words for kind, words in OURS.items() if isinstance(value, kind)), f"a {type(value).__name__}")


def split_texts(text: str) -> list[str]:
    """Texts between lines of ---, without empty ones."""
    return [part.strip() for part in re.split(r"(?m)^\s*-{3,}\s*$", text) if part.strip()]
