"""Retention Heatmap."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.pictures.heatmap import captioned, heatmap, lifetime, lifetime_of_scales, over_scales, strip
from . import host
from .inputs import checked
from .sockets import TOKENS, Tokens

LIFETIME, AFTER = "lifetime", "after a row"
NOTHING = "no cache, so no token is held"  # written into the map of such a model


class RetentionHeatmap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_RetentionHeatmap",
            display_name="Retention Heatmap",
            category="LineAR",
            description="Shows which tokens the KV cache kept: bright where most layers and heads held them, dark "
            "where they were evicted. Drawn alone or over the image. Of a picture drawn in scales, alone: one map for "
            "each scale, with the number of tokens held below it. M-VAR has no cache: its map is dark and says so.",
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
                                    tooltip="Show what was held after this line, or scale: 1 to the number of lines "
                                    "(24 for the bundled model). Larger numbers mean the last one.",
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
    @checked
    def execute(
        cls,
        tokens: Tokens,
        strength: float,
        size: int,
        show: dict[str, Any],
        image: Tensor | None = None,
    ) -> io.NodeOutput:
        if tokens.latents is not None:
            raise UserError(
                "tokens: they were drawn in any order, and no token was evicted; look at the output ages of Masked "
                "Generate."
            )
        if tokens.cached and not tokens.shares.any():
            raise UserError("tokens: they record nothing of a cache, as those of Encode Image; connect Generate's.")
        pyramid, shares = tokens.pyramid, tokens.shares
        if show["show"] == AFTER:
            share = shares[:, min(show["row"], shares.shape[1]) - 1]
        else:
            share = lifetime(shares) if pyramid is None else lifetime_of_scales(shares, pyramid)
        why = "" if tokens.cached else NOTHING
        if pyramid is not None and image is None:
            maps = strip(share, pyramid, max(16, size // pyramid.stages))
            return io.NodeOutput(host.to_intermediate(captioned(maps, why)))
        if pyramid is not None:
            share = over_scales(share, pyramid)
            share = share / share.amax((1, 2), keepdim=True).clamp(min=1e-9)  # few tokens are held of fine scales
        count, rows, cols = share.shape
        if image is None:
            cell = math.ceil(size / max(rows, cols))
            height, width = rows * cell, cols * cell
        elif len(image) in (1, count):
            image = image.cpu().expand(count, -1, -1, -1)
            height, width = image.shape[1:3]
        else:
            raise UserError(
                f"image: {len(image)} images do not match {count} token grids; connect those decoded from these tokens."
            )
        return io.NodeOutput(host.to_intermediate(captioned(heatmap(share, height, width, image, strength), why)))
