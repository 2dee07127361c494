"""The widgets in ComfyUI's real page, in a real browser, over a host that replays a recording (tests/browser).

Both renderers, on the newest page and on that of the oldest supported ComfyUI. What is needed beside Chromium and
Node.js is put into .venv/browser by `python3 dev.py test`; without them these tests say that they did not run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

import dev

ROOT = Path(__file__).resolve().parent.parent
PARTS = Path(os.environ.get("LINEAR_BROWSER", ROOT / ".venv" / "browser"))
CHROMIUM = next((path for name in dev.CHROMIUM if (path := shutil.which(name))), None)
PAGE = "comfyui_frontend_package/static"


def missing() -> str:
    """What the browser tests lack; empty when they can run."""
    if not os.environ.get("LINEAR_BROWSER_TESTS"):
        return "they take minutes; LINEAR_BROWSER_TESTS=1 python3 dev.py test runs them"
    for found, what in (
        (CHROMIUM, "Chromium was not found"),
        (shutil.which("node"), "Node.js was not found"),
        ((PARTS / "node_modules" / "playwright-core").is_dir(), f"there is no playwright-core in {PARTS}"),
        (importlib.util.find_spec("aiohttp"), "aiohttp is not installed"),
    ):
        if not found:
            return f"{what}; `python3 dev.py test` installs what can be installed"
    return ""


@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=missing() or "never")
@pytest.mark.parametrize("renderer", ["legacy", "vue"])
@pytest.mark.parametrize("version", dev.FRONTENDS)
def test_the_widgets_in_the_page(version, renderer, tmp_path):
    """tests/browser/widget.mjs, each of its checks; pictures are kept when LINEAR_SHOTS names a folder."""
    page = PARTS / f"frontend-{version}" / PAGE
    if not (page / "index.html").is_file():
        pytest.skip(f"there is no page {version} in {PARTS}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    host = subprocess.Popen([sys.executable, ROOT / "tests" / "browser" / "host.py", str(port), page])
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{url}/system_stats", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        shots = Path(os.environ.get("LINEAR_SHOTS", tmp_path)) / version
        shots.mkdir(parents=True, exist_ok=True)
        command = ["node", ROOT / "tests" / "browser" / "widget.mjs", url, renderer, "--shots", shots]
        env = {**os.environ, "PLAYWRIGHT": str(PARTS), "CHROMIUM": CHROMIUM or ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    finally:
        host.terminate()
        host.wait()
    checks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [check for check in checks if not check["ok"]] == [], done.stderr[-2000:]
    assert done.returncode == 0 and len(checks) >= 12, done.stderr[-2000:]


def test_the_fixture_is_small_and_whole():
    """Below 1 MB, with a run of each kind to its end, and the schemas of the nodes they use."""
    path = ROOT / "tests" / "browser" / "fixture.json"
    assert path.stat().st_size < 1_000_000
    fixture = json.loads(path.read_text(encoding="utf-8"))
    assert set(fixture["runs"]) == {"LineAR_Generate", "LineAR_Compare"}
    for run in fixture["runs"].values():
        kinds = [data.get("type", "binary") for _, data in run["frames"]]
        told = [data["data"]["kind"] for _, data in run["frames"] if data.get("type") == "linear_ar.line"]
        assert kinds[-1] == "execution_success" and "binary" in kinds
        assert [kind for kind in told if kind != "picture"] == ["started", *["row"] * 24, "finished"]
        assert {node["class_type"] for node in run["prompt"].values()} <= set(fixture["object_info"])
