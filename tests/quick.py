"""`python3 dev.py test --quick`: of all tests those that are known to notice a mistake in the core, a minute's worth.

tests/mutations.md names, for each way to break the core, the test that noticed it. Those tests run: of one with many
cases CASES for every mutation that it noticed, spread evenly over the list.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).parent / "mutations.md"
CASES = 6
NOTICED = re.compile(r"\| `((?:\w+/)*test_\w+\.py::\w+)(?: hangs)?` \|")


def noticing(record: str) -> Counter[str]:
    """How many mutations each test noticed, by file and name."""
    return Counter(NOTICED.findall(record))


def spread(cases: list[Any], most: int) -> list[Any]:
    """At most so many of these, evenly spaced, the first among them."""
    count = min(len(cases), most)
    return [cases[i * len(cases) // count] for i in range(count)]


def choose(items: list[Any], record: str) -> list[Any]:
    """The items to run, in their order."""
    cases: dict[str, list[Any]] = {name: [] for name in noticing(record)}
    for item in items:
        name = item.nodeid.split("[")[0].removeprefix("tests/")
        if name in cases:
            cases[name].append(item)
    return [item for name, count in noticing(record).items() for item in spread(cases[name], CASES * count)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the tests that notice most mistakes, for a minute")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.quick:
        return
    chosen = {id(item) for item in choose(items, RECORD.read_text(encoding="utf-8"))}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in chosen])
    items[:] = [item for item in items if id(item) in chosen]
