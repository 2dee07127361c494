"""How much of the next code's probability a few lines share with the full cache: what the demo says of them.

That forced logits are those of decoding is tests/bench/test_quality.py's question.
"""

from __future__ import annotations

import pytest
import torch

from bench.forced import FULL, forced_logits
from linear_core.loop.forced import shared_probability
from linear_core.loop.sampling import filter_logits
from linear_core.plan import CachePlan, SamplePlan
from tests.loop.test_replay import setting
from tests.tiny import decode

FEW = CachePlan("line", 2, 2, 1)
SAMPLES = {
    "plain": SamplePlan(seed=3, guidance=1.0),
    "guided": SamplePlan(seed=3, guidance=2.5),
    "guided for a while": SamplePlan(seed=3, guidance=2.5, guidance_interval=9),
    "restricted": SamplePlan(seed=3, guidance=2.5, temperature=0.7, top_k=6, top_p=0.8),
    "greedy": SamplePlan(seed=3, guidance=2.5, temperature=0.0),
}


@pytest.mark.parametrize("model", ["class", "text", "toy eol"])
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_shared_is_the_overlap_of_what_is_drawn_from(model, sample):
    """With the logits that the few lines drew from, written down then, beside those of the full cache."""
    decoder, prompt = setting(model)
    run = decode(decoder, prompt, FEW, sample)
    rows = decoder.with_unconditional(prompt) if sample.guided else prompt
    codes = run.tokens.repeat(rows.rows // prompt.rows, 1, 1)
    full = forced_logits(decoder, rows, codes, FULL)
    cols, stride = decoder.grid.cols, decoder.grid.stride
    expected = torch.zeros(prompt.rows, decoder.grid.rows * cols, dtype=torch.float64)
    for place in range(expected.shape[1]):
        number = place // cols * stride + place % cols
        odds = []
        for logits in (full[:, place], run.logits[number]):
            yes = logits[: prompt.rows]
            if sample.guides(number):
                no = logits[prompt.rows :]
                yes = no + sample.guidance * (yes - no)
            yes = filter_logits(yes, sample.top_k, sample.top_p, sample.temperature)
            odds.append((yes / (sample.temperature or 1e-9)).softmax(-1))
        expected[:, place] = torch.minimum(*odds).sum(-1)
    found = torch.cat(list(shared_probability(decoder, prompt, run.tokens, FEW, sample)), 1)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert 0.1 < found.mean() < 0.99, "these few lines do lose something"


def test_the_full_cache_shares_all_with_itself():
    decoder, prompt = setting("class")
    run = decode(decoder, prompt, FULL, SAMPLES["guided"])
    for plan in (FULL, CachePlan("line", 7), CachePlan("fold", 40)):
        lines = list(shared_probability(decoder, prompt, run.tokens, plan, SAMPLES["guided"]))
        assert [line.shape for line in lines] == [(2, 5)] * 7
        torch.testing.assert_close(torch.stack(lines), torch.ones(7, 2, 5))
