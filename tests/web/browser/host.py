"""ComfyUI's real page over a host that only repeats what record.py heard from a live one.

    python tests/web/browser/host.py PORT FRONTEND     FRONTEND: the folder with the frontend's index.html

Needs aiohttp and nothing of ComfyUI. Node ids of the recording become those of the prompt that is queued, so the same
recording plays inside a subgraph. Header and policy are those of `--disable-api-nodes`.
"""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import sys
import uuid
from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import WSMsgType, web

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PACK = "ar-line-cache"
STEP = 0.02  # seconds between messages, at most
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self' data:; frame-src 'self'; object-src 'self';"
)


class Replay:
    def __init__(self, frontend: Path):
        self.frontend = frontend
        self.fixture = json.loads((HERE / "fixture.json").read_text(encoding="utf-8"))
        self.fixture["system_stats"]["system"].pop(
            "required_frontend_version", None
        )  # this one is not the recorded one
        self.settings: dict[str, Any] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.history: dict[str, Any] = {}
        self.prompts: list[dict] = []
        self.stop = asyncio.Event()
        self.hold = asyncio.Event()  # POST /test/hold: wait after that row, until the next or POST /test/go
        self.hold_after = 10**9
        self.entries = 1  # POST /test/list: entries of the list that the node gets, for each of which it runs
        self.kept = ""  # POST /test/mask: what the node says of its mask, as in linear_core/events.py
        self.playing: set[asyncio.Task] = set()
        self.files = {name: data for run in self.fixture["runs"].values() for name, data in run["files"].items()}

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.policy], client_max_size=64 * 2**20)
        say = {
            "/users": {"storage": "server", "migrated": True},
            "/features": {"supports_preview_metadata": True, "max_upload_size": 10**8},
            "/system_stats": self.fixture["system_stats"],
            "/object_info": self.fixture["object_info"],
            "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 0, "total": 0, "has_more": False}},
            "/queue": {"queue_running": [], "queue_pending": []},
            "/prompt": {"exec_info": {"queue_remaining": 0}},
        }
        say |= {f"/{name}": {} for name in ("i18n", "global_subgraphs", "node_replacements", "workflow_templates")}
        say |= {f"/{name}": [] for name in ("embeddings", "models", "experiment/models", "userdata")}
        say["/internal/folder_paths"] = {}
        routes = {
            "GET": {
                **{path: self.json(value) for path, value in say.items()},
                "/ws": self.ws,
                "/settings": self.get_settings,
                "/extensions": self.extensions,
                "/history": self.get_history,
                "/view": self.view,
                "/test/prompts": self.get_prompts,
            },
            "POST": {
                "/settings": self.post_settings,
                "/prompt": self.post_prompt,
                "/interrupt": self.interrupt,
                "/queue": self.json({}),
                "/history": self.json({}),
                "/test/hold": self.post_hold,
                "/test/go": self.post_go,
                "/test/list": self.post_list,
                "/test/mask": self.post_mask,
            },
        }
        for method, table in routes.items():
            for path, handler in table.items():
                for prefix in ("", "/api"):
                    app.router.add_route(method, prefix + path, handler)
        for prefix in ("", "/api"):
            app.router.add_route("*", prefix + "/settings/{name}", self.one_setting)
            app.router.add_route("*", prefix + "/userdata/{name:.*}", self.userdata)
            app.router.add_get(prefix + f"/extensions/{PACK}/{{name:.*}}", self.pack_file)
            app.router.add_get(prefix + "/object_info/{name}", self.one_object)
        app.router.add_get("/{name:.*}", self.page)
        return app

    @staticmethod
    def json(value: Any) -> Any:
        async def handler(_: web.Request) -> web.Response:
            return web.json_response(value)

        return handler

    @web.middleware
    async def policy(self, request: web.Request, handler: Any) -> web.StreamResponse:
        answer = await handler(request)
        if not answer.prepared:
            answer.headers["Content-Security-Policy"] = POLICY
            answer.headers["Cache-Control"] = "no-store"
        return answer

    # -- files -------------------------------------------------------------------------------------------------------

    async def page(self, request: web.Request) -> web.StreamResponse:
        path = (self.frontend / (request.match_info["name"] or "index.html")).resolve()
        if not path.is_relative_to(self.frontend.resolve()) or not path.is_file():
            return web.json_response({}, status=404)
        return web.FileResponse(path)

    async def pack_file(self, request: web.Request) -> web.StreamResponse:
        path = ROOT / "web" / request.match_info["name"]
        return web.FileResponse(path) if path.is_file() else web.json_response({}, status=404)

    async def extensions(self, _: web.Request) -> web.Response:
        ours = [
            f"/extensions/{PACK}/{p.relative_to(ROOT / 'web').as_posix()}" for p in sorted((ROOT / "web").rglob("*.js"))
        ]
        core = [f"/extensions/core/{p.name}" for p in sorted((self.frontend / "extensions" / "core").glob("*.js"))]
        return web.json_response(core + ours)

    async def view(self, request: web.Request) -> web.Response:
        data = self.files.get(request.query.get("filename", ""))
        if data is None:
            return web.json_response({}, status=404)
        return web.Response(body=base64.b64decode(data), content_type="image/png")

    # -- what a page asks --------------------------------------------------------------------------------------------

    async def get_settings(self, _: web.Request) -> web.Response:
        return web.json_response(self.settings)

    async def post_settings(self, request: web.Request) -> web.Response:
        self.settings.update(await request.json())
        return web.json_response({})

    async def one_setting(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "POST":
            self.settings[name] = await request.json()
        return web.json_response(self.settings.get(name))

    async def userdata(self, request: web.Request) -> web.Response:
        return web.json_response({}, status=200 if request.method == "POST" else 404)

    async def one_object(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        return web.json_response({name: self.fixture["object_info"].get(name)})

    async def get_history(self, _: web.Request) -> web.Response:
        return web.json_response(self.history)

    async def get_prompts(self, _: web.Request) -> web.Response:
        return web.json_response(self.prompts)

    async def ws(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(max_msg_size=0)
        await socket.prepare(request)
        sid = request.query.get("clientId") or uuid.uuid4().hex
        self.sockets[sid] = socket
        await socket.send_json(
            {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": sid}}
        )
        async for message in socket:
            if message.type == WSMsgType.TEXT and json.loads(message.data).get("type") == "feature_flags":
                await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
        if self.sockets.get(sid) is socket:  # a page that was loaded again has its new one under the same name by now
            del self.sockets[sid]
        return socket

    # -- a run -------------------------------------------------------------------------------------------------------

    async def post_hold(self, request: web.Request) -> web.Response:
        self.hold_after = (await request.json())["row"]
        self.hold.set()
        return web.json_response({})

    async def post_go(self, _: web.Request) -> web.Response:
        self.hold_after = 10**9
        self.hold.set()
        return web.json_response({})

    async def post_list(self, request: web.Request) -> web.Response:
        self.entries = (await request.json())["entries"]
        return web.json_response({})

    async def post_mask(self, request: web.Request) -> web.Response:
        self.kept = (await request.json())["kept"]
        return web.json_response({})

    async def interrupt(self, _: web.Request) -> web.Response:
        self.hold_after = 10**9
        self.stop.set()
        self.hold.set()
        return web.json_response({})

    async def post_prompt(self, request: web.Request) -> web.Response:
        asked = await request.json()
        self.prompts.append(asked["prompt"])
        nodes = asked["prompt"].values()
        way = " in scales" if any("in scales" in str(node["inputs"].get("model")) for node in nodes) else ""
        kinds = [f"{node['class_type']}{way}" for node in nodes]
        kind = next((kind for kind in kinds if kind in self.fixture["runs"]), None)
        if kind is None:
            return web.json_response({"error": {"message": "nothing was recorded for this prompt"}}, status=400)
        prompt_id = f"run-{len(self.prompts)}"
        self.stop.clear()
        task = asyncio.create_task(self.play(self.fixture["runs"][kind], asked, prompt_id))
        self.playing.add(task)
        task.add_done_callback(self.playing.discard)
        return web.json_response({"prompt_id": prompt_id, "number": len(self.prompts), "node_errors": {}})

    async def say(self, client: str, message: dict | bytes) -> None:
        """To the page that queued; one that has gone hears nothing."""
        socket = self.sockets.get(client)
        if socket is not None:
            with suppress(ConnectionError):
                await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_json(message))

    async def play(self, run: dict, asked: dict, prompt_id: str) -> None:
        ids, client = {}, asked.get("client_id")
        for old, node in run["prompt"].items():
            new = next((i for i, n in asked["prompt"].items() if n["class_type"] == node["class_type"]), None)
            ids[old] = new if new is not None else old
        outputs, before = {}, 0.0
        for at, data in listed(run["frames"], self.entries, list(self.files)):
            await asyncio.sleep(min(max(at - before, 0.001), STEP))
            before = at
            if "binary" in data:
                await self.say(
                    client, renamed_binary(base64.b64decode(data["binary"]), ids, run["prompt_id"], prompt_id)
                )
                continue
            message = with_mask(renamed(data, ids, run["prompt_id"], prompt_id), self.kept)
            if message["type"] == "executed":
                outputs[message["data"]["node"]] = message["data"]["output"]
            await self.say(client, message)
            while message["type"] == "linear_ar.line" and message["data"].get("row", -1) + 1 == self.hold_after:
                self.hold.clear()
                await self.hold.wait()
                if self.stop.is_set():
                    break
            if self.stop.is_set():
                done = {"prompt_id": prompt_id, "node_id": ids["4"], "node_type": "LineAR_Generate", "executed": []}
                await self.say(client, {"type": "execution_interrupted", "data": done})
                break
        idle = {"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}}}
        await self.say(client, idle)
        entry = [len(self.prompts), prompt_id, asked["prompt"], asked.get("extra_data", {}), []]
        self.history[prompt_id] = {
            "prompt": entry,
            "outputs": outputs,
            "status": {"status_str": "success", "completed": True},
        }


def listed(frames: list, entries: int, pictures: list[str]) -> list:
    """The messages of a node that gets a list: its run once for each entry, then what all of them left, one after another.

    Each run has a name, a seed, codes and, afterwards, a picture of its own.
    """
    if entries == 1:
        return frames
    kinds = [data.get("data", {}).get("kind") for _, data in frames]
    first, last = kinds.index("started"), kinds.index("finished") + 1
    end = next(i for i, (_, data) in enumerate(frames) if data.get("type") == "executed")
    at, executed = frames[end]
    output = executed["data"]["output"]
    several: dict[str, list] = {key: [] for key in output}
    runs = []
    for entry in range(entries):
        runs += [[at, of_entry(data, entry)] for at, data in frames[first:last]]
        several["linear_ar"] += of_entry(output["linear_ar"], entry)
        name = f"{output['linear_ar'][0]['run']}-{entry}"
        several["linear_ar_picture"].append({"filename": pictures[entry], "subfolder": "", "type": "temp", "run": name})
    executed = {**executed, "data": {**executed["data"], "output": several}}
    return [*frames[:first], *runs, *frames[last:end], [at, executed], *frames[end + 1 :]]


def of_entry(data: Any, entry: int) -> Any:
    """A message of the run for the first entry as one of another entry."""
    if isinstance(data, list):
        return [of_entry(item, entry) for item in data]
    if not isinstance(data, dict):
        return data
    data = {key: of_entry(value, entry) for key, value in data.items()}
    if "run" in data:
        data["run"] += f"-{entry}"
    if data.get("kind") == "started":
        data |= {"list_index": entry, "seed": data["seed"] + entry}
    if data.get("kind") == "row":
        codes = array("H", base64.b64decode(data["tokens"]))
        data["tokens"] = base64.b64encode(array("H", ((code + entry) % 1024 for code in codes))).decode()
    return data


def with_mask(data: Any, kept: str) -> Any:
    """A message of a run as if it had been given a mask that keeps these cells."""
    if isinstance(data, list):
        return [with_mask(item, kept) for item in data]
    if not isinstance(data, dict):
        return data
    more = {"kept": kept} if data.get("kind") == "started" else {}
    return {key: with_mask(value, kept) for key, value in data.items()} | more


IDS = {"node", "display_node", "node_id", "display_node_id", "real_node_id", "parent_node_id"}


def renamed(data: Any, ids: dict[str, str], old: str, new: str) -> Any:
    """A message with the node ids and the prompt id of this run."""
    if isinstance(data, list):
        return [renamed(item, ids, old, new) for item in data]
    if not isinstance(data, dict):
        return new if data == old else data
    out = {}
    for key, value in data.items():
        if key in IDS and isinstance(value, str):
            value = ids.get(value, value)
        elif key == "nodes" and isinstance(value, dict):
            value = {ids.get(k, k): renamed(v, ids, old, new) for k, v in value.items()}
        elif key == "nodes" and isinstance(value, list):
            value = [ids.get(v, v) for v in value]
        else:
            value = renamed(value, ids, old, new)
        out[key] = value
    return out


def renamed_binary(data: bytes, ids: dict[str, str], old: str, new: str) -> bytes:
    """A preview (type 4: the length of its notes, the notes, the picture) with the ids of this run."""
    kind, length = struct.unpack(">II", data[:8])
    if kind != 4:
        return data
    notes = json.dumps(renamed(json.loads(data[8 : 8 + length]), ids, old, new)).encode()
    return struct.pack(">II", 4, len(notes)) + notes + data[8 + length :]


if __name__ == "__main__":
    web.run_app(Replay(Path(sys.argv[2])).app(), host="127.0.0.1", port=int(sys.argv[1]), print=None)
