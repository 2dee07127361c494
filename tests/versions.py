"""What was tested where: a row for each environment that tests have run in, and the table in docs/compatibility.md.

    python3 dev.py test --record                                the default tests, here
    python3 dev.py test --newest                                with the newest packages (--oldest: the lowest)
    COMFYUI_DIR=… python3 dev.py test -m host --record          those in a real ComfyUI
    python tests/versions.py                                    the table again, from tests/versions.json

A row is written by the run itself (a plugin of pytest, see conftest.py) and takes the place of an older one of the same
environment; nothing else writes any. A commit with a + had changes that were not committed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "versions.json"
PAGE = ROOT / "docs" / "compatibility.md"
OPEN, CLOSE = "<!-- versions: written by tests/versions.py -->", "<!-- /versions -->"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
WRITTEN = ("tests/versions.json", "tests/mutations.md", "README.md", "docs/compatibility.md")  # by recording itself
COLUMNS = {
    "python": "Python", "packages": "packages", "torch": "PyTorch", "transformers": "transformers",
    "comfyui": "ComfyUI", "frontend": "frontend", "system": "system", "tests": "tests", "passed": "passed",
    "skipped": "skipped", "failed": "failed", "when": "when",
}  # fmt: skip
SAME = ("python", "packages", "torch", "transformers", "comfyui", "system", "tests")  # the environment that a row is of
ASK = """
import importlib.metadata, json, platform, sys
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
names = {"torch": "torch", "transformers": "transformers", "frontend": "comfyui_frontend_package"}
found = {key: version(name) for key, name in names.items()}
print(json.dumps({"prefix": sys.prefix, "python": platform.python_version(), **found}))
"""


def git(*arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={ROOT.as_posix()}", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit that is tested, with a + where files differ from it; empty outside a checkout."""
    changed = git("status", "--porcelain", "--", ".", *(f":!{path}" for path in WRITTEN))
    head = git("rev-parse", "--short=9", "HEAD")
    return head + "+" * bool(head and changed)


def system() -> str:
    """Linux as its distribution calls itself, others by name and version."""
    if platform.system() == "Linux":
        try:
            return platform.freedesktop_os_release()["PRETTY_NAME"].replace("GNU/Linux ", "")
        except (OSError, KeyError):
            pass
    return f"{platform.system()} {platform.release()}"


def page(arguments: str) -> str:
    """Version of the page that ComfyUI's command line names, where it does."""
    found = re.search(r"--front-end-root[= ](\S+)", arguments)
    packages = Path(found[1]).parent.parent.glob("comfyui_frontend_package-*.dist-info") if found else ()
    return next((path.name.split("-")[1].removesuffix(".dist") for path in packages), "")


def packages(prefix: str) -> str:
    """Which of dev.py's environments this is, by its folder; empty for somebody else's."""
    folder, venv = Path(prefix).resolve(), (ROOT / ".venv").resolve()
    if folder == venv:
        return "pinned"
    return folder.name if folder.parent == venv else ""


def environment() -> dict[str, str]:
    """What the tests run with: this interpreter's packages, or, where COMFYUI_DIR names one, that ComfyUI's."""
    comfy = os.environ.get("COMFYUI_DIR")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable) if comfy else sys.executable
    row = {"comfyui": "", "system": system()}
    row |= json.loads(subprocess.check_output([python, "-c", ASK], text=True))
    row["packages"] = packages(row.pop("prefix"))
    if comfy:
        text = (Path(comfy).expanduser() / "comfyui_version.py").read_text(encoding="utf-8")
        row["comfyui"] = re.search(r'__version__ = "(.+)"', text)[1]
        row["frontend"] = page(os.environ.get("COMFYUI_ARGS", "")) or row["frontend"]
    else:
        row["frontend"] = ""  # those that the browser tests drive: see `driven`
    return row


def add(row: dict[str, Any]) -> None:
    """Put a row into the record, in place of an older one of the same environment, and the table into the page."""
    kept = [old for old in rows() if any(old[key] != row[key] for key in SAME)]
    ordered = sorted(
        [*kept, row], key=lambda row: ([int(n) for n in row["python"].split(".")], *(row[k] for k in SAME))
    )
    RECORD.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    write_table()


def rows() -> list[dict[str, Any]]:
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line for each row, and on which Pythons not all tests have run."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"|{'---|' * len(COLUMNS)}"]
    for row in rows:
        shown = {**row, "when": f"{row['date']}, {row['commit']}"}
        lines.append(f"| {' | '.join(str(shown[key]) if shown[key] != '' else '—' for key in COLUMNS)} |")
    seen = {".".join(row["python"].split(".")[:2]) for row in rows if row["tests"] == "all"}
    if missing := [version for version in PYTHONS if version not in seen]:
        lines += ["", f"Not run in full: Python {', '.join(missing)}."]
    return "\n".join(lines)


def with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table of these rows between its marks."""
    before, rest = page.split(OPEN)
    return f"{before}{OPEN}\n{table(rows)}\n{CLOSE}{rest.split(CLOSE)[1]}"


def write_table() -> None:
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), rows()), encoding="utf-8")


# The plugin ----------------------------------------------------------------------------------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--record", action="store_true", help="write what ran, and with what, into docs/compatibility.md")


def scope(config: Any) -> str:
    """Which tests were asked for."""
    if config.option.keyword or config.args_source.name == "ARGS":
        return "in part"
    return f"{config.option.markexpr} only" if config.option.markexpr else "all"


def driven(reports: list[Any]) -> str:
    """Versions of the page that tests drove in a browser."""
    found = (re.search(r"in_the_page\[.*?(\d+\.\d+\.\d+)", report.nodeid) for report in reports)
    return ", ".join(sorted({version[1] for version in found if version}))


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: Any) -> None:
    if not config.option.record or exitstatus not in (0, 1):  # broken off, or nothing was collected
        return
    reports = terminalreporter.stats
    count = {key: len(reports.get(key, [])) for key in ("passed", "skipped", "failed", "error")}
    seen = environment()
    row = {
        **seen,
        "frontend": seen["frontend"] or driven(reports.get("passed", [])),
        "tests": scope(config),
        "passed": count["passed"],
        "skipped": count["skipped"],
        "failed": count["failed"] + count["error"],
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
    }
    add(row)
    terminalreporter.write_line(f"{RECORD.relative_to(ROOT)}: {row}")


if __name__ == "__main__":
    write_table()
