"""Infinity's files from header to picture: recognised, refused with a reason, loaded shard by shard, drawn."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from linear_core.__main__ import main
from linear_core.checkpoints import published, text
from linear_core.checkpoints.convert import convert
from linear_core.checkpoints.library import (
    ModelFiles,
    bundled_files,
    decoder_bytes,
    find_checkpoints,
    find_tokenizer,
    load_model,
    read_info,
)
from linear_core.checkpoints.weights import Weights
from linear_core.errors import UserError
from linear_core.loop.scales import generate_scales
from linear_core.models.infinity import PYRAMIDS, Infinity, InfinityConfig
from linear_core.models.packed import pack
from linear_core.plan import CachePlan
from linear_core.prompts.t5 import text_prompt
from linear_core.sizes import PIXELS
from tests.models import infinity_reference as upstream

INDEX = "model.safetensors.index.json"


@cache
def weights(bits: int = 16) -> dict[str, Tensor]:
    """A tiny Infinity in the official layout of one chunk, with buffers that are not read."""
    torch.manual_seed(0)
    model = Infinity(InfinityConfig(2, 24, 3, 32, bits, 2048, 512, 2, 15), PYRAMIDS["0.06M"][7])
    found = {key: 0.2 * torch.randn_like(tensor) for key, tensor in model.state_dict().items()}
    return found | {"blocks.0.sa.zero_k_bias": torch.zeros(24), "lvl_1L": torch.zeros(1, 4).long()}


def vae(channels: int = 16, levels: int = 5) -> dict[str, dict[str, Tensor]]:
    """A VAE of so many numbers a place, nested as published; of factor 8 with 4 levels."""
    kind = "upright" if levels == 5 else "lying"
    found, base = upstream.vae_weights(kind), upstream.BASE
    found["decoder.conv_in.conv.weight"] = torch.zeros(base, channels, 3, 3)
    found["encoder.conv_out.conv.weight"] = torch.zeros(channels, base, 3, 3)
    found["encoder.conv_out.conv.bias"] = torch.zeros(channels)
    return {"vae": found, "image_disc": {"weight": torch.zeros(2)}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, bits in (("infinity_125M_256x256", 16), ("infinity_2b_reg", 32)):
        torch.save(weights(bits), folder / f"{name}.pth")
    torch.save(vae(), folder / "infinity_vae_d16.pth")
    for name in ("infinity_vae_d32", "infinity_vae_d32reg"):
        torch.save(vae(32), folder / f"{name}.pth")
    torch.save(vae(14, 4), folder / "infinity_vae_d56_f8_14_patchify.pth")
    shards = folder / "infinity_8b_512x512_weights"
    shards.mkdir()
    found, index = weights(56), {}
    for n in (1, 2):
        part = {key: found[key] for key in sorted(found)[n - 1 :: 2]}
        save_file(part, shards / f"model-0000{n}-of-00002.safetensors")
        index |= dict.fromkeys(part, f"model-0000{n}-of-00002.safetensors")
    (shards / INDEX).write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize(
    ("name", "side", "sizes", "tokenizer", "guidance"),
    [
        ("infinity_125M_256x256.pth", 16, 15, "infinity_vae_d16", 4.0),
        ("infinity_8b_512x512_weights", 32, 30, "infinity_vae_d56_f8_14_patchify", 3.0),
        ("infinity_2b_reg.pth", 64, 45, "infinity_vae_d32reg", 4.0),
    ],
)
def test_what_a_file_says(folder: Path, name: str, side: int, sizes: int, tokenizer: str, guidance: float) -> None:
    """Its tokenizer by bits, its pictures by name: those of its own size and smaller ones, and their scales."""
    info = read_info(folder / name)
    assert info.family.name == "Infinity" and info.text and not info.own_tokenizer
    assert (info.grid.rows, info.grid.cols) == info.pyramid.sides[-1] == (side, side)
    assert len(info.sizes) == sizes and info.tokenizer == tokenizer and info.defaults.guidance == guidance
    assert find_tokenizer(folder / name) == folder / f"{tokenizer}.pth"
    wide = info.with_size((21 * PIXELS, 14 * PIXELS))
    assert wide.pyramid.sides == upstream.SIDES["lying"] and (wide.grid.rows, wide.grid.cols) == (14, 21)
    assert wide.with_grid(info.grid) == info and read_info(folder / name, (14, 21)) == wide
    with pytest.raises(UserError, match=r"does not draw 300 x 300 pixels; of similar shape it draws \d+ x \d+"):
        info.with_size((300, 300))
    with pytest.raises(UserError, match=f"{name}.*does not draw 80 x 80"):
        read_info(folder / name, (5, 5))


def test_a_folder_of_shards_is_one_model(folder: Path) -> None:
    """Without a config.json, as the 8B is published: listed once, and any shard stands for it."""
    found = [path.name for path in find_checkpoints([folder])]
    assert "infinity_8b_512x512_weights" in found and not any(name.startswith("model-") for name in found)
    shard = folder / "infinity_8b_512x512_weights" / "model-00002-of-00002.safetensors"
    assert read_info(shard) == read_info(shard.parent)


def test_shards_are_cast_one_weight_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 or 8 bits in the blocks, float32 wherever conditions, norms and logits are made; as planned."""
    seen: list[str] = []
    original = Weights.stream

    def stream(self: Weights, wanted):
        for name, tensor in original(self, wanted):
            seen.append(name)
            yield name, tensor

    monkeypatch.setattr(Weights, "stream", stream)
    path = folder / "infinity_8b_512x512_weights"
    model = load_model(ModelFiles(path, find_tokenizer(path)), dtype=torch.bfloat16, weight_dtype=torch.float8_e4m3fn)
    kinds = {name: parameter.dtype for name, parameter in model.decoder.named_parameters()}
    for name in ("shared_ada_lin.1.weight", "head_nm.ada_lin.1.weight", "head.bias", "text_norm.weight", "pos_start"):
        assert kinds[name] == torch.float32
    for name in ("ada_gss", "ca_norm.weight", "sa.scale_mul_1H11"):
        assert kinds[f"blocks.1.{name}"] == torch.float32
    assert kinds["blocks.1.sa.q_bias"] == kinds["blocks.1.ffn.fc1.bias"] == torch.bfloat16
    assert kinds["blocks.1.sa.mat_qkv.weight"] == kinds["blocks.0.ca.mat_kv.weight"] == torch.float8_e4m3fn
    assert model.decoder.dtype == torch.bfloat16 and set(seen) >= weights(56).keys() - {"lvl_1L"} - {
        "blocks.0.sa.zero_k_bias"
    }
    held = sum(tensor.nbytes for tensor in model.decoder.state_dict().values())
    assert decoder_bytes(model.info, torch.bfloat16, torch.float8_e4m3fn) == held
    assert model.tokenizer.config.bits == 56 and model.tokenizer.config.patch == 2


def test_tokenizers_of_another_kind(folder: Path, tmp_path: Path) -> None:
    """Another number of bits, d32 for d32reg, a table in place of bits, and the reverse: one sentence each."""
    small, large, raster = folder / "infinity_125M_256x256.pth", folder / "infinity_2b_reg.pth", bundled_files()
    for decoder, tokenizer, words in (
        (
            small,
            folder / "infinity_vae_d32reg.pth",
            r"has 2\^32 codes, but infinity_125M.* draws from 65536; choose the tokenizer that belongs",
        ),
        (
            large,
            folder / "infinity_vae_d32.pth",
            r"infinity_vae_d32.pth: is another model's .* infinity_vae_d32reg: choo",
        ),
        (small, raster.tokenizer, r"landscapes_vq.*one map of codes, but infinity_125M.*coarse to fine"),
        (raster.decoder, folder / "infinity_vae_d16.pth", r"infinity_vae_d16.*coarse to fine, but landscapes"),
    ):
        with pytest.raises(UserError, match=words):
            load_model(ModelFiles(decoder, tokenizer))
    renamed = tmp_path / "mine.pth"
    renamed.write_bytes((folder / "infinity_vae_d32reg.pth").read_bytes())
    assert load_model(ModelFiles(large, renamed)).info.tokenizer == "infinity_vae_d32reg"
    with pytest.raises(UserError, match="it looks like a VQ tokenizer"):
        read_info(folder / "infinity_vae_d16.pth")
    with pytest.raises(UserError, match="files describe themselves"):
        convert(folder / "infinity_vae_d16.pth", tmp_path / "converted.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head.weight": torch.zeros(7, 24)}, "does not describe an Infinity .16 bits and 7 logits"),
        ({"lvl_embed.weight": torch.zeros(5, 24)}, "it knows 5 scales"),
        ({"cfg_uncond": None}, "does not describe an Infinity"),
        ({"blocks.1.ca.proj.bias": None}, "lacks 1 of .* weights, the first is 'blocks.1.ca.proj.bias'"),
        ({"block_chunks.0.module.7.sa.q_bias": torch.zeros(24)}, "has 1 weights this model does not have"),
        ({"blocks.0.sa.scale_mul_1H11": torch.zeros(1, 5, 1, 1)}, "24 cannot be divided into 5 heads"),
    ],
)
def test_damaged_files(folder: Path, tmp_path: Path, changes: dict[str, Tensor | None], words: str) -> None:
    damaged = weights() | changes
    path = tmp_path / "damaged_256x256.safetensors"
    save_file({key: tensor.clone() for key, tensor in damaged.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=words):
        load_model(ModelFiles(path, folder / "infinity_vae_d16.pth"))


def test_published_releases() -> None:
    """Every transformer brings its tokenizer and the text encoder; the 8B goes to a folder of its own."""
    for name, bits in (("infinity_125M_256x256", 16), ("infinity_2b_reg", 32), ("infinity_8b_weights", 56)):
        assert published.RELEASES[name].needs == (published.INFINITY_TOKENIZERS[bits], published.TEXT_ENCODER)
        assert published.RELEASES[name].licence == "MIT"
    large = published.RELEASES["infinity_8b_512x512_weights"]
    assert [large.local_path(file) for file in large.files][::8] == [
        "infinity_8b_512x512_weights/model.safetensors.index.json",
        "infinity_8b_512x512_weights/model-00008-of-00008.safetensors",
    ]
    assert round(large.gigabytes, 1) == round(published.RELEASES["infinity_8b_weights"].gigabytes, 1) == 33.5
    assert large.files[1].url.endswith("/main/infinity_8b_512x512_weights/model-00001-of-00008.safetensors")


@torch.inference_mode()
def test_it_draws(folder: Path) -> None:
    """A picture of a chosen size, in bfloat16, with a cache that folds; matrices packed, as on the command line."""
    path = folder / "infinity_125M_256x256.pth"
    model = load_model(ModelFiles(path, find_tokenizer(path)), dtype=torch.bfloat16)
    pack(model.decoder)
    info = model.info.with_size((336, 224))
    source = torch.Generator().manual_seed(0)
    features = [torch.randn(length, 2048, generator=source) for length in (3, 6)]
    prompt = replace(text_prompt(features, length=info.config.caption_slots), grid=info.grid)
    stages = list(
        generate_scales(model.decoder, model.tokenizer.quantize, prompt, CachePlan("fold", share=0.3), info.defaults)
    )
    assert [stage.tokens.shape[1] for stage in stages] == [info.pyramid.size(n) for n in range(7)]
    assert stages[-2].held == 72 and int(stages[-1].tokens.max()) > 2**15  # 0.3 of 239 tokens; the first bit is drawn
    picture = model.tokenizer.decode(stages[-1].canvas)
    assert picture.shape == (2, 3, 224, 336) and bool(picture.isfinite().all())


def test_pictures_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two texts in a size of choice, as they are written and as long as the model reads; and what a run would take."""
    asked: list[tuple[str, int]] = []

    def encode(name: str, tokenizer: object, encoder: object, device: str, length: int) -> Tensor:
        asked.append((name, length))
        return torch.randn(4, 2048, generator=torch.Generator().manual_seed(len(name))).bfloat16()

    monkeypatch.setattr(text, "load_encoder", lambda files: (None, None))
    monkeypatch.setattr(text, "encode", encode)
    monkeypatch.setattr(text, "find_text_encoder", lambda path, width=0: text.TextFiles(Path(path), (), None))
    model = ["--model", str(folder / "infinity_125M_256x256.pth"), "--pixels", "336x224", "--share", "0.3"]
    out = tmp_path / "fox.png"
    words = ["--text", "A fox @home", "--text", "Foxes", "--text-encoder", "t5", "--size", "336", "--out", str(out)]
    assert main(["generate", *model, *words]) == 0, capsys.readouterr().err
    assert asked == [("A fox @home", 512), ("Foxes", 512)], "other models' captions are cleaned"
    for n in (1, 2):
        with Image.open(tmp_path / f"fox_{n:02}.png") as image:
            assert image.size == (336, 224)
    assert main(["plan", *model, "--device", "cpu"]) == 0
    assert "7 scales (1 2 2x3 4x6 6x9 10x15 14x21), 533 tokens" in capsys.readouterr().out
    assert main(["generate", *model, *words, "--smooth"]) == 2
    assert "draws single bits, and has no codes to mix" in capsys.readouterr().err
