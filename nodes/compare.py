"""Compare."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..linear_core.errors import UserError
from ..linear_core.loop.generate import Run
from ..linear_core.pictures.sheet import to_image
from ..linear_core.plan import MAX_SEED, CachePlan, parse_seeds
from ..linear_core.prompts import Prompt
from . import host
from .inputs import checked
from .live import COMPARE, MIB, SIZE, draw, report, resolve
from .loops import loop_of
from .sockets import CACHE, MODEL, PROMPT, Model, wants_generate

OWN = -1  # in place of a number: what the model was published with


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        own = "-1: the model's own value."
        return io.Schema(
            node_id="LineAR_Compare",
            display_name="Compare",
            category="LineAR",
            description="Generates images from the same seeds twice, with the full KV cache and with the few lines set "
            "in Line Cache, and shows both under a slider while they grow.",
            search_aliases=["a/b", "side by side", "full cache", "quality", "linear"],
            is_output_node=True,
            inputs=[
                MODEL.Input("model", tooltip="The model, from Load AR Model."),
                CACHE.Input("cache", tooltip="The cache to compare with the full one, from Line Cache."),
                PROMPT.Input("prompt", tooltip="What to generate, from Class Prompt or Text Prompt."),
                io.Int.Input(
                    "seed", default=0, min=0, max=MAX_SEED, control_after_generate=True,
                    tooltip="Used for both runs, so that only the cache differs. Image i of the batch uses seed + i.",
                ),
                io.Float.Input(
                    "guidance", default=OWN, min=OWN, max=30.0, step=0.1,
                    tooltip="Classifier-free guidance scale: how closely the image follows the prompt. "
                    f"1 or less: none. {own}",
                ),
                io.Float.Input(
                    "temperature", default=OWN, min=OWN, max=4.0, step=0.05, advanced=True,
                    tooltip=f"Sampling temperature. 0: always the most likely code. {own}",
                ),
                io.Int.Input(
                    "top_k", default=OWN, min=OWN, max=65536, advanced=True,
                    tooltip=f"Sample from only this many of the most likely codes. 0: all. {own}",
                ),
                io.Float.Input(
                    "top_p", default=OWN, min=OWN, max=1.0, step=0.01, advanced=True,
                    tooltip=f"Sample from the most likely codes whose probabilities add up to this. 1: all. {own}",
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=64,
                    tooltip="Images per class or text. Both caches are in memory at the same time.",
                ),
                COMPARE.Input("view", tooltip="Left of the slider: the full cache. Right: the few lines."),
                io.String.Input(
                    "seeds", default="", optional=True, advanced=True,
                    tooltip="A seed for each image of the batch, such as 3, 7, 100-103, in place of seed + i. Empty: "
                    "seed + i.",
                ),
                MODEL.Input(
                    "beside", optional=True,
                    tooltip="Another model for the left side, instead of the full cache: one with the same tokenizer "
                    "and picture size. M-VAR, which needs no cache, beside VAR of the same depth.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image_full", tooltip="The images from the full cache."),
                io.Image.Output(display_name="image_few", tooltip="The images from the few lines, same seeds."),
                io.String.Output(display_name="report", tooltip="Memory and speed of both runs, and the share of "
                                 "identical codes."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    @checked
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
        seeds: str = "",
        beside: Model | None = None,
    ) -> io.NodeOutput:
        wants_generate(model)
        if beside is not None:
            wants_generate(beside, "beside")
        model = model.with_grid(prompt.grid)
        image, info, loop = model.image, model.image.info, loop_of(model)
        asked = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        asked = {name: value for name, value in asked.items() if not value < 0}
        sample = replace(info.defaults, seed=seed, seeds=parse_seeds(seeds), **asked)
        if not info.cached:
            raise UserError(
                f"model: {info.name} keeps no cache, so there is no smaller one to compare; connect it to 'beside', "
                "and a model with a cache here."
            )
        image.check(prompt)
        if beside is not None:
            beside = _beside(beside.with_grid(prompt.grid), model)
            beside.image.check(prompt)
        prompt = prompt.repeat(batch_size)
        sample.image_seeds(prompt.rows)
        cache = resolve(model, cache, sample, prompt)
        if beside is None and not loop.evicts(cache):
            raise UserError(
                f"cache: it keeps every {loop.unit}, so both runs would be the same; choose a smaller budget."
            )
        (full, few), begun, shown, _ = draw(
            model, prompt, [CachePlan("full"), cache], sample, cls.hidden.unique_id, beside=beside
        )
        pictures = [model.pictures(run.tokens, loop.sides) for run in (full, few)]
        shown["linear_ar_pairs"] = [
            [host.keep_for_the_page(to_image(picture.cpu(), SIZE)) | {"run": begun.run} for picture in pair]
            for pair in zip(*pictures, strict=True)
        ]
        label, other = loop.budget(cache), ""
        if beside is not None:
            label, other = f"{info.name}, {label}", f"{beside.image.info.name}, {_memory(beside, full)}"
        return io.NodeOutput(*pictures, report(full, few, begun, label, other), ui=shown)


def _beside(beside: Model, model: Model) -> Model:
    """`beside` with the tokenizer of `model`. Raises UserError if their pictures cannot be drawn side by side."""
    one, other = beside.image, model.image
    if (one.info.grid, one.info.pyramid) != (other.info.grid, other.info.pyramid) or one.codebook != other.codebook:
        raise UserError(
            f"beside: {one.info.name} draws other codes or sizes than {other.info.name}; connect a model with the same "
            "tokenizer and picture size."
        )
    return replace(beside, image=replace(one, tokenizer=other.tokenizer), tokenizer=model.tokenizer)


def _memory(model: Model, run: Run) -> str:
    """What a run with everything kept took."""
    size = f"{run.lines[-1].cache_bytes / MIB:.1f} MiB"
    return f"full cache: {size}" if model.image.info.cached else f"no cache: a state of {size}"
