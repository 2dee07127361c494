"""Class Prompt."""

from __future__ import annotations

from comfy_api.latest import io

from ..linear_core.errors import UserError
from ..linear_core.prompts import class_prompt
from . import files
from .sockets import MODEL, PROMPT, Model, connected

BELOW = "(only those below)"


class ClassPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_ClassPrompt",
            display_name="Class Prompt",
            category="LineAR",
            description="Says what to draw, for models that know classes: one picture for each class named.",
            search_aliases=["class label", "prompt", "category", "imagenet", "linear"],
            inputs=[
                MODEL.Input("model", tooltip="The model whose classes these are, from Load AR Model."),
                io.Combo.Input(
                    "class_name",
                    options=[BELOW, *files.class_names()],
                    default=files.bundled_info().classes[0],
                    tooltip="What to draw; type to search. The bundled model's classes come first, then the 1000 of "
                    f"ImageNet, which published LlamaGen models know. '{BELOW}': for a model with classes of its own.",
                ),
                io.String.Input(
                    "more_classes",
                    multiline=True,
                    default="",
                    optional=True,
                    placeholder="more classes, one name or number a line",
                    tooltip="More pictures in the same batch: one class name or number a line. Empty lines are left "
                    "out. Numbers count from 0.",
                ),
            ],
            outputs=[PROMPT.Output(display_name="prompt", tooltip="For Generate: one row for each class, in order.")],
        )

    @classmethod
    def execute(cls, model: Model, class_name: str, more_classes: str = "") -> io.NodeOutput:
        connected(model=model)
        if model.image.info.text:
            raise UserError(f"model: {model.image.info.name} draws from texts; choose a model that knows classes.")
        names = [] if class_name == BELOW else [class_name]
        names += [line.strip() for line in more_classes.splitlines() if line.strip()]
        if not names:
            raise UserError(f"more_classes: class_name is '{BELOW}' and nothing is below; name at least one class.")
        return io.NodeOutput(class_prompt([model.image.label(name) for name in names], tuple(names)))
