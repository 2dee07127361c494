"""The checklist of a release: what has to be so before a version is tagged and sent to the registry.

    python3 dev.py release

Changes nothing. Of the tests only the archive's are run here: what ran, on which commit and how it went stands in
tests/versions.json, and counts as long as no file that a user gets, and no test, has changed since.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests import versions

ROOT = versions.ROOT
FLOOR = re.compile(r'requires-comfyui = ">=(.+)"')
TESTED = ("__init__.py", "linear_core", "nodes", "web", "workflows", "pyproject.toml", "requirements.txt", "tests")
ARCHIVE = ("-m", "pytest", "-p", "no:cacheprovider", "tests/project/test_packaging.py")
Check = Callable[[], str]  # what is not done; an empty text: it is


def text(name: str) -> str:
    path = ROOT / name
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def version() -> str:
    return re.search(r'^version = "(.+)"$', text("pyproject.toml"), re.M)[1]


def number(version: str) -> tuple[int, ...]:
    """1.2.10 as what it is ordered by; tags begin with a v."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def changelog() -> str:
    found = re.search(r"^## \[(.+?)\](.*)$", text("CHANGELOG.md").replace("## [Unreleased]", "", 1), re.M)
    if found is None:
        return "CHANGELOG.md lists no version"
    if found[1] != version():
        return f"CHANGELOG.md's newest version is {found[1]}, pyproject.toml's {version()}"
    return "" if re.fullmatch(r" - \d{4}-\d\d-\d\d", found[2]) else f"CHANGELOG.md gives {found[1]} no date"


def unreleased() -> str:
    found = re.search(r"^## \[Unreleased\]\n(.*?)^## ", text("CHANGELOG.md"), re.M | re.S)
    return "CHANGELOG.md has changes that belong to no version" if found and found[1].strip() else ""


def newer() -> str:
    tags = sorted((tag for tag in versions.git("tag", "--list", "v*").split() if number(tag)), key=number)
    if tags and number(version()) <= number(tags[-1]):
        return f"{version()} is not newer than {tags[-1]}"
    return ""


def clean() -> str:
    changed = versions.git("status", "--porcelain").splitlines()
    return f"not committed: {', '.join(line[2:].strip() for line in changed[:5])}" if changed else ""


def golden() -> str:
    folder = ROOT / "tests" / "fixtures" / "golden" / version()
    if any(folder.rglob("*.json")):
        return ""
    return f"{folder.relative_to(ROOT).as_posix()} has no workflows of this version, for later ones to load"


def unchanged_since(commit: str) -> bool:
    """Whether what was tested at `commit` is what there is now; git knows none with a +."""
    paths = [*TESTED, *(f":!{path}" for path in versions.WRITTEN)]
    command = ["git", "-c", f"safe.directory={ROOT.as_posix()}", "diff", "--quiet", commit, "--", *paths]
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def tested(what: str, is_one: Callable[[dict], bool]) -> str:
    """Whether a row of the table is of these tests, on what there is now, and none failed."""
    found = [row for row in versions.rows() if is_one(row)]
    if not found:
        return f"tests/versions.json has no run of {what}"
    current = [row for row in found if unchanged_since(row["commit"])]
    if not current:
        return f"{what} ran on {found[-1]['commit']}, and what was tested has changed since"
    if failed := sum(row["failed"] for row in current):
        return f"{what}: {failed} tests failed"
    return ""


def default() -> str:
    return tested("all tests", lambda row: row["tests"] == "all")


def hosts() -> list[str]:
    """The ComfyUI that pyproject.toml names as the oldest, and the newest that tests have run in."""
    floor = FLOOR.search(text("pyproject.toml"))[1]
    known = [row["comfyui"] for row in versions.rows() if row["comfyui"]]
    return [floor, max(known, key=number, default="")]


def host_floor() -> str:
    floor, _ = hosts()
    return tested(f"ComfyUI {floor}", lambda row: row["comfyui"] == floor and row["tests"] != "in part")


def host_newest() -> str:
    floor, newest = hosts()
    if number(newest) <= number(floor):
        return f"tests have run in no ComfyUI newer than {floor}"
    return tested(f"ComfyUI {newest}", lambda row: row["comfyui"] == newest and row["tests"] != "in part")


def table() -> str:
    page = text("docs/compatibility.md")
    same = versions.OPEN in page and page == versions.with_table(page, versions.rows())
    return "" if same else "its table is not what tests/versions.json says; python tests/versions.py writes it"


def mutations() -> str:
    found = re.search(r"^(\d+) of (\d+) mutations were noticed", text("tests/mutations.md"), re.M)
    if found is None:
        return "tests/mutations.md tells of no run"
    if found[1] != found[2]:
        return f"{int(found[2]) - int(found[1])} mutations survived, or were not tried"
    tried = re.findall(r"^\|.*\| (\S+) \|$", text("tests/mutations.md"), re.M)[1:]  # below the head
    if old := sum(not unchanged_since(on) for on in set(tried)):
        return f"some were tried on {old} older commits, and what was tested has changed since"
    return ""


def archive() -> str:
    """The zip holds what it should and passes the registry's gates: the tests that say so, none of them skipped."""
    done = subprocess.run([sys.executable, *ARCHIVE], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    last = (done.stdout.strip().splitlines() or ["pytest did not start"])[-1]
    return "" if done.returncode == 0 and "skipped" not in last else f"{' '.join(ARCHIVE[1:2])}: {last}"


CHECKS: dict[str, Check] = {
    "CHANGELOG.md and pyproject.toml agree": changelog,
    "no change is left without a version": unreleased,
    "the version is newer than the last tag": newer,
    "everything is committed": clean,
    "workflows of this version are kept": golden,
    "all tests passed": default,
    "and in the oldest ComfyUI": host_floor,
    "and in the newest": host_newest,
    "docs/compatibility.md is up to date": table,
    "every mutation was noticed": mutations,
    "the archive passes the registry's gates": archive,
}
THEN = """By hand: the pictures of the README; then
    git tag v{version} && git push --tags && comfy node publish"""


def main() -> int:
    """Print the list; exit status 1 where something is not done."""
    print(f"LineAR {version()}")
    left = 0
    for name, check in CHECKS.items():
        problem = check()
        left += bool(problem)
        print(f"[{' ' if problem else 'x'}] {name}{problem and f': {problem}'}", flush=True)
    print(f"{left} of {len(CHECKS)} not done." if left else THEN.format(version=version()))
    return int(left > 0)


if __name__ == "__main__":
    sys.exit(main())
