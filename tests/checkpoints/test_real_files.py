"""Files as people have them: what training wraps around a model, what lies beside its weights, folders of any name."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import json
import pathlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from linear_core.__main__ import main
from linear_core.checkpoints import library
from linear_core.checkpoints.convert import convert
from linear_core.checkpoints.library import ModelFiles, find_checkpoints, find_tokenizer, load_model, read_info
from linear_core.checkpoints.published import CHAMELEON_VQ
from linear_core.checkpoints.untrusted import BESIDE_WEIGHTS, _check_bytes
from linear_core.checkpoints.weights import display_name, model_path, shards
from linear_core.errors import UserError
from linear_core.models.llamagen import HEADS
from tests.checkpoints import bad_files
from tests.models import llamagen_reference, lumina_official, official, official_janus

Nest = Callable[[dict[str, Tensor]], Any]


def prefixed(prefix: str) -> Nest:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def within(part: str) -> Nest:
    """`part` behind the number of each layer, as FSDP and torch.compile of single blocks leave it."""
    return lambda weights: {
        ".".join(f"{p}.{part}" if p.isdecimal() else p for p in name.split(".")): tensor
        for name, tensor in weights.items()
    }


def worse(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights that nobody wants: taken by mistake, they would show."""
    return {name: tensor + 1 for name, tensor in weights.items()}


WRAPPED: dict[str, Nest] = {
    "bare": lambda w: w,
    "model": lambda w: {"model": w, "steps": 5},
    "module": lambda w: {"module": w, "ds_version": "0.14"},
    "state_dict": lambda w: {"state_dict": w, "epoch": 1},
    "ema alone": lambda w: {"ema": w},
    "model_ema alone": lambda w: {"model_ema": w},
    "a step beside": lambda w: {"model": w, "global_step": torch.tensor(5)},
    "an optimizer beside": lambda w: {**w, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "compiled": prefixed("_orig_mod."),
    "distributed": prefixed("module."),
    "Lightning": lambda w: {"state_dict": prefixed("model.")(w) | {"loss.discriminator.weight": torch.ones(2)}},
    "compiled and distributed": prefixed("module._orig_mod."),
    "distributed and compiled": prefixed("_orig_mod.module."),
    "Fabric": prefixed("_forward_module."),
    "Lightning, compiled": lambda w: {"state_dict": prefixed("model._orig_mod.")(w)},
    "FSDP": prefixed("_fsdp_wrapped_module."),
    "blocks of FSDP": within("_fsdp_wrapped_module"),
    "blocks compiled": within("_orig_mod"),
    "blocks checkpointed": within("_checkpoint_wrapped_module"),
    "nested deeply": lambda w: {"checkpoint": {"generator": {"state_dict": prefixed("module.")(w)}}},
    "one's own module": prefixed("my_trainer.best_gpt_ever."),
    "averaged by torch": lambda w: prefixed("module.")(w) | {"n_averaged": torch.tensor(7)},
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEADS, llamagen_reference.DIM, llamagen_reference.HEADS)


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def same(found: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in found.state_dict().items())


@pytest.mark.parametrize("nest", WRAPPED.values(), ids=WRAPPED.keys())
def test_what_training_wraps_around_a_model(nest: Nest, tmp_path: Path) -> None:
    """A decoder and its tokenizer, pickled, and where a safetensors can hold it, there too."""
    decoder, vq = bad_files.decoder(), bad_files.vq()
    files = ModelFiles(save(nest(decoder), tmp_path / "c2i_S_256.pt"), save(nest(vq), tmp_path / "vq_ds16_c2i.pt"))
    model = load_model(files)
    same(model.decoder, decoder)
    same(model.tokenizer, vq)
    assert model.info.weight_bytes == sum(tensor.nbytes for tensor in decoder.values())
    if all(isinstance(value, Tensor) for value in nest(decoder).values()):
        save_file(nest(decoder), tmp_path / "c2i_S_256.safetensors")
        same(load_model(ModelFiles(tmp_path / "c2i_S_256.safetensors", files.tokenizer)).decoder, decoder)


@pytest.mark.parametrize("ema", ["ema", "ema_model", "model_ema"])
def test_of_several_the_one_that_the_authors_take(ema: str, tmp_path: Path) -> None:
    """sample_c2i.py takes a decoder's `model`; reconstruction_vq_ddp.py takes a tokenizer's `ema`."""
    decoder, vq = bad_files.decoder(), bad_files.vq()
    both = {"model": decoder, ema: worse(decoder), "optimizer": {}, "steps": 1}
    files = ModelFiles(save(both, tmp_path / "c2i_S_256.pt"), tmp_path / "vq_ds16_c2i.pt")
    save({"model": worse(vq), ema: vq, "discriminator": {"main.0.weight": torch.zeros(4)}}, files.tokenizer)
    model = load_model(files)
    same(model.decoder, decoder)
    same(model.tokenizer, vq)
    save({"model": vq, ema: {"decoder.conv_in.weight": torch.zeros(1)}}, files.tokenizer)  # of a part only
    same(load_model(files).tokenizer, vq)


def test_wrapped_models_of_other_families(tmp_path: Path) -> None:
    """Janus' and Lumina's own names begin with model. too: no more is taken off than was put on."""
    pytest.importorskip("tokenizers")
    with bad_files.good(tmp_path) as made:
        for layout in ("janus converted", "lumina"):
            folder = made[layout] / bad_files.LAYOUTS[layout].model
            before = load_model(ModelFiles(folder, find_tokenizer(folder)))
            for file in folder.glob("*.safetensors"):
                weights = load_file(file)
                save_file(prefixed("model._orig_mod.")(weights), file)
            after = load_model(ModelFiles(folder, find_tokenizer(folder)))
            for name, tensor in before.decoder.state_dict().items():
                assert torch.equal(tensor, after.decoder.state_dict()[name])


def test_a_diffusion_models_own_tokenizer_is_none_of_ours(tmp_path: Path) -> None:
    weights = prefixed("first_stage_model.")(bad_files.vq()) | {"model.diffusion_model.x": torch.zeros(1)}
    path = save({"state_dict": weights}, tmp_path / "ldm.ckpt")
    assert not library.is_tokenizer(library.read_checkpoint(path))
    with pytest.raises(UserError, match="like a diffusion model"):
        read_info(path)


def test_a_weight_under_two_names_is_told(tmp_path: Path) -> None:
    weights = prefixed("module.")(bad_files.decoder())
    weights["module._orig_mod.norm.weight"] = weights["module.norm.weight"]
    with pytest.raises(UserError, match=r"'norm\.weight' twice, under two names"):
        read_info(save(weights, tmp_path / "c2i_S_256.pt"))


# -- beside the weights ------------------------------------------------------------------------------------------------

Point = collections.namedtuple("Point", "x")
BESIDE: dict[str, Any] = {
    "a scalar of numpy": np.float64(0.5),
    "scalars of numpy": {"best": np.float32(1), "step": np.int64(3), "flag": np.bool_(True)},
    "an array of numpy": np.arange(5),
    "a state of numpy": np.random.RandomState(0).get_state(),
    "a generator of numpy": np.random.default_rng(0).bit_generator.state,
    "a dtype of numpy": np.dtype("float32"),
    "a path": pathlib.PurePosixPath("out/run 1"),
    "a path of Windows": pathlib.PureWindowsPath("C:/out"),
    "a time": datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc),
    "a duration": datetime.timedelta(1),
    "a decimal": decimal.Decimal("0.1"),
    "arguments": argparse.Namespace(path=pathlib.PurePosixPath("x"), ema=np.float64(1)),
    "a namespace": SimpleNamespace(a=1),
    "a default dictionary": collections.defaultdict(list, a=[1]),
    "a queue": collections.deque([1, 2], 5),
    "a class": SimpleNamespace,
    "a frozen set": frozenset({1}),
    "bytes": b"abc",
    "no bytes": b"",
    "torch's version": torch.__version__,
    "a complex number": 1j,
    "a slice": slice(1, 2),
    "a state of random": random.Random(0).getstate(),
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE.keys())
def test_what_lies_beside_the_weights_is_not_read(beside: Any, tmp_path: Path) -> None:
    """Before them and after them, of a decoder and of a tokenizer."""
    path = save({"x": beside, "model": bad_files.decoder(), "y": {"x": [beside]}}, tmp_path / "c2i_S_256.pt")
    save({"ema": bad_files.vq(), "x": beside}, tmp_path / "vq_ds16_c2i.pt")
    same(load_model(ModelFiles(path, find_tokenizer(path))).decoder, bad_files.decoder())


def test_a_training_checkpoint_is_converted(tmp_path: Path) -> None:
    wrapped = {
        "state_dict": prefixed("model._orig_mod.")(bad_files.decoder()),
        **BESIDE,
        "U": torch.zeros(2).to(torch.uint32),
    }
    convert(save(wrapped, tmp_path / "c2i_S_256.pt"), tmp_path / "mine.safetensors")
    found = load_file(tmp_path / "mine.safetensors")
    assert found.keys() == bad_files.decoder().keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in bad_files.decoder().items())


def test_what_is_not_harmless_is_refused_with_what_helps(tmp_path: Path) -> None:
    """The same file would come again: that is no advice."""
    path = save({"model": bad_files.decoder(), "x": random.Random(0)}, tmp_path / "c2i_S_256.pt")
    with pytest.raises(UserError, match=r"random\.Random.*is not run\); save its weights alone") as caught:
        read_info(path)
    assert "download it again" not in str(caught.value)
    torch.save(bad_files.decoder(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match="save its weights alone"):
        read_info(path)
    names = (
        "os system", "posix system", "builtins eval", "__builtin__ getattr", "subprocess Popen", "functools partial",
        "operator attrgetter", "builtins bytearray", "importlib import_module",
    )  # fmt: skip
    assert not [name for name in names if BESIDE_WEIGHTS.fullmatch(name)]


@pytest.mark.parametrize(
    "call",
    [
        b"c_codecs\nencode\nX\x01\0\0\0aX\x08\0\0\0punycode\x86R",
        b"c_codecs\nencode\nq\0X\x01\0\0\0aX\x03\0\0\0hex\x86R",
        b"X\x03\0\0\0hexq\x01c_codecs\nencode\nX\x01\0\0\0ah\x01\x86R",  # from the memo
        b"c_codecs\nencode\nq\0X\x01\0\0\0aX\x06\0\0\0latin1\x86Rh\0X\x01\0\0\0aX\x03\0\0\0hex\x86R",  # once more
        b"c_codecs\nencode\n(X\x01\0\0\0aX\x06\0\0\0latin1tR",  # otherwise than Python writes it
        b"c_codecs\nencode\nh\x05X\x06\0\0\0latin1\x86R",
        b"c_codecs\nencode\n",
    ],
)
def test_bytes_are_written_in_one_way_only(call: bytes) -> None:
    with pytest.raises(ValueError, match=r"_codecs\.encode"):
        _check_bytes(b"\x80\x02" + call + b".")


def test_python_writes_bytes_in_that_way() -> None:
    import pickle

    for content in ({"a": b"x", "b": [b"y", b"x"], "latin1": b"latin1"}, [np.float64(1), np.float64(2)], b"\xff" * 300):
        _check_bytes(pickle.dumps(content, 2))


def test_numbers_of_any_kind_that_are_not_read(tmp_path: Path) -> None:
    """A counter in whole numbers without sign does no harm; a weight in them is told, by its name and kind."""
    path = tmp_path / "vq_ds16_c2i.safetensors"
    for kind in (torch.uint32, torch.uint16, torch.uint64):
        save_file(bad_files.vq() | {"quantize.codebook_used": torch.zeros(4).to(kind)}, path)
        library.load_tokenizer(path)
        weights = bad_files.vq() | {bad_files.VQ_KEY: torch.zeros(8).to(kind)}
        save_file(weights, path)
        name = str(kind).removeprefix("torch.")
        with pytest.raises(UserError, match=f"'{bad_files.VQ_KEY}' is {name} where floating-point.*not quantised"):
            library.load_tokenizer(path)


# -- folders -----------------------------------------------------------------------------------------------------------


def hub_vq(folder: Path, codes: int = official.CODES) -> Path:
    """As FoundationVision/vq-ds16-c2i on the hub."""
    folder.mkdir(parents=True)
    weights = {k: v.detach() for k, v in official.tokenizer(16, channels=16, codes=codes).items()}
    save_file(weights | {"quantize.codebook_used": torch.zeros(8)}, folder / "model.safetensors")
    settings = {"codebook_size": codes, "codebook_embed_dim": 8, "encoder_ch_mult": [1, 1, 2, 2, 4], "z_channels": 256}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def published_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(HEADS, 64, 1)
    weights = official.decoder("c2i", layers=1, width=64, hidden=32, codes=official.CODES)
    return save({"model": weights}, tmp_path / "c2i_B_256.pt")


@pytest.mark.parametrize("name", ["vq-ds16-c2i", "VQ_DS16_C2I", "vq.ds16.c2i", "my tokenizer", "tokenizer"])
def test_a_tokenizer_as_the_hub_has_it(name: str, published_decoder: Path, tmp_path: Path) -> None:
    """Found by its name however it is written, and under any other by its sizes; and taken if it is chosen."""
    folder = hub_vq(tmp_path / name)
    assert find_tokenizer(published_decoder) == folder
    load_model(ModelFiles(published_decoder, folder))
    away = tmp_path / "elsewhere"
    away.mkdir()
    moved = folder.rename(away / name)
    assert find_tokenizer(published_decoder, among=[moved]) == moved
    (moved / "config.json").unlink()
    assert find_tokenizer(published_decoder, among=[moved / "model.safetensors"]) == moved / "model.safetensors"


def test_a_tokenizer_is_not_guessed(published_decoder: Path, tmp_path: Path) -> None:
    """Neither one of two, nor the other kind's, nor one of other sizes, nor where the file names its own."""
    other = hub_vq(tmp_path / "vq-ds16-t2i")
    with pytest.raises(UserError, match="needs this tokenizer"):
        find_tokenizer(published_decoder)
    with pytest.raises(UserError, match="vq-ds16-t2i: is another model's"):
        load_model(ModelFiles(published_decoder, other))
    small = hub_vq(tmp_path / "small", codes=32)
    with pytest.raises(UserError, match="needs this tokenizer"):
        find_tokenizer(published_decoder)
    shutil.rmtree(small)
    one, two = hub_vq(tmp_path / "one"), hub_vq(tmp_path / "two")
    with pytest.raises(UserError, match="needs this tokenizer"):
        find_tokenizer(published_decoder)
    shutil.rmtree(two)
    assert find_tokenizer(published_decoder) == one
    noted = tmp_path / "noted.safetensors"
    save_file(torch.load(published_decoder)["model"], noted, {"grid": "16x16", "tokenizer": "own_vq.safetensors"})
    with pytest.raises(UserError, match="own_vq"):
        find_tokenizer(noted)


def test_another_models_folder_is_no_tokenizer(published_decoder: Path, tmp_path: Path) -> None:
    """Janus' folder has a tokenizer of as many codes in it, and Chameleon's has other codes."""
    pytest.importorskip("tokenizers")
    official_janus.write(tmp_path / "Janus-Pro-1B", shards=1)
    with pytest.raises(UserError, match="Janus-Pro-1B: is another model's tokenizer"):
        load_model(ModelFiles(published_decoder, tmp_path / "Janus-Pro-1B"))
    with pytest.raises(UserError, match="needs this tokenizer"):
        find_tokenizer(published_decoder)


def test_a_decoder_as_the_hub_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of any name, whose config tells heads and grid; its tokenizer inside it, or beside it."""
    monkeypatch.delitem(HEADS, llamagen_reference.DIM)
    for settings in ({"n_head": llamagen_reference.HEADS, "block_size": 36}, None):
        folder = tmp_path / f"my model {settings is None}"
        folder.mkdir()
        save_file(bad_files.decoder(), folder / "model.safetensors")
        settings = settings or {"config": {"n_head": llamagen_reference.HEADS, "block_size": 36}}
        (folder / "config.json").write_text(json.dumps(settings))
        torch.save({"model": bad_files.vq()}, folder / "vq_ds16_c2i.pt")
        info = read_info(folder)
        assert (info.grid.rows, info.config.heads, info.name) == (6, llamagen_reference.HEADS, folder.name)
        load_model(ModelFiles(folder, find_tokenizer(folder)))
        with pytest.raises(UserError, match=r"36 tokens in its config\.json.*6 x 6 tokens, not 8 x 8"):
            read_info(folder, (8, 8))


def janus(folder: Path, suffix: str = ".bin") -> Path:
    pytest.importorskip("tokenizers")
    bad_files.write_janus(folder, suffix)
    return folder / "Janus-Pro-1B"


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_folder_with_other_models_in_it(suffix: str, tmp_path: Path) -> None:
    """Janus' files straight in a folder of models: they are one model, and the others stay what they are."""
    folder = janus(tmp_path, suffix).rename(tmp_path / "models")
    bad_files.write_llamagen(folder, "c2i_S_256.pt", bad_files.decoder())
    inner = folder / "another"
    shutil.copytree(folder, inner)
    names = {path.relative_to(tmp_path).as_posix() for path in find_checkpoints([tmp_path])}
    decoders = {"models", "models/another", "models/c2i_S_256.pt", "models/another/c2i_S_256.pt"}
    assert names == decoders | {"models/vq_ds16_c2i.pt", "models/another/vq_ds16_c2i.pt"}
    for path in (
        folder,
        inner,
        folder / "config.json",
        next(folder.glob("*00001*")),
        next(folder.glob("*.index.json")),
    ):
        assert read_info(path).family.name == "Janus"
        assert model_path(path) == (inner if path == inner else folder)
    assert find_tokenizer(folder / "c2i_S_256.pt") == folder / "vq_ds16_c2i.pt"


def test_shards_without_their_index(tmp_path: Path) -> None:
    folder = janus(tmp_path)
    whole = load_model(ModelFiles(folder, folder)).decoder.state_dict()
    index = next(folder.glob("*.index.json"))
    listed = index.read_text()
    index.unlink()
    found = load_model(ModelFiles(folder, folder)).decoder.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())
    index.write_text(listed.replace("pytorch_model-", "sub\\\\pytorch_model-"))  # written on Windows
    (folder / "sub").mkdir()
    for file in folder.glob("*.bin"):
        file.rename(folder / "sub" / file.name)
    load_model(ModelFiles(folder, folder))
    index.unlink()
    for file in (folder / "sub").glob("*.bin"):
        file.rename(folder / file.name)
    next(folder.glob("*00002-of*")).unlink()
    with pytest.raises(UserError, match=r"pytorch_model-00002-of-00002\.bin: there is no such file"):
        read_info(folder)


def test_of_two_indexes_the_one_whose_files_are_there(tmp_path: Path) -> None:
    folder = janus(tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    assert {file.suffix for file in shards(folder)} == {".bin"}
    load_model(ModelFiles(folder, folder))


def test_a_folder_with_one_file_of_any_name(tmp_path: Path) -> None:
    folder = tmp_path / "a model"
    folder.mkdir()
    save_file(bad_files.decoder(), folder / "mine.safetensors", bad_files.NOTES)
    assert read_info(folder).grid.rows == 6
    save_file(bad_files.decoder(), folder / "other.safetensors", bad_files.NOTES)
    with pytest.raises(UserError, match="no such file and no index"):
        read_info(folder)


def test_names_of_the_hubs_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Alpha-VLLM--Lumina-mGPT-7B-768" / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    assert display_name(snapshot) == "Lumina-mGPT-7B-768"
    assert display_name(snapshot / "model.safetensors") == "0123abcd"
    assert display_name(tmp_path / "Janus-1.3B") == "Janus-1.3B" and display_name(tmp_path / "a.b.pt") == "a.b"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-8"])
def test_marks_at_the_beginning_of_texts(encoding: str, tmp_path: Path) -> None:
    """As editors and shells on Windows write them, in every JSON file of a model."""
    folder = janus(tmp_path)
    for file in folder.glob("*.json"):
        if file.name != "tokenizer.json" or encoding != "utf-16":
            file.write_text(file.read_text(encoding="utf-8"), encoding=encoding)
    model = load_model(ModelFiles(folder, folder))
    assert model.prompt(["a fox"]).length > 2


def test_a_janus_without_its_tokenizer_is_told_what_is_missing(tmp_path: Path) -> None:
    folder = janus(tmp_path)
    for file in folder.glob("*.bin"):
        save({k: v for k, v in torch.load(file).items() if "gen_vision_model" not in k}, file)
    with pytest.raises(UserError, match="lacks the weights of the VQ tokenizer that belongs to a Janus") as caught:
        load_model(ModelFiles(folder, folder))
    assert "choose" not in str(caught.value)


# -- numbers in names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "grid", "side"),
    [
        ("Lumina-mGPT-7B-768", None, 48), ("Lumina-mGPT-7B-768-finetuned-512-images", None, 48),
        ("lumina-768-finetuned-512-images", (48, 48), 48), ("lumina-768-finetuned-512-images", (32, 32), 32),
        ("lumina-768-finetuned-512-images", None, None), ("lumina-finetuned-512-images", (48, 48), 48),
        ("Lumina-mGPT-7B-768-1024-steps", None, 48), ("lumina-768", None, 48), ("my lumina", (64, 64), 64),
        ("my lumina", None, None), ("models--Alpha-VLLM--Lumina-mGPT-7B-512/snapshots/1024abc", None, 32),
    ],
)  # fmt: skip
def test_numbers_in_a_folders_name(name: str, grid: tuple[int, int] | None, side: int | None, tmp_path: Path) -> None:
    ids = lumina_official.vocabulary(bad_files.CODES)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    weights = bad_files.small(lumina_official.decoder(ids, layers=1, dim=16))
    lumina_official.write_model(tmp_path / name, weights, ids)
    if side is None:
        with pytest.raises(UserError, match="does not say how large its pictures are; give the grid, or"):
            read_info(tmp_path / name, grid)
    else:
        assert read_info(tmp_path / name, grid).grid.rows == side
    if name == "Lumina-mGPT-7B-768":
        with pytest.raises(UserError, match="does not draw 512 x 512"):
            read_info(tmp_path / name, (32, 32))


@pytest.mark.parametrize("name", ["epoch_256", "0050000", "finetuned-384-images", "256"])
def test_numbers_in_a_files_name_that_count_something_else(name: str, tmp_path: Path) -> None:
    path = save({"model": bad_files.decoder()}, tmp_path / f"{name}.pt")
    with pytest.raises(UserError, match="does not say which grid"):
        read_info(path)
    assert read_info(path, (6, 6)).grid.rows == 6
    assert read_info(path.rename(tmp_path / "mine_256px.pt")).grid.rows == 16


# -- long texts --------------------------------------------------------------------------------------------------------


def test_a_text_that_is_too_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many tokens as the model has positions, less those of the image: no more, and told at once."""
    folder = janus(tmp_path)
    model = load_model(ModelFiles(folder, folder))
    with pytest.raises(UserError, match=r"text: it takes 2\d{4} tokens.*Janus-Pro-1B has room for 15808 besides"):
        model.prompt(["fox " * 6250])
    with pytest.raises(UserError, match="shorten it"):
        model.prompt(["a fox"], "fox " * 6250)
    assert model.prompt(["fox " * 500]).length > 1000
    settings = json.loads((folder / "config.json").read_text())
    settings["language_config"]["max_position_embeddings"] = 700
    (folder / "config.json").write_text(json.dumps(settings))
    model = load_model(ModelFiles(folder, folder))
    longest = next(n for n in range(200) if 700 - 576 < model_length(model, n))
    with pytest.raises(UserError, match="has room for 124"):
        model.prompt(["x" * longest])
    assert model.prompt(["x" * (longest - 1)]).length == 124
    assert main(["generate", str(folder), "--text", "x" * 500, "--out", str(tmp_path / "x.png")]) == 2
    assert "shorten it" in capsys.readouterr().err


def model_length(model: library.ImageModel, letters: int) -> int:
    from linear_core.prompts.janus import janus_prompt

    return janus_prompt(model.text_tokenizer, ["x" * letters]).length


def test_a_config_that_leaves_no_room_for_the_image_is_not_believed(tmp_path: Path) -> None:
    ids = lumina_official.vocabulary(bad_files.CODES)
    folder = tmp_path / "Lumina-mGPT-7B-1024"
    lumina_official.write_model(folder, bad_files.small(lumina_official.decoder(ids, layers=1, dim=16)), ids)
    for stated, context in ((4096, 16384), (10240, 10240), (None, 16384)):
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": stated}))
        assert read_info(folder).context == context
    assert read_info(folder).tokenizer == CHAMELEON_VQ
