"""LineCache by itself, driven by hand: what is written is read back, where it was meant to go, while it is held."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from linear_core.cache import attention
from linear_core.cache.attention import attend, attention_weights
from linear_core.cache.line_cache import LineCache
from linear_core.cache.view import View
from linear_core.grid import Grid
from linear_core.plan import RELEASES, CachePlan, CacheShape, SamplePlan
from linear_core.policies import POLICIES, Policy
from tests.tiny import Toy, decode, policy

LAYERS, ROWS, HEADS, DIM, PROMPT = 2, 3, 2, 4, 2


def make(grid: Grid, plan: CachePlan, *reads: str, dtype: torch.dtype = torch.float32) -> LineCache:
    shape = CacheShape(LAYERS, HEADS, DIM, PROMPT, dtype.itemsize)
    return LineCache(shape, ROWS, grid.after(PROMPT), plan, dtype=dtype, device="cpu", reads=frozenset(reads))


def content(number: int, layer: int) -> Tensor:
    """What token `number` writes in a layer: B H 1 D, all different."""
    return 1000.0 * number + 100.0 * layer + torch.arange(ROWS * HEADS * DIM).view(ROWS, HEADS, 1, DIM)


def write_token(cache: LineCache, number: int) -> None:
    """Image token `number`, as a decoder's step does it. Values are minus the keys, queries the keys plus one half."""
    column = torch.tensor([number % cache.grid.stride])
    cache.advance(torch.tensor([cache.grid.prompt + number]), column)
    for layer in range(LAYERS):
        k = content(number, layer).to(cache.bias.dtype)
        cache.write(layer, column, k, -k, k + 0.5)


def write_line(cache: LineCache, row: int) -> None:
    for number in range(row * cache.grid.stride, (row + 1) * cache.grid.stride):
        write_token(cache, number)


def write_prompt(cache: LineCache, weight: list[list[float]] | None = None) -> None:
    k = torch.ones(ROWS, HEADS, PROMPT, DIM, dtype=cache.bias.dtype)
    for layer in range(LAYERS):
        cache.write_prompt(layer, k, -k, torch.tensor(weight or [[1.0] * PROMPT] * ROWS))


def held(cache: LineCache, layer: int = 0, row: int = 0, head: int = 0) -> list[int]:
    """Indices of one head in slot order."""
    return cache.index[layer, row, head].tolist()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("grid", "plan"),
    [
        (Grid(6, 5), CachePlan(budget=2)),
        (Grid(6, 5, eol=1), CachePlan(budget=2)),
        (Grid(6, 5), CachePlan(budget=9)),
        (Grid(6, 5), CachePlan("full", budget=2)),
    ],
)
def test_memory_is_what_the_plan_said(grid, plan, dtype):
    """Keys and values take `CacheShape.bytes` exactly, from before the first token to after the last."""
    cache = make(grid, plan, dtype=dtype)
    expected = cache.shape.bytes(grid.after(PROMPT), plan, ROWS)
    storage = cache.keys.data.untyped_storage().nbytes() + cache.values.data.untyped_storage().nbytes()
    assert cache.nbytes == storage == expected
    write_prompt(cache)
    cache.extend()
    write_line(cache, 0)
    assert cache.nbytes == expected


@pytest.mark.parametrize(
    ("reads", "queries", "mass"), [((), False, False), (("queries",), True, False), (("mass",), True, True)]
)
def test_nobody_pays_for_what_is_not_read(reads, queries, mass):
    """The query and mass buffers exist where the policy reads them; mass is made of queries."""
    cache = make(Grid(6, 5), CachePlan(budget=2), *reads)
    assert (cache.queries is not None, cache.mass is not None) == (queries, mass)


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_nothing_is_there_before_the_first_write():
    """Every slot of a new cache is empty: index -1 and bias -inf."""
    cache = make(Grid(3, 4), CachePlan(budget=2))
    assert (cache.index == -1).all() and (cache.bias == -math.inf).all()
    assert cache.extent == PROMPT and not cache.full


def test_prompt_weights_are_biases():
    """Weight n is bias ln n; weight 0, which is padding, is nothing there. Row by row, in every layer and head."""
    cache = make(Grid(3, 4), CachePlan(budget=2))
    write_prompt(cache, [[0.0, 1.0], [1.0, 1.0], [7.0, 0.0]])
    for layer in range(LAYERS):
        for head in range(HEADS):
            assert cache.index[layer, :, head, :PROMPT].tolist() == [[-1, 1], [0, 1], [0, -1]]
            expected = torch.tensor([[-math.inf, 0.0], [0.0, 0.0], [math.log(7), -math.inf]])
            torch.testing.assert_close(cache.bias[layer, :, head, :PROMPT], expected)
    assert (cache.index[..., PROMPT:] == -1).all()


def test_a_token_goes_to_its_slot_and_nowhere_else():
    """`read` gives back keys and values of every token written, at the index the loop named; the rest is untouched."""
    cache = make(Grid(4, 3), CachePlan(budget=3), "queries")
    write_prompt(cache)
    for row in range(2):
        cache.extend()
        for number in range(row * 3, row * 3 + 3):
            write_token(cache, number)
            seen = PROMPT + number + 1
            assert held(cache)[: seen + 1] == [*range(seen), -1]
    for layer in range(LAYERS):
        k, v, bias = cache.read(layer)
        assert k.shape[2] == v.shape[2] == bias.shape[2] == PROMPT + 6
        expected = torch.cat([content(number, layer) for number in range(6)], 2)
        assert torch.equal(k[:, :, PROMPT:], expected) and torch.equal(v[:, :, PROMPT:], -expected)
        assert (bias == 0).all()
        assert torch.equal(cache.queries[layer], expected[:, :, 3:] + 0.5), "the last line's queries"


def test_read_shows_only_what_has_been_opened():
    """The extent grows a line at a time while there is room, and is the whole cache from then on."""
    cache = make(Grid(6, 3), CachePlan(budget=1))
    sizes = []
    for _ in range(2):
        cache.extend()
        sizes.append((cache.read(0)[0].shape[2], cache.full))
    assert sizes == [(PROMPT + 3, False), (PROMPT + 6, True)]


# -- releasing ---------------------------------------------------------------------------------------------------------


def filled(release: str) -> tuple[LineCache, Tensor]:
    """A full cache of two lines of 3, and victims that differ by layer, row and head: slots, least useful first."""
    cache = make(Grid(4, 3), CachePlan(budget=1, release=release), "mass")
    write_prompt(cache)
    for row in range(2):
        cache.extend()
        write_line(cache, row)
    order = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(12)])
    return cache, order.view(LAYERS, ROWS, HEADS, 6)[..., :3] + PROMPT


def let_go(cache: LineCache, victims: Tensor) -> None:
    """Release layer by layer, as the loop does. Queries stay as they are, however many lines ahead."""
    for layer in range(LAYERS):
        cache.release(cache.view(1, slice(layer, layer + 1), lambda queries, *_: queries), victims[layer : layer + 1])


@pytest.mark.parametrize("release", RELEASES)
def test_victims_slots_are_the_next_lines(release):
    """Column c is written over victim c of its own layer, row and head. Strict victims go at once, lazy ones then."""
    cache, victims = filled(release)
    before = cache.index.clone()
    let_go(cache, victims)
    gone = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, victims, True)
    expected = before if release == "lazy" else before.masked_fill(gone, -1)
    assert torch.equal(cache.index, expected)
    for column in range(3):
        write_token(cache, 6 + column)
        place = victims[..., column : column + 1]
        expected = expected.scatter(-1, place, PROMPT + 6 + column)
        assert torch.equal(cache.index, expected)
        assert torch.equal(cache.bias == -math.inf, expected < 0)
        for layer in range(LAYERS):
            k = cache.keys.data[layer].gather(2, place[layer][..., None].expand(-1, -1, -1, DIM))
            assert torch.equal(k, content(6 + column, layer))


def test_release_forgets_the_attention_of_victims():
    """A slot's next token starts with no attention received; what stays keeps its own."""
    cache, victims = filled("lazy")
    views = [cache.view(1, slice(layer, layer + 1)) for layer in range(LAYERS)]
    cache.mass.fill_(5.0)
    for layer, view in enumerate(views):
        cache.release(view, victims[layer : layer + 1])
    expected = torch.full_like(cache.mass, 5.0).scatter_(-1, victims, 0.0)
    assert torch.equal(cache.mass, expected)


@pytest.mark.parametrize("release", ["strict", "lazy"])
def test_mass_is_attention_received_while_held(release):
    """Through a whole run: sums of probabilities by token, kept in plain Python, for every layer, row and head.

    Each line's queries look at what is held at its end, no further than themselves. A token that left and whose slot is
    used again leaves nothing behind.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(view: View) -> Tensor:
        told, before = (view.index.clone(), view.mass.clone()), seen.get(view.row)
        seen[view.row] = told if before is None else tuple(map(torch.cat, zip(before, told, strict=True)))
        return POLICIES["h2o"].score(view)

    toy = Toy(6, 3, length=3)
    with policy("watch", Policy(watch, frozenset({"mass"}))):
        recorder = decode(toy, toy.prompt([3, 1]), CachePlan("watch", 2, 1, 1, release), SamplePlan(guidance=2.0))
    tokens = torch.cat([recorder.prompt.tokens, torch.stack(recorder.fed, 1)], 1)
    queries, keys, _ = toy.look_up(tokens, torch.arange(tokens.shape[1]), recorder.prompt.pad)
    scores = (queries @ keys.transpose(-1, -2) / toy.dim**0.5).tolist()
    assert list(seen) == [2, 3, 4]
    for layer in range(2):
        for row in range(4):
            for head in range(2):
                mass: dict[int, float] = {}
                for line in range(5):
                    there = {i for i in recorder.index[line * 3 + 2][layer, row, head].tolist() if i >= 0}
                    mass = {i: mass.get(i, 0.0) for i in there}
                    for q in range(3 + line * 3, 6 + line * 3):
                        weight = {i: math.exp(scores[layer][row][head][q][i]) for i in there if i <= q}
                        for i, w in weight.items():
                            mass[i] += w / sum(weight.values())
                    if line in seen:
                        index, got = (t[layer, row, head].tolist() for t in seen[line])
                        got = {i: m for i, m in zip(index, got, strict=True) if i >= 0}
                        assert got == pytest.approx(mass, rel=1e-4)


# -- the batch ---------------------------------------------------------------------------------------------------------


def test_keep_rows_keeps_the_first():
    """The conditional rows go on as they were, in every buffer; the unconditional ones are gone."""
    cache, victims = filled("strict")
    let_go(cache, victims)
    cache.survey = torch.rand(LAYERS, ROWS, HEADS)
    names = ("keys", "values", "bias", "index", "queries", "mass", "survey", "target")

    def buffers() -> dict[str, Tensor]:
        found = {name: getattr(cache, name) for name in names}
        return {name: found[name] if name not in ("keys", "values") else found[name].data for name in names}

    before = {name: buffer.clone() for name, buffer in buffers().items()}
    cache.keep_rows(1)
    assert cache.rows == 1
    for name, buffer in buffers().items():
        assert torch.equal(buffer, before[name][:, :1]), name
    column = torch.tensor([0])
    cache.advance(torch.tensor([PROMPT + 6]), column)
    cache.write(1, column, *(torch.full((1, HEADS, 1, DIM), 9.0) for _ in range(3)))
    for head in range(HEADS):
        slot = victims[1, 0, head, 0]
        assert cache.index[1, 0, head, slot] == PROMPT + 6
        assert (cache.read(1)[0][0, head, slot] == 9).all()


def test_share_held():
    """How many of the layers and heads hold a token: prompt and end-of-line apart, and for the images asked for."""
    cache = make(Grid(2, 2, eol=5), CachePlan("full"))
    write_prompt(cache)
    cache.extend()
    write_line(cache, 0)
    assert cache.share_held(2).tolist() == [[[1, 1], [0, 0]]] * 2
    cache.index[0, 1, 0, PROMPT] = -1  # one of four heads of the second row lets the first token go
    cache.index[:, 2] = -1
    assert cache.share_held(3).tolist() == [[[1, 1], [0, 0]], [[0.75, 1], [0, 0]], [[0, 0], [0, 0]]]
    assert cache.share_held(1).shape == (1, 2, 2)


# -- attention over slots ----------------------------------------------------------------------------------------------


def test_a_weight_of_n_is_n_tokens():
    """One slot with bias ln n is attended as n equal slots, and a slot with bias -inf as none."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=source) for n in (2, 4, 4))
    bias = torch.tensor([0.0, math.log(3), -math.inf, 0.0]).expand(2, 3, -1)
    places = [0, 1, 1, 1, 3]
    expected = attend(q, k[:, :, places], v[:, :, places], torch.zeros(2, 3, 5))
    torch.testing.assert_close(attend(q, k, v, bias), expected)
    probabilities = attention_weights(q, k, bias, torch.arange(4).expand(2, 3, -1), first=3)
    torch.testing.assert_close(probabilities @ v, expected)


def test_line_probabilities_are_causal_by_index():
    """Query n of the line sees tokens up to its own index, whatever slots they lie in; the scale is 1 / sqrt(D)."""
    index = torch.tensor([6, 2, 5, -1, 4])[None, None]
    bias = torch.tensor([0.0, 0.0, 0.0, -math.inf, 0.0])[None, None]
    keys = torch.zeros(1, 1, 5, 4)
    keys[..., 0] = torch.tensor([1.0, 2.0, 3.0, 9.0, 4.0])
    queries = torch.zeros(1, 1, 3, 4)
    queries[..., 0] = 2.0  # scores are 2 k / sqrt 4 = k
    got = attention_weights(queries, keys, bias, index, first=4)[0, 0]
    e = [math.exp(x) for x in (1, 2, 3, 0, 4)]
    expected = [
        [0, e[1], 0, 0, e[4]],
        [0, e[1], e[2], 0, e[4]],
        [e[0], e[1], e[2], 0, e[4]],
    ]
    expected = torch.tensor([[x / sum(line) for x in line] for line in expected])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("size", [100.0, 300.0])
def test_products_beyond_half_precision(size, monkeypatch):
    """Scores of large float16 queries and keys stay finite, in one query's attention and in line probabilities."""
    monkeypatch.setattr(attention, "PRODUCTS", True)
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 128, generator=source).half() for n in (4, 40, 40))
    q, k, bias = q * size, k * size, torch.zeros(2, 3, 40)
    assert not torch.isfinite(q @ k.transpose(-1, -2)).all(), "the products are large enough"
    exact = (q.double() @ k.double().transpose(-1, -2) / 128**0.5).softmax(-1)
    for query, weights in zip(q.unbind(2), exact.unbind(2), strict=True):
        got = attend(query[:, :, None], k, v, bias.half())
        torch.testing.assert_close(
            got[:, :, 0].double(), (weights[:, :, None] @ v.double())[:, :, 0], atol=2e-3, rtol=2e-3
        )
    index = torch.arange(40).expand(2, 3, -1)
    got = attention_weights(q, k, bias.half(), index, first=40)
    torch.testing.assert_close(got.double(), exact, atol=1e-4, rtol=1e-4)
