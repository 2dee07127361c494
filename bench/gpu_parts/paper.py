"""The paper's efficiency table: measured where it fits this GPU's memory, else extrapolated from a smaller batch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from bench.gpu import Ask
from bench.gpu_parts.common import Result, attempts, shape_of
from bench.paper_table import PAPER, rows_of

ORDER = ("LlamaGen-XL", "Janus-Pro-1B", "LlamaGen-XXL", "Janus-Pro-7B", "Lumina-mGPT-768", "Lumina-mGPT-1024")


def run(ask: Ask) -> Iterator[Result]:
    assert set(ORDER) == set(PAPER)
    order = ORDER[:2] if ask.dry else ORDER
    settings = argparse.Namespace(
        device=ask.device, measure=True, lines=1, batch=2 if ask.dry else 0, bandwidth=3.84, operations=600.0
    )
    yield from attempts(ask, [({"model": name}, partial(table, ask, name, settings)) for name in order])


def table(ask: Ask, name: str, settings: argparse.Namespace) -> Result:
    return {"rows": rows_of(name, settings, shape_of(ask, name))}
