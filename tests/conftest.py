"""What every test shares."""

from __future__ import annotations

import os

import pytest

from tests.versions import pytest_addoption, pytest_terminal_summary  # noqa: F401 (hooks: --record)

try:
    import torch
except ModuleNotFoundError:  # a Python that there is no torch for yet: what needs none still runs
    pass
else:
    torch.set_num_threads(1)  # tiny tensors are quicker without a pool, and results do not depend on the machine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("COMFYUI_DIR"):
        return
    for item in items:
        if item.get_closest_marker("host"):
            item.add_marker(pytest.mark.skip(reason="COMFYUI_DIR does not say where a ComfyUI is"))
