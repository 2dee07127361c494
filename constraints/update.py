"""Writes the constraints: exact versions of all that dev.py installs, on every supported Python.

    python3 dev.py update

It takes the newest versions that pyproject.toml allows and that go together. Needs pip alone, and no other Python than
the one it runs on.
"""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import constraints  # noqa: E402
import dev  # noqa: E402
from tests.versions import PYTHONS  # noqa: E402

HEAD = "# Exact versions of {what}.\n# `python3 dev.py update` writes this file.\n"
MAIN = "all that dev.py installs for the demo and the tests"
REGISTRY = "the registry's own tools and all that they bring"
BROWSER = """what the browser tests drive: the page of the newest ComfyUI, the page of the oldest
# supported one, which stays what it is, and the driver, which comes from npm"""
SYSTEMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
]
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)), "win_amd64", "macosx_14_0_arm64"]


def pretend(python: str, arguments: list[str]) -> None:
    """Run pip as if on this Python, and on all systems at once: what any of them needs belongs to the answer.

    pip's own --python-version and --platform choose the wheels, but its environment markers stay those of the
    interpreter that it runs on.
    """
    from pip._vendor.packaging.markers import Marker

    ask = Marker.evaluate
    versions = {"python_version": python, "python_full_version": f"{python}.0"}

    def evaluate(self: Marker, environment: Any = None, *more: Any, **named: Any) -> bool:
        return any(ask(self, {**(environment or {}), **versions, **system}, *more, **named) for system in SYSTEMS)

    Marker.evaluate = evaluate
    sys.argv = ["pip", *arguments]
    runpy.run_module("pip", run_name="__main__")


def resolve(requirements: list[str], python: str) -> dict[str, str]:
    """The newest versions that satisfy these requirements on this Python, with all that they bring."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, __file__, "pretend", python, "install", "-qq", "--dry-run", "--ignore-installed",
            "--only-binary", ":all:", "--python-version", python, *(f"--platform={name}" for name in PLATFORMS),
            "--target", folder, "--report", report, *requirements,
        ]  # fmt: skip
        aloud = [part for part in command if part != "-qq"]  # a quiet pip does not say what contradicts what
        # Wheels that lie on one machine only must not decide what all others get.
        if dev.run(command, PIP_FIND_LINKS="") and dev.run(aloud, PIP_FIND_LINKS=""):
            raise SystemExit(f"pip finds no versions for Python {python}; it says why above. Nothing was changed.")
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    versions = {constraints.normal(part["metadata"]["name"]): part["metadata"]["version"] for part in found}
    return {name: version.split("+")[0] for name, version in versions.items()}  # 2.13.0+cpu is a build of 2.13.0


def lines(found: dict[str, dict[str, str]]) -> list[str]:
    """Constraints from what was found on each Python: one line for a package, or one for each run of Pythons."""
    result = []
    for name in sorted(set().union(*found.values())):
        runs: list[tuple[str, str]] = []  # the first Python with this version
        for python, versions in found.items():
            if name in versions and (not runs or runs[-1][1] != versions[name]):
                runs.append((python, versions[name]))
        for at, (first, version) in enumerate(runs):
            bounds = [f'python_version >= "{first}"'] if at else []
            bounds += [f'python_version < "{runs[at + 1][0]}"'] if at + 1 < len(runs) else []
            result.append(f"{name}=={version}" + ("; " if bounds else "") + " and ".join(bounds))
    return result


def browser() -> list[str]:
    """The newest page and driver; without npm the driver stays as it is."""
    frontend, driver = "comfyui-frontend-package", "playwright-core"
    known = constraints.pins("browser")
    newest = resolve([frontend], PYTHONS[-1])[frontend]
    oldest = known[frontend][-1]
    npm = shutil.which("npm")
    if npm:
        asked = subprocess.run([npm, "view", driver, "version"], check=True, capture_output=True, text=True)
        version = asked.stdout.strip()
    else:
        version = known[driver][0]
        dev.say(f"npm was not found, so {driver} stays {version}.")
    return [f"{frontend}=={newest}", f"{frontend}=={oldest}", f"{driver}=={version}"]


def changes(old: str, new: str) -> list[str]:
    """The lines that go and come, sorted by the package they speak of."""
    before, after = ({line for line in text.splitlines() if "==" in line} for text in (old, new))
    signed = [f"- {line}" for line in before - after] + [f"+ {line}" for line in after - before]
    return sorted(signed, key=lambda line: (line[2:].split("==")[0], line[0] == "+", line))


def main() -> int:
    groups = constraints.groups()
    registry = groups.pop("registry")
    together = [line for group in groups.values() for line in group]
    written = {"browser": (BROWSER, browser())}
    for name, what, requirements in (("main", MAIN, together), ("registry", REGISTRY, registry)):
        found = {}
        for python in PYTHONS:
            dev.say(f"Asking pip for {name}, Python {python} ...")
            found[python] = resolve(requirements, python)
        written[name] = (what, lines(found))
    for name, (what, wanted) in written.items():
        path = constraints.FOLDER / f"{name}.txt"
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        new = HEAD.format(what=what) + "\n" + "\n".join(wanted) + "\n"
        path.write_text(new, encoding="utf-8", newline="\n")
        differences = changes(old, new)
        dev.say("\n".join(["", f"constraints/{name}.txt:{'' if differences else ' nothing new'}", *differences]))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["pretend"]:
        pretend(sys.argv[2], sys.argv[3:])
    else:
        sys.exit(main())
