"""Encode Image."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..linear_core.prompts import Prompt
from .encoding import encode
from .inputs import checked
from .sockets import MODEL, PROMPT, TOKENS, Model


class EncodeImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_EncodeImage",
            display_name="Encode Image",
            category="LineAR",
            description="Encodes images as the tokens of a model, so that Generate can keep their upper rows, all that "
            "a mask does not cover, or the coarse scales, and generate the rest.",
            search_aliases=["vq encode", "image to tokens", "tokenize", "outpaint", "continue", "linear"],
            inputs=[
                MODEL.Input("model", tooltip="The model that will continue the image. Its tokenizer must include an "
                            "encoder; the bundled and the published ones do."),
                io.Image.Input("image", tooltip="Images of any size. They are scaled and center-cropped to the size of "
                               "the model, or to the closest of its sizes."),
                PROMPT.Input("prompt", optional=True, tooltip="Crops to the size set in this Text Prompt, for models "
                             "with several sizes. Connect the one that Generate uses."),
            ],
            outputs=[TOKENS.Output(display_name="tokens", tooltip="For Generate (with keep_rows or mask) and Decode.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model: Model, image: Tensor, prompt: Prompt | None = None) -> io.NodeOutput:
        return io.NodeOutput(encode(model, image, prompt))
