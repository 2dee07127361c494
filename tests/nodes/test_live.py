"""What the widget is about: kept rows, rows cut off, encoded pictures, comparing, and what the page is told."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.loop.test_graph import Tape
from tests.nodes.test_nodes import (  # the fixtures too
    FACTOR,
    FULL,
    NODES,
    PACK,
    ROWS,
    CachePlan,
    UserError,
    comfy,  # noqa: F401
    importlib,
    one,  # noqa: F401
    run,
    small,  # noqa: F401
)

live = importlib.import_module(f"{PACK}.nodes.live")
events = importlib.import_module(f"{PACK}.linear_core.events")
live_tokens = importlib.import_module(f"{PACK}.nodes.sockets").Tokens


def told(comfy):  # noqa: F811
    """The events that the page got, in order."""
    return [data for event, data in comfy.sent if event == events.EVENT]


def ui(node, **inputs):
    return node.execute(**inputs).ui


def test_the_page_is_told_of_every_row_and_the_node_keeps_it_all(one, comfy):  # noqa: F811
    node = NODES["LineAR_Generate"]
    settings = {"seed": 5, "guidance": 2.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "batch_size": 2}
    kept = ui(node, cache=CachePlan(), **settings, **one)
    stream = [event for event in told(comfy) if event["kind"] != "picture"]
    assert [event["kind"] for event in stream] == ["started", *["row"] * ROWS, "finished"]
    assert kept["linear_ar"] == [{k: v for k, v in event.items() if k != "node"} for event in stream]
    assert len({(event["run"], event["node"]) for event in stream}) == 1
    (ref,) = kept["linear_ar_picture"]
    assert ref["type"] == "temp" and "images" not in kept, "the host would show them a second time"
    started = stream[0]
    assert (started["images"], started["shown"], started["columns"], started["lines"]) == (2, 2, 2, 4)
    shape = one["model"].image.decoder.cache_shape()
    assert started["cache_bytes"] == shape.bytes(one["model"].image.info.grid, CachePlan(), 4)
    order = [("lines", data["lines"]) if event == events.EVENT else event for event, data in comfy.sent
             if event == 4 or (event == events.EVENT and data["kind"] == "picture")]  # fmt: skip
    shown = [what[1] for what in order[::2]]
    assert order[1::2] == [4] * len(shown), "how many lines a picture shows is told before it"
    who = [data[1] for event, data in comfy.sent if event == 4]
    assert {(w["node_id"], w["prompt_id"]) for w in who} == {(stream[0]["node"], "job")}, "its job is named with it"
    assert stream[0]["node"] not in {w["display_node_id"] for w in who}, "the page would draw it on the node as well"
    assert shown == sorted(shown) and shown[-1] == ROWS


def test_the_same_rows_again_and_a_new_rest(small, one):  # noqa: F811
    """Rows kept from another Generate stay, with the seed of the whole the rest is the same, with another it is not."""
    settings = {"cache": CachePlan(), "guidance": 3.0, **one}
    (whole,) = run("Generate", seed=5, **settings)
    (same,) = run("Generate", seed=5, tokens=whole, keep_rows=5, **settings)
    assert torch.equal(same.codes, whole.codes) and torch.equal(same.shares, whole.shares)
    (other,) = run("Generate", seed=6, tokens=whole, keep_rows=5, **settings)
    assert torch.equal(other.codes[:, :5], whole.codes[:, :5]) and not torch.equal(other.codes, whole.codes)
    text = events.pack_codes(whole.codes[:, :6])
    (again,) = run("Generate", seed=6, keep_rows=5, view=text, **settings)
    assert torch.equal(again.codes, other.codes), "the widget hands the same rows back"
    (first,) = run("Generate", seed=9, keep_rows=5, view=text, tokens=other, **settings)
    assert torch.equal(first.codes[:, :5], whole.codes[:, :5]), "what the widget hands back goes first"


def listed(comfy, entries, **settings):  # noqa: F811
    """Generate run once for each entry of a list, as ComfyUI does: its outputs, and what all runs leave on the page."""
    outputs = []
    for index, entry in enumerate(entries):
        comfy.context = SimpleNamespace(list_index=index)
        outputs.append(NODES["LineAR_Generate"].execute(**settings | entry))
    comfy.context = None
    uis = [output.ui for output in outputs]
    return [output.result[0] for output in outputs], {key: [y for x in uis for y in x[key]] for key in uis[0]}


def test_a_node_that_runs_for_each_entry_of_a_list(small, one, comfy, monkeypatch):  # noqa: F811
    """Events, picture and kept rows say of which run they are; what is drawn anew of one leaves the others alone."""
    settings = {
        "cache": CachePlan(),
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "batch_size": 1,
        "guidance": 2.0,
        **one,
    }
    entries = [{"seed": seed, "prompt": run("ClassPrompt", model=small, class_name=name)[0]}
               for seed, name in ((5, "alpine dawn"), (2**64 - 1, "ocean day"), (7, "desert day"))]  # fmt: skip
    drawn, left = listed(comfy, entries, **settings)
    starts = [event for event in left["linear_ar"] if event["kind"] == "started"]
    assert [event["list_index"] for event in starts] == [0, 1, 2]
    assert [ref["run"] for ref in left["linear_ar_picture"]] == [event["run"] for event in starts]
    assert len({ref["filename"] for ref in left["linear_ar_picture"]}) == 3

    pack = events.pack_codes
    kept = [
        f"1@99|{pack(drawn[1].codes[:, :3])}",
        *(f"{i}@{entries[i]['seed']}|{pack(drawn[i].codes[:, :-1])}" for i in (0, 2)),
    ]
    again, _ = listed(comfy, entries, **settings, keep_rows=3, view=";".join(kept))
    assert torch.equal(again[0].codes, drawn[0].codes) and torch.equal(again[2].codes, drawn[2].codes)
    (alone,) = run("Generate", **settings | entries[1] | {"seed": 99}, tokens=drawn[1], keep_rows=3)
    assert torch.equal(again[1].codes, alone.codes) and not torch.equal(alone.codes, drawn[1].codes)
    assert torch.equal(alone.codes[:, :3], drawn[1].codes[:, :3])

    stopped = [
        f"1@{2**64 - 1}|{pack(drawn[1].codes[:, :3])}",
        f"0@5|{pack(drawn[0].codes[:, :-1])}",
    ]  # before the third
    rest, _ = listed(comfy, entries, **settings, keep_rows=3, view=";".join(stopped))
    assert all(torch.equal(ours.codes, whole.codes) for ours, whole in zip(rest, drawn, strict=True))
    with pytest.raises(UserError, match="keep_rows: 4 rows are to be kept, but there are only 3"):
        listed(comfy, entries[:2], **settings, keep_rows=4, view=";".join(stopped))

    monkeypatch.setattr(live.PreviewWorker, "final", lambda *_: None)  # of one run there may be no picture
    assert listed(comfy, entries[:2], **settings)[1]["linear_ar_picture"] == []


def test_a_picture_cut_off(small, one):  # noqa: F811
    """stop_after draws so many rows, and with as many kept it draws none; both decode."""
    settings = {"cache": CachePlan(), "guidance": 1.0, "seed": 5, **one}
    (whole,) = run("Generate", **settings)
    (top,) = run("Generate", stop_after=3, **settings)
    assert torch.equal(top.codes, whole.codes[:, :3]) and top.shares.shape == (1, 3, 3, ROWS)
    (kept,) = run("Generate", stop_after=3, keep_rows=3, view=events.pack_codes(top.codes), **settings)
    assert torch.equal(kept.codes, top.codes)
    (image,) = run("Decode", model=small, tokens=kept)
    assert image.shape == (1, 3 * FACTOR, ROWS * FACTOR, 3)
    assert run("RetentionHeatmap", tokens=kept, image=image, show={"show": "lifetime"})[0].shape == image.shape


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        ({"keep_rows": 3}, "connect tokens"),
        ({"keep_rows": 3, "view": "nonsense"}, "Start over"),
        ({"keep_rows": 3, "view": "1x2x8:" + "AAAA" * 10 + "AAA="}, "there are"),
        ({"keep_rows": ROWS, "tokens": "whole"}, f"at most {ROWS - 1}"),
        ({"keep_rows": 2, "tokens": "foreign"}, "encode the image"),
    ],
)
def test_rows_that_cannot_stay(one, inputs, named):  # noqa: F811
    """Each in a sentence that names the widget."""
    codes = torch.zeros(1, ROWS, ROWS, dtype=torch.int64)
    book = one["model"].image.info.config.codes
    given = {
        name: live_tokens(codes=codes, shares=codes[:, None].float(), names=("m",), model="m", codebook=codebook,
                          plan=FULL, cache_bytes=0, seconds=0.0)
        for name, codebook in (("whole", book), ("foreign", book + 1))
    }  # fmt: skip
    if inputs.get("view", "").startswith("1x2x8"):
        inputs = inputs | {"view": events.pack_codes(codes[:, :2])}
    if "tokens" in inputs:
        inputs = inputs | {"tokens": given[inputs["tokens"]]}
    with pytest.raises(UserError, match=r"(?i)" + named):
        run("Generate", cache=FULL, seed=1, **inputs, **one)


def test_a_picture_becomes_tokens_and_goes_on_downward(small, one):  # noqa: F811
    """Encode crops to the model's shape; the upper half of it stays when the lower is drawn."""
    image = torch.linspace(0, 1, 60 * 90 * 3).view(1, 60, 90, 3)
    (tokens,) = run("EncodeImage", model=small, image=image)
    assert tokens.codes.shape == (1, ROWS, ROWS) and tokens.codebook == one["model"].image.info.config.codes
    (drawn,) = run("Generate", cache=CachePlan(), seed=3, guidance=1.0, tokens=tokens, keep_rows=4, **one)
    assert torch.equal(drawn.codes[:, :4], tokens.codes[:, :4]) and not torch.equal(drawn.codes, tokens.codes)
    (decoded,) = run("Decode", model=small, tokens=tokens)
    middle = live_fit(image)
    assert (decoded - middle).abs().mean() < 0.2, "it looks like the picture"


def live_fit(image):
    fit = importlib.import_module(f"{PACK}.nodes.encoding").fit
    return fit(image, ROWS * FACTOR, ROWS * FACTOR).permute(0, 2, 3, 1)


def test_a_tokenizer_without_its_encoder_says_so(small):  # noqa: F811
    tokenizer = SimpleNamespace(config=SimpleNamespace(encoder_widths=()))
    files = SimpleNamespace(tokenizer=SimpleNamespace(name="half.safetensors"))
    model = replace(small, image=SimpleNamespace(info=small.image.info, tokenizer=tokenizer, files=files))
    with pytest.raises(UserError, match=r"half\.safetensors has no encoder"):
        run("EncodeImage", model=model, image=torch.zeros(1, 8, 8, 3))


def test_compare_is_two_generates(small, one, comfy):  # noqa: F811
    """The same seeds with the full cache and with few lines, each as Generate alone draws it."""
    node = NODES["LineAR_Compare"]
    settings = {"seed": 5, "guidance": 2.0, "batch_size": 2}
    out = node.execute(cache=CachePlan(budget=2, recent=1), temperature=-1, top_k=-1, top_p=-1, **settings, **one)
    full, few, report = out.result
    for image, plan in ((full, FULL), (few, CachePlan(budget=2, recent=1))):
        (tokens,) = run("Generate", cache=plan, **settings, **one)
        torch.testing.assert_close(image, run("Decode", model=small, tokens=tokens)[0])
    assert "full cache" in report and "2 of 8 lines" in report and "−" in report
    assert len(out.ui["linear_ar_pairs"]) == 2 and all(len(pair) == 2 for pair in out.ui["linear_ar_pairs"])
    previews = [data[0][1] for event, data in comfy.sent if event == 4]
    assert (previews and previews[0].width == 2 * previews[0].height * 2 // 1) or previews[0].width > previews[0].height
    with pytest.raises(UserError, match="keeps every row"):
        node.execute(cache=FULL, temperature=-1, top_k=-1, top_p=-1, **settings, **one)


def test_compare_decodes_by_parts_where_memory_is_short(small, one, comfy, monkeypatch):  # noqa: F811
    """As Decode does."""
    sizes, tokenizer = [], one["model"].image.tokenizer
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda codes: sizes.append(codes.shape[:2]) or decode(codes))
    comfy.free = 1
    settings = {"seed": 5, "guidance": 1.0, "batch_size": 3, "temperature": -1, "top_k": -1, "top_p": -1}
    NODES["LineAR_Compare"].execute(cache=CachePlan(budget=2, recent=1), **settings, **one)
    assert sizes[-6:] == [(1, ROWS)] * 6, "three pictures of each, one at a time"


# -- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_graphs_where_the_environment_asks_for_them(small, one, comfy, monkeypatch, caplog, batch):  # noqa: F811
    """Step and line's end are recorded, once for each part; where there is no GPU the log says that they are not."""
    settings = {"cache": CachePlan("fold", 2, recent=1), "seed": 5, "guidance": 2.0, "batch_size": batch, **one}
    (eager,) = run("Generate", **settings)
    monkeypatch.setenv(live.STEP, "graph")
    (without,) = run("Generate", **settings)
    assert torch.equal(without.codes, eager.codes)
    assert caplog.text.count("no graph was used, graphs need cuda") == 2, "of the step or drafts, and of the line's end"

    tapes, graph = [], importlib.import_module(f"{PACK}.linear_core.loop.graph")

    def taped(*works):
        made = graph.Graphs(*works)
        for work in made.works.values():
            work.capture, work.device = Tape(), "cpu"
            tapes.append(work.capture)
        return made

    monkeypatch.setattr(live, "Graphs", taped)
    monkeypatch.setattr(live, "max_batch_size", lambda room, images, needed: 2)
    caplog.clear()
    (recorded,) = run("Generate", **settings)
    assert torch.equal(recorded.codes, eager.codes) and not caplog.text
    found = [(tape.recorded, tape.replayed > 0) for tape in tapes]
    # Step, line's end in its parts, and drafts, for each part of the batch.
    assert found == [(1, True), (4, True), (0, False)] * (1 if batch < 3 else 2)


def test_a_kind_of_step_that_there_is_not(one, comfy, monkeypatch):  # noqa: F811
    monkeypatch.setenv(live.STEP, "compiled")
    with pytest.raises(UserError, match="LINEAR_STEP: 'compiled' is unknown; set it to eager or graph"):
        run("Generate", cache=CachePlan(), seed=1, **one)


# -- the sampler never waits ----------------------------------------------------------------------------------------


def test_offers_are_dropped_while_a_picture_is_made():
    """A worker that is busy takes nothing, and offering never blocks; the last picture is always made."""
    go, asked = threading.Event(), []

    def paint(job):
        asked.append(job)
        assert go.wait(60)
        return Image.new("RGB", (1, 1), (job, 0, 0))

    shown = []
    worker = live.PreviewWorker(paint, lambda picture, lines: shown.append(lines), 64)
    worker.pause = 0
    begun = time.perf_counter()
    assert worker.submit(1, 1)
    assert [worker.submit(number, number) for number in range(2, 50)] == [False] * 48
    assert time.perf_counter() - begun < 30 and shown == []
    go.set()
    assert worker.final(99).getpixel((0, 0)) == (99, 0, 0) and asked == [1, 99] and shown == [1]
    assert not worker.thread.is_alive()


@pytest.mark.parametrize(("seconds", "cost"), [(80.0, 0.1), (8.0, 0.06), (2.0, 0.01), (300.0, 5.0)])
def test_pictures_take_their_share_of_the_time_spread_over_the_run(seconds, cost):
    """A run of 64 even lines, whose whole picture costs so much: no more than is allowed, and some late in the run."""
    worker = live.PreviewWorker(lambda job: None, lambda picture, lines: None, 64)
    worker.close()
    at, pictures = 0.0, []
    for lines in range(1, 65):
        now = seconds * lines / 64
        if now >= at:
            took = cost * lines / 64
            pictures.append(lines)
            at = now + took + worker._wait(took, now + took, lines)
    most = worker.allowance + worker.share * seconds
    assert worker.spent <= most + cost, "one picture may go beyond it"
    if seconds < 100:
        assert len(pictures) >= 8 and pictures[-1] > 48


def test_a_preview_that_fails_does_not_end_the_run(caplog):
    worker = live.PreviewWorker(lambda job: 1 / 0, lambda picture, lines: None, 64)
    assert worker.submit(1, 1)
    worker.thread.join(5)
    assert "no preview" in caplog.text
    worker.check()
    worker.close()
