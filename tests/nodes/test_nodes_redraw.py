"""Generate with a mask, and Pick Best, against the stand-in for ComfyUI."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.nodes.comfy_double import execute
from tests.nodes.test_nodes import FACTOR, NODES, ROWS, UserError, comfy, one, run, small  # noqa: F401 (fixtures)

SIDE = ROWS * FACTOR
FIRST, LAST = slice(2, 4), slice(3, 6)  # lines and columns of the region


def settings(small, prompt, **more):  # noqa: F811
    (cache,) = run("LineCache", preset={"preset": "LineAR"}, budget_in="share", amount=0.5)
    own = {"guidance": 2.0, "temperature": -1.0, "top_k": -1, "top_p": -1.0, "batch_size": 1, "seed": 3}
    return {"model": small, "cache": cache, "prompt": prompt, **own, **more}


def square(scale: int = 1, count: int = 1):
    """A mask of the region, whose pixels are a token divided by `scale`."""
    mask = torch.zeros(count, SIDE // scale, SIDE // scale)
    pixels = FACTOR // scale
    mask[:, FIRST.start * pixels : FIRST.stop * pixels, LAST.start * pixels : LAST.stop * pixels] = 1
    return mask


@pytest.fixture
def picture(small, one):  # noqa: F811
    (tokens,) = run("Generate", **settings(small, one["prompt"]))
    return tokens


def test_what_is_outside_a_mask_stays(comfy, small, one, picture):  # noqa: F811
    output = execute(NODES["LineAR_Generate"], **settings(small, one["prompt"], tokens=picture, mask=square(), seed=8))
    (tokens,) = output.result
    inside = torch.zeros_like(picture.codes, dtype=torch.bool)
    inside[:, FIRST, LAST] = True
    assert torch.equal(tokens.codes[~inside], picture.codes[~inside])
    assert not torch.equal(tokens.codes[inside], picture.codes[inside])
    started = output.ui["linear_ar"][0]
    bits = int.from_bytes(__import__("base64").b64decode(started["kept"]), "little")
    assert [bool(bits >> n & 1) for n in range(ROWS * ROWS)] == (~inside).flatten().tolist()


def test_a_mask_of_another_size_is_stretched_and_says_so(comfy, small, one, picture, caplog):  # noqa: F811
    (tokens,) = run("Generate", **settings(small, one["prompt"], tokens=picture, mask=square(), seed=8))
    (again,) = run("Generate", **settings(small, one["prompt"], tokens=picture, mask=square(2), seed=8))
    assert torch.equal(again.codes, tokens.codes)
    assert f"the mask of {SIDE // 2} x {SIDE // 2} pixels is stretched to the image's {SIDE} x {SIDE}" in caplog.text
    (wide,) = run("EncodeImage", model=small, image=torch.rand(1, SIDE, 3 * SIDE, 3))
    mask = torch.zeros(1, SIDE, 3 * SIDE)
    mask[:, :, : SIDE - FACTOR] = 1  # what Encode Image crops away
    with pytest.raises(UserError, match="mask: nothing in it is marked"):
        run("Generate", **settings(small, one["prompt"], tokens=wide, mask=mask))


def test_of_several_fills_one_stays(comfy, small, one, picture):  # noqa: F811
    more = {"tokens": picture, "mask": square(), "seed": 8}
    output = execute(NODES["LineAR_Generate"], **settings(small, one["prompt"], **more, candidates=3))
    (best,) = output.result
    seeds = ",".join(str(8 + (n << 32)) for n in range(3))
    (fills,) = run("Generate", **settings(small, one["prompt"], batch_size=3, seeds=seeds, **more))
    assert len(best.codes) == len(best.names) == 1 and any(torch.equal(best.codes[0], fill) for fill in fills.codes)
    started, *rows, _ = output.ui["linear_ar"]
    assert started["images"] == started["shown"] == 1 and str(started["seed"]) in seeds.split(",")
    assert len(rows) == ROWS and len(output.ui["linear_ar_picture"]) == 1


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"mask": square()}, "mask: there is no image"),
        ({"candidates": 2}, "candidates: they are fills"),
        ({"mask": square() * 0, "tokens": True}, "mask: nothing in it is marked"),
        ({"mask": square(count=3), "tokens": True}, "mask: images and masks make 3 pictures, but 1 are drawn"),
        ({"mask": torch.ones(1, 4, 4), "tokens": True, "candidates": 2}, "candidates: nothing is kept behind"),
        ({"seeds": "1, 2"}, "seeds: there are 2, but 1 images"),
        ({"seeds": "one"}, "seeds: 'one' is not a seed"),
    ],
)
def test_what_cannot_be_redrawn_is_said(comfy, small, one, picture, more, word):  # noqa: F811
    given = more | ({"tokens": picture} if more.get("tokens") else {})
    with pytest.raises(UserError, match=word):
        run("Generate", **settings(small, one["prompt"], **given))


# -- Pick Best ---------------------------------------------------------------------------------------------------------


def test_the_best_of_each_group_by_the_model(comfy, small):  # noqa: F811
    """With tokens it judges what was drawn; of two groups, the sheet has two rows."""
    (prompt,) = run("ClassPrompt", model=small, class_name="alpine dawn", more_classes="ocean dusk")
    (tokens,) = run("Generate", **settings(small, prompt, batch_size=3))
    (images,) = run("Decode", model=small, tokens=tokens)
    for by in ("prompt match", "likelihood"):
        asked = {"each": 3, "keep": 2, "by": by, "model": small, "prompt": prompt}
        best, sheet, told, kept = run("PickBest", images=images, tokens=tokens, **asked)
        scores = torch.tensor([float(line.split()[1].rstrip(",")) for line in told.splitlines()])
        marked = ["kept" in line for line in told.splitlines()]
        order = [3 * g + int(n) for g in (0, 1) for n in scores.view(2, 3)[g].argsort(descending=True)[:2]]
        assert torch.equal(best, images[order]) and torch.equal(kept.codes, tokens.codes[order])
        assert sorted(order) == [n for n, each in enumerate(marked) if each]
        assert sheet.shape[0] == 1 and sheet.shape[2] > 3 * SIDE and sheet.max() <= 1
    encoded = run("PickBest", images=images, each=0, keep=1, by="prompt match", model=small,
                  prompt=run("ClassPrompt", model=small, class_name="ocean dusk")[0])  # fmt: skip
    assert len(encoded[0]) == 1 and encoded[3] is None


def clip(width=4, projection=None):
    """Halves of a CLIP model: texts and images that are features already."""
    weight = torch.eye(width).roll(1, 0) if projection is None else projection
    projecting = ("clip_l.transformer.text_projection", SimpleNamespace(weight=weight))
    module = SimpleNamespace(named_modules=lambda: [projecting])
    texts = {"red": [1.0, 0, 0, 0], "blue": [0, 0, 1.0, 0]}
    return {
        "clip": SimpleNamespace(
            cond_stage_model=module, tokenize=lambda text: text,
            encode_from_tokens=lambda text, return_pooled: (None, torch.tensor([texts[text][:width]])),
        ),
        "clip_vision": SimpleNamespace(
            encode_image=lambda images: {"image_embeds": torch.cat([images.mean((1, 2)), images[:, 0, 0, :1]], 1)}
        ),
    }  # fmt: skip


def test_the_best_by_clip(comfy):  # noqa: F811
    """Cosines of image and text; a text for each group."""
    images = torch.zeros(4, 8, 8, 3)
    images[[0, 3], ..., 2] = 1  # blue
    images[[1, 2], ..., 0] = 1  # red
    best, _, told, _ = run("PickBest", images=images, each=2, keep=1, by="CLIP", text="red\n---\nblue", **clip())
    assert torch.equal(best, images[[1, 3]]) and told.splitlines()[1].startswith("2: 0.707")


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"by": "prompt match"}, "model: 'prompt match' needs the model"),
        ({"by": "CLIP"}, "clip: 'CLIP' needs both halves"),
        ({"by": "CLIP", **clip()}, "text: there are 0 texts for 1 groups"),
        ({"by": "CLIP", "text": "red", **clip(projection=torch.eye(4))}, "clip: its file has no projection"),
        ({"by": "CLIP", "text": "red", **clip(3)}, "clip_vision: its features have 4 numbers and those of clip 3"),
        ({"by": "CLIP", "each": 3}, "each: 4 images are no whole number of groups of 3"),
        ({"by": "CLIP", "keep": 5}, "keep: 5 of 4 images"),
    ],
)
def test_what_cannot_be_scored_is_said(comfy, more, word):  # noqa: F811
    with pytest.raises(UserError, match=word):
        run("PickBest", **{"images": torch.rand(4, 8, 8, 3), "each": 0, "keep": 1, **more})
