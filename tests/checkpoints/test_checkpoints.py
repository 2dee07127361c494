"""LlamaGen's files as published: what their names say, what belongs together, and conversion to safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from linear_core.__main__ import main
from linear_core.checkpoints import convert as converting
from linear_core.checkpoints import library, published
from linear_core.checkpoints.convert import convert
from linear_core.checkpoints.library import ModelFiles, find_tokenizer, load_model, load_tokenizer, read_info
from linear_core.checkpoints.weights import read_weights
from linear_core.errors import UserError
from linear_core.models.llamagen import HEADS
from tests.models import official

WIDTH = 64


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a decoder of one head pass for a published one: everything else is as in the real files, only small."""
    monkeypatch.setitem(HEADS, WIDTH, 1)


def decoder(kind: str = "c2i") -> dict[str, torch.Tensor]:
    return official.decoder(kind, layers=1, width=WIDTH, hidden=32, codes=official.CODES)


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def class_file(tmp_path: Path) -> Path:
    return save(tmp_path / "c2i_B_384.pt", decoder())


# -- the grid ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "side"),
    [
        ("c2i_B_256", "c2i", 16), ("c2i_3B_384", "c2i", 24), ("t2i_XL_stage1_256", "t2i", 16),
        ("t2i_XL_stage2_512", "t2i", 32), ("c2i_XL_384_bf16", "c2i", 24), ("llamagen-c2i-l-256px", "c2i", 16),
        ("c2i_XL_512", "c2i", None),  # published for texts only
        ("t2i_XL_384", "t2i", None),
        ("t2i_XL_stage2", "t2i", None),
        ("c2i_B_256_from_384", "c2i", None),  # says two things
        ("c2i_B_ds16", "c2i", None), ("step_0256000", "c2i", None), ("vq_ds16_c2i", "c2i", None),
    ],
)  # fmt: skip
def test_what_a_name_says(name: str, kind: str, side: int | None, tmp_path: Path) -> None:
    path = save(tmp_path / f"{name}.pt", decoder(kind))
    if side is not None:
        grid = read_info(path).grid
        assert (grid.rows, grid.cols) == (side, side)
        with pytest.raises(UserError, match=f"{name}.*in its name.*{side} x {side} tokens, not 20 x 20.*rename"):
            read_info(path, (20, 20))
    else:
        with pytest.raises(UserError, match=f"{name}.pt: does not say which grid") as caught:
            read_info(path)
        assert all(str(pixels) in str(caught.value) for pixels in published.PIXELS[kind])
        assert read_info(path, (20, 10)).grid.cols == 10


def test_metadata_goes_before_the_name(tmp_path: Path) -> None:
    path = tmp_path / "c2i_B_256.safetensors"
    save_file(decoder(), path, {"grid": "24x20"})
    assert (read_info(path).grid.rows, read_info(path).grid.cols) == (24, 20)
    with pytest.raises(UserError, match="was made for a grid of 24 x 20 tokens, not 16 x 16; leave the grid to the"):
        read_info(path, (16, 16))
    for broken in ("24", "0x24", "24x", "24×24", ""):
        save_file(decoder(), path, {"grid": broken})
        with pytest.raises(UserError, match="metadata 'grid'"):
            read_info(path)


# -- what is known of a file ------------------------------------------------------------------------------------------


def test_published_defaults(class_file: Path, tmp_path: Path) -> None:
    info = read_info(class_file)
    assert (info.defaults.guidance, info.defaults.top_k, info.defaults.top_p, info.defaults.temperature) == (
        4.0,
        2000,
        1.0,
        1.0,
    )
    text = read_info(save(tmp_path / "t2i_XL_stage2_512.pt", decoder("t2i")))
    assert (text.defaults.guidance, text.defaults.top_k) == (7.5, 1000)
    assert text.text and not info.text and text.classes == ()
    assert (info.tokenizer, text.tokenizer) == ("vq_ds16_c2i", "vq_ds16_t2i")


def test_imagenet_names(class_file: Path, tmp_path: Path) -> None:
    info = read_info(class_file)
    assert len(info.classes) == len(set(info.classes)) == 1000
    known = {
        0: "tench",
        1: "goldfish",
        207: "golden retriever",
        388: "giant panda",
        979: "valley",
        999: "toilet tissue",
    }
    assert {number: info.classes[number] for number in known} == known
    for number, name in enumerate(info.classes):
        assert library.class_label(info, name) == number == library.class_label(info, str(number))
    assert library.class_label(info, "Cardigan") == 264 and library.class_label(info, "cardigan") == 474
    assert library.class_label(info, " GOLDEN retriever ") == 207
    path = tmp_path / "mine.safetensors"
    own = [f"kind {i}" for i in range(1000)]
    save_file(decoder(), path, {"grid": "24x24", "classes": json.dumps(own)})
    assert list(read_info(path).classes) == own
    notes = json.loads((library.ASSETS / "imagenet_classes.json").read_text(encoding="utf-8"))
    assert "torchvision" in notes["source"] and "BSD 3-Clause" in notes["licence"]


def test_a_class_is_chosen_as_written_before_anything_else(tmp_path: Path) -> None:
    """Names that occur twice stay within reach by number."""
    path = tmp_path / "mine.safetensors"
    names = ["crane", "Crane", "crane"] + ["x"] * 997
    save_file(decoder(), path, {"grid": "24x24", "classes": json.dumps(names)})
    info = read_info(path)
    assert [library.class_label(info, n) for n in ("crane", "Crane", "CRANE", "2")] == [0, 1, 0, 2]


# -- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factor", "name"), [(16, "vq_ds16_c2i"), (16, "vq_ds16_t2i"), (8, "vq_ds8_c2i")])
@pytest.mark.parametrize("nest", ["model", "training", "safetensors", "no encoder"])
def test_tokenizers_as_published(factor: int, name: str, nest: str, tmp_path: Path) -> None:
    """The three files' layout; what a training run saved; the hub's safetensors; one without its encoder."""
    weights = official.tokenizer(factor, channels=16, codes=32)
    path = tmp_path / f"{name}.pt"
    if nest == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file({k: v.detach() for k, v in weights.items()}, path)
    elif nest == "training":
        save(path, official.training(weights))
    elif nest == "no encoder":
        save(path, {"model": {k: v for k, v in weights.items() if not k.startswith("encoder.")}})
    else:
        save(path, {"model": weights})
    network = load_tokenizer(path)
    assert network.config.factor == factor and bool(network.config.encoder_widths) == (nest != "no encoder")
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())
    with torch.inference_mode():
        assert network.decode(torch.arange(6).view(1, 2, 3)).shape == (1, 3, 2 * factor, 3 * factor)


def test_a_tokenizer_of_another_model_is_refused(class_file: Path, tmp_path: Path) -> None:
    """Published tokenizers all have 16384 codes: without a look at more, the wrong one would draw noise."""
    small = official.tokenizer(16, channels=16)
    right = save(tmp_path / "vq_ds16_c2i.pt", {"model": small})
    load_model(ModelFiles(class_file, right))
    renamed = save(tmp_path / "my tokenizer.pt", {"model": small})
    load_model(ModelFiles(class_file, renamed))
    texts = save(tmp_path / "vq_ds16_t2i.pt", {"model": small})
    finer = save(tmp_path / "vq_ds8.pt", {"model": official.tokenizer(8, channels=16)})
    for wrong in (texts, finer):
        with pytest.raises(UserError, match=f"{wrong.name}: is another model's.*vq_ds16_c2i.*huggingface.co"):
            load_model(ModelFiles(class_file, wrong))


def test_the_tokenizer_is_found(class_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        find_tokenizer(class_file)
    assert str(tmp_path / "vq_ds16_c2i.safetensors") in str(caught.value)
    assert f"{published.C2I.revision}/vq_ds16_c2i.pt" in str(caught.value)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = save(elsewhere / "vq_ds16_c2i.pt", 0)
    assert find_tokenizer(class_file, among=[save(tmp_path / "vq_ds16_t2i.pt", 0), other]) == other
    beside = save(tmp_path / "vq_ds16_c2i.pt", 0)
    assert find_tokenizer(class_file, among=[other]) == beside
    noted = tmp_path / "own.safetensors"
    save_file(decoder(), noted, {"grid": "8x8", "tokenizer": "own_vq.safetensors"})
    with pytest.raises(UserError, match=r"own_vq.safetensors: there is no such file.*put it there"):
        find_tokenizer(noted)


# -- where to get what is missing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c2i_XL_384.pt", "t2i_XL_stage1_256.safetensors"])
def test_a_missing_published_file_says_where_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_info(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "https://huggingface.co/" in str(caught.value)
    with pytest.raises(UserError, match=r"there is no such file\.$"):
        read_info(tmp_path / "my_own.pt")


def test_every_published_file_is_listed_once() -> None:
    """Seven class-conditional decoders, two for texts, three tokenizers, the text encoder, three Janus, four
    Lumina-mGPT, Anole and their two tokenizers, two Lumina-mGPT 2.0 and their tokenizer, two Emu3, two Emu3.5 and a
    tokenizer for each kind, five VAR and their tokenizer, five M-VAR, four Infinity and their three, three MAR and
    their VAE; with what they need."""
    assert len(published.RELEASES) == 54
    places = [(r.folder, r.local_path(f)) for r in published.RELEASES.values() for f in r.files]
    assert len(set(places)) == len(places)
    for release in published.RELEASES.values():
        assert all(need in published.RELEASES for need in release.needs)
        for file in release.files:
            assert file.url.startswith("https://huggingface.co/") and file.url.endswith(file.path)
            assert file.sha256 is None or len(file.sha256) == 64
            revision = file.repository.revision
            assert revision is None or (len(revision) == 40 and revision in file.url)


# -- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nest", ["", "model", "module", "state_dict"])
def test_a_decoder_converted(nest: str, tmp_path: Path) -> None:
    weights = decoder()
    content = weights | {"freqs_cis": torch.zeros(577, 32, 2)}
    source = save(tmp_path / "c2i_L_384.pt", {nest: content, "steps": 1} if nest else content)
    target = tmp_path / "somewhere else.safetensors"
    seen: list[tuple[int, int]] = []
    notes = convert(source, target, progress=lambda done, total: seen.append((done, total)))
    ours = load_file(target)  # safetensors' own reader finds the file in order
    assert ours.keys() == weights.keys() and all(torch.equal(v, weights[k]) for k, v in ours.items())
    assert notes == read_weights(target, shapes_only=True).metadata
    assert {k: notes[k] for k in ("family", "grid", "heads", "codes", "tokenizer", "source")} == {
        "family": "llamagen", "grid": "24x24", "heads": "1", "codes": "16384", "source": "c2i_L_384.pt",
        "tokenizer": "vq_ds16_c2i.safetensors",
    }  # fmt: skip
    before, after = read_info(source), read_info(target)
    assert (after.grid, after.defaults, after.classes, after.config, after.tokenizer) == (
        before.grid, before.defaults, before.classes, before.config, before.tokenizer,
    )  # fmt: skip
    assert seen[-1] == (after.weight_bytes, after.weight_bytes) and seen == sorted(seen)
    assert [p.name for p in tmp_path.glob("*.part")] == []


def test_a_converted_model_draws_the_same(class_file: Path, tmp_path: Path) -> None:
    vq = save(tmp_path / "vq_ds16_c2i.pt", official.training(official.tokenizer(16, channels=16)))
    for source in (class_file, vq):
        convert(source, source.with_suffix(".safetensors"))
    old, new = (
        load_model(ModelFiles(f, find_tokenizer(f))) for f in (class_file, class_file.with_suffix(".safetensors"))
    )
    assert new.files.tokenizer.suffix == ".safetensors"
    for a, b in ((old.decoder, new.decoder), (old.tokenizer, new.tokenizer)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    notes = read_weights(new.files.tokenizer, shapes_only=True).metadata
    assert {k: notes[k] for k in ("family", "codes", "code_dim", "factor")} == {
        "family": "llamagen-vq", "codes": "16384", "code_dim": "8", "factor": "16",
    }  # fmt: skip


def test_formats(class_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "half.safetensors"
    convert(class_file, target, dtype=torch.bfloat16)
    weights = decoder()
    assert all(torch.equal(v, weights[k].bfloat16()) for k, v in load_file(target).items())
    mixed = {k: v.double() if k == "norm.weight" else v for k, v in weights.items()}
    with pytest.raises(UserError, match=r"norm\.weight.*float64"):
        convert(save(tmp_path / "c2i_B_256.pt", mixed), tmp_path / "never.safetensors")
    assert not (tmp_path / "never.safetensors").exists()


def test_the_command(class_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unnamed = class_file.rename(tmp_path / "epoch_300.pt")
    target = tmp_path / "mine.safetensors"
    assert main(["convert", str(unnamed), str(target)]) == 2
    assert "which grid" in capsys.readouterr().err and not target.exists()
    extra = ["--grid", "12x20", "--tokenizer", "mine_vq.safetensors", "--dtype", "float16"]
    assert main(["convert", str(unnamed), str(target), *extra]) == 0
    assert "grid: 12x20" in capsys.readouterr().out
    info = read_info(target)
    assert (info.grid.rows, info.grid.cols, info.tokenizer) == (12, 20, "mine_vq")


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("c2i_B_384.pt", "result.pt", "must end in .safetensors"),
        ("c2i_B_384.pt", "there.safetensors", "already exists"),
        ("c2i_B_384.pt", "nowhere/result.safetensors", "no such folder"),
        ("gone.pt", "result.safetensors", "no such file"),
        ("half.pt", "result.safetensors", "lacks 1 of"),
        ("strange.pt", "result.safetensors", "not an image decoder"),
    ],
)
def test_what_is_refused_leaves_nothing(source: str, target: str, words: str, class_file: Path, tmp_path: Path) -> None:
    save(tmp_path / "half.pt", {k: v for k, v in decoder().items() if k != "output.weight"})
    save(tmp_path / "strange.pt", {"x": torch.zeros(1)})
    (tmp_path / "there.safetensors").write_text("mine")
    before = sorted(tmp_path.iterdir())
    grid = (24, 24) if source == "half.pt" else None
    with pytest.raises(UserError, match=words):
        convert(tmp_path / source, tmp_path / target, grid=grid)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.safetensors").read_text() == "mine"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_stopped_half_way_leaves_nothing(error: BaseException, class_file: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert list(tmp_path.glob("*.part"))
        raise error

    with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt):
        convert(class_file, tmp_path / "result.safetensors", progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == [class_file.name]


def test_a_tokenizer_has_no_grid(tmp_path: Path) -> None:
    vq = save(tmp_path / "vq_ds16_c2i.pt", {"model": official.tokenizer(16, channels=16, codes=8)})
    with pytest.raises(UserError, match="is a tokenizer"):
        convert(vq, tmp_path / "vq.safetensors", grid=(24, 24))


def test_tensors_are_aligned(tmp_path: Path) -> None:
    """Readers map the file: every number stands at a multiple of its size, after three of two bytes each too."""
    weights = {k: v.detach() for k, v in official.tokenizer(16, channels=16, codes=8).items()}
    weights["decoder.conv_out.bias"] = weights["decoder.conv_out.bias"].half()
    target = tmp_path / "x.safetensors"
    convert(save(tmp_path / "vq.pt", {"model": weights}), target)
    content = target.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert (8 + length) % 8 == 0
    sizes = {"F32": 4, "F16": 2, "BF16": 2}
    assert all(v["data_offsets"][0] % sizes[v["dtype"]] == 0 for k, v in header.items() if k != "__metadata__")
    assert set(sizes) == set(converting.DTYPES.values())
