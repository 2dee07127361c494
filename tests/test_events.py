"""Events: deltas replayed are the whole run, in Python here and in web/state.js where there is a Node.js."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_core import events
from linear_core.errors import UserError
from linear_core.events import (
    NONE,
    Finished,
    Kept,
    Line,
    Picture,
    Row,
    Stage,
    Started,
    Trace,
    pack,
    pack_codes,
    unpack,
    unpack_codes,
    unpack_kept,
    unpack_scales,
)
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.loop.memory import run_bytes, scales_run_bytes
from linear_core.loop.scales import generate_scales
from linear_core.models.var import PYRAMIDS
from linear_core.pictures.heatmap import over_scales
from linear_core.plan import PRESETS, RELEASES, CachePlan, CacheShape, SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import class_prompt
from linear_core.pyramid import Pyramid
from tests.tiny import Toy, llamagen, var

ROOT = Path(__file__).resolve().parent.parent
CASES = [("class", policy, release) for policy in POLICIES for release in RELEASES]
CASES += [("toy eol", "line", release) for release in RELEASES]


def started(decoder: Any, plan: CachePlan, images: int, detail: str) -> Started:
    grid, shape = decoder.grid, decoder.cache_shape()
    return Started(
        run="r", rows=grid.rows, cols=grid.cols, stride=grid.stride, images=images,
        shown=events.images_shown(images, grid.rows, grid.cols),
        columns=1, layers=shape.layers, heads=shape.heads, detail=detail, seed=3, policy=plan.policy,
        release=plan.release, lines=plan.lines(grid) - plan.evicts(grid), anchors=plan.anchors, recent=plan.recent,
        cache_bytes=shape.bytes(grid, plan, images), full_bytes=shape.bytes(grid, CachePlan("full"), images),
    )  # fmt: skip


@cache
def trace(model: str, policy: str, release: str, detail: str = "heads", images: int = 2) -> tuple[list[Line], Trace]:
    """A run's lines and what was told of it."""
    if model == "class":
        decoder, prompt = llamagen(6, 5), class_prompt([1, 3, 0, 2, 4, 1][:images])
    else:
        decoder = Toy(6, 5, length=4, eol=True)
        prompt = decoder.prompt([4, 2])
    plan = CachePlan(policy, 2, 2, 1, release)
    told, lines = Trace(started(decoder, plan, images, detail)), []
    for line in generate(decoder, prompt, plan, SamplePlan(seed=3)):
        told.add(line)
        lines.append(line)
    told.finish()
    return lines, told


def replay(told: list[dict]) -> list[tuple[list[int], list[list[set[int]]], list[list[int]]]]:
    """The reducer in plain Python: after each line the shares, what each layer and head holds, the share by layer."""
    run, *rows, _ = told
    shares = [0] * (run["shown"] * run["rows"] * run["cols"])
    held: list[list[set[int]]] = [[set() for _ in range(run["heads"])] for _ in range(run["layers"])]
    by_layer = [[0] * (run["rows"] * run["cols"]) for _ in range(run["layers"])]
    history = []
    for event in rows:
        cells = unpack(event["cells"])
        for cell, share in zip(cells, unpack(event["shares"], "B"), strict=True):
            shares[cell] = share
        gone = unpack(event["evicted"])
        each = len(gone) // (run["layers"] * run["heads"])
        new = set(range(event["row"] * run["stride"], (event["row"] + 1) * run["stride"]))
        for layer in range(run["layers"]):
            for head in range(run["heads"]):
                start = (layer * run["heads"] + head) * each
                held[layer][head] = (held[layer][head] | new) - set(gone[start : start + each])
        first = [cell for cell in cells if cell < run["rows"] * run["cols"]]
        for number, share in enumerate(unpack(event["by_layer"], "B")):
            by_layer[number // len(first)][first[number % len(first)]] = share
        history.append((list(shares), [list(heads) for heads in held], [list(layer) for layer in by_layer]))
    return history


def in_256(share: Tensor) -> list[int]:
    return (share * 255).round().int().flatten().tolist()


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_deltas_replayed_are_the_run(case):
    """Shares of both images, and what every layer and head of the first holds, after every line."""
    lines, told = trace(*case)
    for line, (shares, held, _) in zip(lines, replay(told.events), strict=True):
        assert shares == in_256(line.share)
        for layer, heads in enumerate(held):
            for head, tokens in enumerate(heads):
                assert tokens == set(line.by_head[layer, head].nonzero()[:, 0].tolist())


@pytest.mark.parametrize("model", ["class", "toy eol"])
def test_what_a_token_stands_for(model):
    """All tokens drawn so far are accounted for by those that are held, and the deltas give each one's number."""
    lines, told = trace(model, "fold", "fold")
    run, stands = told.started, [8] * 60
    heads = run.layers * run.heads
    for line, event in zip(lines, told.events[1:-1], strict=True):
        cells, eighths = unpack(event["merged"]), unpack(event["stands"])
        for cell, number in zip(cells, eighths, strict=True):
            assert stands[cell] != number
            stands[cell] = number
        expected = line.stands.flatten().tolist()
        shown = [(s, max(8, round(8 * e))) for s, e in zip(stands, expected, strict=True) if e]
        assert all(ours == theirs for ours, theirs in shown)
        fed = (line.row + 1) * run.stride - (line.row + 1 == run.rows)  # the last token is never fed
        accounted = (line.share * heads * line.stands).sum((1, 2))
        if model == "class":  # an end-of-line token is nobody's cell, and may have been given something too
            torch.testing.assert_close(accounted, torch.full((2,), float(heads * fed)))
        assert (accounted <= heads * fed + 0.01).all()
    assert max(stands) > 16, "some stand for more than two"
    assert all(trace(model, "line", release)[0][-1].stands is None for release in ("strict", "lazy"))
    assert trace(model, "line", "strict")[1].events[-2]["merged"] == ""


@pytest.mark.parametrize("case", [CASES[0], CASES[1], *CASES[-2:]], ids="-".join)
def test_by_layer_where_heads_are_too_many(case):
    """A large model's trace says which share of each layer's heads holds a cell."""
    lines, told = trace(*case, detail="layers")
    run = told.started
    assert all(event["evicted"] == "" for event in told.events[1:-1])
    for line, (shares, _, by_layer) in zip(lines, replay(told.events), strict=True):
        assert shares == in_256(line.share)
        held = line.by_head.unflatten(-1, (run.rows, run.stride))[..., : run.cols].float().mean(1)
        assert by_layer == [in_256(layer) for layer in held]


def test_by_head_agrees_with_share():
    """The two views of a line say the same of the first image, and nothing is told twice."""
    lines, told = trace("class", "line", "strict")
    for line in lines:
        torch.testing.assert_close(line.by_head.float().mean((0, 1)), line.share[0].flatten())
    assert [len(unpack(event["evicted"])) for event in told.events[1:-1]] == [0, 0, 30, 30, 30, 6]
    assert unpack(told.events[-2]["evicted"]) == [29] * 6, "the last token of all is never fed"
    shares = [0] * 60
    for event in told.events[1:-1]:
        for cell, share in zip(unpack(event["cells"]), unpack(event["shares"], "B"), strict=True):
            assert shares[cell] != share
            shares[cell] = share


def test_a_large_batch_tells_of_its_first_images():
    """Shares of four images at most; tokens of all of them."""
    lines, told = trace("class", "line", "strict", images=6)
    run = told.started
    assert (run.images, run.shown) == (6, 4)
    shares = replay(told.events)[-1][0]
    assert shares == in_256(lines[-1].share[:4])
    codes = [unpack(event["tokens"]) for event in told.events[1:-1]]
    assert torch.equal(
        torch.tensor(codes).unflatten(1, (6, 5)).transpose(0, 1), torch.stack([x.tokens for x in lines], 1)
    )


def test_numbers_for_the_text_line():
    """Speed, time and held tokens, of a line and of the run; replayed lines do not count as speed."""
    _, told = trace("class", "line", "strict")
    run = told.started
    trace_ = Trace(run)
    for row, (seconds, replayed) in enumerate([(4.0, True), (0.5, False), (0.25, False)]):
        event = trace_.add(
            Line(row, 6, torch.zeros(2, 5).long(), torch.zeros(2, 6, 5), 5.0 * row, seconds, 7, None, replayed)
        )
        assert event["tokens_per_second"] == 10 / seconds and event["seconds"] == seconds
        assert event["evicted"] == "" and event is trace_.events[-1]
    end = trace_.finish()
    assert (end["rows"], end["seconds"], end["tokens_per_second"], end["held"]) == (3, 4.75, round(20 / 0.75, 1), 10.0)
    whole = Trace(run)
    for row, held in enumerate([7.0, 9.0, 30.0]):  # the last line lets nothing go
        whole.add(Line(row, 3, torch.zeros(2, 5).long(), torch.zeros(2, 3, 5), held, 1.0, 7))
    assert whole.finish()["held"] == 9.0


def test_lists_of_unequal_length_are_filled_up():
    """A head that evicts less than another says so."""
    _, told = trace("class", "line", "strict")
    trace_ = Trace(told.started)
    held = torch.zeros(2, 3, 30, dtype=torch.bool)
    held[..., :5] = True
    held[0, 0, 1] = held[1, 2, :2] = False
    event = trace_.add(Line(0, 6, torch.zeros(2, 5).long(), torch.zeros(2, 6, 5), 5.0, 1.0, 7, held))
    assert unpack(event["evicted"]) == [1, NONE, *[NONE] * 8, 0, 1]


def test_layers_that_change_places():
    """A cell that another layer holds now is told, though as many hold it; what did not change is not told again."""
    _, told = trace("class", "line", "strict", detail="layers")
    trace_ = Trace(told.started)
    share = torch.zeros(2, 6, 5)
    share[0, 0, :2] = 0.5
    for row, layer in enumerate([0, 1, 1]):
        held = torch.zeros(2, 3, 30, dtype=torch.bool)
        held[layer, :, 0] = held[0, :, 1] = True
        trace_.add(Line(row, 6, torch.zeros(2, 5).long(), share, 5.0, 1.0, 7, held))
    assert [unpack(event["cells"]) for event in trace_.events[1:]] == [[0, 1], [0], []]
    assert [unpack(event["by_layer"], "B") for event in trace_.events[1:]] == [[255, 255, 0, 0], [0, 255], []]


def test_detail_goes_by_size():
    """The bundled model and LlamaGen L tell of every head; XL at 24 x 24 would send more than history should hold."""
    assert events.detail(6, 6, 576) == events.detail(24, 16, 576) == "heads"
    assert events.detail(36, 20, 576) == "layers"
    assert 2 * 16 * 16 * 1024 == events.HEAD_BYTES and events.detail(16, 16, 1024) == "heads", "up to the limit"


def test_json_and_size():
    """The whole trace is JSON, and for a grid of 24 x 24 with 36 heads it stays below 200 kB."""
    _, told = trace("class", "line", "strict")
    assert json.loads(json.dumps(told.events)) == told.events
    plan, model = CachePlan("line", 4, 4, 2), llamagen(24, 24, layers=12)
    trace_ = Trace(started(model, plan, 1, "heads"))
    above = torch.arange(23 * 24).view(1, 23, 24) % model.codes  # given lines are fed at once
    for line in generate(model, class_prompt([1]), plan, SamplePlan(guidance=1), above=above):
        trace_.add(line)
    size = len(json.dumps(trace_.events))
    assert 12 * 3 * 20 * 24 * 2 < size < 200_000


def test_pack():
    assert pack([1, 256, NONE]) == "AQAAAf//" and unpack("AQAAAf//") == [1, 256, NONE]
    assert unpack(pack([0, 255], "B"), "B") == [0, 255] and unpack("") == []
    with pytest.raises(OverflowError):
        pack([65536])


def of_scales(plan: CachePlan, detail: str) -> tuple[Pyramid, Iterator[Stage], Trace]:
    """A run of two images over scales, and a trace to tell of it."""
    decoder, quantizer = var(1, 2, 3, 4)
    pyramid, shape = decoder.pyramid, decoder.cache_shape()
    run = Started(
        run="r", rows=4, cols=4, stride=4, images=2, shown=2, columns=1, layers=2, heads=3, detail=detail, seed=3,
        policy=plan.policy, release=plan.release, lines=plan.keeps(pyramid), anchors=4, recent=0,
        cache_bytes=shape.scales_bytes(pyramid, plan, 2), full_bytes=0, sides=[list(side) for side in pyramid.sides],
    )  # fmt: skip
    return pyramid, generate_scales(decoder, quantizer, class_prompt([1, 3]), plan, SamplePlan(seed=3)), Trace(run)


@pytest.mark.parametrize("detail", ["heads", "layers"])
@pytest.mark.parametrize("plan", [CachePlan("fold", share=0.5), CachePlan("adakv", share=0.5), CachePlan("full")])
def test_scales_are_told_like_lines(plan, detail):
    """Replayed, the events of a run over scales give every share, and what each head or layer held after each."""
    pyramid, drawing, told = of_scales(plan, detail)
    run = told.started
    shares = [0] * (2 * run.cells)
    held = [[set() for _ in range(3)] for _ in range(2)]
    by_layer = [[0] * run.cells for _ in range(2)]
    for stage in drawing:
        event = json.loads(json.dumps(told.add(stage)))
        cells = unpack(event["cells"])
        for cell, share in zip(cells, unpack(event["shares"], "B"), strict=True):
            shares[cell] = share
        assert shares == (stage.share * 255).round().int().flatten().tolist()
        assert unpack(event["tokens"]) == stage.tokens.flatten().tolist() and event["cols"] == stage.row + 1
        own = range(pyramid.index(stage.row), pyramid.index(stage.row + 1)) if stage.row < 3 else ()
        gone = unpack(event["evicted"])
        for n, head in enumerate(head for layer in held for head in layer):
            head |= set(own)
            head -= set(gone[n * len(gone) // 6 : (n + 1) * len(gone) // 6])
        shown = [cell for cell in cells if cell < run.cells]
        layers = unpack(event["by_layer"], "B")
        for n, layer in enumerate(by_layer):
            for cell, share in zip(shown, layers[n * len(shown) :], strict=False):
                layer[cell] = share
        if detail == "heads":
            holds = [[set(head.nonzero()[:, 0].tolist()) for head in layer] for layer in stage.by_head]
            assert held == holds and not layers
        else:
            assert by_layer == (stage.by_head.float().mean(1) * 255).round().int().tolist() and not gone
    assert told.finish()["rows"] == 4


def test_cells_of_all_images_shown_have_numbers_that_fit():
    """Lumina-mGPT 2.0 has 9,216 cells an image; grids of 256 lines of 256 may be typed in."""
    found = [events.images_shown(9, *sides) for sides in ((24, 24), (192, 48), (128, 128), (256, 128), (256, 256))]
    assert found == [4, 4, 4, 2, 1]


def test_codes_as_text():
    """What the widget hands back is the codes, and anything else is an error."""
    codes = torch.arange(12).view(2, 2, 3) * 1000
    text = pack_codes(codes)
    assert text == "2x2x3:" + pack(codes.flatten().tolist())
    assert unpack_codes(text) == ((2, 2, 3), codes.flatten().tolist())
    large = codes * 10 + 21_071  # up to 131,071, as in Emu3.5's codebook
    assert unpack_codes(pack_codes(large)) == ((2, 2, 3), large.flatten().tolist())
    for wrong in ("", "2x2x3", "2x2x4:" + text[6:], "axbxc:", "0x2x3:", text[:-2]):
        with pytest.raises(ValueError):
            unpack_codes(wrong)


def test_kept_runs_as_text():
    """Of one run its codes, of several each with its list index and seed; anything else is an error."""
    one, other = pack_codes(torch.arange(6).view(1, 2, 3)), pack_codes(torch.arange(3).view(1, 1, 3))
    assert unpack_kept(one) == [Kept(None, None, (1, 2, 3), [*range(6)])]
    (listed,) = unpack_kept(f"0@5,{2**64 - 1}|{one}")
    assert listed == Kept(0, 5, (1, 2, 3), [*range(6)], (5, 2**64 - 1))
    kept = unpack_kept(f"2@{2**64 - 1}|{one};0@7|{other}")
    assert [each[:3] for each in kept] == [(2, 2**64 - 1, (1, 2, 3)), (0, 7, (1, 1, 3))]
    for wrong in (
        f"2|{one}",
        f"@7|{one}",
        f"2@|{one}",
        f"-1@7|{one}",
        f"2@7|{one};",
        f"2@{2**64}|{one}",
        f"a@b|{one}",
        "|",
    ):
        with pytest.raises(ValueError):
            unpack_kept(wrong)


@pytest.mark.skipif(not shutil.which("node"), reason="node was not found; it packs rows to keep with web/state.js")
def test_javascript_keeps_rows_of_several_runs():
    """What the widget hands back of three runs is read here: of one the rows asked for, of the others all but one."""
    lines, told = trace("class", "line", "strict")
    run, *rest = told.events
    told_of_all = []
    for i in range(3):
        told_of_all.append({**run, "run": str(i), "list_index": i, "seed": 5 + i})
        told_of_all += [{**event, "run": str(i)} for event in rest]
    script = (
        f"import {{ keptTextOfRuns, reduceRuns }} from {json.dumps((ROOT / 'web' / 'state.js').as_uri())};"
        "import { readFileSync } from 'node:fs';"
        "const runs = JSON.parse(readFileSync(0)).reduce(reduceRuns, []);"
        "console.log(keptTextOfRuns(runs, 1, 2, 99, false));"
    )
    command = ["node", "--input-type=module", "-e", script]
    out = subprocess.run(command, input=json.dumps(told_of_all), capture_output=True, text=True, check=True)
    kept = unpack_kept(out.stdout.strip())
    codes = torch.stack([line.tokens for line in lines], 1)
    assert [each[:3] for each in kept] == [(1, 99, (2, 2, 5)), (0, 5, (2, 5, 5)), (2, 7, (2, 5, 5))]
    for each in kept:
        assert torch.equal(torch.tensor(each.codes).view(each.sizes), codes[:, : each.sizes[1]])


@pytest.mark.parametrize(("bits", "size"), [(12, 2), (16, 2), (32, 4), (56, 8)])
def test_tokens_of_scales_as_text(bits, size):
    """Numbers take as many bytes as they need, in live events too; anything else is refused."""
    tokens = torch.randint(2**bits, (2, 7), generator=torch.Generator().manual_seed(0))
    tokens[0, 0], tokens[1, 6] = 2**bits - 1, 0
    written = pack_codes(tokens)
    assert written.startswith("2x7:") and unpack_scales(written) == ((2, 7), tokens.flatten().tolist())
    data = written.partition(":")[2]
    numbers = base64.b64decode(data)
    assert [int.from_bytes(numbers[at : at + size], "little") for at in range(0, len(numbers), size)] == (
        tokens.flatten().tolist()
    )
    told = Trace(
        Started(
            run="r", rows=1, cols=7, stride=7, images=2, shown=2, columns=1, layers=1, heads=1, detail="none", seed=0,
            policy="full", release="strict", lines=0, anchors=0, recent=0, cache_bytes=0, full_bytes=0, sides=[[1, 7]],
        )
    )  # fmt: skip
    assert told.add(Stage(0, 1, tokens, torch.zeros(2, 1, 1, 7), torch.zeros(2, 7), 0.0, 1.0, 0))["tokens"] == data
    for broken in ("", written.replace("2x7", "2x8", 1), "1x1x9:" + "AAAA" * 6, "0x0:", written[:-4]):
        with pytest.raises(ValueError):
            unpack_scales(broken)
    with pytest.raises(ValueError):
        unpack_codes(written)


def test_javascript_knows_the_fields():
    """web/state.js names in its FIELDS table the fields of the events, no more and no fewer."""
    text = (ROOT / "web" / "state.js").read_text(encoding="utf-8")
    table = json.loads(text.split("export const FIELDS = ")[1].split(";")[0])
    for kind, event in (("started", Started), ("row", Row), ("picture", Picture), ("finished", Finished)):
        assert table[kind] == [field.name for field in fields(event) if field.name != "kind"]
    known = {name for names in table.values() for name in names} | {"kind", "run"}
    read = set(re.findall(r"\b(?:event|run|finished)\??\.([a-z_]+)", text))
    assert read - known - {"reduce"} == set(), "state.js reads a field that no event has"


@pytest.mark.skipif(not shutil.which("node"), reason="node was not found; it replays the events with web/state.js")
@pytest.mark.parametrize("detail", ["heads", "layers"])
@pytest.mark.parametrize(
    "case",
    [("class", "line", "strict"), ("class", "h2o", "lazy"), ("toy eol", "line", "strict"), ("class", "fold", "fold")],
    ids="-".join,
)
def test_javascript_replays_the_same(case, detail):
    """web/state.js says after every line what Python says: shares, heads, layers and when each cell was evicted."""
    lines, told = trace(*case, detail=detail)
    script = ROOT / "tests" / "web" / "replay.mjs"
    out = subprocess.run(["node", script], input=json.dumps(told.events), capture_output=True, text=True, check=True)
    answers = json.loads(out.stdout)
    run = told.started
    for row, (line, answer) in enumerate(zip(lines, answers, strict=True)):
        assert answer["all"] == [in_256(image) for image in line.share]
        held = line.by_head.unflatten(-1, (run.rows, run.stride))[..., : run.cols].flatten(2)
        for ours, layer in zip(answer["layers"], held, strict=True):
            assert ours == pytest.approx(in_256(layer.float().mean(0)), abs=1), "halves are rounded either way"
        if detail == "heads":
            assert answer["heads"] == [[in_256(head.float()) for head in layer] for layer in held]
        told_stands = [1.0] * 30 if line.stands is None else line.stands[0].flatten().tolist()
        for ours, theirs, share in zip(answer["stands"], told_stands, line.share[0].flatten().tolist(), strict=True):
            assert not share or ours == pytest.approx(max(1, theirs), abs=1 / 16)
        for cell, evicted in enumerate(answer["evicted"]):
            ever = [i for i in range(cell // run.cols, row + 1) if line.share[0].flatten()[cell] == 0]
            gone = [i for i in ever if lines[i].share[0].flatten()[cell] == 0]
            assert evicted == (gone[0] if gone else -1)


@pytest.mark.skipif(not shutil.which("node"), reason="node was not found; it replays the events with web/state.js")
@pytest.mark.parametrize("detail", ["heads", "layers"])
def test_javascript_replays_scales_the_same(detail):
    """Shares, layers, heads, when each cell was evicted, the map over the picture, and what it hands back to go on."""
    pyramid, drawing, told = of_scales(CachePlan("fold", share=0.4), detail)
    stages = list(drawing)
    for stage in stages:
        told.add(stage)
    script = ROOT / "tests" / "web" / "replay.mjs"
    out = subprocess.run(["node", script], input=json.dumps(told.events), capture_output=True, text=True, check=True)
    answers = json.loads(out.stdout)
    drawn = [pyramid.stage_of(cell) for cell in range(pyramid.tokens)]
    for number, (stage, answer) in enumerate(zip(stages, answers, strict=True)):
        assert answer["all"] == [in_256(image) for image in stage.share]
        for ours, layer in zip(answer["layers"], stage.by_head, strict=True):
            assert ours == pytest.approx(in_256(layer.float().mean(0)), abs=1)
        if detail == "heads":
            assert answer["heads"] == [[in_256(head.float()) for head in layer] for layer in stage.by_head]
        for ours, theirs in zip(answer["over"], over_scales(stage.share, pyramid), strict=True):
            assert ours == pytest.approx(in_256(theirs), abs=1)
        for cell, evicted in enumerate(answer["evicted"]):
            gone = [i for i in range(drawn[cell], number + 1) if stages[i].share[0, cell] == 0]
            assert evicted == (gone[0] if gone and stage.share[0, cell] == 0 else -1)
        (kept,) = unpack_kept(answer["kept"])
        assert kept.sizes == (2, pyramid.index(number + 1))
        assert kept.codes == torch.cat([one.tokens for one in stages[: number + 1]], 1).flatten().tolist()


@pytest.mark.skipif(not shutil.which("node"), reason="node was not found; it computes memory with web/state.js")
def test_the_memory_line_is_the_formula():
    """web/state.js says of every preset, grid, pyramid and model what CacheShape and run_bytes say."""
    cases: list[list[Any]] = []
    few = [CachePlan("fold", share=0.1, storage="int8"), CachePlan("hack", share=0.4), CachePlan("adakv", share=0.3)]
    few += [CachePlan("fold", mib=mib) for mib in (1, 9, 400)]
    for pyramid in (Pyramid.square(1, 2, 3, 4, 5, 6, 8, 10, 12), PYRAMIDS[2240], Pyramid.square(3)):
        for plan in [*PRESETS.values(), *few]:
            for rows, device, stages, shape in product(
                (1, 2, 16),
                ("cpu", "cuda"),
                {0, pyramid.stages - 1 or 1},
                (CacheShape(6, 8, 32, 0, 4), CacheShape(36, 36, 64, 0, 2), CacheShape(16, 16, 64, 0, 2, state=137600)),
            ):
                model = {**asdict(shape), "logits": 512, "hidden": 1024, "codes": 512, "device": device}
                if stages and plan.mib:  # resolved for all scales
                    continue
                sizes = {"scales": [pyramid.size(0), pyramid.kept, pyramid.size(stages - 1)]}
                try:
                    part = plan.resolve(shape, pyramid, rows)
                except UserError:
                    cases.append([model, sizes, asdict(plan), rows, 0])
                    continue
                needed = scales_run_bytes(shape, pyramid, part, rows, 512, 1024, device, stages)
                held = shape.scales_bytes(pyramid, part, rows, stages)
                cases.append([model, sizes, asdict(plan), rows, [held, needed]])
    for shape in (
        CacheShape(8, 8, 32, 1, 4),
        CacheShape(36, 20, 64, 1, 2),
        CacheShape(24, 32, 100, 120, 2),
        CacheShape(36, 8, 128, 64, 2, group=4),
    ):
        for grid in (Grid(24, 24), Grid(16, 16), Grid(32, 20, eol=7), Grid(3, 5)):
            for plan in [
                *PRESETS.values(),
                *map(CachePlan, POLICIES),
                CachePlan(budget=200),
                CachePlan("adakv", 11),
                CachePlan("fold", 3, storage="int8"),
                CachePlan("headkv", 3, storage="int8"),
                CachePlan("fold", 3, storage="int4"),
                CachePlan("fold", share=0.3),
                CachePlan("adakv", mib=60, storage="int8"),
                CachePlan("fold", mib=200),
            ]:
                for rows in (1, 2, 16):
                    sizes = {"rows": grid.rows, "stride": grid.stride}
                    try:
                        lines = plan.resolve(shape, grid, rows)
                    except UserError:
                        # Not even one line fits: the page says 0.
                        assert plan.mib and shape.bytes(grid, replace(plan, mib=0, budget=1), rows) > plan.mib * 2**20
                        cases.append([{**asdict(shape), "codes": 1, "device": "cpu"}, sizes, asdict(plan), rows, 0])
                        continue
                    for device in ("cpu", "cuda"):
                        model = {**asdict(shape), "codes": 1024, "device": device}
                        ours = [shape.bytes(grid, lines, rows), run_bytes(shape, grid, lines, rows, 1024, device)]
                        cases.append([model, sizes, asdict(plan), rows, ours])
    script = (
        f"import {{ cacheBytes, resolved, runBytes }} from {json.dumps((ROOT / 'web' / 'state.js').as_uri())};"
        "import { readFileSync } from 'node:fs';"
        "const cases = JSON.parse(readFileSync(0));"
        "const sizes = (s, g, p, n) => p.budget && [cacheBytes(s, g, p, n), runBytes(s, g, p, n)];"
        "console.log(JSON.stringify(cases.map(([s, g, p, n]) => sizes(s, g, resolved(s, g, p, n), n))));"
    )
    command = ["node", "--input-type=module", "-e", script]
    out = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, check=True)
    assert [[*case, ours] for case, ours in zip(cases, json.loads(out.stdout), strict=True) if case[-1] != ours] == []
