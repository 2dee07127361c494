"""MoVQ, Emu3's and Emu3.5's tokenizers equal the numbers recorded from the published code, and transformers' Emu3."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from linear_core.checkpoints import library
from linear_core.checkpoints.convert import convert
from linear_core.checkpoints.library import load_tokenizer
from linear_core.checkpoints.published import EMU35_VQ
from linear_core.errors import UserError
from linear_core.tokenizers.network import SpatialNorm
from linear_core.tokenizers.tokenizer import IBQ, VQTokenizer, read_config
from tests.drawn import digest
from tests.tokenizers import reference as published

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small tokenizers as they are published: a pickled state dict with averages of training, and two safetensors."""
    folder = tmp_path_factory.mktemp("tokenizers")
    found = {kind: published.weights(kind) for kind in published.KINDS}
    averages = {"ema_decoder.decay": torch.tensor(0.999), "loss.logvar": torch.zeros(())}
    torch.save(found["movq"] | averages, folder / "movqgan_270M.ckpt")
    counters = {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for key in found["emu3"] if "_mean" in key
    }
    save_file(found["emu3"] | counters, folder / "emu3.safetensors")
    save_file(found["ibq"], folder / "ibq.safetensors", {"family": "ibq-vq"})  # too small to be known by its size
    return {
        kind: folder / name
        for kind, name in {"movq": "movqgan_270M.ckpt", "emu3": "emu3.safetensors", "ibq": "ibq.safetensors"}.items()
    }


@pytest.fixture(scope="module")
def tokenizers(files: dict[str, Path]) -> dict[str, VQTokenizer]:
    return {kind: load_tokenizer(path) for kind, path in files.items()}


@pytest.mark.parametrize("kind", published.KINDS)
@torch.inference_mode()
def test_pictures_and_codes_equal_the_recorded_ones(kind: str, tokenizers: dict[str, VQTokenizer]) -> None:
    """Decoding within 1e-4; every code of an encoded picture, none of them so close a call that rounding decides."""
    recorded, tokenizer = published.reference(kind), tokenizers[kind]
    assert (recorded["digest"] == digest(published.weights(kind))).all(), "these are not the recorded weights"
    assert (tokenizer.config.kind, tokenizer.config.normalized, tokenizer.config.factor) == (kind, False, 4)
    for shape in ("square", "wide"):
        codes, expected = (torch.from_numpy(recorded[f"{what}_{shape}"]) for what in ("codes", "decoded"))
        assert float(expected.std()) > 0.1
        torch.testing.assert_close(tokenizer.decode(codes), expected, atol=TOLERANCE, rtol=0)
    assert recorded["margin"].min() > 5e-4 and len(np.unique(recorded["codes"])) > 10
    assert (tokenizer.encode(torch.from_numpy(recorded["picture"])).numpy() == recorded["codes"]).all()


@pytest.mark.parametrize("kind", published.KINDS)
@torch.inference_mode()
def test_a_converted_file_is_the_same_tokenizer(
    kind: str, files: dict[str, Path], tokenizers: dict[str, VQTokenizer], tmp_path: Path
) -> None:
    """Bit for bit; what a file cannot say by its shapes stands in its metadata."""
    assert convert(files[kind], tmp_path / "vq.safetensors")["family"] == f"{kind}-vq"
    again = load_tokenizer(tmp_path / "vq.safetensors")
    assert again.config == tokenizers[kind].config
    for (name, ours), theirs in zip(tokenizers[kind].state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@torch.inference_mode()
def test_transformers_emu3(tmp_path: Path) -> None:
    """The same in transformers' layout: two pictures at once, decoded and encoded by its Emu3VQVAE and by ours."""
    pytest.importorskip("transformers")
    from transformers import Emu3VQVAE, Emu3VQVAEConfig

    torch.manual_seed(1)
    config = Emu3VQVAEConfig(
        codebook_size=64, base_channels=128, channel_multiplier=[1, 1, 2], num_res_blocks=1, attn_resolutions=[2],
        hidden_size=256,
    )  # fmt: skip
    theirs = Emu3VQVAE(config).eval()
    for name, tensor in theirs.state_dict().items():
        if "running_" in name or ".norm" in name:
            tensor.copy_(torch.rand(tensor.shape) * 0.5 + 0.75)
    theirs.quantize.embedding.weight.mul_(0.1)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = load_tokenizer(tmp_path / "model.safetensors")
    codes = torch.randint(64, (2, 3, 5))
    expected = theirs.decode(codes)
    assert float(expected.std()) > 0.02
    torch.testing.assert_close(ours.decode(codes), expected, atol=TOLERANCE, rtol=0)
    pictures = torch.rand(2, 3, 16, 24) * 2 - 1
    found = theirs.encode(pictures, image_sizes=torch.tensor([[16, 24]] * 2))
    codes = torch.stack(list(getattr(found, "image_tokens", found)))  # a list in transformers 4
    assert codes.unique().numel() > 5
    assert torch.equal(ours.encode(pictures), codes)


@torch.inference_mode()
def test_the_decoder_has_no_third_dimension(tokenizers: dict[str, VQTokenizer]) -> None:
    """A still picture of Emu3 is decoded in two dimensions, with nothing of the frames that nobody sees."""
    assert max(tensor.ndim for tensor in tokenizers["emu3"].state_dict().values()) == 4


@torch.inference_mode()
def test_spatial_norm_reads_the_entry_of_each_place() -> None:
    """Against the definition: entries enlarged by nearest neighbour, scale and shift by a convolution of one pixel."""
    norm = SpatialNorm(8, 4)
    x, entries = torch.randn(2, 8, 6, 20), torch.randn(2, 4, 3, 5)
    large = torch.nn.functional.interpolate(entries, (6, 20))
    expected = norm.norm_layer(x) * norm.conv_y(large) + norm.conv_b(large)
    torch.testing.assert_close(norm(x, entries), expected)


def test_ibq_is_known_by_its_size(tokenizers: dict[str, VQTokenizer]) -> None:
    """Emu3.5's file says nowhere how to encode: 131072 entries of 256 numbers, not of unit length, are IBQ's."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tokenizers["ibq"].state_dict().items()}
    assert read_config(shapes, normalized=False).kind == "vqgan"
    shapes["quantize.embedding.weight"] = IBQ
    assert read_config(shapes, normalized=False).kind == "ibq"
    assert read_config(shapes, normalized=True).kind == "vqgan"


def test_a_codebook_that_does_not_fit(tmp_path: Path) -> None:
    """Entries and features pass the same layers in Emu3's, so they have the same number of channels."""
    weights = dict(published.weights("emu3"))
    weights["quantize.embedding.weight"] = weights["quantize.embedding.weight"][:, :3].contiguous()
    save_file(weights, tmp_path / "emu3.safetensors")
    with pytest.raises(UserError, match=r"emu3.safetensors: .*entries of 3 numbers pass layers of 4 channels"):
        load_tokenizer(tmp_path / "emu3.safetensors")


@pytest.mark.parametrize("name", ["Emu3.5-VisionTokenizer.safetensors", "Emu3.5-VisionTokenizer"])
def test_a_tokenizer_is_found_beside_its_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file, or as the folder that was published; a dot in its name is no suffix."""
    info = SimpleNamespace(family=SimpleNamespace(vq=None), tokenizer=EMU35_VQ)
    monkeypatch.setattr(library, "read_checkpoint", lambda path: SimpleNamespace(metadata={}))
    monkeypatch.setattr(library, "describe", lambda weights, grid=None: info)
    (tmp_path / "Emu3-VisionTokenizer").mkdir()
    (tmp_path / name).touch()
    assert library.find_tokenizer(tmp_path / "Emu3.5-Image") == tmp_path / name
