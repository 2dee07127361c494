"""The command line: python -m linear_core {demo, generate, compare, batch, check, plan, models, calibrate, …}."""

from __future__ import annotations

from . import startup  # first, as importing the others takes seconds

# isort: split

import argparse
import io
import json
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from . import doctor
from .batch import draw as batch_draw
from .batch import over_ray
from .batch.folder import Drawn, Folder, as_settings
from .batch.table import Skipped, read_table
from .check import TEXTS, check_plans, joined, usual_classes
from .check import table as check_table
from .checkpoints import library, text
from .checkpoints.convert import convert
from .checkpoints.families import ModelInfo
from .checkpoints.library import ImageModel, ModelFiles
from .checkpoints.understanding import check_looks, load_understanding, questions
from .checkpoints.weights import model_path
from .errors import UserError, quoted
from .loop.calibrate import calibrate
from .loop.drafts import check
from .loop.forced import following_likelihood, log_likelihood, prompt_match, shared_probability
from .loop.generate import Run, evict, generate
from .loop.graph import CapturedHead, Graphs, use_graphs
from .loop.masked import generate_masked
from .loop.memory import (
    BUS_BYTES,
    CONTEXT_BYTES,
    STREAMED_ROOM,
    free_memory,
    masked_run_bytes,
    max_batch_size,
    run_bytes,
    scales_run_bytes,
    split_batch,
    streamed_bytes,
    streamed_seconds,
)
from .loop.micro_batches import MicroBatch, MicroBatches, is_out_of_memory
from .loop.redraw import best_of, candidates, following, keep_outside, masked_cells
from .loop.scales import check_stop, generate_scales, scale_policy, surveys, with_drafter
from .loop.threads import limit_threads
from .loop.vqa import vqa_scores
from .models.packed import pack
from .models.quantised import QUANTISATIONS
from .pictures.fit import aligned
from .pictures.heatmap import heatmap, lifetime, over_scales
from .pictures.inpaint import check_mask, known_latents
from .pictures.preview import UNDRAWN, LatentPreview, Preview, decode
from .pictures.sheet import contact_sheet, read_image, save, score_sheet, to_image
from .plan import (
    AUTO,
    MAX_SEED,
    PRESETS,
    RELEASES,
    STORAGES,
    CachePlan,
    CacheShape,
    PrunePlan,
    SamplePlan,
    parse_budget,
    parse_seeds,
    parse_share,
)
from .policies import POLICIES, SCALE_POLICIES
from .profile import profile_path
from .prompts import Prompt
from .pyramid import Pyramid
from .steps import RULES, SCHEDULES, STEP_CACHES, MaskedPlan, StepCachePlan

MIB = 2**20
BUNDLED = (library.BUNDLED, library.BUNDLED_SCALES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_DTYPES = {
    "as computed": None, "matrices in int8": "int8", "in int4": "int4", "in fp8 (ComfyUI)": torch.float8_e4m3fn
}  # fmt: skip
STEP_KINDS = ("auto", "eager", "graph")
DEVICES = ("cpu", "cuda", "mps", "xpu")
ADVICE = "lower --budget, --images or --at-once (`plan` shows what they take)"
MAX_IMAGES = 4096  # per class or text, and at once; counting stops here
BATCH = 16  # pictures that `batch` draws at once, unless told otherwise
CHECKED_AT_ONCE = 4  # pictures that `check` draws at once, under all caches
MAX_SIDE = 8192  # pixels that pictures are enlarged to
MAX_SHEET = 2**28  # pixels of a contact sheet: 768 MiB
JUDGED = 6  # images of the demo that are compared at most, because each is computed twice more
DEMO_CLASSES = ("alpine dawn", "ocean dusk", "autumn hills", "starry night", "tropical lagoon", "winter snow")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a letter is told its number
            stream.reconfigure(errors="backslashreplace")
    args = _parser().parse_args(argv)
    if getattr(args, "where", None):
        args.model = args.where
    try:
        with STOP.heard():
            args.command(args)
    except UserError as error:
        _say(f"error: {error}", sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _say(f"error: not enough memory; {ADVICE}.", sys.stderr)
        return 2
    except OSError as error:
        _say(f"error: {error.filename or 'a file'}: {error.strerror or error}.", sys.stderr)
        return 2
    except KeyboardInterrupt:
        _say("stopped.", sys.stderr)
        return 130
    return 0


# -- commands --------------------------------------------------------------------------------------------------------


def run_generate(args: argparse.Namespace) -> None:
    """Draw images and write each as a PNG."""
    info = _checked(args)
    plan, sample, out = _cache_plan(args), _sample_plan(args, info), _out(args.out, info.name + ".png")
    model = _load(args)
    prompt = _prompt(args, model)
    kept = _kept_codes(args, model)
    if args.candidates > 1:
        prompt, sample = prompt.repeat(args.candidates), candidates(sample, prompt.rows, args.candidates)
    plan = _resolved(args, plan, model, prompt, sample)
    if args.best or args.candidates > 1:
        _generate_best(args, model, plan, sample, prompt, out, kept)
        return
    paths = [out.with_name(f"{out.stem}_{i + 1:02d}{out.suffix}") for i in range(prompt.rows)]
    writer = Writer(paths if prompt.rows > 1 else [out])
    masked = _masked_plans(args, info)
    micro_batches = _micro_batches(args, prompt, sample, caches=1, above=_given(args, model), kept=kept)
    settings = (asdict(plan) if info.cached else {}) | _edited(args)
    if masked is not None:
        settings = {name: value for each in masked for name, value in asdict(each).items()}

    def write(picture: Tensor, **more: Any) -> None:
        i = writer.count
        notes = {
            "model": model.info.name,
            "text" if model.info.text else "class": prompt.names[i],
            **settings,
            **asdict(sample.select([i])),
            **{
                name: value
                for name in ("prune", "prune_layers", "drafter", "drafter_scales")
                if (value := getattr(args, name))
            },
        }
        del notes["seeds"]  # `seed` is the picture's own
        if _weight_dtype(args):
            notes["weight_dtype"] = args.weight_dtype
        writer.write(picture, args.size, notes | more)

    def finish(run: Run) -> None:
        for i in range(run.images):
            picture = _pictures(model, run, slice(i, i + 1))
            if args.heatmap:
                kept = _kept(model, run)[i : i + 1]
                picture = heatmap(kept, *_enlarged_size(picture, args.size), picture)
            write(picture[0])

    def finish_all() -> None:
        """Every picture that is drawn and not written yet, as soon as it is drawn."""
        with STOP.waiting():
            first = 0
            for micro_batch in micro_batches.done:
                if first == writer.count:
                    finish(micro_batch.runs[0])
                first += micro_batch.prompt.rows

    try:
        try:
            _draw(model, micro_batches, [plan], args, finish_all)
        except BaseException:  # keep what was drawn so far; the rest of it is grey
            with STOP.waiting(), suppress(UserError, RuntimeError):
                finish_all()
                for part in micro_batches.pending:
                    codes = part.codes()
                    for one in codes if codes is not None else ():
                        write(_unfinished(model, one), unfinished=True)
            raise
    finally:
        writer.tell()
    run = micro_batches.runs[0]
    _say(_summary(run, info) if run.latents is None else _masked_summary(run))


def _generate_best(
    args: argparse.Namespace,
    model: ImageModel,
    plan: CachePlan,
    sample: SamplePlan,
    prompt: Prompt,
    out: Path,
    kept: Tensor | None,
) -> None:
    """Draw all images, write the best of each class or text, or of the fills of each image, and a sheet of all with
    their scores.
    """
    each, keep = (args.candidates, 1) if args.candidates > 1 else (args.images, args.best)
    chosen_names = [f"{out.stem}_{i + 1:02d}{out.suffix}" for i in range(prompt.rows // each * keep)]
    sheet = out.with_name(f"{out.stem}_sheet{out.suffix}")
    writer = Writer([*(map(out.with_name, chosen_names) if len(chosen_names) > 1 else [out]), sheet])
    micro_batches = _micro_batches(args, prompt, sample, caches=1, kept=kept)
    try:
        (run,) = _draw(model, micro_batches, [plan], args)
    except BaseException:  # keep what was drawn so far, on the sheet; the rest of it is grey
        with STOP.waiting(), suppress(UserError, RuntimeError):
            if codes := [one for part in micro_batches.codes for one in part]:
                writer.count = len(writer.paths) - 1
                unfinished = torch.stack([_unfinished(model, one) for one in codes])
                writer.write_sheet([("stopped", "", unfinished)], list(prompt.names), args.size, {"unfinished": True})
        with suppress(UserError):
            writer.tell()
        raise
    with STOP.waiting():
        pictures, by = _pictures(model, run), "what follows" if args.candidates > 1 else args.by
        scores = _scores(args, model, plan, sample, prompt, run.tokens, pictures, kept)
        chosen = best_of(scores, each, keep)
        for n in chosen:
            notes = {"model": model.info.name, "text" if model.info.text else "class": prompt.names[n], "by": by,
                     "score": float(scores[n]), **asdict(plan), **asdict(sample.select([n])),
                     **_edited(args)}  # fmt: skip
            del notes["seeds"]
            writer.write(pictures[n], args.size, notes)
        titles = [prompt.names[n] if prompt.names else "" for n in range(0, prompt.rows, each)]
        writer.write_scores(pictures, scores.tolist(), chosen, titles, f"by {by}, ln", args.size, {"by": by})
    writer.tell()
    _say(_summary(run, model.info))


def _scores(
    args: argparse.Namespace,
    model: ImageModel,
    plan: CachePlan,
    sample: SamplePlan,
    prompt: Prompt,
    codes: Tensor,
    pictures: Tensor,
    kept: Tensor | None,
) -> Tensor:
    """What drawn pictures, or with --candidates the fills of a region, are chosen by: float32 B, higher is better."""
    decoder, at_once = model.decoder, args.at_once or prompt.rows
    if args.candidates > 1 and kept is not None:
        return following_likelihood(decoder, prompt, codes, kept, plan, sample, at_once)
    if args.by == "vqa":
        looking = load_understanding(model, dtype=decoder.dtype, device=decoder.device)
        return vqa_scores(decoder, looking, questions(model, prompt.names), pictures, at_once)
    if args.by == "likelihood":
        found = log_likelihood(decoder, prompt, codes, plan, sample, at_once)
    else:
        found = prompt_match(decoder, prompt, codes, plan, at_once)
    return found.flatten(1).sum(1)


def run_compare(args: argparse.Namespace) -> None:
    """Draw the same seeds with the full cache and with a few lines: a contact sheet, and a row of numbers for each."""
    info = _checked(args)
    if not info.cached:
        raise UserError(f"compare: {info.name} keeps no cache, so there is nothing to compare; use generate.")
    if info.masked is not None:
        raise UserError(
            f"compare: {info.name} draws masked tokens, which need no cache; `generate` with --step-cache keeps one."
        )
    few, sample, out = (
        _cache_plan(args),
        _sample_plan(args, info),
        _out(args.out, "demo.png" if args.judge else "compare.png"),
    )
    images = args.images * len(args.classes or args.texts or _demo_classes(info))
    if 3 * images * max(args.size, info.grid.rows * 16) ** 2 > MAX_SHEET:
        raise UserError(f"size: {images} pictures at {args.size} pixels make too large a sheet; choose a lower --size.")
    model = _load(args)
    prompt = _prompt(args, model)
    few = _resolved(args, few, model, prompt, sample)
    names = list(prompt.names)
    writer = Writer([out])
    micro_batches = _micro_batches(args, prompt, sample, caches=2)
    notes = {"model": model.info.name, "classes": names, **asdict(few), **asdict(sample)}
    try:
        full, run = _draw(model, micro_batches, [CachePlan(policy="full"), few], args)
    except BaseException:  # keep what was drawn so far; the rest of it is grey
        with STOP.waiting(), suppress(UserError, RuntimeError):
            _write_unfinished(model, micro_batches, few, writer, args.size, notes | {"unfinished": True})
        with suppress(UserError):
            writer.tell("picture: ")
        raise
    with STOP.waiting():
        _write_comparison(model, full, run, few, writer, names, args.size, notes)
    try:
        _tell_comparison(model, prompt, full, run, few, sample, args.judge)
    finally:
        writer.tell("picture: ")


def _write_comparison(
    model: ImageModel,
    full: Run,
    run: Run,
    few: CachePlan,
    writer: Writer,
    names: list[str],
    size: int,
    notes: dict[str, Any],
) -> None:
    pictures = [_pictures(model, r) for r in (full, run)]
    if (pyramid := model.info.pyramid) is not None:
        title, below = "what the cache holds before the last scale", pictures[1]
        kept = over_scales(run.shares[:, -1], pyramid)
    else:
        shown = model.info.grid.rows * 2 // 3  # lines: enough for many tokens to have been evicted
        title, below = f"what the cache holds after line {shown}", pictures[1].clone()
        below[:, shown * model.tokenizer.config.factor :] = UNDRAWN
        kept = run.shares[:, shown - 1]
    kept = heatmap(kept, *_enlarged_size(below, size), below)
    rows = [
        ("full cache", _measurements(full, model.info), pictures[0]),
        (_describe(few, model.info), _measurements(run, model.info), pictures[1]),
        (title, "bright: held by most layers and heads; dark: evicted", kept),
    ]
    writer.write_sheet(rows, names, size, notes)


def _write_unfinished(
    model: ImageModel, micro_batches: MicroBatches, few: CachePlan, writer: Writer, size: int, notes: dict[str, Any]
) -> None:
    """Both runs as far as they have come."""
    parts = [part for part in [*micro_batches.done, *micro_batches.pending] if part.codes() is not None]
    if not parts:
        return
    names = [name for part in parts for name in part.prompt.names]
    rows = []
    for cache, title in enumerate(("full cache", _describe(few, model.info))):
        codes = [one for part in parts if (drawn := part.codes(cache)) is not None for one in drawn]
        rows.append((title, "stopped", torch.stack([_unfinished(model, one) for one in codes])))
    writer.write_sheet(rows, names, size, notes)


def _tell_comparison(
    model: ImageModel, prompt: Prompt, full: Run, run: Run, few: CachePlan, sample: SamplePlan, judge: bool
) -> None:
    _say(f"{'':24}{'cache MiB':>12}{'tokens/s':>12}{'held after a line':>22}")
    for name, r in (("full cache", full), (_describe(few, model.info), run)):
        _say(f"{name:24}{_cache_mib(r):>12.2f}{r.tokens_per_second:>12.0f}{r.held:>22.0f}")
    saved = 1 - _cache_mib(run) / _cache_mib(full)
    same = float((full.tokens == run.tokens).float().mean())
    if judge and model.info.pyramid is None:
        shared = _shared(model, prompt, run.tokens, few, sample)
        _say(
            f"{saved:.0%} less cache. Given the same tokens, the next one's probabilities overlap by {shared:.0%} with "
            "the full cache's."
        )
        if same < 1:
            _say("A token drawn differently changes those after it, so the two pictures of a seed differ in places.")
    else:
        _say(f"{saved:.0%} less cache; {same:.0%} of the codes are the same as with the full cache (same seeds).")


def run_batch(args: argparse.Namespace) -> None:
    """Draw a picture for every row of a file of prompts, into a folder. The same command goes on where it stopped."""
    if args.seeds is not None:
        raise UserError("seeds: a table's column seed says them; leave --seeds out (--seed is that of the first row).")
    info = _checked(args, drawing=False)
    if info.masked is not None:
        raise UserError(f"batch: {info.name} draws masked tokens, which only `generate` draws so far; use that.")
    job = _job(args, info)
    rows, bad = read_table(args.prompts, args.column)
    rows, unknown = batch_draw.check_rows(rows, info)
    skipped = {each.number: each for each in [*bad, *unknown]}
    settings = as_settings(
        model=info.name,
        weight_bytes=info.weight_bytes,
        tokenizer=job.files.tokenizer.name,
        pixels=args.pixels,
        dtype=args.dtype,
        weight_dtype=args.weight_dtype,
        images=job.images,
        negative=job.negative,
        size=job.size,
        codes=job.codes,
        plan=job.plan,
        sample=job.sample,
    )
    with Folder.opened(args.out, settings) as folder:
        pictures = batch_draw.pictures_of(rows, job)
        left = [picture for picture in pictures if not folder.has(picture.name, picture.row.prompt, picture.seed)]
        batches = batch_draw.batches_of(left, args.at_once or BATCH, job)
        if there := len(pictures) - len(left):
            _say(f"{there} of {len(pictures)} pictures are there already")
        draw = batch_draw.draw_here(job, batches, _note) if args.ray is None else _over_ray(args, job, batches)
        with tqdm(total=len(pictures), initial=there, unit="picture", disable=None) as bar:
            for done in draw if batches else ():
                with STOP.waiting():
                    skipped |= {each.number: each for each in folder.add(done)}
                bar.update(len(done))
        folder.skip(skipped.values())
        folder.close()
        _say(f"{len(folder.rows)} pictures in {args.out}")
    told = [skipped[number] for number in sorted(skipped)]
    for row in told[:BATCH]:
        _note(f"row {row.number} of {args.prompts.name} was skipped: {row.reason}")
    if len(told) > BATCH:
        _note(f"{len(told) - BATCH} more rows were skipped; {args.out / 'skipped.jsonl'} lists all.")


def run_plan(args: argparse.Namespace) -> None:
    """Show how much memory the cache takes, without loading a model."""
    info = _checked(args, drawing=False)
    dtype = _dtype(args, _device(args))
    few, sample = _cache_plan(args), _sample_plan(args, info)
    images = _at_once(args, ["one"])
    rows = images * (2 if sample.guided else 1)
    weights = {name: library.decoder_bytes(info, dtype, dtype_kept) / MIB for name, dtype_kept in WEIGHT_DTYPES.items()}
    if info.masked is not None:
        c = info.config
        _say(
            f"{info.name}: {c.tokens} tokens of {c.numbers} numbers, {c.layers} + {c.decoder_layers} layers, "
            f"{c.heads} heads of {c.head_dim}, weights {info.weight_bytes / MIB:.1f} MiB on disk"
        )
        _say("weights in memory: " + ", ".join(f"{name} {size:.1f} MiB" for name, size in weights.items()))
        _say(f"{images} image{'s' * (images > 1)}{' with guidance' * sample.guided}: {rows} sequences in {dtype}")
        _plan_masked(args, info, images, rows, dtype)
        return
    shape = info.cache_shape(dtype)
    few = few.resolve(shape, info.pyramid or info.grid, rows)
    if info.pyramid is None:
        what = f"{info.grid.rows} lines of {info.grid.stride} tokens"
        holds = "the prompt, the budget and the line being written"
    else:
        what = f"{info.pyramid.stages} scales ({info.pyramid.text}), {info.pyramid.tokens} tokens"
        holds = "every layer's budget and one layer's working memory"
    _say(
        f"{info.name}: {what}, {info.config.layers} layers, "
        f"{info.config.heads} heads of {shape.head_dim}, weights {info.weight_bytes / MIB:.1f} MiB on disk"
    )
    _say("weights in memory: " + ", ".join(f"{name} {size:.1f} MiB" for name, size in weights.items()))
    _say(f"{images} image{'s' * (images > 1)}{' with guidance' if sample.guided else ''}: {rows} sequences in {dtype}")
    if not info.cached:
        _tell_state(shape, info, sample, rows, args)
        return
    _say(f"{'':24}{'of the tokens':>14}{'cache MiB':>12}")
    full = CachePlan(policy="full")
    for plan in (full, few):
        size = _planned_bytes(shape, info, plan, rows, args.stop_after) / MIB
        _say(f"{_describe(plan, info):24}{_ratio(plan, info):>14}{size:>12.2f}")
    saved = 1 - size / (_planned_bytes(shape, info, full, rows, args.stop_after) / MIB)
    _say(f"{saved:.0%} less; the cache holds {holds}.")
    device = _device(args).partition(":")[0]
    if (free := _free(_device(args))) is not None:
        room = free - library.decoder_bytes(info, dtype, _weight_dtype(args))
        counts = [_batch_size(_needed(shape, info, plan, sample, device), room) for plan in (full, few)]
        _say(
            f"{free / MIB:.0f} MiB are free. Images that fit at once, besides the weights: with the full cache "
            f"{counts[0]}, with {_describe(few, info)} {counts[1]}. --at-once draws a larger batch in parts."
        )
    if args.card is not None:
        _say_of_card(args, info, few, sample)
    if info.own_tokenizer:
        _say(f"This assumes a prompt of {shape.prompt} tokens; a longer one takes one more slot per token.")


def _tell_state(shape: CacheShape, info: ModelInfo, sample: SamplePlan, rows: int, args: argparse.Namespace) -> None:
    """The rest of `plan` for a model without a cache."""
    _say(f"{_state_words(shape.state_bytes(rows))}, the same at every scale and with every budget")
    device = _device(args)
    if (free := _free(device)) is not None:
        room = free - library.decoder_bytes(info, _dtype(args, device), _weight_dtype(args))
        count = _batch_size(_needed(shape, info, CachePlan("full"), sample, device.partition(":")[0]), room)
        _say(
            f"{free / MIB:.0f} MiB are free. Images that fit at once, besides the weights: {count}. --at-once draws a "
            "larger batch in parts."
        )


def _say_of_card(args: argparse.Namespace, info: ModelInfo, few: CachePlan, sample: SamplePlan) -> None:
    """What a card of --card GB holds, and what it costs to stream the weights that it has no room for."""
    if not 1 <= args.card <= 1024:
        raise UserError(f"card: {args.card:g} GB is out of range; choose 1 to 1024.")
    dtype, card = _dtype(args, "cuda"), int(args.card * 2**30) - CONTEXT_BYTES
    shape = info.cache_shape(dtype)
    weights = library.decoder_bytes(info, dtype, _weight_dtype(args))
    _say(f"On a card of {args.card:g} GB, with {weights / MIB:.0f} MiB of weights, computed in {dtype}:")
    for plan in (CachePlan(policy="full"), few):
        needed = _needed(shape, info, plan, sample, "cuda")
        passes = info.pyramid.stages if info.pyramid else info.grid.rows * info.grid.stride
        held = _batch_size(needed, card - weights)
        said = []
        for images in (1, 32):
            left = streamed_bytes(weights, card, needed(images))
            if left is None:
                said.append(f"{images} at once: does not fit")
            elif left:
                seconds = streamed_seconds(left, passes, images)
                said.append(
                    f"{images} at once: {left / MIB:.0f} MiB streamed a pass, at least {seconds:.1f} s a picture"
                )
            else:
                said.append(f"{images} at once: nothing is streamed")
        most = _batch_size(needed, card - STREAMED_ROOM)
        _say(
            f"  {_describe(plan, info)}: {held} at once beside all weights, {most} if they are streamed; "
            + "; ".join(said)
        )
    _say(f"  Load AR Model in ComfyUI can stream. Seconds are predicted, for {BUS_BYTES / 1e9:.0f} GB/s over the bus.")


def run_models(args: argparse.Namespace) -> None:
    """List the bundled models and those in the given folders."""
    bundled = (library.bundled_files(name).decoder for name in BUNDLED)
    paths = [*(path for path in bundled if path.is_file()), *library.find_checkpoints([Path(f) for f in args.folder])]
    for path in paths:
        try:
            info = library.read_info(path)
        except UserError as error:
            _say(f"{path.name}: skipped, {str(error).removeprefix(path.name + ': ')}")
            continue
        kind = f"{info.config.classes} classes" if info.config.classes else "text"
        scales = f" in scales {info.pyramid.text}" if info.pyramid else " in any order" if info.masked else ""
        _say(
            f"{info.name}: {info.grid.rows} x {info.grid.cols} tokens{scales}, {kind}, "
            f"{info.weight_bytes / MIB:.1f} MiB, {path}"
        )
        if info.classes:
            _say("  " + ", ".join(info.classes[:20]) + (", …" if len(info.classes) > 20 else ""))


def run_calibrate(args: argparse.Namespace) -> None:
    """Measure what a model's heads attend to, on a few pictures, and write its profile next to it.

    For models that draw in scales. The policies hack, heatkv, scalekv and amskv read it.
    """
    if not 1 <= args.samples <= MAX_IMAGES:
        raise UserError(f"samples: {args.samples} is out of range; choose 1 to {MAX_IMAGES}.")
    info = _checked(args)
    if info.pyramid is None:
        raise UserError(f"model: {info.name} draws in lines; profiles are of models that draw in scales.")
    if not info.text and not args.classes:
        args.classes = [str(i * info.config.classes // args.samples) for i in range(args.samples)]
    path = args.out or profile_path(model_path(_files(args).decoder))
    if path.suffix != ".json" or path.is_dir():
        raise UserError(f"out: {path} is not a JSON file; end its name in .json.")
    sample, model = _sample_plan(args, info), _load(args)
    if model.decoder.carried:
        raise UserError(f"model: {info.name} keeps no cache, so there is nothing that a profile could say.")
    prompt = _prompt(args, model)
    prompt = prompt.select([i % prompt.rows for i in range(max(args.samples, prompt.rows))])
    with tqdm(total=prompt.rows, unit="picture", leave=False, disable=None) as bar:
        found = calibrate(
            model.decoder, model.tokenizer.quantize, prompt, sample, name=info.name, told=lambda done: bar.update(1)
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    found.write(path)
    _say(f"{path}: {found.mass.shape[0]} layers of {found.mass.shape[1]} heads, from {found.samples} pictures")


def run_check(args: argparse.Namespace) -> None:
    """Measure how close a few lines come to the full cache on this model: a table, a contact sheet and a JSON file."""
    info = _check_options(args)
    if not info.cached:
        raise UserError(f"check: {info.name} keeps no cache, so no budget can change its pictures.")
    sample, out = replace(_sample_plan(args, info), drafts=0), _out(args.out, f"check-{info.name}.png")
    plans = _plans_to_check(args, info)
    model = _load(args)
    prompt = _prompt(args, model)
    if (len(plans) + 1) * prompt.rows * max(args.size, info.grid.rows * 16) ** 2 > MAX_SHEET:
        raise UserError(f"size: {prompt.rows} pictures at {args.size} pixels make too large a sheet; lower --size.")
    writer, parts = Writer([out]), []
    tokens = info.pyramid.tokens if info.pyramid else info.grid.rows * info.grid.cols
    total = (len(plans) + 1) * 2 * prompt.rows * tokens  # drawn, then fed
    with tqdm(total=total, unit="tok", leave=False, disable=None) as bar:
        for rows in split_batch(prompt.rows, args.at_once or CHECKED_AT_ONCE):
            parts.append(check_plans(model, prompt.select(rows), plans, sample.select(rows), bar.update))
    found = joined(parts)
    names = [_describe(each.plan, info) for each in found]
    at_once, seed = max(len(part[0].kl) for part in parts), sample.select([0]).seed
    dtype, device = str(model.decoder.dtype), str(model.decoder.device)
    about = {"model": info.name, "pictures": prompt.rows, "at_once": at_once, "dtype": dtype, "device": device}
    about |= {"torch": torch.__version__, "linear": doctor.version(), "names": prompt.names, **asdict(sample)}
    _say(
        f"{info.name}: {prompt.rows} pictures, {at_once} at a time, guidance {sample.guidance:g}, seed {seed}, "
        f"{dtype.removeprefix('torch.')} on {doctor.device_name(device)}, torch {torch.__version__}, LineAR "
        f"{doctor.version()}"
    )
    for line in check_table(found, names):
        _say(line)
    _say("KL: of the next token, given the full cache's pictures; mean and 95 % interval. time: × the full cache's.")
    with STOP.waiting():
        rows_of_sheet = [
            (name, f"KL {each.divergence}, {_measurements(each.run, info)}", _pictures(model, each.run))
            for name, each in zip(names, found, strict=True)
        ]
        writer.write_sheet(rows_of_sheet, list(prompt.names), args.size, about)
        writer.write_beside(out.with_suffix(".json"), about | {"plans": [each.as_row() for each in found]})
    writer.tell()


def _check_options(args: argparse.Namespace) -> ModelInfo:
    """The model's sizes, with pictures to check it on if none were asked for."""
    if not (args.classes or args.texts):
        decoder = library.bundled_files(args.model).decoder if args.model in BUNDLED else Path(args.model)
        info = library.read_info(decoder, _grid(args))
        if info.text:
            args.texts = list(TEXTS)
        else:
            args.classes = usual_classes(info, len(TEXTS))
    return _checked(args)


def _plans_to_check(args: argparse.Namespace, info: ModelInfo) -> list[CachePlan]:
    """The plan of the options; without any, those presets that the model can be drawn with."""
    names = ("policy", "budget", "share", "anchors", "recent", "release", "storage")
    if args.preset is not None or any(getattr(args, name) is not None for name in names):
        return [_planned(args, info, args.at_once or CHECKED_AT_ONCE)]
    found = []
    for plan in PRESETS.values():
        with suppress(UserError):
            if info.pyramid is not None:
                scale_policy(plan, info.pyramid)
                drops = plan.keeps(info.pyramid) < info.pyramid.kept
            else:
                plan = plan.in_lines(info.grid)
                plan.check(info.grid)
                drops = plan.evicts(info.grid)
            if drops:
                found.append(plan)
    if not found:
        raise UserError(f"model: {info.name} has too few lines for any preset; choose a --budget.")
    return found


def run_doctor(args: argparse.Namespace) -> None:
    """Versions, device, memory, models and a self-test: text to paste into a bug report, without names of folders."""
    device = _device(args)
    folders = [Path(folder) for folder in args.folder] or doctor.usual_folders()
    encoders = [Path(args.text_encoder)] if args.text_encoder else []
    for line in doctor.report(folders, device=device, dtype=_dtype(args, device), encoders=encoders):
        _say(line)


def run_convert(args: argparse.Namespace) -> None:
    """Convert a published checkpoint (.pt) to safetensors with metadata: family, grid, tokenizer, sampling."""
    dtype = None if args.dtype == "same" else DTYPES[args.dtype]
    with tqdm(unit="B", unit_scale=True, leave=False, disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        notes = convert(
            args.source, args.target, grid=_grid(args), tokenizer=args.tokenizer, dtype=dtype, progress=progress
        )
    _say(f"{args.target}: {Path(args.target).stat().st_size / MIB:.1f} MiB")
    for key, value in notes.items():
        _say(f"  {key}: {value if len(value) < 100 else value[:99] + '…'}")


def _job(args: argparse.Namespace, info: ModelInfo) -> batch_draw.Job:
    """What `batch` draws with. Raises UserError for options that the file of prompts stands for."""
    for name in ("classes", "texts"):
        if getattr(args, name):
            option = {"classes": "class", "texts": "text"}[name]
            raise UserError(f"{option}: {args.prompts.name} says what to draw; leave --{option} out.")
    if args.stop_after:
        raise UserError("stop-after: batch draws whole pictures; leave --stop-after out.")
    if args.ray is None and (args.workers or args.gpus is not None):
        raise UserError("workers: they are for --ray; add it, or leave --workers and --gpus out.")
    needs_encoder = info.text and not info.own_tokenizer
    if needs_encoder and not args.text_encoder:
        raise UserError(f"text-encoder: {info.name} needs one to read texts; add --text-encoder PATH, the folder of "
                        "google/flan-t5-xl.")  # fmt: skip
    files, sample = _files(args), _sample_plan(args, info)
    return batch_draw.Job(
        files=ModelFiles(files.decoder.absolute(), files.tokenizer.absolute()),
        plan=_planned(args, info, args.at_once or BATCH),
        sample=replace(sample, drafts=max(sample.drafts, 0)),  # none by itself: all batches are to be drawn alike
        grid=_grid(args),
        pixels=_pixels(args),
        device=None if args.device == "auto" else args.device,
        dtype=None if args.dtype == "auto" else DTYPES[args.dtype],
        step=args.step,
        images=args.images,
        negative=args.negative,
        encoder=str(Path(args.text_encoder).absolute()) if needs_encoder else None,
        size=args.size,
        codes=args.codes,
        weight_dtype=_weight_dtype(args),
    )


def _over_ray(
    args: argparse.Namespace, job: batch_draw.Job, batches: list[list[batch_draw.Picture]]
) -> Iterator[list[Drawn | Skipped]]:
    workers = over_ray.Workers(args.ray, args.workers, args.gpus)
    return over_ray.draw_over_ray(job, batches, workers, _note)


def _note(note: str) -> None:
    _say(note, sys.stderr)


# -- helpers ---------------------------------------------------------------------------------------------------------


def _micro_batches(
    args: argparse.Namespace,
    prompt: Prompt,
    sample: SamplePlan,
    caches: int,
    above: Tensor | None = None,
    kept: Tensor | None = None,
) -> MicroBatches:
    return MicroBatches(prompt, sample, args.at_once or prompt.rows, above, caches=caches, kept=kept, advice=ADVICE)


def _pictures(model: ImageModel, run: Run, rows: slice = slice(None)) -> Tensor:
    """The finished pictures of a run, or some of them: float32 B H W 3."""
    drawn = next((each for each in (run.latents, run.canvas) if each is not None), None)
    return decode(model.tokenizer, (run.tokens if drawn is None else drawn)[rows])


def _kept(model: ImageModel, run: Run) -> Tensor:
    """What a heatmap shows of each place, B rows cols: how much of the picture's time the cache held it; of a masked
    picture, in which share of the steps its keys and values were computed.
    """
    if run.latents is not None:
        steps = [step for step in run.lines if not step.full] or run.lines
        return torch.stack([(step.age == 0).float() for step in steps]).mean(0)
    if (pyramid := model.info.pyramid) is not None:
        return over_scales(run.shares[:, -1], pyramid)
    return lifetime(run.shares)


def _planned_bytes(shape: CacheShape, info: ModelInfo, plan: CachePlan, rows: int, stop_after: int = 0) -> int:
    if info.pyramid is not None:
        return shape.scales_bytes(info.pyramid, plan, rows, stop_after)
    return shape.cache_bytes(info.grid, plan, rows)


def _resolved(
    args: argparse.Namespace, plan: CachePlan, model: ImageModel, prompt: Prompt, sample: SamplePlan
) -> CachePlan:
    """The plan with its budget in lines, or as a share of a pyramid, now that it is known what is drawn at once."""
    if model.info.masked is not None:
        return plan
    rows = min(prompt.rows, args.at_once or prompt.rows) * (2 if sample.guided else 1)
    shapes = [model.decoder.cache_shape(prompt.max_length if sample.guided else prompt.length)]
    if args.drafter:
        shapes.append(model.decoder.drafter[0].cache_shape())
    stages = model.info.pyramid or model.info.grid
    return min((plan.resolve(shape, stages, rows) for shape in shapes), key=lambda each: each.ratio(stages))


def _draw(
    model: ImageModel,
    micro_batches: MicroBatches,
    plans: list[CachePlan],
    args: argparse.Namespace,
    then: Callable[[], None] = lambda: None,
) -> list[Run]:
    """Draw the images once for each plan, in micro-batches if there are too many. `then` is called after each."""
    if model.info.pyramid is not None:
        for note in dict.fromkeys(note for plan in plans if (note := surveys(plan, model.decoder))):
            _say(f"note: {note}.", sys.stderr)
    for micro_batch in micro_batches:
        with micro_batches.watch(micro_batch):
            _draw_micro_batch(model, micro_batch, plans, args)
        then()
    return micro_batches.runs


def _shared(model: ImageModel, prompt: Prompt, codes: Tensor, plan: CachePlan, sample: SamplePlan) -> float:
    """How much of the next token's probability the plan shares with the full cache, mean over the first images."""
    some = range(min(prompt.rows, JUDGED))
    found = shared_probability(model.decoder, prompt.select(some), codes[: len(some)], plan, sample)
    lines = tqdm(found, total=model.info.grid.rows, unit="line", leave=False, disable=None)
    return float(torch.cat(list(lines), 1).mean())


def _unfinished(model: ImageModel, codes: Tensor) -> Tensor:
    """A picture of the rows drawn so far, codes rows cols, with grey below, or of the scales so far, codes N: H W 3.

    Of masked steps, latents Z h w: the gaps are filled from around them, and dimmed.
    """
    if model.info.masked is not None:
        return LatentPreview.of(model.tokenizer, codes[None])[0]
    if (pyramid := model.info.pyramid) is not None:
        quantizer = model.tokenizer.quantize
        ends = [pyramid.index(stage + 1) for stage in range(pyramid.stages)]
        scales = (
            codes[None].to(model.tokenizer.device).split([b - a for a, b in pairwise([0, *ends]) if b <= len(codes)], 1)
        )
        maps = [one.unflatten(1, sides) for one, sides in zip(scales, pyramid.sides, strict=False)]
        return decode(model.tokenizer, quantizer.canvas(pyramid, maps))[0]
    preview = Preview(model.tokenizer, model.info.grid.rows)
    preview.lines = list(codes[None].unbind(1))
    return preview.pictures()[0]


def _draw_micro_batch(
    model: ImageModel, micro_batch: MicroBatch, plans: list[CachePlan], args: argparse.Namespace
) -> None:
    """The plans take turns line by line, or scale by scale, so that their times are comparable."""
    prompt, sample, name, pyramid = micro_batch.prompt, micro_batch.sample, model.info.name, model.info.pyramid
    graphs: list[Graphs] = []
    drawing: list[Iterator[Any]]
    if masked := _masked_plans(args, model.info):
        head = model.decoder.head
        if use_graphs(args.step, model.decoder.device, prompt.rows * (2 if sample.guided else 1)):
            head = CapturedHead(head)
        drawing = [
            generate_masked(model.decoder, prompt, sample, *masked, given=given, denoise=head, name=name)
            for given in micro_batch.above
        ]
    elif pyramid is not None:
        quantizer = model.tokenizer.quantize
        scales = {"stop_after": args.stop_after, "prune": _prune(args), "name": name}
        drawing = [
            generate_scales(model.decoder, quantizer, prompt, plan, sample, given=given, **scales)
            for plan, given in zip(plans, micro_batch.above, strict=True)
        ]
    else:
        use = use_graphs(args.step, model.decoder.device, prompt.rows * (2 if sample.guided else 1))
        graphs = [Graphs(model.decoder.step, evict, check) for _ in plans] if use else []
        kwargs: list[dict[str, Any]] = [each.kwargs for each in graphs] or [{} for _ in plans]
        drawing = [
            generate(model.decoder, prompt, plan, sample, above=above, kept=micro_batch.kept, name=name, **more)
            for plan, above, more in zip(plans, micro_batch.above, kwargs, strict=True)
        ]
    tokens = model.info.grid.rows * model.info.grid.cols if pyramid is None else pyramid.tokens
    total = len(plans) * tokens * prompt.rows
    with tqdm(total=total, unit="tok", leave=False, disable=None) as bar:
        for lines in zip(*drawing, strict=True):
            for run, line in zip(micro_batch.runs, lines, strict=True):
                run.add(line)
                bar.update(int(line.drawn.sum()) if masked else line.tokens.numel())
    if why := next((each.why for each in graphs if each.why), ""):
        _say(f"{why}.", sys.stderr)


def _load(args: argparse.Namespace) -> ImageModel:
    device = _device(args)
    if device == "cpu" and (note := limit_threads()):
        _say(f"note: {note}.", sys.stderr)
    model = library.load_model(
        _files(args), grid=_grid(args), device=device, dtype=_dtype(args, device), weight_dtype=_weight_dtype(args)
    )
    pack(model.decoder)  # on the CPU only, where it halves the time of a step
    if args.drafter:
        drafter = library.load_model(_files(args, args.drafter), device=device, dtype=_dtype(args, device))
        pack(drafter.decoder)
        if drafter.codebook != model.codebook:
            raise UserError(
                f"drafter: {drafter.info.name}'s codes stand for other pieces of pictures than {model.info.name}'s; "
                "choose two models of the same tokenizer."
            )
        paired = with_drafter(model.decoder, drafter.decoder, args.drafter_scales or model.decoder.pyramid.stages - 2)
        model = replace(model, decoder=paired)
    return replace(model, info=_with_size(args, model.info))


def _files(args: argparse.Namespace, model: str = "") -> ModelFiles:
    """Of --model, or of another one that shares its tokenizer."""
    model = model or args.model
    if model in BUNDLED:
        return library.bundled_files(model)
    tokenizer = Path(args.tokenizer) if args.tokenizer else library.find_tokenizer(model, _grid(args))
    return ModelFiles(Path(model), tokenizer)


def _device(args: argparse.Namespace) -> str:
    if args.device != "auto":
        return _checked_device(args.device)
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _checked_device(name: str) -> str:
    """Raises UserError for a device that does not exist, or not on this computer."""
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise UserError(f"device: {quoted(name)} is unknown; choose one of auto, {', '.join(DEVICES)}.")
    try:
        torch.empty(1, device=name)
    except Exception as error:  # each device has exceptions of its own
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"device: {name} cannot be used on this computer ({reason}); choose auto or cpu.") from error
    return name


def _free(device: str) -> int | None:
    """Free bytes on the device; None if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() if device == "cpu" else None


def _needed(
    shape: CacheShape, info: ModelInfo, plan: CachePlan, sample: SamplePlan, device: str
) -> Callable[[int], int]:
    """From a number of images to the bytes that drawing them at once takes besides the weights."""
    sequences, window = 2 if sample.guided else 1, max(sample.drafts, 0)  # AUTO: none for more than one image

    def needed(images: int) -> int:
        if info.pyramid is not None:
            logits, hidden = info.config.logits, info.config.hidden
            return scales_run_bytes(shape, info.pyramid, plan, sequences * images, logits, hidden, device)
        return run_bytes(shape, info.grid, plan, sequences * images, info.config.codes, device, window)

    return needed


def _batch_size(needed: Callable[[int], int], room: int) -> str:
    """How many images fit into `room` bytes, up to MAX_IMAGES."""
    if needed(1) > room:
        return "none"
    count = max_batch_size(room, MAX_IMAGES, needed)
    return f"{count} or more" if count == MAX_IMAGES else str(count)


def _weight_dtype(args: argparse.Namespace) -> str | None:
    return None if args.weight_dtype == "default" else args.weight_dtype


def _dtype(args: argparse.Namespace, device: str) -> torch.dtype:
    return DTYPES[args.dtype] if args.dtype != "auto" else DTYPES["float32" if device == "cpu" else "bfloat16"]


def _grid(args: argparse.Namespace) -> tuple[int, int] | None:
    if args.grid is None:
        return None
    if not (sides := re.fullmatch(r"([0-9]{1,4})x([0-9]{1,4})", args.grid)):
        raise UserError(f"grid: {quoted(args.grid)} is not a grid; write rows x columns, for example 24x24.")
    return int(sides[1]), int(sides[2])


def _with_size(args: argparse.Namespace, info: ModelInfo) -> ModelInfo:
    """The model with the size that was requested, if any."""
    size = _pixels(args)
    return info if size is None else info.with_size(size)


def _pixels(args: argparse.Namespace) -> tuple[int, int] | None:
    if args.pixels is None:
        return None
    if not (sides := re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", args.pixels)):
        raise UserError(f"pixels: {quoted(args.pixels)} is not a size; write width x height, for example 832x1216.")
    return int(sides[1]), int(sides[2])


def _cache_plan(args: argparse.Namespace) -> CachePlan:
    changes = {
        k: getattr(args, k)
        for k in ("policy", "anchors", "recent", "release", "storage")
        if getattr(args, k) is not None
    }
    if args.share is not None:
        if args.budget is not None:
            raise UserError("share: --budget says the same in lines; leave one of the two out.")
        changes["share"] = _share(args.share)
    if args.budget is not None:
        changes |= parse_budget(args.budget)
    plan = PRESETS[args.preset or "Balanced"]
    if args.policy is not None:  # the preset's release is meant for the preset's policy
        plan = replace(plan, policy=args.policy, release="auto")
    return replace(plan, **changes)


def _share(text: str) -> float:
    """'1/6', '15%' or '0.17' as a number."""
    try:
        return parse_share(text)
    except (ValueError, ArithmeticError):
        raise UserError(f"share: {quoted(text)} is not a share; write it as 1/6, 15% or 0.17.") from None


def _prune(args: argparse.Namespace) -> PrunePlan | None:
    """'0.4,0.5' and '3-27' as a plan."""
    if not args.prune:
        if args.prune_layers:
            raise UserError("prune-layers: it says in which layers --prune leaves tokens out; add that one.")
        return None
    try:
        ratios = tuple(float(part) for part in args.prune.split(","))
    except ValueError:
        raise UserError(f"prune: {quoted(args.prune)} are no shares; write them as 0.4,0.5.") from None
    layers = re.fullmatch(r"(\d{1,4})-(\d{1,4})", args.prune_layers or "0-0")
    if layers is None:
        raise UserError(f"prune-layers: {quoted(args.prune_layers)} are no layers; write them as 3-27.")
    return PrunePlan(ratios, int(layers[1]), int(layers[2])) if args.prune_layers else PrunePlan(ratios)


def _sample_plan(args: argparse.Namespace, info: ModelInfo) -> SamplePlan:
    names = ("seed", "guidance", "guidance_interval", "temperature", "top_k", "top_p", "drafts", "smooth")
    if args.seed is not None and not 0 <= args.seed <= MAX_SEED:
        raise UserError(f"seed: {args.seed} is out of range; choose 0 to {MAX_SEED}.")
    given = {k: getattr(args, k) for k in names if getattr(args, k) is not None}
    if args.seeds is not None:
        if args.seed is not None:
            raise UserError("seeds: --seed is one for all; leave one of the two out.")
        given["seeds"] = parse_seeds(args.seeds)
    return replace(info.defaults, **given)


def _prompt(args: argparse.Namespace, model: ImageModel) -> Prompt:
    """The prompt of --class or --text and --images, one row per image."""
    if model.info.own_tokenizer:
        prompt = model.prompt(args.texts, args.negative)
    elif model.info.text:
        encoder = text.find_text_encoder(args.text_encoder)
        prompt = text.prompt(args.texts, encoder, negative=args.negative, model=model.info)
    else:
        prompt = model.class_prompt(args.classes or _demo_classes(model.info))
    model.check(prompt)
    return prompt.repeat(args.images)


def _planned(args: argparse.Namespace, info: ModelInfo, images: int) -> CachePlan:
    """The plan of the options with its budget in lines, or as a share of a pyramid, for so many images at once."""
    rows = images * (2 if _sample_plan(args, info).guided else 1)
    shape = info.cache_shape(_dtype(args, _device(args)))
    return _cache_plan(args).resolve(shape, info.pyramid or info.grid, rows)


def _at_once(args: argparse.Namespace, otherwise: list[str]) -> int:
    """How many images are drawn at once; `otherwise` are drawn where neither classes nor texts are asked for."""
    images = args.images * len(args.classes or args.texts or otherwise)
    return min(images, args.at_once or images)


def _demo_classes(info: ModelInfo) -> list[str]:
    return [c for c in DEMO_CLASSES if c in info.classes] or ["0"]


def _checked(args: argparse.Namespace, drawing: bool = True) -> ModelInfo:
    """The model's sizes, once everything is refused that can be before the model is loaded.

    drawing  whether the command draws, so that there has to be a text
    """
    if not 1 <= args.images <= MAX_IMAGES:
        raise UserError(f"images: {args.images} is out of range; choose 1 to {MAX_IMAGES}.")
    if args.at_once < 0:
        raise UserError(f"at-once: {args.at_once} is out of range; choose 1 or more, or 0 for all.")
    if not 0 <= getattr(args, "size", 0) <= MAX_SIDE:
        raise UserError(f"size: {args.size} is out of range; choose 0 (as drawn) to {MAX_SIDE} pixels.")
    _device(args)
    plan = _cache_plan(args)
    decoder = library.bundled_files(args.model).decoder if args.model in BUNDLED else Path(args.model)
    info = _with_size(args, library.read_info(decoder, _grid(args)))
    _check_flags(args, info, drawing)
    _check_region(args, info)
    if best := getattr(args, "best", 0):
        if not 0 < best <= args.images:
            raise UserError(f"best: {best} of {args.images} images cannot be kept; raise --images, or lower --best.")
        if info.pyramid is not None:
            raise UserError(f"best: {info.name} draws in scales, and cannot judge pictures yet; leave it out.")
        if args.by == "vqa":
            check_looks(info, _files(args))
    sample, otherwise = _sample_plan(args, info), _demo_classes(info) if drawing else ["one"]
    sample.image_seeds(args.images * len(args.classes or args.texts or otherwise))
    if masked := _masked_plans(args, info):
        masked[0].check(info.config.tokens)
        if drawing:
            _files(args)
        return info
    rows = _at_once(args, otherwise) * (2 if sample.guided else 1)
    plan = plan.resolve(info.cache_shape(_dtype(args, _device(args))), info.pyramid or info.grid, rows)
    if info.pyramid is None:
        plan.check(info.grid)
    else:
        scale_policy(plan, info.pyramid)
        check_stop(args.stop_after, info.pyramid)
        if prune := _prune(args):
            prune.check(args.stop_after or info.pyramid.stages, info.config.layers)
        _check_drafter(args, info.pyramid)
    if drawing:
        _files(args)
    return info


def _check_drafter(args: argparse.Namespace, pyramid: Pyramid) -> None:
    """Refuse a drafter that cannot draw the model's first scales."""
    if not args.drafter:
        if args.drafter_scales:
            raise UserError("drafter-scales: it says how many scales --drafter draws; add that one.")
        return
    drafter = library.read_info(args.drafter)
    if drafter.pyramid is None:
        raise UserError(f"drafter: {drafter.name} draws in lines; choose a model that draws in scales.")
    if not 0 <= args.drafter_scales < pyramid.stages:
        raise UserError(
            f"drafter-scales: {args.drafter_scales} is out of range; choose 1 to {pyramid.stages - 1}, or 0 for all "
            "but the last two."
        )


def _check_flags(args: argparse.Namespace, info: ModelInfo, drawing: bool) -> None:
    """Refuse options that do not apply to the model, and ask for those that it needs."""
    guided = _sample_plan(args, info).guided
    if args.tokenizer and args.model in BUNDLED:
        raise UserError("tokenizer: the bundled model comes with its own; leave --tokenizer out.")
    _check_kind(args, info)
    in_scales = info.pyramid is not None
    of_lines, of_scales = (
        {"drafts": args.drafts > 0, "step": args.step == "graph"},
        ("stop_after", "smooth", "drafter", "prune"),
    )
    for name, given in (of_lines if in_scales else {name: getattr(args, name) for name in of_scales}).items():
        if given:
            option, stage = name.replace("_", "-"), "scale" if in_scales else "line"
            raise UserError(f"{option}: it does nothing here, as {info.name} draws {stage} by {stage}; leave it out.")
    if not info.cached:
        for name in ("preset", "policy", "budget", "share", "anchors", "recent", "release", "storage", "heatmap"):
            if getattr(args, name, None) not in (None, False):
                raise UserError(f"{name}: it does nothing here, as {info.name} keeps no cache; leave it out.")
    if not info.text:
        if args.texts:
            raise UserError(f"text: {info.name} draws classes, not texts; use --class instead of --text.")
        for name, value in (("negative", args.negative), ("text-encoder", args.text_encoder)):
            if value:
                raise UserError(f"{name}: {info.name} draws classes, not texts; leave --{name} out.")
        for name in args.classes or ():
            library.class_label(info, name)
        return
    if args.classes:
        raise UserError(f"class: {info.name} draws from texts, not classes; use --text instead of --class.")
    if info.own_tokenizer and args.text_encoder:
        raise UserError(f"text-encoder: {info.name} reads texts itself; leave --text-encoder out.")
    if args.negative and not guided:
        raise UserError("negative: it has an effect only with guidance; raise --guidance above 1 or leave it out.")
    if any(not text.strip() for text in args.texts or ()):
        raise UserError("text: it is empty; describe what to draw.")
    if drawing and not args.texts:
        encoder = "" if info.own_tokenizer else " and --text-encoder PATH, the folder of google/flan-t5-xl"
        raise UserError(f"text: {info.name} draws from texts; add --text 'a red fox in the snow'{encoder}.")
    if info.own_tokenizer:
        return
    if args.text_encoder:
        text.find_text_encoder(args.text_encoder, width=info.config.caption_dim)
    elif drawing:
        raise UserError(
            f"text-encoder: {info.name} needs one to read texts; add --text-encoder PATH, the folder of "
            "google/flan-t5-xl."
        )


# -- a region drawn anew ---------------------------------------------------------------------------------------------


def _check_region(args: argparse.Namespace, info: ModelInfo) -> None:
    """Refuse an image and a mask that the model cannot use, before it is loaded."""
    if bool(getattr(args, "image", None)) != bool(getattr(args, "mask", None)):
        raise UserError("mask: --image says what is kept and --mask what is drawn anew; give both.")
    fills = getattr(args, "candidates", 1)
    if not 1 <= fills <= MAX_IMAGES:
        raise UserError(f"candidates: {fills} is out of range; choose 1 to {MAX_IMAGES}.")
    if not getattr(args, "image", None):
        if fills > 1:
            raise UserError("candidates: they are fills of a region; add --image and --mask, or leave it out.")
        return
    if info.pyramid is not None:
        raise UserError(f"mask: {info.name} draws in scales and takes no mask; leave it out.")
    if info.masked is not None and fills > 1:
        raise UserError(
            f"candidates: {info.name} sees all around a region while it fills it, so there is nothing to choose by; "
            "leave it out."
        )
    picture, mask, _ = _region(args, info)
    if info.masked is not None:
        check_mask(picture, mask, (picture.shape[1], picture.shape[2]))
        return
    nothing = torch.zeros(1, info.grid.rows, info.grid.cols, dtype=torch.int64)
    kept = keep_outside(nothing, masked_cells(mask, info.grid.rows, info.grid.cols))
    if fills > 1 and args.best:
        raise UserError("best: --candidates chooses among the fills of a region; leave one of the two out.")
    if fills > 1 and not following(kept).any():
        raise UserError(
            "candidates: nothing is kept behind the masked region, so there is nothing to judge fills by; leave it out."
        )


def _region(args: argparse.Namespace, info: ModelInfo) -> tuple[Tensor, Tensor, list[str]]:
    """--image and --mask at the size that the model draws, 1 H W 3 and 1 H W, and what was done to them."""
    picture, mask = read_image(args.image, "image")[None], read_image(args.mask, "mask")[None, ..., 0]
    pixels = info.pixels
    if info.masked is None:
        tokenizer = library.read_checkpoint(_files(args).tokenizer)
        pixels = library.describe_tokenizer(tokenizer)[0].factor
    return aligned(picture, mask, (info.grid.rows * pixels, info.grid.cols * pixels))


def _given(args: argparse.Namespace, model: ImageModel) -> Tensor | None:
    """What --image and --mask leave of a picture, for a masked model: latents with gaps."""
    if model.info.masked is None or not args.image:
        return None
    picture, mask, notes = _region(args, model.info)
    for note in notes:
        _say(f"note: {note}", sys.stderr)
    size = picture.shape[1], picture.shape[2]
    return known_latents(model.tokenizer, picture, mask, size, model.info.config.patch)


def _kept_codes(args: argparse.Namespace, model: ImageModel) -> Tensor | None:
    """The same for a model that draws in lines: codes 1 rows cols with DRAW in the region."""
    if model.info.masked is not None or not args.image:
        return None
    if not model.tokenizer.config.encoder_widths:
        raise UserError(f"image: {model.files.tokenizer.name} has no encoder, so no picture can be kept; choose one.")
    picture, mask, notes = _region(args, model.info)
    for note in notes:
        _say(f"note: {note}", sys.stderr)
    pictures = picture.permute(0, 3, 1, 2).to(model.tokenizer.device) * 2 - 1
    with torch.inference_mode():
        codes = model.tokenizer.encode(pictures).cpu()
    return keep_outside(codes, masked_cells(mask, model.info.grid.rows, model.info.grid.cols))


def _edited(args: argparse.Namespace) -> dict[str, Any]:
    """What a picture's notes say of a region drawn anew."""
    if not args.image:
        return {}
    return {"image": args.image.name, "mask": args.mask.name, "candidates": args.candidates}


# -- masked models ---------------------------------------------------------------------------------------------------

OF_MASKED = {
    "steps": "steps", "denoising": "denoising", "denoising_last": "denoising_last", "start": "start",
    "guidance_schedule": "schedule",
}  # fmt: skip
OF_STEP_CACHE = ("refresh", "rule", "full_every", "full_first", "full_last")
OF_OTHERS = (
    "policy", "budget", "share", "anchors", "recent", "release", "storage", "top_k", "top_p", "guidance_interval",
    "stop_after", "smooth",
)  # fmt: skip


def _masked_plans(args: argparse.Namespace, info: ModelInfo) -> tuple[MaskedPlan, StepCachePlan] | None:
    """How a masked picture is drawn, and what a step computes again; None for other models."""
    if info.masked is None:
        return None

    def asked(*options: str) -> dict[str, Any]:
        return {name: value for name in options if (value := getattr(args, name, None)) is not None}

    changes = {OF_MASKED[option]: value for option, value in asked(*OF_MASKED).items()}
    preset = STEP_CACHES[getattr(args, "step_cache", "Off")]
    return replace(info.masked, **changes), replace(preset, **asked(*OF_STEP_CACHE))


def _check_kind(args: argparse.Namespace, info: ModelInfo) -> None:
    """Refuse options of masked models for others, and the reverse."""
    for_masked = [*OF_MASKED, *OF_STEP_CACHE]
    refused = [name for name in (for_masked if info.masked is None else OF_OTHERS) if getattr(args, name, None)]
    if info.masked is None and getattr(args, "step_cache", "Off") != "Off":
        refused.append("step_cache")
    if info.masked is not None and args.drafts > 0:
        refused.append("drafts")
    if refused:
        how = "draws masked tokens step by step" if info.masked else "does not draw masked tokens"
        raise UserError(f"{refused[0].replace('_', '-')}: it does nothing here, as {info.name} {how}; leave it out.")


def _plan_masked(args: argparse.Namespace, info: ModelInfo, images: int, rows: int, dtype: torch.dtype) -> None:
    """What a masked picture takes: work, and memory for what is kept from step to step."""
    masked, cache = _masked_plans(args, info) or (MaskedPlan(), StepCachePlan())
    shape = info.config.step_cache_shape(dtype.itemsize)
    work = shape.work(masked, cache, info.config.tokens)
    full = shape.work(masked, STEP_CACHES["Off"], info.config.tokens)
    _say(
        f"{masked.steps} steps, {sum(work.full)} of them full; the others compute "
        + (f"{work.partial:.0f} of {shape.slots} slots on average." if work.partial else "nothing, as there are none.")
    )
    steps = [masked.denoising_steps(step) for step in range(masked.steps)]
    _say(f"{sum(steps) / len(steps):.0f} denoising steps a token on average, from t = {masked.start}.")
    _say(f"The transformer's work is 1/{full.rows / work.rows:.3g} of that of full steps.")
    kept = shape.bytes(cache, masked.steps, rows)
    _say(
        f"Keys and values that are kept take {kept / MIB:.1f} MiB more memory; full steps keep none."
        if kept
        else "Nothing is kept from step to step, so no memory is added."
    )
    device = _device(args).partition(":")[0]
    if (free := _free(_device(args))) is not None:
        room = free - library.decoder_bytes(info, dtype)
        sequences = rows // images

        def needed(images: int) -> int:
            return masked_run_bytes(shape, cache, masked.steps, sequences * images, info.config.hidden)

        count = "none" if needed(1) > room else str(max_batch_size(room, MAX_IMAGES, needed))
        _say(f"{free / MIB:.0f} MiB are free on {device}. Images that fit at once, besides the weights: {count}.")


def _masked_summary(run: Run) -> str:
    steps = run.lines
    computed = torch.cat([step.computed for step in steps])
    drawn = sum(int(step.drawn.sum()) for step in steps)
    mean = float(computed[computed > 0].float().mean())
    kept = steps[-1].cache_bytes / MIB
    return (
        f"{drawn} tokens in {len(steps)} steps, {mean:.0f} of {steps[0].slots} slots computed in a step on average, "
        f"{run.seconds:.1f} s: transformer {sum(step.transformer for step in steps):.1f}, diffusion head "
        f"{sum(step.head for step in steps):.1f}; "
        + (f"keys and values add {kept:.1f} MiB" if kept else "no keys and values are kept")
    )


# -- what must not be lost -------------------------------------------------------------------------------------------


class Stop:
    """Ctrl-C: stops once, and never in the middle of saving."""

    def __init__(self) -> None:
        self.asked, self.busy = False, False

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Answer to Ctrl-C within. Only the main thread can, and only if nobody else does."""
        self.asked, self.busy = False, False
        main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGINT) if main else None
        if before is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done within is finished first; then the command stops, if that was asked for meanwhile."""
        asked, busy, self.busy = self.asked, self.busy, True
        try:
            yield
        finally:
            self.busy = busy
        if self.asked and not asked and not busy:
            raise KeyboardInterrupt

    def _ask(self, *_: object) -> None:
        first, self.asked = not self.asked, True
        if first and not self.busy:
            raise KeyboardInterrupt
        with suppress(OSError):
            os.write(2, b"stopping, once what is drawn is saved.\n")


STOP = Stop()


class Writer:
    """Writes pictures to `paths`, one after the other, and tells of them when there is nothing left to lose.

    Raises UserError at once for a path that cannot be written. A picture that cannot be written after all, because the
    disk is full, say, goes to the system's folder for temporary files.
    """

    def __init__(self, paths: list[Path]):
        self.paths, self.count = paths, 0
        self.written: list[Path] = []
        self.problem = ""
        self.spare: Path | None = None
        folder = paths[0].parent
        part = max(paths, key=lambda path: len(path.name))
        part = part.with_name(part.name + ".part")
        try:
            file = next((p for p in (folder, *folder.parents) if p.exists() and not p.is_dir()), None)
            if file is not None:
                raise UserError(f"out: {file} is a file, so {paths[0]} cannot be in it; choose another folder.")
            if taken := next((path for path in paths if path.is_dir()), None):
                raise UserError(f"out: {taken} is a folder; choose another name.")
            folder.mkdir(parents=True, exist_ok=True)
            part.touch()
            part.unlink()
        except OSError as error:
            raise UserError(
                f"out: {paths[0]} cannot be written ({error.strerror}); choose another place or a shorter name."
            ) from error

    def write(self, picture: Tensor, size: int, notes: dict[str, Any]) -> None:
        """The next picture, H W 3, enlarged to `size` if there is memory for it."""
        try:
            image = to_image(picture, size)
        except MemoryError:
            image = to_image(picture)
        self._save(lambda path: save(image, path, notes))

    def write_sheet(
        self, rows: list[tuple[str, str, Tensor]], names: list[str], size: int, notes: dict[str, Any]
    ) -> None:
        """The next picture, a contact sheet."""
        try:
            image = contact_sheet(rows, names, size)
        except MemoryError:
            image = contact_sheet(rows, names, 0)
        self._save(lambda path: save(image, path, notes))

    def write_scores(
        self,
        pictures: Tensor,
        scores: list[float],
        chosen: list[int],
        titles: list[str],
        remark: str,
        size: int,
        notes: dict[str, Any],
    ) -> None:
        """The next picture, a sheet of pictures with their scores."""
        try:
            image = score_sheet(pictures, scores, chosen, titles, remark, size)
        except MemoryError:
            image = score_sheet(pictures, scores, chosen, titles, remark, 0)
        self._save(lambda path: save(image, path, notes))

    def write_beside(self, path: Path, notes: dict[str, Any]) -> None:
        """A file of numbers beside the pictures, as JSON."""

        def write(path: Path) -> None:
            path.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")

        self.paths.append(path)
        self._save(write)

    def _save(self, save: Callable[[Path], None]) -> None:
        path, self.count = self.paths[self.count], self.count + 1
        try:
            save(path)
            self.written.append(path)
            return
        except OSError as error:
            reason = error.strerror or str(error)
        try:
            self.spare = self.spare or Path(tempfile.mkdtemp(prefix="linear-"))
            save(self.spare / path.name)
            self.written.append(self.spare / path.name)
            self.problem = f"{path}: could not be written ({reason}); it is in {self.spare} instead."
        except OSError:
            self.problem = (
                f"{path}: could not be written ({reason}), and not elsewhere either; free some space and "
                "run this again: the same settings draw the same picture."
            )

    def tell(self, before: str = "") -> None:
        """Print what was written. Raises UserError if something went elsewhere."""
        for path in self.written:
            _say(f"{before}{path}")
        if self.problem:
            raise UserError(self.problem)


def _say(line: str, stream: TextIO | None = None) -> None:
    """Print a line, by default to stdout. If its reader has gone, or its disk is full, nobody is told any more."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except (OSError, ValueError):
        with suppress(OSError, ValueError):  # or else Python complains when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _out(out: Path | None, name: str) -> Path:
    path = out or Path("out") / name
    with suppress(OSError):  # what is wrong with it is told before anything is drawn (Writer)
        path = path / name if path.is_dir() else path
    if path.suffix.lower() != ".png":
        raise UserError(f"out: {path} is not a PNG file; end its name in .png.")
    return path


def _enlarged_size(pictures: Tensor, size: int) -> tuple[int, int]:
    """Height and width after `to_image`, so that a heatmap over the picture has crisp cells."""
    height, width = pictures.shape[1:3]
    factor = max(1, size // max(height, width))
    return height * factor, width * factor


def _describe(plan: CachePlan, info: ModelInfo) -> str:
    other_release = plan.release != CachePlan(plan.policy).release
    if info.pyramid is not None:
        if plan.keeps(info.pyramid) == info.pyramid.kept:
            return "full cache"
        what = f"{plan.keeps(info.pyramid)} of {info.pyramid.kept} tokens"
    else:
        plan = plan.in_lines(info.grid)
        if not plan.evicts(info.grid):
            return "full cache"
        what = f"{plan.budget} of {info.grid.rows} lines"
    return (
        f"{what}, {plan.policy}"
        + (f", {plan.release}" if other_release else "")
        + ("" if plan.storage == "full" else f", {plan.storage.removeprefix('int')} bits")
    )


def _ratio(plan: CachePlan, info: ModelInfo) -> str:
    share = plan.ratio(info.pyramid or info.grid)
    return "all" if share == 1 else f"1/{1 / share:.3g}"


def _cache_mib(run: Run) -> float:
    return run.lines[-1].cache_bytes / MIB


def _state_words(size: int) -> str:
    """What is said instead of a cache's size, of a state of `size` bytes."""
    return f"no cache: a state of {size / MIB:.1f} MiB"


def _measurements(run: Run, info: ModelInfo) -> str:
    size = f"{_cache_mib(run):.1f} MiB of keys and values" if info.cached else _state_words(run.lines[-1].cache_bytes)
    return f"{size}, {run.tokens_per_second:.0f} tokens/s"


def _summary(run: Run, info: ModelInfo) -> str:
    stage = "line" if run.canvas is None else "scale"
    if not info.cached:
        return f"{_measurements(run, info)}, {run.seconds:.1f} s"
    text = f"{_measurements(run, info)}, at most {run.held:.0f} image tokens held after a {stage}, {run.seconds:.1f} s"
    if not run.passes:
        return text
    return f"{text}, {run.passes:.0f} passes of {run.tokens_per_pass:.1f} tokens, {run.accepted:.0%} of drafts right"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m linear_core",
        description="Autoregressive image generation that keeps only a few lines of the KV cache.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    where = argparse.ArgumentParser(add_help=False)
    where.add_argument("where", nargs="?", metavar="MODEL", help="the same as --model")

    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("model")
    group.add_argument(
        "--model",
        default=library.BUNDLED,
        metavar="PATH",
        help=f"file or folder of the decoder; default: {library.BUNDLED}, the bundled model; "
        f"{library.BUNDLED_SCALES}: the bundled one that draws in scales",
    )
    group.add_argument("--tokenizer", metavar="FILE", help="its VQ tokenizer, if it is not next to it")
    group.add_argument("--grid", metavar="ROWSxCOLS", help="token grid, if neither the file nor its name tells")
    group.add_argument(
        "--pixels",
        metavar="WIDTHxHEIGHT",
        help="picture size, for models that offer a choice (Lumina-mGPT, Emu3, Infinity)",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="of decoder and cache (default: auto)"
    )
    group.add_argument(
        "--weight-dtype",
        default="default",
        choices=["default", *QUANTISATIONS],
        help="how the decoder's large matrices are stored: as computed (default), or in 8 or 4 bits a weight, which "
        "saves memory, and time when few images are drawn at once",
    )

    cache = argparse.ArgumentParser(add_help=False)
    group = cache.add_argument_group("cache", "default: the preset's values")
    group.add_argument("--preset", choices=list(PRESETS), help="default: Balanced, 4 lines")
    group.add_argument("--policy", choices=[*POLICIES, *SCALE_POLICIES], help="decides which tokens stay")
    group.add_argument(
        "--budget",
        metavar="BUDGET",
        help="how much is kept: lines of image tokens (4), a share of the full cache (1/6 or 15%%), or as much as fits "
        "into so much memory for all images drawn at once (300MiB, 2GiB)",
    )
    group.add_argument("--share", metavar="SHARE", help="the same as --budget with a share, such as 1/6")
    group.add_argument("--anchors", type=int, metavar="TOKENS", help="number of first image tokens that always stay")
    group.add_argument("--recent", type=int, metavar="LINES", help="number of newest whole lines that always stay")
    group.add_argument(
        "--release",
        choices=["auto", *RELEASES],
        help="evicted tokens vanish (strict), stay until they are overwritten (lazy) or are merged into the nearest "
        "kept one (fold); auto: fold for policy fold, strict for others",
    )
    group.add_argument(
        "--storage", choices=STORAGES, help="keys and values as computed (full), in 8 bits (int8) or in 4 (int4)"
    )

    sample = argparse.ArgumentParser(add_help=False)
    group = sample.add_argument_group("sampling", "default: the model's own settings")
    group.add_argument(
        "--class", dest="classes", action="append", metavar="NAME", help="class name or number; repeat for more"
    )
    group.add_argument("--text", dest="texts", action="append", metavar="TEXT", help="what to draw; repeat for more")
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt of guidance, for all texts")
    group.add_argument("--text-encoder", metavar="PATH", help="for LlamaGen and Infinity: folder or file of FLAN-T5-XL")
    group.add_argument("--images", type=int, default=1, metavar="N", help="images per class or text (default: 1)")
    group.add_argument(
        "--at-once", type=int, default=0, metavar="N", help="draw at most N images at once; 0: all (default)"
    )
    group.add_argument(
        "--step",
        default="auto",
        choices=STEP_KINDS,
        help="run every token eagerly (eager), capture token and line end as CUDA graphs (graph), or do so on the GPUs "
        "where that was measured to be faster (auto, the default; none has been measured yet)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="image i uses seed N + i (default: 0)")
    group.add_argument("--seeds", metavar="LIST", help="a seed for each image instead, such as 3,7,100-103")
    group.add_argument("--guidance", type=float, metavar="SCALE", help="1: none; typical: 2 to 5")
    group.add_argument(
        "--guidance-interval", type=int, metavar="TOKENS", help="image tokens after which guidance ends; -1: never"
    )
    group.add_argument("--temperature", type=float, help="0: greedy; typical: 1")
    group.add_argument("--top-k", type=int, metavar="CODES", help="sample from the most likely codes only; 0: all")
    group.add_argument(
        "--top-p",
        type=float,
        metavar="MASS",
        help="sample from the smallest set of codes with this probability; 1: all",
    )
    group.add_argument(
        "--drafts",
        type=int,
        default=AUTO,
        metavar="TOKENS",
        help="tokens that one forward pass guesses ahead and checks; the image is the same; 0: none; -1: 8 for a "
        "single float32 image on the CPU, none otherwise (default)",
    )
    group.add_argument(
        "--stop-after", type=int, default=0, metavar="SCALES", help="for models that draw in scales: draw only so many"
    )
    group.add_argument(
        "--smooth",
        action="store_true",
        default=None,
        help="for models that draw in scales: mix codes, for smoother pictures",
    )

    group.add_argument(
        "--prune",
        default="",
        metavar="SHARES",
        help="for models that draw in scales: leave out these shares of the tokens of the last scales, such as 0.4,0.5 "
        "(FastVAR); faster, other pictures",
    )
    group.add_argument("--prune-layers", default="", metavar="FIRST-LAST", help="in these layers only, such as 3-27")
    group.add_argument(
        "--drafter",
        default="",
        metavar="PATH",
        help="for models that draw in scales: a larger model of the same tokenizer that draws the first scales (CoDe)",
    )
    group.add_argument(
        "--drafter-scales", type=int, default=0, metavar="N", help="how many; default: all but the last two"
    )
    masked = argparse.ArgumentParser(add_help=False)
    group = masked.add_argument_group(
        "masked models (MAR, NOVA)", "default: as published; everything is computed in each step"
    )
    group.add_argument("--steps", type=int, metavar="N", help="steps that a picture is drawn in (default: 64)")
    group.add_argument("--denoising", type=int, metavar="N", help="denoising steps of a token (default: 100)")
    group.add_argument(
        "--denoising-last", type=int, metavar="N", help="those of the last step's tokens, to which they fall (DiSA: 5)"
    )
    group.add_argument("--start", type=int, metavar="T", help="where denoising starts, up to 999 (default); DiSA: 950")
    group.add_argument(
        "--guidance-schedule", choices=SCHEDULES, help="guidance grows with what is known, or is constant"
    )
    group.add_argument(
        "--step-cache", default="Off", choices=list(STEP_CACHES),
        help="keys and values are kept from step to step, which saves time and takes memory (default: Off)",
    )  # fmt: skip
    group.add_argument("--refresh", type=int, metavar="TOKENS", help="tokens computed again in a step that is not full")
    group.add_argument("--rule", choices=RULES, help="which tokens are computed again")
    group.add_argument("--full-every", type=int, metavar="N", help="every so many steps one is full; 0: never")
    group.add_argument("--full-first", type=int, metavar="N", help="steps at the beginning that are full")
    group.add_argument("--full-last", type=int, metavar="N", help="steps at the end that are full")

    output = argparse.ArgumentParser(add_help=False)
    group = output.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="FILE.png", help="file to write (default: in ./out)")
    group.add_argument(
        "--size", type=int, default=288, metavar="PIXELS", help="enlarge pictures up to this size (default: 288)"
    )

    def add(
        name: str, command: Callable[..., None], parents: list[argparse.ArgumentParser], help: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, parents=parents, help=help, description=command.__doc__)
        sub.set_defaults(command=command)
        return sub

    parents = [where, model, cache, sample, masked, output]
    demo = add("demo", run_compare, parents, "compare on the bundled model, with a picture")
    demo.set_defaults(judge=True)  # not of an option: those belong to all commands
    drawing = add("generate", run_generate, parents, "draw images")
    drawing.add_argument("--heatmap", action="store_true", help="overlay what the cache kept")
    drawing.add_argument(
        "--best", type=int, default=0, metavar="K", help="write the best K of --images, and a sheet of all with scores"
    )
    drawing.add_argument(
        "--by",
        choices=("match", "likelihood", "vqa"),
        default="match",
        help="what --best goes by: how much likelier the prompt makes an image (match, the default), how likely it is "
        "to the model, or how surely Janus answers yes when asked whether it shows the text (vqa)",
    )
    drawing.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture of which a region is drawn anew, and the rest kept"
    )
    drawing.add_argument("--mask", type=Path, metavar="FILE", help="the region: a picture that is white there")
    drawing.add_argument(
        "--candidates",
        type=int,
        default=1,
        metavar="N",
        help="fill the region N times, and write the fill that fits best to what is kept behind it, and a sheet of all "
        "fills; for models that draw in lines (default: 1)",
    )
    add("compare", run_compare, parents, "full cache against a few lines, same seeds").set_defaults(judge=False)
    drawing = add("batch", run_batch, [model, cache, sample], "draw a picture for every row of a file of prompts")
    _batch_options(drawing)
    planning = add(
        "plan", run_plan, [where, model, cache, sample, masked], "memory of the cache, without loading a model"
    )
    planning.add_argument(
        "--card", type=float, metavar="GB", help="also say what a graphics card with so much memory can draw at once"
    )
    add("models", run_models, [], "list models").add_argument(
        "folder", nargs="*", help="folders to search besides the bundled model"
    )
    calibration = add("calibrate", run_calibrate, [where, model, sample], "what its heads attend to, for some policies")
    calibration.add_argument(
        "--samples", type=int, default=10, metavar="N", help="pictures that are drawn (default: 10)"
    )
    calibration.add_argument("--out", type=Path, metavar="FILE.json", help="default: next to the model")
    plan_options = ("policy", "budget", "share", "anchors", "recent", "release", "storage")
    calibration.set_defaults(preset="Full", size=0, **dict.fromkeys(plan_options))
    add("check", run_check, parents, "the full cache against a few lines on your own model, with intervals")
    report = add("doctor", run_doctor, [], "what is installed and whether it works, to paste into a bug report")
    report.add_argument(
        "folder", nargs="*", help="model folders to look into (default: those of the ComfyUI around this)"
    )
    report.add_argument("--text-encoder", metavar="PATH", help="a text encoder to look at")
    report.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    report.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="of decoder and cache (default: auto)"
    )
    conversion = add("convert", run_convert, [], "published checkpoint (.pt) to safetensors with metadata")
    conversion.add_argument("source", metavar="SRC", help="decoder or VQ tokenizer, as published (.pt) or safetensors")
    conversion.add_argument(
        "target", metavar="DST.safetensors", help="file to write; an existing one is never overwritten"
    )
    conversion.add_argument("--grid", metavar="ROWSxCOLS", help="token grid, if neither the file nor its name tells")
    conversion.add_argument(
        "--tokenizer", metavar="NAME", help="file name of a decoder's VQ tokenizer (default: the published one)"
    )
    conversion.add_argument("--dtype", default="same", choices=["same", *DTYPES], help="default: as in the file")
    return parser


def _batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompts", type=Path, metavar="PROMPTS", help="a .txt with a prompt a line, or a .csv, .jsonl or .parquet"
    )
    group = parser.add_argument_group("prompts and pictures")
    group.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the pictures")
    group.add_argument(
        "--column",
        metavar="NAME",
        help="the table's column of prompts (default: prompt, text, caption or class); its columns negative and seed "
        "count too, and all others go along into the metadata",
    )
    group.add_argument("--size", type=int, default=0, metavar="PIXELS", help="enlarge pictures up to this size")
    group.add_argument("--codes", action="store_true", help="also keep each picture's codes, in its metadata")
    group = parser.add_argument_group("many GPUs or machines", "needs the Python package ray[data]")
    group.add_argument(
        "--ray",
        nargs="?",
        const=over_ray.LOCAL,
        metavar="ADDRESS",
        help="draw with Ray Data: on this machine, or on the cluster at this address; the pictures are the same",
    )
    group.add_argument("--workers", type=int, default=0, metavar="N", help="default: one a GPU, or else one a core")
    group.add_argument("--gpus", type=float, metavar="SHARE", help="of each worker: 1 (default), or 0.5 for two a GPU")


if __name__ == "__main__":
    startup.done()
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done
    sys.exit(status)
