"""Pick Best."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.loop.forced import log_likelihood, prompt_match
from ..linear_core.loop.redraw import best_of
from ..linear_core.pictures.sheet import contact_sheet, to_tensor
from ..linear_core.plan import CachePlan, SamplePlan
from ..linear_core.prompts import Prompt
from . import host
from .encoding import encode
from .inputs import checked, split_texts
from .live import memory, resolve
from .sockets import CACHE, MODEL, PROMPT, TOKENS, Model, Tokens

LIKELIHOOD, MATCH, CLIP = "likelihood", "prompt match", "CLIP"
TOGETHER = 8  # pictures that are scored together
MOST = 64  # pictures on a sheet


class PickBest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_PickBest",
            display_name="Pick Best",
            category="LineAR",
            description="Scores the images of a batch and keeps the best of each prompt: by the model that generated "
            "them, or by CLIP.",
            search_aliases=["best of n", "rank images", "rerank", "clip score", "choose", "linear"],
            inputs=[
                io.Image.Input("images", tooltip="Images to choose from: a batch from Decode, or any other."),
                io.Int.Input(
                    "each", default=0, min=0, max=4096,
                    tooltip="Images that compete, next to each other in the batch: the batch_size of Generate. 0: the "
                    "whole batch.",
                ),
                io.Int.Input(
                    "keep", default=1, min=1, max=4096,
                    tooltip="Images to keep of those that compete, best first. Typical: 1.",
                ),
                io.Combo.Input(
                    "by", options=[LIKELIHOOD, MATCH, CLIP], default=MATCH,
                    tooltip="prompt match: how much likelier the prompt makes the image than no prompt does, to "
                    "the model. likelihood: how likely the image is to the model, with guidance; prefers plain images. "
                    "Both need model and prompt. CLIP: how close the image is to the text; needs clip, clip_vision and "
                    "text.",
                ),
                MODEL.Input("model", optional=True, tooltip="For likelihood and prompt match: the model that judges, "
                            "from Load AR Model. Best the one that generated the images."),
                PROMPT.Input("prompt", optional=True, tooltip="For likelihood and prompt match: what was generated, "
                             "one row for each group of images, or one for all."),
                TOKENS.Input("tokens", optional=True, tooltip="The tokens of the images, from Generate. Without them, "
                             "the images are encoded, which blurs the score a little."),
                CACHE.Input("cache", optional=True, tooltip="The cache to judge with, from Line Cache: best the "
                            "one that the images were generated with. Without it, everything is kept."),
                io.Clip.Input("clip", optional=True, tooltip="For CLIP: the text half of a CLIP model, from Load "
                              "CLIP."),
                io.ClipVision.Input("clip_vision", optional=True, tooltip="For CLIP: the vision half of the same "
                                    "model, "
                                    "from Load CLIP Vision."),
                io.String.Input("text", default="", multiline=True, optional=True, tooltip="For CLIP: what the images "
                                "should show. A line of --- starts the text of the next group."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The images kept, group by group, best first."),
                io.Image.Output(display_name="sheet", tooltip="All images with their scores, those kept marked."),
                io.String.Output(display_name="scores", tooltip="One line for each image: its score, and whether it is "
                                 "kept."),
                TOKENS.Output(display_name="tokens", tooltip="The tokens of the images kept; only if tokens are "
                              "connected."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls,
        images: Tensor,
        each: int,
        keep: int,
        by: str,
        model: Model | None = None,
        prompt: Prompt | None = None,
        tokens: Tokens | None = None,
        cache: CachePlan | None = None,
        clip: Any = None,
        clip_vision: Any = None,
        text: str = "",
    ) -> io.NodeOutput:
        count = len(images)
        each = each or count
        if count % each:
            raise UserError(f"each: {count} images are no whole number of groups of {each}; choose a divisor, or 0.")
        if keep > each:
            raise UserError(f"keep: {keep} of {each} images cannot be kept; choose {each} or fewer.")
        if tokens is not None and len(tokens.codes) != count:
            raise UserError(f"tokens: there are {len(tokens.codes)} pictures, but {count} images; connect theirs.")
        if by == CLIP:
            scores = _by_clip(images, clip, clip_vision, text, each)
        else:
            scores = _by_model(images, model, prompt, tokens, cache, each, by)
        chosen = best_of(scores, each, keep)
        names = [f"{n % each + 1}: {float(score):.4g}{' *' if n in chosen else ''}" for n, score in enumerate(scores)]
        told = "\n".join(f"{n + 1}: {float(s):.6g}{', kept' if n in chosen else ''}" for n, s in enumerate(scores))
        kept = None if tokens is None else tokens.select(chosen)
        return io.NodeOutput(images[chosen], host.to_intermediate(_sheet(images, names, each, by)), told, kept)


def _sheet(images: Tensor, names: list[str], each: int, by: str) -> Tensor:
    """A row for each group, as far as there is room; every image under its number and score."""
    groups = max(1, MOST // each)
    wide = min(each, MOST)
    rows = []
    for first in range(0, min(len(images), groups * each), each):
        captions = names[first : first + wide]
        rows.append(to_tensor(contact_sheet([(f"by {by}", "", images[first : first + wide].cpu())], captions, 192)))
    return torch.cat(rows, 1)


def _by_model(
    images: Tensor,
    model: Model | None,
    prompt: Prompt | None,
    tokens: Tokens | None,
    cache: CachePlan | None,
    each: int,
    by: str,
) -> Tensor:
    """ln of the likelihood of each image, or how much of it the prompt brings: float32 B."""
    if model is None or prompt is None:
        missing = "model" if model is None else "prompt"
        raise UserError(f"{missing}: '{by}' needs the model and the prompt of the images; connect them.")
    model.image.check(prompt)
    groups, count = len(images) // each, len(images)
    if model.image.info.pyramid is not None or model.image.info.masked is not None:
        how = "in scales" if model.image.info.pyramid is not None else "tokens in any order"
        raise UserError(f"model: {model.image.info.name} draws {how}, and cannot judge yet; choose {CLIP}.")
    if prompt.rows not in (1, groups):
        raise UserError(f"prompt: it has {prompt.rows} rows for {groups} groups of images; give one for each, or one.")
    model = model.with_grid(prompt.grid)
    found = tokens or encode(model, images, prompt)
    found.check(model.image)
    if found.codes.shape[1] != model.image.info.grid.rows:
        raise UserError("tokens: some of their rows are missing; give whole pictures, which can be judged.")
    rows = prompt.select([0] * count) if prompt.rows == 1 else prompt.repeat(each)
    sample = model.image.info.defaults if by == LIKELIHOOD else SamplePlan(guidance=2.0)
    some = rows.select(range(min(count, TOGETHER)))
    plan = resolve(model, cache or CachePlan("full"), sample, some)
    host.load(model.decoder, memory=memory(model, plan, sample, some))
    decoder = model.image.decoder
    if by == LIKELIHOOD:
        scores = log_likelihood(decoder, rows, found.codes, plan, sample, TOGETHER)
    else:
        scores = prompt_match(decoder, rows, found.codes, plan, TOGETHER)
    return scores.flatten(1).sum(1)


def _by_clip(images: Tensor, clip: Any, clip_vision: Any, text: str, each: int) -> Tensor:
    """Cosine of image and text: float32 B."""
    texts = split_texts(text)
    groups = len(images) // each
    for name, value in (("clip", clip), ("clip_vision", clip_vision)):
        if value is None:
            raise UserError(f"{name}: '{CLIP}' needs both halves of a CLIP model; connect it.")
    if len(texts) not in (1, groups):
        raise UserError(
            f"text: there are {len(texts)} texts for {groups} groups of images; write one, or one for each."
        )
    of_text = host.clip_texts(clip, texts)
    of_images = torch.cat([host.clip_images(clip_vision, part) for part in images.split(TOGETHER)])
    if of_text.shape[1] != of_images.shape[1]:
        raise UserError(
            f"clip_vision: its features have {of_images.shape[1]} numbers and those of clip {of_text.shape[1]}; load "
            "both halves of the same CLIP model, such as CLIP-L."
        )
    row = torch.arange(len(images)) // each if len(texts) > 1 else torch.zeros(len(images), dtype=torch.int64)
    return torch.cosine_similarity(of_images, of_text[row], dim=1)
