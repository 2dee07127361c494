"""What Llama-like decoders add to LlamaGen's: 1-D RoPE, left padding, prompts that are computed once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from linear_core.cache.line_cache import LineCache
from linear_core.checkpoints.families.llama import layer_target
from linear_core.checkpoints.weights import load_into, read_weights
from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.models.blocks import HeadNorm, for_pairs, rope_1d, rope_2d, rotate_halves, rotate_pairs
from linear_core.models.llama import Llama
from linear_core.models.raster import Raster
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt, class_prompt, token_prompt
from tests.tiny import WORDS, decode, grouped, janus, llamagen, words

FULL = CachePlan("full")
GUIDED = SamplePlan(seed=3, guidance=2.5)


def test_turning_halves_by_hand() -> None:
    """Number i turns with number i + D/2, by position / base ** (2 i / D); twice a position is twice the angle."""
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([0, 1, 2, 7, 100])
    turned = rotate_halves(x, rope_1d(place, 8, 100.0))
    for i in range(4):
        angle = place * 100.0 ** (-2 * i / 8)
        torch.testing.assert_close(turned[..., i], x[..., i] * angle.cos() - x[..., i + 4] * angle.sin())
        torch.testing.assert_close(turned[..., i + 4], x[..., i + 4] * angle.cos() + x[..., i] * angle.sin())
    again = rotate_halves(turned, rope_1d(place, 8, 100.0))
    torch.testing.assert_close(again, rotate_halves(x, rope_1d(2 * place, 8, 100.0)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "table", [rope_2d(3, 2, 8, 100.0, torch.device("cpu")), for_pairs(rope_1d(torch.arange(6), 8, 100.0))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pairs_are_rotated_alike_by_complex_and_by_real_numbers(table, dtype, monkeypatch):
    """The CPU's way and that of other devices; a part of the heads of a projection, as layers have them."""
    x = torch.randn(2, 6, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(1, 2)[:, 1:4]
    by_complex = rotate_pairs(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(by_complex, rotate_pairs(x, table))
    assert by_complex.dtype == dtype and not torch.equal(by_complex, x)


def test_head_norm_by_hand() -> None:
    norm, x = HeadNorm(3, 8), torch.randn(2, 3, 5, 8)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    for head in range(3):
        expected = F.layer_norm(x[:, head], (8,), norm.weight[head], norm.bias[head], 1e-5)
        torch.testing.assert_close(norm(x)[:, head], expected)


def test_queries_and_keys_are_normalised_and_then_turned() -> None:
    block, x, seen = janus(4, 3, qk_norm=True).layers[0].attention, torch.randn(2, 5, 24), []

    def attend(*heads: Tensor) -> Tensor:
        seen.extend(heads)
        return heads[2]

    block(x, lambda t: 2 * t, attend)
    q, k, v = block.wqkv(x).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
    for got, expected in zip(seen, (2 * block.q_norm(q), 2 * block.k_norm(k), v), strict=True):
        torch.testing.assert_close(got, expected)


def test_heads_of_a_group_and_their_norms() -> None:
    """Four heads of queries, two of keys and values, each of its own size; an RMSNorm with one weight for all heads."""
    block, x, seen = grouped(4, 3).layers[0].attention, torch.randn(2, 5, 24), []

    def attend(*heads: Tensor) -> Tensor:
        seen.extend(heads)
        return heads[0]

    assert block(x, lambda t: 2 * t, attend).shape == x.shape
    rows = block.wqkv(x).split([32, 16, 16], -1)
    q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in rows)
    for got, plain, norm in ((seen[0], q, block.q_norm), (seen[1], k, block.k_norm)):
        root = (plain.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        torch.testing.assert_close(got, 2 * (plain * root).float() * norm.weight)
    assert torch.equal(seen[2], v) and [t.shape[1] for t in seen] == [4, 2, 2]


def test_weights_of_a_group_go_to_their_rows(tmp_path: Path) -> None:
    """The file has matrices of its own for queries, keys and values; ours is one, of which the queries take half."""
    fused = grouped(4, 3).layers[0].attention.wqkv
    rows = fused.weight.split([32, 16, 16])
    save_file(
        {f"{part}_proj.weight": x.contiguous() for part, x in zip("qkv", rows, strict=True)}, tmp_path / "a.safetensors"
    )
    with torch.device("meta"):
        again = nn.ModuleDict({"attention": nn.ModuleDict({"wqkv": nn.Linear(24, 64, bias=False)})})
    layer = nn.ModuleDict({"x": again})
    weights = read_weights(tmp_path / "a.safetensors")
    load_into(layer, weights, torch.float32, lambda key: layer_target("x", f"self_attn.{key[:6]}", "weight", group=2))
    assert torch.equal(again["attention"]["wqkv"].weight, fused.weight)
    with pytest.raises(UserError, match=r"'k_proj.weight' is \[16, 24\] where \[21, 24\] was expected"):
        load_into(layer, weights, torch.float32, lambda key: layer_target("x", f"self_attn.{key[:6]}", "weight"))


@pytest.mark.parametrize("make", [janus, partial(llamagen, rope="1d")], ids=["janus", "llamagen"])
def test_queries_turned_to_the_next_line(make: Callable[..., Raster]) -> None:
    """As if the same queries, not yet rotated, had been rotated for a token one line further down."""
    model, grid = make(6, 5), Grid(6, 5, eol=9)  # six tokens a line
    source = torch.Generator().manual_seed(1)
    queries = torch.randn(2, 4, 3, grid.stride, 8, generator=source)  # L B H C D
    place = torch.arange(20, 20 + grid.stride)
    index, pad = place + grid.prompt, torch.zeros(1, dtype=torch.int64)
    here, below = (model.rotate(queries, model.rope_table(i, pad, grid)) for i in (index, index + 3 * grid.stride))
    torch.testing.assert_close(model.rotate_ahead(grid, here, 3), below, atol=1e-5, rtol=1e-5)
    assert (here - below).abs().max() > 0.5


@pytest.mark.parametrize("make", [janus, partial(janus, qk_norm=True), grouped], ids=["janus", "norms", "grouped"])
def test_a_row_does_not_feel_its_padding(make: Callable[..., Llama]) -> None:
    """Two prompts of different length in one batch: each gives the logits that it gives alone."""
    model = make(5, 4, dtype=torch.float64)
    batch = decode(model, words([7, 3]), CachePlan(budget=2, anchors=1, recent=1), GUIDED)
    for i, length in enumerate((7, 3)):
        alone = decode(model, words([length]), CachePlan(budget=2, anchors=1, recent=1), SamplePlan(3 + i, 2.5))
        assert torch.equal(alone.tokens[0], batch.tokens[i])
        for a, b in zip(alone.logits, batch.logits, strict=True):
            torch.testing.assert_close(a, b[[i, 2 + i]], atol=1e-6, rtol=1e-6, equal_nan=True)


def test_rows_alike_are_prefilled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two texts of one length, four pictures each: two rows with the text and one without, in place of sixteen."""
    model, seen = janus(4, 3), []
    prompt = Prompt(*(getattr(words([5, 5]), name) for name in ("tokens", "pad")), (), words([5, 5]).negative)
    prompt.tokens[1, 2] = (prompt.tokens[1, 2] - 3) % (WORDS - 4) + 4
    embed = model.embed_tokens.forward

    def watch(tokens: Tensor) -> Tensor:
        seen.append(tokens.shape)
        return embed(tokens)

    monkeypatch.setattr(model.embed_tokens, "forward", watch)
    rows = model.with_unconditional(prompt.repeat(4))
    cache = LineCache(model.cache_shape(5), rows.rows, model.grid.after(5), FULL, dtype=torch.float32, device="cpu")
    logits = model.prefill(rows, cache)
    assert rows.rows == 16 and seen == [(3, 5)]
    expected = model.forward(rows, torch.zeros(16, 0, dtype=torch.int64))[:, -1]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    keys = cache.keys.data
    assert torch.equal(keys[:, 8], keys[:, 15]) and not torch.equal(keys[:, 0], keys[:, 4])


def test_a_negative_prompt_may_be_longer_or_shorter() -> None:
    """It takes the unconditional rows' place, at its own positions: the logits are those of the two alone."""
    model, one = janus(4, 3, dtype=torch.float64), words([5])
    for length in (3, 9):
        away = words([length], seed=5)
        prompt = Prompt(one.tokens, one.pad, (), Prompt(away.tokens, away.pad))
        run = decode(model, prompt, FULL, GUIDED)
        tokens = torch.stack(run.fed, 1)[:1]
        for row, single in enumerate((one, away)):
            expected = model.forward(Prompt(single.tokens, single.pad), tokens)[:, single.length - 1 :]
            torch.testing.assert_close(torch.stack(run.logits, 1)[row], expected[0].float(), atol=1e-5, rtol=1e-5)
        assert run.cache.shape.prompt == max(5, length)


def test_prompts_of_other_models_are_refused() -> None:
    model = janus(4, 3)
    for prompt, word in (
        (class_prompt([1]), "Text Prompt"),
        (Prompt(torch.zeros(1, 4, 6), torch.zeros(1, dtype=torch.int64)), "connect this model"),
        (token_prompt([[1, WORDS, 2]]), "own tokenizer"),
        (token_prompt([[1, 2, 3]]), "made for another model"),
    ):
        with pytest.raises(UserError, match=word):
            decode(model, prompt, FULL, GUIDED)
