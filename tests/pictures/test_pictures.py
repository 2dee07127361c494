"""Previews, heatmaps and contact sheets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from linear_core.events import Line
from linear_core.pictures.heatmap import colormap, heatmap, lifetime
from linear_core.pictures.preview import UNDRAWN, Preview, decode
from linear_core.pictures.sheet import CHOSEN, GAP, contact_sheet, save, score_sheet, to_image
from linear_core.tokenizers.tokenizer import VQConfig, VQTokenizer


@pytest.fixture
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    return VQTokenizer(VQConfig(16, 4, 8, (16, 16), 1, encoder_widths=(16, 16), encoder_blocks=1)).eval()


def test_preview_grows_and_the_last_one_is_the_picture(tokenizer: VQTokenizer) -> None:
    codes = torch.randint(0, 16, (2, 4, 3))
    preview = Preview(tokenizer, 4)
    for row in range(4):
        preview.add(Line(row, 4, codes[:, row], torch.zeros(2, 4, 3), 0.0, 0.0, 0))
        picture = preview.pictures(2)
        assert picture.shape == (2, 8, 6, 3)
        assert (picture[:, 2 * (row + 1) :] == UNDRAWN).all()
        assert not (picture[:, : 2 * (row + 1)] == UNDRAWN).all()
    assert torch.equal(picture, decode(tokenizer, codes))


def test_decode_in_parts(tokenizer: VQTokenizer) -> None:
    codes = torch.randint(0, 16, (5, 3, 4))
    assert torch.allclose(decode(tokenizer, codes, batch=2), decode(tokenizer, codes), atol=1e-6)


def test_encode_finds_the_nearest_entry(tokenizer: VQTokenizer) -> None:
    table = tokenizer.codebook()
    assert torch.equal(tokenizer.nearest(table[None]), torch.arange(16)[None])
    assert tokenizer.encode(torch.rand(2, 3, 8, 6) * 2 - 1).shape == (2, 4, 3)


def test_colour_is_monotone_in_brightness() -> None:
    """Legible in grey, so to every eye."""
    brightness = colormap(torch.linspace(0, 1, 200)) @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (brightness.diff() > 0).all()


def test_heatmap() -> None:
    share = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    alone = heatmap(share, 4, 6)
    assert alone.shape == (1, 4, 6, 3)
    assert torch.equal(alone[0, 0, 0], colormap(torch.tensor(0.0))) and torch.equal(
        alone[0, 3, 0], colormap(torch.tensor(0.5))
    )
    picture = torch.full((1, 2, 3, 3), 0.8)
    over = heatmap(share, 4, 6, picture)
    assert over.shape == (1, 4, 6, 3)
    assert over[0, 0, 0].mean() < 0.6 < picture.mean()  # what was evicted is dark
    assert torch.allclose(heatmap(share, 2, 3, picture, opacity=0.0), picture)


def test_lifetime() -> None:
    """Rows come one by one: a token counts from its own line's end on."""
    shares = torch.zeros(1, 3, 3, 1)  # images, line ends, rows, cols
    shares[0, :, 0, 0] = torch.tensor([1.0, 0.5, 0.0])
    shares[0, 1:, 1, 0] = 1.0
    shares[0, 2, 2, 0] = 0.25
    assert lifetime(shares)[0, :, 0].tolist() == [0.5, 1.0, 0.25]


def test_sheet_and_its_notes(tmp_path: Path) -> None:
    pictures = torch.rand(3, 4, 4, 3)
    sheet = contact_sheet([("one", "remark", pictures), ("two", "", pictures)], ["a", "b", "c"], 16)
    assert sheet.width > 3 * 16 and sheet.height > 2 * 16
    save(sheet, tmp_path / "deep" / "sheet.png", {"seed": 3})
    assert json.loads(Image.open(tmp_path / "deep" / "sheet.png").text["linear"]) == {"seed": 3}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["sheet.png"]
    assert to_image(pictures[0], 17).size == (16, 16)  # whole pixels only


def test_a_sheet_of_scores_frames_what_is_chosen() -> None:
    """Two groups of six, more of a square than a row; the frame goes around the picture and not over it."""
    pictures = torch.rand(12, 8, 8, 3, generator=torch.Generator().manual_seed(4))
    sheet = score_sheet(pictures, [-1.5] * 12, [1, 10], ["hills", "sea"], "by match", 16)
    assert sheet.width == GAP + 4 * (16 + GAP) and sheet.height == 2 * (40 + 2 * (26 + 16 + GAP)) + GAP
    for n in range(12):
        group, i = divmod(n, 6)
        x, y = GAP + i % 4 * 24, group * (40 + 100) + 40 + i // 4 * 50 + 26
        crop = sheet.crop((x, y, x + 16, y + 16))
        assert crop.tobytes() == to_image(pictures[n], 16).tobytes(), n
        assert (sheet.getpixel((x - 2, y - 2)) == CHOSEN) == (n in (1, 10))
