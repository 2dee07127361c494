"""Grouped-query attention: query heads that share a key head see what they would see with a copy of it each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.cache import attention
from linear_core.cache.attention import attend
from linear_core.cache.line_cache import LineCache
from linear_core.cache.view import View
from linear_core.grid import Grid
from linear_core.loop.memory import run_bytes
from linear_core.models.lumina import Lumina
from linear_core.plan import CachePlan, CacheShape, SamplePlan
from linear_core.policies import POLICIES
from linear_core.policies.h2o import h2o
from tests import tiny

ROWS, KEYS, GROUP, SLOTS, DIM = 2, 3, 2, 11, 4


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "products"), [(1, True), (1, False), (3, True)])
@pytest.mark.parametrize("each", [False, True], ids=["one bias", "a bias for each token"])
def test_attention_is_that_of_copies(tokens: int, products: bool, each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "PRODUCTS", products)  # or PyTorch's kernel, whatever the CPU
    q, k, v = noise(ROWS, KEYS * GROUP, tokens, DIM), *(noise(ROWS, KEYS, SLOTS, DIM, seed=n) for n in (1, 2))
    bias = noise(ROWS, KEYS, tokens, SLOTS, seed=3) if each else noise(ROWS, KEYS, SLOTS, seed=3)
    bias[..., 4] = float("-inf")
    copies = [x.repeat_interleave(GROUP, 1) for x in (k, v, bias if each else bias[:, :, None])]
    expected = F.scaled_dot_product_attention(q, *copies[:2], attn_mask=copies[2])
    torch.testing.assert_close(attend(q, k, v, bias), expected)


def views() -> tuple[View, View]:
    """A view of grouped heads, and the same with a copy of each key head for each of its query heads."""
    grid = Grid(4, 3, prompt=2)
    index = torch.arange(SLOTS, dtype=torch.int32).expand(1, ROWS, KEYS, -1)
    bias = torch.zeros(1, ROWS, KEYS, SLOTS, dtype=torch.float64)
    kept = [*(noise(1, ROWS, KEYS, SLOTS, DIM, seed=n) for n in (1, 2)), bias, index]
    queries = 3 * noise(1, ROWS, KEYS * GROUP, grid.stride, DIM)
    rest = queries, None, grid, 2, 0, lambda x, lines, columns: x * (1 + lines / 8)
    return View(*kept, *rest), View(*(x.repeat_interleave(GROUP, 2) for x in kept), *rest)


def test_policies_see_what_the_group_asks() -> None:
    """Attention and look-ahead of a key head are the means over its query heads, of which no two are alike."""
    grouped, copies = views()
    for seen in (
        lambda view: view.attention(lambda p: p.mean(2)),
        lambda view: view.attention(lambda p: p.mean(2), last=2, image_only=True),
        lambda view: view.look_ahead().mass,
        lambda view: view.look_ahead().attention_to(view.keys / 2).mean(-1),
        lambda view: POLICIES["line"].score(view),
        lambda view: POLICIES["next"].score(view),
    ):
        each = seen(copies).unflatten(2, (KEYS, GROUP))
        torch.testing.assert_close(seen(grouped), each.mean(3))
        assert (each[:, :, :, 0] - each[:, :, :, 1]).abs().amax(-1).min() > 0.02


def test_mass_is_what_the_group_gives() -> None:
    """Added up line by line, from the queries that the cache was given: h2o's score, a head's share of it at a time."""
    decoder, prompt = tiny.grouped(5, 4), tiny.lumina_words([6, 4])
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def score(view: View) -> Tensor:
        seen.setdefault(view.row, (view.mass.clone(), view.queries))
        return h2o(view)

    with tiny.policy("watch", replace(POLICIES["h2o"], score=score)):
        tiny.decode(decoder, prompt, CachePlan("watch", 2, 2, 1), SamplePlan(seed=1, guidance=2.0))
    mass, queries = seen[2]
    assert queries.shape == (2, 4, 4, 5, 8) and mass.shape[:3] == (2, 4, 2)
    # Every token gives 1 in all to what it sees: three lines of five tokens, whatever has been evicted since.
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 4, 2), 15.0))


def ungrouped(model: Lumina) -> Lumina:
    """The same model with a key head of its own for each query head."""
    config = replace(model.config, key_heads=model.config.heads)
    twin = Lumina(config, model.grid).requires_grad_(False).eval()
    weights = model.state_dict()
    for name, tensor in weights.items():
        if name.endswith("wqkv.weight"):
            q, *kv = tensor.unflatten(0, (-1, 8)).split([4, 2, 2])
            weights[name] = torch.cat([q, *(x.repeat_interleave(2, 0) for x in kv)]).flatten(0, 1)
    twin.load_state_dict(weights)
    return twin.to(model.dtype)


def test_a_picture_is_that_of_copies() -> None:
    """With everything kept: codes and logits, with padding, guidance and line ends; the cache takes half."""
    model = tiny.grouped(5, 4, dtype=torch.float64)
    both = [
        tiny.decode(one, tiny.lumina_words([6, 4]), CachePlan("full"), SamplePlan(seed=1, guidance=2.0))
        for one in (model, ungrouped(model))
    ]
    ours, copies = (torch.stack(run.logits).nan_to_num() for run in both)
    torch.testing.assert_close(ours, copies, atol=1e-6, rtol=1e-6)
    assert torch.equal(both[0].tokens, both[1].tokens)
    assert 2 * both[0].cache.nbytes == both[1].cache.nbytes


def test_memory() -> None:
    """The cache does not feel the query heads; what a line's end takes grows with them."""
    grid, plan, plain = Grid(20, 20, prompt=8), CachePlan("line", 4), CacheShape(4, 2, 16, 8, 2)
    shape = replace(plain, group=3)
    assert shape.bytes(grid, plan, 2) == plain.bytes(grid, plan, 2)
    cache = LineCache(shape, 2, grid, plan, dtype=torch.bfloat16, device="meta", reads=frozenset({"queries"}))
    assert cache.queries is not None and cache.queries.nbytes == 3 * shape.line_bytes(grid, 2) // 2
    # Of two more query heads a key, in four layers at once.
    queries, scores = plain.line_bytes(grid, 2), 4 * 2 * 2 * 2 * 20 * (8 + 5 * 20) * 4 * 2
    assert run_bytes(shape, grid, plan, 2, 10) == run_bytes(plain, grid, plan, 2, 10) + queries + scores
