"""The line cache as transformers, peft, torch.compile and pickle meet it: every name answered or refused.

Models, loops and prompts are those of test_hf.py. transformers' own DynamicCache says what is right.
"""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", minversion="4.57", reason="transformers 4.57 or newer")

from transformers import Cache, DynamicCache, LlamaForCausalLM  # noqa: E402

from linear_core.errors import UserError  # noqa: E402
from linear_core.hf import LineCache, RefusedAttribute, line_attention  # noqa: E402
from linear_core.plan import CachePlan  # noqa: E402
from tests.test_hf import (  # noqa: E402
    LAYERS,
    LENGTHS,
    SIDE,
    Subject,
    begun,
    draw,
    feed,
    llama,
    passed,
    peaky,
    some_tokens,
    subject,
    text_sizes,
    uncached,
    words,
)

pytestmark = pytest.mark.usefixtures("nothing_deprecated")

OLD = transformers.__version__.startswith("4.")
FEW = CachePlan(budget=2, anchors=2, recent=1)
PROMPT = max(LENGTHS)


# -- every public name of Cache ----------------------------------------------------------------------------------------

# What is answered as transformers' own cache answers it, before the prompt and after some tokens.
LIKE_DYNAMIC = {
    "get_seq_length": (), "get_query_offset": (), "get_mask_sizes": (torch.arange(3) if OLD else 3, 0),
    "get_max_length": (), "get_max_cache_shape": (), "is_sliding": None, "is_linear": None, "is_dummy": None,
    "is_compileable": None, "is_recording_past": (0,), "activate_past_recording": (), "is_initialized": None,
}  # fmt: skip
OURS = {"is_croppable": (None, False, False), "batch_size": (None, -1, 2), "max_batch_size": (None, -1, 2)}
REFUSED = {
    "reorder_cache": "num_beams=1", "crop": "prompt_lookup_num_tokens", "batch_repeat_interleave": "num_beams=1",
    "batch_select_indices": "num_beams=1", "get_conv_state": "another kind", "update_conv_state": "another kind",
    "get_recurrent_state": "another kind", "update_recurrent_state": "another kind", "update_indexer": "another kind",
    "has_previous_state": "another kind", "early_initialization": "made when the prompt is in", "offload": "stay there",
    "prefetch": "stay there",
}  # fmt: skip
ELSEWHERE = {"update", "reset", "max_cache_len"}  # in test_hf.py, and below


def test_every_public_name_is_known():
    """A name that a coming version of transformers adds to its caches fails here, until it is answered or refused."""
    public = {name for name in dir(Cache) if not name.startswith("_")}
    assert public <= {*LIKE_DYNAMIC, *OURS, *REFUSED, *ELSEWHERE}


def ask(past: LineCache | DynamicCache, name: str, args: tuple | None) -> object:
    return getattr(past, name) if args is None else getattr(past, name)(*args)


@pytest.mark.parametrize("fed", [None, 3])
def test_every_name_is_answered_or_refused(fed):
    """Before the prompt and within the image."""
    what = subject("llama")
    ours, theirs = LineCache(what.model, (SIDE, SIDE), FEW), DynamicCache(config=what.model.config)
    if fed is not None:
        for past in (ours, theirs):
            draw(what, past, LENGTHS, some_tokens(2, fed))
    for name, args in LIKE_DYNAMIC.items():
        if hasattr(Cache, name):
            assert ask(ours, name, args) == ask(theirs, name, args), name
    for name, (args, before, after) in OURS.items():
        assert ask(ours, name, args) == (before if fed is None else after), name
    for name, sentence in REFUSED.items():
        with pytest.raises(UserError, match=sentence):
            getattr(ours, name)(0)
    assert len(ours) == len(theirs) == LAYERS


def test_layers_are_described_and_not_handed_out():
    """Who goes through `layers` finds as many as there are; who wants what they hold is sent to the slots."""
    _, past = begun()
    assert [layer.is_initialized for layer in past.layers] == [True] * LAYERS
    assert not any(hasattr(layer, "keys") or hasattr(layer, "record_past") for layer in past.layers)
    with pytest.raises(RefusedAttribute, match="has no keys; all layers are in"):
        past.layers[0].keys  # noqa: B018
    with pytest.raises(UserError, match="not in the order of the tokens"):
        past[0]
    with pytest.raises(TypeError):
        iter(past)
    assert past, "a cache is something, however its length is counted"


def test_only_static_caches_have_a_maximum():
    """peft's prefix tuning asks for it, to put a cache of its own in our place; `hasattr` may ask."""
    _, past = begun()
    assert not hasattr(past, "max_cache_len")
    with pytest.raises(UserError, match=r"no max_cache_len; prefix tuning .* use prompt tuning or LoRA"):
        past.max_cache_len  # noqa: B018


# -- begun again without reset -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("length", "drawn"), [(6, 12), (6, 6), (12, 4), (12, 12)])
def test_generate_begun_again_without_reset(length, drawn, padded):
    """The prompt comes again: nothing of it is new, one token seems to be, or several. Refused, and reset() helps."""
    what, (ids, mask) = subject("llama"), words([length, length - padded])
    past = LineCache(what.model, (SIDE, SIDE), FEW)
    options = {"attention_mask": mask, "max_new_tokens": drawn, "min_new_tokens": drawn, "do_sample": False}
    first = what.model.generate(ids, **passed(past), **options)
    # transformers 4 finds out itself, less politely, before it asks the cache for anything
    with pytest.raises(IndexError if OLD else UserError, match=None if OLD else r"reset\(\) before another prompt"):
        what.model.generate(ids, **passed(past), **options)
    mask = torch.nn.functional.pad(mask, (0, drawn), value=1)
    more = {"attention_mask": mask, "max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    again = what.model.generate(first, **passed(past), **more)  # what was refused has changed nothing
    past.reset()
    whole = what.model.generate(
        ids, **passed(past), **options | {"max_new_tokens": drawn + 2, "min_new_tokens": drawn + 2}
    )
    assert torch.equal(again, whole)


# -- peft, whose own tests are in test_hf_peft.py ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"peft_type": "PREFIX_TUNING", "is_prompt_learning": True}, "prefix tuning .peft. replaces it"),
        ({"peft_type": "PROMPT_TUNING", "is_prompt_learning": True}, "4 tokens come where one is due, as peft feeds"),
    ],
)
def test_what_peft_does(settings, sentence, monkeypatch):
    """The same without peft, which is not among the tests' packages."""
    what = subject("llama")
    monkeypatch.setattr(what.model, "active_peft_config", type("Settings", (), settings)(), raising=False)
    with pytest.raises(UserError, match=sentence):
        past = LineCache(what.model, (SIDE, SIDE), FEW, prompt=PROMPT)
        draw(what, past, LENGTHS, some_tokens(2, 2))
        feed(what, past, count=4)


def test_a_second_cache():
    """As peft hands on its own beside ours, where the argument's name has changed."""
    what, past = begun()
    marked, value = past.update(torch.zeros(2, 4, 1, 6), torch.zeros(2, 4, 1, 6), 0)
    with pytest.raises(UserError, match="another cache comes beside it, as other="):
        line_attention(what.decoder.layers[0].self_attn, marked, marked, value, None, other=DynamicCache())
    feed(what, past)


# -- a prompt in parts -------------------------------------------------------------------------------------------------


def prefilled(what: Subject, past: LineCache | DynamicCache, lengths: list[int], ends: list[int]) -> Tensor:
    """Feed a prompt in parts that end there; logits after it."""
    ids, mask = words(lengths)
    with torch.no_grad():
        for first, end in pairwise([0, *ends]):
            given = {"inputs_embeds": what.words(ids[:, first:end]), "attention_mask": mask[:, :end]}
            hidden = what.decoder(**given, use_cache=True, **passed(past)).last_hidden_state
    return what.head(hidden[:, -1])


@pytest.mark.parametrize("name", ["janus", "shared"])
@pytest.mark.parametrize("plan", [FEW, replace(FEW, storage="int8", policy="h2o"), CachePlan("fold", 2, 2, 1)])
@pytest.mark.parametrize("ends", [[1, 2, 3, 4, 5, 6, 7, 8, 9], [4, 8, 9], [2, 9]])
def test_a_prompt_in_parts(name, plan, ends):
    """An announced prompt in any parts, padding included, leaves what it leaves in one."""
    what, lengths, tokens = subject(name), [9, 4], some_tokens(2, 3 * SIDE + 1)
    whole, parts = (LineCache(what.model, (SIDE, SIDE), plan, prompt=9) for _ in range(2))
    torch.testing.assert_close(prefilled(what, parts, lengths, ends), prefilled(what, whole, lengths, [9]))
    for token in tokens.T:
        with torch.no_grad():
            seen = [
                what.decoder(inputs_embeds=what.codes(token[:, None]), **passed(p)).last_hidden_state
                for p in (parts, whole)
            ]
        torch.testing.assert_close(*seen, atol=1e-5, rtol=1e-5)
    assert torch.equal(parts.slots.index, whole.slots.index) and parts.nbytes == whole.nbytes


@pytest.mark.parametrize("size", [1, 5, 12])
def test_generate_with_chunked_prefill(size):
    """What `generate` makes of a prompt in chunks with transformers' own cache, it makes with ours."""
    what, (ids, mask) = subject("llama"), words([12, 9])
    options = {
        "attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False,
        "prefill_chunk_size": size,
    }  # fmt: skip
    past = LineCache(what.model, (SIDE, SIDE), CachePlan("full"), prompt=12)
    expected = what.model.generate(ids, **passed(DynamicCache()), **options)
    assert torch.equal(what.model.generate(ids, **passed(past), **options), expected)


@pytest.mark.parametrize("rest", [8, 2])
def test_a_prompt_that_goes_on_unannounced(rest):
    """4 of 12 tokens, then generate with all: as image tokens look the same, refused; announced, it works."""
    what, (ids, mask) = subject("llama"), words([12, 12])
    options = {"attention_mask": mask, "max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    expected = what.model.generate(ids, **passed(LineCache(what.model, (24, 24), FEW)), **options)
    past = LineCache(what.model, (24, 24), FEW)
    with torch.no_grad():
        what.model(ids[:, :-rest], **passed(past))
    with pytest.raises(
        UserError, match=rf"{rest} tokens come at once after a prompt of {12 - rest}.*announce how many"
    ):
        what.model.generate(ids, **passed(past), **options)
    past.reset(prompt=12)
    with torch.no_grad():
        what.model(ids[:, :-rest], **passed(past))
    assert torch.equal(what.model.generate(ids, **passed(past), **options), expected)
    past.reset()
    assert past.prompt == 12, "as announced before"


def test_more_than_the_prompt():
    """A part of the prompt with image tokens behind it is refused, and may come again as it should."""
    what, past = subject("llama"), LineCache(subject("llama").model, (SIDE, SIDE), FEW, prompt=9)
    prefilled(what, past, [9, 9], [7])
    assert (past.batch_size, past.get_seq_length(), past.is_initialized) == (2, 7, False) and past.nbytes > 0
    with pytest.raises(UserError, match="4 tokens come where 2 of a prompt of 9 are due"):
        feed(what, past, count=4)
    with pytest.raises(UserError, match="holds 2 sequences and 1 are fed"):
        feed(what, past, rows=1)
    feed(what, past, count=2)
    assert past.is_initialized and past.get_seq_length() == 9


@pytest.mark.parametrize("prompt", [0, -3, 2.5, "12", None or []])
def test_a_length_that_is_none(prompt):
    with pytest.raises(UserError, match="is not a number of tokens"):
        LineCache(llama(4), (SIDE, SIDE), FEW, prompt=prompt)


# -- copies and files --------------------------------------------------------------------------------------------------


def saved(past: LineCache) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(past, file)
    file.seek(0)
    return file


def loaded(past: LineCache, what: Subject) -> LineCache:
    again = torch.load(saved(past), weights_only=True)
    again.attach(what.model)
    return again


@pytest.mark.parametrize("plan", [FEW, CachePlan("fold", 2, 2, 1, storage="int8"), CachePlan("h2o", 2, 2, 1, "lazy")])
@pytest.mark.parametrize("fed", [None, 3, 2 * SIDE + 3, SIDE * SIDE + 2])
@pytest.mark.parametrize("copied", [copy.deepcopy, loaded])
def test_a_copy_goes_on_by_itself(plan, fed, copied):
    """From within the prompt, the image or its closing tokens, a copy goes on as the cache does, and by itself."""
    what = subject("shared")
    past = LineCache(what.model, (SIDE, SIDE), plan, prompt=9)
    tokens = some_tokens(2, SIDE * SIDE + 4)
    prefilled(what, past, [9, 9], [4] if fed is None else [4, 9])

    def go_on(past: LineCache) -> Tensor:
        with torch.no_grad():
            steps = (
                [ids[:, None] for ids in tokens[:, fed : (fed or 0) + SIDE].T]
                if fed
                else [tokens[:, :5], *tokens[:, 5:9, None].unbind(1)]
            )
            return torch.stack(
                [what.decoder(inputs_embeds=what.codes(s), **passed(past)).last_hidden_state[:, -1] for s in steps]
            )

    with torch.inference_mode():
        for token in tokens[:, : fed or 0].T:
            what.decoder(inputs_embeds=what.codes(token[:, None]), **passed(past))
    twin = copied(past) if copied is copy.deepcopy else copied(past, what)
    assert twin._decoder is past._decoder and twin.nbytes == past.nbytes
    expected = go_on(twin)
    assert torch.equal(go_on(past), expected) and torch.equal(past.slots.index, twin.slots.index)


def test_a_file_has_the_slots_and_no_weights():
    what, past = begun(fed=9)
    size = saved(past).getbuffer().nbytes
    saved_again = torch.load(saved(past))
    weights = sum(p.nbytes for p in what.model.parameters())
    assert past.nbytes < size < past.nbytes * 2 + 20_000 and "q_proj" not in str(saved(past).getvalue())
    assert saved_again._model is None and weights > 0
    with torch.no_grad(), pytest.raises(UserError, match=r"loaded without its model; call attach\(model\)"):
        what.decoder(inputs_embeds=what.codes(some_tokens(2, 1)), **passed(saved_again))
    with pytest.raises(UserError, match=r"call attach\(model\)"):
        saved_again.guidance(3.0)
    other = LlamaForCausalLM(transformers.LlamaConfig(**text_sizes(4, layers=3)))
    with pytest.raises(UserError, match="3 layers and the cache holds 2"):
        saved_again.attach(other)
    saved_again.attach(double := copy.deepcopy(what.model).double())
    with torch.no_grad(), pytest.raises(UserError, match=r"torch\.float64.*torch\.float32"):
        double.model(input_ids=some_tokens(2, 1), **passed(saved_again))


# -- tokens after the image, guidance ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "shared", "granite"])
@pytest.mark.parametrize("plan", [FEW, CachePlan("full"), replace(FEW, release="lazy")], ids=str)
def test_tokens_that_close_an_image(name, plan):
    """They see what is held, and each other: one pass without a cache, under the mask of that, gives their logits."""
    what, tokens, closing = subject(name), 4 * 3, 3
    past = LineCache(what.model, (4, 3), plan)
    drawn = draw(what, past, LENGTHS, some_tokens(2, tokens + closing))
    assert past.get_seq_length() == PROMPT + tokens + closing
    for number in range(tokens + closing):
        own = torch.arange(closing) + PROMPT + tokens
        own = torch.where(own <= PROMPT + number, own, -1).expand(*drawn.index[number].shape[:3], -1)
        drawn.index[number] = torch.cat([drawn.index[number], own], -1)
    torch.testing.assert_close(torch.stack(drawn.logits, 1), uncached(what, drawn), atol=2e-5, rtol=1e-5)


def test_generate_over_the_end_of_the_image():
    """The image is never lost; the cache says when there are too many tokens for it."""
    what, (ids, mask) = subject("llama"), words(LENGTHS)
    options = {"attention_mask": mask, "do_sample": False}
    past = LineCache(what.model, (4, 3), FEW)
    image = what.model.generate(ids, **passed(past), **options, max_new_tokens=12, min_new_tokens=12)
    past.reset()
    with pytest.warns(UserWarning, match=r"4 x 3 ended 3 tokens ago.*give the model's grid") as caught:
        longer = what.model.generate(ids, **passed(past), **options, max_new_tokens=18, min_new_tokens=18)
    assert torch.equal(longer[:, : image.shape[1]], image) and len(caught) == 1
    past.reset()
    assert past.nbytes == 0


@pytest.mark.parametrize("plan", [CachePlan("full"), FEW], ids=str)
@pytest.mark.parametrize("negative", [None, [8, 5]])
def test_guidance_in_generate(plan, negative):
    """The negative prompt's sequence has a line cache, too: with everything kept, the scores are transformers' own."""
    what, (ids, mask) = subject("llama"), words(LENGTHS)
    away, away_mask = (None, None) if negative is None else words(negative)
    options = {
        "attention_mask": mask, "max_new_tokens": 38, "min_new_tokens": 38, "do_sample": False, "output_scores": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    given = {"negative_prompt_ids": away, "negative_prompt_attention_mask": away_mask}
    expected = what.model.generate(ids, **options, guidance_scale=3.0, **given)
    past = LineCache(what.model, (SIDE, SIDE), plan)
    processor = past.guidance(3.0, away, away_mask)
    got = what.model.generate(ids, **options, logits_processor=[processor], **passed(past))
    # Ours comes after `generate`'s own processors, one of which has taken a token out: scores differ by a constant.
    scores, theirs = (torch.stack(run.scores).log_softmax(-1) for run in (got, expected))
    same = torch.isclose(scores, theirs, atol=1e-4, rtol=1e-4).all()
    assert same == (plan.policy == "full")
    other = processor.line_cache
    assert other.slots.slots - other.slots.shape.prompt == past.slots.slots - past.slots.shape.prompt
    assert other.get_seq_length() - other.slots.shape.prompt == 37


# -- torch.compile -----------------------------------------------------------------------------------------------------


def test_a_compiled_decoder():
    """Prompts of many lengths, image after image: the logits of the decoder as it is, which is compiled once."""
    layer = peaky(LlamaForCausalLM(transformers.LlamaConfig(**text_sizes(4, layers=1))))
    what = Subject(layer, layer.model, layer.get_input_embeddings(), layer.get_input_embeddings(), layer.lm_head)
    torch.compiler.reset()
    compiled = replace(what, decoder=torch.compile(what.decoder, backend="eager"))
    tokens, graphs = some_tokens(1, 3), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it traces
        for length in (4, 5, 7, 10):
            caches = [LineCache(what.model, (3, 2), CachePlan("line", 1, 1, 0)) for _ in range(2)]
            got, expected = (
                torch.stack(draw(w, p, [length], tokens).logits) for w, p in zip((compiled, what), caches, strict=True)
            )
            torch.testing.assert_close(got, expected)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[2], "compiled anew for each image"
