"""Files to models: what loads, and what a wrong file is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from linear_core.checkpoints import library
from linear_core.checkpoints.families import llamagen as family
from linear_core.checkpoints.library import ModelFiles, load_model, read_info
from linear_core.checkpoints.weights import read_weights
from linear_core.errors import UserError
from linear_core.prompts import class_prompt
from tests.models import llamagen_reference as upstream

NOTES = {"heads": str(upstream.HEADS), "grid": f"{upstream.GRID}x{upstream.GRID}"}


def gpt() -> dict[str, Tensor]:
    """A small decoder whose codes are those of the small tokenizer."""
    weights = upstream.c2i_weights()
    return weights | {k: weights[k][: upstream.CODES].clone() for k in ("tok_embeddings.weight", "output.weight")}


@pytest.fixture
def files(tmp_path: Path) -> ModelFiles:
    save_file(gpt(), tmp_path / "small.safetensors", NOTES)
    torch.save({"model": upstream.vq_weights()}, tmp_path / "vq_ds16_c2i.pt")
    return ModelFiles(tmp_path / "small.safetensors", tmp_path / "vq_ds16_c2i.pt")


def same_model(files: ModelFiles, **options: object) -> None:
    model = load_model(files, **options)
    expected = gpt()
    assert model.decoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in model.decoder.state_dict().items())


def test_safetensors(files: ModelFiles) -> None:
    same_model(files)


@pytest.mark.parametrize("nest", ["", "model", "module", "state_dict"])
def test_published_nesting(files: ModelFiles, nest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw (FSDP), model, module (deepspeed) and state_dict; with the RoPE table that some files carry."""
    monkeypatch.setitem(family.SIDES, 256, upstream.GRID)
    from linear_core.models import llamagen

    monkeypatch.setitem(llamagen.HEADS, upstream.DIM, upstream.HEADS)
    weights = gpt() | {"freqs_cis": torch.zeros(3)}
    torch.save({nest: weights, "step": 1} if nest else weights, tmp_path / "c2i_B_256.pt")
    same_model(ModelFiles(tmp_path / "c2i_B_256.pt", files.tokenizer))


def test_header_alone_tells_the_sizes(files: ModelFiles) -> None:
    info = read_info(files.decoder)
    assert (info.config.layers, info.config.width, info.config.classes) == (
        upstream.LAYERS,
        upstream.DIM,
        upstream.CLASSES,
    )
    assert (info.grid.rows, info.grid.cols) == (upstream.GRID, upstream.GRID)
    assert info.weight_bytes == sum(t.nbytes for t in gpt().values())
    assert all(t.is_meta for t in read_weights(files.decoder, shapes_only=True).tensors.values())


def refused(files: ModelFiles, *words: str, **options: object) -> None:
    """Loading ends in one sentence that has all of `words`."""
    with pytest.raises(UserError) as caught:
        load_model(files, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing(files: ModelFiles, tmp_path: Path) -> None:
    refused(ModelFiles(tmp_path / "gone.pt", files.tokenizer), str(tmp_path / "gone.pt"), "no such file")


@pytest.mark.parametrize("name", ["small.safetensors", "vq_ds16_c2i.pt"])
@pytest.mark.parametrize("size", [0, 5, 2000])
def test_truncated(files: ModelFiles, name: str, size: int) -> None:
    path = files.decoder.with_name(name)
    path.write_bytes(path.read_bytes()[:size])
    refused(files, name, "download it again")


def test_foreign(files: ModelFiles, tmp_path: Path) -> None:
    refused(ModelFiles(files.tokenizer, files.tokenizer), files.tokenizer.name, "VQ tokenizer")
    refused(ModelFiles(files.decoder, files.decoder), files.decoder.name, "not a VQ tokenizer")
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "sd.safetensors")
    refused(ModelFiles(tmp_path / "sd.safetensors", files.tokenizer), "sd.safetensors", "diffusion")
    (tmp_path / "notes.txt").write_text("hello")
    refused(ModelFiles(tmp_path / "notes.txt", files.tokenizer), "notes.txt", "not a checkpoint")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(ModelFiles(tmp_path / "list.pt", files.tokenizer), "list.pt", "no named weights")


def test_pickles_run_nothing(files: ModelFiles, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    refused(ModelFiles(tmp_path / "trap.pt", files.tokenizer), "trap.pt", "safely")
    assert not (tmp_path / "sprung").exists()


def test_half_a_model(files: ModelFiles) -> None:
    weights = gpt()
    weights.pop("layers.1.attention.wo.weight")
    save_file(weights, files.decoder, NOTES)
    refused(files, "small.safetensors", "layers.1.attention.wo.weight")
    save_file(gpt() | {"extra": torch.zeros(1)}, files.decoder, NOTES)
    refused(files, "small.safetensors", "'extra'")
    save_file(gpt() | {"norm.weight": torch.zeros(3)}, files.decoder, NOTES)
    refused(files, "norm.weight", "[3]", f"[{upstream.DIM}]")


def test_grid(files: ModelFiles) -> None:
    refused(files, "6 x 6", "3 x 3", grid=(3, 3))
    save_file(gpt(), files.decoder, {"heads": NOTES["heads"]})
    refused(files, "which grid")
    assert load_model(files, grid=(4, 9)).info.grid.cols == 9


def test_heads_unknown(files: ModelFiles) -> None:
    save_file(gpt(), files.decoder, {"grid": NOTES["grid"]})
    refused(files, "small.safetensors", f"width {upstream.DIM}", "heads")


def test_codes_of_another_tokenizer(files: ModelFiles) -> None:
    save_file(upstream.c2i_weights(), files.decoder, NOTES)
    refused(files, files.tokenizer.name, str(upstream.CODES), str(upstream.VOCABULARY))


def test_class_names(files: ModelFiles) -> None:
    save_file(gpt(), files.decoder, NOTES | {"classes": json.dumps(["Hill", "lake"] + ["x"] * (upstream.CLASSES - 2))})
    model = load_model(files)
    assert model.label("lake") == 1 and model.label(" HILL ") == 0 and model.label("7") == 7
    for name in ("sea", str(upstream.CLASSES), "-1", ""):
        with pytest.raises(UserError, match="no class"):
            model.label(name)


def test_bundled_model_is_complete() -> None:
    """The files that come with the pack load, agree with each other, and are small enough to ship."""
    model = load_model(library.bundled_files())
    assert (model.info.grid.rows, model.info.grid.cols) == (24, 24)
    assert len(model.info.classes) == model.info.config.classes >= 10
    assert model.tokenizer.config.encoder_widths
    assert sum(f.stat().st_size for f in library.ASSETS.glob("*.safetensors")) < 36e6
    assert class_prompt([model.label(model.info.classes[-1])]).tokens.item() == len(model.info.classes) - 1
