"""The benchmarks run, and what they foretell is what is allocated."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext

import pytest

from bench import fold_ablation, paper_table, quality, scan, soak, speed, widget
from bench.shapes import SHAPES, ModelShape
from linear_core.grid import Grid
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.models.var import VARConfig
from linear_core.plan import CachePlan, SamplePlan
from linear_core.pyramid import Pyramid
from linear_core.tokenizers.pyramid import PyramidConfig
from tests.bench.command import last_line


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


def test_speed_sets_kinds_of_weights_side_by_side(tiny, monkeypatch, capsys):
    told = ["--models", "tiny", "--images", "1", "--plans", "full", "--repeat", "1", "--lines", "1"]
    told += ["--dtype", "float32", "bfloat16", "--weights", "default", "int8"]
    results = last_line(speed.main, ["--device", "cpu", *told], monkeypatch, capsys)["results"]
    assert [(r["dtype"], r["weights"]) for r in results] == [
        (dtype, weights) for dtype in ("float32", "bfloat16") for weights in ("default", "int8")
    ]
    whole, eight, half, eight_of_half = (r["weight_bytes"] for r in results)
    assert half == whole / 2 and eight < whole and eight_of_half < half
    monkeypatch.setattr("sys.argv", ["speed.py", *told, "--against", "transformers"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "--against: " in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--lines", "2"], []])
def test_speed_says_what_was_not_recorded(how, tiny, monkeypatch, capsys):
    """Without a GPU neither the step nor the end of a line becomes a graph; a full cache has no such end."""
    told = ["--models", "tiny", "--images", "1", "--plans", "full", "line:3", "--repeat", "1", "--steps", "graph"]
    document = last_line(speed.main, ["--device", "cpu", *told, *how], monkeypatch, capsys)
    why = "graphs need cuda and this runs on cpu"
    full, few = (r["not_recorded"] for r in document["results"])
    assert full == {"step": why} and few == {"step": why, "line's end": why}


def test_scans_that_carry_and_that_go_back_say_the_same(monkeypatch, capsys):
    (result,) = last_line(scan.main, ["--depth", "1", "--layers", "2", "--rounds", "1"], monkeypatch, capsys)
    assert 0 < result["largest_relative_difference"] < 1e-4
    assert result["bytes"] == {"carried": 2 * 2 * 4 * (3 * 256 + 128 * 64), "var": 2 * 2 * 64 * 4 * (2 * 424 + 680)}
    assert all(len(times) == 10 and min(times) > 0 for times in result["seconds"].values())


def test_the_cost_of_previews_over_scales(monkeypatch, capsys):
    """Every scale is told and drawn; whether it is little is for the real sizes to say."""
    pyramid = Pyramid.square(1, 2, 3, 4, 5, 6)
    monkeypatch.setattr(widget, "PYRAMID", pyramid)
    monkeypatch.setattr(widget, "D16", VARConfig(2, 32, 2, 48, 64, 10, 8, pyramid))
    monkeypatch.setattr(widget, "ITS_TOKENIZER", PyramidConfig(64, 8, (8, 8), 1))
    monkeypatch.setattr("sys.argv", ["widget.py", "--scales"])
    assert widget.main() in (0, 1)
    first, without, events, previews, last = capsys.readouterr().out.splitlines()
    assert first.startswith("scales 1 2 3 4 5 6, 2 layers of 2 heads") and "without: " in without
    assert re.search(r"events: \d+\.\d+% of the time, [1-9]\d* kB in total", events)
    assert re.search(r"previews: \d+\.\d+% of the time, [1-6] of them; together ", previews) and "once" not in last


SHORT = ["--device", "cpu", "--models", "tiny", "--plans", "line:2"]


def test_speed_writes_to_a_name_or_a_file(tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speed, "RESULTS", tmp_path / "results")
    for out, path in (("short", "results/speed-short.json"), (str(tmp_path / "a" / "b.json"), "a/b.json")):
        told = ["--images", "1", "--repeat", "1", "--lines", "1", "--out", out]
        document = last_line(speed.main, [*SHORT, *told], monkeypatch, capsys)
        written = json.loads((tmp_path / path).read_text(encoding="utf-8"))
        assert written["results"] == document["results"] and "stopped" not in written


@pytest.mark.parametrize(
    ("main", "out", "words"),
    [(speed.main, "no/name", "'no/name' is neither a name nor a file; end a file's name in .json."),
     (speed.main, "{0}/text/x.json", "the folder {0}/text cannot be made"),
     (speed.main, "{0}/folder.json", "{0}/folder.json is a folder"),
     (paper_table.main, "{0}/folder.json", "{0}/folder.json is a folder"),
     (soak.main, "{0}/text/x.json", "the folder {0}/text cannot be made"),
     (fold_ablation.main, "{0}/text", "the folder {0}/text cannot be made"),
     (quality.main, "{0}/text", "the folder {0}/text cannot be made")],
)  # fmt: skip
def test_where_nothing_can_be_written_nothing_is_measured(main, out, words, monkeypatch, capsys, tmp_path):
    (tmp_path / "text").write_text("no folder")
    (tmp_path / "folder.json").mkdir()
    for module, work in ((speed, "measure"), (paper_table, "rows_of"), (soak, "comfyui"), (fold_ablation, "Lab"),
                         (quality, "Lab")):  # fmt: skip
        monkeypatch.setattr(module, work, lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr("sys.argv", ["bench", "--out", out.format(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and words.format(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize("how", [["--lines", "3"], []])
def test_speed_keeps_what_was_measured_before_it_was_stopped(how, tiny, monkeypatch, capsys, tmp_path):
    """Of a whole batch size and, of the next, what there was by then: here two of its three lines, or images."""
    prepared, drawn = speed.Ours.prepare, speed.Ours.picture
    count = {"prepare": 0, "picture": 0}

    def stop_at(name, last, work):
        def counting(self, *args):
            count[name] += self.images == 2
            if count[name] == last:
                raise KeyboardInterrupt
            return work(self, *args)

        return counting

    monkeypatch.setattr(speed.Ours, "prepare", stop_at("prepare", 5, prepared))  # two before the lines, one at each
    monkeypatch.setattr(speed.Ours, "picture", stop_at("picture", 4, drawn))  # one for warming up
    told = ["--images", "1", "2", "--repeat", "3" if not how else "1", *how, "--out", str(tmp_path / "x.json")]
    monkeypatch.setattr("sys.argv", ["bench", *SHORT, *told])
    with pytest.raises(KeyboardInterrupt):
        speed.main()
    written = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert written["stopped"] == "KeyboardInterrupt" and f"{tmp_path}/x.json" in capsys.readouterr().err
    assert [r["images"] for r in written["results"]] == [1, 2]
    if how:
        assert [r["extrapolated_from_lines"] for r in written["results"]] == [3, 2]
    else:
        assert [r["image_spread_ms"]["n"] for r in written["results"]] == [3, 2]


def test_soak_keeps_its_rows_when_a_prompt_fails(monkeypatch, tmp_path):
    def rows(*_):
        for images in range(0, 40, 8):
            row = {"images": images, "end": "", "seconds": 1.0, "told": 9, "rss": 2**30, "threads": 3, "sockets": 2}
            yield row | {"files": 1, "ours": 0, "temporary": 0}
        raise AssertionError("execution_error")

    class Host:
        def get(self, _):
            return {"system": {"comfyui_version": "0", "pytorch_version": "0"}}

    monkeypatch.setattr(soak, "comfyui", lambda: nullcontext(Host()))
    monkeypatch.setattr(soak, "soak", rows)
    monkeypatch.setattr("sys.argv", ["bench", "--out", str(tmp_path / "soak.json")])
    with pytest.raises(AssertionError):
        soak.main()
    written = json.loads((tmp_path / "soak.json").read_text(encoding="utf-8"))
    assert written["stopped"] == "AssertionError: execution_error" and written["images"] == 32
    assert len(written["rows"]) == 5 and written["left_over"] == []


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
