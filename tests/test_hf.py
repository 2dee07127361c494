"""The line cache in transformers: the same tokens held, the same logits, and nothing misused in silence.

Small random models of transformers' own: a Janus, and a plain Llama with and without shared key heads, drawn by hand
and by `generate`. The oracles are those of test_oracles.py, with transformers' own decoder as the uncached pass.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="4.57", reason="transformers 4.57 or newer")

from transformers import AttentionInterface, DynamicCache, JanusForConditionalGeneration, LlamaForCausalLM  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb  # noqa: E402

from linear_core.checkpoints.families.janus import target  # noqa: E402
from linear_core.errors import UserError  # noqa: E402
from linear_core.grid import Grid  # noqa: E402
from linear_core.hf import CACHE_ARGUMENT, NAME, LineCache, line_attention  # noqa: E402
from linear_core.models.janus import Janus, JanusConfig  # noqa: E402
from linear_core.plan import RELEASES, CachePlan, CacheShape, SamplePlan  # noqa: E402
from linear_core.policies import POLICIES, Policy  # noqa: E402
from linear_core.prompts import Prompt, token_prompt  # noqa: E402
from tests.cache.test_oracles import predict  # noqa: E402
from tests.tiny import decode, policy, watched  # noqa: E402

pytestmark = pytest.mark.usefixtures("nothing_deprecated")

BOS, EOS, PAD, BOI = 0, 1, 2, 4
WORDS, CODES, LAYERS = 40, 23, 2
SIDE = 6
GRANITE_SCALE = 0.7


def text_sizes(key_heads: int, layers: int = LAYERS) -> dict[str, int | str]:
    return {
        "model_type": "llama", "vocab_size": WORDS, "hidden_size": 24, "intermediate_size": 32,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": key_heads,
        "max_position_embeddings": 1024, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip


def peaky(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that one token more or less in view moves the logits by tenths."""
    source = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=source)
        deviation = 0.4 if "q_proj" in name or "k_proj" in name else 1.0 if "embed" in name else 0.2
        parameter.data = 1 + 0.1 * noise if "norm" in name else deviation * noise
    return model.requires_grad_(False).eval()


@cache
def janus(side: int = SIDE, layers: int = LAYERS) -> JanusForConditionalGeneration:
    config = transformers.JanusConfig(
        text_config=text_sizes(key_heads=4, layers=layers),
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 2 * side,
            "patch_size": 2, "num_image_tokens": side * side, "projection_dim": 24, "depth": 2, "mlp_ratio": 1.0,
        },
        vq_config={
            "embed_dim": 4, "num_embeddings": CODES, "latent_channels": 32, "base_channels": 32,
            "channel_multiplier": [1, 2], "num_res_blocks": 1, "projection_dim": 24, "image_token_embed_dim": 24,
        },
    )  # fmt: skip
    model = peaky(JanusForConditionalGeneration(config))
    for name, number in (("bos_token_id", BOS), ("eos_token_id", EOS), ("pad_token_id", PAD)):
        setattr(model.generation_config, name, number)
    model.generation_config.generation_kwargs = {"boi_token_id": BOI}
    return model


@cache
def llama(key_heads: int) -> LlamaForCausalLM:
    return peaky(LlamaForCausalLM(transformers.LlamaConfig(**text_sizes(key_heads))))


@cache
def granite() -> torch.nn.Module:
    """Shares key heads, and multiplies its scores by a number of its own."""
    sizes = text_sizes(key_heads=2) | {"model_type": "granite", "attention_multiplier": GRANITE_SCALE}
    return peaky(transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes)))


@dataclass
class Subject:
    """A model taken apart, so that one hand-written loop draws with each."""

    model: torch.nn.Module
    decoder: torch.nn.Module
    words: Callable[[Tensor], Tensor]
    codes: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    groups: int = 1  # query heads a key head
    scale: float = 1.0  # of its scores, over the usual one


def subject(name: str) -> Subject:
    if name == "janus":
        model = janus()
        core = model.model
        embed = model.prepare_embeddings_for_image_generation
        return Subject(model, core.language_model, model.get_input_embeddings(), embed, core.generation_head)
    model = granite() if name == "granite" else llama(key_heads=2 if name == "shared" else 4)
    words = model.get_input_embeddings()
    groups, scale = 1 if name == "llama" else 2, GRANITE_SCALE * 6**0.5 if name == "granite" else 1.0
    return Subject(model, model.model, words, words, model.lm_head, groups, scale)


SUBJECTS = ("janus", "llama", "shared", "granite")


@dataclass
class Drawn:
    """What came of a loop; named as a Recorder's fields are."""

    prompt: Prompt
    cache: LineCache | DynamicCache
    prompt_slots: int
    logits: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)  # L B H S after each token fed
    fed: list[Tensor] = field(default_factory=list)
    scores: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    keep: dict[int, Tensor] = field(default_factory=dict)


def words(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Prompts left-padded to the longest, and their mask."""
    places = max(lengths)
    ids = torch.full((len(lengths), places), PAD)
    for row, length in zip(ids, lengths, strict=True):
        row[places - length :] = torch.tensor([BOS, *range(7, 5 + length), BOI])
    return ids, (torch.arange(places) >= places - torch.tensor(lengths)[:, None]).long()


def passed(past: LineCache | DynamicCache) -> dict[str, LineCache | DynamicCache]:
    """The cache as an argument, under the name that this transformers has for it."""
    return {CACHE_ARGUMENT: past}


def draw(what: Subject, past: LineCache | DynamicCache, lengths: list[int], tokens: Tensor) -> Drawn:
    """Feed a prompt and `tokens` B N, one by one, as hand-written loops do: the mask grows by a column of ones."""
    ids, mask = words(lengths)
    drawn = Drawn(Prompt(ids, (mask == 0).sum(1)), past, ids.shape[1])
    embedded = what.words(ids)
    with torch.no_grad():
        for token in (None, *tokens.T):
            if token is not None:
                embedded = what.codes(token[:, None])
                mask = torch.nn.functional.pad(mask, (0, 1), value=1)
                drawn.fed.append(token)
            hidden = what.decoder(inputs_embeds=embedded, attention_mask=mask, use_cache=True, **passed(past))
            drawn.logits.append(what.head(hidden.last_hidden_state[:, -1]))
            if token is not None and isinstance(past, LineCache):
                drawn.index.append(past.slots.index.clone())
    return drawn


def some_tokens(rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(5, CODES, (rows, count), generator=torch.Generator().manual_seed(seed))


# The first policy of each kind: what the cache has to show it, and whether its heads keep unequal numbers.
KINDS = {(p.reads, p.keep is None, p.survey is None): name for name, p in reversed(POLICIES.items())}.values()
EVICTING = ("strict", "lazy")  # what leaves is gone, so that it can be told by a mask
RUNS = [  # subject, policy, release, rows, cols, budget, anchors, recent
    *(("janus", name, "strict", SIDE, SIDE, 2, 2, 1) for name in KINDS),
    ("janus", "line", "lazy", SIDE, SIDE, 2, 2, 1),
    *(("llama", name, "strict", 7, 5, 3, 3, 1) for name in ("line", "h2o", "keydiff")),
    *(("shared", name, release, 7, 5, 2, 2, 1) for name, release in product(("line", "h2o"), EVICTING)),
    ("granite", "line", "strict", 7, 5, 2, 2, 1),
    ("llama", "line", "lazy", 6, 1, 2, 1, 1),  # a single column
    ("llama", "line", "strict", 6, 5, 1, 0, 1),  # one line, the newest
    ("llama", "line", "strict", 6, 5, 5, 4, 2),  # a budget one short of the picture evicts nothing
    ("llama", "line", "strict", 1, 6, 1, 0, 0),  # a single line
]
LENGTHS = [6, 4]  # the second prompt is padded by two


@cache
def run(*which: str | int) -> Drawn:
    name, policy_name, release, rows, cols, budget, anchors, recent = which
    what, plan = subject(name), CachePlan(policy_name, budget, anchors, recent, release)
    with watched(policy_name) as (scores, keep):
        past = LineCache(what.model, (rows, cols), plan)
        drawn = draw(what, past, LENGTHS, some_tokens(len(LENGTHS), rows * cols - 1))
    drawn.scores, drawn.keep, drawn.cache = scores, keep, past.slots
    return drawn


every_run = pytest.mark.parametrize("which", RUNS, ids=lambda which: "-".join(map(str, which)))


# -- the oracles -------------------------------------------------------------------------------------------------------

MASKS: list[Tensor] = []  # of the uncached pass: one bool B H T T a layer


def under_masks(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value, mask = (x.repeat_interleave(groups, 1) for x in (key, value, MASKS[module.layer_idx]))
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2), None


AttentionInterface.register("under_masks", under_masks)


def uncached(what: Subject, drawn: Drawn) -> Tensor:
    """Logits B N+1 V of one pass of transformers' decoder, each layer and head under the mask the cache recorded."""
    length, fed = drawn.prompt.length, len(drawn.fed)
    place = torch.arange(length)
    real = place >= drawn.prompt.pad[:, None]  # B P
    layers, rows, heads, _ = drawn.index[0].shape
    visible = torch.zeros(layers, rows, heads, length + fed, length + fed + 1, dtype=torch.bool)
    for number, index in enumerate(drawn.index):
        visible[..., length + number, :].scatter_(-1, index.long() + 1, True)  # index -1 goes to a column of its own
    visible = visible[..., 1:]
    causal = (place[None, :] <= place[:, None]) & real[:, None] | torch.eye(length, dtype=torch.bool)
    visible[..., :length, :length] = causal[None, :, None]
    MASKS[:] = visible
    what.decoder.set_attn_implementation("under_masks")
    embedded = torch.cat([what.words(drawn.prompt.tokens), what.codes(torch.stack(drawn.fed, 1))], 1)
    hidden = what.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state
    what.decoder.set_attn_implementation("sdpa")  # other tests use the same model, in any order
    return what.head(hidden[:, length - 1 :])


@every_run
def test_eviction_is_masking(which):
    """A: each logit equals that of one uncached pass of transformers' decoder under the recorded mask."""
    drawn = run(*which)
    torch.testing.assert_close(torch.stack(drawn.logits, 1), uncached(subject(which[0]), drawn), atol=2e-5, rtol=1e-5)


@every_run
def test_the_cache_holds_what_was_chosen(which):
    """B: from the policy's scores, plain sets predict what each layer, row and head holds after every token."""
    _, name, release, _, _, budget, anchors, recent = which
    drawn, plan = run(*which), CachePlan(name, budget, anchors, recent, release)
    layers, rows, heads, _ = drawn.index[0].shape
    for layer, row, head in product(range(layers), range(rows), range(heads)):
        for number, held in enumerate(predict(drawn, plan, layer, row, head)):
            slots = drawn.index[number][layer, row, head].tolist()
            assert {i for i in slots if i >= 0} == held, f"layer {layer} row {row} head {head} token {number}"


def test_the_oracles_can_see():
    """Rows, layers and heads disagree on victims, and a victim's absence is felt in the logits."""
    evicted, full = (run("janus", name, "strict", SIDE, SIDE, 2, 2, 1) for name in ("line", "full"))
    assert len(evicted.index[-1].sort(-1).values.flatten(0, 2).unique(dim=0)) > LAYERS * 4
    assert (evicted.logits[-1] - full.logits[-1]).abs().max() > 0.1


@pytest.mark.parametrize("name", SUBJECTS)
def test_full_is_transformers_own_cache(name):
    """With nothing evicted, every logit is that of DynamicCache, at the prompt and at every step, padding included."""
    what = subject(name)
    tokens = some_tokens(len(LENGTHS), SIDE * SIDE - 1)
    ours = draw(what, LineCache(what.model, (SIDE, SIDE), CachePlan("full")), LENGTHS, tokens)
    theirs = draw(what, DynamicCache(), LENGTHS, tokens)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "release"), [*zip(SUBJECTS, cycle(RELEASES)), ("llama", "fold")])
def test_a_line_fed_at_once(name, release):
    """Lines fed whole or in pieces, as when a picture is continued, leave the cache and give the logits of steps."""
    what, plan = subject(name), CachePlan("line", 2, 2, 1, release)
    tokens = some_tokens(2, SIDE * SIDE - 1)
    steps = draw(what, past := LineCache(what.model, (SIDE, SIDE), plan), LENGTHS, tokens)
    once = draw(what, again := LineCache(what.model, (SIDE, SIDE), plan, prompt=max(LENGTHS)), LENGTHS, tokens[:, :0])
    fed = 0
    for count in [SIDE] * 4 + [2, 3, 1, 5]:
        mask = torch.nn.functional.pad(words(LENGTHS)[1], (0, fed + count), value=1)
        embedded = what.codes(tokens[:, fed : fed + count])
        with torch.no_grad():
            hidden = what.decoder(inputs_embeds=embedded, attention_mask=mask, **passed(again))
        once.logits.append(what.head(hidden.last_hidden_state[:, -1]))
        fed += count
        torch.testing.assert_close(once.logits[-1], steps.logits[fed], atol=1e-5, rtol=1e-5)
    assert torch.equal(again.slots.index, past.slots.index)


@pytest.mark.parametrize("name", SUBJECTS)
def test_policies_see_the_queries(name, monkeypatch):
    """A line's queries as attention gets them: those of every query head, with the model's scale."""
    what, given, shown = subject(name), [[] for _ in range(LAYERS)], {}

    def record(module, query, *args, **kwargs):
        given[module.layer_idx].append(query)
        return line_attention(module, query, *args, **kwargs)

    def score(view):
        shown[view.row] = torch.cat([shown.get(view.row, view.queries[:0]), view.queries])
        return POLICIES["line"].score(view)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, record)
    with policy("recorded", Policy(score, frozenset({"queries"}))):
        past = LineCache(what.model, (SIDE, SIDE), CachePlan("recorded", 2, 2, 1))
        draw(what, past, LENGTHS, some_tokens(2, SIDE * SIDE - 1))
    queries = torch.stack([torch.cat(steps[1:], 2) for steps in given])  # L B Q T D, less the prompt's
    expected = queries * what.scale
    for row, seen in shown.items():
        torch.testing.assert_close(seen, expected[:, :, :, row * SIDE : (row + 1) * SIDE], atol=1e-6, rtol=1e-6)
    assert list(shown) == list(range(2, SIDE - 1))


# -- ours --------------------------------------------------------------------------------------------------------------


@cache
def ours() -> Janus:
    """Our own decoder with the weights of transformers' Janus."""
    config = JanusConfig(LAYERS, 24, 4, 32, CODES, WORDS, code_dim=4, head_hidden=24)
    model = Janus(config, Grid(SIDE, SIDE)).requires_grad_(False).eval()
    weights, filled = model.state_dict(), 0
    for key, tensor in janus().state_dict().items():
        if (found := target(key, config)) is not None:
            weights[found.name].chunk(found.parts)[found.part].copy_(found.transform(tensor))
            filled += tensor.numel()
    assert filled == sum(tensor.numel() for tensor in weights.values())
    return model


# Each policy once; between them they have every release, with one prompt and with two of unequal length.
@pytest.mark.parametrize(
    ("name", "release", "lengths"),
    list(zip(POLICIES, cycle(RELEASES), cycle([[6, 4], [5]]))),
    ids=lambda value: value if isinstance(value, str) else "unequal" if len(value) > 1 else "one",
)
def test_it_holds_what_our_own_janus_holds(name, release, lengths):
    """Two loops, two decoders, one set of weights: codes, logits and the tokens held are the same after every token.

    Ours drawn by `linear_core.loop.generate`, transformers' by its own `generate`; greedy, with guidance.
    """
    plan, (ids, mask) = CachePlan(name, 2, 2, 1, release), words(lengths)
    rows = [row[row.shape[0] - length :].tolist() for row, length in zip(ids, lengths, strict=True)]
    away = [[row[0], *[PAD] * (len(row) - 2), row[-1]] for row in rows]
    prompt = token_prompt(rows, negative=token_prompt(away))
    expected = decode(ours(), prompt, plan, SamplePlan(guidance=5.0, temperature=0.0))

    past, held, logits = LineCache(janus(), (SIDE, SIDE), plan), [], []
    core = janus().model
    hooks = (
        core.language_model.register_forward_hook(lambda *_: held.append(past.slots.index.clone())),
        core.generation_head.register_forward_hook(lambda _, given, out: logits.append(out)),
    )
    codes = generate(past, input_ids=ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    assert torch.equal(codes, expected.tokens.flatten(1)) and len(codes.unique()) > SIDE
    torch.testing.assert_close(torch.stack(logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert torch.equal(torch.stack(held[1:]).sort(-1).values, torch.stack(expected.index).sort(-1).values)


# -- generate ----------------------------------------------------------------------------------------------------------


def generate(past: LineCache | DynamicCache, rows: int = 2, **options) -> Tensor:
    ids, mask = words([5] * rows)
    ids[:, 1:3] += torch.arange(rows)[:, None]  # rows of their own
    inputs = {"input_ids": ids, "attention_mask": mask, "guidance_scale": 5, "do_sample": False} | options
    return janus().generate(**inputs, generation_mode="image", **passed(past))


def test_janus_generate():
    """generate(generation_mode="image") draws the same codes with everything kept, others with a few lines."""
    full = LineCache(janus(), (SIDE, SIDE), CachePlan("full"))
    few = LineCache(janus(), (SIDE, SIDE), CachePlan(budget=2, recent=1))
    expected = generate(DynamicCache())  # the static cache that it makes for itself is broken in 5.14
    assert torch.equal(generate(full), expected)
    assert not torch.equal(generate(few), expected)
    assert few.slots.rows == 4, "guidance doubles the batch"
    assert few.slots.slots == 5 + 3 * SIDE and few.nbytes < full.nbytes


def test_reset_begins_another_image():
    """After reset() the same cache draws the same picture, and a batch of another size."""
    past = LineCache(janus(), (SIDE, SIDE), CachePlan(budget=2, recent=1))
    first = generate(past)
    past.reset()
    assert past.get_seq_length() == 0 and past.nbytes == 0
    assert torch.equal(generate(past), first)
    past.reset()
    assert torch.equal(generate(past, rows=1), first[:1])


def test_llama_generate():
    """An ordinary generate over image tokens, with prompts of unequal length."""
    what, (ids, mask) = subject("llama"), words(LENGTHS)
    options = {"attention_mask": mask, "max_new_tokens": 35, "min_new_tokens": 35, "do_sample": False}
    theirs = what.model.generate(ids, **options)
    past = LineCache(what.model, (7, 5), CachePlan("full"))
    assert torch.equal(what.model.generate(ids, **passed(past), **options), theirs)
    assert past.get_seq_length() == ids.shape[1] + 34


def test_generate_goes_on():
    """A second generate over all tokens so far feeds only what the cache has not seen."""
    what, (ids, mask) = subject("llama"), words(LENGTHS)
    past = LineCache(what.model, (SIDE, SIDE), CachePlan(budget=2, recent=1))
    expected = what.model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, **passed(past))
    past.reset()
    for count in (20, 10):
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        ids = what.model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **passed(past))
    assert torch.equal(ids, expected)


def test_bfloat16():
    """Slots have the model's own type."""
    what = subject("llama")
    model = LlamaForCausalLM(what.model.config).eval()
    model.load_state_dict(what.model.state_dict())
    half = replace(what, model=model.bfloat16(), decoder=model.model, words=model.get_input_embeddings())
    half = replace(half, codes=half.words, head=model.lm_head)
    past = LineCache(model, (SIDE, SIDE), CachePlan(budget=2, recent=1))
    drawn = draw(half, past, LENGTHS, some_tokens(2, SIDE * SIDE - 1))
    assert past.slots.keys.data.dtype == torch.bfloat16 and torch.isfinite(torch.stack(drawn.logits)).all()


def test_other_caches_stay_as_they_were():
    """A model that was switched gives what it gave before with every other cache, and with none."""
    what, (ids, mask) = subject("llama"), words(LENGTHS)
    what.decoder.set_attn_implementation("sdpa")
    before = what.model(ids, attention_mask=mask).logits
    LineCache(what.model, (SIDE, SIDE), CachePlan("full"))
    assert what.model.config._attn_implementation == NAME
    assert torch.equal(what.model(ids, attention_mask=mask).logits, before)


def test_end_of_line_tokens():
    """A Grid with end-of-line tokens makes lines of one token more."""
    what = subject("llama")
    past = LineCache(what.model, Grid(4, 3, eol=3), CachePlan(budget=2, anchors=1, recent=1))
    draw(what, past, [5], some_tokens(1, 15))
    assert past.slots.slots == 5 + 3 * 4


# -- what must not pass in silence -------------------------------------------------------------------------------------


def begun(fed: int = 3, grid: tuple[int, int] = (SIDE, SIDE), **options: int) -> tuple[Subject, LineCache]:
    what = subject("llama")
    past = LineCache(what.model, grid, CachePlan(budget=2, recent=1), **options)
    draw(what, past, LENGTHS, some_tokens(2, fed))
    return what, past


def feed(what: Subject, past: LineCache, rows: int = 2, count: int = 1) -> None:
    with torch.no_grad():
        what.decoder(inputs_embeds=what.codes(some_tokens(rows, count)), **passed(past))


def test_a_grid_that_is_not_the_models():
    with pytest.raises(UserError, match=r"grid: this Janus draws 6 x 6 tokens, not 4 x 9"):
        LineCache(janus(), (4, 9), CachePlan(budget=2, recent=1))
    for grid in (36, (6, 6, 6)):
        with pytest.raises(UserError, match=r"is not a number of rows and one of columns"):
            LineCache(janus(), grid, CachePlan(budget=2, recent=1))


def test_more_tokens_than_the_grid_has():
    what, past = begun(fed=6, grid=(3, 2), prompt=max(LENGTHS))
    with pytest.raises(UserError, match=r"grid: 3 x 2 ends after 6 tokens, and 6 are in the cache when 2 more come"):
        feed(what, past, count=2)


def test_tokens_across_a_line_end():
    what, past = begun(fed=3, prompt=max(LENGTHS))
    with pytest.raises(UserError, match=r"4 tokens come at column 3 of a line of 6.*reset\(\) before another prompt"):
        feed(what, past, count=4)


def test_a_second_image_without_reset():
    """Where transformers hands the prompt on; the older ones' own generate stops before it does."""
    past = LineCache(janus(), (SIDE, SIDE), CachePlan(budget=2, recent=1))
    generate(past)
    with pytest.raises((UserError, IndexError)):
        generate(past)
    ids, _ = words([5] * 4)
    with (
        torch.no_grad(),
        pytest.raises(UserError, match=r"5 tokens come at once.*call reset\(\) before another prompt"),
    ):
        janus().model.language_model(input_ids=ids, **passed(past))


@pytest.mark.parametrize("name", sorted({"cache", "past_key_values", "kv_cache"} - {CACHE_ARGUMENT}))
def test_a_cache_under_another_name(name):
    """transformers translates its own former name, with a warning; any other would leave the cache unused."""
    past = LineCache(llama(4), (SIDE, SIDE), CachePlan("full"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            llama(4)(some_tokens(1, 4), **{name: past})
        except UserError as error:
            assert f"takes its cache as {CACHE_ARGUMENT}=, not as {name}=" in str(error)
        else:
            assert past.get_seq_length() == 4


def test_a_batch_that_changes():
    what, past = begun()
    with pytest.raises(UserError, match="holds 2 sequences and 1 are fed"):
        feed(what, past, rows=1)


@pytest.mark.parametrize("name", ["reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"])
def test_rows_and_tokens_stay(name):
    _, past = begun()
    with pytest.raises(UserError, match="without assistant_model" if name == "crop" else "num_beams=1"):
        getattr(past, name)(1)


def test_assisted_generation_is_refused():
    """It takes back drafts that are wrong. Newer versions ask whether the cache can; others call `crop`."""
    what, (ids, mask) = subject("llama"), words(LENGTHS[:1])
    past = LineCache(what.model, (7, 5), CachePlan("full"))
    with pytest.raises((UserError, ValueError), match=r"cannot take back|a cache that can be cropped"):
        what.model.generate(ids, attention_mask=mask, prompt_lookup_num_tokens=2, max_new_tokens=8, **passed(past))


def test_beams_are_refused():
    what, (ids, mask) = subject("llama"), words(LENGTHS)
    past = LineCache(what.model, (7, 5), CachePlan("full"))
    with pytest.raises(UserError, match="num_beams=1"):
        what.model.generate(ids, attention_mask=mask, num_beams=2, max_new_tokens=8, **passed(past))


@pytest.mark.parametrize("other", ["eager", "sdpa"])
@pytest.mark.parametrize("fed", [None, 3])
def test_another_attention(other, fed):
    """A model switched back, before the prompt or within the image, is noticed before it attends."""
    what = subject("llama")
    past = LineCache(what.model, (SIDE, SIDE), CachePlan(budget=2, recent=1))
    if fed is not None:
        draw(what, past, LENGTHS, some_tokens(2, fed))
    what.decoder.set_attn_implementation(other)
    with pytest.raises(UserError, match=f"its attention was changed to '{other}'"):
        draw(what, past, LENGTHS, some_tokens(2, 0)) if fed is None else feed(what, past)


def test_attention_that_is_not_ours(monkeypatch):
    """A model that names our attention and uses its own is noticed in the prompt's forward, not by its pictures."""
    what = subject("llama")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, sdpa_attention_forward)
    past = LineCache(what.model, (SIDE, SIDE), CachePlan("full"))
    with pytest.raises(UserError, match="layer 0 did not attend through the line cache"):
        draw(what, past, LENGTHS, some_tokens(2, 0))


@pytest.mark.parametrize(("layer", "due"), [(0, 1), (1, 2)])
def test_a_forward_that_was_broken_off(layer, due, monkeypatch):
    """Memory that runs out while a layer attends leaves a cache that says so, until it is reset."""
    what, past = begun()

    def fail(module, *args, **kwargs):
        if module.layer_idx == layer:
            raise MemoryError
        return line_attention(module, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, fail)
        feed(what, past)
    with pytest.raises(UserError, match=f"layer 0 comes where layer {due} is due"):
        feed(what, past)
    past.reset()
    draw(what, past, LENGTHS, some_tokens(2, 3))


def test_gradients():
    what = subject("llama")
    past = LineCache(what.model, (SIDE, SIDE), CachePlan("full"))
    with torch.enable_grad(), pytest.raises(UserError, match="no_grad"):
        what.decoder(inputs_embeds=what.codes(some_tokens(1, 4)).requires_grad_(), **passed(past))


def test_training_mode():
    model = LlamaForCausalLM(transformers.LlamaConfig(**text_sizes(4), attention_dropout=0.1)).train()
    past = LineCache(model, (SIDE, SIDE), CachePlan("full"))
    with torch.no_grad(), pytest.raises(UserError, match=r"model.eval\(\)"):
        model(some_tokens(1, 4), **passed(past))


def test_models_that_do_not_fit(monkeypatch):
    with pytest.raises(UserError, match="Linear is no transformers model"):
        LineCache(torch.nn.Linear(1, 1), (SIDE, SIDE), CachePlan("full"))
    sizes = text_sizes(2) | {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
    sliding = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    with pytest.raises(UserError, match="sliding_attention; a line cache needs full attention"):
        LineCache(sliding, (SIDE, SIDE), CachePlan("full"))
    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_can_set_attn_implementation", lambda self: False)
    with pytest.raises(UserError, match="LlamaForCausalLM does not let its attention be replaced"):
        LineCache(LlamaForCausalLM(transformers.LlamaConfig(**text_sizes(4))), (SIDE, SIDE), CachePlan("full"))


@pytest.mark.parametrize("plan", [CachePlan("fold", 2, 2, 1, "strict"), CachePlan("line", 2, 2, 1, "fold")])
def test_a_rotation_that_is_not_known(plan, monkeypatch):
    """As GPT-J's, which takes one tensor and the sine first. Only plans that look ahead need it."""
    rotation = "transformers.models.llama.modeling_llama.apply_rotary_pos_emb"
    monkeypatch.setattr(rotation, lambda tensor, sin, cos: tensor)
    with pytest.raises(UserError, match="how LlamaModel rotates them is not known; choose another policy"):
        LineCache(llama(4), (SIDE, SIDE), plan)
    LineCache(llama(4), (SIDE, SIDE), CachePlan("line", 2, 2, 1, "lazy"))


@pytest.mark.parametrize("columns", [0, 1, -1])
def test_queries_turned_to_another_place(columns):
    """As if transformers had rotated them for a token three lines further down, and perhaps a column aside."""
    cache, rotary = LineCache(model := llama(4), (SIDE, SIDE), CachePlan("fold", 2, 2, 1)), model.model.rotary_emb
    raw, place = torch.randn(1, 2, 4, SIDE, rotary.inv_freq.numel() * 2), torch.arange(9, 9 + SIDE)[None]
    there = place + 3 * SIDE + columns
    (here, _), (expected, _) = (apply_rotary_pos_emb(raw[0], raw[0], *rotary(raw, at)) for at in (place, there))
    torch.testing.assert_close(cache._rotate(here[None], 3, columns)[0], expected, atol=1e-5, rtol=1e-5)


def test_attention_that_does_more():
    """What a model adds to its scores, and a line cache would leave out, is refused at the prompt."""
    sizes = text_sizes(2) | {"model_type": "mistral", "sliding_window": 9}
    config = transformers.MistralConfig(**sizes)
    config.layer_types = None  # where a config names them, the LineCache is refused before
    model = transformers.MistralForCausalLM(config).eval()
    past = LineCache(model, (SIDE, SIDE), CachePlan("full"))
    with torch.no_grad(), pytest.raises(UserError, match="sliding_window, which a line cache does not know"):
        model(some_tokens(1, 4), **passed(past))


def test_keys_and_values_of_unequal_size():
    what = subject("llama")
    past = LineCache(what.model, (SIDE, SIDE), CachePlan("full"))
    key, value = past.update(torch.zeros(1, 4, 3, 6), torch.zeros(1, 4, 3, 4), 0)
    with pytest.raises(UserError, match="keys have 6 numbers a head and values 4"):
        line_attention(what.decoder.layers[0].self_attn, key, key, value, None)


def test_layers_on_several_devices():
    what, past = begun()
    past.slots.bias = past.slots.bias.to("meta")
    with pytest.raises(UserError, match="layers lie on meta and cpu; put them on one device"):
        feed(what, past)


def test_without_transformers(monkeypatch):
    """Who has no transformers is told so, in one sentence, when the module is asked for."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "linear_core.hf")
    with pytest.raises(UserError, match=r"^linear_core.hf: needs transformers 4.57 or newer \(.*\); install it, or"):
        importlib.import_module("linear_core.hf")


# -- what the README says ----------------------------------------------------------------------------------------------


class TextTokenizer:
    """In the place of Janus' processor, which needs a vocabulary."""

    def apply_chat_template(self, chat, add_generation_prompt):
        return chat[0]["content"][0]["text"]

    def __call__(self, text, generation_mode, return_tensors):
        ids, mask = words([2 + len(text.split())])
        return {"input_ids": ids, "attention_mask": mask}


def test_the_readme_example(monkeypatch):
    """The example as printed, on a tiny Janus of 24 x 24 tokens; the memory it names is what is allocated."""
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    code = readme.split("### With transformers")[1].split("```python")[1].split("```")[0]
    monkeypatch.setattr(JanusForConditionalGeneration, "from_pretrained", lambda name: janus(24, layers=1))
    monkeypatch.setattr(transformers.JanusProcessor, "from_pretrained", lambda name: TextTokenizer())
    assert ", cache=cache)" in code, "as the newest transformers has it"
    exec(code.replace(" cache=", f" {CACHE_ARGUMENT}="), names := {})
    assert names["codes"].shape == (1, 576) and names["cache"].slots.slots == 8 + 5 * 24
    assert names["pictures"].shape == (1, 48, 48, 3) and 0 <= names["pictures"].min() < names["pictures"].max() <= 1
    pro = CacheShape(layers=24, heads=16, head_dim=128, prompt=20, bytes_per_element=2)
    for plan, said in ((CachePlan(budget=4), "52.5 MiB"), (CachePlan("full"), "takes 223.5")):
        assert f"{pro.bytes(Grid(24, 24), plan, rows=2) / 2**20:.1f}" in said and said in readme
