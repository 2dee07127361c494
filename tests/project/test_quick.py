"""The quick run: which tests it takes, from the list of what each noticed."""

from __future__ import annotations

from types import SimpleNamespace

from tests import quick

RECORD = """
| file | what is broken | noticed by | on |
|---|---|---|---|
| `grid.py` | one | `loop/test_a.py::test_many` | 123 |
| `cache/fold.py` | two | `loop/test_a.py::test_many` | 123 |
| `grid.py` | three | `test_b.py::test_one hangs` | 123 |
| `grid.py` | four | SURVIVED | 123 |
"""


def test_it_takes_what_noticed_something_and_more_cases_of_what_noticed_more(monkeypatch):
    monkeypatch.setattr(quick, "CASES", 2)
    ids = [f"tests/loop/test_a.py::test_many[{n}]" for n in range(12)]
    ids += ["tests/test_b.py::test_one", "tests/test_b.py::test_other", "tests/test_a.py::test_many[1]"]
    chosen = quick.choose([SimpleNamespace(nodeid=name) for name in ids], RECORD)
    assert [item.nodeid for item in chosen] == [ids[0], ids[3], ids[6], ids[9], ids[12]]


def test_every_test_that_the_list_names_is_there():
    """Else a renamed test would fall out of the quick run without a word."""
    named = quick.noticing(quick.RECORD.read_text(encoding="utf-8"))
    assert len(named) > 50
    for name in named:
        file, _, test = name.partition("::")
        assert f"\ndef {test}(" in (quick.RECORD.parent / file).read_text(encoding="utf-8"), name
