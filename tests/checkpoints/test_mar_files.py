"""MAR's files: what they are taken for, which of their weights are taken, and what is said of others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from linear_core.__main__ import main
from linear_core.checkpoints.families import mar as family
from linear_core.checkpoints.library import (
    ModelFiles,
    bundled_files,
    find_tokenizer,
    load_model,
    read_checkpoint,
    read_info,
)
from linear_core.errors import UserError
from linear_core.pictures.inpaint import fill, known_latents, masked_cells
from linear_core.pictures.preview import LatentPreview, decode
from linear_core.tokenizers.latents import SCALE, LatentConfig, LatentTokenizer
from tests.tiny import CLASSES, latent_tokenizer, mar

NAMES = [f"class {n}" for n in range(CLASSES)]
NOTES = {"heads": "3", "channels": "4", "factor": "2", "tokenizer": "little_vae", "classes": json.dumps(NAMES)}
QUICK = ("--steps", "6", "--denoising", "4", "--start", "950")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 12 x 12 pixels, its VAE, a picture, and a mask over one corner."""
    folder = tmp_path_factory.mktemp("mar")
    save_file(mar(dtype=torch.float32).state_dict(), folder / "little.safetensors", NOTES)
    save_file(latent_tokenizer().state_dict(), folder / "little_vae.safetensors")
    Image.new("RGB", (12, 12), (200, 40, 90)).save(folder / "image.png")
    mask = Image.new("RGB", (12, 12))
    mask.paste((255, 255, 255), (0, 0, 3, 5))
    mask.save(folder / "mask.png")
    for name, colour, size in (("black", 0, 12), ("white", 255, 12), ("small", 255, 8)):
        Image.new("L", (size, size), colour).save(folder / f"{name}.png")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


# -- which file it is --------------------------------------------------------------------------------------------------


def test_the_averaged_weights_are_taken_and_others_refused(tmp_path: Path) -> None:
    """As published, `model` comes first and draws worse. A file without averages is refused in one sentence."""
    weights = mar(dtype=torch.float32, patch=2).state_dict()  # 16 numbers a token, as in every published file
    other = {name: weight + 1 for name, weight in weights.items()}
    torch.save({"model": other, "model_ema": weights, "epoch": 3}, tmp_path / "checkpoint-last.pth")
    info = read_info(tmp_path / "checkpoint-last.pth")
    assert info.family.name == "MAR" and info.weight_bytes == sum(w.nbytes for w in weights.values())
    kept = dict(read_checkpoint(tmp_path / "checkpoint-last.pth").stream(["mask_token"]))["mask_token"]
    assert torch.equal(kept, weights["mask_token"])
    torch.save({"model": other}, tmp_path / "plain.pth")
    with pytest.raises(UserError, match=r"plain\.pth: holds only the weights of the last training step"):
        read_info(tmp_path / "plain.pth")


@pytest.mark.parametrize(
    ("notes", "changes", "words"),
    [
        ({"heads": "5"}, {}, "a width of 24 cannot be divided into 5 heads"),
        ({"channels": "3"}, {}, "4 numbers of a token are no patch of 3 channels"),
        ({"classes": '["a"]'}, {}, "not a list of 5 names"),
        ({}, {"diffusion_pos_embed_learned": torch.zeros(1, 35, 24)}, "35 tokens are no square"),
        ({}, {"z_proj.weight": None}, "its header does not describe a MAR"),
        ({}, {"encoder_pos_embed_learned": torch.zeros(1, 36, 24)}, "impossible size: copies is 0"),
    ],
)
def test_a_file_that_is_not_what_it_says(notes, changes, words: str, tmp_path: Path) -> None:
    weights = {k: v for k, v in (mar(dtype=torch.float32).state_dict() | changes).items() if v is not None}
    save_file(weights, tmp_path / "odd.safetensors", NOTES | notes)
    with pytest.raises(UserError, match=r"odd.*" + re.escape(words)):
        read_info(tmp_path / "odd.safetensors")


def test_vaes_of_other_kinds(folder: Path, tmp_path: Path) -> None:
    """Another number of channels or pixels, a codebook, or latents for a model of codes: one sentence each."""
    other = LatentTokenizer(LatentConfig(8, (16, 8, 8), 1))
    save_file(other.state_dict(), tmp_path / "sd.safetensors")
    model, vq = folder / "little.safetensors", bundled_files()
    with pytest.raises(UserError, match=r"sd.*another VAE, of 8 channels and 4 pixels.*needs 4 and 2: choose little"):
        load_model(ModelFiles(model, tmp_path / "sd.safetensors"))
    with pytest.raises(UserError, match=r"landscapes_vq.*one map of codes, but little.*numbers without a codebook"):
        load_model(ModelFiles(model, vq.tokenizer))
    with pytest.raises(UserError, match=r"little_vae.*numbers without a codebook, but landscapes.*one map of codes"):
        load_model(ModelFiles(vq.decoder, folder / "little_vae.safetensors"))
    with pytest.raises(UserError, match="it looks like a VAE"):
        read_info(folder / "little_vae.safetensors")


def test_a_vae_by_another_name_is_found_by_its_sizes(folder: Path, tmp_path: Path) -> None:
    weights = {name: weight.clone() for name, weight in mar(dtype=torch.float32).state_dict().items()}
    notes = {name: note for name, note in NOTES.items() if name != "tokenizer"}
    save_file(weights, tmp_path / "m.safetensors", notes)
    save_file(latent_tokenizer().state_dict(), tmp_path / "any name.safetensors")
    assert find_tokenizer(tmp_path / "m.safetensors").name == "any name.safetensors"


def test_what_is_float32_whatever_the_model_computes_in(folder: Path) -> None:
    """The head, norms, and embeddings of places; the rest is as asked."""
    files = ModelFiles(folder / "little.safetensors", folder / "little_vae.safetensors")
    model = load_model(files, dtype=torch.bfloat16).decoder
    kinds = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {kinds[name] for name in kinds if family.precise(name)} == {torch.float32}
    assert {kinds[name] for name in kinds if not family.precise(name)} == {torch.bfloat16}
    assert model.dtype == torch.bfloat16 and kinds["diffloss.net.input_proj.weight"] == torch.float32


# -- pictures with places given ----------------------------------------------------------------------------------------


def test_a_cell_is_drawn_anew_if_any_of_its_pixels_is_covered() -> None:
    mask = torch.zeros(1, 12, 12)
    mask[0, 2, 3] = 1  # row 1, column 1 of cells of two pixels
    mask[0, 11, 0] = 0.4  # hardly covered is not covered
    expected = torch.zeros(1, 6, 6, dtype=torch.bool)
    expected[0, 1, 1] = True
    assert torch.equal(masked_cells(mask, 6, 6), expected)


def test_latents_are_known_where_the_mask_is_not() -> None:
    tokenizer, picture = latent_tokenizer(), torch.rand(2, 12, 12, 3, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 12, 12)
    mask[0, :, 6:] = 1
    given = known_latents(tokenizer, picture, mask, (12, 12), patch=1)
    with torch.inference_mode():
        moments = tokenizer.quant_conv(tokenizer.encoder(picture.permute(0, 3, 1, 2) * 2 - 1))
    torch.testing.assert_close(given[..., :3], moments[:, :4, :, :3] * SCALE)
    assert given[..., 3:].isnan().all()
    mask = torch.zeros(1, 12, 12)
    mask[0, :, 10] = 1
    by_patch = known_latents(tokenizer, picture, mask, (12, 12), patch=2)
    assert by_patch[..., 4:].isnan().all() and by_patch[..., :4].isfinite().all(), "all of a patch, or none"


def test_gaps_are_filled_from_around_them_and_shown_dimmed() -> None:
    tokenizer = latent_tokenizer()
    latents = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    latents[:, :, 2:, 1:] = float("nan")
    filled = fill(latents)
    known = latents.isfinite()
    assert torch.equal(filled[known], latents[known]) and filled.isfinite().all()
    torch.testing.assert_close(filled[0, :, 2, 1], latents[0, :, [1, 1, 1, 2, 3], [0, 1, 2, 0, 0]].mean(1))
    shown, plain = LatentPreview.of(tokenizer, latents), decode(tokenizer, filled)
    torch.testing.assert_close(shown[:, :4], plain[:, :4])
    torch.testing.assert_close(shown[:, 4:, 2:], plain[:, 4:, 2:] / 2)
    assert fill(torch.full((1, 4, 2, 2), float("nan"))).eq(0).all(), "nothing to fill from"


# -- the command line --------------------------------------------------------------------------------------------------


def test_pictures_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one piece and in parts the same; with a step cache, fewer denoising steps or given places another."""
    model = ("--model", folder / "little.safetensors", "--class", "class 1", "--images", "3", "--seed", "4", *QUICK)
    pictures = {}
    for name, more in {
        "whole": (),
        "parts": ("--at-once", "2"),
        "kept": ("--step-cache", "Balanced", "--full-first", "1", "--full-every", "0"),
        "less": ("--denoising-last", "2"),
        "given": ("--image", folder / "image.png", "--mask", folder / "mask.png"),
        "fitted": ("--image", folder / "small.png", "--mask", folder / "mask.png"),
        "map": ("--step-cache", "LazyMAR", "--full-first", "1", "--refresh", "3", "--heatmap"),
    }.items():
        status, said, wrong = run(capsys, "generate", *model, "--out", tmp_path / f"{name}.png", *more)
        assert status == 0, wrong
        assert ("12 x 12 was stretched to the image's 8 x 8" in wrong) == (name == "fitted")
        assert ("of 8 x 8 were scaled and cropped to 12 x 12" in wrong) == (name == "fitted")
        assert re.search(r"tokens in \d steps, \d+ of 39 slots computed in a step on average", said), said
        assert ("no keys and values are kept" in said) == (name not in ("kept", "map")), said
        with Image.open(tmp_path / f"{name}_02.png") as image:
            pictures[name] = image.convert("RGB").tobytes()
            notes = json.loads(image.info["linear"])
        assert notes["seed"] == 5 and notes["steps"] == 6 and "refresh" in notes and "budget" not in notes
    assert pictures["whole"] == pictures["parts"]
    assert len(set(pictures.values())) == 6


def test_planning(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("plan", "--model", folder / "little.safetensors", "--steps", "9")
    status, said, wrong = run(capsys, *model)
    assert status == 0 and "9 steps, 9 of them full" in said and "no memory is added" in said, wrong
    cache = ("--step-cache", "Balanced", "--full-first", "2", "--full-last", "1", "--denoising-last", "10")
    status, said, wrong = run(capsys, *model, *cache)
    assert status == 0, wrong
    assert "9 steps, 4 of them full; the others compute 8 of 39 slots on average." in said
    assert "55 denoising steps a token on average, from t = 999." in said
    mib = read_info(folder / "little.safetensors").config.step_cache_shape(4)
    size = 2 * 6 * 2 * 3 * 40 * 8 * 4 / 2**20
    assert mib.slots == 39 and f"take {size:.1f} MiB more memory" in said
    status, said, _ = run(capsys, "models", folder)
    assert status == 0 and "little: 6 x 6 tokens in any order, 5 classes" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--budget", "3"), "budget: it does nothing here, as little draws masked tokens"),
        (("--drafts", "8"), "drafts: it does nothing here"),
        (("--steps", "40"), "steps: 40 are more than the picture has tokens; choose at most 36"),
        (("--refresh", "-1"), "refresh: -1 is out of range"),
        (("--class", "6"), "has no class '6'"),
        (("--text", "a fox"), "draws classes, not texts"),
        (("--image", "image.png"), "--image says what is kept and --mask what is drawn anew; give both"),
        (("--image", "image.png", "--mask", "mask.png", "--candidates", "2"), "candidates: little sees all around"),
        (("--image", "image.png", "--mask", "black.png"), "mask: it covers nothing"),
        (("--image", "image.png", "--mask", "white.png"), "mask: it covers everything"),
        (("--image", "image.png", "--mask", "little.safetensors"), "cannot be read as a picture"),
    ],
)
def test_one_sentence(
    folder: Path, words: tuple[str, ...], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [folder / word if Path(word).suffix else word for word in words]
    command = ("generate", "--model", folder / "little.safetensors", *QUICK, "--out", tmp_path / "x.png")
    status, _, wrong = run(capsys, *command, *paths)
    assert status == 2 and complaint in wrong and not list(tmp_path.iterdir())


def test_other_models_take_no_masked_options_and_the_reverse(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (("--steps", "8"), ("--step-cache", "Balanced"), ("--rule", "oldest")):
        status, _, wrong = run(capsys, "generate", *words)
        assert status == 2 and "landscapes does not draw masked tokens" in wrong
    status, _, wrong = run(
        capsys, "compare", "--model", folder / "little.safetensors", *QUICK, "--out", tmp_path / "x.png"
    )
    assert status == 2 and "compare: little draws masked tokens" in wrong
