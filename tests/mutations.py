"""Break the core on purpose, once per line of MUTATIONS, and see that its tests notice.

    python tests/mutations.py               every mutation; stops each run at the first failing test
    python tests/mutations.py --all         runs each to its end and counts the failures
    python tests/mutations.py recent noise  only those whose description has one of these words

Works on a copy, takes a few minutes, and is never part of the default suite. Exit status 1: a mutation survived, or no
longer applies. When a mutation survives, a test is missing; when one no longer applies, bring its text up to date.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("grid", "plan", "policies", "cache", "sampling", "oracles", "generate", "llama", "memory", "imports")
CHECK = "tests/test_oracles.py::test_mutations_still_apply"  # fails by its nature once a mutation is applied

# file under linear_core, text that occurs exactly once, what it becomes, what that breaks
MUTATIONS: list[tuple[str, str, str, str]] = [
    # -- the cache
    (
        "cache.py",
        "index.to(torch.int32).expand_as(slot)",
        "(self.index >= 0).sum(-1, keepdim=True).to(torch.int32)",
        "index taken from the number of filled slots",
    ),
    ("cache.py", "self.bias.scatter_(3, slot, 0.0)", "pass", "a new token stays invisible"),
    (
        "cache.py",
        "self.values[layer].scatter_(2, slot, v)",
        "self.values[layer].scatter_(2, slot, k)",
        "values are keys",
    ),
    ("cache.py", "self.queries[layer].index_copy_(2, column, q)", "pass", "the line's queries are not stored"),
    (
        "cache.py",
        "self.target.copy_(victims)",
        "victims = victims[:, :, :1].expand_as(victims)\n        self.target.copy_(victims)",
        "all heads use head 0's victims",
    ),
    (
        "cache.py",
        "self.target.copy_(victims)",
        "victims = victims[:, :1].expand_as(victims)\n        self.target.copy_(victims)",
        "all rows use row 0's victims",
    ),
    ("cache.py", "self.target.copy_(victims)", "self.target.copy_(victims.flip(-1))", "lazy victims leave in reverse"),
    ("cache.py", "self.mass.scatter_(3, victims, 0.0)", "pass", "attention mass is not reset"),
    ("cache.py", 'if self.plan.release == "strict":', "if True:", "lazy release behaves as strict"),
    ("cache.py", 'if self.plan.release == "strict":', "if False:", "strict release behaves as lazy"),
    ("cache.py", 'self.bias.scatter_(3, victims, float("-inf"))', "pass", "strict victims stay visible to attention"),
    ("cache.py", "self.index.scatter_(3, victims, -1)", "pass", "strict victims stay in the record"),
    ("cache.py", "first = self.grid.index(row)", "first = self.grid.index(row) + 1", "mass sees one token too far"),
    (
        "cache.py",
        "setattr(self, name, buffer[:, :rows])",
        "setattr(self, name, buffer[:, -rows:])",
        "keep_rows: wrong half",
    ),
    ("cache.py", "weight.log().to(", "torch.ones_like(weight).log().to(", "padding of the prompt is visible"),
    ("cache.py", "torch.where(weight > 0, places, -1)[:, None]", "places", "padding of the prompt is in the record"),
    (
        "cache.py",
        "(index - grid.prompt).clamp(min=-1)",
        "(index - grid.prompt).clamp(min=0)",
        "the prompt counts as token 0",
    ),
    # -- attention and what a policy sees
    ("attention.py", "attn_mask=bias[:, :, None]", "attn_mask=None", "the bias is ignored while decoding"),
    ("attention.py", " + bias.float()[:, :, None]", "", "the bias is ignored in scores"),
    (
        "attention.py",
        "later = index[:, :, None] > own[:, None]",
        "later = index[:, :, None] > own[-1]",
        "scores see later tokens",
    ),
    ("attention.py", " * queries.shape[-1] ** -0.5", "", "scores without the 1/sqrt(D)"),
    (
        "view.py",
        "torch.empty_like(scores).scatter_(-1, order, smoothed)",
        "smoothed",
        "smoothed scores in the wrong slots",
    ),
    ("view.py", "self.queries[:, :, :, -count:]", "self.queries[:, :, :, :count]", "the first queries for the last"),
    ("view.py", "return self.index >= self.grid.prompt", "return self.index >= 0", "the prompt is taken for picture"),
    # -- who goes
    ("policies/choose.py", "(token < anchors) | ", "", "anchors unprotected"),
    ("policies/choose.py", "(view.row + 1 - recent)", "(view.row + 2 - recent)", "one recent line too few"),
    ("policies/choose.py", "(view.row + 1 - recent)", "(view.row - recent)", "one recent line too many"),
    (
        "policies/choose.py",
        "scores = scores[..., prompt_slots:]",
        "scores = -scores[..., prompt_slots:]",
        "the lowest are kept",
    ),
    (
        "policies/choose.py",
        'masked_fill(index < 0, float("-inf"))',
        'masked_fill(index < 0, float("inf"))',
        "empty slots last",
    ),
    (
        "policies/choose.py",
        "oldest_first = index.argsort(dim=-1, stable=True)",
        "oldest_first = index.argsort(dim=-1, stable=True, descending=True)",
        "among equals the newest goes first",
    ),
    (
        "policies/choose.py",
        "oldest_first = index.argsort(dim=-1, stable=True)",
        "oldest_first = index.argsort(dim=-1).argsort(dim=-1).argsort(dim=-1).sort(-1).values",
        "among equals the first slot goes first",
    ),
    ("policies/choose.py", "order) + prompt_slots", "order)", "victims are off by the prompt's slots"),
    # -- policies
    ("policies/line.py", "p.mean(2)", "p.amax(2)", "line: the greatest query for the mean"),
    ("policies/streaming.py", "return view.index.float()", "return -view.index.float()", "streaming: the newest go"),
    ("policies/h2o.py", "return view.mass / age", "return view.mass", "h2o: a sum that favours the old"),
    ("policies/h2o.py", "view.newest + 1 - view.index", "view.newest + 5 - view.index", "h2o: ages off by four"),
    ("policies/snapkv.py", "return view.by_index(scores, pool)", "return pool(scores)", "snapkv: neighbours by slot"),
    ("policies/snapkv.py", "WINDOW = 32", "WINDOW = 40", "snapkv: window too long"),
    ("policies/tova.py", "last=1", "last=2", "tova: two queries"),
    ("policies/tova.py", "scores.mean(2, keepdim=True).expand_as(scores)", "scores", "tova: heads apart"),
    (
        "policies/rkv.py",
        "zip(view.keys,",
        "zip(view.keys[:, :1].expand_as(view.keys),",
        "rkv: the first sample's keys for all",
    ),
    ("policies/rkv.py", "cosine.scatter(-1, place, spared)", "cosine", "rkv: the newest duplicate is not spared"),
    ("policies/rkv.py", ".masked_fill(outside[..., None], 0.0)", "", "rkv: prompt and empty slots are duplicates"),
    (
        "policies/keydiff.py",
        "held = view.candidates()[..., None]",
        "held = (view.index >= 0)[..., None]",
        "keydiff: mean with prompt",
    ),
    (
        "policies/keydiff.py",
        "F.normalize(view.keys.float(), dim=-1)",
        "view.keys.float()",
        "keydiff: long keys weigh more",
    ),
    ("policies/random.py", "* 1024 + head)", "* 1024)", "random: all heads alike"),
    ("policies/random.py", "* 1024 + view.row", "* 1024", "random: all lines alike"),
    (
        "policies/random.py",
        "place * 1024 + head",
        "place * 1024 + head + torch.arange(view.index.shape[1])[:, None, None] * 512",
        "random: depends on the batch",
    ),
    # -- drawing
    ("sampling.py", "unconditional + (conditional", "unconditional - (conditional", "guidance: wrong sign"),
    ("sampling.py", "logits[:images], logits[images:]", "logits[images:], logits[:images]", "guidance: halves swapped"),
    ("sampling.py", "logits.topk(top_k, dim=-1)", "logits.topk(top_k + 1, dim=-1)", "top-k: one too many"),
    ("sampling.py", ".cumsum(-1).roll(1, dims=-1)", ".cumsum(-1)", "top-p: the code that crosses the mark is dropped"),
    ("sampling.py", "before[..., 0] = 0\n", "\n", "top-p: nothing may stay"),
    (
        "sampling.py",
        "keys = [((seed + i) * 0x9E3779B97F4A7C15 ^ (seed + i) >> 29) % 2**64",
        "keys = [(seed * 0x9E3779B97F4A7C15 ^ seed >> 29) % 2**64",
        "noise ignores which image it is",
    ),
    ("sampling.py", "(token + 1) * 0x9E3779B1", "0x9E3779B1", "noise ignores the token's number"),
    ("sampling.py", " ^ self.high)", ")", "noise ignores the seed's upper half"),
    ("sampling.py", ".clamp(max=1 - 2.0**-24)", "", "noise may be infinite"),
    ("sampling.py", "logits.float() / temperature", "logits.float() * temperature", "temperature upside down"),
    # -- plans
    (
        "plan.py",
        "min(self.budget + 1, grid.rows)",
        "min(self.budget + 2, grid.rows)",
        "room for one line more than planned",
    ),
    (
        "plan.py",
        "protected > self.budget * grid.stride",
        "protected > self.lines(grid) * grid.stride",
        "protected may exceed the budget",
    ),
    (
        "plan.py",
        "token - 1 <= self.guidance_interval",
        "token <= self.guidance_interval",
        "guidance ends one token early",
    ),
    (
        "plan.py",
        "slots = self.prompt + plan.lines(grid) * grid.stride",
        "slots = self.prompt + plan.lines(grid) * grid.cols",
        "end-of-line tokens need no memory",
    ),
    ("grid.py", "self.prompt + row * self.stride", "row * self.stride", "index without the prompt"),
    ("grid.py", "from .errors import UserError", "import torch\n\nfrom .errors import UserError", "numbers load torch"),
    # -- the loop
    ("generate.py", "    cache.release(", "    str(", "release is skipped"),
    ("generate.py", "if row + 1 < grid.rows:", "if True:", "the last line is evicted too"),
    (
        "generate.py",
        "if cache.full or cache.mass is not None:",
        "if cache.full:",
        "mass of the first lines is forgotten",
    ),
    ("generate.py", "token.repeat(", "token.repeat_interleave(", "halves are fed each other's tokens"),
    (
        "generate.py",
        "(0, 1), value=grid.eol)\n                logits",
        "(0, 1))\n                logits",
        "a line ends with code 0",
    ),
    ("generate.py", "noise.exponential(number)", "noise.exponential(column)", "noise repeats on every row"),
    ("generate.py", "pad = pad[:images]", "pad = pad[images:]", "the padding of the wrong half goes on"),
    (
        "generate.py",
        "if cache.rows > images and not sample.guides(number + fed):",
        "if False:",
        "the unconditional half is computed to the end",
    ),
    (
        "generate.py",
        "    noise = Noise(",
        '    globals().setdefault("kept", []).append(cache)\n    noise = Noise(',
        "the cache outlives its run",
    ),
    ("generate.py", "plan.check(asked)", "pass", "a plan that does not fit is not refused"),
    ("generate.py", "@torch.inference_mode()\n", "", "gradients are recorded"),
    # -- Llamas that draw
    (
        "blocks.py",
        "torch.cat([a * cos - b * sin, b * cos + a * sin], -1)",
        "torch.cat([a * cos + b * sin, b * cos - a * sin], -1)",
        "halves turn backwards",
    ),
    ("blocks.py", "+ self.bias[:, None]", "", "norms of heads lose their bias"),
    ("blocks.py", "q, k = self.q_norm(q), self.k_norm(k)", "q = self.q_norm(q)", "keys are not normalised"),
    ("models/llama.py", "v[row], weight)", "v[row], torch.ones_like(weight))", "image tokens see padding"),
    ("models/llama.py", "torch.tensor([grid.stride]", "torch.tensor([grid.cols]", "the end of a line is not counted"),
    ("models/llama.py", "return prompt.stack(prompt.negative)", "return prompt.stack(prompt)", "guided from itself"),
    ("models/llama.py", "k[row], v[row]", "k[row], v[row.flip(0)]", "rows that are alike get another's values"),
    ("models/llama.py", "x = self.embed_codes(tokens).to", "x = self.embed_tokens(tokens).to", "replay takes words"),
    ("prompts/__init__.py", "torch.cat([empty, self.tokens], 1)", "torch.cat([self.tokens, empty], 1)", "padded right"),
    ("generate.py", "seed=sample.seed + rows[0]", "seed=sample.seed", "parts of a batch draw the same pictures"),
    ("generate.py", "above[list(rows)] if own else above", "above", "parts of a batch keep the first one's rows"),
    ("memory.py", "needed(most + 1) <= room", "needed(most) <= room", "one image too many is drawn at once"),
    # -- the decoder
    ("prompts/__init__.py", ">= self.pad[:, None, None]", ">= 0 * self.pad[:, None, None]", "prefill sees padding"),
    (
        "models/llamagen.py",
        "share @ v, count[:, None].float())",
        "share @ v, torch.ones(len(count), 1))",
        "the prompt's slot weighs one token",
    ),
    (
        "models/llamagen.py",
        "index_select(0, index - grid.prompt)",
        "index_select(0, index)",
        "RoPE turned by the index",
    ),
]


def occurrences(file: str, old: str, root: Path = ROOT) -> int:
    return (root / "linear_core" / file).read_text(encoding="utf-8").count(old)


def copy_tree(target: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "assets", "*.safetensors", "node_modules")
    for folder in ("linear_core", "tests"):
        shutil.copytree(ROOT / folder, target / folder, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", target)


def run_tests(tree: Path, stop: bool) -> tuple[int, list[str]]:
    """Exit status of pytest, and the tests that failed."""
    files = [f"tests/test_{name}.py" for name in TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "--deselect", CHECK, *files]
    # No bytecode: a mutation of equal length within a second would otherwise run yesterday's.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(
        command + ["-x"] * stop, cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    return done.returncode, re.findall(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.M)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutations whose description has one of these")
    parser.add_argument("--all", action="store_true", help="run to the end and count")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.words or any(word in m[3] for word in args.words)]
    bad, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        status, failed = run_tests(tree, stop=True)
        if status:
            print(f"The tests fail before anything is broken: {', '.join(failed) or f'pytest ended with {status}'}")
            return 1
        for file, old, new, breaks in chosen:
            path = tree / "linear_core" / file
            text = path.read_text(encoding="utf-8")
            if text.count(old) != 1:
                verdict = f"DOES NOT APPLY: its text occurs {text.count(old)} times"
            else:
                path.write_text(text.replace(old, new), encoding="utf-8")
                status, failed = run_tests(tree, stop=not args.all)
                path.write_text(text, encoding="utf-8")
                names = sorted({name.split("[")[0] for name in failed})
                many = f"{len(failed)} tests: " if args.all else ""
                verdict = "SURVIVED" if status == 0 else many + (", ".join(names) or f"pytest ended with {status}")
            bad += verdict.isupper() or verdict.startswith("DOES NOT")
            print(f"{file:21} {breaks:52} {verdict}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutations were noticed, in {time.monotonic() - started:.0f} s.")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
