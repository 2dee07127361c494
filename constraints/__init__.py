"""What is installed: the versions that pyproject.toml says are supported, and the exact ones in this folder's files.

Each file is for one environment: main.txt for .venv, registry.txt for .venv/registry, browser.txt for the parts of the
browser tests. Only the standard library, as dev.py starts with it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
PROJECT = FOLDER.parent / "pyproject.toml"


def dependency_groups(text: str) -> dict[str, list[str]]:
    """The groups of [project.optional-dependencies]. Python 3.10 has no tomllib, but their arrays are Python lists."""
    section = re.split(r"^\[", text.split("[project.optional-dependencies]\n")[1], maxsplit=1, flags=re.M)[0]
    arrays = re.findall(r"^([\w-]+) = (\[.*?\])$", section, flags=re.M | re.S)
    return {name: ast.literal_eval(array) for name, array in arrays}


def groups() -> dict[str, list[str]]:
    """The dependency groups of this project."""
    return dependency_groups(PROJECT.read_text(encoding="utf-8"))


def normal(name: str) -> str:
    """The name of a package or of a requirement's package, spelled as pip compares it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", name)[0]).lower()


def file(name: str) -> Path:
    """The file of exact versions for one environment."""
    path = FOLDER / f"{name}.txt"
    if not path.is_file():
        problem = f"constraints/{path.name}, which says what versions to install, is missing."
        raise SystemExit(f"{problem} git restore constraints brings it back.")
    return path


def pins(name: str) -> dict[str, list[str]]:
    """The packages in a file of constraints, each with its versions in the order of the file."""
    found: dict[str, list[str]] = {}
    for package, version in re.findall(r"^([\w.-]+)==([^\s;]+)", file(name).read_text(encoding="utf-8"), re.M):
        found.setdefault(normal(package), []).append(version)
    return found


def options(name: str, requirements: list[str]) -> list[str]:
    """The options that make pip install these requirements in the exact versions of a file of constraints."""
    if missing := [normal(line) for line in requirements if normal(line) not in pins(name)]:
        problem = f"constraints/{name}.txt has no version of {', '.join(missing)}."
        raise SystemExit(f"{problem} python3 dev.py update adds what pyproject.toml asks for.")
    return ["--constraint", str(file(name))]


def lowest(requirement: str) -> str:
    """The lowest version that a requirement allows, as a requirement of its own."""
    found = re.fullmatch(r"([\w.-]+)[>=]=([\w.]+)", requirement)
    if not found:
        raise SystemExit(f"--oldest needs a lowest version, as in numpy>=1.26, and pyproject.toml says {requirement}.")
    return f"{found[1]}=={found[2]}"
