"""The command line: python -m linear_core {demo, generate, compare, plan, models, convert}."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .checkpoints import library, text
from .checkpoints.convert import convert
from .checkpoints.families import ModelInfo
from .checkpoints.library import ImageModel, ModelFiles
from .errors import UserError
from .loop.forced import shared_probability
from .loop.generate import Run, evict, generate
from .loop.graph import Graphs
from .loop.memory import free_memory, max_batch_size, run_bytes, scales_run_bytes
from .loop.micro_batches import MicroBatch, MicroBatches, is_out_of_memory
from .loop.scales import generate_scales
from .loop.threads import limit_threads
from .models.packed import pack
from .pictures.heatmap import heatmap, lifetime, over_scales
from .pictures.preview import UNDRAWN, Preview, decode
from .pictures.sheet import contact_sheet, save, to_image
from .plan import PRESETS, RELEASES, STORAGES, CachePlan, CacheShape, SamplePlan
from .policies import POLICIES
from .prompts import Prompt, class_prompt

MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
WEIGHT_DTYPES = {"as computed": None, "with fp8 matrices (ComfyUI)": torch.float8_e4m3fn}
STEP_KINDS = ("eager", "graph")
ADVICE = "lower --budget, --images or --at-once (`plan` shows what they take)"
MAX_IMAGES = 4096  # at once; counting stops here
JUDGED = 6  # images of the demo that are compared at most, because each is computed twice more
DEMO_CLASSES = ("alpine dawn", "ocean dusk", "autumn hills", "starry night", "tropical lagoon", "winter snow")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    if getattr(args, "where", None):
        args.model = args.where
    try:
        args.command(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: not enough memory; {ADVICE}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        return 130
    return 0


# -- commands --------------------------------------------------------------------------------------------------------


def run_generate(args: argparse.Namespace) -> None:
    """Draw images and write each as a PNG."""
    model, plan = _load(args), _cache_plan(args)
    sample = _sample_plan(args, model.info)
    prompt = _prompt(args, model)
    out = _out(args.out, model.info.name + ".png")
    micro_batches = _micro_batches(args, prompt, sample, caches=1)

    def write(pictures: Iterable[Tensor], **more: Any) -> None:
        for i, picture in enumerate(pictures):
            path = out if prompt.rows == 1 else out.with_name(f"{out.stem}_{i + 1:02d}{out.suffix}")
            notes = {
                "model": model.info.name,
                "text" if model.info.text else "class": prompt.names[i],
                **asdict(plan),
                **asdict(replace(sample, seed=sample.seed + i)),
            }
            save(to_image(picture, args.size), path, notes | more)
            print(path)

    try:
        (run,) = _draw(model, micro_batches, [plan], args)
    except (KeyboardInterrupt, UserError):  # keep what was drawn so far; the rest of it is grey
        write((_unfinished(model, codes) for part in micro_batches.codes for codes in part), unfinished=True)
        raise
    pictures = _decode(model, run)
    if args.heatmap:
        pyramid = model.info.pyramid
        kept = lifetime(run.shares) if pyramid is None else over_scales(run.shares[:, -1], pyramid)
        pictures = heatmap(kept, *_enlarged_size(pictures, args.size), pictures)
    write(pictures)
    print(_summary(run))


def run_compare(args: argparse.Namespace) -> None:
    """Draw the same seeds with the full cache and with a few lines: a contact sheet, and a row of numbers for each."""
    model, few = _load(args), _cache_plan(args)
    sample = _sample_plan(args, model.info)
    prompt = _prompt(args, model)
    names = list(prompt.names)
    out = _out(args.out, "compare.png")
    micro_batches = _micro_batches(args, prompt, sample, caches=2)
    full, run = _draw(model, micro_batches, [CachePlan(policy="full"), few], args)
    pictures = [_decode(model, r) for r in (full, run)]
    if (pyramid := model.info.pyramid) is not None:
        title = "what the cache holds before the last scale"
        kept = over_scales(run.shares[:, -1], pyramid)
        kept = heatmap(kept, *_enlarged_size(pictures[1], args.size), pictures[1])
    else:
        shown = model.info.grid.rows * 2 // 3  # lines: enough for many tokens to have been evicted
        title = f"what the cache holds after line {shown}"
        partial = pictures[1].clone()
        partial[:, shown * model.tokenizer.config.factor :] = UNDRAWN
        kept = heatmap(run.shares[:, shown - 1], *_enlarged_size(partial, args.size), partial)
    rows = [
        ("full cache", _measurements(full), pictures[0]),
        (_describe(few, model.info), _measurements(run), pictures[1]),
        (title, "bright: held by most layers and heads; dark: evicted", kept),
    ]
    notes = {"model": model.info.name, "classes": names, **asdict(few), **asdict(sample)}
    save(contact_sheet(rows, names, args.size), out, notes)
    print(f"{'':24}{'cache MiB':>12}{'tokens/s':>12}{'held after a line':>22}")
    for name, r in (("full cache", full), (_describe(few, model.info), run)):
        print(f"{name:24}{_cache_mib(r):>12.2f}{r.tokens_per_second:>12.0f}{r.held:>22.0f}")
    saved = 1 - _cache_mib(run) / _cache_mib(full)
    same = float((full.tokens == run.tokens).float().mean())
    if args.judge and model.info.pyramid is None:
        shared = _shared(model, prompt, run.tokens, few, sample)
        print(
            f"{saved:.0%} less cache. Given the same tokens, the next one's probabilities overlap by {shared:.0%} with "
            "the full cache's."
        )
        if same < 1:
            print("A token drawn differently changes those after it, so the two pictures of a seed differ in places.")
    else:
        print(f"{saved:.0%} less cache; {same:.0%} of the codes are the same as with the full cache (same seeds).")
    print(f"picture: {out}")


def run_plan(args: argparse.Namespace) -> None:
    """Show how much memory the cache takes, without loading a model."""
    files = _files(args)
    info = _with_size(args, library.read_info(files.decoder, _grid(args)))
    dtype = _dtype(args, _device(args))
    few = _cache_plan(args)
    sample = _sample_plan(args, info)
    images = max(args.images, 1) * max(len(args.classes or args.texts or ["one"]), 1)
    images = min(images, args.at_once or images)
    rows = images * (2 if sample.guided else 1)
    shape = info.cache_shape(dtype)
    weights = {name: library.decoder_bytes(info, dtype, dtype_kept) / MIB for name, dtype_kept in WEIGHT_DTYPES.items()}
    if info.pyramid is None:
        few = few.in_lines(info.grid)
        few.check(info.grid)
        what = f"{info.grid.rows} lines of {info.grid.stride} tokens"
        holds = "the prompt, the budget and the line being written"
    else:
        few.check_scales(info.pyramid)
        what = f"{info.pyramid.stages} scales ({info.pyramid.text}), {info.pyramid.tokens} tokens"
        holds = "every layer's budget and one layer's working memory"
    print(
        f"{info.name}: {what}, {info.config.layers} layers, "
        f"{info.config.heads} heads of {shape.head_dim}, weights {info.weight_bytes / MIB:.1f} MiB on disk"
    )
    print("weights in memory: " + ", ".join(f"{name} {size:.1f} MiB" for name, size in weights.items()))
    print(f"{images} image{'s' * (images > 1)}{' with guidance' if sample.guided else ''}: {rows} sequences in {dtype}")
    print(f"{'':24}{'of the tokens':>14}{'cache MiB':>12}")
    full = CachePlan(policy="full")
    for plan in (full, few):
        size = _planned_bytes(shape, info, plan, rows) / MIB
        print(f"{_describe(plan, info):24}{_ratio(plan, info):>14}{size:>12.2f}")
    saved = 1 - _planned_bytes(shape, info, few, rows) / _planned_bytes(shape, info, full, rows)
    print(f"{saved:.0%} less; the cache holds {holds}.")
    device = _device(args).partition(":")[0]
    if (free := _free(_device(args))) is not None:
        room = free - library.decoder_bytes(info, dtype)
        counts = [_batch_size(shape, info, plan, 2 if sample.guided else 1, room, device) for plan in (full, few)]
        print(
            f"{free / MIB:.0f} MiB are free. Images that fit at once, besides the weights: with the full cache "
            f"{counts[0]}, with {_describe(few, info)} {counts[1]}. --at-once draws a larger batch in parts."
        )
    if info.own_tokenizer:
        print(f"This assumes a prompt of {shape.prompt} tokens; a longer one takes one more slot per token.")


def run_models(args: argparse.Namespace) -> None:
    """List the bundled model and those in the given folders."""
    paths = [library.bundled_files().decoder, *library.find_checkpoints([Path(f) for f in args.folder])]
    for path in paths:
        try:
            info = library.read_info(path)
        except UserError as error:
            print(f"{path.name}: skipped, {str(error).removeprefix(path.name + ': ')}")
            continue
        kind = f"{info.config.classes} classes" if info.config.classes else "text"
        scales = f" in scales {info.pyramid.text}" if info.pyramid else ""
        print(
            f"{info.name}: {info.grid.rows} x {info.grid.cols} tokens{scales}, {kind}, "
            f"{info.weight_bytes / MIB:.1f} MiB, {path}"
        )
        if info.classes:
            print("  " + ", ".join(info.classes[:20]) + (", …" if len(info.classes) > 20 else ""))


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
    print(f"{args.target}: {Path(args.target).stat().st_size / MIB:.1f} MiB")
    for key, value in notes.items():
        print(f"  {key}: {value if len(value) < 100 else value[:99] + '…'}")


# -- helpers ---------------------------------------------------------------------------------------------------------


def _micro_batches(args: argparse.Namespace, prompt: Prompt, sample: SamplePlan, caches: int) -> MicroBatches:
    return MicroBatches(prompt, sample, args.at_once or prompt.rows, caches=caches, advice=ADVICE)


def _decode(model: ImageModel, run: Run) -> Tensor:
    """The finished pictures of a run: float32 B H W 3."""
    return decode(model.tokenizer, run.tokens if run.canvas is None else run.canvas)


def _planned_bytes(shape: CacheShape, info: ModelInfo, plan: CachePlan, rows: int) -> int:
    if info.pyramid is not None:
        return shape.scales_bytes(info.pyramid, plan, rows)
    return shape.bytes(info.grid, plan, rows)


def _draw(
    model: ImageModel, micro_batches: MicroBatches, plans: list[CachePlan], args: argparse.Namespace
) -> list[Run]:
    """Draw the images once for each plan, in micro-batches if there are too many."""
    for micro_batch in micro_batches:
        with micro_batches.watch(micro_batch):
            _draw_micro_batch(model, micro_batch, plans, args)
    return micro_batches.runs


def _shared(model: ImageModel, prompt: Prompt, codes: Tensor, plan: CachePlan, sample: SamplePlan) -> float:
    """How much of the next token's probability the plan shares with the full cache, mean over the first images."""
    some = range(min(prompt.rows, JUDGED))
    found = shared_probability(model.decoder, prompt.select(some), codes[: len(some)], plan, sample)
    lines = tqdm(found, total=model.info.grid.rows, unit="line", leave=False, disable=None)
    return float(torch.cat(list(lines), 1).mean())


def _unfinished(model: ImageModel, codes: Tensor) -> Tensor:
    """A picture of the rows drawn so far, codes rows cols, with grey below, or of the scales so far, codes N: H W 3."""
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
    pyramid = model.info.pyramid
    graphs = [Graphs(model.decoder.step, evict) for _ in plans] if args.step == "graph" and pyramid is None else []
    kwargs: list[dict[str, Any]] = [each.kwargs for each in graphs] or [{} for _ in plans]
    drawing: list[Iterator[Any]] = (
        [
            generate_scales(
                model.decoder,
                model.tokenizer.quantize,
                micro_batch.prompt,
                plan,
                micro_batch.sample,
                given=above,
                stop_after=args.stop_after,
                name=model.info.name,
            )
            for plan, above in zip(plans, micro_batch.above, strict=True)
        ]
        if pyramid is not None
        else [
            generate(
                model.decoder, micro_batch.prompt, plan, micro_batch.sample, above=above, name=model.info.name, **more
            )
            for plan, above, more in zip(plans, micro_batch.above, kwargs, strict=True)
        ]
    )
    tokens = model.info.grid.rows * model.info.grid.cols if pyramid is None else pyramid.tokens
    total = len(plans) * tokens * micro_batch.prompt.rows
    with tqdm(total=total, unit="tok", leave=False, disable=None) as bar:
        for lines in zip(*drawing, strict=True):
            for run, line in zip(micro_batch.runs, lines, strict=True):
                run.add(line)
                bar.update(line.tokens.numel())
    if why := next((each.why for each in graphs if each.why), ""):
        print(f"{why}.", file=sys.stderr)


def _load(args: argparse.Namespace) -> ImageModel:
    device = _device(args)
    if device == "cpu" and (note := limit_threads()):
        print(f"note: {note}.", file=sys.stderr)
    model = library.load_model(_files(args), grid=_grid(args), device=device, dtype=_dtype(args, device))
    pack(model.decoder)  # on the CPU only, where it halves the time of a step
    return replace(model, info=_with_size(args, model.info))


def _files(args: argparse.Namespace) -> ModelFiles:
    if args.model == library.BUNDLED:
        return library.bundled_files()
    tokenizer = Path(args.tokenizer) if args.tokenizer else library.find_tokenizer(args.model, _grid(args))
    return ModelFiles(Path(args.model), tokenizer)


def _device(args: argparse.Namespace) -> str:
    if args.device != "auto":
        return args.device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _free(device: str) -> int | None:
    """Free bytes on the device; None if unknown."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() if device == "cpu" else None


def _batch_size(shape: CacheShape, info: ModelInfo, plan: CachePlan, sequences: int, room: int, device: str) -> str:
    """How many images fit into `room` bytes, up to MAX_IMAGES."""

    def needed(images: int) -> int:
        if info.pyramid is not None:
            size, logits, hidden = sequences * images, info.config.logits, info.config.hidden
            return scales_run_bytes(shape, info.pyramid, plan, size, logits, hidden, device)
        return run_bytes(shape, info.grid, plan, sequences * images, info.config.codes, device)

    if needed(1) > room:
        return "none"
    count = max_batch_size(room, MAX_IMAGES, needed)
    return f"{count} or more" if count == MAX_IMAGES else str(count)


def _dtype(args: argparse.Namespace, device: str) -> torch.dtype:
    return DTYPES[args.dtype] if args.dtype != "auto" else DTYPES["float32" if device == "cpu" else "bfloat16"]


def _grid(args: argparse.Namespace) -> tuple[int, int] | None:
    if args.grid is None:
        return None
    rows, _, cols = args.grid.partition("x")
    if not (rows.isdigit() and cols.isdigit()):
        raise UserError(f"grid: '{args.grid}' is not a grid; write rows x columns, for example 24x24.")
    return int(rows), int(cols)


def _with_size(args: argparse.Namespace, info: ModelInfo) -> ModelInfo:
    """The model with the size that was requested, if any."""
    if args.pixels is None:
        return info
    width, _, height = args.pixels.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UserError(f"pixels: '{args.pixels}' is not a size; write width x height, for example 832x1216.")
    return info.with_size((int(width), int(height)))


def _cache_plan(args: argparse.Namespace) -> CachePlan:
    changes = {
        k: getattr(args, k)
        for k in ("policy", "budget", "anchors", "recent", "release", "storage")
        if getattr(args, k) is not None
    }
    if args.share is not None:
        changes["share"] = _share(args.share)
    plan = PRESETS[args.preset]
    if args.policy is not None:  # the preset's release is meant for the preset's policy
        plan = replace(plan, policy=args.policy, release="auto")
    return replace(plan, **changes)


def _share(text: str) -> float:
    """'1/6' or '0.17' as a number."""
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"share: '{text}' is not a share; write it as 1/6 or 0.17.") from None


def _sample_plan(args: argparse.Namespace, info: ModelInfo) -> SamplePlan:
    names = ("seed", "guidance", "guidance_interval", "temperature", "top_k", "top_p", "smooth")
    return replace(info.defaults, **{k: getattr(args, k) for k in names if getattr(args, k) is not None})


def _prompt(args: argparse.Namespace, model: ImageModel) -> Prompt:
    """The prompt of --class or --text and --images, one row per image."""
    info = model.info
    if args.images < 1:
        raise UserError(f"images: {args.images} is out of range; choose 1 or more.")
    if args.at_once < 0:
        raise UserError(f"at-once: {args.at_once} is out of range; choose 1 or more, or 0 for all.")
    if info.own_tokenizer:
        if not args.texts:
            raise UserError(f"text: {info.name} draws from texts; add --text 'a red fox in the snow'.")
        prompt = model.prompt(args.texts, args.negative)
    elif info.text:
        if not args.texts or not args.text_encoder:
            raise UserError(
                f"text: {info.name} draws from texts; add --text 'a red fox in the snow' and --text-encoder "
                "PATH, the folder of google/flan-t5-xl."
            )
        encoder = text.find_text_encoder(args.text_encoder)
        prompt = text.prompt(args.texts, encoder, negative=args.negative, model=info)
    else:
        names = args.classes or ([c for c in DEMO_CLASSES if c in info.classes] or ["0"])
        prompt = class_prompt([library.class_label(info, name) for name in names], tuple(names))
    return prompt.repeat(args.images)


def _out(out: Path | None, name: str) -> Path:
    path = out or Path("out") / name
    if path.is_dir():
        path = path / name
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
        + (", 8 bits" if plan.storage == "int8" else "")
    )


def _ratio(plan: CachePlan, info: ModelInfo) -> str:
    share = plan.ratio(info.pyramid or info.grid)
    return "all" if share == 1 else f"1/{1 / share:.3g}"


def _cache_mib(run: Run) -> float:
    return run.lines[-1].cache_bytes / MIB


def _measurements(run: Run) -> str:
    return f"{_cache_mib(run):.1f} MiB of keys and values, {run.tokens_per_second:.0f} tokens/s"


def _summary(run: Run) -> str:
    stage = "line" if run.canvas is None else "scale"
    return f"{_measurements(run)}, at most {run.held:.0f} image tokens held after a {stage}, {run.seconds:.1f} s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m linear_core",
        description="Autoregressive image generation that keeps only a few lines of the KV cache.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    model = argparse.ArgumentParser(add_help=False)
    group = model.add_argument_group("model")
    group.add_argument("where", nargs="?", metavar="MODEL", help="the same as --model")
    group.add_argument(
        "--model",
        default=library.BUNDLED,
        metavar="PATH",
        help="file or folder of the decoder; default: the bundled model",
    )
    group.add_argument("--tokenizer", metavar="FILE", help="its VQ tokenizer, if it is not next to it")
    group.add_argument("--grid", metavar="ROWSxCOLS", help="token grid, if neither the file nor its name tells")
    group.add_argument(
        "--pixels", metavar="WIDTHxHEIGHT", help="picture size, for models that offer a choice (Lumina-mGPT)"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    group.add_argument(
        "--dtype", default="auto", choices=["auto", *DTYPES], help="of decoder and cache (default: auto)"
    )

    cache = argparse.ArgumentParser(add_help=False)
    group = cache.add_argument_group("cache", "default: the preset's values")
    group.add_argument("--preset", default="Balanced", choices=list(PRESETS), help="default: Balanced, 4 lines")
    group.add_argument("--policy", choices=list(POLICIES), help="decides which tokens stay")
    group.add_argument("--budget", type=int, metavar="LINES", help="lines of image tokens that are kept")
    group.add_argument("--share", metavar="SHARE", help="what is kept of a full cache, such as 1/6, instead of lines")
    group.add_argument("--anchors", type=int, metavar="TOKENS", help="number of first image tokens that always stay")
    group.add_argument("--recent", type=int, metavar="LINES", help="number of newest whole lines that always stay")
    group.add_argument(
        "--release",
        choices=["auto", *RELEASES],
        help="evicted tokens vanish (strict), stay until they are overwritten (lazy) or are merged into the nearest "
        "kept one (fold); auto: fold for policy fold, strict for others",
    )
    group.add_argument("--storage", choices=STORAGES, help="keys and values as computed (full) or in 8 bits (int8)")

    sample = argparse.ArgumentParser(add_help=False)
    group = sample.add_argument_group("sampling", "default: the model's own settings")
    group.add_argument(
        "--class", dest="classes", action="append", metavar="NAME", help="class name or number; repeat for more"
    )
    group.add_argument("--text", dest="texts", action="append", metavar="TEXT", help="what to draw; repeat for more")
    group.add_argument("--negative", default="", metavar="TEXT", help="negative prompt of guidance, for all texts")
    group.add_argument("--text-encoder", metavar="PATH", help="for LlamaGen: folder or file of FLAN-T5-XL")
    group.add_argument("--images", type=int, default=1, metavar="N", help="images per class or text (default: 1)")
    group.add_argument(
        "--at-once", type=int, default=0, metavar="N", help="draw at most N images at once; 0: all (default)"
    )
    group.add_argument(
        "--step",
        default="eager",
        choices=STEP_KINDS,
        help="run every token eagerly (eager), or capture token and line end as CUDA graphs (graph)",
    )
    group.add_argument("--seed", type=int, metavar="N", help="image i uses seed N + i (default: 0)")
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
        "--stop-after", type=int, default=0, metavar="SCALES", help="for models that draw in scales: draw only so many"
    )
    group.add_argument(
        "--smooth",
        action="store_true",
        default=None,
        help="for models that draw in scales: mix codes, for smoother pictures",
    )

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

    parents = [model, cache, sample, output]
    demo = add("demo", run_compare, parents, "compare on the bundled model, with a picture")
    demo.set_defaults(out=Path("out") / "demo.png", judge=True)
    add("generate", run_generate, parents, "draw images").add_argument(
        "--heatmap", action="store_true", help="overlay what the cache kept"
    )
    add("compare", run_compare, parents, "full cache against a few lines, same seeds").set_defaults(judge=False)
    add("plan", run_plan, [model, cache, sample], "memory of the cache, without loading a model")
    add("models", run_models, [], "list models").add_argument(
        "folder", nargs="*", help="folders to search besides the bundled model"
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


if __name__ == "__main__":
    sys.exit(main())
