"""Lumina-mGPT beyond parity: every size is a legal grid, memory is what the plan says, and mistakes are told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from linear_core.__main__ import main
from linear_core.cache.line_cache import LineCache
from linear_core.checkpoints import library
from linear_core.checkpoints.convert import convert
from linear_core.checkpoints.families import ModelInfo, lumina
from linear_core.checkpoints.library import ModelFiles, find_tokenizer, load_model, read_info
from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.models.lumina import LuminaConfig
from linear_core.plan import CachePlan, CacheShape, SamplePlan
from linear_core.prompts import token_prompt
from linear_core.prompts.tokenizer import TextTokenizer
from linear_core.sizes import sizes
from tests import tiny
from tests.models import lumina_official as official
from tests.models import lumina_reference

pytest.importorskip("tokenizers")
CODES, HEADS, DIM = lumina_reference.CODES, 2, 16
IDS = official.vocabulary(CODES)
EIGHTH = CachePlan(budget=8)  # of the 64 lines of 1024 x 1024
SEVEN_B = LuminaConfig(32, 4096, 32, 11008, 8192, 65536, eps=1e-5, qk_norm="layer")


def write(folder: Path, **settings: object) -> Path:
    weights = official.decoder(IDS, heads=HEADS, dim=DIM, layers=1)
    return official.write_model(folder, weights, IDS, **settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 768 repository, which has the tokenizer."""
    models = tmp_path_factory.mktemp("models")
    torch.save({"state_dict": lumina_reference.vq_weights((16,) * 5)}, models / "vqgan.ckpt")
    return write(models / "Lumina-mGPT-7B-768")


@pytest.fixture
def models(folder: Path, tmp_path: Path) -> Path:
    """A folder of models to change: the same one."""
    return Path(shutil.copytree(folder.parent, tmp_path / "ar_image"))


# -- legal grids -------------------------------------------------------------------------------------------------------


class Stub:
    """Draws anything, and writes down what it is fed, at which index and column."""

    codes, dtype, device = 11, torch.float32, torch.device("cpu")

    def __init__(self, grid: Grid):
        self.grid, self.fed = grid, []
        self.source = torch.Generator().manual_seed(0)

    def cache_shape(self, prompt: int) -> CacheShape:
        return CacheShape(1, 1, 1, prompt, 4)

    def prefill(self, prompt: object, cache: LineCache) -> Tensor:
        return torch.randn(1, self.codes, generator=self.source)

    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        return self.feed(token[:, None], index, pad, column, cache)

    def rotate_ahead(self, grid: Grid, queries: Tensor, lines: int, columns: int) -> Tensor:
        return queries

    def feed(self, tokens: Tensor, index: Tensor, pad: Tensor, columns: Tensor, cache: LineCache) -> Tensor:
        cache.advance(index, columns)
        self.fed += list(zip(index.tolist(), columns.tolist(), tokens[0].tolist(), strict=True))
        return torch.randn(1, self.codes, generator=self.source)


@pytest.mark.parametrize("side", lumina.SIDES)
def test_every_size_is_a_legal_grid(side: int) -> None:
    """For each size: rows of height/16 times width/16 codes and a line's end, and nothing else, whoever draws.

    Every fifth is drawn, the first and so the widest among them, and all lines but the last two are given, which is how
    so many sizes can be looked at.
    """
    info = ModelInfo("x", lumina.FAMILY, None, Grid(1, 1, eol=99), (), SamplePlan(), 0, sizes=sizes(side))
    for number, (width, height) in enumerate(sizes(side)):
        grid = info.with_size((width, height)).grid
        assert (grid.rows * 16, grid.cols * 16, grid.eol) == (height, width, 99)
        if number % 5:
            continue
        stub = Stub(grid)
        prompt = replace(token_prompt([[1, 2, 3]]), grid=grid)
        above = torch.randint(Stub.codes, (1, grid.rows - 2, grid.cols), generator=stub.source)
        lines = list(generate(stub, prompt, CachePlan(budget=4, anchors=4), SamplePlan(guidance=1), above=above))
        drawn = torch.stack([line.tokens for line in lines], 1)
        assert drawn.shape == (1, grid.rows, grid.cols) and int(drawn.max()) < Stub.codes and int(drawn.min()) >= 0
        expected = F.pad(drawn, (0, 1), value=99).flatten().tolist()[:-2]  # the last code and its end are fed to nobody
        places = [(3 + n, n % (grid.cols + 1), token) for n, token in enumerate(expected)]
        assert stub.fed == places


@pytest.mark.parametrize("size", [(512, 512), (256, 1024)])
def test_a_whole_picture(size: tuple[int, int]) -> None:
    """A decoder of small width draws a 512-pixel model's picture from a few lines, with guidance, in batches."""
    width, height = size
    decoder = tiny.lumina(height // 16, width // 16, layers=1)
    recorder = tiny.decode(decoder, tiny.lumina_words([6, 4]), CachePlan(budget=4), SamplePlan(seed=1, guidance=2.0))
    fed = torch.stack(recorder.fed, 1)
    ends = fed[:, width // 16 :: width // 16 + 1]
    assert (ends == decoder.grid.eol).all() and ends.shape[1] == height // 16 - 1
    assert int((fed == decoder.grid.eol).sum()) == ends.numel(), "nowhere else"
    assert recorder.tokens.shape == (2, height // 16, width // 16) and int(recorder.tokens.max()) < tiny.CODES


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [CachePlan("full"), EIGHTH], ids=["full", "eighth"])
def test_the_cache_of_1024_by_1024(plan: CachePlan) -> None:
    """What the plan predicts is what is allocated and stays so, on the real grid of 64 lines of 65 tokens."""
    decoder = tiny.lumina(64, 64)
    prompt = tiny.lumina_words([60])
    caches: list[LineCache] = []

    def step(*arguments: object) -> Tensor:
        caches[:] = [arguments[-1]]
        return decoder.step(*arguments)

    predicted = decoder.config.cache_shape(60, 4).bytes(decoder.grid, plan, rows=2)
    run = generate(decoder, prompt, plan, SamplePlan(guidance=4.0), step=step)
    for line in run:
        stored = sum(t.data.untyped_storage().nbytes() for t in (caches[0].keys, caches[0].values))
        assert line.cache_bytes == stored == predicted
        if line.row == 10:
            break
    run.close()
    tokens = (64 if plan.policy == "full" else 9) * 65
    assert predicted == 2 * 2 * 2 * 3 * 8 * 4 * (60 + tokens)


def test_the_memory_of_a_7b() -> None:
    """Formula and allocation agree at the published widths, and an eighth of the lines is 14 % of the full cache."""
    grid, shape = Grid(64, 64, eol=8799), SEVEN_B.cache_shape(64, 2)
    held = {}
    for name, plan in {"full": CachePlan("full"), "eighth": EIGHTH}.items():
        cache = LineCache(shape, 2, grid, plan, dtype=torch.bfloat16, device="meta")
        held[name] = cache.nbytes
        assert shape.bytes(grid, plan, 2) == cache.nbytes == cache.keys.nbytes + cache.values.nbytes
    assert held == {"full": 4_429_185_024, "eighth": 680_525_824}
    width, hidden, norms = SEVEN_B.width, SEVEN_B.hidden, 4 * 32 * 128
    layers = 32 * (4 * width**2 + 3 * width * hidden)
    small = 32 * (2 * width + norms) + width + (65536 + 8192) * width  # norms, words and the head's rows of codes
    info = ModelInfo("7B", lumina.FAMILY, SEVEN_B, grid, (), SamplePlan(), 0)
    assert library.decoder_bytes(info, torch.bfloat16) == 2 * (layers + small) == 13_557_571_584
    assert library.decoder_bytes(info, torch.bfloat16, torch.float8_e4m3fn) == layers + 2 * small
    published = layers + 32 * (2 * width + norms // 32) + width + 2 * 65536 * width
    assert 2 * published == 14_026_317_824, "the 14.03 GB of the published files, of which the rest is not read"


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side"),
    [("Lumina-mGPT-7B-512", 512), ("Lumina-mGPT-7B-768", 768), ("Lumina-mGPT-7B-1024", 1024),
     ("Lumina-mGPT-7B-768-Omni", 768)],
)  # fmt: skip
def test_what_a_folder_says(models: Path, name: str, side: int) -> None:
    (models / "Lumina-mGPT-7B-768").rename(models / name)
    info = read_info(models / name)
    assert info.grid == Grid(side // 16, side // 16, eol=IDS["<reserved08799>"] - 4) and info.sizes == sizes(side)
    assert (info.defaults.guidance, info.defaults.top_k, info.defaults.temperature) == (4.0, 2000, 1.0)
    assert (info.config.layers, info.config.heads, info.config.codes) == (1, HEADS, CODES)
    assert info.text and info.own_tokenizer and info.name == name


def test_a_folder_that_does_not_say(models: Path) -> None:
    """The grid then tells which model it is, where it is one of its sizes."""
    other = (models / "Lumina-mGPT-7B-768").rename(models / "lumina")
    with pytest.raises(UserError, match=r"lumina: does not say how large.*512 or 768 or 1024"):
        read_info(other)
    assert read_info(other, (48, 48)).sizes == sizes(768)
    tall = read_info(other, (112, 36))
    assert tall.grid.rows == 112 and tall.sizes == sizes(1024)


def test_a_size_it_does_not_draw(folder: Path) -> None:
    info = read_info(folder)
    with pytest.raises(UserError, match=r"size: Lumina-mGPT-7B-768 does not draw 800 x 600 .* 864 x 640, "):
        info.with_size((800, 600))
    with pytest.raises(UserError, match=r"does not draw 1024 x 1024 .* 768 x 768, "):
        info.with_size((1024, 1024))
    assert info.with_size((1024, 576)).grid.cols == 64


def test_a_prompt_of_another_model(models: Path) -> None:
    """A grid that comes with a prompt is one of the model's own, line ends included."""
    info = read_info(models / "Lumina-mGPT-7B-768")
    (models / "Lumina-mGPT-7B-768").rename(models / "Lumina-mGPT-7B-1024")
    large = read_info(models / "Lumina-mGPT-7B-1024")
    assert info.with_grid(None) is info and info.with_grid(replace(info.grid, rows=38, cols=56)).grid.rows == 38
    for grid in (large.grid, replace(info.grid, eol=None), replace(info.grid, rows=5)):
        with pytest.raises(UserError, match=r"prompt: it asks for .* was not made for Lumina-mGPT-7B-768"):
            info.with_grid(grid)


def test_the_tokenizer_of_another_repository(models: Path) -> None:
    """Only the 768 repository has it; without it the error says so and names the file."""
    other = write(models / "Lumina-mGPT-7B-1024", words=False)
    files = ModelFiles(other, find_tokenizer(other))
    assert files.tokenizer == models / "vqgan.ckpt"
    model = load_model(files)
    assert model.prompt(["a fox"]).grid.rows == 64
    chameleon = models / "chameleon" / "tokenizer"
    chameleon.mkdir(parents=True)
    (models / "Lumina-mGPT-7B-768" / "tokenizer.json").rename(chameleon / "text_tokenizer.json")
    assert load_model(files).prompt(["a fox"]).rows == 1
    (chameleon / "text_tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer.json: there is no such file"):
        load_model(files).prompt(["a fox"])


def test_a_vq_tokenizer_with_other_pixels(models: Path) -> None:
    """A token of 4 pixels a side would make pictures a quarter as wide and high as the size that was chosen."""
    torch.save({"state_dict": lumina_reference.vq_weights()}, models / "vqgan.ckpt")
    with pytest.raises(UserError, match=r"vqgan.ckpt: makes 4 pixels a side of each code, but .*768 needs 16"):
        load_model(ModelFiles(models / "Lumina-mGPT-7B-768", models / "vqgan.ckpt"))


def test_another_models_tokenizer(models: Path) -> None:
    """Codes are held against their names, not their numbers."""
    official.tokenizer(models / "Lumina-mGPT-7B-768" / "tokenizer.json", official.vocabulary(CODES, first=8))
    model = load_model(ModelFiles(models / "Lumina-mGPT-7B-768", models / "vqgan.ckpt"))
    with pytest.raises(UserError, match=r"tokenizer.json: its ids of image codes"):
        model.prompt(["a fox"])


def test_without_a_vocabulary_in_the_config(models: Path) -> None:
    """The published ids hold, and a prompt's tokenizer confirms them."""
    config = models / "Lumina-mGPT-7B-768" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "vocabulary_map"}))
    ids = official.vocabulary()
    weights = official.decoder(ids, heads=1, dim=DIM, layers=1, hidden=8)
    save_file(weights, models / "Lumina-mGPT-7B-768" / "model.safetensors")
    (models / "Lumina-mGPT-7B-768" / "model.safetensors.index.json").unlink()
    info = read_info(models / "Lumina-mGPT-7B-768")
    assert (info.config.first_code, info.config.codes, info.grid.eol) == (4, 8192, 8799)
    official.tokenizer(models / "words.json", ids)
    prompt = lumina.prompt(TextTokenizer(models / "words.json"), ["a fox"], "", info)
    assert prompt.tokens[0, -3:].tolist() == [8197, 8804 + 24, 8804 + 24]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"swin_norm": True}, "34B"),
        ({"vocabulary_map": {"IMGIMGAZ": 4, "IMGIMGCZ": 5, "<reserved08799>": 9}}, "codes in order"),
        ({"vocabulary_map": {"a": 4}}, "do not describe a Chameleon"),
    ],
)
def test_what_is_refused(models: Path, change: dict, said: str) -> None:
    config = models / "Lumina-mGPT-7B-768" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError, match=f"Lumina-mGPT-7B-768: .*{said}"):
        read_info(models / "Lumina-mGPT-7B-768")


def test_a_vq_tokenizer_converted(models: Path) -> None:
    """Its file says that the codebook is looked up as it is, where LlamaGen's is brought to unit length.

    In safetensors with the published names it needs no note: the names tell.
    """
    notes = convert(models / "vqgan.ckpt", models / "vqgan.safetensors")
    assert notes["family"] == "chameleon-vq"
    ours, theirs = (library.load_tokenizer(models / f"vqgan.{end}") for end in ("safetensors", "ckpt"))
    codes = torch.arange(20).view(1, 4, 5)
    assert ours.config == theirs.config and torch.equal(ours.decode(codes), theirs.decode(codes))
    save_file(lumina_reference.vq_weights((16,) * 5), models / "published.safetensors")
    published = library.load_tokenizer(models / "published.safetensors")
    assert published.config == theirs.config and torch.equal(published.decode(codes), theirs.decode(codes))
    with pytest.raises(UserError, match=r"belongs to Lumina-mGPT, whose files describe themselves"):
        convert(models / "Lumina-mGPT-7B-768", models / "lumina.safetensors")


def test_on_the_command_line(models: Path, capsys: pytest.CaptureFixture) -> None:
    """A folder, texts of unequal length and a size of the model's; other sizes are refused with the nearest."""
    folder, out = str(models / "Lumina-mGPT-7B-768"), str(models / "out.png")
    assert main(["plan", folder, "--pixels", "896x608", "--budget", "6"]) == 0
    assert "38 lines of 57 tokens" in capsys.readouterr().out
    drawn = ["generate", folder, "--pixels", "384x1504", "--budget", "4", "--text", "a fox", "--text", "an old owl"]
    assert main([*drawn, "--guidance", "1", "--out", out]) == 0
    pictures = [Image.open(path) for path in sorted(models.glob("out*.png"))]
    assert len(pictures) == 2 and {p.height / p.width for p in pictures} == {1504 / 384}
    assert main(["generate", folder, "--pixels", "800x600", "--text", "a fox"]) == 2
    assert "of similar shape it draws 864 x 640" in capsys.readouterr().err
    assert main(["generate", folder, "--pixels", "800", "--text", "a fox"]) == 2


def test_norms_that_fit_no_head(models: Path) -> None:
    weights = official.decoder(IDS, heads=HEADS, dim=DIM, layers=1)
    weights["model.layers.0.self_attn.k_norm.bias"] = torch.zeros(1, DIM + 3)
    path = official.write_model(models / "Lumina-mGPT-7B-512", weights, IDS)
    with pytest.raises(UserError, match=r"k_norm.bias' is \[1, 19\]"):
        load_model(ModelFiles(path, models / "vqgan.ckpt"))
