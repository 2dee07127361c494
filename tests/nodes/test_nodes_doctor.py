"""LineAR Doctor, against the stand-in for ComfyUI."""

from __future__ import annotations

import importlib

import pytest

from tests.nodes.comfy_double import PACK, execute
from tests.nodes.test_nodes import NODES, comfy  # noqa: F401 (a fixture)

DOCTOR = NODES["LineAR_Doctor"]
core = importlib.import_module(f"{PACK}.linear_core.doctor")


def test_the_report_is_on_the_node_and_comes_out_of_it(comfy, monkeypatch):  # noqa: F811
    monkeypatch.setattr(core, "self_test", lambda device, dtype, tick: iter([f"self-test on {device}"]))
    (comfy.models / "ar_image" / "broken.safetensors").write_bytes(b"no")
    out = execute(DOCTOR)
    (text,) = out.result
    assert out.ui == {"text": [text]} and text.splitlines()[-1] == "self-test on cpu"
    assert ", ComfyUI 0.33.0" in text.splitlines()[0] and "models in ar_image: 1" in text
    assert "  broken.safetensors: WRONG: " in text and str(comfy.models) not in text
    assert DOCTOR.fingerprint_inputs() != DOCTOR.fingerprint_inputs()


def test_stop_ends_the_self_test(comfy):  # noqa: F811
    comfy.stop_after = 0
    with pytest.raises(importlib.import_module("tests.nodes.comfy_double").Interrupted):
        execute(DOCTOR)
