"""Published files from the hub to a model folder. The one place of this project that opens a connection.

A file is fetched at its pinned commit and held against a hash: ours where `published` knows one, else the one that the
hub states for that file at that commit (the SHA-256 of large files, git's own hash of small ones). It appears under its
name only when it is complete and right; a file that is there already is left alone.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from ..errors import UserError
from .published import HUB, Release, Remote

CHUNK = 2**20
ATTEMPTS = 5  # connections without a single new byte
PAUSE = 2.0  # seconds before the next of them
TIMEOUT = (15, 60)  # seconds: to connect, and between two pieces

Progress = Callable[[int, int, str], None]  # bytes so far, bytes in all, name of the file; may raise to stop


@dataclass(frozen=True)
class Fetched:
    """A file and where it came from. `commit` and `hash` are '' for one that was there already."""

    path: Path
    size: int
    commit: str = ""
    hash: str = ""


@dataclass(frozen=True)
class _Source:
    """What the hub says of a file before it is fetched."""

    file: Remote
    target: Path
    url: str
    size: int
    commit: str
    hash: str  # 64 digits: SHA-256; 40: git's, of a small file


def _told(progress: Progress, before: int, total: int, name: str, fetched: int) -> None:
    progress(before + fetched, total, name)


def download(
    release: Release, folder: Path, progress: Progress = lambda done, total, name: None, *, hub: str = HUB
) -> list[Fetched]:
    """Fetch what is missing of `release` into the model folder `folder`. Raises UserError with nothing half-written."""
    try:
        import requests
    except ImportError as error:
        raise UserError(f"downloads need the Python package requests, which ComfyUI brings ({error}).") from error
    targets = {file: folder / release.local(file) for file in release.files}
    there = [Fetched(path, path.stat().st_size) for path in targets.values() if path.exists()]
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"  # sizes and ranges of the file itself
        try:
            sources = [_ask(session, file, path, hub) for file, path in targets.items() if not path.exists()]
            total, done, fetched = sum(source.size for source in sources), 0, []
            _check_room(folder, total)
            for source in sources:
                _fetch(session, source, partial(_told, progress, done, total, source.target.name), requests)
                done += source.size
                fetched.append(Fetched(source.target, source.size, source.commit, source.hash))
        except requests.RequestException as error:
            raise UserError(
                f"{release.name}: could not be fetched from {hub} ({type(error).__name__}); check the connection and "
                f"try again, or fetch it by hand from {release.files[0].url}."
            ) from error
    return there + fetched


def _ask(session: Any, file: Remote, target: Path, hub: str) -> _Source:
    """Size, commit and hash of a file. The hub tells them itself, before it sends us on to where the content is."""
    url = file.repository.url(file.path, hub)
    for _ in range(4):
        answer = session.head(url, allow_redirects=False, timeout=TIMEOUT)
        onward = answer.headers.get("Location", "")
        if not answer.is_redirect or urlsplit(onward).netloc not in ("", urlsplit(hub).netloc):
            break
        if "X-Linked-Etag" in answer.headers:
            break
        url = urljoin(url, onward)  # a repository that was renamed
    if answer.status_code in (401, 403, 404):
        raise UserError(f"{url}: is not there (the hub answers {answer.status_code}); fetch the file from elsewhere.")
    if answer.status_code >= 400:
        answer.raise_for_status()
    headers = answer.headers
    large = "X-Linked-Etag" in headers
    stated = headers.get("X-Linked-Etag" if large else "ETag", "").removeprefix("W/").strip('"').lower()
    size = headers.get("X-Linked-Size" if large else "Content-Length", "")
    commit = headers.get("X-Repo-Commit", "")
    wanted = file.repository.revision
    if wanted and commit != wanted:
        raise UserError(f"{url}: the hub answers for commit '{commit}', not {wanted}; nothing was fetched.")
    if file.sha256 and large and stated != file.sha256:
        raise UserError(f"{url}: the hub's file has hash {stated}, not {file.sha256} as expected; nothing was fetched.")
    known = file.sha256 or stated
    if len(known) not in (40, 64) or not set(known) <= set("0123456789abcdef") or not size.isdigit():
        raise UserError(f"{url}: the hub states no hash to hold the file against; nothing was fetched.")
    return _Source(file, target, url, int(size), commit, known)


def _check_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} GB are needed; make room.")


def _fetch(session: Any, source: _Source, progress: Callable[[int], None], requests: Any) -> None:
    source.target.parent.mkdir(parents=True, exist_ok=True)
    part = source.target.with_name(source.target.name + ".part")
    try:
        with part.open("wb") as content:
            digest = _receive(session, source, content, progress, requests)
        if digest != source.hash:
            raise UserError(
                f"{source.target.name}: what came has hash {digest}, not {source.hash}; it was thrown away. Try again."
            )
        os.replace(part, source.target)
    except OSError as error:
        if isinstance(error, requests.RequestException):
            raise
        raise UserError(f"{source.target}: could not be written ({error.strerror}); nothing was kept.") from error
    finally:
        part.unlink(missing_ok=True)


def _receive(session: Any, source: _Source, content: Any, progress: Callable[[int], None], requests: Any) -> str:
    """Write the file into `content` and return its hash. A connection that breaks is taken up where it broke."""
    done, failures, digest = 0, 0, _hasher(source)
    while True:
        before, broken = done, None
        try:
            headers = {"Range": f"bytes={done}-"} if done else {}
            with session.get(source.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                answer.raise_for_status()
                if done and answer.status_code != 206:  # a server that starts over
                    content.seek(0)
                    content.truncate()
                    done, digest = 0, _hasher(source)
                for piece in answer.iter_content(CHUNK):
                    content.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    progress(done)
                    if done > source.size:
                        break
        except requests.HTTPError:
            raise
        except requests.RequestException as error:
            broken = error
        if done >= source.size:
            break
        failures = 0 if done > before else failures + 1
        if failures == ATTEMPTS:
            if broken:
                raise broken
            break
        time.sleep(PAUSE)
        progress(done)
    if done != source.size:
        raise UserError(
            f"{source.target.name}: {done} bytes came where {source.size} were announced; nothing was kept. Try again."
        )
    return digest.hexdigest()


def _hasher(source: _Source) -> Any:
    """SHA-256; or git's hash of a small file, which is over a header and the content."""
    if len(source.hash) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % source.size, usedforsecurity=False)
