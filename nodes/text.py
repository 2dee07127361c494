"""Text Prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import nn

from ..linear_core.checkpoints.text import prompt
from ..linear_core.errors import UserError
from . import files, host
from .inputs import checked, split_texts
from .size import OWN, size_input, sized
from .sockets import MODEL, PROMPT, Model

NOT_LINKED = object()
ACTIVATIONS = 2**28  # bytes; one text at a time takes a quarter of this


class TextPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_TextPrompt",
            display_name="Text Prompt",
            category="LineAR",
            description="Sets what to generate, for text-to-image models: one image per text. Janus, Lumina-mGPT, "
            "Emu3 and NOVA read the text themselves: connect them. LlamaGen and Infinity need a text encoder, which is "
            "loaded only for new texts and unloaded afterwards; connect Infinity too, which reads longer texts.",
            search_aliases=[
                "text encode",
                "prompt",
                "negative",
                "t5",
                "caption",
                "llamagen",
                "janus",
                "lumina",
                "emu3",
                "infinity",
                "size",
                "linear",
            ],
            inputs=[
                io.Combo.Input(
                    "text_encoder",
                    options=files.text_encoder_names(),
                    tooltip="For LlamaGen and Infinity: FLAN-T5-XL, as the google/flan-t5-xl folder or a single "
                    "encoder file, in models/text_encoders or models/ar_image. Download AR Model fetches it. Ignored "
                    "when a model that reads text itself (Janus, Lumina-mGPT, Emu3, NOVA) is connected; 'none' will "
                    "do.",
                ),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    placeholder="a red fox in the snow, early morning\n---\nanother image in the same batch",
                    tooltip="What to generate, in English. Full sentences work best. LlamaGen uses the first 120 "
                    "tokens (about 90 words), Infinity 512. A line of --- starts another image in the same batch.",
                ),
                MODEL.Input(
                    "model",
                    optional=True,
                    tooltip="The model that will generate the image, from Load AR Model. Required for Janus, "
                    "Lumina-mGPT, Emu3 and NOVA, which read the text themselves, and for Infinity; optional for "
                    "LlamaGen.",
                ),
                io.String.Input(
                    "negative_text",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="what to avoid (empty: the model's default)",
                    tooltip="What guidance steers away from, for all images. Empty: as the model was published (Janus: "
                    "the prompt with its text masked out; Lumina-mGPT, Emu3.5 and U0: no text; Emu3: its authors' list "
                    "of flaws; LlamaGen, Infinity and NOVA: a learned embedding). No effect without guidance.",
                ),
                size_input(),
            ],
            outputs=[
                PROMPT.Output(
                    display_name="prompt",
                    tooltip="For Generate, Compare and, with NOVA, Masked Generate: one row per text, in order.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(
        cls, text_encoder: str | None = None, model: object = NOT_LINKED, size: object = None
    ) -> bool | str:
        """In place of the host's check, which only says that a name is not in the list.

        Whatever is linked is None here, and `size`, which is put together of its parts, comes along unasked. With a
        model that reads text itself the encoder need not be there.
        """
        try:
            return text_encoder is None or model is not NOT_LINKED or bool(files.find_text_files(text_encoder))
        except UserError as error:
            return str(error)

    @classmethod
    @checked
    def execute(
        cls,
        text_encoder: str,
        text: str,
        model: Model | None = None,
        negative_text: str = "",
        size: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        texts = split_texts(text)
        negative = negative_text.strip()
        if model is not None and not model.image.info.text:
            raise UserError(f"model: {model.image.info.name} takes classes, not text; connect it to Class Prompt.")
        info = model and sized(model.image.info, size)
        if model is not None and info is not None and info.own_tokenizer:
            return io.NodeOutput(replace(model.image, info=info).prompt(texts, negative))
        if info is None and size is not None and size["size"] != OWN:
            raise UserError(f"size: connect the model that is to draw '{size['pixels']}', or choose '{OWN}'.")
        found = files.find_text_files(text_encoder, info.config.caption_dim if info else 0)
        bar = host.Progress(max(len(texts), 1), cls.hidden.unique_id)
        placed: list[host.ModelPatcher] = []

        def place(encoder: nn.Module) -> torch.device:
            bar.update(0, f"loading {text_encoder}")
            placed.append(host.managed_text_encoder(encoder))
            host.load(placed[0], memory=ACTIVATIONS)
            return placed[0].load_device

        try:
            return io.NodeOutput(prompt(texts, found, place, lambda done, total: bar.update(done), negative, info))
        finally:
            for patcher in placed:
                host.unload(patcher)
