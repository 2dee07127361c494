"""What is worth knowing of an installation, as text to paste into a bug report: without names of folders.

Versions, device, memory, what may be used on it, what the model folders hold, and a self-test with the bundled model.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache.attention import ATTENTIONS, SWITCH, gpu_name, no_kernel
from .checkpoints import text
from .checkpoints.families import ModelInfo
from .checkpoints.library import (
    ImageModel,
    bundled_files,
    class_label,
    decoder_bytes,
    find_checkpoints,
    find_tokenizer,
    is_tokenizer,
    load_model,
    read_checkpoint,
    read_info,
)
from .defaults import wins
from .errors import UserError
from .loop.forced import forced_lines
from .loop.generate import Run, generate
from .loop.memory import free_memory
from .models.packed import available
from .pictures.preview import decode
from .plan import PRESETS, CachePlan
from .prompts import Prompt, class_prompt

MIB, GIB = 2**20, 2**30
PACKAGES = ("torch", "numpy", "pillow", "safetensors", "tqdm", "transformers", "sentencepiece", "tokenizers",
            "requests", "triton", "triton-windows", "comfy-kitchen", "ray", "pyarrow")  # fmt: skip
SETTINGS = (SWITCH, "LINEAR_STEP", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "PYTORCH_CUDA_ALLOC_CONF",
            "CUDA_VISIBLE_DEVICES", "PYTORCH_ENABLE_MPS_FALLBACK")  # fmt: skip
SECONDS = 10.0  # that the self-test takes at most, but for what it is doing then
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.1}  # of logits, by what they are computed in
CLASS, SEED, LINES = "ocean dusk", 0, 6  # more lines than the budget, so that some tokens have been folded


def report(
    folders: Iterable[Path],
    *,
    device: str,
    dtype: torch.dtype,
    versions: dict[str, str] | None = None,
    encoders: Iterable[Path] = (),
    tick: Callable[[], None] = lambda: None,
) -> Iterator[str]:
    """The lines of the report, as they are found.

    folders   model folders
    device    what models compute on, and `dtype`, in what
    versions  of what is around the core, such as ComfyUI
    encoders  files and folders of text encoders
    tick      called again and again during the self-test; may raise to end it
    """
    folders = [Path(folder) for folder in folders]
    parts = (
        _versions(versions or {}),
        _device(device, dtype),
        _usable(device, dtype),
        _models(folders, dtype),
        _encoders(encoders),
        self_test(device, dtype, tick),
    )
    for part in parts:
        for line in part:
            yield without_names(line, folders)


def without_names(line: str, folders: Iterable[Path] = ()) -> str:
    """A line without the folders that lead to these, to the pack and to the user's home, and without their name."""
    for folder in (*folders, Path(__file__).parents[1]):
        for place in {str(folder), os.path.realpath(folder)}:
            line = line.replace(place + os.sep, "").replace(place, folder.name)
    for home in {str(Path.home()), os.path.realpath(Path.home())} - {os.sep}:
        line = line.replace(home, "~")
    line = re.sub(r"~[/\\][^\s:;,'\"()]*[/\\]", "~/.../", line)
    with suppress(Exception):  # who has no name
        if len(user := getpass.getuser()) > 2:
            line = re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", "USER", line)
    return line


def usual_folders() -> list[Path]:
    """The model folders of the ComfyUI that this is installed in, if it is."""
    above = Path(__file__).absolute().parents[2]
    if above.name != "custom_nodes":
        return []
    return [path for name in ("ar_image", "Janus-Pro") if (path := above.parent / "models" / name).is_dir()]


# -- what is here ------------------------------------------------------------------------------------------------------


def _versions(more: dict[str, str]) -> Iterator[str]:
    yield f"LineAR {version()}" + "".join(f", {name} {number}" for name, number in more.items())
    yield f"Python {platform.python_version()} ({platform.python_implementation()}), {platform.platform(terse=True)}"
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    found["torch"] = torch.__version__
    yield "packages: " + ", ".join(f"{name} {number}" for name, number in found.items())
    set_here = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    yield "environment: " + (", ".join(set_here) or "nothing of ours is set")


def version() -> str:
    """The pack's, from the file that states it; "unknown" for a core by itself."""
    with suppress(OSError):
        stated = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        if found := re.search(r'^version = "([^"]+)"', stated, re.M):
            return found[1]
    return "unknown"


def _device(device: str, dtype: torch.dtype) -> Iterator[str]:
    free = free_memory()
    memory = f", {free / GIB:.1f} GiB of memory free" if free else ""
    yield f"CPU: {_processor()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}{memory}"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(number)
            left, whole = torch.cuda.mem_get_info(number)
            kind = "ROCm " + torch.version.hip if torch.version.hip else f"CUDA {torch.version.cuda}"
            yield (
                f"GPU {number}: {torch.cuda.get_device_name(number)}, {left / GIB:.1f} of {whole / GIB:.1f} GiB free, "
                f"capability {major}.{minor}, {kind}"
            )
    else:
        yield "GPU: none that PyTorch can use" if not torch.backends.mps.is_available() else "GPU: Apple's (mps)"
    yield f"models compute on {device} in {_name(dtype)}"


def device_name(device: str) -> str:
    """A device as people know it."""
    return gpu_name(torch.device(device)) or (_processor() if device == "cpu" else device)


def _processor() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M):
            return found[1]
    return platform.processor() or platform.machine()


def _usable(device: str, dtype: torch.dtype) -> Iterator[str]:
    """What could be used here, and what is."""
    where, gpu = torch.device(device), gpu_name(torch.device(device))
    chosen = os.environ.get(SWITCH) or ("kernel" if wins("kernel", gpu, 2) else "sdpa")
    why = no_kernel(where, dtype)
    wrong = "" if chosen in ATTENTIONS else f", which is neither of {' and '.join(ATTENTIONS)}"
    yield f"our kernel: {f'cannot be used, {why}' if why else 'can be used'}; in use: {chosen}{wrong}"
    graphs = "can be used" if where.type == "cuda" else f"cannot be used, they need cuda and this runs on {where.type}"
    yield f"CUDA graphs: {graphs}; on by themselves: {'yes' if wins('graph', gpu, 2) else 'no'}"
    if where.type == "cpu":
        slow = "no, this PyTorch has none; steps take twice as long"
        yield f"packed matrices (oneDNN): {'yes' if available() else slow}"


def _models(folders: list[Path], dtype: torch.dtype) -> Iterator[str]:
    if not folders:
        yield "models: no folder was given"
    for folder in folders:
        try:
            found = find_checkpoints([folder])
        except OSError as error:
            yield f"models in {folder.name}: the folder cannot be read ({error.strerror})"
            continue
        yield f"models in {folder.name}: {len(found) or 'none'}"
        for path in found:
            name = path.relative_to(folder).as_posix() if path != folder else "."
            yield f"  {name}: {_what_is(path, found, dtype)}"


def _what_is(path: Path, others: list[Path], dtype: torch.dtype) -> str:
    """What a checkpoint is, or what is wrong with it."""
    try:
        weights = read_checkpoint(path)
        if text.is_text_encoder(path):
            return "a text encoder"
        if is_tokenizer(weights):
            return "a VQ tokenizer"
        info = read_info(path)
        said = f"{_sizes(info)}, {decoder_bytes(info, dtype) / GIB:.2f} GiB of weights in {_name(dtype)}"
    except UserError as error:
        return f"WRONG: {error}"
    except OSError as error:
        return f"WRONG: it cannot be read ({error.strerror or error})"
    try:
        found = find_tokenizer(path, None, others)
        return f"{said}, tokenizer {'in it' if found == path else found.name}"
    except UserError as error:
        return f"{said}; WRONG: {error}"


def _sizes(info: ModelInfo) -> str:
    scales = f" in {info.pyramid.stages} scales" if info.pyramid else ""
    draws = "texts" if info.text else f"{info.config.classes} classes"
    return f"{info.family.name}, {info.grid.rows} x {info.grid.cols} tokens{scales}, draws {draws}"


def _encoders(places: Iterable[Path]) -> Iterator[str]:
    for place in places:
        try:
            found = text.find_text_encoder(place)
            yield f"text encoder {place.name}: {text.encoder_width(found.weights)} features a token"
        except UserError as error:
            yield f"text encoder {place.name}: WRONG: {error}"


# -- the self-test -----------------------------------------------------------------------------------------------------


def self_test(device: str, dtype: torch.dtype, tick: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Draw with the bundled model, and find the same logits on a second road. Takes about SECONDS at most."""
    started = time.perf_counter()
    try:
        model = load_model(bundled_files(), device=device, dtype=dtype)
        yield f"self-test: the bundled model was loaded in {time.perf_counter() - started:.1f} s"
        yield from _draw(model, started, tick)
    except UserError as error:
        yield f"self-test: WRONG: {error}"
    except (RuntimeError, NotImplementedError) as error:  # drivers have their own
        reason = str(error).strip().split("\n")[0]
        yield f"self-test: WRONG: {type(error).__name__}: {reason[:300]}"


def _draw(model: ImageModel, started: float, tick: Callable[[], None]) -> Iterator[str]:
    info, decoder, plan, run = model.info, model.decoder, PRESETS["Balanced"], Run()
    prompt = class_prompt([class_label(info, CLASS)])
    seen: list[Tensor] = []
    compared = LINES * info.grid.cols  # tokens whose logits are kept

    def step(*given: Any) -> Tensor:
        logits: Tensor = decoder.step(*given)
        if len(seen) < compared:
            seen.append(logits)
        return logits

    for line in generate(decoder, prompt, plan, replace(info.defaults, seed=SEED), step=step, name=info.name):
        run.add(line)
        tick()
        if time.perf_counter() - started > 0.6 * SECONDS and len(run.lines) >= LINES:
            break
    whole = len(run.lines) == info.grid.rows
    yield (
        f"  drew {len(run.lines)} of {info.grid.rows} lines at {run.tokens_per_second:.0f} tokens/s"
        + ("" if whole else ", and stopped for lack of time")
    )
    picture = decode(model.tokenizer, run.tokens)
    spread = float(picture.std())
    wrong = "WRONG, it should be 0.02 to 0.6"
    yield f"  its pixels spread by {spread:.2f} ({'fine' if 0.02 < spread < 0.6 else wrong})"
    apart = _apart(model, prompt, run.tokens, plan, seen, tick)
    limit = TOLERANCE.get(decoder.dtype, 0.5)
    yield (
        f"  its first {LINES} lines, token by token and a line at a time: logits {apart:.2g} apart "
        f"({'fine' if apart <= limit else f'WRONG, rounding explains at most {limit:g}'})"
    )
    yield f"  took {time.perf_counter() - started:.1f} s"


def _apart(
    model: ImageModel, prompt: Prompt, tokens: Tensor, plan: CachePlan, seen: list[Tensor], tick: Callable[[], None]
) -> float:
    """The largest difference between the logits `seen` after each token, and those of whole lines."""
    decoder, cols, worst = model.decoder, model.info.grid.cols, 0.0
    rows = decoder.with_unconditional(prompt.to(decoder.device))
    whole = forced_lines(decoder, rows, tokens.repeat(rows.rows, 1, 1), plan)
    for row, logits in zip(range(LINES), whole, strict=False):
        tick()
        stepped = torch.stack(seen[row * cols :][: cols - 1], 1)  # the logits after a token are those of the next
        worst = max(worst, float((stepped - logits[:, 1:]).abs().max()))
    return worst


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
