"""Decode."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .inputs import checked
from .sockets import MODEL, TOKENS, Model, Tokens


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_Decode",
            display_name="Decode",
            category="LineAR",
            description="Decodes tokens into images.",
            search_aliases=["vq decode", "tokens to image", "detokenize", "linear"],
            inputs=[
                MODEL.Input("model", tooltip="The model that generated the tokens. Its tokenizer decodes them."),
                TOKENS.Input("tokens", tooltip="Image tokens, from Generate, Masked Generate or Encode Image."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="One image per token grid. A token is 4 x 4 pixels with the bundled model, 16 x 16 or "
                    "8 x 8 with the published ones.",
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, tokens: Tokens) -> io.NodeOutput:
        tokens.check(model.image)
        if tokens.decoded is not None and tokens.meaning == model.image.codebook:
            return io.NodeOutput(host.to_intermediate(tokens.decoded))
        drawn = next((each for each in (tokens.latents, tokens.canvas) if each is not None), None)
        return io.NodeOutput(model.pictures(tokens.codes, tokens.sides) if drawn is None else model.pictures(drawn))
