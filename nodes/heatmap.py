"""Retention Heatmap."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.pictures.heatmap import heatmap, lifetime
from . import host
from .sockets import TOKENS, Tokens, connected

LIFETIME, AFTER = "lifetime", "after a row"


class RetentionHeatmap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_RetentionHeatmap",
            display_name="Retention Heatmap",
            category="LineAR",
            description="Shows which tokens the KV cache kept: bright where most layers and heads held them, dark "
            "where they were evicted. Drawn alone or over the image.",
            search_aliases=["attention map", "kept tokens", "cache heatmap", "linear"],
            inputs=[
                TOKENS.Input("tokens", tooltip="From Generate. They record what the cache held after each line."),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The image to draw over, of any size; enlarge it first for crisp squares. Without one, the "
                    "map is drawn alone.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.7,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How strongly the map covers the image. 0: only the image. No effect without an image.",
                ),
                io.Int.Input(
                    "size",
                    default=384,
                    min=16,
                    max=4096,
                    advanced=True,
                    tooltip="Minimum length of the map's longer side in pixels when no image is connected. All tokens "
                    "become squares of the same size.",
                ),
                io.DynamicCombo.Input(
                    "show",
                    options=[
                        io.DynamicCombo.Option(LIFETIME, []),
                        io.DynamicCombo.Option(
                            AFTER,
                            [
                                io.Int.Input(
                                    "row",
                                    default=12,
                                    min=1,
                                    max=256,
                                    tooltip="Show what was held after this line: 1 to the number of lines (24 for the "
                                    "bundled model). Larger numbers mean the last line.",
                                )
                            ],
                        ),
                    ],
                    tooltip="lifetime: how long each token was kept, as a share of the longest possible time. "
                    "after a row: what the cache held at that moment.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The map, at the size of the image.")],
        )

    @classmethod
    def execute(
        cls,
        tokens: Tokens,
        strength: float,
        size: int,
        show: dict[str, Any] | None = None,
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        connected(tokens=tokens, **({} if image is None else {"image": image}))
        if show is None:  # what ComfyUI makes of a choice that there is not
            raise UserError(f"show: missing or unknown; choose '{LIFETIME}' or '{AFTER}'.")
        if not 0 <= strength <= 1:
            raise UserError(f"strength: {strength} is out of range; choose 0 to 1.")
        if not tokens.shares.any():
            raise UserError("tokens: they record nothing of a cache, as those of Encode Image; connect Generate's.")
        share = lifetime(tokens.shares)
        if show["show"] == AFTER:
            share = tokens.shares[:, min(show["row"], tokens.shares.shape[1]) - 1]
        count, rows, cols = share.shape
        if image is None:
            cell = math.ceil(size / max(rows, cols))
            height, width = rows * cell, cols * cell
        elif len(image) in (1, count):
            image = image[..., :3].cpu().expand(count, -1, -1, -1)
            height, width = image.shape[1:3]
        else:
            raise UserError(
                f"image: {len(image)} images do not match {count} token grids; connect those decoded from these tokens."
            )
        return io.NodeOutput(host.to_intermediate(heatmap(share, height, width, image, strength)))
