"""Does the cache take as much memory as the formula says? Draws with a LlamaGen of published size and random weights.

    python bench/xl_memory.py                       XL at 384 pixels, full cache and 4 of 24 lines, two lines each
    python bench/xl_memory.py --lines 24            whole pictures
    python bench/xl_memory.py --save models/ar_image   also keeps the checkpoints, in the official layout
    python bench/xl_memory.py --loading default int8 int4   instead: the most memory that loading takes, in processes of
                                                            their own, beside that of the weights once they are loaded

The values of weights affect neither memory nor time. Bytes are counted in the allocated tensors; the formula is
CacheShape.bytes. Exit status 1 if they differ.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import resident
from bench.shapes import CODES
from bench.shapes import LLAMAGEN as SIZES
from linear_core.checkpoints.library import ModelFiles, load_model
from linear_core.grid import Grid
from linear_core.loop.generate import Run, generate
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.models.quantised import QUANTISATIONS
from linear_core.plan import PRESETS, CachePlan
from linear_core.prompts import class_prompt
from linear_core.tokenizers.tokenizer import VQConfig, VQTokenizer

VQ = VQConfig(CODES, 8, 256, (512, 256, 256, 128, 128), 3)  # VQ-16, its decoder
MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def random_weights(network: nn.Module) -> dict[str, Tensor]:
    """Weights of the magnitude of trained ones, so that activations stay finite."""
    weights = {}
    for name, tensor in network.state_dict().items():
        deviation = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.02
        weights[name] = torch.empty(tensor.shape).normal_(0, deviation)
        if "norm" in name and name.endswith("weight"):
            weights[name] += 1
    return weights


def checkpoints(folder: Path, size: str, pixels: int) -> ModelFiles:
    """A decoder and a tokenizer with the names and layout of the published ones, unless they exist."""
    files = ModelFiles(folder / f"c2i_{size}_{pixels}.pt", folder / "vq_ds16_c2i.pt")
    with torch.device("meta"):
        decoder = LlamaGen(LlamaGenConfig(*SIZES[size], CODES, classes=1000), Grid(1, 1))
        tokenizer = VQTokenizer(VQ)
    for path, network in ((files.decoder, decoder), (files.tokenizer, tokenizer)):
        if not path.exists():
            torch.save({"model": random_weights(network)}, path)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL", choices=SIZES)
    parser.add_argument("--pixels", type=int, default=384, choices=(256, 384))
    parser.add_argument("--lines", type=int, default=2, help="lines to draw of each picture (default: 2)")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--presets", nargs="*", default=["Full", "Balanced"], choices=PRESETS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--save", type=Path, help="folder for the checkpoints (default: they are deleted)")
    parser.add_argument(
        "--loading", nargs="+", choices=("default", *QUANTISATIONS), help="only load, with such weights"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.save or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if args.loading:
            files = checkpoints(folder, args.size, args.pixels)
            print(f"c2i_{args.size}_{args.pixels}, {args.dtype}; MiB besides the file itself, which is mapped")
            print(f"{'weights':10}{'loaded':>10}{'most while loading':>20}")
            for kind in args.loading:
                with multiprocessing.get_context("spawn").Pool(1) as process:
                    held, most = process.apply(loading, (files, args.dtype, kind))
                print(f"{kind:10}{held / MIB:>10.0f}{most / MIB:>20.0f}")
            return 0
        started = time.perf_counter()
        model = load_model(checkpoints(folder, args.size, args.pixels), dtype=DTYPES[args.dtype])
        parameters = sum(p.numel() for p in model.decoder.parameters())
        grid, shape = model.info.grid, model.decoder.cache_shape()
        sample = model.info.defaults
        rows = args.images * (2 if sample.guided else 1)
        print(f"c2i_{args.size}_{args.pixels}: {parameters / 1e6:.1f} M weights, {grid.rows} x {grid.cols} tokens, "
              f"{args.dtype}, made and loaded in {time.perf_counter() - started:.0f} s")  # fmt: skip
        print(
            f"{args.images} image(s), guidance {sample.guidance}: {rows} sequences, {torch.get_num_threads()} threads"
        )
        print(f"{'cache':10}{'formula, bytes':>18}{'allocated, bytes':>18}{'MiB':>9}{'tokens/s':>10}{'lines':>7}")
        wrong = 0
        for name in args.presets:
            run = draw(model.decoder, PRESETS[name], sample, args.images, args.lines)
            expected, found = shape.bytes(grid, PRESETS[name], rows), run.lines[0].cache_bytes
            wrong += expected != found
            print(f"{name:10}{expected:>18,}{found:>18,}{found / MIB:>9.2f}{run.tokens_per_second:>10.2f}"
                  f"{len(run.lines):>7}")  # fmt: skip
        print(
            f"peak memory of the process: {peak_gib():.2f} GiB; formula and allocation {'differ' if wrong else 'agree'}"
        )
    return int(bool(wrong))


def loading(files: ModelFiles, dtype: str, kind: str) -> tuple[int, float]:
    """Bytes of the weights once they are loaded, and the most anonymous memory that loading them took."""
    before, seen, done = resident("RssAnon"), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.003):
            seen.append(resident("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(files, dtype=DTYPES[dtype], weight_dtype=None if kind == "default" else kind)
    done.set()
    watcher.join()
    modules = (model.decoder, model.tokenizer)
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return sum(t.nbytes for t in tensors), max(seen) - before


def peak_gib() -> float:
    """Peak memory. Linux reports KiB, macOS bytes; Windows does not tell."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def draw(decoder: LlamaGen, plan: CachePlan, sample, images: int, lines: int) -> Run:
    run = Run()
    drawn = generate(decoder, class_prompt([207] * images), plan, sample)
    for line in drawn:
        run.add(line)
        if len(run.lines) == lines:
            break
    drawn.close()
    return run


if __name__ == "__main__":
    sys.exit(main())
