"""Pick Best."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..linear_core.checkpoints.understanding import check_looks, load_understanding, questions
from ..linear_core.errors import UserError
from ..linear_core.loop.forced import log_likelihood, prompt_match
from ..linear_core.loop.redraw import best_of
from ..linear_core.loop.vqa import vqa_bytes, vqa_scores
from ..linear_core.pictures.sheet import score_sheet, to_tensor
from ..linear_core.plan import CachePlan, SamplePlan
from ..linear_core.prompts import Prompt
from . import host
from .encoding import encode
from .inputs import checked, split_texts
from .live import memory, resolve
from .sockets import CACHE, MODEL, PROMPT, TOKENS, Model, Tokens

LIKELIHOOD, MATCH, CLIP, VQA = "likelihood", "prompt match", "CLIP", "VQA score"
TOGETHER = 8  # pictures that are scored together
MOST = 64  # pictures on a sheet, unless more compete with each other
SIZE = 192  # pixels that small pictures are enlarged to on it


class PickBest(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_PickBest",
            display_name="Pick Best",
            category="LineAR",
            description="Scores the images of a batch and keeps the best of each prompt: by the model that generated "
            "them, by CLIP, or by asking Janus.",
            search_aliases=["best of n", "rank images", "rerank", "clip score", "vqascore", "choose", "linear"],
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
                    "by", options=[LIKELIHOOD, MATCH, CLIP, VQA], default=MATCH,
                    tooltip="prompt match: how much likelier the prompt makes the image than no prompt does, to "
                    "the model. likelihood: how likely the image is to the model, with guidance; prefers plain images. "
                    "Both need model and prompt. CLIP: how close the image is to the text; needs clip, clip_vision and "
                    "text. VQA score: how surely Janus answers yes when asked whether the image shows the text; needs "
                    "a Janus as model, and prompt or text.",
                ),
                MODEL.Input("model", optional=True, tooltip="For all but CLIP: the model that judges, from Load AR "
                            "Model. Best the one that generated the images; for VQA score a Janus."),
                PROMPT.Input("prompt", optional=True, tooltip="For all but CLIP: what was generated, one row for each "
                             "group of images, or one for all."),
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
                                "should show. A line of --- starts the text of the next group. For VQA score it may "
                                "take the place of prompt."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The images kept, group by group, best first."),
                io.Image.Output(display_name="sheet", tooltip="All images with their scores, those kept framed."),
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
        elif by == VQA:
            scores = _by_asking(images, model, prompt, text, each)
        else:
            scores = _by_model(images, model, prompt, tokens, cache, each, by)
        chosen = best_of(scores, each, keep)
        told = "\n".join(f"{n + 1}: {float(s):.6g}{', kept' if n in chosen else ''}" for n, s in enumerate(scores))
        kept = None if tokens is None else tokens.select(chosen)
        return io.NodeOutput(images[chosen], host.to_intermediate(_sheet(images, scores, chosen, each, by)), told, kept)


def _sheet(images: Tensor, scores: Tensor, chosen: list[int], each: int, by: str) -> Tensor:
    """All images with their scores, those kept framed, as far as there is room: whole groups, at least one."""
    groups = max(1, min(len(images), MOST) // each)
    shown = images[: groups * each].cpu()
    titles = [f"{n + 1}" if groups > 1 else "" for n in range(groups)]
    return to_tensor(score_sheet(shown, scores.tolist(), chosen, titles, f"by {by}", SIZE))


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
    for name, value in (("clip", clip), ("clip_vision", clip_vision)):
        if value is None:
            raise UserError(f"{name}: '{CLIP}' needs both halves of a CLIP model; connect it.")
    texts = _for_each(split_texts(text), len(images), each)
    distinct = list(dict.fromkeys(texts))
    of_text = host.clip_texts(clip, distinct)
    of_images = torch.cat([host.clip_images(clip_vision, part) for part in images.split(TOGETHER)])
    if of_text.shape[1] != of_images.shape[1]:
        raise UserError(
            f"clip_vision: its features have {of_images.shape[1]} numbers and those of clip {of_text.shape[1]}; load "
            "both halves of the same CLIP model, such as CLIP-L."
        )
    return torch.cosine_similarity(of_images, of_text[[distinct.index(one) for one in texts]], dim=1)


def _by_asking(images: Tensor, model: Model | None, prompt: Prompt | None, text: str, each: int) -> Tensor:
    """ln of the odds that Janus answers yes: float32 B."""
    if model is None:
        raise UserError(f"model: '{VQA}' asks a Janus about the images; connect one.")
    wanted = split_texts(text) or list(prompt.names if prompt is not None else ())
    if not wanted:
        raise UserError(f"text: '{VQA}' needs what the images should show; connect the prompt, or write it here.")
    check_looks(model.image.info, model.image.files)
    asked = questions(model.image, _for_each(wanted, len(images), each))
    decoder = model.image.decoder
    looking = load_understanding(model.image, dtype=decoder.dtype, ops=host.Layers)
    patcher = host.managed(looking)
    host.load(model.decoder, patcher, memory=vqa_bytes(decoder, looking, min(len(images), TOGETHER)))
    try:
        return vqa_scores(decoder, looking, asked, images, TOGETHER)
    finally:
        host.unload(patcher)


def _for_each(texts: list[str], images: int, each: int) -> list[str]:
    """The text of every image, of one for all groups or one for each."""
    groups = images // each
    if len(texts) not in (1, groups):
        raise UserError(
            f"text: there are {len(texts)} texts for {groups} groups of images; write one, or one for each."
        )
    return [texts[n // each if len(texts) > 1 else 0] for n in range(images)]
