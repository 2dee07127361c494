"""Text Prompt."""

from __future__ import annotations

import re

import torch
from comfy_api.latest import io
from torch import nn

from ..linear_core.errors import UserError
from ..linear_core.text import prompt
from . import files, host
from .sockets import PROMPT

ACTIVATIONS = 2**28  # bytes; one text at a time takes a quarter of this


class TextPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_TextPrompt",
            display_name="Text Prompt",
            category="LineAR",
            description="Says in words what to draw, for models that were made for texts: one picture for each text. "
            "The text encoder is loaded when a text is new and unloaded again.",
            search_aliases=["text encode", "prompt", "t5", "flan-t5", "caption", "llamagen", "linear"],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=files.text_encoder_names(),
                    tooltip="FLAN-T5-XL: the folder of google/flan-t5-xl, or one encoder file, in models/text_encoders "
                    "or models/ar_image. Download AR Model fetches it.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="a red fox in the snow, early morning\n---\nanother picture of the same batch",
                    tooltip="What to draw, in English. LlamaGen likes whole sentences; the first 120 tokens count "
                    "(about 90 words). A line of --- begins another picture of the same batch.",
                ),
            ],
            outputs=[PROMPT.Output(display_name="prompt", tooltip="For Generate: one row for each text, in order.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, text_encoder: str | None = None) -> bool | str:
        """In place of the host's check, which only says that a name is not in the list."""
        try:
            return text_encoder is None or bool(files.find_text_files(text_encoder))
        except UserError as error:
            return str(error)

    @classmethod
    def execute(cls, text_encoder: str, text: str) -> io.NodeOutput:
        texts = [part.strip() for part in re.split(r"(?m)^\s*-{3,}\s*$", text) if part.strip()]
        found = files.find_text_files(text_encoder)
        bar = host.Progress(max(len(texts), 1), cls.hidden.unique_id)
        placed: list[host.ModelPatcher] = []

        def place(encoder: nn.Module) -> torch.device:
            bar.update(0, f"loading {text_encoder}")
            placed.append(host.managed_text_encoder(encoder))
            host.load(placed[0], memory=ACTIVATIONS)
            return placed[0].load_device

        try:
            return io.NodeOutput(prompt(texts, found, place, lambda done, total: bar.update(done)))
        finally:
            for patcher in placed:
                host.unload(patcher)
