"""Ours equals transformers' Chameleon on small random weights in the official layout, and its VQ the recorded numbers.

transformers forbids image tokens to be drawn; that mask is lifted, and nothing else. It has no decoder of its VQ.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_core.checkpoints.library import ImageModel, ModelFiles, load_model, load_tokenizer
from linear_core.checkpoints.weights import load_into, read_weights
from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.models.blocks import rope_1d, rotate_halves
from linear_core.models.lumina import Lumina
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt, token_prompt
from linear_core.tokenizers.tokenizer import VQTokenizer
from tests.models import lumina_official as official
from tests.models import lumina_reference as upstream
from tests.models.stepwise import random_tokens, stepped, unpadded
from tests.tiny import decode

pytest.importorskip("transformers")
TOLERANCE = 1e-4
CODES, HEADS, DIM = upstream.CODES, 3, 16
IDS = official.vocabulary(CODES, first=9)  # another order than the published one, so that nothing is known by number
TEXTS = ("a lighthouse at dusk", "fox")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return official.decoder(IDS, heads=HEADS, dim=DIM)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, Tensor]) -> ImageModel:
    """Loaded from the published layout: two shards, their index, config.json, tokenizer.json, and vqgan.ckpt."""
    return load(tmp_path_factory.mktemp("models"), weights)


def load(models: Path, weights: dict[str, Tensor], name: str = "Lumina-mGPT-7B-768", **settings: object) -> ImageModel:
    folder = official.write_model(models / name, weights, IDS)
    torch.save({"state_dict": upstream.vq_weights((16,) * 5)}, models / "vqgan.ckpt")
    return load_model(ModelFiles(folder, models / "vqgan.ckpt"), **settings)


def theirs(weights: dict[str, Tensor]) -> nn.Module:
    return official.chameleon(weights, IDS, words=max(IDS.values()) + 1, heads=HEADS)


def small(model: ImageModel, rows: int = 5, cols: int = 4) -> Prompt:
    """Prompts of unequal length as the model makes them, for a grid far below the published ones."""
    prompt = model.prompt(TEXTS)
    return replace(prompt, grid=replace(prompt.grid, rows=rows, cols=cols))


def test_the_prompt(model: ImageModel) -> None:
    """The published template; size and begin of image by name, height first; unconditional from there on."""
    info = model.info.with_size((896, 608))
    prompt = info.family.prompt(model.text_tokenizer, TEXTS, "", info)
    image = [IDS["<racm3:break>"], IDS["<reserved08819>"], IDS["<reserved08828>"]]
    for row, text in zip(unpadded(prompt), TEXTS, strict=True):
        assert row[0] == IDS["<s>"] and row[-3:] == image and row[-4] == IDS["<reserved08706>"]
        said = model.text_tokenizer.ids(f"Generate an image of 896x608 according to the following prompt:\n{text}")
        assert row[1:-4] == said and len(said) > 60
    assert unpadded(prompt.negative) == [image, image]
    assert (prompt.grid.rows, prompt.grid.cols, prompt.grid.eol) == (38, 56, IDS["<reserved08799>"] - IDS["IMGIMGAZ"])
    away = info.family.prompt(model.text_tokenizer, TEXTS, "blurry", info).negative
    assert unpadded(away)[0][-4:] == [IDS["<reserved08706>"], *image] and len(unpadded(away)[0]) > 60


@torch.inference_mode()
def test_logits_at_prefill_and_every_step(model: ImageModel, weights: dict[str, Tensor]) -> None:
    """Full budget, both guidance rows of two prompts of unequal length, teacher-forced; each row alone over there."""
    prompt, network = small(model), theirs(weights)
    decoder, first = model.decoder, IDS["IMGIMGAZ"]
    rows = decoder.with_unconditional(prompt)
    grid = prompt.grid.after(rows.length)
    tokens = random_tokens(CODES, grid)
    ours = stepped(decoder, rows, grid, tokens)
    assert torch.allclose(ours, decoder(rows, tokens[:, :-1])[:, rows.length - 1 :], atol=TOLERANCE), (
        "one uncached pass"
    )
    for row, (text, drawn) in enumerate(zip(unpadded(rows), tokens.tolist(), strict=True)):
        ids = torch.tensor([text + [first + token for token in drawn[:-1]]])
        expected = network(input_ids=ids).logits[0, len(text) - 1 :, first : first + CODES]
        assert float(expected.std()) > 0.5
        assert float((ours[row] - expected).abs().max()) < TOLERANCE


@torch.inference_mode()
def test_a_greedy_image_with_guidance(model: ImageModel, weights: dict[str, Tensor]) -> None:
    """The whole loop against the published one in plain words: two forward passes a token, line ends forced."""
    prompt, network = small(model), theirs(weights)
    first, grid, scale = IDS["IMGIMGAZ"], prompt.grid, 3.0
    lines = list(generate(model.decoder, prompt, CachePlan("full"), SamplePlan(guidance=scale, temperature=0)))
    ours = torch.stack([line.tokens for line in lines], 1)
    for image, text in enumerate(unpadded(prompt)):
        drawn: list[int] = []
        while len(drawn) < grid.tokens:
            if len(drawn) % grid.stride == grid.cols:
                drawn.append(first + grid.eol)
                continue
            with_text, without = (
                network(input_ids=torch.tensor([start + drawn])).logits[0, -1, first : first + CODES]
                for start in (text, text[-3:])
            )
            drawn.append(first + int((without + scale * (with_text - without)).argmax()))
        codes = torch.tensor(drawn).view(grid.rows, grid.stride)
        assert (codes[:, -1] == IDS["<reserved08799>"]).all()
        assert torch.equal(codes[:, :-1] - first, ours[image])


@pytest.mark.parametrize("plan", [CachePlan("full"), CachePlan(budget=2, anchors=2, recent=1)], ids=["full", "evicts"])
def test_a_guided_pair_equals_two_runs(model: ImageModel, plan: CachePlan) -> None:
    """A conditional row and its unconditional one, left-padded beside it, give what each gives alone, unpadded.

    Alone each is an unguided run, and is made to draw what the pair drew.
    """
    prompt, sample = small(model, rows=6), SamplePlan(seed=3, guidance=2.5)
    pair = decode(model.decoder, prompt, plan, sample)
    grid = pair.cache.grid
    for row, start in enumerate([*unpadded(prompt), *unpadded(prompt.negative)]):
        drawn, seen = pair.tokens[row % 2], []

        def edit(n: int, logits: Tensor, drawn: Tensor = drawn, seen: list[Tensor] = seen) -> Tensor:
            seen.append(logits.clone())
            return F.one_hot(drawn[divmod(n, grid.stride)], CODES)[None].float()

        alone = replace(token_prompt([start]), grid=prompt.grid)
        run = decode(model.decoder, alone, plan, SamplePlan(guidance=1, temperature=0), edit)
        assert torch.equal(run.tokens[0], drawn)
        both = [logits[row] for logits in pair.logits if not logits.isnan().any()]
        assert len(both) == len(seen) == grid.rows * grid.cols
        torch.testing.assert_close(torch.cat(seen), torch.stack(both), atol=TOLERANCE, rtol=1e-4)
        # Logits only show how far tokens are apart. Keys show where each stands: the first of a row at position 0.
        padded, plain = (r.cache.keys.data[..., r.prompt.length :, :] for r in (pair, run))
        torch.testing.assert_close(plain[:, 0], padded[:, row], atol=TOLERANCE, rtol=1e-4)


@torch.inference_mode()
def test_norms_kept_once_a_head(tmp_path: Path, model: ImageModel) -> None:
    """transformers' layout, [heads, 128], gives the model that the published layout, [1, 128], gives."""
    other = load(tmp_path, official.decoder(IDS, heads=HEADS, dim=DIM, norm_rows=HEADS))
    for (name, ours), again in zip(
        model.decoder.state_dict().items(), other.decoder.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, again), name


# -- Anole -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_anole_in_metas_layout(tmp_path: Path, model: ImageModel, weights: dict[str, Tensor]) -> None:
    """consolidated.pth, whose heads RoPE turns pair by pair: the model that transformers' layout gives.

    The other road is one layer's scores, computed as Meta does from the file's own numbers.
    """
    file = tmp_path / "models" / "7b" / "consolidated.pth"
    file.parent.mkdir(parents=True)
    (tmp_path / "tokenizer").mkdir()
    loose = official.meta(weights, HEADS)
    torch.save(loose, file)
    torch.save({"state_dict": upstream.vq_weights((16,) * 5)}, tmp_path / "tokenizer" / "vqgan.ckpt")
    official.tokenizer(tmp_path / "tokenizer" / "text_tokenizer.json", IDS)
    with pytest.raises(UserError, match=r"consolidated.pth: .* ends with 8803 but it has 398 tokens"):
        load_model(ModelFiles(file, tmp_path / "tokenizer" / "vqgan.ckpt"))  # a file says no vocabulary: the published
    info = model.info
    again = Lumina(info.config, info.grid)
    load_into(again, read_weights(file), torch.float32, lambda key: info.family.target(key, info.config))
    for (name, ours), theirs in zip(again.state_dict().items(), model.decoder.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name

    x = torch.randn(1, 7, HEADS * DIM, generator=torch.Generator().manual_seed(2))
    rotate = torch.polar(torch.ones(()), torch.arange(7)[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2) / DIM))
    q, k = (
        turned(
            F.layer_norm((x @ loose[f"layers.0.attention.w{part}.weight"].T).unflatten(-1, (HEADS, DIM)), (DIM,),
                         *(loose[f"layers.0.attention.{part}_normalization.{kind}"] for kind in ("weight", "bias")))
            .transpose(1, 2), rotate)
        for part in "qk"
    )  # fmt: skip
    table = rope_1d(torch.arange(7), DIM, 10000.0)
    seen: list[Tensor] = []
    again.layers[0].attention(
        x, lambda t: rotate_halves(t, table), lambda q, k, v: seen.extend((q @ k.transpose(-1, -2), v)) or v
    )
    torch.testing.assert_close(seen[0], q @ k.transpose(-1, -2), atol=1e-3, rtol=1e-4)


def turned(x: Tensor, by: Tensor) -> Tensor:
    """Meta's own rotation: neighbouring numbers of ... T D are one complex number."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * by).flatten(-2)


def test_anoles_prompt(model: ImageModel) -> None:
    """One size, no line ends; unconditional rows hold the begin of the text and of the image."""
    info = replace(model.info, grid=Grid(32, 32), sizes=())
    prompt = info.family.prompt(model.text_tokenizer, TEXTS, "", info)
    begin, image = IDS["<s>"], IDS["<racm3:break>"]
    said = [model.text_tokenizer.ids(text) for text in TEXTS]
    assert unpadded(prompt) == [[begin, *words, IDS["<reserved08706>"], image] for words in said]
    assert unpadded(prompt.negative) == [[begin, image]] * 2 and prompt.grid is None


# -- the VQ ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    found = upstream.reference()
    assert (found["vq_digest"] == upstream.digest(upstream.vq_weights())).all(), "these are not the recorded weights"
    return found


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> VQTokenizer:
    path = tmp_path_factory.mktemp("vq") / "vqgan.ckpt"
    torch.save({"state_dict": upstream.vq_weights()}, path)
    return load_tokenizer(path)


def largest(ours: Tensor, expected: np.ndarray) -> float:
    return float((ours - torch.from_numpy(expected)).abs().max())


@pytest.mark.parametrize("shape", ["square", "wide"])
@torch.inference_mode()
def test_vq_decoder(shape: str, vq: VQTokenizer, recorded: dict[str, np.ndarray]) -> None:
    ours = vq.decode(torch.from_numpy(recorded[f"vq_codes_{shape}"]))
    assert largest(ours, recorded[f"vq_decoded_{shape}"]) < TOLERANCE


@torch.inference_mode()
def test_vq_encoder(vq: VQTokenizer, recorded: dict[str, np.ndarray]) -> None:
    picture = torch.from_numpy(recorded["vq_picture"])
    assert largest(vq.quant_conv(vq.encoder(picture)), recorded["vq_features"]) < TOLERANCE
    assert recorded["vq_margin"].min() > 0.01
    assert (vq.encode(picture).numpy() == recorded["vq_codes"]).all()
