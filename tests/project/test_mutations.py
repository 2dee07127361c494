"""tests/mutations.py: its list and the stored table are of today, and in a pack of one file it finds what it should."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys

import pytest

from tests import mutations
from tests.mutations import MUTATIONS, ROOT, occurrences

STALE = "python tests/mutations.py --record"
CORE = """
LIMIT = 3

def double(n):
    return 2 * n

def rest(n):
    while n >= LIMIT:
        n -= LIMIT
    return n

def unused():
    return 1
"""
OPTIONS = """[tool.pytest.ini_options]
addopts = "--import-mode=importlib"
markers = ["host", "browser"]
"""
TESTS = """
from linear_core import numbers

def test_double():
    assert numbers.double(4) == 8

def test_rest():
    assert numbers.rest(7) == 1

def test_source():
    assert "import" not in open(numbers.__file__).read()
"""
MACHINE = """
def circumstances(device):
    return {"device": "a processor", "cores": 2, "python": "3", "torch": "2", "date": "2026-01-01T00:00:00"}
"""  # in place of the real one, which imports torch and so takes seconds
BROKEN = [
    ("numbers.py", "2 * n", "3 * n", "doubles thrice"),
    ("numbers.py", "LIMIT = 3", "LIMIT = 4", "too high a limit"),
    ("numbers.py", "n -= LIMIT", "n -= 0", "no end"),
    ("numbers.py", "return 2", "return import 2", "no Python"),
    ("numbers.py", "return 1", "return 1  # import", "read, not run"),
]


def test_mutations_still_apply():
    """Each text of tests/mutations.py stands exactly once in its file, so that list does not rot."""
    stale = [(file, old, n) for file, old, _, _ in MUTATIONS if (n := occurrences(file, old)) != 1]
    assert stale == [], "bring tests/mutations.py up to date"


def test_the_table_is_of_mutations_there_are_and_says_who_noticed_them():
    """Those that are missing, `--missing --record` tries; a release needs them all."""
    found = mutations.recorded()
    assert list(found) == [key for file, _, _, breaks in MUTATIONS if (key := (file, breaks)) in found], STALE
    for what, (who, _) in found.items():
        file, _, test = who.removesuffix(" hangs").partition("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8") if file.endswith(".py") else ""
        assert re.search(rf"^def {test}\b", text, re.M), f"{what}: {who}; {STALE}"
    assert f"in {len(found)} ways" in (ROOT / "README.md").read_text(encoding="utf-8"), STALE


@pytest.mark.parametrize(
    ("old", "lines"),
    [
        ("2 * n", {5}),
        ("\n    return 2", {5}),
        ("LIMIT = 3", {2}),
        ("n -= LIMIT", {9}),
        ("while n >=", {8, 9}),
        ("LIMIT\n    return n", {7, 8, 9, 10}),
        ("n\n\ndef unused", set(range(1, 15))),
    ],
)
def test_the_lines_of_a_change_are_those_of_the_statement_around_it(old, lines, tmp_path, monkeypatch):
    (tmp_path / "linear_core").mkdir()
    (tmp_path / "linear_core" / "numbers.py").write_text(CORE)
    monkeypatch.setattr(mutations, "ROOT", tmp_path)
    assert mutations.changed_lines("numbers.py", old) == lines


def test_who_noticed_last_time_comes_first_then_who_reaches_the_lines_then_all_others(monkeypatch):
    """Seven tests, named in the order of their seconds; a, c and e reach line 5, d another line, b another file."""
    names = [f"tests/test_x.py::{letter}" for letter in "abcdefg"]
    a, b, c, d, e, f, g = names
    lines = {test: {"numbers.py": [5, 6]} for test in (a, c, e)} | {d: {"numbers.py": [2]}, b: {"other.py": [5]}}
    known = {"seconds": {name: place for place, name in enumerate(names)}, "lines": lines}
    monkeypatch.setattr(mutations, "FEW", 2)
    monkeypatch.setattr(mutations, "changed_lines", lambda file, old: {4, 5})
    runs = mutations.plan(BROKEN[0], known, "test_x.py::g hangs", count=False)
    assert [run.order for run in runs] == [[g], [a, c], [e], [b, d, f, g, a, c, e]]
    assert [run.rest for run in runs] == [False, False, False, True]
    assert [run.files for run in runs] == [["tests/test_x.py"]] * 3 + [["tests"]]
    (whole,) = mutations.plan(BROKEN[0], known, "", count=True)
    assert whole.order == [a, c, e] and not whole.stop and not whole.rest


def test_cases_that_reach_the_same_files_wait_the_longer_the_more_there_were():
    seconds = {"x[0]": 1.0, "x[1]": 1.2, "x[2]": 1.5, "x[3]": 1.8, "y": 2.0, "z": 4.0}
    lines = {test: {"other.py" if test == "x[3]" else "numbers.py": [1]} for test in seconds}
    known = {"seconds": seconds, "lines": lines}
    assert mutations.in_turn(seconds, known) == ["x[0]", "x[3]", "y", "x[1]", "z", "x[2]"]


def test_what_is_computed_for_several_tests_counts_for_all_of_the_file_with_its_parameters():
    lines = {"x.py::a[1]": {"numbers.py": [3, 5]}, "x.py::b[1]": {"numbers.py": [4]}, "x.py::c": {"numbers.py": [9]}}
    found = mutations.shared(lines, [*lines, "x.py::b[2]", "y.py::a[1]"])
    assert found["x.py::a[1]"] == found["x.py::b[1]"] == {"numbers.py": [3, 4, 5]}
    assert (found["x.py::c"], found["x.py::b[2]"], found["y.py::a[1]"]) == ({"numbers.py": [9]}, {}, {})


@pytest.fixture
def pack(tmp_path):
    """A pack of one file, tests/mutations.py with it, which breaks it in other ways and waits but a second."""
    script = (ROOT / "tests" / "mutations.py").read_text(encoding="utf-8")
    table = next(n for n in ast.parse(script).body if isinstance(n, ast.AnnAssign) and n.target.id == "MUTATIONS")
    script = script.replace(ast.get_source_segment(script, table), f"MUTATIONS = {BROKEN}")
    for name, quick in (("PATIENCE", 1), ("SHARED", ())):
        script = re.sub(rf"^{name} = .+?$", f"{name} = {quick}", script, count=1, flags=re.M)
    files = {
        "linear_core/__init__.py": "",
        "linear_core/numbers.py": CORE,
        "tests/mutations.py": script,
        "tests/test_numbers.py": TESTS,
        "pyproject.toml": OPTIONS,
        "README.md": "breaks it in 0 ways",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "machine.py").write_text(MACHINE)
    shutil.copy(ROOT / "tests" / "versions.py", tmp_path / "tests")  # --record asks it, too
    return tmp_path


def run(pack, *arguments):
    command = [sys.executable, "tests/mutations.py", *arguments]
    done = subprocess.run(command, cwd=pack, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout


def test_it_says_who_noticed_what(pack):
    pytest.importorskip("coverage")
    pytest.importorskip("torch")
    shutil.copy(ROOT / "bench" / "machine.py", pack / "bench")
    status, said = run(pack, "--record")
    table = (pack / "tests" / "mutations.md").read_text()
    found = {breaks: who for _, breaks, who, _ in mutations.ROW.findall(table)}
    assert found == {
        "doubles thrice": "test_numbers.py::test_double",
        "too high a limit": "test_numbers.py::test_rest",
        "no end": "test_numbers.py::test_rest hangs",
        "no Python": "test_numbers.py",
        "read, not run": "test_numbers.py::test_source",
    }
    assert (status, said.splitlines()[-1][:34]) == (0, "5 of 5 mutations were noticed, in ")
    assert (pack / "README.md").read_text() == "breaks it in 5 ways"


def test_what_nobody_notices_survives(pack):
    pytest.importorskip("coverage")
    tests = pack / "tests" / "test_numbers.py"
    tests.write_text(TESTS.replace("not in", "in"))
    status, said = run(pack)
    assert status == 1
    assert said.splitlines()[1:] == ["The tests fail before anything is broken: test_numbers.py::test_source"]
    tests.write_text(TESTS[: TESTS.index("def test_source")])
    core = pack / "linear_core" / "numbers.py"
    core.write_text(CORE.replace("LIMIT = 3", "LIMIT = 1 + 2"))
    status, said = run(pack, "limit", "read", "doubles")
    assert status == 1
    first, before, *rows, last = [re.sub(r"\s+", " ", line) for line in said.splitlines()]
    assert first == "numbers.py too high a limit DOES NOT APPLY: its text occurs 0 times"
    assert before.startswith("unbroken: tests/test_numbers.py") and last.startswith("1 of 3 mutations were noticed")
    assert set(rows) == {"numbers.py doubles thrice test_numbers.py::test_double", "numbers.py read, not run SURVIVED"}


def test_what_is_written_down_stays_and_what_is_missing_is_tried(pack):
    pytest.importorskip("coverage")
    assert run(pack, "--record", "doubles")[0] == 0
    assert (pack / "README.md").read_text() == "breaks it in 1 ways"
    status, said = run(pack, "--record", "--missing", "doubles", "Python")
    assert (status, said.splitlines()[-1][:34]) == (0, "1 of 1 mutations were noticed, in ")
    found = mutations.ROW.findall((pack / "tests" / "mutations.md").read_text())
    assert [row[1:] for row in found] == [
        ("doubles thrice", "test_numbers.py::test_double", "-"),
        ("no Python", "test_numbers.py", "-"),
    ]
