"""The line cache under peft's adapters, which change prompts and caches. Only where peft is installed."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.57", reason="transformers 4.57 or newer")
peft = pytest.importorskip("peft", reason="peft")

from transformers import LlamaForCausalLM  # noqa: E402

from linear_core.errors import UserError  # noqa: E402
from linear_core.hf import LineCache  # noqa: E402
from linear_core.plan import CachePlan  # noqa: E402
from tests.test_hf import SIDE, passed, peaky, text_sizes, words  # noqa: E402

FEW = CachePlan(budget=2, anchors=2, recent=1)
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's own


def adapted(kind: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = peaky(LlamaForCausalLM(transformers.LlamaConfig(**text_sizes(4))))
    return peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **options)).eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LoraConfig", {"init_lora_weights": False}),
        ("PromptTuningConfig", {"num_virtual_tokens": 3}),
        ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    ],
)
def test_adapters(kind, options):
    """As without any cache; or a sentence, where peft itself does not find the cache."""
    model, (ids, mask) = adapted(kind, **options), words([6, 6])
    run = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    past = LineCache(model, (7, 5), CachePlan("full"), prompt=6 + options.get("num_virtual_tokens", 0))
    with torch.no_grad():
        expected, theirs = model.generate(**run, use_cache=False), model.generate(**run)
        if torch.equal(theirs, expected):
            assert torch.equal(model.generate(**run, **passed(past)), expected)
        else:  # peft 0.21 with transformers 5.24
            with pytest.raises(UserError, match=r"peft feeds its virtual tokens with each.*use a newer peft"):
                model.generate(**run, **passed(past))


def test_prefix_tuning_is_refused():
    """It would decode in a full cache of its own, without a word."""
    model, (ids, mask) = adapted("PrefixTuningConfig", num_virtual_tokens=3), words([6, 6])
    with pytest.raises(UserError, match=r"prefix tuning \(peft\) replaces it"):
        LineCache(model, (SIDE, SIDE), FEW)
    past = LineCache(model.get_base_model(), (SIDE, SIDE), FEW)
    with torch.no_grad(), pytest.raises(UserError, match=r"prefix tuning \(peft\) replaces it"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, **passed(past))
