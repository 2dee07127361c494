"""Compare."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..linear_core.errors import UserError
from ..linear_core.pictures.sheet import to_image
from ..linear_core.plan import CachePlan
from ..linear_core.prompts import Prompt
from . import host
from .live import COMPARE, SIZE, draw, report
from .sockets import CACHE, MODEL, PROMPT, Model, connected

OWN = -1  # in place of a number: what the model was published with


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = "-1: the model's own."
        return io.Schema(
            node_id="LineAR_Compare",
            display_name="Compare",
            category="LineAR",
            description="Draws the same seeds twice at the same time, with the full cache and with the few lines that "
            "Line Cache describes, and lays the two under a slider while they grow.",
            search_aliases=["a/b", "side by side", "full cache", "quality", "linear"],
            is_output_node=True,
            inputs=[
                MODEL.Input("model", tooltip="What draws, from Load AR Model."),
                CACHE.Input("cache", tooltip="The few lines, from Line Cache; compared with everything kept."),
                PROMPT.Input("prompt", tooltip="What to draw, from Class Prompt or Text Prompt."),
                io.Int.Input(
                    "seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True,
                    tooltip="Of both runs, so that only the cache differs. Picture i draws from seed + i.",
                ),
                io.Float.Input(
                    "guidance", default=OWN, min=OWN, max=30.0, step=0.1,
                    tooltip=f"How strongly the prompt is followed (classifier-free guidance scale). {own}",
                ),
                io.Float.Input(
                    "temperature", default=OWN, min=OWN, max=4.0, step=0.05, advanced=True,
                    tooltip=f"How freely tokens are drawn; 0: always the likeliest. {own}",
                ),
                io.Int.Input(
                    "top_k", default=OWN, min=OWN, max=65536, advanced=True,
                    tooltip=f"Draw from this many of the likeliest codes; 0: all. {own}",
                ),
                io.Float.Input(
                    "top_p", default=OWN, min=OWN, max=1.0, step=0.01, advanced=True,
                    tooltip=f"Draw from the likeliest codes that hold this share of the probability. {own}",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64,
                    tooltip="Pictures of each prompt. Both caches are in memory at the same time.",
                ),
                COMPARE.Input("view", tooltip="Left of the line: full cache. Right of it: few lines."),
            ],
            outputs=[
                io.Image.Output(display_name="image_full", tooltip="The pictures of the full cache."),
                io.Image.Output(display_name="image_few", tooltip="The pictures of the few lines, same seeds."),
                io.String.Output(display_name="report", tooltip="Memory, speed, and how many codes are the same."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        model: Model,
        cache: CachePlan,
        prompt: Prompt,
        seed: int,
        guidance: float,
        temperature: float,
        top_k: int,
        top_p: float,
        batch_size: int,
        view: str | None = None,
    ) -> io.NodeOutput:
        connected(model=model, cache=cache, prompt=prompt)
        model = model.with_grid(prompt.grid)
        image, info = model.image, model.image.info
        if not cache.evicts(info.grid):
            raise UserError("cache: this plan keeps every line, so both would be the same; choose fewer lines.")
        asked = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        sample = replace(info.defaults, seed=seed, **{name: value for name, value in asked.items() if not value < 0})
        cache.check(info.grid)
        image.decoder.check(prompt)
        prompt = prompt.repeat(batch_size)
        (full, few), begun, shown = draw(model, prompt, [CachePlan("full"), cache], sample, cls.hidden.unique_id)
        pictures = [model.pictures(run.tokens) for run in (full, few)]
        shown["linear_ar_pairs"] = [
            [host.keep_for_the_page(to_image(picture.cpu(), SIZE)) for picture in pair]
            for pair in zip(*pictures, strict=True)
        ]
        label = f"{cache.budget} of {info.grid.rows} lines"
        return io.NodeOutput(*pictures, report(full, few, begun, label), ui=shown)
