"""What the registry hands out: the files of this pack, its tools, and the zip that `comfy node pack` makes of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dev

ROOT = Path(__file__).resolve().parent.parent


def git(*arguments: str) -> list[str]:
    """Paths that git prints, or a skip where this is not a checkout."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout, so there is no list of files")
    command = ["git", "-c", f"safe.directory={ROOT.as_posix()}", "-C", str(ROOT), "ls-files", "-z", *arguments]
    return [path for path in subprocess.check_output(command, text=True, encoding="utf-8").split("\0") if path]


def ours() -> list[str]:
    """Every file that is in the repository or would be after `git add .`."""
    return sorted({path for path in git("-co", "--exclude-standard") if (ROOT / path).is_file()})


def shipped() -> list[str]:
    """The files of the registry archive: ours without those that .comfyignore names."""
    return sorted(set(ours()) - set(git("-coi", "--exclude-from=.comfyignore")))


def copy(paths: list[str], folder: Path) -> Path:
    """These files of ours, in `folder`."""
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def tool(folder: Path, *arguments: str) -> str:
    """Run Python with the registry's tools in `folder`, without a home, telemetry or questions; what it printed."""
    python = dev.venv_python(dev.REGISTRY)
    if not python.is_file():
        pytest.skip("the registry's tools are not installed; python3 dev.py test installs them")
    home = folder.parent / f"{folder.name}-home"
    home.mkdir(exist_ok=True)
    env = {**os.environ, "HOME": str(home), "USERPROFILE": str(home), "DO_NOT_TRACK": "1", "PYTHONUTF8": "1"}
    result = subprocess.run([python, *arguments], cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def pack(folder: Path) -> Path:
    """The zip that goes to the registry, made in `folder` from a copy of our files."""
    copy(ours(), folder)
    for arguments in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    tool(folder, "-m", "comfy_cli", "--skip-prompt", "node", "pack")
    return folder / "node.zip"
