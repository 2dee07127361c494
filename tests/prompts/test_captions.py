"""Caption cleaning is LlamaGen's: recorded results of the published code, which fixtures/captions.json names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from linear_core.prompts.caption import clean

FIXTURE = Path(__file__).parents[1] / "fixtures" / "captions.json"
RECORDED = json.loads(FIXTURE.read_text(encoding="utf-8"))["captions"]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["caption"][:30].encode("ascii", "replace").decode())
def test_as_published(case: dict[str, str]) -> None:
    assert clean(case["caption"]) == case["cleaned"]


def test_the_record_is_not_trivial() -> None:
    """Most of the captions are changed by cleaning, in more than case."""
    assert len(RECORDED) >= 40
    assert sum(case["cleaned"] != case["caption"].lower().strip() for case in RECORDED) > 50


def test_text_decoded_wrongly_is_left() -> None:
    """The one known difference: upstream makes a dagger of this."""
    assert clean("don\u00e2\u20ac\u2122t") == "don\u00e2\u20ac t"
