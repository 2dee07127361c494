"""What `batch --ray` costs, and whether it survives a killed worker: the bundled model on this machine's CPU.

    python bench/batch.py --pictures 2000 --grid 8 --kill         whether all pictures are there, and equal
    python bench/batch.py --pictures 2000 --runs plain halves ray   what the engine costs

Runs, one after the other, each a command line of its own into a fresh folder:

    plain   one process, with as many threads as it finds idle cores for
    halves  a process of one thread for each worker and a share of the prompts each: all that is left of `ray` without
            an engine
    ray     `--ray` with so many workers; with --kill, one of them is killed (SIGKILL) when half the pictures are there

The engine's overhead is the time of `ray` over that of `halves`. Results go to --out as JSON; runs that are there under
the same settings and commit are not repeated, so that it can be done in pieces.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors import safe_open
from safetensors.torch import save_file

from bench import machine
from linear_core.checkpoints.library import bundled_files, read_info
from linear_core.loop import threads as threading

ROOT = Path(__file__).parents[1]
SCRATCH = ROOT / "out" / "batch"
RUNS = ("plain", "halves", "ray")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--at-once", type=int, default=16)
    parser.add_argument("--grid", type=int, default=0, help="draw N x N tokens instead of the model's own grid")
    parser.add_argument("--kill", action="store_true", help="kill a worker midway")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["plain", "ray"])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "batch.json")
    parser.add_argument("options", nargs="*", help="further options of batch, after --")
    args = parser.parse_args()
    machine.check_out(args.out, parser)
    key = {k: getattr(args, k) for k in ("pictures", "workers", "at_once", "grid", "kill", "options")}
    found = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    row = next((row for row in found if row["settings"] == key), None)
    if row is None:
        row = {"settings": key, "runs": {}}
        found.append(row)
    scratch = SCRATCH / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
    scratch.mkdir(parents=True, exist_ok=True)
    for name in args.runs:
        result = {"plain": plain, "halves": halves, "ray": over_ray}[name](args, scratch)
        row["runs"][name] = result | {"circumstances": machine.circumstances("cpu")}
        print(json.dumps({name: result}), flush=True)
        row["compared"] = compared(scratch, row["runs"])
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(row["compared"], indent=1))


def prompts(folder: Path, rows: range) -> Path:
    """A file with the bundled model's classes in turn, seeds by number."""
    classes = read_info(bundled_files().decoder).classes
    path = folder / f"prompts-{rows.start}-{rows.stop}.jsonl"
    lines = [json.dumps({"class": classes[i % len(classes)], "seed": i, "number": i}) for i in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def model(folder: Path, grid: int) -> list[str]:
    """The option for the bundled model, or for a copy of its weights that draws another grid."""
    if not grid:
        return []
    files, path = bundled_files(), folder / "landscapes.safetensors"
    with safe_open(files.decoder, "pt") as weights:
        tensors, notes = {name: weights.get_tensor(name) for name in weights.keys()}, weights.metadata()  # noqa: SIM118
    save_file(tensors, path, notes | {"grid": f"{grid}x{grid}"})
    shutil.copy(files.tokenizer, folder)
    return ["--model", str(path)]


def command(args: argparse.Namespace, scratch: Path, rows: range, out: Path) -> list[str]:
    """The command line of a run, into a fresh folder."""
    shutil.rmtree(out, ignore_errors=True)
    return [sys.executable, "-m", "linear_core", "batch", str(prompts(scratch, rows)), *model(scratch, args.grid),
            "--device", "cpu", "--at-once", str(args.at_once), "--out", str(out), *args.options]  # fmt: skip


def start(arguments: list[str], threads: int | None) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name not in threading.CHOSEN}
    if threads:
        env["OMP_NUM_THREADS"] = str(threads)
    return subprocess.Popen(arguments, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


class Watched:
    """Waits for commands, and adds up the processor time of all their processes, as last seen.

    On a machine that is busy with other things, that says more than the clock.
    """

    def __init__(self, processes: list[subprocess.Popen[str]]):
        self.processes, self.begun, self.looked = processes, time.perf_counter(), 0.0
        self.spent, self.titles = dict[int, float](), dict[int, str]()

    def look(self) -> bool:
        """Whether any still runs. The processes are counted once a second, as that takes time, too."""
        running = [process for process in self.processes if process.poll() is None]
        if time.perf_counter() > self.looked + 1:
            self.looked = time.perf_counter()
            for pid in below(*[process.pid for process in running]):
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    self.spent[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                    self.titles[pid] = title(pid) or self.titles.get(pid, "ended")
        return bool(running)

    def result(self) -> dict[str, Any]:
        """Exits with what a command said if it failed."""
        while self.look():
            time.sleep(0.1)
        seconds = time.perf_counter() - self.begun
        for process in self.processes:
            told, _ = process.communicate()
            if process.returncode:
                sys.exit(told)
        by_title: dict[str, float] = {}
        for pid, spent in self.spent.items():
            by_title[self.titles[pid]] = round(by_title.get(self.titles[pid], 0.0) + spent, 1)
        return {
            "seconds": round(seconds, 1),
            "cpu_seconds": round(sum(self.spent.values()), 1),
            "cpu_seconds_of": dict(sorted(by_title.items(), key=lambda item: -item[1])),
        }


def title(pid: int) -> str:
    """What a process is, in a word: Ray's title of a worker, a script, or a program; "" once it has ended."""
    words = [word for word in Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0") if word]
    if words and words[0].startswith("ray::"):
        return words[0].split(".")[0].split("(")[0]
    if "-m" in words:
        return words[words.index("-m") + 1]
    return Path(next((word for word in words if word.endswith(".py")), words[0] if words else "")).name


def plain(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    return Watched([start(command(args, scratch, range(args.pictures), scratch / "plain"), None)]).result()


def halves(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    edges = [args.pictures * i // args.workers for i in range(args.workers + 1)]
    parts = [range(a, b) for a, b in pairwise(edges)]
    commands = [command(args, scratch, part, scratch / f"part-{part.start}") for part in parts]
    return Watched([start(each, 1) for each in commands]).result()


def over_ray(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    out, killed, first = scratch / "ray", 0, 0.0
    asked = [*command(args, scratch, range(args.pictures), out), "--ray", "--workers", str(args.workers)]
    watched = Watched([start(asked, 1)])
    while watched.look():
        time.sleep(0.1)
        drawn = len(os.listdir(out / "pictures")) if (out / "pictures").exists() else 0
        if drawn and not first:
            first = time.perf_counter() - watched.begun
        if args.kill and not killed and drawn >= args.pictures // 2:
            os.kill(killed := workers_of(watched.processes[0].pid)[0], signal.SIGKILL)
            print(f"killed worker {killed} after {drawn} pictures", flush=True)
    return {**watched.result(), "until_first_batch": round(first, 1), "workers_killed": int(bool(killed))}


def below(*pids: int) -> list[int]:
    """These processes and all below them (Linux)."""
    parents = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
    found = set(pids)
    for _ in range(5):
        found |= {child for child, parent in parents.items() if parent in found}
    return sorted(found)


def workers_of(pid: int) -> list[int]:
    """The processes below this one that hold the model, by their titles."""
    found = []
    for child in below(pid):
        with contextlib.suppress(OSError):
            title = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
            if title.startswith("ray::") and "Worker" in title:
                found.append(child)
    return found


def compared(scratch: Path, runs: dict[str, Any]) -> dict[str, Any]:
    """Whether the runs drew the same, and what the engine took."""
    result: dict[str, Any] = {}
    if (scratch / "plain" / "metadata.jsonl").exists() and (scratch / "ray" / "metadata.jsonl").exists():
        one, other = (
            [json.loads(line) for line in (scratch / run / "metadata.jsonl").open()] for run in ("plain", "ray")
        )
        names = [row["file_name"] for row in other]
        files = sorted(f"pictures/{p.name}" for p in (scratch / "ray" / "pictures").iterdir())
        result["pictures"], result["all_there_none_twice"] = (
            len(one),
            sorted(names) == files == [r["file_name"] for r in one],
        )
        result["metadata_equal"] = one == other
        differing = [n for n in names if (scratch / "plain" / n).read_bytes() != (scratch / "ray" / n).read_bytes()]
        result["pngs_that_differ"] = len(differing)
    for base in ("plain", "halves"):
        if base in runs and "ray" in runs:
            result[f"ray_over_{base}"] = round(runs["ray"]["seconds"] / runs[base]["seconds"], 3)
            if "cpu_seconds" in runs[base]:
                ratio = runs["ray"]["cpu_seconds"] / runs[base]["cpu_seconds"]
                result[f"ray_over_{base}_cpu"] = round(ratio, 3)
    return result


if __name__ == "__main__":
    main()
