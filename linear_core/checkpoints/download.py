"""Downloads published files from the hub into a model folder. Nothing else in this project opens a connection.

A file is fetched at its pinned commit and checked against a hash: the one in `published`, or else the one that the hub
states for that file and commit (SHA-256 for large files, git's own hash for small ones). It appears under its name only
when it is complete and correct. Existing files are left alone.
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

CHUNK_BYTES = 2**20
ATTEMPTS = 5  # connections in a row without a new byte
PAUSE = 2.0  # seconds between them
TIMEOUT = (15, 60)  # seconds to connect, and between two chunks

Progress = Callable[
    [int, int, str], None
]  # bytes so far, total bytes, name of the file; may raise an exception to stop


@dataclass(frozen=True)
class Fetched:
    """A file and its origin. `commit` and `hash` are '' for one that existed already."""

    path: Path
    size: int
    commit: str = ""
    hash: str = ""


@dataclass(frozen=True)
class _Source:
    """What the hub states about a file before it is fetched."""

    file: Remote
    target: Path
    url: str
    size: int
    commit: str
    hash: str  # 64 digits: SHA-256; 40: git's hash of a small file


def _report(progress: Progress, before: int, total: int, name: str, fetched: int) -> None:
    progress(before + fetched, total, name)


def download(
    release: Release, folder: Path, progress: Progress = lambda done, total, name: None, *, hub: str = HUB
) -> list[Fetched]:
    """Fetch the missing files of `release` into the model folder `folder`, and return all of its files.

    progress  called with bytes so far, total bytes and the file's name; may raise an exception to stop
    Raises UserError that names the file or address; no partial file is left.
    """
    try:
        import requests
    except ImportError as error:
        raise UserError(f"downloads need the Python package requests, which comes with ComfyUI ({error}).") from error
    targets = {file: folder / release.local_path(file) for file in release.files}
    present = [Fetched(path, path.stat().st_size) for path in targets.values() if path.exists()]
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"  # so that sizes and ranges are those of the file
        try:
            sources = [_ask(session, file, path, hub) for file, path in targets.items() if not path.exists()]
            total, done, fetched = sum(source.size for source in sources), 0, []
            _check_room(folder, total)
            for source in sources:
                _fetch(session, source, partial(_report, progress, done, total, source.target.name), requests)
                done += source.size
                fetched.append(Fetched(source.target, source.size, source.commit, source.hash))
        except requests.RequestException as error:
            raise UserError(
                f"{release.name}: could not be downloaded from {hub} ({type(error).__name__}); check the connection "
                f"and try again, or download it yourself from {release.files[0].url}."
            ) from error
    return present + fetched


def _ask(session: Any, file: Remote, target: Path, hub: str) -> _Source:
    """Size, commit and hash of a file, stated by the hub itself before it redirects to where the content is."""
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
        raise UserError(f"{url}: is not available (the hub answers {answer.status_code}); get the file elsewhere.")
    if answer.status_code >= 400:
        answer.raise_for_status()
    headers = answer.headers
    large = "X-Linked-Etag" in headers
    stated = headers.get("X-Linked-Etag" if large else "ETag", "").removeprefix("W/").strip('"').lower()
    size = headers.get("X-Linked-Size" if large else "Content-Length", "")
    commit = headers.get("X-Repo-Commit", "")
    revision = file.repository.revision
    if revision and commit != revision:
        raise UserError(f"{url}: the hub answered for commit '{commit}', not {revision}; nothing was downloaded.")
    if file.sha256 and large and stated != file.sha256:
        raise UserError(f"{url}: the hub's file has hash {stated}, expected {file.sha256}; nothing was downloaded.")
    expected = file.sha256 or stated
    if len(expected) not in (40, 64) or not set(expected) <= set("0123456789abcdef") or not size.isdigit():
        raise UserError(f"{url}: the hub states no hash to check the file against; nothing was downloaded.")
    return _Source(file, target, url, int(size), commit, expected)


def _check_room(folder: Path, needed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder}: has {free / 1e9:.1f} GB free but {needed / 1e9:.1f} GB are needed; free some space."
        )


def _fetch(session: Any, source: _Source, progress: Callable[[int], None], requests: Any) -> None:
    source.target.parent.mkdir(parents=True, exist_ok=True)
    part = source.target.with_name(source.target.name + ".part")
    try:
        with part.open("wb") as content:
            digest = _receive(session, source, content, progress, requests)
        if digest != source.hash:
            raise UserError(
                f"{source.target.name}: the download has hash {digest}, not {source.hash}, and was deleted; try again."
            )
        os.replace(part, source.target)
    except OSError as error:
        if isinstance(error, requests.RequestException):
            raise
        raise UserError(f"{source.target}: could not be written ({error.strerror}); nothing was kept.") from error
    finally:
        part.unlink(missing_ok=True)


def _receive(session: Any, source: _Source, content: Any, progress: Callable[[int], None], requests: Any) -> str:
    """Write the file into `content` and return its hash. A broken connection is resumed where it broke off."""
    done, failures, digest = 0, 0, _hasher(source)
    while True:
        before, broken = done, None
        try:
            headers = {"Range": f"bytes={done}-"} if done else {}
            with session.get(source.url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                answer.raise_for_status()
                if done and answer.status_code != 206:  # the server starts over
                    content.seek(0)
                    content.truncate()
                    done, digest = 0, _hasher(source)
                for chunk in answer.iter_content(CHUNK_BYTES):
                    content.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
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
            f"{source.target.name}: {done} bytes came but {source.size} were announced; nothing was kept. Try again."
        )
    return digest.hexdigest()


def _hasher(source: _Source) -> Any:
    """SHA-256, or git's hash for a small file, which covers a header and the content."""
    if len(source.hash) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % source.size, usedforsecurity=False)
