"""Hundreds of images in one process of a live ComfyUI: does memory grow, are threads, sockets or files left behind?

    COMFYUI_DIR=path/to/ComfyUI python bench/soak.py --out bench/results/soak.json

Starts ComfyUI on the CPU with this pack (see tests/nodes/comfy_server.py for COMFYUI_PYTHON) and queues prompts of
--batch images with the bundled model. Seeds, policies, budgets and storages vary; now and then a prompt is stopped
half-way, the models are unloaded, or a prompt contains an error. After each prompt it reads from /proc what the process
holds; Linux only. ComfyUI keeps the messages of up to 10000 runs; that history is deleted after each prompt, and its
size is reported.

The growth of memory is the slope of a straight line through the second half of the prompts. Its interval comes from a
block bootstrap, because neighbouring prompts are similar. Exit status 1: something is left behind, or the slope exceeds
--allowed with confidence. The last line of the output is the whole result as one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import check_out, circumstances, in_any_case
from tests.nodes.comfy_server import WORKFLOWS, Server, comfyui

CACHES = [
    *[{"preset": name} for name in ("Balanced", "Smallest", "LineAR", "Full")],
    *[
        {"preset": "Custom", "preset.policy": policy, "preset.budget": budget, "preset.anchors": 4, "preset.recent": 1,
         "preset.release": release, "preset.storage": storage}
        for policy, budget, release, storage in (
            ("h2o", 3, "lazy", "full"), ("fold", 2, "auto", "int8"), ("streaming", 6, "auto", "full"),
            ("adakv", 3, "auto", "full"), ("random", 4, "strict", "int8"), ("snapkv", 4, "auto", "full"),
        )
    ],
]  # fmt: skip
GUIDANCE = (-1.0, 1.0, 1.0)  # the model's own, or none
BLOCK = 5  # prompts per block of the bootstrap
MIN_ROWS = 4  # so that a line can be fitted through half of them
STOP_EVERY, ERROR_EVERY, UNLOAD_EVERY = 8, 15, 20  # prompts


def prompt(number: int, images: int) -> dict[str, Any]:
    """The workflow first_image with a seed and a cache that depend on `number`, and so many images."""
    nodes = json.loads((WORKFLOWS / "api" / "first_image.json").read_text(encoding="utf-8"))
    for node in nodes.values():
        if node["class_type"] == "LineAR_Generate":
            node["inputs"] |= {
                "seed": 1000 * number,
                "batch_size": images,
                "guidance": GUIDANCE[number % len(GUIDANCE)],
            }
        if node["class_type"] == "LineAR_LineCache":
            node["inputs"] = dict(CACHES[number % len(CACHES)])
        if node["class_type"] == "SaveImage":
            node["class_type"], node["inputs"] = "PreviewImage", {"images": node["inputs"]["images"]}
    return nodes


def run(server: Server, nodes: dict[str, Any], stop_at: int | None = None) -> tuple[str, float, int]:
    """How a prompt ended, its seconds, and the bytes of history that it left, which are then deleted."""
    started, end = time.perf_counter(), {}
    for message in server.run(nodes):
        if isinstance(message, dict):
            end = message
            row = message["data"].get("row") if message["type"] == "linear_ar.line" else None
            if stop_at is not None and row == stop_at:
                server.post("/interrupt", {})
                stop_at = None
    seconds, name = time.perf_counter() - started, end["data"]["prompt_id"]
    for _ in range(100):  # the history is written a moment after the last message
        if history := server.read(f"/history/{name}").removeprefix(b"{}"):
            break
        time.sleep(0.02)
    server.post("/history", {"delete": [name]})
    return end["type"], seconds, len(history)


def resources(server: Server) -> dict[str, int]:
    """What ComfyUI's process holds now."""
    process = Path("/proc") / str(server.pid)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    links = []
    for link in (process / "fd").iterdir():
        try:
            links.append(str(link.readlink()))
        except OSError:  # closed meanwhile
            continue
    temporary = [path.name for path in (server.base / "temp").glob("*")]
    return {
        "rss": int(status["VmRSS"].split()[0]) * 1024,
        "threads": int(status["Threads"]),
        "sockets": sum(link.startswith("socket:") for link in links),
        "files": sum(link.startswith("/") and not link.startswith("/dev/") for link in links),
        "ours": sum(name.startswith("linear_") for name in temporary),
        "temporary": len(temporary),
    }


def slope(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Slope of a straight line with its 95 % interval: a block bootstrap of the residuals."""
    rate, start = np.polyfit(x, y, 1)
    line = rate * x + start
    left, source = y - line, np.random.default_rng(0)
    size = max(1, min(BLOCK, len(left) // 3))
    blocks = np.array([left[i : i + size] for i in range(len(left) - size + 1)])
    found = []
    for _ in range(2000):
        drawn = blocks[source.integers(0, len(blocks), -(-len(left) // size))].ravel()[: len(left)]
        found.append(np.polyfit(x, line + drawn, 1)[0])
    return float(rate), *(float(q) for q in np.quantile(found, [0.025, 0.975]))


def soak(server: Server, images: int, batch: int, minutes: float) -> Iterator[dict[str, Any]]:
    """Draw so many images; yields a row of what the process holds before, and after each prompt."""
    yield {"images": 0, "end": "", "seconds": 0.0, "told": 0, **resources(server)}
    done, number = 0, 0
    until = time.monotonic() + 60 * minutes
    while done < images and time.monotonic() < until:
        number += 1
        count = min(batch, images - done)
        if number % STOP_EVERY == 0:
            end, *_ = run(server, prompt(100000 + number, batch), stop_at=number % 23)
            assert end == "execution_interrupted", end
        if number % ERROR_EVERY == 0:
            nodes = prompt(200000 + number, 1)
            for node in nodes.values():
                node["inputs"] |= {"more_classes": "spaceship"} if node["class_type"] == "LineAR_ClassPrompt" else {}
            end, *_ = run(server, nodes)
            assert end == "execution_error", end
        if number % UNLOAD_EVERY == 0:
            server.post("/free", {"unload_models": True, "free_memory": True})
        end, seconds, history = run(server, prompt(number, count))
        assert end == "execution_success", end
        done += count
        row = {"images": done, "end": end, "seconds": round(seconds, 3), "told": history, **resources(server)}
        if number % 5 == 1 or done == images:
            print(table([row]), flush=True)
        yield row


HEADER = f"{'images':>7}{'seconds':>9}{'RSS MiB':>9}{'threads':>9}{'sockets':>9}{'files':>7}{'temporary':>11}"


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{r['images']:>7}{r['seconds']:>9.1f}{r['rss'] / 2**20:>9.1f}{r['threads']:>9}{r['sockets']:>9}{r['files']:>7}"
        f"{r['temporary']:>11}"
        for r in rows
    )


def verdict(rows: list[dict[str, Any]], allowed: float) -> dict[str, Any]:
    """What grew in the second half of the run, per image, and what was left behind."""
    late = rows[len(rows) // 2 :]
    images = np.array([row["images"] for row in late], float)
    rate, low, high = slope(images, np.array([row["rss"] for row in late], float))
    counts = {key: sorted({row[key] for row in late}) for key in ("threads", "sockets", "files")}
    first = rows[1]
    leaks = [key for key, seen in counts.items() if late[-1][key] > first[key] + 2 or late[-1][key] > seen[0] + 2]
    return {
        "rss_bytes_per_image": [round(value) for value in (rate, low, high)],
        "rss_growth_share": round(rate * (images[-1] - images[0]) / late[0]["rss"], 5),
        "counts": counts,
        "history_bytes_per_prompt": round(statistics.median(row["told"] for row in late)),
        "temporary_files_per_prompt": (late[-1]["ours"] - late[0]["ours"]) / (len(late) - 1),
        "left_over": leaks + ["rss"] * (low > allowed),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, metavar="N")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images per prompt (default: 8)")
    parser.add_argument("--minutes", type=float, default=240, help="after these no prompt is queued (default: 240)")
    parser.add_argument(
        "--allowed", type=float, default=4096, metavar="BYTES", help="growth of RSS per image (default: 4096)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the result there")
    args = parser.parse_args()
    if args.out:
        check_out(args.out, parser)
    about = circumstances("cpu")
    rows: list[dict[str, Any]] = []

    def document() -> dict[str, Any]:
        return {
            "circumstances": about,
            "images": rows[-1]["images"],
            "prompts": len(rows) - 1,
            "seconds": round(sum(row["seconds"] for row in rows)),
            **(verdict(rows, args.allowed) if len(rows) >= MIN_ROWS else {}),
        }

    def write(stopped: dict[str, str]) -> None:
        if args.out and rows:
            head = json.dumps(document() | stopped, indent=1)[:-2]
            lines = ",\n".join(json.dumps(row) for row in rows)
            args.out.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n', encoding="utf-8")

    with in_any_case(write), comfyui() as server:
        stats = server.get("/system_stats")["system"]
        about |= {"comfyui": stats["comfyui_version"], "host_torch": stats["pytorch_version"]}
        print(HEADER)
        for row in soak(server, args.images, args.batch, args.minutes):
            rows.append(row)
    if len(rows) < MIN_ROWS:
        sys.exit(f"{len(rows) - 1} prompts are too few to judge memory; draw more images, or raise --minutes.")
    result = document()
    rate, low, high = result["rss_bytes_per_image"]
    print(f"memory: {rate / 1024:+.1f} kB per image ({low / 1024:+.1f} to {high / 1024:+.1f}), in the second half")
    print(f"left over: {', '.join(result['left_over']) or 'nothing'}")
    print(json.dumps(result | {"rows": rows}))
    return int(bool(result["left_over"]))


if __name__ == "__main__":
    sys.exit(main())
