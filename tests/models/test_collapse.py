"""LlamaGen's prompt takes one weighted slot. The reference keeps every caption token in a slot of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.cache.line_cache import LineCache
from linear_core.models.llamagen import LlamaGen
from linear_core.plan import CachePlan, CacheShape, SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import Prompt
from tests.tiny import CAPTION, caption_prompt, decode, llamagen

ROWS, COLS = 6, 5


class Uncollapsed(LlamaGen):
    """Writes all T caption slots as they are: key zero, a value each, weight 1, or 0 for padding."""

    prompt_slots = CAPTION

    def cache_shape(self, prompt: int) -> CacheShape:
        c = self.config
        return CacheShape(c.layers, c.heads, c.width // c.heads, CAPTION, 4)

    def prefill(self, prompt: Prompt, cache: LineCache) -> Tensor:
        x = self.cls_embedding(prompt.tokens)
        place = torch.arange(CAPTION)
        there = place[None] >= prompt.pad[:, None]  # B T
        visible = (place[None, :] <= place[:, None])[None] & there[:, None] | (place[None] == place[:, None])[None]
        for layer, block in enumerate(self.layers):

            def attend(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                cache.write_prompt(layer, torch.zeros_like(k), v, there.float())
                return F.scaled_dot_product_attention(q * 0, k * 0, v, attn_mask=visible[:, None])

            x = block(x, lambda t: t, attend)
        return self.output(self.norm(x[:, -1]))


def pair() -> tuple[LlamaGen, Uncollapsed]:
    collapsed = llamagen(ROWS, COLS, text=True)
    reference = Uncollapsed(collapsed.config, collapsed.grid)
    reference.load_state_dict(collapsed.state_dict())
    return collapsed, reference.requires_grad_(False).eval()


@pytest.mark.parametrize("release", ["strict", "lazy"])
@pytest.mark.parametrize("name", POLICIES)
def test_one_slot_or_all_of_them(name: str, release: str) -> None:
    """Two captions of different length in a batch, guidance on, lines evicted: the same logits at every step."""
    plan = CachePlan(name, budget=2, anchors=2, recent=1, release=release)
    runs = [decode(model, caption_prompt([2, 5]), plan, SamplePlan(guidance=3.0, seed=4)) for model in pair()]
    collapsed, reference = (torch.stack(run.logits) for run in runs)
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    torch.testing.assert_close(collapsed, reference, rtol=0, atol=2e-5)
    assert runs[0].cache.slots == 1 + plan.lines(runs[0].grid) * COLS
    assert runs[1].cache.slots - runs[0].cache.slots == CAPTION - 1


def test_the_reference_notices() -> None:
    """A collapsed slot of weight 1, whatever the caption's length, would be seen here."""
    collapsed, reference = pair()
    write = LineCache.write_prompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineCache, "write_prompt", lambda c, layer, k, v, w: write(c, layer, k, v, w.clamp(max=1)))
        wrong = decode(collapsed, caption_prompt([2, 5]), CachePlan("full"), SamplePlan(guidance=3.0, temperature=0))
    right = decode(reference, caption_prompt([2, 5]), CachePlan("full"), SamplePlan(guidance=3.0, temperature=0))
    assert (wrong.logits[1] - right.logits[1]).abs().max() > 1e-2
