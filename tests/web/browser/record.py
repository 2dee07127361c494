"""Record what a live ComfyUI says of our nodes, for host.py to say again without one.

    python tests/web/browser/record.py PORT [RUN …]  (of a ComfyUI with this pack, on this machine; with its Python)

Writes tests/web/browser/fixture.json: the schemas that the page asks for, and for each prompt below every message of the
websocket and every temporary picture. Of the runs that are not named, where some are, the old recordings stay.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import sys
import time
from pathlib import Path

import aiohttp
from PIL import Image

FIXTURE = Path(__file__).with_name("fixture.json")
MODEL = {"model": "landscapes (bundled)", "tokenizer": "automatic", "grid_rows": 0, "grid_cols": 0}
MODEL["weight_dtype"] = "default"
COMMON = {
    "1": {"class_type": "LineAR_LoadModel", "inputs": MODEL},
    "2": {"class_type": "LineAR_LineCache", "inputs": {"preset": "Balanced"}},
    "3": {"class_type": "LineAR_ClassPrompt", "inputs": {"model": ["1", 0], "class_name": "alpine dawn"}},
}
SAMPLING = {"seed": 7, "guidance": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "batch_size": 1}
FROM = {"model": ["1", 0], "cache": ["2", 0], "prompt": ["3", 0]}
PROMPTS = {
    "LineAR_Generate": COMMON
    | {
        "4": {"class_type": "LineAR_Generate", "inputs": {**FROM, **SAMPLING, "guidance_interval": -1}},
        "5": {"class_type": "LineAR_Decode", "inputs": {"model": ["1", 0], "tokens": ["4", 0]}},
        "6": {"class_type": "PreviewImage", "inputs": {"images": ["5", 0]}},
    },
    "LineAR_Compare": COMMON | {"4": {"class_type": "LineAR_Compare", "inputs": {**FROM, **SAMPLING, "batch_size": 2}}},
}
SCALES = "landscapes in scales (bundled)"
PROMPTS["LineAR_Generate in scales"] = PROMPTS["LineAR_Generate"] | {
    "1": {"class_type": "LineAR_LoadModel", "inputs": {**MODEL, "model": SCALES}}
}


async def main(port: int, chosen: list[str]) -> None:
    base = f"http://127.0.0.1:{port}"
    runs = json.loads(FIXTURE.read_text(encoding="utf-8"))["runs"] if chosen else {}
    async with aiohttp.ClientSession() as http:
        info = await (await http.get(f"{base}/object_info")).json()
        names = [name for name in info if name.startswith("LineAR_")] + ["PreviewImage", "Note"]
        fixture = {
            "object_info": {name: info[name] for name in names if name in info},
            "system_stats": await (await http.get(f"{base}/system_stats")).json(),
            "runs": runs | {name: await record(http, base, PROMPTS[name]) for name in chosen or PROMPTS},
        }
    fixture["system_stats"]["system"]["argv"] = []
    FIXTURE.write_text(json.dumps(fixture, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{FIXTURE}: {FIXTURE.stat().st_size / 1e3:.0f} kB")


async def record(http: aiohttp.ClientSession, base: str, prompt: dict) -> dict:
    """The prompt, the messages from its start to its end with their times, and the pictures they name."""
    frames, files = [], {}
    async with http.ws_connect(f"{base}/ws?clientId=recorder", max_msg_size=0) as ws:
        flags = {"supports_preview_metadata": True, "supports_progress_text_metadata": True}
        await ws.send_json({"type": "feature_flags", "data": flags})
        answer = await (await http.post(f"{base}/prompt", json={"prompt": prompt, "client_id": "recorder"})).json()
        if answer.get("node_errors"):
            raise SystemExit(json.dumps(answer, indent=1))
        started = time.perf_counter()
        async for message in ws:
            at = round(time.perf_counter() - started, 3)
            if message.type == aiohttp.WSMsgType.BINARY:
                frames.append([at, {"binary": base64.b64encode(smaller(message.data)).decode()}])
                continue
            data = json.loads(message.data)
            if data["type"] in ("status", "feature_flags", "crystools.monitor"):
                continue
            frames.append([at, data])
            for ref in references(data):
                answer = await http.get(f"{base}/view", params=ref)
                files[ref["filename"]] = base64.b64encode(await answer.read()).decode()
            if data["type"] in ("execution_success", "execution_error"):
                print(f"{data['type']} after {at} s, {len(frames)} messages")
                return {"prompt": prompt, "prompt_id": data["data"]["prompt_id"], "frames": frames, "files": files}
    raise SystemExit("the connection was closed")


def smaller(data: bytes) -> bytes:
    """A preview with its picture at a lower quality: the fixture stays small."""
    kind, length = struct.unpack(">II", data[:8])
    if kind != 4:
        return data
    out = io.BytesIO()
    Image.open(io.BytesIO(data[8 + length :])).save(out, "JPEG", quality=50)
    return data[: 8 + length] + out.getvalue()


def references(data: object) -> list[dict]:
    """Every picture of the temporary folder that a message names."""
    if isinstance(data, list):
        return [ref for item in data for ref in references(item)]
    if not isinstance(data, dict):
        return []
    if data.get("type") == "temp" and "filename" in data:
        return [data]
    return [ref for value in data.values() for ref in references(value)]


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
