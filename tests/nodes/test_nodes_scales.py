"""Models that draw in scales through the same nodes, with tiny random checkpoints in the official layouts."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from linear_core.events import pack_codes, unpack
from tests.nodes import comfy_double
from tests.nodes.comfy_double import host
from tests.nodes.test_live import told, ui
from tests.nodes.test_nodes import (  # the fixtures too
    BUNDLED,
    EXTENSION,
    NODES,
    CachePlan,
    UserError,
    asyncio,
    comfy,  # noqa: F401
    one,  # noqa: F401
    run,
    small,  # noqa: F401
)
from tests.tiny import CODES, _filled

SIDES = (1, 2, 3, 4, 6)  # 66 tokens, 30 without the last scale
LANDSCAPES = ("alpine dawn", "ocean day", "desert day")
SIDES_OF = tuple((side, side) for side in SIDES)
FEW = CachePlan("fold", share=0.5)


def write_var(folder, layers: int = 2, name: str = "tiny", sides: tuple[int, ...] = SIDES) -> None:
    """A VAR of 3 classes and its tokenizer with an encoder, /4, under the published key names."""
    from linear_core.models.var import VAR, VARConfig
    from linear_core.pyramid import Pyramid
    from linear_core.tokenizers.pyramid import PyramidConfig, PyramidTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    pyramid = Pyramid.square(*sides)
    decoder = _filled(
        VAR(VARConfig(layers, 24, 3, 32, CODES, len(LANDSCAPES), 6, pyramid)).requires_grad_(False),
        {"mat_qkv": 0.4, "fc2": 0.1, "scale_mul": 0.7, "ada": 0.4, "head": 0.1, "class_emb": 1.0},
        0,
    )
    tokenizer = _filled(
        PyramidTokenizer(
            PyramidConfig(CODES, 6, (16, 8, 8), 1, encoder_widths=(8, 8, 16), encoder_blocks=1)
        ).requires_grad_(False),
        {"embedding": 1.0},
        1,
    )
    notes = {
        "sides": pyramid.text,
        "classes": json.dumps(LANDSCAPES),
        "tokenizer": "tiny_vq.safetensors",
        "sampling": json.dumps({"guidance": 2.0, "top_k": 0, "top_p": 1.0, "temperature": 1.0}),
    }
    save_file(decoder.state_dict(), folder / f"{name}.safetensors", notes)
    save_file(tokenizer.state_dict(), folder / "tiny_vq.safetensors")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    host.reset(tmp_path_factory.mktemp("tiny"))
    asyncio.run(EXTENSION().on_load())
    write_var(host.models / "ar_image")
    with torch.inference_mode():
        (model,) = run("LoadModel", model="tiny.safetensors", tokenizer="automatic")
    return model


@pytest.fixture(scope="module")
def drafter(tiny):
    """A deeper one with the same tokenizer."""
    write_var(host.models / "ar_image", 5, "large")
    with torch.inference_mode():
        (model,) = run("LoadModel", model="large.safetensors", tokenizer="automatic")
    return model


@pytest.fixture
def one_tiny(tiny):
    """One prompt, ready to draw."""
    return {"model": tiny, "prompt": run("ClassPrompt", model=tiny, class_name="alpine dawn")[0]}


def ends() -> list[int]:
    """Tokens after each scale."""
    return torch.tensor([side * side for side in SIDES]).cumsum(0).tolist()


def test_the_page_is_told_of_every_scale(one_tiny, comfy):  # noqa: F811
    """The events describe a pyramid; the cache takes what was announced, and what the node keeps is the same."""
    kept = ui(NODES["LineAR_Generate"], cache=FEW, seed=5, guidance=2.0, temperature=1.0, top_k=0, top_p=1.0,
              batch_size=2, **one_tiny)  # fmt: skip
    stream = [event for event in told(comfy) if event["kind"] != "picture"]
    assert [event["kind"] for event in stream] == ["started", *["row"] * 5, "finished"]
    assert kept["linear_ar"] == [{k: v for k, v in event.items() if k != "node"} for event in stream]
    begun, rows = stream[0], stream[1:-1]
    assert begun["sides"] == [[side, side] for side in SIDES] and (begun["rows"], begun["lines"]) == (5, 15)
    assert [row["side"] for row in rows] == begun["sides"]
    shape, pyramid = one_tiny["model"].image.decoder.cache_shape(), one_tiny["model"].image.info.pyramid
    assert begun["cache_bytes"] == shape.scales_bytes(pyramid, FEW, 4) == rows[-1]["cache_bytes"]
    assert begun["full_bytes"] == shape.scales_bytes(pyramid, CachePlan("full"), 4)
    assert [len(unpack(row["tokens"])) for row in rows] == [2 * side * side for side in SIDES]
    assert len(kept["linear_ar_picture"]) == 1


def test_the_same_scales_again_and_a_new_rest(tiny, one_tiny):
    """Coarse scales stay, from another Generate or as the widget hands them back; stopping early keeps the picture so
    far, which decodes; and the node's picture is what Decode makes of the tokens."""
    settings = {"cache": FEW, **one_tiny}
    (whole,) = run("Generate", seed=5, **settings)
    assert (
        whole.codes.shape == (1, 66)
        and whole.shares.shape == (1, 5, 66)
        and whole.sides == tiny.image.info.pyramid.sides
    )
    (image,) = run("Decode", model=tiny, tokens=whole)
    assert torch.equal(image, tiny.pictures(whole.codes, whole.sides)) and image.shape == (1, 24, 24, 3)
    (same,) = run("Generate", seed=5, tokens=whole, keep_rows=3, **settings)
    assert torch.equal(same.codes, whole.codes) and torch.equal(same.shares, whole.shares)
    (other,) = run("Generate", seed=6, tokens=whole, keep_rows=3, **settings)
    first = ends()[2]
    assert torch.equal(other.codes[:, :first], whole.codes[:, :first]) and not torch.equal(other.codes, whole.codes)
    view = f"{pack_codes(whole.codes[:, : ends()[3]])}:{tiny.image.codebook}"
    (again,) = run("Generate", seed=6, keep_rows=3, view=view, **settings)
    assert torch.equal(again.codes, other.codes)
    (top,) = run("Generate", seed=5, stop_after=3, **settings)
    assert torch.equal(top.codes, whole.codes[:, :first]) and top.shares.shape == (1, 3, 66)
    assert torch.equal(run("Decode", model=tiny, tokens=top)[0], tiny.pictures(top.codes, top.sides))
    (kept,) = run("Generate", seed=9, stop_after=3, keep_rows=3, view=view, **settings)
    assert torch.equal(kept.codes, top.codes)
    longer = replace(whole, sides=(*SIDES_OF[:4], (7, 7)))
    (same,) = run("Generate", seed=5, tokens=longer, keep_rows=3, **settings)
    assert torch.equal(same.codes, whole.codes), "of another pyramid with the same first scales"
    with pytest.raises(UserError, match="tokens: their scales have other sizes than those of tiny's picture"):
        run("Generate", seed=5, tokens=replace(whole, sides=((1, 1), (2, 2), (2, 4))), keep_rows=3, **settings)


def test_heatmaps_of_scales(tiny, one_tiny):
    """Alone a strip of one map a scale; over a picture, which places are remembered."""
    (tokens,) = run("Generate", cache=FEW, seed=5, **one_tiny)
    (image,) = run("Decode", model=tiny, tokens=tokens)
    for show in ({"show": "lifetime"}, {"show": "after a row", "row": 3}, {"show": "after a row", "row": 99}):
        (alone,) = run("RetentionHeatmap", tokens=tokens, show=show, size=200)
        assert alone.shape[0] == 1 and alone.shape[2] == 5 * 40 + 4 * 4 and float(alone.min()) >= 0
        (over,) = run("RetentionHeatmap", tokens=tokens, image=image, show=show)
        assert over.shape == image.shape and not torch.equal(over, image)


def test_an_encoded_picture_gives_its_coarse_scales(tiny, one_tiny):
    """The tokens of a picture decode to what the tokenizer makes of it, and Generate goes on from its first scales."""
    picture = torch.rand(1, 40, 30, 3)
    (tokens,) = run("EncodeImage", model=tiny, image=picture)
    assert tokens.codes.shape == (1, 66)
    assert run("Decode", model=tiny, tokens=tokens)[0].shape == (1, 24, 24, 3)
    (drawn,) = run("Generate", cache=FEW, seed=5, tokens=tokens, keep_rows=2, **one_tiny)
    assert torch.equal(drawn.codes[:, :5], tokens.codes[:, :5])


def test_comparing_scales(one_tiny):
    full, few, report = run("Compare", cache=FEW, seed=5, **one_tiny)
    assert full.shape == few.shape == (1, 24, 24, 3) and "15 of 30 tokens" in report
    (tokens,) = run("Generate", cache=CachePlan("full"), seed=5, **one_tiny)
    assert torch.equal(full, run("Decode", model=one_tiny["model"], tokens=tokens)[0])
    with pytest.raises(UserError, match="cache: it keeps every scale, so both"):
        run("Compare", cache=CachePlan("fold", share=1.0), seed=5, **one_tiny)


@pytest.mark.parametrize("plan", [FEW, CachePlan("full")])
def test_a_drafter_draws_the_first_scales(tiny, drafter, one_tiny, comfy, plan):  # noqa: F811
    """One node with a drafter draws what two nodes draw one after the other. The page is told of every scale once, and
    of the larger of both caches; ComfyUI loads both decoders."""
    settings = {"cache": plan, "prompt": one_tiny["prompt"], "seed": 5, "batch_size": 2}
    (coarse,) = run("Generate", model=drafter, stop_after=3, **settings)
    (apart,) = run("Generate", model=tiny, tokens=coarse, keep_rows=3, **settings)
    (alone,) = run("Generate", model=tiny, **settings)
    comfy.sent.clear()
    comfy.loaded.clear()
    (both,) = run("Generate", model=tiny, drafter=drafter, **settings)  # 0: all but the last two
    assert torch.equal(both.codes, apart.codes) and not torch.equal(both.codes, alone.codes)
    assert torch.equal(both.shares[:, 3:], apart.shares[:, 3:]) and torch.equal(both.shares[:, :3], coarse.shares)
    begun, *rows = [event for event in told(comfy) if event["kind"] in ("started", "row")]
    assert [row["row"] for row in rows] == list(range(5)) and not any(row["replayed"] for row in rows)
    shapes = [model.image.decoder.cache_shape() for model in (drafter, tiny)]
    pyramid = tiny.image.info.pyramid
    needed = [shape.scales_bytes(pyramid, plan, 4, scales) for shape, scales in zip(shapes, (3, 0), strict=True)]
    assert begun["cache_bytes"] == max(needed) == needed[0] == max(row["cache_bytes"] for row in rows)
    assert both.cache_bytes == needed[0] and begun["detail"] == "" and begun["state_bytes"] == 0
    models, memory = comfy.loaded[0]
    assert set(models) == {drafter.decoder, tiny.decoder, tiny.tokenizer} and memory > needed[0]
    view = f"{pack_codes(both.codes[:, : ends()[1]])}:{tiny.image.codebook}"
    (again,) = run("Generate", model=tiny, drafter=drafter, keep_rows=2, view=view, **settings)
    assert torch.equal(again.codes, both.codes), "drawn again from a scale of the drafter's"
    (top,) = run("Generate", model=tiny, drafter=drafter, stop_after=4, **settings)
    assert torch.equal(top.codes, both.codes[:, : ends()[3]])


def test_a_budget_in_mib_holds_for_drafter_and_refiner(tiny, drafter, one_tiny, comfy):  # noqa: F811
    plan, settings = CachePlan("fold", mib=0.03), {"prompt": one_tiny["prompt"], "seed": 5}
    run("Generate", model=tiny, drafter=drafter, cache=plan, **settings)
    begun, *rows = [event for event in told(comfy) if event["kind"] in ("started", "row")]
    assert begun["cache_bytes"] <= plan.mib * 2**20 and begun["lines"] < 30
    assert max(row["cache_bytes"] for row in rows) == begun["cache_bytes"]


def test_smooth_pictures_are_more_than_their_codes(tiny, one_tiny):
    """Decode shows the mixture, of all pictures and of those chosen; the codes are those drawn without."""
    settings = {"cache": FEW, "seed": 5, **one_tiny}
    (plain,) = run("Generate", batch_size=5, **settings)
    (mixed,) = run("Generate", batch_size=5, smooth=True, **settings)
    assert torch.equal(mixed.codes[:, :1], plain.codes[:, :1]) and plain.canvas is None and mixed.decoded is None
    image = run("Decode", model=tiny, tokens=mixed)[0]
    assert torch.equal(image, tiny.pictures(mixed.canvas)) and image.shape == (5, 24, 24, 3)
    assert not torch.equal(image, tiny.pictures(mixed.codes, mixed.sides))
    chosen = run("Decode", model=tiny, tokens=mixed.select([3]))[0]
    torch.testing.assert_close(chosen, image[3:4], atol=1e-5, rtol=1e-5)
    (one_mixed,) = run("Generate", smooth=True, **settings)
    assert torch.equal(one_mixed.decoded, run("Decode", model=tiny, tokens=one_mixed)[0])
    torch.testing.assert_close(one_mixed.decoded[0], image[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"drafts": 4}, "drafts: tiny draws a whole scale in one pass"),
        ({"stop_after": 6}, "stop after: 6 is out of range; the model draws 5 scales"),
        ({"keep_rows": 2}, "keep_rows: there is no image to take 2 scales from"),
        ({"keep_rows": 5, "view": "1x66:" + "AAAA" * 44}, "5 scales are to be kept, but tiny draws 5"),
        ({"keep_rows": 3, "view": "1x5:AAAAAAAAAAAAAA=="}, "3 scales are to be kept, but there are only 2"),
        ({"keep_rows": 1, "view": "1x1x6:AAAAAAAAAAAAAAAA"}, "they are lines of a picture, but tiny draws in scales"),
        ({"keep_rows": 1, "view": "1x6"}, "view: the scales kept on the node cannot be read"),
        ({"keep_rows": 1, "view": "1x1:AAA=:0123456789abcdef"}, "view: the scales kept on the node are not of tiny"),
        ({"cache": CachePlan("line", share=0.02)}, "share: 0.02 of 30 tokens are 1, but the first scales hold 5"),
        ({"cache": CachePlan("streaming")}, "policy: streaming"),
        ({"cache": CachePlan("line", release="lazy")}, "release: lazy"),
        ({"drafter_scales": 5, "drafter": "large"}, "5 is out of range, as tiny draws 5 .* choose 1 to 4, or 0"),
        ({"smooth": True, "drafter": "large"}, "smooth: two models hand on tokens"),
        ({"drafter": "short"}, "drafter: short draws scales 1 2 3, tiny 1 2 3 4 6; connect a model of the same"),
        ({"drafter": "landscapes"}, "drafter: landscapes draws line by line; only VAR"),
        ({"drafter": "landscapes_var"}, "drafter: landscapes_var's codes stand for other pieces of images than tiny's"),
    ],
)  # fmt: skip
def test_what_is_refused(one_tiny, drafter, more, words):
    if name := more.get("drafter"):
        names = {"landscapes": BUNDLED, "landscapes_var": "landscapes in scales (bundled)"}
        if name == "short":
            write_var(host.models / "ar_image", name="short", sides=(1, 2, 3))
        if name != "large":
            (drafter,) = run("LoadModel", model=names.get(name, f"{name}.safetensors"), tokenizer="automatic")
        more = {**more, "drafter": drafter}
    with pytest.raises(UserError, match=words):
        run("Generate", **{"cache": FEW, "seed": 5, **one_tiny, **more})


def test_lines_and_scales_are_not_mixed(tiny, small, one_tiny, one):  # noqa: F811
    (scales,) = run("Generate", cache=FEW, seed=5, **one_tiny)
    (lines,) = run("Generate", cache=CachePlan(), seed=5, stop_after=1, **one)
    for more, words in (({"drafter": tiny}, "drafter: small draws line by line"), ({"smooth": True}, "smooth: small")):
        with pytest.raises(UserError, match=words):
            run("Generate", cache=CachePlan(), seed=5, **one, **more)
    for model, tokens in ((small, scales), (tiny, lines)):
        with pytest.raises(UserError, match=r"tokens: they come from \w+, which draws in "):
            run("Decode", model=model, tokens=tokens)
    with pytest.raises(UserError, match="tokens: they come from small, which draws in lines, but tiny draws in scales"):
        run("Generate", cache=FEW, seed=5, tokens=lines, keep_rows=1, **one_tiny)
    write_var(host.models / "ar_image")
    with pytest.raises(UserError, match="choose the tokenizer that belongs to the model"):
        run("LoadModel", model=BUNDLED, tokenizer="tiny_vq.safetensors")


def test_stop_within_a_scale(one_tiny, comfy):  # noqa: F811
    """Pressed while a scale is drawn, it ends the run there; the page has the scales before, and goes on from them."""
    settings = {"cache": FEW, "seed": 5, **one_tiny}
    (whole,) = run("Generate", **settings)
    comfy.progress.clear()
    comfy.sent.clear()
    comfy.stop_after, comfy.stop_where = 2, "MainThread"
    with pytest.raises(comfy_double.Interrupted):
        run("Generate", **settings)
    rows = [event for event in told(comfy) if event["kind"] == "row"]
    assert comfy.stops == 1 and 2 <= len(rows) < 5
    comfy.stop_after = None
    codes = [code for row in rows for code in unpack(row["tokens"])]
    view = pack_codes(torch.tensor([codes]))
    (rest,) = run("Generate", keep_rows=len(rows), view=view, **settings)
    assert torch.equal(rest.codes, whole.codes)
