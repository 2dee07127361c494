"""Class Prompt."""

from __future__ import annotations

from comfy_api.latest import io

from ..linear_core.errors import UserError
from . import files
from .inputs import checked
from .sockets import MODEL, PROMPT, Model

BELOW = "(only those below)"


class ClassPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_ClassPrompt",
            display_name="Class Prompt",
            category="LineAR",
            description="Sets what to generate, for class-conditional models: one image per class.",
            search_aliases=["class label", "prompt", "category", "imagenet", "linear"],
            inputs=[
                MODEL.Input("model", tooltip="The model whose classes to use, from Load AR Model."),
                io.Combo.Input(
                    "class_name",
                    options=[BELOW, *files.class_names()],
                    default=files.bundled_info().classes[0],
                    tooltip="The class to generate; type to search. The bundled model's classes come first, then the "
                    f"1000 ImageNet classes of LlamaGen, VAR, M-VAR and MAR. '{BELOW}': for models with other classes.",
                ),
                io.String.Input(
                    "more_classes",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="more classes, one name or number per line",
                    tooltip="More images in the same batch: one class name or number per line. Numbers count from 0. "
                    "Empty lines are ignored.",
                ),
            ],
            outputs=[
                PROMPT.Output(
                    display_name="prompt", tooltip="For Generate, Masked Generate and Compare: one row per class."
                )
            ],
        )

    @classmethod
    @checked
    def execute(cls, model: Model, class_name: str, more_classes: str = "") -> io.NodeOutput:
        if model.image.info.text:
            raise UserError(f"model: {model.image.info.name} takes text, not classes; connect it to Text Prompt.")
        names = [] if class_name == BELOW else [class_name]
        names += [line.strip() for line in more_classes.splitlines() if line.strip()]
        if not names:
            raise UserError(f"more_classes: it is empty, and class_name is '{BELOW}'; name at least one class.")
        return io.NodeOutput(model.image.class_prompt(names))
