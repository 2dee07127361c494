"""Generate."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.plan import CachePlan
from ..linear_core.prompts import Prompt
from .live import VIEW, draw, kept_codes
from .sockets import CACHE, MODEL, PROMPT, TOKENS, Model, Tokens, connected

MAX_SEED = 0xFFFFFFFFFFFFFFFF
OWN = -1  # in place of a number: what the model was published with


class Generate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_Generate",
            display_name="Generate",
            category="LineAR",
            description="Draws pictures line by line with the cache that Line Cache describes. The rows appear on the "
            "node as they are finished; Stop takes effect within a row.",
            search_aliases=["autoregressive sampler", "sampler", "llamagen", "linear", "draw tokens"],
            inputs=[
                MODEL.Input("model", tooltip="What draws, from Load AR Model."),
                CACHE.Input("cache", tooltip="How much of the cache is kept, from Line Cache."),
                PROMPT.Input("prompt", tooltip="What to draw, from Class Prompt or Text Prompt."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Picture i of a batch is the picture that seed + i gives alone. Two runs that differ only "
                    "in their cache draw with the same random numbers, so their pictures compare.",
                ),
                io.Float.Input(
                    "guidance",
                    default=float(OWN),
                    min=float(OWN),
                    max=30.0,
                    step=0.1,
                    tooltip="How strongly the prompt is followed (classifier-free guidance scale). Typical: 2 to 5. "
                    "1 or less: none, which takes half the work and half the cache. -1: the model's own (the bundled "
                    "one 3, LlamaGen 4 for classes and 7.5 for texts, Janus 5, Lumina-mGPT 4, Anole 3).",
                ),
                io.Float.Input(
                    "temperature",
                    default=float(OWN),
                    min=float(OWN),
                    max=4.0,
                    step=0.05,
                    tooltip="How freely tokens are drawn. Typical: 1. Less is calmer; 0 always takes the likeliest. "
                    "-1: the model's own, which is 1 for all but Anole (0.7).",
                ),
                io.Int.Input(
                    "top_k",
                    default=OWN,
                    min=OWN,
                    max=65536,
                    tooltip="Draw from this many of the likeliest codes only. 0: all. -1: the model's own (the bundled "
                    "one and Janus all, LlamaGen 2000 for classes and 1000 for texts, Lumina-mGPT 2000).",
                ),
                io.Float.Input(
                    "top_p",
                    default=float(OWN),
                    min=float(OWN),
                    max=1.0,
                    step=0.01,
                    tooltip="Draw from the likeliest codes that hold this share of the probability. 1: all. "
                    "Typical: 0.9 to 1. -1: the model's own, which is 1 for all but Anole (0.9).",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Pictures of each class or text, drawn together; cache memory grows with it. A batch that "
                    "does not fit into the free memory is drawn in parts; the pictures are the same.",
                ),
                io.Int.Input(
                    "guidance_interval",
                    default=-1,
                    min=-1,
                    max=65536,
                    advanced=True,
                    tooltip="Tokens after which guidance ends and its half of the work and of the cache is dropped. "
                    "-1: never. The cfg_interval of LlamaGen.",
                ),
                TOKENS.Input(
                    "tokens",
                    optional=True,
                    tooltip="Pictures whose upper rows stay (see keep_rows): from Encode Image or another Generate. "
                    "One for all, or one for each picture drawn.",
                ),
                io.Int.Input(
                    "keep_rows",
                    default=0,
                    min=0,
                    max=127,
                    optional=True,
                    advanced=True,
                    tooltip="Rows, from the top, that are taken from tokens (or from the run shown below, with Reroll) "
                    "and not drawn: the cache is brought to where drawing them would have left it. 0: draw all rows.",
                ),
                io.Int.Input(
                    "stop_after",
                    default=0,
                    min=0,
                    max=128,
                    optional=True,
                    advanced=True,
                    tooltip="Rows, from the top, after which to stop: the picture is cut off there. 0: draw all rows.",
                ),
                VIEW.Input("view", tooltip="The run: rows so far, and what the cache still holds of them."),
            ],
            outputs=[
                TOKENS.Output(
                    display_name="tokens",
                    tooltip="The pictures as codes, and what the cache kept: for Decode and Retention Heatmap.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

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
        guidance_interval: int = -1,
        tokens: Tokens | None = None,
        keep_rows: int = 0,
        stop_after: int = 0,
        view: str | None = None,
    ) -> io.NodeOutput:
        connected(model=model, cache=cache, prompt=prompt, **({} if tokens is None else {"tokens": tokens}))
        model = model.with_grid(prompt.grid)
        image, info = model.image, model.image.info
        asked = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        asked = {name: value for name, value in asked.items() if not value < 0}  # below 0: the model's own
        sample = replace(info.defaults, seed=seed, guidance_interval=guidance_interval, **asked)
        cache.check(info.grid)
        image.decoder.check(prompt)
        prompt = prompt.repeat(batch_size)
        above = _above(tokens, keep_rows, view, model)
        node = cls.hidden.unique_id
        (run,), _, shown = draw(model, prompt, [cache], sample, node, above=above, stop_after=stop_after)
        return io.NodeOutput(
            Tokens(
                codes=run.tokens,
                shares=run.shares[:, :, : len(run.lines)],
                names=prompt.names,
                model=info.name,
                codebook=info.config.codes,
                plan=cache,
                cache_bytes=run.lines[0].cache_bytes,
                seconds=run.seconds,
            ),
            ui=shown,
        )


def _above(tokens: Tokens | None, rows: int, view: str | None, model: Model) -> Tensor | None:
    """The rows that stay: of the run that the widget shows, where it hands one back, else of `tokens`."""
    if not rows:
        return None
    if view:
        codes = kept_codes(str(view))
    elif tokens is None:
        raise UserError(
            f"keep_rows: {rows} rows are to stay, but of which picture? Connect tokens, or set it to 0 to draw all."
        )
    elif tokens.codebook != model.image.info.config.codes:
        raise UserError(
            f"tokens: {tokens.model} has {tokens.codebook} codes, and {model.image.info.name} draws from "
            f"{model.image.info.config.codes}; encode the picture with the model that goes on with it."
        )
    else:
        codes = tokens.codes
    if codes.shape[1] < rows:
        raise UserError(f"keep_rows: {rows} rows are to stay, but there are {codes.shape[1]}; choose that or less.")
    return codes[:, :rows]
