"""Values that a stranger's workflow may bring: for every widget of every node out of range, of the wrong type, missing.

One graph has every node; a case changes one value in it. `host` says what becomes of a value in ComfyUI before a node
runs, as test_host.py finds it in a real one; test_values.py does without.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMAS = json.loads((Path(__file__).parents[1] / "fixtures" / "object_info.json").read_text(encoding="utf-8"))
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"
MISSING = "(missing)"

GRAPH: dict[str, dict[str, Any]] = {
    "LineAR_LoadModel": {
        "model": "landscapes (bundled)", "tokenizer": "automatic", "grid_rows": 0, "grid_cols": 0,
        "weight_dtype": "default",
    },
    "LineAR_LineCache": {
        "preset": "Custom", "preset.policy": "line", "preset.budget": 4, "preset.anchors": 4, "preset.recent": 2,
        "preset.release": "auto", "preset.storage": "full", "memory": "",
    },
    "LineAR_ClassPrompt": {"model": "LineAR_LoadModel", "class_name": "alpine dawn", "more_classes": ""},
    "LineAR_TextPrompt": {
        "text_encoder": "flan-t5-xl", "text": "a fox", "negative_text": "", "size": "of Lumina-mGPT 768",
        "size.pixels": "768 x 768", "model": "LineAR_LoadModel",
    },
    "LineAR_Generate": {
        "model": "LineAR_LoadModel", "cache": "LineAR_LineCache", "prompt": "LineAR_ClassPrompt", "seed": 5,
        "guidance": 1.0, "temperature": -1.0, "top_k": -1, "top_p": -1.0, "batch_size": 1, "guidance_interval": -1,
        "keep_rows": 0, "stop_after": 1, "view": "",
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
    },
    "LineAR_DownloadModel": {"release": "vq_ds16_c2i", "with_needed": False},
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
