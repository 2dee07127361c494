"""Downloads, from a small hub on the loopback that answers as huggingface.co does."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from linear_core.checkpoints import download as downloading
from linear_core.checkpoints.download import download
from linear_core.checkpoints.published import Release, Remote, Repository
from linear_core.errors import UserError

requests = pytest.importorskip("requests")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = bytes(range(256)) * 20_000  # 5 MB
SMALL = b'{"model_type": "t5"}'
REPOSITORY = Repository("someone/models", COMMIT, "MIT")
RELEASE = Release("model", "ar_image", (Remote(REPOSITORY, "weights.pt", 0.005), Remote(REPOSITORY, "config.json", 0)))


@dataclass
class Hub:
    """What the server answers, and what it was asked."""

    content: dict[str, bytes] = field(default_factory=lambda: {"weights.pt": LARGE, "config.json": SMALL})
    commit: str = COMMIT
    states: dict[str, str] = field(default_factory=dict)  # hash of a file instead of the right one
    breaks: list[int] = field(default_factory=list)  # bytes after which the next answers break off
    ranges: bool = True
    fails: str = ""  # where it has troubles of its own: what the path begins with
    size: int | None = None  # of the large file as it is announced, instead of the right one
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, range
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def answer(self, wanted: bool) -> None:
        hub, name = self.hub, self.path.rpartition("/")[2]
        hub.asked.append((self.command, self.path, self.headers.get("Range")))
        if name not in hub.content:
            return self.reply(404, {})
        content = hub.content[name]
        if hub.fails and self.path.startswith(hub.fails):
            return self.reply(503, {})
        if self.path.startswith("/old/"):
            return self.reply(307, {"Location": self.path.replace("/old/", "/someone/")})
        if self.path.startswith("/cdn/"):
            return self.send(content, wanted)
        if name == "config.json":  # small: the hub sends it itself, with git's hash
            etag = hub.states.get(name, hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())
            return self.send(content, wanted, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.commit})
        sha256 = hub.states.get(name, hashlib.sha256(content).hexdigest())
        size = len(content) if hub.size is None else hub.size
        self.reply(302, {
            "Location": f"http://localhost:{self.server.server_address[1]}/cdn/{name}", "X-Repo-Commit": hub.commit,
            "X-Linked-Size": str(size), "X-Linked-Etag": f'"{sha256}"', "ETag": '"of the answer"',
        })  # fmt: skip

    def send(self, content: bytes, wanted: bool, headers: dict[str, str] | None = None) -> None:
        begin = 0
        if self.hub.ranges and (asked := self.headers.get("Range")):
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
        rest = content[begin:]
        self.reply(206 if begin else 200, {"Content-Length": str(len(rest)), **(headers or {})})
        if wanted:
            stop = self.hub.breaks.pop(0) if self.hub.breaks else len(rest)
            self.wfile.write(rest[:stop])
            self.close_connection = stop < len(rest)

    def reply(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(downloading, "PAUSE", 0.0)
    monkeypatch.setenv("NO_PROXY", "*")
    state = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_release(hub: Hub, tmp_path: Path) -> None:
    """Large and small files, held against the hashes that the hub states; progress over all of them."""
    seen: list[tuple[int, int, str]] = []
    fetched = download(RELEASE, tmp_path, lambda *now: seen.append(now), hub=hub.url)
    assert everything(tmp_path) == {"weights.pt": LARGE, "config.json": SMALL}
    assert [(f.path.name, f.size, f.commit) for f in fetched] == [
        ("weights.pt", len(LARGE), COMMIT),
        ("config.json", len(SMALL), COMMIT),
    ]
    assert fetched[0].hash == hashlib.sha256(LARGE).hexdigest() and len(fetched[1].hash) == 40
    total = len(LARGE) + len(SMALL)
    assert seen[-1] == (total, total, "config.json") and seen == sorted(seen) and len(seen) > 4
    assert all(f"/resolve/{COMMIT}/" in path for _, path, _ in hub.asked if not path.startswith("/cdn/"))


def test_what_is_there_is_left_alone(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"mine")
    fetched = download(RELEASE, tmp_path, hub=hub.url)
    assert everything(tmp_path) == {"weights.pt": b"mine", "config.json": SMALL}
    assert (fetched[0].path.name, fetched[0].hash) == ("weights.pt", "")
    hub.asked.clear()
    download(RELEASE, tmp_path, hub=hub.url)
    assert hub.asked == []  # nothing missing, nothing asked


def test_folders(hub: Hub, tmp_path: Path) -> None:
    download(replace(RELEASE, subfolder="t5"), tmp_path / "text_encoders", hub=hub.url)
    assert set(everything(tmp_path)) == {"text_encoders/t5/weights.pt", "text_encoders/t5/config.json"}


def test_a_renamed_repository(hub: Hub, tmp_path: Path) -> None:
    old = tuple(replace(f, repository=replace(REPOSITORY, name="old/models")) for f in RELEASE.files)
    download(replace(RELEASE, files=old), tmp_path, hub=hub.url)
    assert everything(tmp_path)["weights.pt"] == LARGE


def test_no_commit_known(hub: Hub, tmp_path: Path) -> None:
    """The newest is taken, and the report says which that was."""
    newest = tuple(replace(f, repository=replace(REPOSITORY, revision=None)) for f in RELEASE.files)
    fetched = download(replace(RELEASE, files=newest), tmp_path, hub=hub.url)
    assert fetched[0].commit == COMMIT and any("/resolve/main/" in path for _, path, _ in hub.asked)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks(hub: Hub, ranges: bool, tmp_path: Path) -> None:
    """It is taken up where it broke, or from the start where the server cannot."""
    hub.breaks[:], hub.ranges = [1_000_000, 2_500_000], ranges
    download(RELEASE, tmp_path, hub=hub.url)
    assert everything(tmp_path)["weights.pt"] == LARGE
    assert [r for _, _, r in hub.asked if r]


def refused(hub: Hub, folder: Path, *words: str, release: Release = RELEASE) -> None:
    before = everything(folder)
    with pytest.raises(UserError) as caught:
        download(release, folder, hub=hub.url)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert everything(folder) == before


def test_what_is_refused_leaves_nothing(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.states["weights.pt"] = "0" * 64
    refused(hub, tmp_path, "weights.pt", hashlib.sha256(LARGE).hexdigest(), "was deleted")
    hub.states["weights.pt"] = "no hash"
    refused(hub, tmp_path, "weights.pt", "states no hash")
    hub.states.clear()
    known = tuple(replace(f, sha256="1" * 64) for f in RELEASE.files[:1])
    refused(hub, tmp_path, "1" * 64, "expected", release=replace(RELEASE, files=known))
    assert not [path for _, path, _ in hub.asked if path.startswith("/cdn/") and "1" * 64 in path]
    hub.commit = "f" * 40
    refused(hub, tmp_path, "f" * 40, COMMIT)
    hub.commit = COMMIT
    gone = replace(RELEASE, files=(Remote(REPOSITORY, "gone.pt", 1),))
    refused(hub, tmp_path, "gone.pt", "404", release=gone)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
        refused(hub, tmp_path, str(tmp_path), "free some space")


def test_a_small_file_is_checked_too(hub: Hub, tmp_path: Path) -> None:
    """By git's hash. What was complete before it stays."""
    hub.states["config.json"] = "0" * 40
    with pytest.raises(UserError, match=r"config\.json.*was deleted"):
        download(RELEASE, tmp_path, hub=hub.url)
    assert everything(tmp_path) == {"weights.pt": LARGE}


def test_no_hub(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"could not be downloaded.*https://huggingface.co/someone"):
        download(RELEASE, tmp_path, hub="http://127.0.0.1:1")
    hub.breaks[:] = [0] * 20
    refused(hub, tmp_path, "model", "could not be downloaded")


@pytest.mark.parametrize("where", ["/someone/", "/cdn/"])
def test_a_hub_with_troubles_of_its_own(where: str, hub: Hub, tmp_path: Path) -> None:
    """It is not asked again and again, as after a connection that breaks."""
    hub.fails = where
    with pytest.raises(UserError, match=r"model: could not be downloaded from .* \(HTTPError\)"):
        download(RELEASE, tmp_path, hub=hub.url)
    assert everything(tmp_path) == {}
    assert len([path for _, path, _ in hub.asked if path.startswith(where)]) == 1


def test_connections_that_bring_nothing_are_given_up(hub: Hub, tmp_path: Path) -> None:
    """After so many in a row; where one brings a piece they are counted anew."""
    few = downloading.ATTEMPTS - 1
    hub.breaks = [0] * few + [downloading.CHUNK_BYTES] + [0] * few
    download(RELEASE, tmp_path / "patient", hub=hub.url)
    assert everything(tmp_path / "patient")["weights.pt"] == LARGE
    hub.breaks = [0] * (few + 1)
    with pytest.raises(UserError, match="could not be downloaded"):
        download(RELEASE, tmp_path / "given up", hub=hub.url)
    assert everything(tmp_path / "given up") == {} and hub.breaks == []


@pytest.mark.parametrize("more", [-1, 1])
def test_more_or_less_than_was_announced(more: int, hub: Hub, tmp_path: Path) -> None:
    hub.size = len(LARGE) + more
    with pytest.raises(UserError, match=r"weights\.pt: \d+ bytes came but \d+ were announced; nothing was kept"):
        download(RELEASE, tmp_path, hub=hub.url)
    assert everything(tmp_path) == {}


def test_stop(hub: Hub, tmp_path: Path) -> None:
    """Whatever the host raises to stop passes through, and nothing half-written is left."""

    class Interrupt(BaseException):
        pass

    def stop(done: int, total: int, name: str) -> None:
        assert list(tmp_path.glob("*.part"))
        raise Interrupt

    with pytest.raises(Interrupt):
        download(RELEASE, tmp_path, stop, hub=hub.url)
    assert everything(tmp_path) == {}


def test_nothing_else_opens_a_connection() -> None:
    """The other files of the project name no library that could."""
    root = Path(__file__).parents[2]
    words = ("requests", "urllib.request", "http.client", "httpx", "aiohttp", "huggingface_hub", "socket", "urlopen")
    for path in [*root.glob("linear_core/**/*.py"), *root.glob("nodes/**/*.py")]:
        text = path.read_text(encoding="utf-8")
        named = [w for w in words if f"import {w}" in text or f"from {w}" in text or f"{w}(" in text]
        assert not named or (path.name == "download.py" and named == ["requests"]), (path, named)
    for path in root.glob("linear_core/**/*.py"):
        if ".from_pretrained(" in path.read_text(encoding="utf-8"):
            pytest.fail(f"{path}: from_pretrained can download")
