"""tests/release.py in a small repository of its own: every line of the list is not done for its reason, then done."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests import release, versions

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="git was not found")
ROW = {
    "comfyui": "", "system": "Linux", "python": "3.11.7", "packages": "pinned", "torch": "2.13.0",
    "transformers": "4.57.6", "frontend": "", "tests": "all", "passed": 3, "skipped": 2,
    "failed": 0, "date": "2026-11-21", "commit": "",
}  # fmt: skip


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """A pack of version 0.2.0, of which everything is as it should be."""
    for module in (versions, release):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(versions, "RECORD", tmp_path / "tests" / "versions.json")
    monkeypatch.setattr(versions, "PAGE", tmp_path / "docs" / "compatibility.md")
    monkeypatch.setattr(release, "ARCHIVE", ("-c", "print('2 passed')"))
    files = {
        "pyproject.toml": 'version = "0.2.0"\nrequires-comfyui = ">=0.14.0"\n',
        "CHANGELOG.md": "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n## [0.1.0] - 2026-11-21\n",
        "docs/compatibility.md": f"{versions.OPEN}\n{versions.CLOSE}\n",
        "linear_core/grid.py": "",
        "tests/fixtures/golden/0.2.0/workflows/first_image.json": "{}",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    git(tmp_path, "init", "-q")
    keep(tmp_path)
    git(tmp_path, "tag", "v0.1.0")
    notice(tmp_path, 3, versions.commit())
    for row in ({}, {"comfyui": "0.14.0", "tests": "host only"}, {"comfyui": "0.33.0", "tests": "host only"}):
        versions.add({**ROW, "commit": versions.commit(), **row})
    keep(tmp_path)
    return tmp_path


def notice(folder, count, commit):
    said = f"{count} of 3 mutations were noticed. A machine.\n\n| file | on |\n|---|---|\n| x | {commit} |\n"
    (folder / "tests" / "mutations.md").write_text(said, encoding="utf-8")


def git(folder, *arguments):
    author = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True)


def keep(folder):
    git(folder, "add", "--all")
    git(folder, "commit", "-qm", "x")


def change(folder, name, old="", new="", commit=True):
    text = (folder / name).read_text(encoding="utf-8") if old else ""
    assert old in text
    (folder / name).write_text(text.replace(old, new) if old else new, encoding="utf-8")
    if commit:
        keep(folder)


def left(capsys) -> dict[str, str]:
    """What is not done, and why."""
    status = release.main()
    lines = capsys.readouterr().out.splitlines()
    found = dict(line.removeprefix("[ ] ").split(": ", 1) for line in lines if line.startswith("[ ]"))
    assert sum(line.startswith("[") for line in lines) == len(release.CHECKS)
    assert status == int(bool(found))
    return found


def test_the_changelog_lists_the_version_that_this_is():
    assert release.changelog() == ""


def test_when_all_is_done_it_says_how_to_go_on(pack, capsys):
    assert release.main() == 0
    shown = capsys.readouterr().out
    assert shown.count("[x]") == len(release.CHECKS)
    assert "git tag v0.2.0" in shown


@pytest.mark.parametrize(
    ("file", "old", "new", "line", "why"),
    [
        ("CHANGELOG.md", "[0.2.0]", "[0.3.0]", "CHANGELOG.md and pyproject.toml agree", "newest version is 0.3.0"),
        ("CHANGELOG.md", " - 2026-12-01", "", "CHANGELOG.md and pyproject.toml agree", "no date"),
        (
            "CHANGELOG.md", "[Unreleased]\n", "[Unreleased]\n\n- a node\n", "no change is left without a version",
            "belong to no version",
        ),
        (
            "docs/compatibility.md", "3.11.7", "3.14.0", "docs/compatibility.md is up to date",
            "tests/versions.py writes it",
        ),
    ],
)  # fmt: skip
def test_one_thing_is_left(file, old, new, line, why, pack, capsys):
    change(pack, file, old, new)
    found = left(capsys)
    assert list(found) == [line] and why in found[line]


def test_a_version_that_was_tagged_is_not_released_again(pack, capsys):
    git(pack, "tag", "v0.10.0")
    assert left(capsys) == {"the version is newer than the last tag": "0.2.0 is not newer than v0.10.0"}


def test_a_file_that_is_not_committed(pack, capsys):
    change(pack, "notes.txt", new="x", commit=False)
    assert left(capsys) == {"everything is committed": "not committed: notes.txt"}


def test_workflows_of_this_version_are_missing(pack, capsys):
    (pack / "tests/fixtures/golden/0.2.0").rename(pack / "golden")
    keep(pack)
    found = left(capsys)
    assert "tests/fixtures/golden/0.2.0 has no workflows" in found["workflows of this version are kept"]


@pytest.mark.parametrize("file", ["linear_core/grid.py", "nodes/new.py", "tests/test_new.py"])
def test_what_was_tested_has_changed_since(file, pack, capsys):
    (pack / file).parent.mkdir(exist_ok=True)
    change(pack, file, new="x = 1\n")
    found = left(capsys)
    expected = ["all tests passed", "and in the oldest ComfyUI", "and in the newest", "every mutation was noticed"]
    assert list(found) == expected
    assert all("has changed since" in why for why in found.values())


def test_text_that_nothing_tests_may_change(pack, capsys):
    change(pack, "SECURITY.md", new="x")
    assert left(capsys) == {}


@pytest.mark.parametrize(
    ("row", "line", "why"),
    [
        ({"failed": 2}, "all tests passed", "2 tests failed"),
        ({"failed": 2, "comfyui": "0.14.0", "tests": "host only"}, "and in the oldest ComfyUI", "2 tests failed"),
    ],
)
def test_a_test_that_failed(row, line, why, pack, capsys):
    versions.add({**ROW, "commit": versions.rows()[0]["commit"], **row})
    keep(pack)
    found = left(capsys)
    assert list(found) == [line] and why in found[line]


def test_a_run_of_some_tests_or_of_what_was_not_committed_does_not_count(pack, capsys):
    versions.RECORD.write_text("[]")
    commit = versions.commit()
    for row in ({"tests": "in part"}, {"commit": commit + "+"}, {"comfyui": "0.14.0", "tests": "in part"}):
        versions.add({**ROW, "commit": commit, **row})
    keep(pack)
    found = left(capsys)
    assert "has changed since" in found["all tests passed"]
    assert "no run of ComfyUI 0.14.0" in found["and in the oldest ComfyUI"]
    assert "no ComfyUI newer than 0.14.0" in found["and in the newest"]


def test_a_mutation_that_survived_or_none_that_was_tried(pack, capsys):
    notice(pack, 1, versions.commit())
    keep(pack)
    assert left(capsys) == {"every mutation was noticed": "2 mutations survived, or were not tried"}
    notice(pack, 3, versions.commit() + "+")
    keep(pack)
    assert "has changed since" in left(capsys)["every mutation was noticed"]
    change(pack, "tests/mutations.md", new="")
    assert left(capsys) == {"every mutation was noticed": "tests/mutations.md tells of no run"}


@pytest.mark.parametrize("said", ["1 failed, 2 passed", "2 passed, 1 skipped"])
def test_gates_that_fail_or_do_not_run(said, pack, capsys, monkeypatch):
    monkeypatch.setattr(release, "ARCHIVE", ("-c", f"print({said!r}); raise SystemExit({int('failed' in said)})"))
    assert list(left(capsys)) == ["the archive passes the registry's gates"]
