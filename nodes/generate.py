"""Generate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.events import codebooks_of
from ..linear_core.plan import AUTO, MAX_SEED, CachePlan, parse_seeds
from ..linear_core.prompts import Prompt
from . import live
from .inputs import checked
from .live import VIEW, draw, resolve
from .loops import Lines, Scales, loop_of
from .redraw import best_fills, check_fills, copies, kept_codes
from .sockets import CACHE, MODEL, PROMPT, TOKENS, Model, Tokens, wants_generate

OWN = -1  # in place of a number: what the model was published with


class Generate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_Generate",
            display_name="Generate",
            category="LineAR",
            description="Generates images line by line, or with VAR, M-VAR and Infinity scale by scale, with the KV "
            "cache set in Line Cache. M-VAR needs no cache, whatever is set. Finished rows or scales appear on the "
            "node; Stop takes effect within one.",
            search_aliases=[
                "autoregressive sampler",
                "sampler",
                "llamagen",
                "var",
                "infinity",
                "linear",
                "draw tokens",
            ],
            inputs=[
                MODEL.Input("model", tooltip="The model, from Load AR Model."),
                CACHE.Input("cache", tooltip="How much of the KV cache to keep, from Line Cache."),
                PROMPT.Input("prompt", tooltip="What to generate, from Class Prompt or Text Prompt."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Image i of a batch is the image that seed + i gives alone. Runs that differ only in their "
                    "cache use the same random numbers, so their images can be compared.",
                ),
                io.Float.Input(
                    "guidance",
                    default=float(OWN),
                    min=float(OWN),
                    max=30.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale: how closely the image follows the prompt. Typical: 2 to "
                    "5. 1 or less: none, which halves compute and cache. -1: the model's own value (bundled model 3; "
                    "LlamaGen 4 for classes, 7.5 for text; Janus 5; Lumina-mGPT 4; Anole 3; Emu3 and "
                    "U0 3; Emu3.5 2, Emu3.5-Image 5; VAR and M-VAR 5, growing from 1 at the first scale; Infinity 2B "
                    "4, 8B 3).",
                ),
                io.Float.Input(
                    "temperature",
                    default=float(OWN),
                    min=float(OWN),
                    max=4.0,
                    step=0.05,
                    tooltip="Sampling temperature. Typical: 1. Lower values vary less; 0 always takes the most likely "
                    "code. -1: the model's own value, which is 1 for all but Anole (0.7) and Infinity 2B (0.5).",
                ),
                io.Int.Input(
                    "top_k",
                    default=OWN,
                    min=OWN,
                    max=65536,
                    tooltip="Sample from only this many of the most likely codes. 0: all. -1: the model's own value "
                    "(bundled model and Janus: all; LlamaGen: 2000 for classes, 1000 for text; Lumina-mGPT: 2000, 2.0: "
                    "4096; Emu3: 2048; Emu3.5 and U0: 5120; VAR and M-VAR: 900).",
                ),
                io.Float.Input(
                    "top_p",
                    default=float(OWN),
                    min=float(OWN),
                    max=1.0,
                    step=0.01,
                    tooltip="Sample from the most likely codes whose probabilities add up to this. 1: all. Typical: "
                    "0.9 to 1. -1: the model's own value, which is 1 for all but Anole (0.9), VAR and M-VAR (0.95) "
                    "and Infinity (0.97).",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Images per class or text, generated together. Cache memory grows with it. A batch that "
                    "does not fit into free memory is generated in parts; the images are the same.",
                ),
                io.Int.Input(
                    "guidance_interval",
                    default=-1,
                    min=-1,
                    max=65536,
                    optional=True,
                    advanced=True,
                    tooltip="Number of tokens after which guidance ends, which then halves compute and cache. -1: "
                    "never. LlamaGen calls it cfg_interval.",
                ),
                TOKENS.Input(
                    "tokens",
                    optional=True,
                    tooltip="Images to keep the upper rows or coarse scales of (see keep_rows), or all that the mask "
                    "does not cover. From Encode Image or another Generate: one for the whole batch, or one per image.",
                ),
                io.Int.Input(
                    "keep_rows",
                    default=0,
                    min=0,
                    max=255,
                    optional=True,
                    advanced=True,
                    tooltip="Number of rows, from the top, to take from tokens (with Reroll: from the run shown below) "
                    "instead of generating them. The cache is filled as if they had been generated. With VAR and "
                    "Infinity: number of scales, from the coarsest. 0: generate everything.",
                ),
                io.Int.Input(
                    "stop_after",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Stop after this many rows; the image is cut off there. With VAR and Infinity: after this "
                    "many scales; the image is whole, but less sharp. 0: generate everything.",
                ),
                VIEW.Input(
                    "view", tooltip="The rows or scales so far, and which of their tokens the cache still holds."
                ),
                io.Int.Input(
                    "drafts",
                    default=0,
                    min=AUTO,
                    max=128,
                    optional=True,
                    advanced=True,
                    tooltip="Tokens that one pass through the model guesses ahead and checks. The image is the same, "
                    "except where two codes are equal but for rounding. Can make one or two images faster; try 8 to "
                    "24. 0: none. -1: 8 for a single float32 image on the CPU, none otherwise. None with VAR and "
                    "Infinity, which draw a whole scale in one pass.",
                ),
                io.String.Input(
                    "seeds",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A seed for each image of the batch, such as 3, 7, 100-103, in place of seed + i. A batch "
                    "that is split over several machines then gives the same images. Empty: seed + i.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="The region of the image behind tokens to generate anew, from Load Image (right-click it "
                    "to paint one) or any node that makes masks; all else is kept. The region is filled from the "
                    "top and sees what is kept above it and to its left, not below. One mask, or one per image.",
                ),
                io.Int.Input(
                    "candidates",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="With a mask: how many fills to generate for each image. The best one stays: the one that "
                    "makes the kept tokens behind the region most likely to the model. Takes the time and memory of "
                    "that many images.",
                ),
                MODEL.Input(
                    "drafter",
                    optional=True,
                    tooltip="For models that draw in scales: a larger model that draws the first scales. 'model' draws "
                    "the last ones, which take most of the time (CoDe). Both need the same tokenizer and image size, "
                    "such as VAR d30 here and VAR d16 as model. Takes the memory of both.",
                ),
                io.Int.Input(
                    "drafter_scales",
                    default=0,
                    min=0,
                    max=255,
                    optional=True,
                    advanced=True,
                    tooltip="Number of scales, from the coarsest, that the drafter draws. 0: all but the last two, so "
                    "8 of 10 for VAR. No effect without a drafter.",
                ),
                io.Boolean.Input(
                    "smooth",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For VAR and M-VAR: at each place a mixture of the likely codes instead of one of them, "
                    "for images that look smoother. VAR calls it more_smooth.",
                ),
            ],
            outputs=[
                TOKENS.Output(
                    display_name="tokens",
                    tooltip="The image tokens, with a record of what the cache kept: for Decode and Retention Heatmap.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

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
        guidance_interval: int = -1,
        tokens: Tokens | None = None,
        keep_rows: int = 0,
        stop_after: int = 0,
        view: str | None = None,
        drafts: int = 0,
        seeds: str = "",
        mask: Tensor | None = None,
        candidates: int = 1,
        drafter: Model | None = None,
        drafter_scales: int = 0,
        smooth: bool = False,
    ) -> io.NodeOutput:
        wants_generate(model)
        model = model.with_grid(prompt.grid)
        if drafter is not None:
            model = model.with_drafter(drafter.with_grid(prompt.grid), drafter_scales)
        image, info, loop = model.image, model.image.info, loop_of(model)
        asked = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        asked = {name: value for name, value in asked.items() if not value < 0}  # below 0: the model's own
        above, own = _above(tokens, keep_rows, view, model, loop)
        own = own or {"seed": seed, "seeds": parse_seeds(seeds)}
        sample = replace(
            info.defaults,
            guidance_interval=guidance_interval,
            drafts=drafts,
            **own,
            **asked,
            smooth=smooth or info.defaults.smooth,
        )
        for each, _ in model.in_turn:
            each.image.check(prompt)
        prompt = prompt.repeat(batch_size)
        node, kept = cls.hidden.unique_id, None
        if mask is not None:
            if tokens is None:
                raise UserError("mask: there is no image that it belongs to; connect tokens, from Encode Image.")
            tokens.check(image)
            kept = kept_codes(model, tokens, mask, prompt.rows, node)
        check_fills(kept, candidates)
        if kept is not None and candidates > 1:
            kept, above, sample = copies(kept, above, sample, prompt.rows, candidates)
            prompt = prompt.repeat(candidates)
        sample.image_seeds(prompt.rows)
        cache = resolve(model, cache, sample, prompt, stop_after)
        (run,), begun, shown, decoded = draw(
            model, prompt, [cache], sample, node, above=above, kept=kept, stop_after=stop_after
        )
        if kept is not None and candidates > 1:
            run, prompt, shown = best_fills(model, cache, sample, prompt, run, begun, kept, candidates)
            decoded = None
        shares = run.shares if loop.sides else run.shares[:, :, : len(run.lines)]
        return io.NodeOutput(
            Tokens(
                codes=run.tokens,
                shares=shares,
                names=prompt.names,
                model=info.name,
                codebook=info.config.codes,
                plan=cache,
                cache_bytes=max(line.cache_bytes for line in run.lines),
                seconds=run.seconds,
                meaning=image.codebook,
                sides=loop.sides,
                cached=any(each.image.info.cached for each, _ in model.in_turn),
                decoded=decoded,
                canvas=run.canvas if sample.smooth else None,
            ),
            ui=shown,
        )


def _above(
    tokens: Tokens | None, rows: int, view: str | None, model: Model, loop: Lines | Scales
) -> tuple[Tensor | None, dict[str, Any]]:
    """The rows, or scales, that stay: of the run that the widget shows, where it hands one back, else of `tokens`.

    And the seeds of the run that they are from, where the widget says so.
    """
    if not rows:
        return None, {}
    if view:
        if codebooks_of(str(view)) - {model.image.codebook}:
            name = model.image.info.name
            raise UserError(
                f"view: the {loop.unit}s kept on the node are not of {name}; press 'Start over' on the node."
            )
        return live.kept_codes(loop, str(view), rows)
    if tokens is None:
        raise UserError(
            f"keep_rows: there is no image to take {rows} {loop.unit}s from; connect tokens, or set it to 0."
        )
    tokens.check(model.image)
    return loop.first(tokens.codes, rows, tokens.sides), {}
