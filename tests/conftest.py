"""What every test shares."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ("tests.versions", "tests.quick")  # --record, --quick
TRACED = 4, 8  # coverage follows so many cases of a test, and of one with very many one in so many

try:
    import torch
except ModuleNotFoundError:  # a Python that there is no torch for yet: what needs none still runs
    pass
else:
    torch.set_num_threads(1)  # tiny tensors are quicker without a pool, and results do not depend on the machine


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model cut down to a layer and 8 x 8 tokens, its tokenizer beside it: a picture takes a moment."""
    from linear_core.checkpoints.library import bundled_files
    from tests.tiny import cut_down

    folder = tmp_path_factory.mktemp("small")
    shutil.copy(bundled_files().tokenizer, folder)
    return cut_down(folder / "small.safetensors")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` reads only the files that have such tests: others may need packages that a GPU's machine lacks."""
    if config.option.markexpr == "gpu" and collection_path.name.startswith("test_"):
        return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("_cov"):
        trace_few_cases(items)
    # Those that wait for a page go first: where two workers share the tests, the other one computes meanwhile.
    items.sort(key=lambda item: item.get_closest_marker("browser") is None)
    if os.environ.get("COMFYUI_DIR"):
        return
    for item in items:
        if item.get_closest_marker("host"):
            item.add_marker(pytest.mark.skip(reason="COMFYUI_DIR does not say where a ComfyUI is"))


def trace_few_cases(items: list[pytest.Item]) -> None:
    """Let coverage follow a few cases of each test: those that it follows take 1.6 times as long (Python 3.11).

    So the share that it tells may be too small, never too large.
    """
    from tests.quick import spread

    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for several in cases.values():
        few, one_in = TRACED
        traced = {id(item) for item in spread(several, max(few, len(several) // one_in))}
        for item in several:
            if id(item) not in traced:
                item.add_marker("no_cover")


@pytest.fixture
def nothing_deprecated(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever asks for this uses nothing deprecated, whether a warning says so or transformers' log."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    if log := sys.modules.get("transformers.utils.logging"):
        log.warning_once.cache_clear()  # or only the first test of a session would hear it
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        yield
    assert not [told for record in caplog.get_records("call") if "deprecated" in (told := record.getMessage())]
