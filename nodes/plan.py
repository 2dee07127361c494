"""Line Cache."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from comfy_api.latest import io

from ..linear_core.errors import UserError
from ..linear_core.plan import PRESETS, RELEASES, STORAGES, CachePlan
from ..linear_core.policies import POLICIES, SCALE_POLICIES
from .inputs import checked
from .live import MEMORY
from .sockets import CACHE

CUSTOM = "Custom"
LINES, SHARE, MEMORY_MIB = "lines", "share", "MiB"


def _custom() -> list[io.Input]:
    plan = PRESETS["Balanced"]
    return [
        io.Combo.Input(
            "policy",
            options=[*POLICIES, *SCALE_POLICIES],
            default=plan.policy,
            tooltip="Decides which tokens are evicted. 'fold': those that another token can best stand in for. 'line': "
            "those that the line just finished attended to least (LineAR, as published). 'full': none. The others are "
            "published methods to compare with; see the help page. The last three are for VAR and Infinity alone.",
        ),
        io.Int.Input(
            "budget",
            default=plan.budget,
            min=1,
            max=256,
            tooltip="Lines of image tokens that the cache keeps when a line is complete. Typical: 4 of 24. Memory "
            "grows with it. With as many lines as the image has, or more, nothing is evicted. VAR and Infinity "
            "draw in scales and keep budget / 24 of the tokens.",
        ),
        io.Int.Input(
            "anchors",
            default=plan.anchors,
            min=0,
            max=4096,
            tooltip="First tokens of the image, which are never evicted. Typical: 4. Of VAR and Infinity, whole first "
            "scales.",
        ),
        io.Int.Input(
            "recent",
            default=plan.recent,
            min=0,
            max=255,
            tooltip="Newest complete lines, which are never evicted. Typical: 0 for 'fold'; 2 for LineAR as published. "
            "No effect with VAR and Infinity.",
        ),
        io.Combo.Input(
            "release",
            options=["auto", *RELEASES],
            default="auto",
            tooltip="What happens to evicted tokens. auto: fold for the policy 'fold', strict for all others. strict: "
            "they are dropped at once, as published. lazy: each stays visible until the next line overwrites it, the "
            "least useful first. fold: each is merged into the most similar kept token, which then counts for both. "
            "All take the same memory.",
        ),
        io.Combo.Input(
            "storage",
            options=list(STORAGES),
            default=plan.storage,
            tooltip="Precision of keys and values. full: as they are computed. int8: 8 bits, half the memory of half "
            "precision, with no visible loss of quality. int4: 4 bits and what they need, a third of the memory; on "
            "the bundled model, two lines in 4 bits are much closer to the full cache than one line in 8.",
        ),
    ]


class LineCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_LineCache",
            display_name="Line Cache",
            category="LineAR",
            description="Sets how much of the KV cache is kept while an image is generated, and which tokens are "
            "evicted.",
            search_aliases=["kv cache", "cache budget", "linear", "eviction", "compress cache"],
            inputs=[
                io.DynamicCombo.Input(
                    "preset",
                    options=[
                        *[io.DynamicCombo.Option(name, []) for name in PRESETS],
                        io.DynamicCombo.Option(CUSTOM, _custom()),
                    ],
                    tooltip="Balanced: 4 lines; evicted tokens are folded into the most similar ones. Small: 3 lines. "
                    "Smallest: 2 lines. Tiny: a twentieth of the cache, for Infinity. Compact: 2 lines in 8 bits. "
                    "LineAR: 4 lines, as in the paper; with the bundled model ten times as far from the full cache as "
                    "Balanced. Full: everything, as without this pack. Custom: your own settings. Lines are those of "
                    "an image of 24: VAR and Infinity, which draw in scales, keep the same share, 1/6 for 4 lines.",
                ),
                MEMORY.Input(
                    "memory",
                    tooltip="Memory that the connected Generate node will allocate for keys and values: 2 × layers × "
                    "sequences × heads × head size × (prompt + lines × tokens per line) × bytes per number. Sequences: "
                    "the number of images, doubled by guidance. VAR and Infinity: the tokens kept in each layer, and "
                    "room for one layer to draw the last scale. M-VAR: no cache, but a state of the same size at every "
                    "scale, whatever is chosen here.",
                    extra_dict={"presets": {name: asdict(plan) for name, plan in PRESETS.items()}},
                ),
                io.Combo.Input(
                    "budget_in",
                    options=[LINES, SHARE, MEMORY_MIB],
                    default=LINES,
                    optional=True,
                    tooltip="What amount counts. lines: lines of image tokens. share: how much of the full cache is "
                    "kept. MiB: memory for all images of the batch together; as many lines or tokens are kept as fit "
                    "into it. The line above shows all three.",
                ),
                io.Float.Input(
                    "amount",
                    default=0.0,
                    min=0.0,
                    max=float(2**24),
                    step=0.01,
                    round=0.0001,
                    optional=True,
                    tooltip="The budget, in place of the preset's (Full keeps everything all the same). 0: the "
                    "preset's own. Lines: 4. Share: 1/6 or 0.15, for 15 %. MiB: 2048, for 2 GiB.",
                ),
            ],
            outputs=[CACHE.Output(display_name="cache", tooltip="For Generate and Compare.")],
        )

    @classmethod
    @checked
    def execute(
        cls, preset: dict[str, Any], memory: str | None = None, budget_in: str = LINES, amount: float = 0.0
    ) -> io.NodeOutput:
        settings = dict(preset)
        name = settings.pop("preset")
        plan = CachePlan(**settings) if name == CUSTOM else PRESETS[name]
        if amount:
            plan = replace(plan, **{"share": 0.0, "mib": 0.0, **_budget(budget_in, amount)})
        return io.NodeOutput(plan)


def _budget(budget_in: str, amount: float) -> dict[str, Any]:
    """The setting of CachePlan that states this budget."""
    if budget_in == MEMORY_MIB:
        return {"mib": amount}
    if budget_in == SHARE:
        if amount > 1:
            raise UserError(
                f"amount: {amount:g} is more than the whole cache; for {amount:g} % write {amount / 100:g}."
            )
        return {"share": amount}
    if amount != int(amount):
        raise UserError(f"amount: {amount:g} is no whole number of lines; choose 1 or more, or set budget_in to share.")
    return {"budget": int(amount)}
