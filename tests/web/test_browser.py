"""The widgets in ComfyUI's real page, in a real browser, over a host that replays a recording (tests/web/browser).

Both renderers, on the newest page and on that of the oldest supported ComfyUI. What is needed beside Chromium and
Node.js is put into .venv/browser by `python3 dev.py test`; without them these tests say that they did not run.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
from pathlib import Path

import pytest

import dev
from tests.web.browser.chromium import Chromium, missing, page_of, replaying, script

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 600  # a run takes 30 on a quiet machine
needs_aiohttp = pytest.mark.skipif(not importlib.util.find_spec("aiohttp"), reason="aiohttp is not installed")


@pytest.fixture(scope="module")
def chromium():
    """One for all runs."""
    browser = Chromium()
    yield browser
    browser.close()


@needs_aiohttp
@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=missing() or "never")
@pytest.mark.parametrize("renderer", ["legacy", "vue"])
@pytest.mark.parametrize("version", dev.frontends())
def test_the_widgets_in_the_page(version, renderer, chromium):
    """tests/web/browser/widget.mjs and scales.mjs, each of their checks, each in a page of its own; pictures are kept
    when LINEAR_SHOTS names a folder."""
    if not (page_of(version) / "index.html").is_file():
        pytest.skip(f"there is no page {version}: {page_of(version)}")
    shots = []
    if folder := os.environ.get("LINEAR_SHOTS"):
        shots = ["--shots", Path(folder) / version]
        shots[1].mkdir(parents=True, exist_ok=True)
    with replaying(page_of(version)) as url:
        for name, least in (("widget.mjs", 15), ("scales.mjs", 6)):
            status, lines, console = script(name, url, renderer, *shots, chromium=chromium, seconds=SECONDS)
            checks = [json.loads(line) for line in lines]
            last = checks[-1] if checks else "nothing"
            assert status != 124, f"{name} ended after {SECONDS} s in {last}; the page said: {console[-3000:]}"
            passed = [check for check in checks if check.get("ok")]
            assert status == 0 and len(passed) >= least, f"{name}: {last}; the page said: {console[-3000:]}"


@needs_aiohttp
@pytest.mark.browser
@pytest.mark.skipif(bool(missing()), reason=missing() or "never")
def test_a_script_that_hangs_is_ended_with_its_browser(chromium, tmp_path):
    """And the next one finds a new browser."""
    hangs = tmp_path / "hangs.mjs"
    hangs.write_text("console.log('begun'); console.error('said'); setInterval(() => {}, 1000);", encoding="utf-8")
    for seconds in (2, 60):  # a busy machine may not have begun by then
        before = chromium.endpoint
        status, lines, console = script(hangs, chromium=chromium, seconds=seconds)
        if lines and console:
            break
    assert (status, lines, console) == (124, ["begun"], "said\n")
    assert chromium.process is None
    assert chromium.endpoint != before


@needs_aiohttp
def test_the_host_knows_a_page_that_was_loaded_again(tmp_path):
    """Its new connection may be there before the old one has ended, under the same name."""
    from aiohttp import ClientSession
    from aiohttp.test_utils import TestServer

    from tests.web.browser.host import Replay

    async def reload() -> str:
        async with TestServer(Replay(tmp_path).app()) as server, ClientSession() as page:
            old = await page.ws_connect(server.make_url("/ws?clientId=page"))
            new = await page.ws_connect(server.make_url("/ws?clientId=page"))
            await old.close()
            await asyncio.sleep(0.1)
            prompt = {"1": {"class_type": "LineAR_Generate", "inputs": {}}}
            await page.post(server.make_url("/prompt"), json={"prompt": prompt, "client_id": "page"})
            while (message := await new.receive_json(timeout=60))["type"] != "execution_start":
                pass
            return message["data"]["prompt_id"]

    assert asyncio.run(reload()) == "run-1"


def test_the_fixture_is_small_and_whole():
    """Below 1.1 MB, with a run of each kind to its end, and the schemas of the nodes they use."""
    path = ROOT / "tests" / "web" / "browser" / "fixture.json"
    assert path.stat().st_size < 1_100_000
    fixture = json.loads(path.read_text(encoding="utf-8"))
    assert set(fixture["runs"]) == {"LineAR_Generate", "LineAR_Compare", "LineAR_Generate in scales"}
    for name, run in fixture["runs"].items():
        kinds = [data.get("type", "binary") for _, data in run["frames"]]
        told = [data["data"]["kind"] for _, data in run["frames"] if data.get("type") == "linear_ar.line"]
        assert kinds[-1] == "execution_success" and "binary" in kinds
        assert [kind for kind in told if kind != "picture"] == [
            "started",
            *["row"] * (9 if "scales" in name else 24),
            "finished",
        ]
        assert {node["class_type"] for node in run["prompt"].values()} <= set(fixture["object_info"])
