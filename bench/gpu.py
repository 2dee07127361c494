r"""Everything that was only predicted, measured on a GPU by one command.

    python bench/gpu.py                                  eight minutes on an NVIDIA GPU; results in bench/results/gpu/
    python bench/gpu.py --minutes 4 --parts card batch   half the time for each part, and only these parts
    python bench/gpu.py --against path/to/LlamaGen       the published loop beside ours
    python bench/gpu.py --dry                            every part on the CPU, in tiny sizes
    python bench/gpu.py --table bench/results/gpu/gpu.json     the table for README, and which bars were met

Needs PyTorch, Triton, transformers and pytest; no ComfyUI and no network. Whatever is missing costs only the part that
needs it.

The parts run in order of worth. Each is a process of its own with its own time: a part that crashes, hangs, or breaks
the GPU's context costs only itself, and time that it leaves over goes to the next. FOLDER gets three files:
gpu.jsonl (each result, written as it comes), gpu.log (what parts write to stderr, with tracebacks) and gpu.json
(everything so far as one document, rewritten after each part).

To add a part, write `bench/gpu_parts/NAME.py` with `run(ask)`, which yields results, and add a line to PARTS. A part
without a file is reported as not in this version, and so is one that raises `NotHere`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu_table import bars, table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "bench" / "results" / "gpu"
MINUTES = 8  # for which PARTS says how long each part takes
DRY_SECONDS = 120.0  # for each part of a dry run: a CPU may be busy
MARGIN = 4.0  # seconds before the end of its time at which a part should stop by itself


@dataclass(frozen=True)
class Part:
    """A file in bench/gpu_parts. `seconds`: its share of MINUTES. `asks`: the question that it answers."""

    name: str
    seconds: int
    asks: str

    @property
    def here(self) -> bool:
        return (Path(__file__).parent / "gpu_parts" / f"{self.name}.py").is_file()


PARTS = (  # in order of worth
    Part("card", 15, "Which GPU is this, and what are its ceilings: copying, multiplying, launching?"),
    Part("correctness", 90, "Do the GPU tests pass: kernel, graphs, no waiting within a line, memory, half precision?"),
    Part("batch", 105, "LlamaGen-XL, 256 images: images per second, a line's end, memory against plan, bandwidth?"),
    Part("latency", 60, "One and four images: what do graphs and the kernel gain, and what does a wider forward cost?"),
    Part("pictures", 35, "Does the bundled model draw on the GPU what it draws on the CPU, but for counted rounding?"),
    Part("attention", 45, "From which sizes on does the kernel beat PyTorch's attention, with full and 8-bit slots?"),
    Part("drafts", 25, "How much faster are drafts, and are the codes the same?"),
    Part("weights", 30, "One image: how much faster are weights in 8 and 4 bits, and which of their products?"),
    Part("scales", 0, "Next-scale models: time for each scale, memory against plan?"),
    Part("masked", 0, "Masked models: time for each step, memory against plan?"),
    Part("published", 25, "How fast are the published loops, with the same weights on the same GPU?"),
    Part("paper", 50, "The paper's efficiency table: what fits the memory measured, the rest extrapolated"),
)


class NotHere(Exception):
    """What a part measures does not exist in this version, or was not asked for."""


@dataclass(frozen=True)
class Ask:
    """What a part is asked.

    device   cuda, or cpu in a dry run
    dry      tiny sizes, and nothing is proved
    ends     time.monotonic() by which the part should have stopped
    against  a checkout of LlamaGen; None: none
    """

    device: str
    dry: bool
    ends: float
    against: str | None = None

    @property
    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.monotonic()


def tail(text: str, lines: int = 25) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])


def supervise(command: list[str], seconds: float, log: Path) -> tuple[str, str]:
    """Run `command` for at most so many seconds: how it ended ("" if well), and the last lines that it wrote to `log`.

    It and everything that it started are gone afterwards. It should end by itself MARGIN seconds earlier.
    """
    log.touch()
    before = log.stat().st_size
    with log.open("ab") as errors:
        process = subprocess.Popen(command, stderr=errors, cwd=ROOT, start_new_session=os.name == "posix")
        try:
            code = process.wait(seconds)
            ended = "" if code == 0 else f"signal {-code}" if code < 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        finally:
            with contextlib.suppress(OSError):  # it may have left processes, whether or not it ended
                os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()
            process.wait()
    written = log.read_bytes()[before:].decode("utf-8", "replace")
    return "out of time" if "Timeout (" in written and ended else ended, tail(written)


class Report:
    """The document: read anew from gpu.jsonl whenever it is written, so that only that file has to be complete."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder, self.about, self.parts = folder, about, list[dict[str, Any]]()
        self.lines, self.log = folder / "gpu.jsonl", folder / "gpu.log"

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of each part; one that was cut off in the middle is left out."""
        found: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines.read_text(encoding="utf-8").splitlines() if self.lines.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                one = json.loads(line)
                found.setdefault(one.pop("part"), []).append(one)
        return found

    @property
    def document(self) -> dict[str, Any]:
        found = self.read()
        told = [line["circumstances"] for lines in found.values() for line in lines if "circumstances" in line]
        parts = [
            part | {"results": [line for line in found.get(part["name"], []) if "circumstances" not in line]}
            for part in self.parts
        ]
        document = {"circumstances": told[0] if told else {}, **self.about, "parts": parts}
        return document | {"bars": bars(document)}

    def write(self) -> None:
        part = self.folder / "gpu.json.part"
        part.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        part.replace(self.folder / "gpu.json")


def run_part(args: argparse.Namespace) -> int:
    """In a process of its own: one part, whose results are written as they come."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(args.seconds, exit=True)  # says where it hangs
    ends = time.monotonic() + args.seconds - MARGIN
    device = "cpu" if args.dry else args.device
    with (args.out / "gpu.jsonl").open("a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps({"part": args.part} | line) + "\n")
            file.flush()

        try:
            module = importlib.import_module(f"bench.gpu_parts.{args.part}")
            common = importlib.import_module("bench.gpu_parts.common")
            write({"circumstances": common.about(device, args.commit)})
            for result in module.run(Ask(device, args.dry, ends, args.against)):
                write(result)
                print("  " + " ".join(f"{key}={_short(value)}" for key, value in result.items()), flush=True)
        except Exception as error:
            if type(error).__name__ != NotHere.__name__:  # the part knows this file under another name than __main__
                raise
            write({"not_here": str(error)})
    faulthandler.cancel_dump_traceback_later()
    return 0


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict) and "median" in value:
        return f"{value['median']:.4g}"
    return str(value).replace("\n", " ")[:160]


def run_all(args: argparse.Namespace) -> dict[str, Any]:
    """All parts in turn, each in its own process; the document."""
    args.out.mkdir(parents=True, exist_ok=True)
    command = ["bench/gpu.py", *(f"--{name}" for name in ("dry",) if getattr(args, name))]
    about = {"command": command, "minutes": args.minutes, "dry": args.dry}
    report = Report(args.out, about)
    for path in (report.lines, report.log):
        path.unlink(missing_ok=True)
    allowed = 0.0
    for part in PARTS:
        if args.parts and part.name not in args.parts:
            continue
        seconds = DRY_SECONDS if args.dry else part.seconds * args.minutes / MINUTES
        entry = {"name": part.name, "asks": part.asks, "slice": seconds, "seconds": 0.0, "state": "not in this version"}
        report.parts.append(entry)
        if not part.here:
            print(f"{part.name}: not in this version", flush=True)
            continue
        allowed += seconds
        print(f"{part.name}: {part.asks} ({allowed:.0f} s)", flush=True)
        child = [sys.executable, __file__, "--part", part.name, "--seconds", f"{allowed:.1f}", "--out", str(args.out)]
        child += ["--device", args.device, "--commit", args.commit]
        child += ["--dry"] * args.dry + (["--against", args.against] if args.against else [])
        started = time.monotonic()
        ended, written = supervise(child, allowed + MARGIN, report.log)
        entry["seconds"] = round(time.monotonic() - started, 1)
        allowed = max(allowed - entry["seconds"], 0.0)
        here = report.read().get(part.name, [])
        missing = next((line["not_here"] for line in here if "not_here" in line), None)
        entry["state"] = f"not in this version: {missing}" if missing else ended or "done"
        if ended:
            entry["error"] = written
            print(f"  {part.name} ended early ({ended}):\n{written}", flush=True)
        report.write()
    report.write()
    return report.document


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all parts together (default: {MINUTES})")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="default: bench/results/gpu")
    parser.add_argument("--against", metavar="PATH", help="a checkout of LlamaGen, whose loop is timed beside ours")
    parser.add_argument("--parts", nargs="+", choices=names, metavar="PART", help=f"only these: {', '.join(names)}")
    parser.add_argument("--dry", action="store_true", help="every part on the CPU, in tiny sizes")
    parser.add_argument("--commit", default="", help="what is measured, if this folder is not a checkout")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print README's table from a stored result")
    for hidden in ("--part", "--device"):
        parser.add_argument(hidden, default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.table:
        print(table(json.loads(args.table.read_text(encoding="utf-8"))))
        return 0
    if args.seconds:
        return run_part(args)
    if args.minutes <= 0:
        parser.error("--minutes: choose more than 0.")
    document = run_all(args)
    print(table(document))
    print(f"Everything is in {args.out / 'gpu.json'}.")
    return any(part["state"] not in ("done",) and not part["state"].startswith("not in") for part in document["parts"])


if __name__ == "__main__":
    sys.exit(main())
