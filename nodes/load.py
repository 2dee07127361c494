"""Load AR Model."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..linear_core.checkpoints.library import load_model
from ..linear_core.errors import UserError
from . import files, host
from .inputs import checked
from .sockets import MODEL, Model


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_LoadModel",
            display_name="Load AR Model",
            category="LineAR",
            description="Loads an autoregressive image model: the decoder, which generates tokens, and the tokenizer, "
            "which turns them into pixels. The bundled model needs no download and no GPU.",
            search_aliases=["autoregressive", "llamagen", "janus", "lumina", "emu3", "var", "infinity", "mar",
                            "load linear",
                            "load checkpoint"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=files.model_names(),
                    extra_dict={"linear_ar": files.model_facts()},
                    tooltip="The decoder. Bundled ones come with the pack; others go into models/ar_image: "
                    "LlamaGen, VAR, M-VAR, Infinity and MAR files (.safetensors, .pt or .pth) and folders of "
                    "Infinity 8B, Janus (also found in models/Janus-Pro), Lumina-mGPT, Anole, Emu3, Emu3.5, "
                    "Xiaomi-Robotics-U0 or NOVA. "
                    "Licences: LlamaGen, VAR, Infinity and MAR MIT; M-VAR Apache-2.0 (its code: none stated); Janus "
                    "DeepSeek Model License; Lumina-mGPT 2.0 Apache-2.0 (its VQ tokenizer: none stated); Lumina-mGPT "
                    "7B and Anole not for commercial use (Chameleon Research License); Emu3, Emu3.5, U0 and NOVA "
                    "Apache-2.0.",
                ),
                io.Combo.Input(
                    "tokenizer",
                    options=files.tokenizer_names(),
                    tooltip="The VQ tokenizer that belongs to the decoder. 'automatic' finds it: the bundled one, the "
                    "one in the model's folder or named in its file, vq_ds16_c2i or vq_ds16_t2i for LlamaGen, vqgan "
                    "for Lumina-mGPT and Anole, movqgan_270M for Lumina-mGPT 2.0, Emu3-VisionTokenizer and "
                    "Emu3.5-VisionTokenizer for their families (U0: Emu3.5's), vae_ch160v4096z32 for VAR and "
                    "M-VAR, infinity_vae_d16, _d32reg and _d56_f8_14_patchify for Infinity 125M, 2B and 8B, kl16 for "
                    "MAR.",
                ),
                io.Int.Input(
                    "grid_rows",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Lines of tokens per image. 0: read from the file (its metadata, or 256, 384 or 512 in its "
                    "name). Typical: 16, 24 or 32.",
                ),
                io.Int.Input(
                    "grid_cols",
                    default=0,
                    min=0,
                    max=256,
                    optional=True,
                    advanced=True,
                    tooltip="Tokens per line. 0: read from the file. Set both numbers or neither.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(host.WEIGHT_DTYPES),
                    default="default",
                    optional=True,
                    advanced=True,
                    tooltip="How the decoder's large matrices are stored. default: in the compute precision. int8: one "
                    "byte per weight, half the memory of bfloat16, and hardly any difference to see. int4: half of "
                    "int8, at some cost in quality. Both are multiplied as they are stored, which saves time where "
                    "reading the weights takes most of it: for few pictures at once. fp8: one byte per weight too, but "
                    "slower, as every use converts it. Line Cache shows the result: Janus-Pro-7B takes 13.2 GB, or "
                    "7.0 GB in int8.",
                ),
                io.Boolean.Input(
                    "stream_weights",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="For models larger than the graphics card: weights stay in the computer's memory and pass "
                    "through the card for every token, which is slow. A token of one picture costs as much as a token "
                    "of many, so draw large batches; a cache of few lines makes room for them. 'python -m linear_core "
                    "plan MODEL --card 12' says what a picture would take.",
                ),
            ],
            outputs=[
                MODEL.Output(display_name="model", tooltip="For Class Prompt, Text Prompt, Generate, Masked Generate "
                             "and Decode. ComfyUI loads it when it is used and offloads it when memory is needed."),
            ],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(
        cls,
        model: str,
        tokenizer: str,
        grid_rows: int = 0,
        grid_cols: int = 0,
        weight_dtype: str = "default",
        stream_weights: bool = False,
    ) -> io.NodeOutput:
        if bool(grid_rows) != bool(grid_cols):
            raise UserError(
                f"grid_rows, grid_cols: they are {grid_rows} and {grid_cols}; set both, or leave both at 0."
            )
        grid = (grid_rows, grid_cols) if grid_rows else None
        found = files.find_files(model, tokenizer, grid)
        kept = host.WEIGHT_DTYPES[weight_dtype]
        layers = host.CastingLayers if isinstance(kept, torch.dtype) else host.Layers
        image = load_model(
            found,
            grid=grid,
            dtype=host.compute_dtype(),
            weight_dtype=kept,
            ops=layers,
            compute_device=host.compute_device(),
        )
        return io.NodeOutput(Model(image, host.managed(image.decoder, stream_weights), host.managed(image.tokenizer)))

    @classmethod
    def validate_inputs(cls, model: str | None = None, tokenizer: str | None = None) -> bool | str:
        """In place of the host's check, which only says that a name is not in the list, as if it were saved on Windows;
        a linked one is None here."""
        try:
            if model is not None:
                files.find_decoder(model)
            if tokenizer not in (None, files.AUTOMATIC):
                files.find_vq(tokenizer)
        except UserError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        model: str | None = None,
        tokenizer: str | None = None,
        grid_rows: int | None = 0,
        grid_cols: int | None = 0,
        **_: Any,
    ) -> str:
        """A file that was replaced is loaded again. What comes through a link is None here, and may be any file."""
        if model is None or tokenizer is None:
            return files.fingerprint_of_all()
        try:
            found = files.find_files(model, tokenizer, (grid_rows, grid_cols) if grid_rows and grid_cols else None)
        except UserError:
            return ""  # the node runs and says what is wrong
        return files.fingerprint(found)
