"""Ours equals transformers' Emu3 and, for Emu3.5's kind, its Qwen3, on small random weights as they are published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from linear_core.checkpoints.library import ImageModel, ModelFiles, find_tokenizer, load_model
from linear_core.loop.generate import generate
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt
from linear_core.prompts.emu import NEGATIVE, SUFFIX
from tests.models import emu_official as official
from tests.models.stepwise import random_tokens, stepped, unpadded
from tests.tokenizers import reference

pytest.importorskip("transformers")
TOLERANCE = 1e-4
FIRST, CODES, IDS = official.FIRST, official.CODES, official.ids()
TEXTS = ("a lighthouse at dusk", "fox")
KINDS = ("emu3", "emu35")
SIZES = {"emu3": {"heads": 6, "keys": 2, "dim": 8}, "emu35": {"heads": 4, "keys": 2, "dim": 16}}


@pytest.fixture(scope="module")
def weights() -> dict[str, dict[str, Tensor]]:
    return {kind: official.decoder(norms=kind == "emu35", **SIZES[kind]) for kind in KINDS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, dict[str, Tensor]]) -> dict[str, ImageModel]:
    folder = tmp_path_factory.mktemp("models")
    files = {
        "emu3": official.write_model(folder / "Emu3-Gen", weights["emu3"], official.CONFIG),
        "emu35": official.write_model(folder / "Emu3.5-Image", weights["emu35"], official.CONFIG),
    }
    for kind in ("emu3", "ibq"):
        official.write_tokenizer(folder, kind)
    return {kind: load_model(ModelFiles(path, find_tokenizer(path))) for kind, path in files.items()}


def theirs(kind: str, weights: dict[str, Tensor]) -> nn.Module:
    """transformers' network with these weights. Only the arguments for RoPE differ between its versions."""
    import transformers
    from transformers import Emu3Config, Emu3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

    old = int(transformers.__version__.split(".")[0]) < 5
    rope = {"rope_theta": 1e6} if old else {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    sizes = {
        "vocab_size": FIRST + CODES, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": SIZES[kind]["heads"], "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, **rope,
    }  # fmt: skip
    if kind == "emu35":
        network = Qwen3ForCausalLM(Qwen3Config(head_dim=16, attention_bias=False, **sizes)).eval()
        network.load_state_dict(weights)
        return network
    vq = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "hidden_size": 32, "codebook_size": 8}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = Emu3Config(text_config=sizes | special, vq_config=vq, vocabulary_map={**IDS, "<image>": 1})
    network = Emu3ForConditionalGeneration(config).eval()
    loaded = official.transformers_layout(weights, "model.text_model.")
    left, unknown = network.load_state_dict(loaded, strict=False)
    assert unknown == [] and all(".vqmodel." in name for name in left)
    return network


def small(model: ImageModel, rows: int = 5, cols: int = 4) -> Prompt:
    """Prompts of unequal length as the model makes them, for a grid far below the published ones."""
    prompt = model.prompt(TEXTS)
    return replace(prompt, grid=replace(prompt.grid, rows=rows, cols=cols))


def said(text: str) -> list[int]:
    return list(text.encode())


def test_emu3s_prompt(models: dict[str, ImageModel]) -> None:
    """Begin, the text with what its authors append, the size as rows*columns; away from their negative prompt."""
    model = models["emu3"]
    info = model.info.with_size((960, 544))
    prompt = info.family.prompt(model.text_tokenizer, TEXTS, "", info)
    image = [IDS["<|image start|>"], *said("68*120"), IDS["<|image token|>"]]
    begin = IDS["<|extra_203|>"]
    assert unpadded(prompt) == [[begin, *said(text + SUFFIX), *image] for text in TEXTS]
    assert unpadded(prompt.negative) == [[begin, *said(NEGATIVE), *image]] * 2
    assert (prompt.grid.rows, prompt.grid.cols, prompt.grid.eol) == (68, 120, IDS["<|extra_200|>"] - FIRST)
    away = info.family.prompt(model.text_tokenizer, [TEXTS[0] + SUFFIX], "blurry", info)
    assert unpadded(away)[0] == unpadded(prompt)[0], "what is there already is not appended"
    assert unpadded(away.negative) == [[begin, *said("blurry"), *image]]


@pytest.mark.parametrize("u0", [False, True])
def test_emu35s_prompt(u0: bool, models: dict[str, ImageModel], tmp_path: Path, weights: dict[str, dict]) -> None:
    """A user's turn and the begin of an answer, then the image; U0 names the task in rows without a text too."""
    model = models["emu35"]
    if u0:
        config = official.CONFIG | {"model_type": "UNIS"}
        folder = official.write_model(tmp_path / "Xiaomi-Robotics-U0-4B", weights["emu35"], config, "unis")
        model = load_model(ModelFiles(folder, model.files.tokenizer))
        assert model.text_tokenizer.path.name == "unis.tiktoken"
        assert (model.info.sizes, model.info.defaults.guidance) == (((1024, 1024),), 3.0)
    prompt = model.prompt(["fox"])
    image = [IDS["<|image start|>"], *said("64*64"), IDS["<|image token|>"]]
    task = " for t2i task" if u0 else ""
    rows = [
        f"You are a helpful assistant{task}. USER:  ASSISTANT: ",
        "You are a helpful assistant for t2i task. USER: ",
    ]
    begin, end = IDS["<|extra_203|>"], IDS["<|extra_100|>"]
    assert unpadded(prompt.negative) == [[begin, *said(rows[0]), end, *image]]
    assert unpadded(prompt) == [[begin, *said(rows[1] + "fox ASSISTANT: "), end, *image]]
    assert unpadded(model.prompt(["fox"], "blurry").negative)[0] == [
        begin, *said(rows[1] + "blurry ASSISTANT: "), end, *image
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_at_prefill_and_every_step(
    kind: str, models: dict[str, ImageModel], weights: dict[str, dict[str, Tensor]]
) -> None:
    """Full budget, both guidance rows of two prompts of unequal length, teacher-forced; each row alone over there."""
    decoder, network = models[kind].decoder, theirs(kind, weights[kind])
    prompt = small(models[kind])
    rows = decoder.with_unconditional(prompt)
    grid = prompt.grid.after(rows.length)
    tokens = random_tokens(CODES, grid)
    ours = stepped(decoder, rows, grid, tokens)
    for row, (text, drawn) in enumerate(zip(unpadded(rows), tokens.tolist(), strict=True)):
        ids = torch.tensor([text + [FIRST + token for token in drawn[:-1]]])
        expected = network(input_ids=ids).logits[0, len(text) - 1 :, FIRST:]
        assert float(expected.std()) > 0.5
        assert float((ours[row] - expected).abs().max()) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_a_greedy_image_with_guidance(
    kind: str, models: dict[str, ImageModel], weights: dict[str, dict[str, Tensor]]
) -> None:
    """The whole loop against the published one: guidance on log-softmax over the whole vocabulary, line ends forced."""
    prompt, network = small(models[kind]), theirs(kind, weights[kind])
    grid, scale = prompt.grid, 3.0
    lines = list(generate(models[kind].decoder, prompt, CachePlan("full"), SamplePlan(guidance=scale, temperature=0)))
    ours = torch.stack([line.tokens for line in lines], 1)
    for image, starts in enumerate(zip(unpadded(prompt), unpadded(prompt.negative), strict=True)):
        drawn: list[int] = []
        while len(drawn) < grid.tokens:
            if len(drawn) % grid.stride == grid.cols:
                drawn.append(IDS["<|extra_200|>"])
                continue
            with_text, without = (
                network(input_ids=torch.tensor([start + drawn])).logits[0, -1].log_softmax(-1) for start in starts
            )
            drawn.append(FIRST + int((without + scale * (with_text - without))[FIRST:].argmax()))
        codes = torch.tensor(drawn).view(grid.rows, grid.stride)[:, :-1] - FIRST
        assert torch.equal(codes, ours[image])


@pytest.mark.parametrize("prefix", ["text_model.model.", "model.text_model."])
@torch.inference_mode()
def test_transformers_layouts(
    prefix: str, models: dict[str, ImageModel], weights: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """As published and as saved today: the decoder and the tokenizer of BAAI's layout, from one folder."""
    inside = "model.vqmodel." if prefix.startswith("model.") else "vqmodel."
    vq = {inside + key: tensor for key, tensor in reference.weights("emu3", official.WIDTHS["emu3"]).items()}
    config = {
        "model_type": "emu3", "vocabulary_map": IDS,
        "text_config": {key: official.CONFIG[key] for key in ("num_attention_heads", "rms_norm_eps", "rope_theta")},
    }  # fmt: skip
    files = official.transformers_layout(weights["emu3"], prefix) | vq
    folder = official.write_model(tmp_path / "Emu3-Gen-hf", files, config)
    assert find_tokenizer(folder) == folder
    again = load_model(ModelFiles(folder, folder))
    for part in ("decoder", "tokenizer"):
        ours, other = (getattr(model, part).state_dict() for model in (models["emu3"], again))
        assert ours.keys() == other.keys() and all(torch.equal(ours[key], other[key]) for key in ours)
    assert again.info.config == models["emu3"].info.config and again.info.sizes == models["emu3"].info.sizes
    assert again.prompt(TEXTS).tokens.equal(models["emu3"].prompt(TEXTS).tokens)


def test_rope_and_eps_come_from_the_config(
    weights: dict[str, dict[str, Tensor]], models: dict[str, ImageModel], tmp_path: Path
) -> None:
    """No shape tells them; transformers 5 writes the base of RoPE into a section of its own."""
    config = {key: value for key, value in official.CONFIG.items() if key != "rope_theta"}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-6}
    folder = official.write_model(tmp_path / "Emu3.5", weights["emu35"], config)
    info = load_model(ModelFiles(folder, models["emu35"].files.tokenizer)).info
    assert (info.config.rope_base, info.config.eps, info.defaults.guidance) == (5e5, 1e-6, 2.0)
    assert json.loads((folder / "config.json").read_text()) == config
