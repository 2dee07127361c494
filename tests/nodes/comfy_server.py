"""A real ComfyUI for tests: started from COMFYUI_DIR on the CPU, with this pack linked into it.

    COMFYUI_DIR=path/to/ComfyUI python tests/nodes/comfy_server.py

records from it tests/fixtures/object_info.json (the schemas that test_nodes.py holds the nodes to) and the thumbnails
of workflows/. COMFYUI_PYTHON names the interpreter that ComfyUI was installed with, where this one is another;
COMFYUI_ARGS adds arguments to its command line. Only the standard library, as the tests may run without ComfyUI's.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PACK = "ar-line-cache"
GOLDEN = ROOT / "tests" / "fixtures" / "object_info.json"
WORKFLOWS = ROOT / "workflows"
# What of /object_info is of our making; the rest differs between versions of ComfyUI.
OURS = (
    "input", "input_order", "output", "output_name", "output_tooltips", "name", "display_name", "description",
    "category", "search_aliases", "output_node",
)  # fmt: skip
ENDS = ("execution_success", "execution_error", "execution_interrupted")
FLAGS = {"supports_preview_metadata": True, "supports_progress_text_metadata": True}
PREVIEW = 4  # the type of a binary message that carries a picture and says of which node


def ours(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info[key] for key in OURS}


class Server:
    """A running ComfyUI."""

    def __init__(self, url: str, base: Path, log: Path, pid: int):
        self.url, self.base, self._log, self.pid = url, base, log, pid

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def read(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def post(self, path: str, data: Any) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(data).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode(errors='replace')}") from None
        return json.loads(text) if text else None

    def run(self, prompt: dict[str, Any], seconds: float = 600) -> Iterator[dict[str, Any] | bytes]:
        """Queue a prompt in the API's format; every message about it, until it has ended."""
        client = secrets.token_hex(8)
        with Socket(self.url, f"/ws?clientId={client}", seconds) as messages:
            messages.send({"type": "feature_flags", "data": FLAGS})
            queued = self.post("/prompt", {"prompt": prompt, "client_id": client})
            assert not queued.get("node_errors"), queued
            for message in messages:
                yield message
                if isinstance(message, dict) and message["type"] in ENDS:
                    return
        raise AssertionError("the connection was closed before the prompt had ended")

    def pictures(self, prompt_id: str, kind: str = "images") -> list[list[Path]]:
        """Files that each node of a finished prompt saved or put into the temporary folder.

        "linear_ar_pairs": those that Compare left under its slider, the first picture's from both caches.
        """
        for _ in range(100):  # the history is written a moment after the end is told
            if prompt_id in (history := self.get(f"/history/{prompt_id}")):
                break
            time.sleep(0.05)
        named = [output[kind] for output in history[prompt_id]["outputs"].values() if output.get(kind)]
        named = [images[0] if isinstance(images[0], list) else images for images in named]
        return [[self.base / i["type"] / i["subfolder"] / i["filename"] for i in images] for images in named]


def finish(server: Server, prompt: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Run a prompt: its messages, and the last one."""
    *messages, end = server.run(prompt)
    return messages, end


def twin(name: str, **settings: object) -> dict[str, Any]:
    """The API form of a workflow, with other settings wherever it has those."""
    prompt = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in prompt.values():
        for key, value in settings.items():
            if not isinstance(node["inputs"].get(key, []), list):  # a list is a link
                node["inputs"][key] = value
    return prompt


def install(place: Path, archive: Path) -> None:
    """Unpack the registry's zip as ComfyUI Manager does, with the list of files by which it knows its own."""
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(place)
        (place / ".tracking").write_text("\n".join(packed.namelist()), encoding="utf-8")


def link(place: Path) -> None:
    """Lead from ComfyUI's folder to this one."""
    try:
        place.symlink_to(ROOT, target_is_directory=True)
    except OSError:  # Windows, without the right to
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".git", ".venv", "tests", "__pycache__"))


@contextmanager
def comfyui(seconds: float = 300, archive: Path | None = None) -> Iterator[Server]:
    """Start ComfyUI in a folder of its own, which goes afterwards, with this pack or with an `archive` of it."""
    comfy = Path(os.environ["COMFYUI_DIR"]).expanduser().resolve()
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory(prefix="linear-host-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (base / name).mkdir()
        if archive is None:
            link(base / "custom_nodes" / PACK)
        else:
            install(base / "custom_nodes" / PACK, archive)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        log = base / "server.log"
        command = [
            python, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base), "--disable-api-nodes",
            "--database-url", f"sqlite:///{(base / 'user' / 'comfyui.db').as_posix()}",
            *shlex.split(os.environ.get("COMFYUI_ARGS", "")),
        ]  # fmt: skip
        # One thread: small tensors gain nothing from more, and it keeps its speed on a busy machine.
        env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
        env["PYTHONPYCACHEPREFIX"] = str(base / "pycache")  # nothing is written into anybody's checkout
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(command, cwd=comfy, env=env, stdout=out, stderr=subprocess.STDOUT)
        server = Server(f"http://127.0.0.1:{port}", base, log, process.pid)
        try:
            _wait(server, process, seconds)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Server, process: subprocess.Popen, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            server.get("/system_stats")
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"ComfyUI did not start:\n{server.log[-4000:]}") from None
            time.sleep(0.3)


class Socket:
    """As much of a websocket client as hearing a server out takes."""

    def __init__(self, url: str, path: str, seconds: float):
        host, _, port = url.removeprefix("http://").partition(":")
        self.connection = socket.create_connection((host, int(port)), timeout=seconds)
        self.stream = self.connection.makefile("rb")
        key = base64.b64encode(secrets.token_bytes(16)).decode()
        lines = (
            f"GET {path} HTTP/1.1", f"Host: {host}:{port}", "Upgrade: websocket", "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", "",
        )  # fmt: skip
        self.connection.sendall("\r\n".join(lines).encode())
        status = self.stream.readline()
        assert b" 101 " in status, status
        while self.stream.readline().strip():
            pass

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.connection.close()

    def send(self, message: Any, opcode: int = 1) -> None:
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + struct.pack(">H", len(data))
        self.connection.sendall(bytes([0x80 | opcode]) + size + bytes(4) + data)  # a mask of zeros changes nothing

    def __iter__(self) -> Iterator[dict[str, Any] | bytes]:
        """Messages until the server closes: text as JSON, anything else as bytes."""
        whole, kind = b"", 0
        while len(head := self.stream.read(2)) == 2:
            last, opcode, size = head[0] & 0x80, head[0] & 0x0F, head[1] & 0x7F
            if size > 125:
                size = int.from_bytes(self.stream.read(2 if size == 126 else 8), "big")
            data = self.stream.read(size)
            if opcode == 8:
                return
            if opcode == 9:
                self.send(data, 10)
            if opcode > 8:
                continue
            whole, kind = (data, opcode) if opcode else (whole + data, kind)
            if last:
                yield json.loads(whole) if kind == 1 else whole


def thumbnail(server: Server, prompt_id: str) -> Image.Image:
    """What a workflow draws: one picture of each node that saves, or what Compare shows under its slider."""
    from PIL import Image, ImageDraw

    for pair in server.pictures(prompt_id, "linear_ar_pairs"):
        small, right = (Image.open(path).convert("RGB") for path in pair)
        middle = small.width // 2
        small.paste(right.crop((middle, 0, *right.size)), (middle, 0))
        draw = ImageDraw.Draw(small)
        draw.line((middle, 0, middle, small.height), fill="black", width=8)
        draw.line((middle, 0, middle, small.height), fill="white", width=4)
        draw.ellipse((middle - 12, small.height // 2 - 12, middle + 12, small.height // 2 + 12), "white", "black", 2)
        for text, at, anchor in (("full cache", 10, "la"), ("few lines", small.width - 10, "ra")):
            draw.text((at, 8), text, "white", font_size=22, anchor=anchor, stroke_width=2, stroke_fill="black")
        return small
    pictures = [Image.open(files[0]).convert("RGB") for files in server.pictures(prompt_id)]
    height = max(picture.height for picture in pictures)
    pictures = [picture.resize((picture.width * height // picture.height, height)) for picture in pictures]
    small = Image.new("RGB", (sum(p.width + 8 for p in pictures) - 8, pictures[0].height), "white")
    for i, picture in enumerate(pictures):
        small.paste(picture, (sum(p.width + 8 for p in pictures[:i]), 0))
    return small


def record() -> None:
    """Write the fixture, and a thumbnail of what each workflow draws."""
    from PIL import Image

    with comfyui() as server:
        info = {name: ours(node) for name, node in server.get("/object_info").items() if name.startswith("LineAR_")}
        GOLDEN.write_text(json.dumps(info, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{GOLDEN.relative_to(ROOT)}: {len(info)} nodes")
        for path in sorted(WORKFLOWS.glob("api/*.json")):
            if path.stem.startswith(("llamagen_", "janus_", "lumina", "u0", "var_", "mvar", "infinity_", "mar_")):
                continue  # without published weights there is no picture to show; theirs show the graph
            *_, end = server.run(json.loads(path.read_text(encoding="utf-8")))
            assert end["type"] == "execution_success", end
            small = thumbnail(server, end["data"]["prompt_id"])
            small.thumbnail((480, 320), Image.Resampling.LANCZOS)
            target = WORKFLOWS / f"{path.stem}.jpg"
            small.save(target, quality=88, optimize=True)
            print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    record()
