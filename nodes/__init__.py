"""The nodes, in the order of ComfyUI's menu. They are thin: what they do is in `linear_core`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import host
from .best import PickBest
from .compare import Compare
from .decode import Decode
from .doctor import Doctor
from .download import DownloadModel
from .encode import EncodeImage
from .generate import Generate
from .heatmap import RetentionHeatmap
from .load import LoadModel
from .masked import MaskedGenerate
from .plan import LineCache
from .prompt import ClassPrompt
from .text import TextPrompt


class LineARExtension(ComfyExtension):
    async def on_load(self) -> None:
        host.register_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadModel,
            LineCache,
            ClassPrompt,
            TextPrompt,
            Generate,
            MaskedGenerate,
            Decode,
            RetentionHeatmap,
            EncodeImage,
            Compare,
            DownloadModel,
            Doctor,
            PickBest,
        ]
