"""Lumina-mGPT 2.0: the network of 1.0 with codes high in the vocabulary, another tokenizer and half the pixels a token.

transformers' Chameleon is the published network. Its vocabulary is cut down here, codes and the line's end in their
order, because 171,384 words of it make no other numbers; what the real ids are is tested without a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from linear_core.checkpoints import library, published
from linear_core.checkpoints.families import ModelInfo, lumina
from linear_core.checkpoints.library import ImageModel, ModelFiles, find_tokenizer, load_model, read_info
from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.loop.memory import run_bytes
from linear_core.models.lumina import LuminaConfig
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt
from linear_core.sizes import sizes
from tests.models import lumina_official as official
from tests.models import lumina_reference
from tests.models.stepwise import random_tokens, stepped, unpadded
from tests.tokenizers import reference

pytest.importorskip("tokenizers")
HEADS, DIM, CODES, FIRST, EOL = 2, 16, reference.CODES, 400, 300
IDS = official.vocabulary_2(EOL)
TEXTS = ["a red fox", "an old lighthouse on a cliff above the sea"]
TOLERANCE = 1e-4
SEVEN_B = LuminaConfig(32, 4096, 32, 11008, 16384, 171384, 1e-5, qk_norm="layer", first_code=155000)
SQUARE = Grid(96, 96, eol=-3330)


def write(models: Path, weights: dict[str, Tensor], name: str = published.LUMINA_2) -> Path:
    folder = official.write_model(models / name, weights, IDS, words=False)
    official.write_tokenizer_2(folder, IDS)
    torch.save(reference.weights("movq", (16,) * 4), models / "movqgan_270M.ckpt")
    return folder


@pytest.fixture(scope="module", autouse=True)
def cut_down() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"FIRST_CODE_2": FIRST, "CODES_2": CODES, "EOL_2": EOL}.items():
            patch.setattr(lumina, name, value)
        yield


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return official.decoder({"last": FIRST + CODES - 1}, heads=HEADS, dim=DIM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> Path:
    return write(tmp_path_factory.mktemp("models"), weights)


@pytest.fixture(scope="module")
def model(folder: Path) -> ImageModel:
    """As published: shards, their index, config.json, the text tokenizer's files, and beside it movqgan_270M.ckpt."""
    return load_model(ModelFiles(folder, find_tokenizer(folder)))


def theirs(weights: dict[str, Tensor]) -> nn.Module:
    return official.chameleon(weights, IDS, words=FIRST + CODES, heads=HEADS)


def small(model: ImageModel, rows: int = 4, cols: int = 3) -> Prompt:
    prompt = model.prompt(TEXTS)
    return replace(prompt, grid=replace(prompt.grid, rows=rows, cols=cols))


# -- what it draws -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_logits_at_prefill_and_every_step(model: ImageModel, weights: dict[str, Tensor]) -> None:
    """Everything kept, both guidance rows of two prompts of unequal length; each row alone over there."""
    prompt, network, decoder = small(model), theirs(weights), model.decoder
    rows = decoder.with_unconditional(prompt)
    grid = prompt.grid.after(rows.length)
    tokens = random_tokens(CODES, grid)
    ours = stepped(decoder, rows, grid, tokens)
    for row, (text, drawn) in enumerate(zip(unpadded(rows), tokens.tolist(), strict=True)):
        ids = torch.tensor([text + [FIRST + token for token in drawn[:-1]]])
        assert (ids == EOL).sum() == grid.rows - 1
        expected = network(input_ids=ids).logits[0, len(text) - 1 :, FIRST : FIRST + CODES]
        assert float(expected.std()) > 0.5
        assert float((ours[row] - expected).abs().max()) < TOLERANCE


@torch.inference_mode()
def test_a_greedy_image_with_guidance(model: ImageModel, weights: dict[str, Tensor]) -> None:
    """The whole loop against the published one in plain words: two forward passes a token, line ends forced."""
    prompt, network = small(model), theirs(weights)
    grid, sample = prompt.grid, replace(model.info.defaults, temperature=0)
    assert sample.guidance == 4.0 and sample.top_k == 4096
    lines = list(generate(model.decoder, prompt, CachePlan("full"), sample))
    ours = torch.stack([line.tokens for line in lines], 1)
    for image, text in enumerate(unpadded(prompt)):
        drawn: list[int] = []
        while len(drawn) < grid.tokens:
            if len(drawn) % grid.stride == grid.cols:
                drawn.append(EOL)
                continue
            with_text, without = (
                network(input_ids=torch.tensor([start + drawn])).logits[0, -1, FIRST : FIRST + CODES]
                for start in (text, text[-3:])
            )
            drawn.append(FIRST + int((without + 4.0 * (with_text - without)).argmax()))
        codes = torch.tensor(drawn).view(grid.rows, grid.stride)
        assert torch.equal(codes[:, :-1] - FIRST, ours[image])
    assert model.tokenizer.decode(ours).shape == (2, 3, 8 * grid.rows, 8 * grid.cols)


# -- the prompt --------------------------------------------------------------------------------------------------------


def test_the_prompt(model: ImageModel) -> None:
    """Token by token: the template of 1.0 in another vocabulary, and the tokenizer's "eos" where 1.0 has <s>."""
    info = model.info.with_size((896, 608))
    prompt = info.family.prompt(model.text_tokenizer, TEXTS, "", info)
    image = [IDS["<racm3:break>"], EOL + 608 // 32, EOL + 896 // 32]
    for row, text in zip(unpadded(prompt), TEXTS, strict=True):
        said = f"Generate an image of 896x608 according to the following prompt:\n{text}".encode()
        assert row == [IDS["<|im_end|>"], *said, IDS["<reserved08706>"], *image]  # the letters' ids are their bytes
    assert unpadded(prompt.negative) == [image, image]
    assert prompt.grid == Grid(76, 112, eol=EOL - FIRST)
    away = info.family.prompt(model.text_tokenizer, TEXTS, "blurry", info).negative
    assert unpadded(away)[0][-4:] == [IDS["<reserved08706>"], *image] and len(unpadded(away)[0]) > 60


@pytest.mark.parametrize(
    ("files", "name"),
    [
        ({"tokenizer_config": {"eos_token": "<|endoftext|>"}}, "<|endoftext|>"),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>", "lstrip": False}}}, "<|im_end|>"),
        ({"tokenizer_config": {"bos_token": "<eoss>", "eos_token": "<|im_end|>"}}, "<eoss>"),
        ({"tokenizer_config": {"bos_token": None}, "special_tokens_map": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        ({"special_tokens_map": {"eos_token": "<|endoftext|>"}}, "<|endoftext|>"),
        ({"tokenizer_config": {"bos_token": "", "eos_token": 7}}, "names no token that begins a text"),
        ({"tokenizer_config": {"eos_token": "<s>"}}, r"tokenizer.json: has no token <s>"),
        ({}, r"tokenizer_config.json: there is no such file"),
    ],
)
def test_what_begins_a_text(files: dict[str, dict[str, object]], name: str, tmp_path: Path, model: ImageModel) -> None:
    official.tokenizer(tmp_path / "tokenizer.json", IDS)
    for stem, said in files.items():
        (tmp_path / f"{stem}.json").write_text(json.dumps(said))
    own = type(model.text_tokenizer)(tmp_path / "tokenizer.json")
    if name in IDS:
        row = unpadded(model.info.family.prompt(own, TEXTS, "", model.info))[0]
        assert row[0] == IDS[name] and row[1] == ord("G")
    else:
        with pytest.raises(UserError, match=name):
            model.info.family.prompt(own, TEXTS, "", model.info)


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_a_folder_says(folder: Path) -> None:
    info = read_info(folder)
    assert info.family.name == "Lumina-mGPT 2.0" and info.text and info.own_tokenizer
    assert info.grid == Grid(96, 96, eol=EOL - FIRST) and info.pixels == 8
    assert (info.config.first_code, info.config.codes, info.config.heads) == (FIRST, CODES, HEADS)
    assert info.sizes == (*sizes(768), *sizes(512)) and len(set(info.sizes)) == len(info.sizes)
    assert info.with_size((512, 512)).grid.rows == 64 and read_info(folder, (192, 48)).grid.rows == 192


def test_the_published_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of words alone, whatever an old vocabulary_map says, in the repository's layout."""
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("FIRST", "CODES", "EOL"):
            patch.setattr(lumina, "FIRST_CODE_2" if name == "FIRST" else f"{name}_2", getattr(official, f"{name}_2"))
        weights = official.decoder({"last": 171383}, heads=1, dim=8, layers=1, hidden=8)
        for ids in (official.vocabulary_2(), official.vocabulary(), {}):
            info = read_info(official.write_model(tmp_path / "Lumina-mGPT-2.0-Omni", weights, ids, words=False))
            assert (info.config.first_code, info.config.codes, info.config.vocabulary) == (155000, 16384, 171384)
            assert (info.grid, info.tokenizer) == (SQUARE, "movqgan_270M")
    ids = official.vocabulary_2()
    assert (ids["<racm3:break>"], ids["<eoss>"], ids["<reserved08799>"]) == (151665, 151666, 151670)


def test_every_size_is_a_legal_grid() -> None:
    info = ModelInfo(
        "x", lumina.FAMILY_2, None, SQUARE, (), SamplePlan(), 0, sizes=(*sizes(768), *sizes(512)), pixels=8
    )
    for width, height in info.sizes:
        grid = info.with_size((width, height)).grid
        assert (grid.rows * 8, grid.cols * 8, grid.eol) == (height, width, -3330)
        assert info.with_grid(grid).grid == grid and grid.tokens <= 9600
    with pytest.raises(UserError, match=r"size: x does not draw 1024 x 1024 pixels; of similar shape it draws 768 x"):
        info.with_size((1024, 1024))
    with pytest.raises(UserError, match=r"prompt: it asks for 512 x 1024 pixels and was not made for x"):
        info.with_grid(replace(SQUARE, rows=128, cols=64))


def test_files_of_others(folder: Path, tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """A VQ tokenizer of another kind with as many codes, one of other pixels, none, and a text tokenizer of 1.0."""
    own = tmp_path / "movqgan_270M.ckpt"
    mine = write(tmp_path, weights)
    own.unlink()
    with pytest.raises(UserError, match=r"movqgan_270M.safetensors: there is no such file, but .*Download AR Model"):
        find_tokenizer(mine)
    torch.save(reference.weights("movq", (16,) * 3), own)
    with pytest.raises(UserError, match=r"makes 4 pixels a side of each code, but Lumina-mGPT-2.0 needs 8"):
        load_model(ModelFiles(mine, own))
    torch.save(lumina_reference.vq_weights((16,) * 4, codes=CODES), own)
    with pytest.raises(UserError, match=r"movqgan_270M.ckpt: is another model's tokenizer"):
        load_model(ModelFiles(mine, own))
    model = load_model(ModelFiles(mine, find_tokenizer(folder)))
    (mine / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"2.0/tokenizer.json: there is no such file, but .* to read texts; get it"):
        model.prompt(TEXTS)
    official.tokenizer(mine / "tokenizer.json", official.vocabulary(64))
    with pytest.raises(UserError, match=r"its end-of-line token is not the model's"):
        load_model(ModelFiles(mine, find_tokenizer(folder))).prompt(TEXTS)


def test_float32_shards_become_bfloat16(tmp_path: Path, weights: dict[str, Tensor], folder: Path) -> None:
    """Tensor by tensor as they are read; large matrices in 8 bits, the rest in bfloat16."""
    vq = find_tokenizer(folder)
    for kept in (None, torch.float8_e4m3fn):
        decoder = load_model(ModelFiles(folder, vq), dtype=torch.bfloat16, weight_dtype=kept).decoder
        whole, loaded = decoder.state_dict(), decoder.state_dict()["layers.1.attention.wo.weight"]
        expected = weights["model.layers.1.self_attn.o_proj.weight"].to(kept or torch.bfloat16)
        assert torch.equal(loaded.float(), expected.float()) and whole["norm.weight"].dtype == torch.bfloat16
        assert sum(t.nbytes for t in whole.values()) == library.decoder_bytes(read_info(folder), torch.bfloat16, kept)


# -- memory ------------------------------------------------------------------------------------------------------------

PLANS = {"full": CachePlan("full"), "1/6": CachePlan("fold", 16, recent=0), "1/12": CachePlan("fold", 8, recent=0)}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_cache_of_768_by_768(plan: CachePlan, model: ImageModel) -> None:
    """What the plan predicts is what is allocated and stays so, on the real grid of 96 lines of 97 tokens.

    Eighteen lines are given, so that the cache is full and has evicted before one is drawn.
    """
    prompt, caches = model.prompt(TEXTS[:1]), []
    assert (prompt.grid.rows, prompt.grid.stride) == (96, 97)

    def step(*arguments: object) -> Tensor:
        caches[:] = [arguments[-1]]
        return model.decoder.step(*arguments)

    shape = model.info.cache_shape(torch.float32, prompt.length)
    predicted = shape.bytes(prompt.grid, plan, rows=2)
    above = torch.randint(CODES, (1, 18, 96), generator=torch.Generator().manual_seed(0))
    run = generate(model.decoder, prompt, plan, SamplePlan(guidance=4.0), step=step, above=above)
    for line in run:
        assert line.cache_bytes == predicted
        if line.row == 18:
            break
    run.close()
    stored = sum(t.data.untyped_storage().nbytes() for t in (caches[0].keys, caches[0].values))
    lines = 96 if plan.policy == "full" else plan.budget + 1
    assert stored == predicted == 2 * 2 * 2 * HEADS * DIM * 4 * (prompt.length + lines * 97)


def test_the_memory_of_the_7b() -> None:
    """The numbers of docs/models.md: keys and values of a guided picture in bfloat16, weights, and what fits where.

    A run fits if weights, cache and all else that drawing takes leave a GiB of the card.
    """
    shape, kept = SEVEN_B.cache_shape(64, 2), {"bfloat16": None, "fp8": torch.float8_e4m3fn}
    gib = {name: round(shape.bytes(SQUARE, plan, 2) / 2**30, 2) for name, plan in PLANS.items()}
    assert gib == {"full": 9.16, "1/6": 1.67, "1/12": 0.92}
    small, budgets = Grid(64, 64, eol=-3330), (("full", 1), ("fold", 11), ("fold", 5))
    gib = [round(shape.bytes(small, CachePlan(*plan, recent=0), 2) / 2**30, 2) for plan in budgets]
    assert gib == [4.12, 0.82, 0.44]
    info = ModelInfo("7B", lumina.FAMILY_2, SEVEN_B, SQUARE, (), SamplePlan(), 0)
    weights = {name: library.decoder_bytes(info, torch.bfloat16, k) for name, k in kept.items()}
    assert {name: round(size / 1e9, 1) for name, size in weights.items()} == {"bfloat16": 14.5, "fp8": 8.0}
    fits = {}
    for name, plan in PLANS.items():
        for k, size in weights.items():
            taken = (size + run_bytes(shape, SQUARE, plan, 2, 16384)) / 2**30
            fits[name, k] = next((card for card in (12, 16, 24) if taken <= card - 1), None)
    assert fits == {
        ("full", "bfloat16"): None, ("full", "fp8"): 24, ("1/6", "bfloat16"): 24, ("1/6", "fp8"): 12,
        ("1/12", "bfloat16"): 16, ("1/12", "fp8"): 12,
    }  # fmt: skip
