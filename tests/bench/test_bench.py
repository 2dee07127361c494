"""The benchmarks run, and what they foretell is what is allocated."""

from __future__ import annotations

import json

import pytest

from bench import paper_table, speed
from bench.shapes import SHAPES, ModelShape
from linear_core.grid import Grid
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.plan import CachePlan, SamplePlan


def last_line(main, arguments: list[str], monkeypatch, capsys) -> dict:
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    assert main() == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize(
    ("name", "millions"),
    [("LlamaGen-B", 111), ("LlamaGen-L", 343), ("LlamaGen-XL", 775), ("LlamaGen-XXL", 1411), ("Janus-Pro-1B", 1485),
     ("Janus-Pro-7B", 6592)],
)  # fmt: skip
def test_shapes_are_those_of_the_published_models(name, millions):
    assert round(SHAPES[name].parameters()[0] / 1e6) == millions


@pytest.fixture
def tiny(monkeypatch):
    """A model of two layers and 6 x 5 tokens under the name "tiny"; it has random weights, as the large ones do."""
    config = LlamaGenConfig(2, 32, 2, 48, 64, classes=5)
    monkeypatch.setitem(SHAPES, "tiny", ModelShape("tiny", LlamaGen, config, Grid(6, 5), SamplePlan(guidance=3.0)))


@pytest.mark.parametrize("how", [["--lines", "1"], []])
def test_speed_says_what_it_measured(how, tiny, monkeypatch, capsys):
    told = ["--models", "tiny", "--images", "1", "--plans", "full", "line:2", "fold:3:int8", "--repeat", "1", *how]
    document = last_line(speed.main, ["--device", "cpu", *told], monkeypatch, capsys)
    assert [r["name"] for r in document["results"]] == ["full", "line 2/6", "fold 3/6 int8"]
    for result in document["results"]:
        assert result["cache_bytes"] == result["planned_bytes"]
        assert result["extrapolated_from_lines"] == len(how[1:])
        assert result["tokens_per_second"] == pytest.approx(30 / result["image_seconds"])
    assert document["circumstances"]["torch"] and document["circumstances"]["copy_bytes_per_second"] > 0


@pytest.mark.parametrize("how", [["--lines", "2"], []])
def test_speed_says_what_was_not_recorded(how, tiny, monkeypatch, capsys):
    """Without a GPU neither the step nor the end of a line becomes a graph; a full cache has no such end."""
    told = ["--models", "tiny", "--images", "1", "--plans", "full", "line:3", "--repeat", "1", "--steps", "graph"]
    document = last_line(speed.main, ["--device", "cpu", *told, *how], monkeypatch, capsys)
    why = "graphs are for cuda, and this runs on cpu"
    full, few = (r["not_recorded"] for r in document["results"])
    assert full == {"step": why} and few == {"step": why, "line's end": why}


def test_the_middle_of_each_part_stands_for_it():
    assert speed.sampled_rows(24, 2) == [6, 18] and speed.sampled_rows(24, 1) == [12]
    assert speed.sampled_rows(3, 9) == [0, 1, 2]


def test_the_papers_table_has_our_formulas(monkeypatch, capsys):
    """The cache of 256 pictures of XL as docs/models.md has it for one: 202.9 and 42.5 MiB."""
    document = last_line(paper_table.main, ["--models", "LlamaGen-XL"], monkeypatch, capsys)
    full, _, few = document["results"]
    assert [round(r["cache_gb"] * 1e9 / 2**20 / 256, 1) for r in (full, few)] == [202.9, 42.5]
    assert document["circumstances"]["kind"] == "PREDICTED" and few["predicted_seconds"] < full["predicted_seconds"]


def test_what_a_slower_memory_does_to_the_prediction():
    """Twice as slow a memory takes twice as long where memory is all there is."""
    shape, plan = SHAPES["LlamaGen-B"], CachePlan("line", 4)
    fast, slow = (paper_table.predicted(shape, plan, 2, bandwidth, 1e30) for bandwidth in (2e12, 1e12))
    assert slow == pytest.approx(2 * fast)
