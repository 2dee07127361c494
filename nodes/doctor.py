"""LineAR Doctor."""

from __future__ import annotations

import time
from pathlib import Path

from comfy_api.latest import io

from ..linear_core import doctor
from . import files, host
from .inputs import checked


class Doctor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_Doctor",
            display_name="LineAR Doctor",
            category="LineAR",
            description="Says what is installed and whether it works: versions, device, memory, every model found and "
            "what is wrong with it, and a self-test of ten seconds. Paste its text into a bug report; it names no "
            "folders of yours.",
            search_aliases=["bug report", "diagnose", "versions", "self-test", "troubleshoot", "linear"],
            outputs=[io.String.Output(display_name="report", tooltip="The report, as shown on the node.")],
            is_output_node=True,
        )

    @classmethod
    @checked
    def execute(cls) -> io.NodeOutput:
        lines = doctor.report(
            map(Path, host.folders()),
            device=host.device_type(),
            dtype=host.compute_dtype(),
            versions=host.versions(),
            encoders=files.text_encoder_paths(),
            tick=host.stop_if_asked,
        )
        text = "\n".join(lines)
        return io.NodeOutput(text, ui={"text": [text]})

    @classmethod
    def fingerprint_inputs(cls) -> int:
        """It runs every time: what it tells of may have changed."""
        return time.time_ns()
