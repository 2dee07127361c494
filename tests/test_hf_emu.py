"""transformers' Emu3 in a line cache: lines that end with a token, what closes the image, guidance in both rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from linear_core.grid import Grid  # noqa: E402
from linear_core.hf import CACHE_ARGUMENT, LineCache  # noqa: E402
from linear_core.plan import CachePlan  # noqa: E402
from tests.models import emu_official as official  # noqa: E402
from tests.models.test_parity_emu import theirs  # noqa: E402

ROWS, COLS = 6, 4
CODES = list(range(official.FIRST, official.FIRST + official.CODES))
IDS = official.ids()
CLOSING = [IDS["<|extra_201|>"], IDS["<|image end|>"], IDS["<|extra_204|>"]]
PROMPT, NEGATIVE = torch.tensor([[7, 30, 12, 99, 44, 3]]), torch.tensor([[7, 65, 3]])


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return theirs("emu3", official.decoder())


def allowed(_: int, ids: Tensor) -> list[int]:
    """The published rule: every line ends, the image is closed, and only codes come between."""
    drawn = len(ids) - PROMPT.shape[1]
    if drawn >= ROWS * (COLS + 1):
        return [CLOSING[min(drawn - ROWS * (COLS + 1), 2)]]
    return [official.EOL] if drawn % (COLS + 1) == COLS else CODES


def generate(model: torch.nn.Module, **options: object) -> tuple[list[int], Tensor]:
    """The tokens drawn, and the scores of codes at every step."""
    run = model.generate(
        PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=ROWS * (COLS + 1) + 2, do_sample=False,
        prefix_allowed_tokens_fn=allowed, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return run.sequences[0, PROMPT.shape[1] :].tolist(), torch.stack(run.scores)[:, 0, official.FIRST :]


@pytest.mark.parametrize("plan", [CachePlan("full"), CachePlan("fold", 2, 2, 1), CachePlan("line", 2, 2, 1)], ids=str)
def test_an_image_with_guidance(plan: CachePlan, model: torch.nn.Module) -> None:
    """With everything kept it is what `generate` draws with a full cache; with a budget, both rows are kept to it."""
    expected, theirs = generate(model, guidance_scale=3.0, negative_prompt_ids=NEGATIVE)
    assert expected[COLS] == official.EOL and expected[-2:] == CLOSING[:2]
    past = LineCache(model, Grid(ROWS, COLS, eol=official.EOL), plan)
    guidance = past.guidance(3.0, NEGATIVE)
    drawn, scores = generate(model, logits_processor=[guidance], **{CACHE_ARGUMENT: past})
    # Ours comes after the rule, and subtracts another constant.
    finite = theirs.isfinite().all(1)
    close = torch.isclose(scores[finite].log_softmax(-1), theirs[finite].log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert (drawn == expected and bool(close.all())) == (plan.policy == "full")
    for cache, prompt in ((past, PROMPT), (guidance.line_cache, NEGATIVE)):
        assert cache.slots.slots - prompt.shape[1] == plan.lines(cache.grid) * (COLS + 1)
