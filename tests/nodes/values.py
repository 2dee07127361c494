"""Values that a stranger's workflow may bring: for every widget of every node out of range, of the wrong type, missing;
and whatever other nodes may bring through a link, which ComfyUI holds to nothing.

One graph has every node; a case changes one value in it. `host` says what becomes of a value in ComfyUI before a node
runs, as test_host.py finds it in a real one; test_values.py does without.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

SCHEMAS = json.loads((Path(__file__).parents[1] / "fixtures" / "object_info.json").read_text(encoding="utf-8"))
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
MISSING = "(missing)"

GRAPH: dict[str, dict[str, Any]] = {
    "LineAR_LoadModel": {
        "model": "landscapes (bundled)", "tokenizer": "automatic", "grid_rows": 0, "grid_cols": 0,
        "weight_dtype": "default", "stream_weights": False,
    },
    "LineAR_LineCache": {
        "preset": "Custom", "preset.policy": "line", "preset.budget": 4, "preset.anchors": 4, "preset.recent": 2,
        "preset.release": "auto", "preset.storage": "full", "memory": "", "budget_in": "lines", "amount": 3.0,
    },
    "LineAR_ClassPrompt": {"model": "LineAR_LoadModel", "class_name": "alpine dawn", "more_classes": ""},
    "LineAR_TextPrompt": {
        "text_encoder": "flan-t5-xl", "text": "a fox", "negative_text": "", "size": "of Lumina-mGPT 768",
        "size.pixels": "768 x 768", "model": "LineAR_LoadModel",
    },
    "LineAR_Generate": {
        "model": "LineAR_LoadModel", "cache": "LineAR_LineCache", "prompt": "LineAR_ClassPrompt", "seed": 5,
        "guidance": 1.0, "temperature": -1.0, "top_k": -1, "top_p": -1.0, "batch_size": 1, "guidance_interval": -1,
        "keep_rows": 0, "stop_after": 1, "view": "", "drafts": 0, "seeds": "",
        "candidates": 1, "drafter_scales": 0, "smooth": False,
    },
    "LineAR_MaskedGenerate": {
        "model": "LineAR_LoadModel", "prompt": "LineAR_ClassPrompt", "seed": 5, "guidance": 1.0, "steps": 8,
        "batch_size": 1, "step_cache": "Custom", "step_cache.refresh": 2, "step_cache.rule": "oldest",
        "step_cache.full_every": 4, "step_cache.full_first": 2, "step_cache.full_last": 1, "image": "LineAR_Decode",
        "denoising": 4, "denoising_last": 2, "start": 952, "guidance_schedule": "linear", "temperature": 1.0,
        "seeds": "",
    },
    "LineAR_Decode": {"model": "LineAR_LoadModel", "tokens": "LineAR_Generate"},
    "LineAR_RetentionHeatmap": {
        "tokens": "LineAR_Generate", "image": "LineAR_Decode", "strength": 0.7, "size": 96, "show": "after a row",
        "show.row": 1,
    },
    "LineAR_EncodeImage": {"model": "LineAR_LoadModel", "image": "LineAR_Decode"},
    "LineAR_Compare": {
        "model": "LineAR_LoadModel", "cache": "LineAR_LineCache", "prompt": "LineAR_ClassPrompt", "seed": 5,
        "guidance": 1.0, "temperature": -1.0, "top_k": -1, "top_p": -1.0, "batch_size": 1, "view": "",
        "seeds": "",
    },
    "LineAR_PickBest": {
        "images": "LineAR_Decode", "each": 0, "keep": 1, "by": "prompt match", "model": "LineAR_LoadModel",
        "prompt": "LineAR_ClassPrompt", "text": "",
    },
    "LineAR_DownloadModel": {"release": "vq_ds16_c2i", "with_needed": False},
    "LineAR_Doctor": {},
}  # fmt: skip
WRONG = {
    "INT": ["three", None, {}, [1, 2, 3], float("nan"), float("inf")],
    "FLOAT": ["three", None, {}, [1, 2, 3], float("nan"), float("inf")],
    "COMBO": ["no such thing", "", None, 7, [1, 2, 3], {}],
    "BOOLEAN": ["maybe", None, 7, [1, 2, 3]],
    "STRING": [None, 7, {}, [1, 2, 3]],
    DYNAMIC: ["no such thing", "", None, 7, [1, 2, 3], {}],
}
OURS = ["nonsense", 7, None, [1, 2, 3], {}]  # for widgets that our page draws
SOCKET = ["LineAR_Nothing", 7, None, "text", {}]


@dataclass(frozen=True)
class Case:
    """One input of a node with another value, and what the schema says of the input."""

    node: str
    name: str
    value: Any
    kind: str
    options: Any
    required: bool

    def __str__(self) -> str:
        return f"{self.node.removeprefix('LineAR_')}.{self.name}={self.value!r}"

    @property
    def prompt(self) -> dict[str, Any]:
        """What to post to ComfyUI: the node with this value, all that it needs, and something that shows it."""
        prompt, needed = {}, [self.node]
        while needed:
            node = needed.pop()
            given = self.inputs if node == self.node else GRAPH[node]
            links = {name: v for name, v in given.items() if isinstance(v, str) and v in GRAPH}
            prompt[node] = {"class_type": node, "inputs": given | {name: [v, 0] for name, v in links.items()}}
            needed += [v for v in links.values() if v not in prompt]
        if not SCHEMAS[self.node]["output_node"]:
            prompt["end"] = {"class_type": "PreviewAny", "inputs": {"source": [self.node, 0]}}
        return prompt

    @property
    def inputs(self) -> dict[str, Any]:
        """Of the node, with this value."""
        given = copy.deepcopy(GRAPH[self.node])
        if self.value is MISSING:
            del given[self.name]
        else:
            given[self.name] = self.value
        return given


def declared(schema: dict[str, Any], given: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, Any, bool]]:
    """Name, type, options and whether it is required, of each input that a node has, those of a chosen option too."""
    for group in ("required", "optional"):
        for name, (kind, *more) in schema.get(group, {}).items():
            options = more[0] if more else {}
            yield prefix + name, kind, options, group == "required"
            if kind == DYNAMIC:
                for option in options["options"]:
                    if option["key"] == given.get(prefix + name):
                        yield from declared(option["inputs"], given, f"{prefix}{name}.")


def cases() -> Iterator[Case]:
    for node, given in GRAPH.items():
        for name, kind, options, required in declared(SCHEMAS[node]["input"], given):
            socket = (
                given.get(name, "").startswith("LineAR_") if isinstance(given.get(name), str) else name not in given
            )
            values = SOCKET if socket else OURS if options.get("socketless") else list(WRONG[kind])
            if kind in ("INT", "FLOAT"):
                values = [*values, options["min"] - 1, options["max"] + 1]
            for value in [*values, *([MISSING] if name in given else [])]:
                yield Case(node, name, value, kind, options, required)


# ComfyUI leaves the check of these to the node.
OWN_CHECK = {
    ("LineAR_LoadModel", "model"),
    ("LineAR_LoadModel", "tokenizer"),
    ("LineAR_TextPrompt", "text_encoder"),
    ("LineAR_TextPrompt", "size"),
}
CONVERT = {"INT": int, "FLOAT": float, "STRING": str, "BOOLEAN": bool}


def host(case: Case, given: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The node's inputs (the graph's, or `given`) as ComfyUI hands them over; None where its own check catches the
    value."""
    given, value = dict(given or case.inputs), case.value
    if case.kind == DYNAMIC and value not in [option["key"] for option in case.options["options"]]:
        return {name: v for name, v in given.items() if name.partition(".")[0] != case.name}  # left out without a word
    if value is MISSING:
        return None if case.required else given
    if isinstance(value, list):
        return None
    try:
        given[case.name] = value = CONVERT.get(case.kind, lambda kept: kept)(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if (case.node, case.name) in OWN_CHECK:
        return given
    if "min" in case.options and (value < case.options["min"] or value > case.options["max"]):
        return None
    if case.kind == "COMBO" and value not in case.options["options"]:
        return None
    return given


def nested(node: str, given: dict[str, Any]) -> dict[str, Any]:
    """As nodes get them, what belongs to a choice in one: "preset" and "preset.budget" are one dictionary."""
    made = {name: value for name, value in given.items() if "." not in name}
    for name, kind, *_ in declared(SCHEMAS[node]["input"], {}):
        if kind == DYNAMIC and name in given:
            inner = {key.partition(".")[2]: value for key, value in given.items() if key.startswith(f"{name}.")}
            made[name] = {name: given[name], **inner}
    return made


# -- through links -----------------------------------------------------------------------------------------------------

TYPED = {  # by type of input: what is taken, and for what; `given` is what the graph above has there
    "INT": lambda given: [
        (given, given), (np.int64(given), given), (np.int32(given).astype(np.int16), given), (float(given), given),
        (np.float32(given), given), (str(given), given), (f" {given}.0 ", given), (torch.tensor(given), given),
        (torch.tensor(float(given), dtype=torch.bfloat16), given), (np.array(given), given), (Fraction(given), given),
        (Decimal(given), given),
    ],
    "FLOAT": lambda given: [
        (given, given), (np.float64(given), given), (np.float32(given), float(np.float32(given))), (str(given), given),
        (f"{given:e}", given), (torch.tensor(given, dtype=torch.float64), given), (np.array(given), given),
        (Fraction(given), given), (Decimal(given), given), (np.int8(1), 1.0), (1, 1.0), ("1", 1.0),
        (torch.tensor(1), 1.0),
    ],
    "COMBO": lambda given: [(given, given), (np.str_(given), given), (np.array(given), given)],
    "BOOLEAN": lambda given: [
        *((value, True) for value in (True, 1, 1.0, np.True_, np.int64(1), torch.tensor(True), "true", " True ")),
        *((value, False) for value in (False, 0, np.False_, torch.tensor(0), "false", "FALSE")),
    ],
    "STRING": lambda given: [
        (given, given), (np.str_("a fox"), "a fox"), (7, "7"), (2.5, "2.5"), (np.int64(7), "7"),
        ("a \ud800 fox", "a ? fox"),
    ],
    DYNAMIC: lambda given: [],
}  # fmt: skip
NO_NUMBER = [
    "three", "", "nan", "1e999", "0x10", "9" * 5000, "-" + "9" * 40, b"5", True, np.True_, torch.tensor(True),
    float("nan"), float("inf"), np.float32("nan"), 10**400, -(10**400), 1j, np.complex64(1), torch.tensor(1j),
    torch.tensor(float("nan")),
    torch.zeros((), device="meta"), torch.tensor([5]), np.array([5]), torch.zeros(1, 4, 4, 3), torch.zeros(2),
    np.array([1, 2]), np.array(["5"]), np.datetime64("2026-11-26"), [1, 2, 3], [5], (5,), {}, {"samples":
    torch.zeros(1)}, object(), print,
]  # fmt: skip
WORDS = [
    7,
    True,
    2.5,
    [1, 2, 3],
    ["a"],
    ("a",),
    {},
    b"a",
    torch.zeros(3),
    torch.tensor(7),
    np.array([1]),
    object(),
    print,
]
NO_TEXT = [True, [1, 2, 3], ["a fox"], ("a fox",), {}, b"a fox", torch.zeros(3), np.array(["a"]), 1j, object(), print]
UNLIKE = {
    "INT": [2.5, "2.5", np.float32(0.5), torch.tensor(1.5), Fraction(1, 3), Decimal("0.1"), *NO_NUMBER],
    "FLOAT": NO_NUMBER,
    "COMBO": ["no such thing", "", "a\0b", "\ud800", *WORDS],
    "BOOLEAN": ["maybe", "", 7, -1, 0.5, float("nan"), [True], {}, torch.zeros(3), "yes", object()],
    "STRING": NO_TEXT,
    DYNAMIC: ["no such thing", "", *WORDS],
}


def pictures(high: int = 12, wide: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """IMAGEs as other nodes make them, and what they are to a node of ours."""
    one = torch.linspace(0, 1, high * wide * 3).view(1, high, wide, 3)
    more = one * 1.2 - 0.1  # as bicubic resampling may leave it
    return [
        (one, one), (one.half(), one.half().float()), (one.bfloat16(), one.bfloat16().float()), (one.double(), one),
        (torch.cat([one, one[..., :1]], -1), one), (more, more.clamp(0, 1)), (one.flip(2).flip(2), one),
        (one.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3), one), ((one > 0.5), (one > 0.5).float()),
        ((one > 0.5).byte(), (one > 0.5).float()), (one[:, :1, :1], one[:, :1, :1]), (one[:, :, :1], one[:, :, :1]),
    ]  # fmt: skip


def no_pictures() -> list[Any]:
    one = torch.linspace(0, 1, 192).view(1, 8, 8, 3)
    spoilt = one.clone()
    spoilt[0, 3, 3, 1] = float("nan")
    endless = one.clone()
    endless[0, 3, 3, 1] = float("-inf")
    return [
        one[0], one[..., 0], one[..., 0, 0], one[None], one[..., :1], one[..., :2], one.repeat(1, 1, 1, 2), one[:0],
        one[:, :0], one[:, :, :0], one[..., :0], one.permute(0, 3, 1, 2), spoilt, endless, one * 255, (one *
        255).byte(),
        one * 4 - 2, one - 1, one.to(torch.complex64), one.numpy(), [one], [one, one], (one,), {"samples": one},
        torch.tensor(0.5),
        "picture.png", 7, True, object(),
    ]  # fmt: skip


def masks(high: int = 12, wide: int = 10) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """MASKs as other nodes make them, and what they are to a node of ours."""
    one = torch.linspace(0, 1, high * wide).view(1, high, wide)
    more, three = one * 1.2 - 0.1, one.expand(3, -1, -1)
    return [
        (one, one), (one.half(), one.half().float()), (one[0], one), (more, more.clamp(0, 1)),
        ((one > 0.5), (one > 0.5).float()), (three, three),
    ]  # fmt: skip


def no_masks() -> list[Any]:
    one = torch.linspace(0, 1, 64).view(1, 8, 8)
    spoilt = one.clone()
    spoilt[0, 3, 3] = float("nan")
    return [
        one[0, 0], one[None], one[..., None], one[:0], one[:, :0], spoilt, one * 255, one - 1, one * 1j, one.numpy(),
        [one], {"samples": one}, "mask.png", 7, True, object(), torch.tensor(0.5),
    ]  # fmt: skip


def sockets() -> Iterator[tuple[str, str, str, Any, bool]]:
    """Node, name, type, options and whether it is required, of every input that takes a link, the inner ones too."""
    for node, given in GRAPH.items():
        for name, kind, options, required in declared(SCHEMAS[node]["input"], given):
            if not options.get("socketless"):
                yield node, name, kind, options, required
