"""Ours equals the published Infinity on small random weights: recorded numbers, see infinity_reference."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from linear_core.checkpoints.library import ImageModel, ModelFiles, load_model
from linear_core.grid import Grid
from linear_core.loop.scales import generate_scales, scale_cache, scale_policy, scale_scores
from linear_core.models.infinity import PYRAMIDS, Infinity, InfinityConfig, read_config, spread
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt
from linear_core.prompts.t5 import text_prompt
from linear_core.pyramid import Pyramid
from linear_core.tokenizers import network
from tests.drawn import digest
from tests.models import infinity_reference as upstream

TOLERANCE = 1e-4
KINDS = ("upright", "lying")
SAMPLE = SamplePlan(guidance=upstream.CFG, temperature=upstream.TAU, top_k=900, top_p=upstream.TOP_P)
EVERY = slice(None, None, upstream.EVERY)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return upstream.reference()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the official layouts: a pickle of tensors with attributes as the 2B, shards as the 8B."""
    folder = tmp_path_factory.mktemp("infinity")
    carrying = upstream.weights("upright")
    for tensor in carrying.values():
        tensor.sharded = False  # makes torch.save name torch._tensor._rebuild_from_type_v2
    torch.save(carrying, folder / "upright_256x256.pth")
    shards = folder / "lying_256x256_weights"
    shards.mkdir()
    lying = upstream.weights("lying")
    names = sorted(lying)
    index = {}
    for n, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{n:05d}-of-00002.safetensors"
        save_file({name: lying[name] for name in part}, shards / file)
        index |= dict.fromkeys(part, file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for kind in KINDS:
        vae = {"vae": upstream.vae_weights(kind), "image_disc": {"weight": torch.zeros(3)}}
        torch.save(vae, folder / f"infinity_vae_d{upstream.bits(kind)}.pth")
    return folder


@pytest.fixture(autouse=True)
def published_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files are wide enough that all have 32 groups."""
    monkeypatch.setattr(network, "groups", lambda channels: 32)


def load(folder: Path, kind: str) -> ImageModel:
    decoder = folder / {"upright": "upright_256x256.pth", "lying": "lying_256x256_weights"}[kind]
    return load_model(ModelFiles(decoder, folder / f"infinity_vae_d{upstream.bits(kind)}.pth"))


def prompt(kind: str) -> Prompt:
    rows, cols = upstream.SIDES[kind][-1]
    found = text_prompt(upstream.features(), ("a", "b"), upstream.SLOTS)
    away = text_prompt(upstream.features(upstream.NEGATIVE_LENGTHS), length=upstream.SLOTS)
    return Prompt(found.tokens, found.pad, found.names, away if kind == "lying" else None, Grid(rows, cols))


def difference(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest number."""
    theirs = torch.from_numpy(theirs)
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_weights_are_those_that_were_recorded(recorded: dict[str, np.ndarray]) -> None:
    for kind in KINDS:
        assert (recorded[f"{kind}_digest"] == digest(upstream.weights(kind))).all(), kind
        assert (recorded[f"{kind}_vae_digest"] == digest(upstream.vae_weights(kind))).all(), kind


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_of_every_scale(kind: str, official: Path, recorded: dict[str, np.ndarray]) -> None:
    """Through the full cache, both guidance rows, with the recorded tokens; then in one pass without a cache."""
    model, asked = load(official, kind), prompt(kind)
    decoder, quantizer = model.decoder.with_grid(asked.grid), model.tokenizer.quantize
    pyramid = decoder.pyramid
    assert pyramid.sides == upstream.SIDES[kind]
    rows = decoder.with_unconditional(asked)
    state, plan = decoder.begin(rows), CachePlan("full")
    cache = scale_cache(decoder, 4, plan, scale_policy(plan, pyramid))
    canvas, tokens = quantizer.empty(2, pyramid), upstream.tokens(kind)
    logits, guided, inputs = [], [], []
    for stage in range(pyramid.stages):
        cache.begin(stage)
        below = quantizer.shrink(pyramid, stage, canvas) if stage else None
        logits.append(decoder.stage(stage, below, state, cache))
        guided.append(scale_scores(decoder, logits[-1], stage, 2, SAMPLE))
        inputs += [] if below is None else [below]
        now = tokens[:, pyramid.index(stage) : pyramid.index(stage + 1)].unflatten(1, pyramid.sides[stage])
        canvas = quantizer.add(pyramid, stage, now, canvas)
    assert difference(torch.cat(logits, 1)[:, EVERY], recorded[f"{kind}_logits"]) < TOLERANCE
    narrowed = torch.cat(guided, 1)[:, EVERY] / upstream.TAU
    kept = recorded[f"{kind}_kept"]
    assert ((narrowed > float("-inf")).numpy() == kept).all()
    theirs = np.where(kept, recorded[f"{kind}_guided"], 0)
    assert difference(narrowed.masked_fill(narrowed == float("-inf"), 0), theirs) < TOLERANCE
    assert difference(torch.cat(inputs, 1)[:, EVERY], recorded[f"{kind}_inputs"]) < 1e-6
    assert difference(canvas, recorded[f"{kind}_canvas"]) < 1e-6
    repeated = [below.repeat(2, 1, 1) for below in inputs]
    assert difference(decoder(rows, repeated)[:, EVERY], recorded[f"{kind}_logits"]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_tokenizer(kind: str, official: Path, recorded: dict[str, np.ndarray]) -> None:
    """Features, bits of all scales, and the picture of the canvas."""
    tokenizer, pyramid = load(official, kind).tokenizer, Pyramid(upstream.SIDES[kind])
    pictures = upstream.pictures(kind)
    assert difference(tokenizer.features(pictures), recorded[f"{kind}_features"]) < TOLERANCE
    tokens = torch.cat([scale.flatten(1) for scale in tokenizer.encode(pictures, pyramid)], 1)
    place = torch.arange(upstream.bits(kind) - 1, -1, -1)
    assert ((tokens[..., None] >> place & 1).bool().numpy() == recorded[f"{kind}_bits"]).all()
    picture = tokenizer.decode(torch.from_numpy(recorded[f"{kind}_canvas"])).clamp(-1, 1)
    assert difference(picture[..., ::8, ::8], recorded[f"{kind}_picture"]) < TOLERANCE


def test_the_loop_ends_with_the_published_canvas(
    official: Path, recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the recorded bits, the canvas after all scales is upstream's, and so are the tokens handed on."""
    model, tokens = load(official, "lying"), upstream.tokens("lying")
    place, pyramid = iter(range(7)), Pyramid(upstream.SIDES["lying"])

    def drawn(logits: Tensor, race: Tensor, temperature: float) -> Tensor:
        stage = next(place)
        numbers = tokens[:, pyramid.index(stage) : pyramid.index(stage + 1)]
        assert logits.shape == race.shape == (*numbers.shape, upstream.bits("lying"), 2)
        return numbers[..., None] >> torch.arange(upstream.bits("lying") - 1, -1, -1) & 1

    monkeypatch.setattr("linear_core.loop.scales.sample_codes", drawn)
    quantizer = model.tokenizer.quantize
    stages = list(generate_scales(model.decoder, quantizer, prompt("lying"), CachePlan("full"), SAMPLE))
    assert difference(stages[-1].canvas, recorded["lying_canvas"]) < 1e-6
    assert torch.equal(torch.cat([stage.tokens for stage in stages], 1), tokens)


def test_every_shape_and_its_positions(recorded: dict[str, np.ndarray]) -> None:
    """All fifteen tables, upright and lying, and where rotary positions put their rows and columns."""
    theirs = [tuple(map(tuple, sides)) for sides in recorded["pyramids"].tolist()]
    ours = {pyramid.sides for pyramid in PYRAMIDS["1M"]}
    assert ours == set(theirs) and len(PYRAMIDS["1M"]) == 15
    for name, count in (("0.06M", 7), ("0.25M", 10)):
        assert {pyramid.sides for pyramid in PYRAMIDS[name]} == {sides[:count] for sides in theirs}
    places = [spread(side[axis], sides[-1][axis]) for axis in range(2) for sides in theirs for side in sides]
    assert (torch.cat(places).numpy() == recorded["positions"]).all()


@pytest.mark.parametrize(
    ("layers", "width", "heads", "bits", "millions"),
    [(12, 768, 8, 16, 125.1), (32, 2048, 16, 32, 2204.6), (40, 3584, 28, 56, 8375.8)],
)
def test_published_sizes_follow_from_the_shapes(
    layers: int, width: int, heads: int, bits: int, millions: float
) -> None:
    """Every published file's parameters, counted from its width and depth, are those of its size on the hub."""
    config = InfinityConfig(layers, width, heads, 4 * width, bits, 2048, 512, 16, 15)
    with torch.device("meta"):
        model = Infinity(config, PYRAMIDS["1M"][7])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert read_config(shapes) == config
    assert round(sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6, 1) == millions
