"""What makes the step fast: nothing is copied that need not be, packed matrices, attention for one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linear_core.cache import attention
from linear_core.cache.attention import attend
from linear_core.loop.generate import generate
from linear_core.models import packed
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from tests.tiny import janus, llamagen, words

SAMPLE = SamplePlan(3, guidance=2.0)
PROMPT = class_prompt([1, 3])


class Allocations(TorchDispatchMode):
    """The size of every tensor that an operation makes: those that do not lie in what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.sizes.append(x.untyped_storage().nbytes())
        return result


def allocated(model, prompt, plan: CachePlan, static: bool) -> tuple[list[list[list[int]]], int]:
    """Sizes of what each token of each line makes, and bytes of a layer's keys that the last token reads."""
    lines, caches = [[]], []

    def step(*inputs):
        with Allocations() as made:
            logits = model.step(*inputs)
        lines[-1].append(made.sizes)
        caches.append(inputs[-1])
        return logits

    for _ in generate(model, prompt, plan, SAMPLE, step=step, static=static):
        lines.append([])
    keys, _, _ = caches[-1].read(0)
    return lines[:-1], keys.numel() * keys.element_size()


@pytest.mark.parametrize("kind", ["llamagen", "janus"])
@pytest.mark.parametrize("plan", [CachePlan("line", 3, 2, 1), CachePlan("fold", 3, 2, 1), CachePlan("full")], ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_a_step_copies_neither_keys_nor_values(kind, plan, static, monkeypatch):
    """Nothing that a token makes is as large as one layer's keys, and what it makes does not grow.

    It is the same from line 2 on where static, else from the first eviction on. A full cache that is not static grows,
    and with it what attention needs: some numbers a slot and head.
    """
    monkeypatch.setattr(attention, "PRODUCTS", kind == "llamagen")  # each way of attention once, whatever the CPU
    model, prompt = (llamagen(8, 9), PROMPT) if kind == "llamagen" else (janus(8, 9), words([5, 3]))
    lines, keys = allocated(model, prompt, plan, static)
    assert max(size for line in lines for token in line for size in token) < keys / 2
    if static or plan.policy != "full":
        assert len({sum(token) for line in lines[1 if static else plan.budget :] for token in line}) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["llamagen", "janus"])
def test_no_kernel_copies_keys_or_values_within(kind, dtype):
    """What kernels do inside, as a profile shows: nothing as large as a layer's keys, where the cache is full."""
    model, prompt = (llamagen(8, 9), PROMPT) if kind == "llamagen" else (janus(8, 9), words([5, 3]))
    seen = []

    def step(*inputs):
        if int(inputs[1]) - inputs[4].grid.prompt != 6 * 9 + 4:
            return model.step(*inputs)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as told:
            logits = model.step(*inputs)
        seen.extend(math.prod(e.input_shapes[0]) for e in told.events() if e.name == "aten::copy_")
        seen.append(-inputs[4].read(0)[0].numel())
        return logits

    model = model.to(dtype)
    for _ in generate(model, prompt, CachePlan("line", 3, 2, 1), SAMPLE, step=step):
        pass
    assert max(seen) < -min(seen) / 2


def test_copies_would_be_seen():
    keys = torch.zeros(2, 3, 50, 8)
    with Allocations() as made:
        attend(torch.zeros(2, 3, 1, 8), keys.transpose(0, 1).contiguous().transpose(0, 1), keys, torch.zeros(2, 3, 50))
    assert keys.nbytes in made.sizes


# -- attention for one query -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_one_query_sees_what_many_see(dtype, tolerance):
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=source).to(dtype) for n in (1, 40, 40))
    bias = torch.randn(2, 3, 40, generator=source).to(dtype).masked_fill(torch.arange(40) % 3 == 0, float("-inf"))
    expected = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=bias.double()[:, :, None])
    found = attend(q, k, v, bias)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


# -- packed matrices ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not packed.available(), reason="this PyTorch cannot pack")
@pytest.mark.parametrize("kind", ["llamagen", "janus"])
def test_packed_matrices_compute_the_same(kind):
    make, prompt = (llamagen, PROMPT) if kind == "llamagen" else (janus, words([5, 3]))
    plain, fast = make(5, 4), make(5, 4)
    linears = [m for m in plain.modules() if type(m) is torch.nn.Linear]
    assert packed.pack(fast) == len(linears) and packed.pack(fast) == 0
    logits = {}
    for model in (plain, fast):

        def step(*inputs, model=model):
            logits.setdefault(model, []).append(model.step(*inputs))
            return logits[model][-1]

        for _ in generate(model, prompt, CachePlan("line", 2, 1, 1), SAMPLE, step=step):
            pass
    torch.testing.assert_close(torch.stack(logits[fast]), torch.stack(logits[plain]), atol=1e-4, rtol=1e-4)


def test_only_plain_matrices_on_the_cpu_are_packed():
    class Host(torch.nn.Linear):
        """A host's layer, which moves its weight."""

    model = torch.nn.Sequential(Host(4, 4), torch.nn.Linear(4, 4).double(), torch.nn.Linear(4, 4, device="meta"))
    assert packed.pack(model) == 0
