"""Line Cache."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from comfy_api.latest import io

from ..linear_core.errors import UserError
from ..linear_core.plan import PRESETS, RELEASES, STORAGES, CachePlan
from ..linear_core.policies import POLICIES
from .live import MEMORY
from .sockets import CACHE

CUSTOM = "Custom"


def _custom() -> list[io.Input]:
    plan = PRESETS["Balanced"]
    return [
        io.Combo.Input(
            "policy",
            options=list(POLICIES),
            default=plan.policy,
            tooltip="What decides which tokens leave. 'fold': those that a neighbour can stand in for. 'line': those "
            "that the line just drawn attended to least (LineAR, as published). 'full': none. The others are published "
            "methods to compare with; the help page names them.",
        ),
        io.Int.Input(
            "budget",
            default=plan.budget,
            min=1,
            max=128,
            tooltip="Lines of tokens that survive a line's end. Typical: 4 of 24. Memory grows with it; as many lines "
            "as the picture has, or more, is the full cache.",
        ),
        io.Int.Input(
            "anchors",
            default=plan.anchors,
            min=0,
            max=4096,
            tooltip="Tokens at the picture's start that always stay. Typical: 4.",
        ),
        io.Int.Input(
            "recent",
            default=plan.recent,
            min=0,
            max=127,
            tooltip="Newest whole lines that always stay. Typical: 0 with 'fold', which loses little by it; LineAR 2.",
        ),
        io.Combo.Input(
            "release",
            options=["auto", *RELEASES],
            default="auto",
            tooltip="auto: fold for the policy 'fold', strict for all others. strict: dropped tokens vanish at once, "
            "as published. lazy: each is seen until the next line overwrites it, least useful first. fold: each goes "
            "on in the kept token most like it, which then counts for both. All take the same memory.",
        ),
        io.Combo.Input(
            "storage",
            options=list(STORAGES),
            default=plan.storage,
            tooltip="full: keys and values as they are computed. int8: in a byte a number, except for the line being "
            "drawn; half to three quarters of the memory in half precision, at a cost in quality too small to see, and "
            "some in speed.",
        ),
    ]


class LineCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_LineCache",
            display_name="Line Cache",
            category="LineAR",
            description="Says how many lines of the key-value cache are kept while a picture is drawn, and which "
            "tokens those are.",
            search_aliases=["kv cache", "cache budget", "linear", "eviction", "compress cache"],
            inputs=[
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        *[io.DynamicCombo.Option(name, []) for name in PRESETS],
                        io.DynamicCombo.Option(CUSTOM, _custom()),
                    ],
                    tooltip="Balanced: 4 lines, folded: what leaves goes on in what is most like it. Small: 3 lines. "
                    "Smallest: 2 lines. LineAR: 4 lines as the paper keeps them; on the bundled model ten times as far "
                    "from the full cache as Balanced. Full: every line, as without this pack. Custom: your own "
                    "numbers.",
                ),
                MEMORY.Input(
                    "memory",
                    tooltip="Keys and values that the Generate node behind this one will allocate: 2 × layers × "
                    "sequences × heads × numbers a head × (prompt + lines × tokens a line) × bytes a number. "
                    "Sequences: pictures, twice with guidance.",
                    extra_dict={"presets": {name: asdict(plan) for name, plan in PRESETS.items()}},
                ),
            ],
            outputs=[CACHE.Output(display_name="cache", tooltip="For Generate.")],
        )

    @classmethod
    def execute(cls, preset: dict[str, Any] | None = None, memory: str | None = None) -> io.NodeOutput:
        if preset is None:  # what ComfyUI makes of a choice that there is not
            raise UserError(
                f"preset: it is missing or none that there is; choose one of {', '.join([*PRESETS, CUSTOM])}."
            )
        settings = dict(preset)
        name = settings.pop("preset")
        return io.NodeOutput(CachePlan(**settings) if name == CUSTOM else PRESETS[name])
