"""Decode."""

from __future__ import annotations

from comfy_api.latest import io

from ..linear_core.errors import UserError
from .sockets import MODEL, TOKENS, Model, Tokens, connected


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_Decode",
            display_name="Decode",
            category="LineAR",
            description="Turns finished tokens into pictures.",
            search_aliases=["vq decode", "tokens to image", "detokenize", "linear"],
            inputs=[
                MODEL.Input("model", tooltip="The model that drew the tokens; its tokenizer makes the pixels."),
                TOKENS.Input("tokens", tooltip="Finished pictures as codes, from Generate."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="One picture for each token grid. Its side in pixels: tokens times 4 for the bundled "
                    "model, times 16 for published ones.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Model, tokens: Tokens) -> io.NodeOutput:
        connected(model=model, tokens=tokens)
        tokenizer, info = model.image.tokenizer, model.image.info
        if tokens.codebook != tokenizer.config.codes:
            raise UserError(
                f"tokens: {tokens.model} drew them from {tokens.codebook} codes, but the tokenizer of {info.name} has "
                f"{tokenizer.config.codes}; connect the model that drew them."
            )
        return io.NodeOutput(model.pictures(tokens.codes))
