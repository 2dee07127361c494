"""What Emu3's kind draws, and what is said of checkpoints that are not one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from linear_core.checkpoints.library import ImageModel, ModelFiles, family_of, load_model, read_info
from linear_core.checkpoints.weights import read_weights
from linear_core.errors import UserError
from linear_core.sizes import EMU3_AREAS, EMU35_SIZES, emu3_sizes
from tests.models import emu_official as official
from tests.tokenizers import reference


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return official.decoder()


@pytest.fixture
def write(tmp_path: Path, weights: dict[str, Tensor]) -> Callable[..., Path]:
    """Writes an Emu3, or with `norms` an Emu3.5, whose config differs in `changes`."""

    def model(name: str = "Emu3-Gen", norms: bool = False, **changes: object) -> Path:
        config = {key: value for key, value in (official.CONFIG | changes).items() if value is not None}
        kind = official.decoder(heads=4, dim=16, norms=True) if norms else weights
        return official.write_model(tmp_path / name, kind, config)

    return model


def test_the_published_sizes() -> None:
    """Rows and columns as the published code computes them, for the ratios that we offer."""
    gen = [(1096, 472), (1016, 512), (960, 544), (880, 584), (832, 624), (720, 720), (624, 832), (584, 880)]
    assert emu3_sizes(EMU3_AREAS["Emu3-Gen"]) == (*gen, (544, 960), (512, 1016))
    stage1 = [(784, 336), (728, 360), (680, 384), (624, 416), (592, 440), (512, 512)]
    assert emu3_sizes(EMU3_AREAS["Emu3-Stage1"])[:6] == tuple(stage1)
    assert EMU35_SIZES[:5] == ((1552, 656), (1360, 752), (1248, 832), (1168, 880), (1024, 1024))


@pytest.mark.parametrize(
    ("name", "norms", "changes", "sizes", "guidance"),
    [
        ("Emu3-Gen", False, {}, emu3_sizes(518400), 3.0),
        ("my emu", False, {"image_area": 262144}, emu3_sizes(262144), 3.0),
        ("Emu3-Stage1", False, {"image_area": None}, emu3_sizes(262144), 3.0),
        ("Emu3.5-Image", True, {}, EMU35_SIZES, 5.0),
        ("Emu3.5", True, {}, EMU35_SIZES, 2.0),
        ("my u0", True, {"model_type": "UNIS"}, ((1024, 1024),), 3.0),
    ],
)
def test_every_size_is_a_legal_grid(
    name: str, norms: bool, changes: dict, sizes: tuple, guidance: float, write: Callable[..., Path]
) -> None:
    """Whole tokens, a line end before the codes, and no more tokens than the model has seen positions."""
    info = read_info(write(name, norms, **changes))
    assert (info.sizes, info.defaults.guidance, info.defaults.top_k) == (sizes, guidance, 5120 if norms else 2048)
    assert info.pixels == (16 if norms else 8) and info.grid.rows == info.grid.cols
    for width, height in sizes:
        grid = info.with_size((width, height)).grid
        assert (grid.cols * info.pixels, grid.rows * info.pixels) == (width, height)
        assert grid.eol == official.EOL - official.FIRST < 0
        assert grid.tokens + info.family.prompt_slots < 9216


def test_the_keys_and_values_of_one_token(write: Callable[..., Path]) -> None:
    """Two key heads of eight numbers, in two layers: not the six heads of queries."""
    shape = read_info(write()).cache_shape(torch.bfloat16)
    assert (shape.layers, shape.heads, shape.head_dim, shape.group) == (2, 2, 8, 3)
    shape = read_info(write("Emu3.5", True)).cache_shape(torch.bfloat16)
    assert (shape.layers, shape.heads, shape.head_dim, shape.group) == (2, 2, 16, 2)


@pytest.mark.parametrize(
    ("name", "norms", "changes", "problem"),
    [
        ("Emu3-Chat", False, {}, "Emu3-Chat: is Emu3-Chat, which reads pictures and does not draw them; choose Emu3-"),
        ("my emu", False, {"max_position_embeddings": 131072}, "my emu: is Emu3-Chat, which reads pictures"),
        ("Emu3-Chat-hf", False, {"text_config": {"max_position_embeddings": 131072}}, "is Emu3-Chat, which reads"),
        ("U0-FlashAR", True, {}, "U0-FlashAR: is U0-FlashAR, which does not draw line by line"),
        ("Emu3-Gen", False, {"num_attention_heads": 5}, "Emu3-Gen: its weights do not describe an Emu3"),
        ("Emu3-Gen", False, {"rope_theta": "x"}, "Emu3-Gen: its weights do not describe an Emu3 .* rope_theta: 'x'"),
        ("Emu3-Gen", False, {"text_config": 3}, "Emu3-Gen: its weights do not describe an Emu3 .* text_config: 3"),
        ("Emu3-Gen", False, {"img_token_id": 10**6}, "Emu3-Gen: its weights do not describe an Emu3 .* too few for"),
        ("Emu3-Gen", False, {"eol_token_id": 531}, "Emu3-Gen: its weights do not describe an Emu3 .* too few for"),
        ("Emu3-Gen", False, {"vocabulary_map": {"<|image token|>": 3}}, "its weights do not describe an Emu3"),
        ("Emu3-Gen", False, {"vocabulary_map": {**official.ids(), "<|visual token 000007|>": 9}}, "codes in order"),
        ("Emu3-Gen", False, {"vocabulary_map": {**official.ids(), "<|extra_200|>": None}}, "values that are not ids"),
    ],
)
def test_what_is_refused(name: str, norms: bool, changes: dict, problem: str, write: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=problem):
        read_info(write(name, norms, **changes))


def test_a_size_that_the_model_was_not_made_for(write: Callable[..., Path]) -> None:
    info = read_info(write())
    assert read_info(write(), (68, 120)).grid.cols == 120
    with pytest.raises(UserError, match=r"size: Emu3-Gen does not draw 1024 x 1024 pixels; .* it draws 720 x 720"):
        info.with_size((1024, 1024))
    with pytest.raises(UserError, match=r"size: Emu3-Gen does not draw 512 x 512 pixels"):
        read_info(write(), (64, 64))


@pytest.mark.parametrize("missing", ["emu3.tiktoken", "emu3_vision_tokens.txt"])
def test_a_missing_file_of_the_text_tokenizer(missing: str, write: Callable[..., Path]) -> None:
    folder = write()
    model = ImageModel(read_info(folder), None, None, ModelFiles(folder, folder))
    assert model.prompt(["fox"]).rows == 1
    (folder / missing).unlink()
    with pytest.raises(UserError, match=f"{missing}: there is no such file, but the model needs it to read texts"):
        ImageModel(model.info, None, None, model.files).prompt(["fox"])


def test_another_models_words(write: Callable[..., Path]) -> None:
    """The same names with other ids: the list of another number of codes in the middle of the folder."""
    folder = write()
    names = (folder / "emu3_vision_tokens.txt").read_text().split("\n")
    (folder / "emu3_vision_tokens.txt").write_text("\n".join([*names[:3], "<|more|>", *names[3:]]))
    with pytest.raises(UserError, match=r"emu3.tiktoken: its id of <\|visual token 000000\|> is not the model's"):
        ImageModel(read_info(folder), None, None, ModelFiles(folder, folder)).prompt(["fox"])


def test_without_its_config(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By its vocabulary it is known as an Emu3, and what it lacks is said; another Llama is none of them."""
    folder = write()
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"is not an image decoder that LineAR supports"):
        read_info(folder)
    monkeypatch.setattr("linear_core.checkpoints.families.emu.VOCABULARIES", (official.FIRST + official.CODES,))
    with pytest.raises(UserError, match=r"Emu3-Gen: lacks the config.json that was published with it; put it into"):
        read_info(folder)


@pytest.mark.parametrize("norms", [False, True])
def test_families_are_told_apart(norms: bool, write: Callable[..., Path]) -> None:
    """Emu3.5 has the norms that Lumina-mGPT is known by, but theirs have biases."""
    weights = read_weights(write("model", norms), shapes_only=True)
    assert family_of(weights).name == ("Emu3.5" if norms else "Emu3")


def test_the_tokenizer_of_another_family(write: Callable[..., Path], tmp_path: Path) -> None:
    """With as many codes, and even with as many pixels a code, its codes have other meanings."""
    folder, vq = write(), official.write_tokenizer(tmp_path, "emu3")
    model = load_model(ModelFiles(folder, vq))
    assert model.tokenizer.config.kind == "emu3"
    with pytest.raises(UserError, match=r"Emu3.5-VisionTokenizer: makes 16 pixels a side of each code, but Emu3-Gen n"):
        load_model(ModelFiles(folder, official.write_tokenizer(tmp_path, "ibq")))
    save_file(reference.weights("movq", official.WIDTHS["emu3"]), vq / "model.safetensors")
    with pytest.raises(
        UserError, match=r"Emu3-VisionTokenizer: is another model's tokenizer; Emu3-Gen draws the codes"
    ):
        load_model(ModelFiles(folder, vq))
