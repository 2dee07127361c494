"""Text Prompt."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import nn

from ..linear_core.checkpoints.text import prompt
from ..linear_core.errors import UserError
from . import files, host
from .size import OWN, size_input, sized
from .sockets import MODEL, PROMPT, Model, connected

NOT_LINKED = object()
ACTIVATIONS = 2**28  # bytes; one text at a time takes a quarter of this


class TextPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_TextPrompt",
            display_name="Text Prompt",
            category="LineAR",
            description="Says in words what to draw, for models that were made for texts: one picture for each text. "
            "Janus and Lumina-mGPT read texts themselves: connect them. For LlamaGen a text encoder is loaded when a "
            "text is new, and unloaded again.",
            search_aliases=[
                "text encode",
                "prompt",
                "negative",
                "t5",
                "caption",
                "llamagen",
                "janus",
                "lumina",
                "size",
                "linear",
            ],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=files.text_encoder_names(),
                    tooltip="For LlamaGen only: FLAN-T5-XL, the folder of google/flan-t5-xl or one encoder file, in "
                    "models/text_encoders or models/ar_image. Download AR Model fetches it. 'none', or anything, where "
                    "a model that reads texts by itself is connected (Janus).",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="a red fox in the snow, early morning\n---\nanother picture of the same batch",
                    tooltip="What to draw, in English. Whole sentences work best; of LlamaGen's texts the first 120 "
                    "tokens count (about 90 words). A line of --- begins another picture of the same batch.",
                ),
                MODEL.Input(
                    "model",
                    optional=True,
                    tooltip="The model that will draw, from Load AR Model. Needed for Janus and Lumina-mGPT, whose own "
                    "tokenizers read the text; LlamaGen works without.",
                ),
                io.String.Input(
                    "negative_text",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="what to keep away from (empty: the model's own)",
                    tooltip="What guidance leads away from, for all pictures. Empty: as the model was published "
                    "(Janus: the text blotted out, Lumina-mGPT: no text, LlamaGen: an embedding it has learnt). No "
                    "effect without guidance.",
                ),
                size_input(),
            ],
            outputs=[PROMPT.Output(display_name="prompt", tooltip="For Generate: one row for each text, in order.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, text_encoder: str | None = None, model: object = NOT_LINKED, size: object = None
    ) -> bool | str:
        """In place of the host's check, which only says that a name is not in the list.

        Whatever is linked is None here, and `size`, which is put together of its parts, comes along unasked. With a
        model that reads texts by itself the encoder need not be there.
        """
        try:
            return text_encoder is None or model is not NOT_LINKED or bool(files.find_text_files(text_encoder))
        except UserError as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        text_encoder: str,
        text: str,
        model: Model | None = None,
        negative_text: str = "",
        size: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        texts = [part.strip() for part in re.split(r"(?m)^\s*-{3,}\s*$", text) if part.strip()]
        negative = negative_text.strip()
        if model is not None:
            connected(model=model)
        if model is not None and not model.image.info.text:
            raise UserError(f"model: {model.image.info.name} draws classes, not texts; connect it to Class Prompt.")
        if model is not None and model.image.info.own_tokenizer:
            image = replace(model.image, info=sized(model.image.info, size))
            return io.NodeOutput(image.prompt(texts, negative))
        if size is not None and size["size"] != OWN:
            raise UserError(f"size: a model for a text encoder has one size; set it to '{OWN}'.")
        found = files.find_text_files(text_encoder)
        bar = host.Progress(max(len(texts), 1), cls.hidden.unique_id)
        placed: list[host.ModelPatcher] = []

        def place(encoder: nn.Module) -> torch.device:
            bar.update(0, f"loading {text_encoder}")
            placed.append(host.managed_text_encoder(encoder))
            host.load(placed[0], memory=ACTIVATIONS)
            return placed[0].load_device

        try:
            return io.NodeOutput(prompt(texts, found, place, lambda done, total: bar.update(done), negative))
        finally:
            for patcher in placed:
                host.unload(patcher)
