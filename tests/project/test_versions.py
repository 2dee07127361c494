"""The table of what was tested where: what a run writes, and that the table is what the record says."""

from __future__ import annotations

import json
import platform
import sys
from types import SimpleNamespace

import pytest

from tests import versions

ROW = {
    "comfyui": "", "system": "Linux", "python": "3.11.7", "packages": "pinned", "torch": "2.13.0",
    "transformers": "4.57.6", "frontend": "", "tests": "all", "passed": 3, "skipped": 2,
    "failed": 1, "date": "2026-11-21", "commit": "abc",
}  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A record and a page of their own, and no ComfyUI."""
    page = tmp_path / "compatibility.md"
    page.write_text(f"# before\n{versions.OPEN}\nold\n{versions.CLOSE}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(versions, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "RECORD", tmp_path / "versions.json")
    monkeypatch.setattr(versions, "PAGE", page)
    monkeypatch.delenv("COMFYUI_DIR", raising=False)
    return page


def session(keyword="", markexpr="", source="TESTPATHS", record=True):
    option = SimpleNamespace(keyword=keyword, markexpr=markexpr, record=record)
    return SimpleNamespace(option=option, args_source=SimpleNamespace(name=source))


def reporter(**stats):
    return SimpleNamespace(stats=stats, write_line=lambda text: None)


def test_the_page_has_the_table_of_what_was_recorded():
    page = versions.PAGE.read_text(encoding="utf-8")
    assert page == versions.with_table(page, versions.rows()), "python tests/versions.py writes it"


def test_a_run_writes_one_row_and_the_table(files):
    page = SimpleNamespace(nodeid="tests/web/test_browser.py::test_the_widgets_in_the_page[legacy-1.58.1]")
    stats = {"passed": [page] * 2, "skipped": [1], "failed": [1], "error": [1]}
    versions.pytest_terminal_summary(reporter(**stats), 1, session())
    (row,) = versions.rows()
    assert row["python"] == platform.python_version() and row["frontend"] == "1.58.1"
    assert (row["tests"], row["passed"], row["skipped"], row["failed"]) == ("all", 2, 1, 2)
    text = files.read_text(encoding="utf-8")
    assert text.startswith("# before\n") and text.endswith(f"{versions.CLOSE}\nafter\n") and "old" not in text
    assert f"| {row['python']} | {row['packages'] or '—'} | {row['torch'] or '—'} |" in text


@pytest.mark.parametrize(("status", "record"), [(2, True), (3, True), (5, True), (0, False)])
def test_a_run_that_was_broken_off_or_not_to_be_recorded_writes_nothing(files, status, record):
    versions.pytest_terminal_summary(reporter(passed=[]), status, session(record=record))
    assert versions.rows() == []


def test_a_newer_row_replaces_that_of_the_same_environment_only(files):
    again = {"passed": 4, "date": "2026-12-01"}
    for change in ({}, {"python": "3.9.1"}, {"comfyui": "0.33.0"}, {"packages": "oldest"}, again):
        versions.add({**ROW, **change})
    assert [(row["python"], row["packages"], row["comfyui"], row["passed"]) for row in versions.rows()] == [
        ("3.9.1", "pinned", "", 3), ("3.11.7", "oldest", "", 3), ("3.11.7", "pinned", "", 4),
        ("3.11.7", "pinned", "0.33.0", 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("prefix", "packages"),
    [(".venv", "pinned"), (".venv/newest", "newest"), (".venv/oldest", "oldest"), ("venv", ""), (".", "")],
)
def test_a_row_says_which_of_our_environments_it_is_of(files, prefix, packages):
    assert versions.packages(str(versions.ROOT / prefix)) == packages


@pytest.mark.parametrize(
    ("given", "called"),
    [
        ({}, "all"),
        ({"markexpr": "host"}, "host only"),
        ({"keyword": "fold"}, "in part"),
        ({"source": "ARGS", "markexpr": "host"}, "in part"),
    ],
)
def test_what_was_asked_for_is_named(given, called):
    assert versions.scope(session(**given)) == called


def test_the_table_says_what_has_not_run():
    assert "Not run in full: Python 3.10, 3.12, 3.13." in versions.table(
        [ROW, {**ROW, "python": "3.10.1", "tests": "in part"}]
    )
    assert "Not run" not in versions.table([{**ROW, "python": f"{v}.1"} for v in versions.PYTHONS])
    assert (
        "| 3.11.7 | pinned | 2.13.0 | 4.57.6 | — | — | Linux | all | 3 | 2 | 1 | 2026-11-21, abc |"
        in versions.table([ROW])
    )


def test_in_a_comfyui_its_own_versions_count(tmp_path, monkeypatch):
    (tmp_path / "comfyui_version.py").write_text('__version__ = "0.14.0"\n')
    (tmp_path / "comfyui_frontend_package-1.38.14.dist-info").mkdir()
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    monkeypatch.setenv("COMFYUI_PYTHON", sys.executable)
    monkeypatch.setenv("COMFYUI_ARGS", f"--cpu --front-end-root {tmp_path}/comfyui_frontend_package/static")
    seen = versions.environment()
    assert (seen["comfyui"], seen["frontend"]) == ("0.14.0", "1.38.14")


def test_the_record_is_of_rows_that_ran():
    """Nothing but a run writes rows, so each has all of its fields, and tests in it."""
    for row in json.loads(versions.RECORD.read_text(encoding="utf-8")):
        assert set(row) == set(ROW) and row["passed"] > 0
