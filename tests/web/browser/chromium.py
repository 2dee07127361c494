"""What the page's tests run, each ended for certain: Chromium, the host that replays, and a script in Node.js."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dev

HERE = Path(__file__).resolve().parent
PARTS = Path(os.environ.get("LINEAR_BROWSER", dev.VENV / "browser"))
# Nothing leaves this machine: no name resolves, no proxy is asked, and Chromium does nothing by itself. No sandbox, as
# containers often have none; the only page it is shown is ours. No throttling, as nobody looks at the window.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--no-proxy-server", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-default-apps",
    "--disable-background-timer-throttling", "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding", "--disable-hang-monitor", "--force-color-profile=srgb",
)  # fmt: skip


def page_of(version: str) -> Path:
    """The folder with the frontend's index.html."""
    return PARTS / f"frontend-{version}" / "comfyui_frontend_package" / "static"


def missing() -> str:
    """What the page's tests lack; empty when they can run."""
    if lacking := dev.browser_missing():
        return lacking
    return "" if (PARTS / "node_modules" / "playwright-core").is_dir() else f"there is no playwright-core in {PARTS}"


def end(process: subprocess.Popen) -> None:
    """End a process and, where it has a group of its own, all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.wait()


class Chromium:
    """One Chromium without a window for many runs; started when it is needed, and anew after it was ended."""

    def __init__(self, seconds: float = 90):
        self.seconds, self.process, self.folder = seconds, None, None

    @property
    def endpoint(self) -> str:
        """Where its DevTools listen."""
        if self.process is None or self.process.poll() is not None:
            self.close()
            self._start()
        port, path = (Path(self.folder.name) / "DevToolsActivePort").read_text().split()
        return f"ws://127.0.0.1:{port}{path}"

    def _start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="linear-chromium-", ignore_cleanup_errors=True)
        command = [dev.chromium(), *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={self.folder.name}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([*command, "about:blank"], start_new_session=True, **quiet)
        listens = Path(self.folder.name) / "DevToolsActivePort"
        _wait(lambda: listens.is_file() and listens.read_text().count("\n"), self.process, self.seconds, "Chromium")

    def close(self) -> None:
        if self.process is not None:
            end(self.process)
            self.folder.cleanup()
        self.process = self.folder = None


@contextmanager
def replaying(page: Path, seconds: float = 60) -> Iterator[str]:
    """host.py with the frontend in `page`; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, HERE / "host.py", str(port), page], start_new_session=True)

    def answers() -> bool:
        with suppress(OSError):
            urllib.request.urlopen(f"{url}/system_stats", timeout=5).close()
            return True
        return False

    try:
        _wait(answers, process, seconds, "the host")
        yield url
    finally:
        end(process)


def script(name: str, *arguments: object, chromium: Chromium, seconds: float) -> tuple[int, list[str], str]:
    """Run one of the scripts here; its exit status, lines of output, and what the page said on its console.

    One that takes longer is ended together with its Chromium; its status is then 124.
    """
    env = {**os.environ, "PLAYWRIGHT": str(PARTS), "ENDPOINT": chromium.endpoint}
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as console,
    ):  # files: pipes could be held open
        command = [shutil.which("node"), HERE / name, *map(str, arguments)]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=console, start_new_session=True)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = 124
            chromium.close()
        finally:
            end(process)
        out.seek(0)
        console.seek(0)
        return status, out.read().splitlines(), console.read()


def _wait(ready, process: subprocess.Popen, seconds: float, what: str) -> None:
    limit = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > limit:
            raise AssertionError(f"{what} did not start within {seconds:.0f} s (exit status {process.poll()})")
        time.sleep(0.05)
