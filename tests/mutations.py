"""Break the core on purpose, once per line of MUTATIONS, and see that its tests notice.

    python tests/mutations.py               every mutation, each until a test fails
    python tests/mutations.py --record      and writes down which (tests/mutations.md) and how many (README.md)
    python tests/mutations.py --missing     only those that are not written down yet
    python tests/mutations.py --all         runs all tests that reach the changed lines, and counts the failures
    python tests/mutations.py recent noise  only those whose description has one of these words

Works on copies, one for each core, and is never part of the default suite. First the tests run unbroken, under
coverage: they have to pass, and which lines each of them reaches, and how long it takes, is kept in `.mutations.json`
until its file changes, or one that other files need. A mutation then meets the test that noticed it last time, the
tests that reach its lines, the quickest first, and at last all others. So the order saves time and leaves out no test
but those in a real ComfyUI and in a browser. A test that no longer ends has noticed, too.

Exit status 1: a mutation survived, or no longer applies. When a mutation survives, a test is missing; when one no
longer applies, bring its text up to date.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "mutations.md"
MAP = ROOT / ".mutations.json"
OWN = ("mutations.py", "mutations.md", "test_mutations.py", "test_quick.py")  # in tests: they read this list
ROW = re.compile(r"^\| `(.+?)` \| (.+?) \| `(.+?)` \| (\S+) \|$", re.M)
WAYS = re.compile(r"in \d+ ways")
PATIENCE = 60  # seconds: what takes so much more than ten times its own, hangs
BETWEEN = 60  # seconds that collecting the tests, or ending them, may take of its own
FEW = 50  # tests that are tried at first: mostly enough, and their files are soon collected
# What many tests import: once for all of them, where a process can be forked.
SHARED = ("aiohttp", "hypothesis", "PIL.Image", "requests", "safetensors.torch", "torch", "transformers")
PROCESSES = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
TABLE = """# What the tests notice

Written by `python tests/mutations.py --record`: each line is one way to break `linear_core`, the first test that failed
then, and the commit on which that was tried.

{noticed} of {count} mutations were noticed. {where}.

| file | what is broken | noticed by | on |
|---|---|---|---|
{rows}
"""

# file under linear_core, or nodes/…, text that occurs exactly once, what it becomes, what that breaks
MUTATIONS: list[tuple[str, str, str, str]] = [
    # -- what a token stands for
    (
        "cache/line_cache.py",
        "return self._by_cell(self.count, images) / holders.clamp(min=1)",
        "return self._by_cell(self.count, images)",
        "stands: a sum, not a mean",
    ),
    ("events.py", "& ((stands > 8) | (self._stands > 8))", "& (stands > 8)", "stands: who is alone again is not told"),
    # -- what goes wrong
    (
        "loop/generate.py",
        ".any():\n                non_finite += logits.sum() * 0",
        ".any():\n                non_finite = logits.sum() * 0",
        "nan: only a line's last token is looked at",
    ),
    (
        "loop/generate.py",
        ".any():\n                non_finite += logits.sum() * 0",
        ".any():\n                non_finite += logits[:images].isnan().sum()",
        "nan: infinity is let pass",
    ),
    ("loop/generate.py", "if non_finite != 0:", "if False:", "nan: nobody is told"),
    ("loop/sampling.py", "if dtype == torch.float16", "if dtype == torch.bfloat16", "nan: float16 is not named"),
    (
        "loop/micro_batches.py",
        "traceback.clear_frames(error.__traceback__)",
        "pass",
        "micro-batches: the error holds on to the cache",
    ),
    ("loop/micro_batches.py", "codes[:, : run.lines[0].rows - 1]", "codes", "micro-batches: no line is left to draw"),
    (
        "loop/micro_batches.py",
        "run.tokens if count > (0 if given is None else given.shape[1]) else given",
        "given",
        "micro-batches: lines that were complete are drawn again",
    ),
    (
        "loop/micro_batches.py",
        "count > (0 if given is None else given.shape[1])",
        "run.lines",
        "micro-batches: rows that were given are drawn anew where fewer had come back",
    ),
    (
        "loop/micro_batches.py",
        "if self.halved_from or images == 1:",
        "if images == 1:",
        "micro-batches: halved until nothing is left",
    ),
    (
        "loop/micro_batches.py",
        "[part for micro_batch in self.pending for part in micro_batch.split(images // 2)]",
        "[*micro_batch.split(images // 2), *self.pending[1:]]",
        "micro-batches: only the part that failed is halved",
    ),
    (
        "loop/micro_batches.py",
        "max(micro_batch.prompt.rows",
        "min(micro_batch.prompt.rows",
        "micro-batches: the smallest part is told as the largest",
    ),
    (
        "loop/micro_batches.py",
        "            if not is_out_of_memory(error):\n                raise\n",
        "",
        "micro-batches: every error is taken for memory",
    ),
    (
        "loop/micro_batches.py",
        "torch.cuda.OutOfMemoryError | MemoryError",
        "torch.cuda.OutOfMemoryError",
        "micro-batches: the computer's own memory",
    ),
    ("pictures/preview.py", "min(batch, len(left)) // 2", "0", "decoding without room: not even half is tried"),
    (
        "pictures/preview.py",
        "min(batch, len(left)) // 2",
        "batch // 2",
        "decoding without room: as many are tried again",
    ),
    (
        "pictures/preview.py",
        "        except self.stop:\n            raise\n",
        "",
        "Stop in the last picture is not heard",
    ),
    # -- speed
    (
        "cache/attention.py",
        "(k @ q.transpose",
        "(k.transpose(0, 1).contiguous().transpose(0, 1) @ q.transpose",
        "keys are copied",
    ),
    ("loop/generate.py", "reads=reads, static=static)", "reads=reads)", "a static step still grows"),
    ("cache/line_cache.py", ".add_(self.first).view(-1)", ".view(-1)", "all heads write to the first one's slots"),
    ("loop/graph.py", "else result.clone()", "else result", "the next token writes over the logits"),
    ("loop/graph.py", " and self.cache() is cache", "", "a graph outlives its cache"),
    ("loop/graph.py", "self.rows == cache.rows and ", "", "a graph outlives its rows"),
    ("loop/graph.py", "fixed.copy_(new) if", "None if", "every token is the first"),
    ("loop/graph.py", "else fixed.fill_(new)", "else None", "every line that ends is the first"),
    ("loop/graph.py", "lambda row: self.work(", "lambda _: self.work(", "a line's end is recorded with its number"),
    ("loop/graph.py", '"" if cache.static else', '"" if True else', "a step without a fixed shape is recorded"),
    ("loop/graph.py", "CapturedGraph(ref(cache)", "CapturedGraph((lambda: cache)", "a graph keeps its cache"),
    (
        "loop/graph.py",
        "except RuntimeError as error:  # an",
        "except KeyError as error:  # an",
        "a failed recording costs the picture",
    ),
    (
        "loop/graph.py",
        "self.why = self._graphs[part].why\n        return work",
        "return work",
        "a failed recording is replayed",
    ),
    (
        "cache/attention.py",
        "own = first + torch.arange(queries.shape[2],",
        "own = torch.arange(first, first + queries.shape[2],",
        "a line's end asks the device for its number",
    ),
    (
        "cache/attention.py",
        'if wins("kernel", gpu_name(device), rows) else',
        'if device.type == "cuda" else',
        "kernel: taken by who did not ask",
    ),
    (
        "cache/attention.py",
        "            return None\n        raise",
        "            pass\n        raise",
        "defaults: an error to who did not ask",
    ),
    ("loop/graph.py", 'asked == "auto" and', 'asked != "eager" or', "defaults: graphs although switched off"),
    ("defaults.py", "gpu.startswith(win.gpu) and ", "", "defaults: what another GPU measured"),
    ("defaults.py", "<= sequences <= win.sequences[1]", "<= sequences", "defaults: batches that were not measured"),
    ("cache/attention.py", 'if device.type != "cuda" or', "if", "kernel: taken to the CPU"),
    (
        "cache/attention.py",
        '        raise UserError(f"{SWITCH}: the kernel',
        '        return None\n        print(f"{SWITCH}: the',
        "kernel: who cannot have it is not told",
    ),
    ("cache/line_cache.py", "if self.kernel is None or", "if True or", "kernel: never asked"),
    ("cache/line_cache.py", "is None or q.shape[2] > 1:", "is None:", "kernel: given many queries"),
    (
        "cache/line_cache.py",
        "return self.slots if self.static else self.extent",
        "return self.slots",
        "steps read what is empty",
    ),
    (
        "cache/storage.py",
        "return RawSlots(self.data[layer, :, :, :end])",
        "return RawSlots(self.data[layer])",
        "kernel: reads what is empty",
    ),
    ("models/packed.py", "= linear.bias, linear.out", "= None, linear.out", "packed layers lose their bias"),
    # -- weights in few bits
    (
        "models/quantised.py",
        "alpha=256).mul_(largest)",
        "alpha=255).mul_(largest)",
        "quantised: digits of the wrong worth",
    ),
    ("models/blocks.py", "table[..., 1, 1::2])", "table[..., 1, ::2])", "RoPE: turned the other way on a CPU"),
    ("models/packed.py", "torch.cat([x, -x], -1)", "torch.cat([x, x], -1)", "packed norms take the mean off"),
    (
        "cache/line_cache.py",
        "slot + self.first[rows]",
        "slot + self.first",
        "folding writes elsewhere",
    ),
    ("checkpoints/library.py", "            return INT8\n", "            return None\n", "quantised: all but the head"),
    ("models/quantised.py", "128 * 257 + 0.5", "128 * 256 + 0.5", "quantised: the lower digit is half a step off"),
    (
        "models/quantised.py",
        "zero = (low + 8 * scale.float())",
        "zero = (low + 7 * scale.float())",
        "quantised: int4's middle is elsewhere",
    ),
    ("models/quantised.py", "return same and bool(", "return True or bool(", "quantised: a wrong product is used"),
    (
        "checkpoints/weights.py",
        "tensor.float() * scales[key] if key in scales",
        "tensor.float() if key in scales",
        "files: scales of quantised matrices are left out",
    ),
    (
        "checkpoints/weights.py",
        "if func in (Tensor.normal_, nn.init.normal_):",
        "if func is None:",
        "loading: torch's compiler is imported",
    ),
    ("loop/memory.py", "* passes / BUS_BYTES / images", "* passes / BUS_BYTES", "streaming: a batch does not share it"),
    ("cache/view.py", "**shown, first=first)", "**shown)", "all parts are released in the first rows"),
    # -- storage
    (
        "cache/storage.py",
        "_write_vectors(self.scale[layer], place, scale)",
        "pass",
        "few bits: scales are not written",
    ),
    (
        "cache/storage.py",
        ".amax(-1, keepdim=True) / 127",
        ".mean(-1, keepdim=True) / 127",
        "int8: great numbers are cut off",
    ),
    ("cache/line_cache.py", "self.keys.stored(k)], 2)", "k], 2)", "few bits: a window sees its keys as computed"),
    ("cache/storage.py", "first | second << 4", "second | first << 4", "int4: the halves of a vector are exchanged"),
    ("cache/storage.py", "* 127.5).floor()", "* 127.5).ceil()", "int4: a floor above the least number"),
    ("cache/storage.py", "* 127.5).ceil()", "* 127.5).floor()", "int4: the greatest numbers are cut off"),
    (
        "cache/storage.py",
        "* (stride // size)",
        "* (stride // size) * 0",
        "what some images accept goes to the first head",
    ),
    ("plan.py", "+ 2 * ceil(self.head_dim / 16) + scale", "+ scale", "int4: floors and steps are not counted"),
    # -- folding
    (
        "cache/fold.py",
        "image.scatter(-1, victims, False)",
        "image",
        "victims fold into victims",
    ),
    (
        "cache/fold.py",
        "image.scatter(-1",
        "(view.index >= 0).scatter(-1",
        "the prompt takes victims in",
    ),
    ("cache/fold.py", "torch.where(folds, _nearest(", "torch.where(folds | True, _nearest(", "empty slots are folded"),
    (
        "cache/fold.py",
        "view.importance(), view.candidates()",
        "torch.ones_like(view.importance()), view.candidates()",
        "means that do not care for attention",
    ),
    (
        "cache/fold.py",
        "mean(view.values)",
        "upcast(gather_vectors(view.values, slot))",
        "values are dropped",
    ),
    (
        "cache/fold.py",
        "mean(view.keys)",
        "upcast(gather_vectors(view.keys, slot))",
        "keys stay where they are",
    ),
    (
        "cache/fold.py",
        "mass / attention.mean(-1)",
        "own[..., 1] / attention.mean(-1)",
        "the weight forgets what was given",
    ),
    (
        "cache/fold.py",
        "look_ahead.attention_to(keys)",
        "look_ahead.attention_to(upcast(gather_vectors(view.keys, slot)))",
        "the weight is for the old key",
    ),
    (
        "cache/fold.py",
        ".nan_to_num(0.0).clamp(log_count - SLACK, log_count + SLACK)",
        " * 0 + log_count",
        "the weight is the count",
    ),
    (
        "cache/fold.py",
        ".nan_to_num(0.0).clamp(log_count - SLACK, log_count + SLACK)",
        ".nan_to_num(0.0)",
        "the weight knows no bounds",
    ),
    (
        "cache/fold.py",
        "count.to(importance.dtype)], -1)",
        "torch.ones_like(importance)], -1)",
        "a slot counts one more, whatever it is given",
    ),
    (
        "cache/fold.py",
        "same_slot @ added).unbind(-1)",
        "added).unbind(-1)",
        "of victims that share a slot one counts",
    ),
    (
        "cache/fold.py",
        "-(view.index * slots",
        "-((2**20 - view.index) * slots",
        "the oldest of equals takes a victim in",
    ),
    ("cache/view.py", "self.queries.shape[-1] ** -0.5", "1.0", "foreseen scores are not scaled"),
    ("cache/look_ahead.py", "- self.logsumexp[..., None, :]", "", "pull is no share of attention"),
    (
        "cache/view.py",
        "[(n, 0, slice(start, None, len(further))) for start, n in enumerate(further)]",
        "[]",
        "only the next line is foreseen",
    ),
    ("cache/view.py", "[(first, 0, every)] +", "[(first, 0, slice(0, None, 3))] +", "every third query looks up"),
    (
        "cache/view.py",
        "self.rotate(queries[:, :, :, some], n, aside) for",
        "queries[:, :, :, some] for",
        "queries are not turned ahead",
    ),
    ("cache/view.py", "(first, -1, slice(1", "(first, 0, slice(1", "no query is turned to the left"),
    ("cache/view.py", "VALUES if self.in_parts else", "0.0 if self.in_parts else", "in parts: values do not count"),
    ("models/llama.py", "lines * grid.stride + columns", "lines * grid.stride", "Llama: columns do not turn"),
    ("hf.py", "lines * self.grid.stride + columns", "lines * self.grid.stride", "transformers: columns do not turn"),
    (
        "cache/view.py",
        "self.keys.dtype == torch.bfloat16 and",
        "self.keys.dtype != torch.float32 and",
        "foreseen scores overflow in float16",
    ),
    (
        "cache/look_ahead.py",
        "x[..., size // 2 :, :])",
        "x[..., : size - size // 2, :])",
        "a minimum leaves out the middle of an odd number",
    ),
    ("policies/fold.py", ".triu()", ".triu(1)", "fold: a token may stand in for itself"),
    ("plan.py", "PARTS.get(self.budget, 1)", "1", "fold: room is made once a line, however little there is"),
    (
        "cache/fold.py",
        "clamp(min=0.0) * (1 + TIE) - own",
        "clamp(min=0.0) - own",
        "fold: the last digit decides between equals",
    ),
    ("cache/view.py", "- 1 - self.missing", "- 1", "within a line: tokens that have not come count as there"),
    ("policies/choose.py", "- recent - bool(view.missing)", "- recent", "within a line: the newest whole line may go"),
    ("policies/fold.py", "(slots - view.prompt_slots) // 2", "slots // 2", "fold: padding decides who may go"),
    ("loop/redraw.py", "column in (0, *ends)", "column == 0", "given codes are fed past the point where room is made"),
    (
        "loop/drafts.py",
        "stop = part = min(row * grid.stride + column, end)",
        "stop = part = end",
        "drafts: no room is made within a line",
    ),
    ("cache/view.py", "return mass + (SCALES_FLOOR if", "return mass + 0 * (SCALES_FLOOR if", "nothing is spared"),
    ("cache/view.py", "FLOOR) * mean * weight", "FLOOR) * mean", "spare by slot, not by token"),
    (
        "policies/fold.py",
        ".argsort(dim=-1)",
        ".argsort(dim=-1, descending=True)",
        "fold: the stronger goes into the weaker",
    ),
    (
        "policies/fold.py",
        ".clamp(min=0.0)",
        ".clamp(min=0.0).sqrt()",
        "fold: plain distances",
    ),
    ("policies/fold.py", 'squares.masked_fill(~image, float("inf"))', "squares", "fold: the prompt may stand in"),
    (
        "policies/fold.py",
        "max(CANDIDATES * view.released + view.protected, (slots - view.prompt_slots) // 2)",
        "view.released + view.protected",
        "fold: importance alone chooses",
    ),
    (
        "cache/line_cache.py",
        "protected=protected, prompt_slots",
        "prompt_slots",
        "fold: what is protected takes the places of candidates",
    ),
    (
        "policies/fold.py",
        "-view.index)",
        "view.index)",
        "fold: of equals the newer is stronger",
    ),
    (
        "cache/line_cache.py",
        "self.count[some][..., :end].masked_fill_(released, 1.0)",
        "pass",
        "a new token inherits the count of a victim",
    ),
    (
        "cache/line_cache.py",
        "self.values.write(view.layer + layer, place, folded.values[layer])",
        "pass",
        "folded values are lost",
    ),
    (
        "cache/line_cache.py",
        "scatter_(3, folded.slot, folded.bias",
        "scatter(3, folded.slot, folded.bias",
        "folded weights are lost",
    ),
    (
        "models/llamagen.py",
        "for n in (lines, columns))",
        "for n in (0, columns))",
        "LlamaGen: nothing turns",
    ),
    # -- the cache
    (
        "cache/line_cache.py",
        "index.to(torch.int32).expand_as(slot)",
        "(self.index >= 0).sum(-1, keepdim=True).to(torch.int32)",
        "index taken from the number of filled slots",
    ),
    ("cache/line_cache.py", "self.bias.scatter_(3, slot, 0.0)", "pass", "a new token stays invisible"),
    (
        "cache/line_cache.py",
        "self.values.write(layer, place, v)",
        "self.values.write(layer, place, k)",
        "values are keys",
    ),
    (
        "cache/line_cache.py",
        "self.queries[layer].index_copy_(2, column, q)",
        "pass",
        "the line's queries are not stored",
    ),
    (
        "cache/line_cache.py",
        "self.target[some][..., slice(*self.part)] = victims",
        "self.target[some][..., slice(*self.part)] = victims[:, :, :1].expand_as(victims)",
        "all heads use head 0's victims",
    ),
    (
        "cache/line_cache.py",
        "self.target[some][..., slice(*self.part)] = victims",
        "self.target[some][..., slice(*self.part)] = victims[:, :1].expand_as(victims)",
        "all rows use row 0's victims",
    ),
    (
        "cache/line_cache.py",
        "self.target[some][..., slice(*self.part)] = victims",
        "self.target[some][..., slice(*self.part)] = victims.flip(-1)",
        "lazy victims leave in reverse",
    ),
    (
        "cache/line_cache.py",
        "self.mass[some][..., :end].masked_fill_(released, 0.0)",
        "pass",
        "attention mass is not reset",
    ),
    ("cache/line_cache.py", 'if self.plan.release == "lazy" else', "if False else", "lazy release behaves as strict"),
    ("cache/line_cache.py", 'if self.plan.release == "lazy" else', "if True else", "strict release behaves as lazy"),
    (
        "cache/line_cache.py",
        "_mark(victims[..., :-count], end)",
        "torch.zeros_like(released)",
        "uneven: lazy victims that nobody overwrites stay for good",
    ),
    (
        "cache/line_cache.py",
        'self.bias[some][..., :end].masked_fill_(hidden, float("-inf"))',
        "pass",
        "strict victims stay visible to attention",
    ),
    (
        "cache/line_cache.py",
        "self.index[some][..., :end].masked_fill_(hidden, -1)",
        "pass",
        "strict victims stay in the record",
    ),
    (
        "cache/line_cache.py",
        "self.grid.index(row)).sum(2)",
        "self.grid.index(row) + 1).sum(2)",
        "mass sees one token too far",
    ),
    (
        "cache/line_cache.py",
        "setattr(self, name, buffer[:, :rows])",
        "setattr(self, name, buffer[:, -rows:])",
        "keep_rows: wrong half",
    ),
    (
        "cache/line_cache.py",
        "weight.log().to(",
        "torch.ones_like(weight).log().to(",
        "padding of the prompt is visible",
    ),
    (
        "cache/line_cache.py",
        "torch.where(weight > 0, index, -1)[:, None]",
        "index",
        "padding of the prompt is in the record",
    ),
    (
        "cache/line_cache.py",
        "(index - grid.prompt).clamp(min=-1)",
        "(index - grid.prompt).clamp(min=0)",
        "the prompt counts as token 0",
    ),
    # -- attention and what a policy sees
    (
        "cache/attention.py",
        "q.shape[-1] ** -0.5 + bias[:, :, None]",
        "q.shape[-1] ** -0.5",
        "the bias is ignored while decoding",
    ),
    ("cache/attention.py", " + bias.float()[:, :, None]", "", "the bias is ignored in scores"),
    (
        "cache/attention.py",
        "later = index[:, :, None] > own[:, None]",
        "later = index[:, :, None] > own[-1]",
        "scores see later tokens",
    ),
    ("cache/attention.py", " * queries.shape[-1] ** -0.5", "", "scores without the 1/sqrt(D)"),
    (
        "cache/view.py",
        "torch.empty_like(scores).scatter_(-1, order, smoothed)",
        "smoothed",
        "smoothed scores in the wrong slots",
    ),
    (
        "cache/view.py",
        "self.queries[:, :, :, -count:]",
        "self.queries[:, :, :, :count]",
        "the first queries for the last",
    ),
    (
        "cache/view.py",
        "return self.index >= self.grid.prompt",
        "return self.index >= 0",
        "the prompt is taken for picture",
    ),
    # -- who goes
    ("policies/choose.py", "(token < anchors) | ", "", "anchors unprotected"),
    ("policies/choose.py", "first_of(1 - recent - ", "first_of(2 - recent - ", "one recent line too few"),
    ("policies/choose.py", "first_of(1 - recent - ", "first_of(-recent - ", "one recent line too many"),
    (
        "policies/choose.py",
        "protect(scores[..., prompt_slots:],",
        "protect(-scores[..., prompt_slots:],",
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
        "sortable(scores, index)",
        "sortable(scores, -index)",
        "among equals the newest goes first",
    ),
    (
        "policies/choose.py",
        "sortable(scores, index)",
        "sortable(scores, torch.arange(index.shape[-1]))",
        "among equals the first slot goes first",
    ),
    ("policies/choose.py", ".indices + prompt_slots", ".indices", "victims are off by the prompt's slots"),
    # -- policies
    ("policies/line.py", "p.mean(2)", "p.amax(2)", "line: the greatest query for the mean"),
    ("policies/streaming.py", "return view.index.float()", "return -view.index.float()", "streaming: the newest go"),
    ("policies/h2o.py", "return view.mass / view.age()", "return view.mass", "h2o: a sum that favours the old"),
    ("policies/h2o.py", "view.age()", "(view.age() + 4)", "h2o: ages off by four"),
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
    ("policies/rkv.py", "cosine.scatter(-1, slot, spared)", "cosine", "rkv: the newest duplicate is not spared"),
    ("policies/rkv.py", ".masked_fill(outside[..., None], 0.0)", "", "rkv: prompt and empty slots are duplicates"),
    (
        "policies/keydiff.py",
        "candidates = view.candidates()[..., None]",
        "candidates = (view.index >= 0)[..., None]",
        "keydiff: mean with prompt",
    ),
    (
        "policies/keydiff.py",
        "F.normalize(view.keys.float(), dim=-1)",
        "view.keys.float()",
        "keydiff: long keys weigh more",
    ),
    ("policies/random.py", "* 1024 + head[..., None])", "* 1024)", "random: all heads alike"),
    ("policies/random.py", "* 1024 + view.row", "* 1024", "random: all lines alike"),
    (
        "policies/random.py",
        "token * 1024 + head",
        "token * 1024 + head + torch.arange(view.index.shape[1])[:, None, None] * 512",
        "random: depends on the batch",
    ),
    # -- heads that keep unequal numbers
    ("plan.py", "HEADROOM if self.policy in UNEVEN else 1", "1", "uneven: no room for heads that keep more"),
    (
        "loop/generate.py",
        "keep=keep,",
        "keep=None if keep is None else torch.full_like(keep, plan.budget * grid.stride),",
        "uneven: what is shared out is not kept",
    ),
    ("loop/generate.py", "and cache.survey is None:", "and True:", "uneven: surveyed anew at every line"),
    (
        "cache/line_cache.py",
        '"count", "survey", "target"',
        '"count", "target"',
        "uneven: the survey keeps rows that are gone",
    ),
    (
        "policies/choose.py",
        "rank = torch.arange(order.shape[-1], device=order.device) - keep[..., None]",
        "rank = torch.arange(order.shape[-1], device=order.device) - keep[..., None].amax(2, keepdim=True)",
        "uneven: all heads keep what the richest does",
    ),
    ("policies/choose.py", ".masked_fill(rank < 0, -1)", "", "uneven: heads that let fewer go name one over and over"),
    (
        "cache/fold.py",
        "folds = image.gather(-1, victims)",
        "folds = view.index.gather(-1, victims) >= 0",
        "uneven: the prompt is folded into the picture",
    ),
    ("policies/allocate.py", ".clamp(max=headroom * budget)", "", "uneven: a head may exceed its room"),
    (
        "policies/allocate.py",
        "return plan.anchors + plan.recent * view.grid.stride,",
        "return 0,",
        "uneven: below protected",
    ),
    (
        "policies/allocate.py",
        "(rank < total - counts.sum(-1, keepdim=True))",
        "0",
        "uneven: the rest of a division is lost",
    ),
    ("policies/allocate.py", "view.newest + 1 - view.grid.prompt", "99999", "uneven: more than there is"),
    ("policies/allocate.py", "[view.layer :]", "[0:]", "uneven: all layers keep what the first does"),
    (
        "policies/allocate.py",
        "weights.transpose(0, 1).flatten(1)",
        "weights.transpose(0, 2).flatten(1)",
        "uneven: mixed rows",
    ),
    (
        "policies/rank.py",
        "sortable(scores, index)",
        "sortable(scores, -index)",
        "rank: oldest of equals",
    ),
    ("policies/rank.py", "ranks = ranks - first.cummax(-1).values", "pass", "rank: places among all, not the group"),
    # -- the neighbours
    ("policies/cake.py", "GAMMA * p.var(2, correction=0))", "0 * p.var(2, correction=0))", "cake: no variance"),
    ("policies/cake.py", "KERNEL = 5", "KERNEL = 7", "cake: too wide a pool"),
    ("policies/cake.py", "return view.by_index(scores, pool)", "return pool(scores)", "cake: neighbours by slot"),
    (
        "policies/cake.py",
        "entropy.sum((-2, -1)) * variance.sum((-2, -1))",
        "entropy.sum((-2, -1)) + 1",
        "cake: entropy alone",
    ),
    ("policies/expected.py", " + scores.var(-1, correction=0) / 2", "", "expected: without the covariance"),
    ("policies/expected.py", " * upcast(view.values).norm(dim=-1)", "", "expected: without the values"),
    ("policies/expected.py", "view.look_ahead((1,))", "view.look_ahead((2,))", "expected: the line after the next"),
    ("policies/expected.py", " + upcast(view.bias)", "", "expected: padding and empty slots are attended to"),
    ("policies/next_line.py", "view.look_ahead((1,))", "view.look_ahead((0,))", "next: from where the line stands"),
    ("policies/criticalkv.py", "FIRST = 0.5", "FIRST = 0.25", "criticalkv: a quarter by score"),
    ("policies/criticalkv.py", " * upcast(view.values).norm(dim=-1).float()", "", "criticalkv: without the values"),
    (
        "policies/criticalkv.py",
        "view.staying()",
        "candidates.sum(-1, keepdim=True)",
        "criticalkv: half of more",
    ),
    (
        "policies/dropkv.py",
        "(attention / (1 - attention + EPSILON)).square()",
        "attention.square()",
        "dropkv: what is left does not share out what is gone",
    ),
    ("policies/dropkv.py", " - 2 * by_both", "", "dropkv: the angle between value and output is without effect"),
    ("policies/dropkv.py", ".mean(3)", "[:, :, :, 0]", "dropkv: the first query head for its group"),
    ("policies/dropkv.py", "return view.by_index(scores, pool)", "return pool(scores)", "dropkv: neighbours by slot"),
    ("policies/vase.py", " + spared * 1e3", "", "vase: long values are not spared"),
    ("policies/vase.py", "LARGEST = 0.01", "LARGEST = 0.005", "vase: half as many spared"),
    ("policies/vase.py", " - torch.log(-torch.log(uniform)).float()", "", "vase: without chance"),
    ("policies/vase.py", "policy.score(view).float().clamp(min=1e-30).log()", "0", "vase: by chance alone"),
    ("policies/stratified.py", "+ safe * (span[..., None] + 1)", "", "stratified: no quota"),
    ("policies/stratified.py", "rank(scores, view.index, band)", "rank(scores, view.index)", "stratified: no bands"),
    (
        "policies/stratified.py",
        "(ranks * (view.row + 1) < SHARE * budget) | ",
        "",
        "stratified: eight bands of three lines",
    ),
    ("policies/stratified.py", " | (ranks * BANDS < SHARE * budget)", "", "stratified: a band for each of many lines"),
    ("policies/stratified.py", "SHARE = 0.5", "SHARE = 0.25", "stratified: half the quota"),
    ("policies/ssd.py", "> SEMANTIC", "< SEMANTIC", "ssd: kinds swapped"),
    (
        "policies/ssd.py",
        "view.own(view.survey) > SEMANTIC",
        "view.survey[: len(view.index)] > SEMANTIC",
        "ssd: the first layer's kinds for all",
    ),
    ("policies/attention_distance.py", "first_of(1 - NEAR)", "first_of(-NEAR)", "reach: three lines are near"),
    ("policies/attention_distance.py", ", image_only=True", "", "reach: the prompt counts"),
    ("policies/hack.py", "STRUCTURAL = 5.0", "STRUCTURAL = 0.2", "hack: budgets swapped"),
    ("policies/hack.py", "h2o(view), line(view)", "line(view), h2o(view)", "hack: scores swapped"),
    ("policies/hack.py", "& (view.index < view.first_of(0))", "", "hack: the order of a line is variance"),
    (
        "policies/hack.py",
        "view.own(contextual(view))",
        "contextual(view)[: len(view.index)]",
        "hack: the first layer's kinds for all",
    ),
    (
        "policies/headkv.py",
        "weights = view.own(view.survey)",
        "weights = view.survey[: len(view.index)]",
        "headkv: the first layer's reach for all",
    ),
    ("policies/headkv.py", "FLOOR = 0.2", "FLOOR = 0.0", "headkv: no floor"),
    ("policies/adakv.py", "FLOOR = 0.2", "FLOOR = 0.0", "adakv: no floor"),
    (
        "policies/adakv.py",
        "scores = protect(scores, view.index, view, plan.protected(view.grid), recent)",
        "pass",
        "adakv: protected tokens compete",
    ),
    ("policies/pyramidkv.py", "2 - 1 / BETA, 1 / BETA", "1 / BETA, 2 - 1 / BETA", "pyramidkv: upside down"),
    (
        "policies/prefixkv.py",
        "return ranked.cumsum(-1) - ranked",
        "return ranked",
        "prefixkv: shares that are not cumulative",
    ),
    ("policies/prefixkv.py", "plan.ratio(view.grid)", "0.9", "prefixkv: at another ratio"),
    # -- drawing
    ("loop/sampling.py", "unconditional + (conditional", "unconditional - (conditional", "guidance: wrong sign"),
    (
        "loop/sampling.py",
        "logits[:images], logits[images:]",
        "logits[images:], logits[:images]",
        "guidance: halves swapped",
    ),
    ("loop/sampling.py", "logits.shape[-1] - top\n", "logits.shape[-1] - top - 1\n", "top-k: one too many"),
    (
        "loop/sampling.py",
        ".cumsum(-1).roll(1, dims=-1)",
        ".cumsum(-1)",
        "top-p: the code that crosses the mark is dropped",
    ),
    ("loop/sampling.py", "before[..., 0] = 0\n", "\n", "top-p: nothing may stay"),
    (
        "loop/sampling.py",
        "[seed + i for i in range(images)]",
        "[seed] * images",
        "noise ignores which image it is",
    ),
    ("loop/sampling.py", "(token + 1) * 0x9E3779B1", "0x9E3779B1", "noise ignores the token's number"),
    ("loop/sampling.py", ".bitwise_xor_(high)", "", "noise ignores the seed's upper half"),
    ("loop/sampling.py", ".clamp_(max=1 - 2.0**-24)", "", "noise may be infinite"),
    ("loop/sampling.py", "logits.float() / temperature", "logits.float() * temperature", "temperature upside down"),
    # -- plans
    (
        "plan.py",
        "min(kept + 1, grid.rows)",
        "min(kept + 2, grid.rows)",
        "room for one line more than planned",
    ),
    ("plan.py", "tuple(self.seeds[i] for i in rows)", "self.seeds[: len(rows)]", "seeds: a part gets the first ones"),
    ("loop/generate.py", "Noise(seeds, images,", "Noise(seeds[0], images,", "seeds: only the first counts"),
    # -- a region drawn anew
    ("loop/redraw.py", "return torch.where(known == DRAW, drawn, known)", "return drawn", "redraw: nothing is kept"),
    ("loop/redraw.py", "(drawn.cumsum(1) > 0) & ~drawn", "~drawn", "redraw: what lies before the region is judged"),
    (
        "loop/drafts.py",
        "self.codes.copy_(found if self.kept is None else merged(self.kept, found))",
        "self.codes.copy_(found)",
        "redraw: kept codes are guessed",
    ),
    ("loop/forced.py", "if sample.guides(number + n)", "if sample.guided", "likelihood: guidance never ends"),
    ("loop/vqa.py", "(0, 0, pad[-1], 0)", "(0, 0, 0, pad[-1])", "vqa: a short question is padded behind"),
    ("models/understanding.py", "x = x + self.pos_embed.to(x)", "pass", "vqa: patches have no places"),
    ("models/understanding.py", "return yes - no", "return no - yes", "vqa: no is yes"),
    ("checkpoints/families/janus.py", '"qkv".index(part[2])', '"kqv".index(part[2])', "vqa: keys are queries"),
    ("prompts/janus.py", "tokenizer.id(END), *yes", "tokenizer.id(IMAGE), *yes", "vqa: the picture has no end"),
    (
        "pictures/fit.py",
        "mask = fit(mask[..., None], *size)[:, 0]",
        "mask = stretch(mask, size)",
        "fit: uncropped mask",
    ),
    ("plan.py", "return keeping(fitting)", "return keeping(max(fitting - 1, 1))", "memory: holds less than fits"),
    (
        "plan.py",
        "shape.cache_bytes(stages, keeping(count), rows)",
        "shape.cache_bytes(stages, keeping(count), 1)",
        "memory: is that of one sequence",
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
    ("grid.py", "self.prompt + number * self.stride", "number * self.stride", "index without the prompt"),
    ("grid.py", "from .errors import UserError", "import torch\n\nfrom .errors import UserError", "numbers load torch"),
    # -- the loop
    (
        "cache/line_cache.py",
        "self.keys.write(view.layer + layer,",
        "self.keys.write(layer,",
        "folded keys: wrong layer",
    ),
    (
        "loop/memory.py",
        "rows * shape.heads * pairs_of_head",
        "shape.heads * pairs_of_head",
        "layers: rows do not count",
    ),
    ("loop/generate.py", "    cache.release(", "    str(", "release is skipped"),
    ("loop/generate.py", "if row + 1 < grid.rows:", "if True:", "the last line is evicted too"),
    (
        "loop/generate.py",
        "            cache.view(row, slice(layer, layer + 1))  # adds the line's attention to mass\n",
        "            pass\n",
        "mass of the first lines is forgotten",
    ),
    (
        "loop/generate.py",
        "tokens[:, column].repeat(",
        "tokens[:, column].repeat_interleave(",
        "halves are fed each other's tokens",
    ),
    (
        "loop/generate.py",
        "value=0 if grid.eol is None else grid.eol",
        "value=0",
        "a line ends with code 0",
    ),
    ("loop/generate.py", "noise.exponential(number)", "noise.exponential(number % 3)", "noise repeats on every row"),
    ("loop/generate.py", "pad = pad[:images]", "pad = pad[images:]", "the padding of the wrong half goes on"),
    (
        "loop/generate.py",
        "if cache.rows > images and not sample.guides(number + fed):",
        "if False:",
        "the unconditional half is computed to the end",
    ),
    (
        "loop/generate.py",
        "    noise = Noise(",
        '    globals().setdefault("kept", []).append(cache)\n    noise = Noise(',
        "the cache outlives its run",
    ),
    ("loop/generate.py", "    plan.check(grid)", "    pass", "a plan that does not fit is not refused"),
    ("loop/generate.py", "@torch.inference_mode()\n", "", "gradients are recorded"),
    # -- drafts
    ("loop/drafts.py", ".cumprod(1).sum(1)", ".sum(1)", "drafts: a guess behind a wrong one is accepted"),
    (
        "loop/drafts.py",
        "torch.minimum(right + 1, stop - number).clamp(min=0)",
        "right + 1",
        "drafts: tokens from before the eviction are accepted",
    ),
    ("loop/drafts.py", "exponential(token + 1)", "exponential(token)", "drafts: the noise of the token in front"),
    (
        "loop/drafts.py",
        "stop = min(part, sample.guidance_interval + 1)",
        "pass",
        "drafts: guidance ends with the line",
    ),
    (
        "loop/drafts.py",
        ".masked_fill(window >= kept[:, None], 0.0)",
        "",
        "drafts: a guess that leads to NaN ends the run",
    ),
    ("loop/drafts.py", "wins = images == 1 and", "wins =", "drafts: batches have them without being asked"),
    (
        "cache/line_cache.py",
        "(token >= 0) & (token < count[:, None])",
        "token >= 0",
        "drafts: rejected tokens are written",
    ),
    (
        "cache/line_cache.py",
        "token = token.masked_fill(token < 0, count)",
        "pass",
        "drafts: what a window follows is hidden from it",
    ),
    (
        "cache/storage.py",
        "torch.where(chosen, x, old.view_as(x))",
        "x",
        "drafts: rejected tokens overwrite slots",
    ),
    ("events.py", "line.passes * line.accepted", "line.accepted", "drafts: a short line counts as much as a long one"),
    # -- teacher forcing
    ("loop/forced.py", "torch.minimum(full, few)", "torch.maximum(full, few)", "shared: what either has"),
    ("loop/forced.py", "row * stride + column", "column", "shared: guidance ends at another token"),
    ("loop/forced.py", "first = found[-1][:, -1:]", "pass", "forced: a line begins as the picture does"),
    # -- with transformers
    ("hf.py", "if column == 0 and row > 0:", "if False:", "transformers: no line ever ends"),
    (
        "hf.py",
        "self._rotate, row - 1, self.grid.stride)",
        "self._rotate, row, self.grid.stride)",
        "transformers: a line ahead",
    ),
    (
        "hf.py",
        "values, _prompt_weights(mask, keys))",
        "values, torch.ones(keys.shape[0], keys.shape[2]))",
        "transformers: padding is visible",
    ),
    (
        "hf.py",
        "keys, values, mask, scaling",
        "keys, values, None, scaling",
        "transformers: a prompt attends to its padding",
    ),
    ("hf.py", "k.element_size(), q.shape[1] // heads)", "k.element_size())", "transformers: one query head a key head"),
    ("hf.py", "_scaled(q, scaling), k, v", "q, k, v", "transformers: the model's scale is ignored"),
    (
        "cache/attention.py",
        "bias.repeat(1, 1, group, 1)",
        "bias.repeat_interleave(group, 2)",
        "grouped heads: a line's masks mixed",
    ),
    ("hf.py", "return self._prompted + self._fed", "return self._fed", "transformers: positions from slots"),
    ("hf.py", "and len(self._column) > 1:", "and False:", "transformers: a line fed at once stays invisible"),
    ("hf.py", "if self._announced != self._attended:", "if False:", "transformers: attention of its own unnoticed"),
    ("hf.py", "!= NAME:\n            raise", "== 0:\n            raise", "transformers: a changed attention unnoticed"),
    ("hf.py", "if layer != self._announced:", "if False:", "transformers: a broken forward goes on"),
    ("hf.py", "if count > max(left, 1):", "if False:", "transformers: more tokens than the grid has"),
    (
        "hf.py",
        "if left > 0 and column + count > (end := next(n for n in self._ends() if n > column)):",
        "if False:",
        "transformers: tokens across a line's end",
    ),
    ("hf.py", "if isinstance(given, LineCache)]", "if False]", "transformers: a cache under another name is ignored"),
    ("hf.py", "not _rotates(decoder)", "False", "transformers: a rotation that is not known"),
    ("hf.py", "[False] * self._layers", "[]", "transformers: generate feeds all tokens again"),
    ("hf.py", "in (None, self._prompted + count):", "in (None, count):", "transformers: a prompt in parts never ends"),
    ("hf.py", "if count > 1 and self.prompt is None:", "if False:", "transformers: a prompt taken for an image"),
    ("hf.py", ") != due:", ") != first:", "transformers: the prompt's last token taken for an image token"),
    ("hf.py", "if new == 0:", "if False:", "transformers: begun again with nothing new"),
    ("hf.py", 'or self._stage == "closing":', "or False:", "transformers: closing tokens do not see each other"),
    ("hf.py", "memo[id(shared)] = shared", "pass", "transformers: a copy of the cache copies the model"),
    ("hf.py", "items() if k not in PASSING", "items()", "transformers: a file of the cache holds the model"),
    ("hf.py", "        copied._choose()\n", "", "transformers: a copy answers a compiled model as the original"),
    ("hf.py", "with torch.inference_mode(False):", "if True:", "transformers: an image stays in inference mode"),
    ("hf.py", "if torch.compiler.is_compiling():", "if False:", "transformers: a compiled model reads sizes"),
    (
        "hf.py",
        "processor.unconditional_context[CACHE_ARGUMENT] = processor.line_cache",
        "pass",
        "transformers: the negative prompt in a full cache",
    ),
    ("cache/line_cache.py", '| {"kernel": None}', "", "a file holds a kernel"),
    ("cache/attention.py", " and q.dtype != torch.float16", "", "attention: float16 overflows"),
    (
        "cache/attention.py",
        "@ upcast(keys).transpose(-1, -2)  # which",
        "@ keys.transpose(-1, -2)  # which",
        "line probabilities: float16 overflows",
    ),
    # -- Llamas that draw
    (
        "models/blocks.py",
        "torch.cat([-sin, sin], -1)",
        "torch.cat([sin, -sin], -1)",
        "halves turn backwards",
    ),
    ("models/blocks.py", "+ self.bias[:, None]", "", "norms of heads lose their bias"),
    ("models/blocks.py", "self.k_norm(k)", "k", "keys are not normalised"),
    (
        "checkpoints/families/lumina.py",
        "second = vocabulary >= FIRST_CODE_2",
        "second = vocabulary > FIRST_CODE_2",
        "Lumina-mGPT 2.0 is taken for 1.0",
    ),
    (
        "checkpoints/families/lumina.py",
        'for name in ("bos_token", "eos_token"):',
        'for name in ("eos_token", "bos_token"):',
        "Lumina-mGPT 2.0: a text begins with its end",
    ),
    (
        "checkpoints/families/__init__.py",
        "size = grid.cols * self.pixels",
        "size = grid.cols * PIXELS",
        "a prompt's size at 16 pixels a token",
    ),
    ("models/llama.py", "self.head_dim or self.width", "self.width", "groups: a head size of its own is not heard"),
    ("cache/attention.py", "return weights.mean(2) if group > 1 else", "return", "groups: one query head is asked"),
    (
        "cache/view.py",
        "stack_groups(queries, queries.shape[2] // self.keys.shape[2])",
        "queries[:, :, :: queries.shape[2] // self.keys.shape[2]]",
        "groups: one query head looks ahead",
    ),
    (
        "loop/memory.py",
        "shape.heads * shape.group * grid.stride",
        "shape.heads * grid.stride",
        "groups: the plan forgets query heads",
    ),
    (
        "checkpoints/weights.py",
        "first = one * sum(self.shares[: self.part])",
        "first = one * self.part",
        "groups: keys are loaded into queries",
    ),
    (
        "checkpoints/library.py",
        "if info.sizes and tokenizer.config.factor",
        "if False and tokenizer.config.factor",
        "loading: a VQ tokenizer of other pixels per code",
    ),
    ("models/blocks.py", "torch.stack([-sin, sin], -1)", "torch.stack([sin, -sin], -1)", "pairs turn backwards"),
    ("models/llama.py", "v[row], weight)", "v[row], torch.ones_like(weight))", "image tokens see padding"),
    (
        "models/llama.py",
        "torch.full((1,), lines * grid.stride",
        "torch.full((1,), lines * grid.cols",
        "the end of a line is not counted",
    ),
    ("models/llama.py", "return prompt.stack(prompt.negative)", "return prompt.stack(prompt)", "guided from itself"),
    ("models/llamagen.py", "(share @ v)[row]", "(share @ v)[row.flip(0)]", "prompts that are alike get another's mean"),
    (
        "prompts/__init__.py",
        "flat = torch.cat([self.pad[:, None].to(tokens.dtype), tokens.flatten(1)], 1)",
        "flat = tokens.flatten(1)",
        "padding makes no difference",
    ),
    ("models/llama.py", "k[row], v[row]", "k[row], v[row.flip(0)]", "rows that are alike get another's values"),
    (
        "models/raster.py",
        "(index, pad, cache.grid)\n        x = self.embed_codes(tokens).to",
        "(index, pad, cache.grid)\n        x = self.embed_tokens(tokens).to",
        "replay takes words",
    ),
    ("prompts/__init__.py", "torch.cat([empty, self.tokens], 1)", "torch.cat([self.tokens, empty], 1)", "padded right"),
    (
        "loop/micro_batches.py",
        "self.sample.select(rows)",
        "self.sample.select(range(len(rows)))",
        "parts of a batch draw the same pictures",
    ),
    ("loop/micro_batches.py", "given[list(rows)]", "given[: len(rows)]", "parts of a batch keep the first one's rows"),
    ("loop/memory.py", "needed(count + 1) <= room", "needed(count) <= room", "one image too many is drawn at once"),
    # -- lines that are given
    (
        "cache/line_cache.py",
        "overwritten[:, :, None] <= order",
        "overwritten[:, :, None] < order",
        "feed: the slot it writes over",
    ),
    (
        "cache/line_cache.py",
        'if self.plan.release == "lazy":  # each',
        "if False:  # each",
        "feed: victims are seen to the line's end",
    ),
    (
        "cache/line_cache.py",
        'seen.masked_fill_(order > order[:, None], float("-inf"))',
        "seen",
        "feed: tokens see those after them",
    ),
    ("cache/line_cache.py", "        self.write(layer, columns, k, v, q)\n", "", "feed: given lines are not written"),
    (
        "models/raster.py",
        "(index, pad, cache.grid)\n        x = self.embed_codes(tokens)",
        "(index, pad, cache.grid)\n        cache.advance(index, columns)\n        x = self.embed_codes(tokens)",
        "feed: slots open before the layers",
    ),
    ("loop/generate.py", "else known[:, row], every", "else known[:, 0], every", "the first given line for all"),
    ("loop/redraw.py", "column in (0, *ends) or not fixed[column]", "True", "given lines are fed one by one"),
    (
        "loop/generate.py",
        "codes.repeat(cache.rows",
        "codes.repeat_interleave(cache.rows",
        "given lines: halves get each other's tokens",
    ),
    ("loop/generate.py", "or rows >= grid.rows", "or rows > grid.rows", "all lines may be given"),
    ("loop/generate.py", "int(above.min()) < 0 or", "", "given codes below 0"),
    ("loop/generate.py", "int(above.max()) >= codes", "int(above.max()) > codes", "given codes: one too far"),
    ("loop/generate.py", "above.expand(images", "above[:1].expand(images", "given lines: the first picture's for all"),
    ("loop/generate.py", "if not line.replayed]", "]", "speed counts given lines"),
    # -- what the page is told
    ("events.py", "else share != self._shares", "else share > 0", "told: not what has fallen to nothing"),
    ("events.py", "(line.share[: run.shown] * 255).round()", "(line.share[: run.shown] * 255)", "told: shares cut off"),
    (
        "events.py",
        "before[..., self._own(line.row)] = True",
        "pass",
        "told: not what left on its own line",
    ),
    ("events.py", "evicted = before & ~line.by_head", "evicted = ~line.by_head", "told: evicted again on every line"),
    ("events.py", "[NONE] * (longest - count)", "[0] * (longest - count)", "told: lists filled up with token 0"),
    ("events.py", "if longest * counts.numel() == len(numbers):", "if True:", "told: uneven lists run together"),
    (
        "events.py",
        "self._shares, self._by_head, self._layered = share, line.by_head, layers",
        "self._shares, self._by_head = share, line.by_head",
        "told: layers against the first line",
    ),
    (
        "events.py",
        "self._shares, self._by_head, self._layered = share, line.by_head, layers",
        "self._shares, self._layered = share, layers",
        "told: heads against the first line",
    ),
    (
        "events.py",
        "changed[: run.cells] |= by_layer.any(0)",
        "pass",
        "told: layers whose change cancels out are left out",
    ),
    ("events.py", "drawn = [row for row in self._rows if not row.replayed]", "drawn = self._rows", "told: false speed"),
    ("events.py", "tokens <= HEAD_BYTES", "tokens < HEAD_BYTES", "told: heads up to, not including, the limit"),
    ("events.py", "or len(codes) != prod(sizes)", "", "codes handed back: any number of them"),
    ("events.py", "if row.row + 1 < row.rows)", ")", "told: the last line counts as held"),
    ("events.py", " and int(s) < 1 << 64", "", "kept: seeds of any size"),
    ("events.py", "list_index.isdecimal() and at and", "at and", "kept: rows of a run without a number"),
    ("checkpoints/library.py", "if own is not None:", "if False:", "loading: told to choose a tokenizer there is not"),
    # -- files from strangers
    ("checkpoints/untrusted.py", ' or ".." in parts', "", "loading: names lead up"),
    ("checkpoints/untrusted.py", " or PureWindowsPath(name).anchor", "", "loading: names lead to a drive"),
    ("checkpoints/untrusted.py", ' or "\\0" in name', "", "loading: names with a zero"),
    ("checkpoints/untrusted.py", "> MAX_NAME:", "> 10 * 4096:", "loading: names without an end"),
    ("checkpoints/untrusted.py", "> JSON_BYTES", "> 2**40", "loading: configs of any size"),
    ("checkpoints/untrusted.py", "except RecursionError", "except KeyError", "loading: configs nested without an end"),
    ("checkpoints/untrusted.py", "not 0 < value < 2**31", "value is None", "loading: numbers of any size"),
    ("checkpoints/untrusted.py", "isinstance(value, bool) or", "", "loading: true is a number"),
    ("checkpoints/untrusted.py", "if HEADER_BYTES < length", "if 2**40 < length", "loading: headers of any size"),
    (
        "checkpoints/untrusted.py",
        "r.compress_type or r.file_size != r.compress_size",
        "False",
        "loading: archives that unpack",
    ),
    ("checkpoints/untrusted.py", "> PICKLE_BYTES", "> 2**40", "loading: lists of weights of any size"),
    ("checkpoints/untrusted.py", "len(pickles) != 1 or", "len(pickles) < 1 or", "loading: two lists of weights"),
    (
        "checkpoints/untrusted.py",
        "if not BESIDE_WEIGHTS.fullmatch(name):",
        "if False:",
        "loading: pickles name anything",
    ),
    ("checkpoints/untrusted.py", "3: text == ENCODING", "3: text is not None", "loading: bytes in any encoding"),
    (
        "checkpoints/library.py",
        "averaged != (family is None or family.averaged),",
        "averaged,",
        "loading: of a tokenizer the model, not its ema",
    ),
    ("checkpoints/library.py", "            if NESTED not in name\n", "", "loading: an optimizer among the weights"),
    ("checkpoints/library.py", "part not in WITHIN)", "part)", "loading: names of compiled blocks"),
    ("checkpoints/library.py", "if len(fitting) == 1:", "if fitting:", "loading: a tokenizer is guessed"),
    (
        "checkpoints/families/lumina.py",
        "if requested and not published_name:",
        "if requested and not numbers:",
        "loading: any number in a name is the size",
    ),
    ("checkpoints/library.py", "made.max_length > room:", "made.max_length >= room:", "texts: one token too few"),
    ("checkpoints/library.py", "theirs.meaning != ours.meaning:", "not theirs:", "prompts of any model are taken"),
    ("checkpoints/library.py", "(table > 0)", "(table > 9e9)", "codes of any codebook are taken"),
    ("__main__.py", "if first and not self.busy:", "if first:", "command line: Ctrl-C ends the saving"),
    (
        "__main__.py",
        "            _draw(model, micro_batches, [plan], args, finish_all)",
        "            _draw(model, micro_batches, [plan], args)\n            finish_all()",
        "command line: pictures are written at the end",
    ),
    (
        "__main__.py",
        "    except (OSError, ValueError):\n        with",
        "    except ValueError:\n        with",
        "command line: a closed pipe ends the run",
    ),
    # -- many pictures, and what is said of an installation
    ("batch/table.py", "if seen and not any_prompt:", "if False:", "batch: no column, but bad rows"),
    (
        "batch/draw.py",
        "(row.number - 1) * job.images",
        "len(found)",
        "batch: a seed depends on which rows can be drawn",
    ),
    ("batch/draw.py", "if parts.halved_from:", "if False:", "batch: memory runs out in every batch"),
    (
        "batch/draw.py",
        "left = [picture for picture in batch if not reasons[picture.row.number]]",
        "left = []",
        "batch: a bad text costs its batch",
    ),
    ("batch/folder.py", 'content.rfind(b"\\n") + 1]', "len(content)]", "batch: a row that was cut off stays"),
    ("batch/folder.py", "if not _locked(lock.fileno()):", "if False:", "batch: two runs draw into one folder"),
    ("batch/folder.py", "if before.get(name) != now.get(name):", "if False:", "batch: other settings go on"),
    ("batch/folder.py", "if row.get(key) != wanted:", "if False:", "batch: other prompts go on"),
    ("check.py", "zip(totals[1:], others, strict=True)", "zip(totals, others, strict=False)", "check: the next plan's"),
    ("check.py", "count += expected.shape[1]", "count += 1", "check: KL of a line, not of a token"),
    ("doctor.py", 'line = line.replace(home, "~")', "pass", "doctor: the home folder is named"),
    ("doctor.py", "if apart <= limit else", "if apart == apart else", "doctor: wrong logits are fine"),
    ("errors.py", 'c if c.isprintable() else " "', "c", "loading: messages of several lines"),
    ("errors.py", "sentence[:MAX_LENGTH]", "sentence", "loading: messages without an end"),
    ("checkpoints/weights.py", "> 2 * (size :=", "> 2**60 * (size :=", "loading: more weights than bytes"),
    (
        "checkpoints/weights.py",
        "if duplicates := tensors.keys() & found.keys():",
        "if duplicates := []:",
        "loading: a weight in two files",
    ),
    ("checkpoints/weights.py", "if not finite:", "if False:", "loading: NaN is not noticed"),
    ("checkpoints/weights.py", "ends.isfinite().all()", "not ends.isnan().any()", "loading: infinity is not noticed"),
    ("checkpoints/weights.py", ".is_floating_point():", ".dtype:", "loading: whole numbers pass for weights"),
    (
        "checkpoints/weights.py",
        "if counts[t.name, t.part] > 1 or t.shares != shares[t.name]]",
        "if False]",
        "loading: two names",
    ),
    (
        "checkpoints/weights.py",
        'if line and "weights_only" not in line',
        "if line",
        "loading: torch's advice is passed on",
    ),
    (
        "checkpoints/weights.py",
        "(RuntimeError, IndexError, ZeroDivisionError)",
        "RuntimeError",
        "loading: shapes that crash",
    ),
    (
        "checkpoints/library.py",
        "if config.layers > len(weights.tensors):",
        "if False:",
        "loading: as many layers as a name says",
    ),
    ("checkpoints/library.py", "if size < 1]", "if size < -1]", "loading: models of no size"),
    (
        "checkpoints/library.py",
        " or (dim == of_width and config.width % config.heads)",
        "",
        "loading: heads that do not divide",
    ),
    ("checkpoints/text.py", "check_finite(weights, key, tensor)", "pass", "loading: NaN in a text encoder"),
    ("prompts/t5.py", " or layers > len(ours)", "", "loading: as many blocks as a name says"),
    (
        "prompts/t5.py",
        "if not ours[name].is_floating_point():",
        "if False:",
        "loading: whole numbers in a text encoder",
    ),
    ("tokenizers/tokenizer.py", "shape[0] < 4 or", "", "loading: channels that do not divide"),
    ("tokenizers/tokenizer.py", "if not all((codes, code_dim, z)):", "if False:", "loading: a tokenizer of nothing"),
    ("prompts/emu.py", "text or always_task", "text", "emu: U0's rows without a text"),
    ("prompts/emu.py", "text.strip().removesuffix(SUFFIX) + SUFFIX", "text.strip()", "emu: what its authors append"),
    ("prompts/emu.py", "{grid.rows}*{grid.cols}", "{grid.cols}*{grid.rows}", "emu: rows come first"),
    ("checkpoints/families/emu.py", '"chat" in weights.name.lower() or ', "", "emu: Chat by its name"),
    ("checkpoints/families/emu.py", "or CHAT_LENGTH in (", "or 0 in (", "emu: Chat by its config"),
    ("checkpoints/families/emu.py", 'number(text, "rms_norm_eps", 1e-5)', "1e-5", "emu: eps of the config"),
    ("checkpoints/families/emu.py", "config.group if config else 1", "1", "emu: grouped rows"),
    ("prompts/tiktoken.py", 'unicodedata.normalize("NFC", text)', "text", "text: accents that are composed"),
    ("prompts/tiktoken.py", "max(n - 1, 0), n + 1", "n, n + 1", "text: a merged pair has another neighbour"),
    ("prompts/tiktoken.py", "[*self._ranks.values()] != [*range(len(lines))] or", "", "loading: any ranks"),
    ("tokenizers/tokenizer.py", "code_dim != z:", "False:", "loading: entries that do not fit layers in time"),
    ("tokenizers/tokenizer.py", 'if self.config.kind == "ibq" else', "if False else", "tokenizer: IBQ's codes"),
    ("tokenizers/tokenizer.py", "(codes, code_dim) == IBQ", "False", "tokenizer: IBQ is not recognised"),
    (
        "tokenizers/network.py",
        "repeat_interleave(wide, -1)",
        "repeat(1, 1, 1, wide)",
        "tokenizer: another place's norm",
    ),
    ("tokenizers/still.py", "tensor[:, :, -2:].sum(2), ", "tensor[:, :, :2].sum(2), ", "tokenizer: padded in front"),
    ("tokenizers/still.py", "both.chunk(2)", "(both.chunk(2)[0], entries)", "tokenizer: norms read other entries"),
    ("checkpoints/convert.py", "targets[key].transform(tensor)", "tensor", "converting: weights as they are published"),
    ("checkpoints/families/llamagen.py", " or len(names) != count", "", "loading: any number of class names"),
    (
        "checkpoints/families/llamagen.py",
        "if not isinstance(settings, dict) or any(",
        "if False and any(",
        "loading: any sampling",
    ),
    (
        "checkpoints/families/lumina.py",
        "if any(type(number) is not int or number < 0",
        "if any(False",
        "loading: ids that are none",
    ),
    (
        "checkpoints/families/lumina.py",
        "if (last := max(first_code + codes - 1, eol)) >= vocabulary:",
        "if False:",
        "loading: ids beyond the words",
    ),
    # -- the decoder
    ("prompts/__init__.py", ">= pad[:, None, None]", ">= 0 * pad[:, None, None]", "prefill sees padding"),
    (
        "models/llamagen.py",
        "mean, count[row, None].float())",
        "mean, torch.ones(len(row), 1))",
        "the prompt's slot weighs one token",
    ),
    (
        "models/llamagen.py",
        "heads, index - grid.prompt",
        "heads, index",
        "RoPE turned by the index",
    ),
    ("models/llamagen.py", "(1,), lines * grid.stride", "(1,), lines", "1-D RoPE: a line ahead is one token ahead"),
    ("models/blocks.py", "(2, -1)).transpose(-1, -2)", "(2, -1))", "1-D RoPE: pairs turn by another pair's angle"),
    # scales
    ("pyramid.py", "if end >= tokens", "if end > tokens", "scales: one scale too many is protected"),
    ("plan.py", "stages.whole(self.anchors)", "self.anchors", "scales: anchors end within a scale"),
    ("plan.py", "self.ratio(pyramid) * pyramid.kept", "self.ratio(pyramid) * pyramid.tokens", "scales: a share of all"),
    (
        "cache/view.py",
        "keys, first = upcast(keys), self.newest",
        "keys = upcast(keys)",
        "scales: a query sees its scale up to itself",
    ),
    ("cache/view.py", "return self.newest + 1 - first", "return self.newest + 1 - self.index", "scales: ages by token"),
    (
        "cache/stage_cache.py",
        "return self.stage + 1 < self.stages",
        "return True",
        "scales: the last scale is stored",
    ),
    (
        "cache/stage_cache.py",
        "        self._save(layer, held)\n        self.peak",
        "        self.peak",
        "scales: never settled",
    ),
    ("cache/stage_cache.py", "if group.padded or", "if", "scales: heads see their neighbours' slots"),
    ("cache/stage_cache.py", "begin += shape.numel()", "pass", "scales: groups share their working memory"),
    (
        "cache/stage_cache.py",
        "[self.rows, self.heads] = part",
        "[self.rows, self.heads] += 0",
        "scales: groups say nothing",
    ),
    ("cache/view.py", ", rows=own_rows, heads=own_heads)", ")", "scales: parts are taken for the first heads"),
    ("plan.py", "(stages or pyramid.stages) - 1", "pyramid.stages - 1", "scales: room for scales that are not drawn"),
    ("profile.py", "self.mass.tril(-1)", "self.mass", "profile: a scale is earlier than itself"),
    ("policies/heatkv.py", ".tril(-1)", "", "heatkv: a scale's own attention counts"),
    ("policies/heatkv.py", "drawn - view.protected, 1", "drawn, 1", "heatkv: too few heads lose a scale"),
    ("policies/scalekv.py", "rank < drafters", "rank >= drafters", "scalekv: refiners draft"),
    ("policies/amskv.py", "(1 - profile.similarity", "(profile.similarity", "amskv: layers that change keep less"),
    ("policies/hack.py", "line(view) + 2 *", "line(view) + 0 *", "hack: the newest scale may leave structural heads"),
    ("loop/pruning.py", "(x - x.mean(1, keepdim=True))", "x", "pruning: long tokens stand out, not different ones"),
    ("models/infinity.py", "else table[places][:, None]", "else table[: x.shape[1]]", "pruning: others' positions"),
    ("loop/scales.py", "given=tokens, stop_after=stop_after", "given=given, stop_after=stop_after", "pairs: no drafts"),
    ("loop/calibrate.py", "attention.var(1, correction=0)", "attention.var(1)", "profile: variance of a sample"),
    ("cache/fold.py", "folds = folds & ~none", "pass", "scales: what only fills a list is folded"),
    ("cache/fold.py", "1 / same_slot.sum(-1))", "torch.ones_like(weight))", "scales: a slot is fitted for each victim"),
    ("cache/fold.py", "diagonal += RIDGE *", "diagonal += 0 *", "scales: the fit holds to nothing"),
    ("cache/fold.py", "wanted - own @ values", "wanted", "scales: the fit forgets what is read already"),
    ("cache/view.py", "values * unit.sqrt()[..., None]", "values * 0", "scales: near is near by key alone"),
    ("plan.py", "stages.within(self.anchors) if", "stages.whole(self.anchors) if", "scales: folding keeps two scales"),
    (
        "loop/scales.py",
        "state = decoder.select_rows(state, images)",
        "pass",
        "scales: guidance goes on without a cache",
    ),
    ("loop/scales.py", "stage < scales_given", "False", "scales: given ones are drawn again"),
    ("models/var.py", "1 + (scale - 1) * stage", "1 + scale * stage", "var: guidance ends one higher"),
    ("models/var.py", ".clamp(max=LARGEST_SCALE)", "", "var: scores without a limit"),
    ("models/var.py", "scale, shift = state.head", "shift, scale = state.head", "var: the head's scale and shift"),
    ("models/var.py", "q = q * PLAIN_SCALE", "pass", "var: plain scores four times too large"),
    ("models/mvar.py", "return query == key", "return query >= key", "mvar: one pass sees earlier scales"),
    ("models/mvar.py", "diagonal=1", "diagonal=0", "mvar: a token does not read what it wrote"),
    ("models/mvar.py", "before.copy_(after)", "pass", "mvar: nothing is carried"),
    ("models/mvar.py", "x * skip[:, None]", "0", "mvar: no way past the scan"),
    (
        "models/mvar.py",
        "self.norm(y.to(u.dtype))",
        "self.norm((y / F.silu(upcast(gate))).to(u.dtype)) * F.silu(gate)",
        "mvar: the gate comes after the norm",
    ),
    ("cache/carried_state.py", "torch.promote_types(dtype, torch.float32)", "dtype", "mvar: a state in half precision"),
    ("checkpoints/families/mvar.py", "name.endswith(IN_FLOAT32)", "False", "mvar: decays in half precision"),
    ("tokenizers/pyramid.py", 'mode="bicubic"', 'mode="bilinear"', "pyramid: scales rise along straight lines"),
    (
        "tokenizers/pyramid.py",
        "(0, 0, 1, 1, 1, 2, 2, 3, 3, 3)",
        "(0, 0, 0, 1, 1, 2, 2, 2, 3, 3)",
        "pyramid: ties go down",
    ),
    ("tokenizers/pyramid.py", "0.27 * (1 - 0.95 * ratio)", "0.27", "pyramid: mixtures stay wide"),
    ("models/infinity.py", ".round().long()", ".floor().long()", "infinity: positions are cut, not rounded"),
    (
        "models/infinity.py",
        "_LARGEST.get(sides, sides[-1])",
        "sides[-1]",
        "infinity: positions of the last scale drawn",
    ),
    ("models/infinity.py", "if bool(words.all()) else words", "if True else words", "infinity: padding is read"),
    ("models/infinity.py", "values = values + self.v_bias.to(values)", "pass", "infinity: texts without a bias"),
    (
        "models/infinity.py",
        "self.ca(self.ca_norm(x).to(dtype), text)",
        "self.ca(x.to(dtype), text)",
        "infinity: no norm",
    ),
    (
        "models/infinity.py",
        "self.word_embed(below.to(self._precise)) + self._level(stage)",
        "self.word_embed(below.to(self._precise))",
        "infinity: all scales look alike",
    ),
    ("models/infinity.py", "return prompt.stack(prompt.negative)", "pass", "infinity: the negative text is ignored"),
    ("tokenizers/bits.py", 'mode="area"', 'mode="bilinear"', "bits: encoded from interpolated remainders"),
    (
        "tokenizers/bits.py",
        "(2.0 * bits - 1) / self.channels**0.5",
        "(2.0 * bits - 1) / self.bits**0.5",
        "bits: corners of the token, not of the place",
    ),
    ("tokenizers/bits.py", "F.pixel_unshuffle(small, self.patch)", "small", "bits: places are not gathered"),
    ("loop/sampling.py", "digits.shape[-1] - 1, -1, -1", "digits.shape[-1]", "bits: the first bit is the lowest"),
    (
        "loop/scales.py",
        "logits.unflatten(-1, (decoder.digits, -1))",
        "logits[..., None, :]",
        "bits: one choice for all",
    ),
    ("checkpoints/published.py", "if name in INFINITY_VAES:", "if False:", "infinity: d32 for d32reg"),
    ("checkpoints/library.py", "if info.family.precise(name):", "if False:", "infinity: conditions in half precision"),
    (
        "checkpoints/families/infinity.py",
        "names[: names.index(_largest(weights.name)) + 1]",
        "names",
        "infinity: sizes that a file was not trained for",
    ),
    ("checkpoints/text.py", "if model is None or model.family.cleaned", "if True", "infinity: texts are cleaned"),
    ("events.py", '{4: "I", 8: "Q"}', '{4: "I"}', "tokens of scales: of many bits"),
    # masked models
    ("steps.py", "min(known, tokens - 1)", "known", "masked: the last step is guided more than published"),
    ("steps.py", "min(round(at), self.start)", "round(at)", "masked: denoising starts at 999 whatever is asked"),
    ("steps.py", "step - self.full_first + 1", "step - self.full_first", "masked: full steps are one late"),
    ("models/denoise.py", "eps[count:], eps[:count]", "eps[:count], eps[count:]", "masked: guidance the other way"),
    ("models/denoise.py", "variances[-1] = variances[-2]", "pass", "masked: the last variance is 0"),
    ("models/denoise.py", "ahead, at).split", "ahead, 0).split", "masked: modulation of the first step for all"),
    ("models/mar.py", "repeated(places[:, :copies], label)", "0", "masked: copies of the class without their places"),
    (
        "models/mar.py",
        "again = torch.where(again < new, again, slots)",
        "pass",
        "masked: the encoder writes slots that are not known",
    ),
    ("cache/step_cache.py", "self.age += 1", "pass", "masked: nothing grows old"),
    ("cache/refresh.py", 'score[:, taken] = float("-inf")', "pass", "masked: what is computed anyway is chosen"),
    ("cache/refresh.py", "cache.mass * (cache.age + 1)", "cache.mass", "masked: attention x age is attention"),
    ("loop/masked.py", "and group.passed >= 0", "", "masked: the first pass uses what was never computed"),
    ("loop/masked.py", "self.normal.select(group.images)", "self.normal", "masked: noise of other images"),
    ("loop/masked.py", "self.schedule[step] > group.known", "True", "masked: steps that draw nothing take place"),
    ("loop/graph.py", "kept.copy_(new)", "pass", "masked: a recorded head draws the same tokens again"),
    ("pictures/inpaint.py", "mask > 0.5", "mask > 0.3", "masked: hardly covered is covered"),
    ("checkpoints/families/mar.py", "averaged=True", "averaged=False", "masked: the weights that draw worse"),
    ("models/nova.py", "if prompt.negative else without", "if False else without", "nova: no negative text"),
    ("models/nova.py", "return x + self.norm2(upcast(self.mlp(x.to(dtype))))", "return x + self.mlp(x)", "nova: norm"),
    ("models/nova.py", "features[pad:]", "features", "nova: padding is read as text"),
    ("steps.py", "if self.rounded:", "if False:", "nova: a first step that draws a token more"),
    ("checkpoints/families/nova.py", ".transpose(0, 1).flatten", ".flatten", "nova: patches laid out otherwise"),
    ("checkpoints/families/nova.py", "!= needed:", "!= found:", "nova: any scheduler"),
    ("checkpoints/library.py", "shapes, _scale(weights)", "shapes", "nova: latents with another VAE's scale"),
    ("tokenizers/latents.py", "[0] * self.config.scale", "[0]", "masked: latents without their scale"),
    # -- scales on the page
    (
        "pictures/preview.py",
        "old[0].lerp(new[0], 1 - self.recall), old[1].lerp(new[1], 1 - self.recall)",
        "old",
        "sketch: learns from no finished picture",
    ),
    ("pictures/preview.py", "(0, 1), value=1.0)", "(0, 1), value=0.0)", "sketch: an empty canvas is black"),
    ("pictures/preview.py", "detail = 2 * self", "detail = self", "preview of scales: with half its rows"),
    ("pictures/preview.py", "len(canvas) * side * round", "side * round", "preview of scales: the time of one for all"),
    (
        "pictures/preview.py",
        "self.share * elapsed - self.spent",
        "self.share * elapsed",
        "preview of scales: time is spent twice",
    ),
    ("pictures/heatmap.py", "[:, None] >= scale", "[:, None] > scale", "lifetime of scales: counted from the next one"),
    ("nodes/loops.py", "sides[:rows] != pyramid.sides[:rows]", "sides != pyramid.sides", "keep scales: all or none"),
    ("nodes/loops.py", "rows >= pyramid.stages", "rows > pyramid.stages", "keep scales: all of them"),
    ("nodes/loops.py", "return codes[:, :first]", "return codes", "keep scales: too many"),
    ("loop/scales.py", "if sample.smooth and paired:", "if False:", "drafter: hands on what is no mixture"),
    (
        "loop/memory.py",
        "pyramid.size((stages or pyramid.stages) - 1)",
        "pyramid.size(-1)",
        "drafter: planned as if it drew the last scale",
    ),
    (
        "nodes/loops.py",
        "for each, scales in self.model.in_turn]",
        "for each, scales in [(self.model, 0)]]",
        "drafter: the page is told of the refiner's cache alone",
    ),
    ("nodes/sockets.py", "max(1, stages - 2)", "max(1, stages - 1)", "drafter: all scales but one by default"),
    ("nodes/live.py", "plan = min(plans,", "plan = max(plans,", "drafter: keeps to no budget in MiB"),
    ("nodes/decode.py", "(tokens.latents, tokens.canvas)", "(tokens.latents,)", "smooth: decoded from codes"),
]


def place(file: str, root: Path) -> Path:
    """Where a file of MUTATIONS is."""
    return root / (file if file.startswith("nodes/") else f"linear_core/{file}")


def occurrences(file: str, old: str, root: Path = ROOT) -> int:
    return place(file, root).read_text(encoding="utf-8").count(old)


# One run of pytest, in a process of its own --------------------------------------------------------------------------


class Run(NamedTuple):
    files: list[str]
    order: list[str]  # ids of tests, first to last
    seconds: dict[str, float]  # that each test takes, where it is known
    rest: bool = False  # whether the files' other tests run, too, before them
    stop: bool = True  # at the first that fails
    trace: bool = False


class Teller:
    """Plugin of pytest: puts the tests in order, tells what becomes of them, and ends the process when one hangs."""

    def __init__(self, told: Connection, run: Run, cover: Any):
        self.told, self.run, self.cover = told, run, cover
        self.place = {name: place for place, name in enumerate(run.order)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if self.run.rest or item.nodeid in self.place]
        items.sort(key=lambda item: self.place.get(item.nodeid, -1))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.told.send(("start", nodeid))
        end_after(self.run.seconds.get(nodeid, 60))
        if self.cover:
            self.cover.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        end_after(BETWEEN)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.told.send(("failed", report.nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.told.send(("seconds", (report.nodeid, report.duration)))
        if report.failed:
            self.told.send(("failed", report.nodeid))


def end_after(seconds: float) -> None:
    """End this process when it hangs in what takes so long; calling this again starts anew."""
    faulthandler.dump_traceback_later(PATIENCE + 10 * seconds, exit=True, file=sys.__stderr__)


def run_tests(told: Connection, tree: Path, run: Run) -> None:
    """What the process does: tell which tests start and fail, their seconds and, with `trace`, the lines they reach."""
    os.chdir(tree)
    sys.path[0] = str(tree)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    end_after(BETWEEN)
    cover = None
    if run.trace:
        import coverage  # here, as whoever imports MUTATIONS needs none

        source = [str(tree / name) for name in ("linear_core", "nodes") if (tree / name).is_dir()]
        cover = coverage.Coverage(None, source=source, config_file=False)
    options = ["-p", "no:cacheprovider", "--tb=no", "-m", "not host and not browser", *["-x"] * run.stop]
    with cover.collect() if cover else contextlib.nullcontext():
        status = pytest.main([*options, *run.files], [Teller(told, run, cover)])
    if cover:
        told.send(("lines", lines_of_tests(cover.get_data(), tree)))
    told.send(("end", int(status)))


def lines_of_tests(data: Any, tree: Path) -> dict[str, dict[str, list[int]]]:
    """The lines that each test reaches, by file as MUTATIONS names it."""
    found: dict[str, dict[str, list[int]]] = {}
    for path in data.measured_files():
        file = Path(path).relative_to(tree).as_posix().removeprefix("linear_core/")
        for line, tests in data.contexts_by_lineno(path).items():
            for test in filter(None, tests):
                found.setdefault(test, {}).setdefault(file, []).append(line)
    return found


# In the worker that owns a copy --------------------------------------------------------------------------------------

TREE = Path()  # that copy


def prepare(folder: str) -> None:
    """A copy for this worker, and for its processes what they would all import."""
    global TREE
    TREE = Path(tempfile.mkdtemp(dir=folder)) / "pack"
    shutil.copytree(ROOT, TREE, ignore=shutil.ignore_patterns(".*", "__pycache__", "node_modules", "out", "runs"))
    for path in [path for path in (TREE / "tests").rglob("*") if path.name in OWN]:
        path.unlink()
    for name in SHARED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def told_by(run: Run) -> list[tuple[str, Any]]:
    """All that the process of this run tells, until it ends in one way or another."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=run_tests, args=(sender, TREE, run))
    process.start()
    sender.close()
    told: list[tuple[str, Any]] = [("start", "import")]
    with contextlib.suppress(EOFError):
        while True:
            told.append(receiver.recv())
    process.join()
    return told


def failures(told: list[tuple[str, Any]]) -> list[str]:
    """Tests that failed, and the one that the process did not survive."""
    failed = [what.removeprefix("tests/") for kind, what in told if kind == "failed"]
    kind, status = told[-1]
    if kind != "end":
        last = [what for kind, what in told if kind == "start"][-1]
        failed.append(f"{last.removeprefix('tests/')} hangs")
    elif status not in (0, 1, 5) and not failed:  # 5: no test was left to run
        failed.append(f"pytest ended with {status}")
    return failed


@contextlib.contextmanager
def broken(file: str, old: str, new: str) -> Iterator[None]:
    """The copy's file changed, and as it was afterwards, to its time."""
    path = place(file, TREE)
    aside = TREE.parent / "unbroken"
    text = path.read_text(encoding="utf-8")
    path.rename(aside)
    path.write_text(text.replace(old, new), encoding="utf-8")
    try:
        yield
    finally:
        aside.replace(path)
        # Else the next mutation within a second, if of equal length, would run this one's bytecode.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


def noticed_by(mutation: tuple[str, str, str, str], runs: list[Run]) -> list[str]:
    """The tests that fail once the core is broken, in the first of these runs in which any does."""
    with broken(*mutation[:3]):
        return next(filter(None, (failures(told_by(run)) for run in runs)), [])


# The whole -----------------------------------------------------------------------------------------------------------


def fingerprints() -> dict[str, str]:
    """Every file of tests, the largest first, with a hash that changes when the file does, or one that others need."""
    names = ("__init__.py", "pyproject.toml", "bench", "linear_core", "nodes", "tests", "web", "workflows")
    paths = [path for name in names for path in (ROOT / name, *(ROOT / name).rglob("*"))]
    kept = [path for path in paths if path.is_file() and path.name not in OWN and path.suffix != ".pyc"]
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(kept)}
    tests = {path: path.read_text(encoding="utf-8") for path in hashes if re.fullmatch(r"test_\w+\.py", path.name)}
    needed = {name for text in tests.values() for name in re.findall(r"^from tests\.(?:\w+\.)*(test_\w+)", text, re.M)}
    common = [sha for path, sha in hashes.items() if path not in tests or path.stem in needed]
    return {
        path.relative_to(ROOT).as_posix(): hashlib.sha256(f"{sys.version} {common} {hashes[path]}".encode()).hexdigest()
        for path in sorted(tests, key=lambda path: -len(tests[path]))
    }


def unbroken(workers: ProcessPoolExecutor) -> tuple[dict[str, Any], list[str]]:
    """Of each test its `seconds`, the quickest first, and the `lines` that it reaches; and the tests that fail."""
    keys = fingerprints()
    kept = json.loads(MAP.read_text(encoding="utf-8")) if MAP.is_file() else {}
    kept = {name: part for name, part in kept.items() if part["key"] == keys.get(name)}
    names, failed = [name for name in keys if name not in kept], []
    runs = [Run([name], [], {}, rest=True, stop=False, trace=True) for name in names]
    for name, told in zip(names, workers.map(told_by, runs), strict=True):
        print(f"unbroken: {name}", flush=True)
        if failures(told):
            failed += failures(told)
            continue
        seconds: Counter[str] = Counter()  # of set-up, test and tear-down together
        for test, took in (what for kind, what in told if kind == "seconds"):
            seconds[test] += took
        (lines,) = (what for kind, what in told if kind == "lines")
        kept[name] = {"key": keys[name], "seconds": seconds, "lines": shared(lines, seconds)}
    MAP.write_text(json.dumps(kept), encoding="utf-8")
    seconds = {test: took for part in kept.values() for test, took in part["seconds"].items()}
    lines = {test: found for part in kept.values() for test, found in part["lines"].items()}
    return {"seconds": dict(sorted(seconds.items(), key=lambda item: item[1])), "lines": lines}, failed


def shared(lines: dict[str, dict[str, list[int]]], tests: Iterable[str]) -> dict[str, dict[str, list[int]]]:
    """The lines by test, where what one test reaches counts for all of its file that have the same parameters: a result
    that they share (functools.cache, a fixture) is computed in one of them."""
    groups: dict[str, dict[str, set[int]]] = {}
    group = {test: test.split("::")[0] + test.partition("[")[2] if "[" in test else test for test in tests}
    for test, name in group.items():
        for file, found in lines.get(test, {}).items():
            groups.setdefault(name, {}).setdefault(file, set()).update(found)
    return {test: {f: sorted(s) for f, s in groups.get(name, {}).items()} for test, name in group.items()}


def changed_lines(file: str, old: str) -> set[int]:
    """Lines of the innermost statement that the change lies in; of the whole file where it lies in none."""
    text = place(file, ROOT).read_text(encoding="utf-8")
    first = text[: text.index(old) + len(old) - len(old.lstrip())].count("\n") + 1
    last = first + old.strip().count("\n")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    around = [(n.lineno, n.end_lineno) for n in nodes if n.lineno <= first and last <= n.end_lineno]
    start, end = min(around, key=lambda span: span[1] - span[0], default=(1, text.count("\n") + 1))
    return set(range(start, end + 1))


def plan(mutation: tuple[str, str, str, str], known: dict[str, Any], last: str, count: bool) -> list[Run]:
    """The runs that a mutation meets; to `count` failures, one of all tests that reach its lines, or else its file."""
    file, old, _, _ = mutation
    tests, lines = known["seconds"], changed_lines(file, old)
    again = [test for test in tests if last and test.startswith(f"tests/{last.removesuffix(' hangs')}")]
    same = [test for test in tests if file in known["lines"].get(test, ())]
    near = in_turn((test for test in same if not lines.isdisjoint(known["lines"][test][file])), known)
    if count:
        return [run_of(near or same, tests)._replace(stop=False)]
    tried = set(near)  # not those first that reach the file: what reads its text, or starts a program, reaches nothing
    order = [*(test for test in in_turn(tests, known) if test not in tried), *near]
    return [
        *(run_of(names, tests) for names in (again, near[:FEW], near[FEW:]) if names),
        Run(["tests"], order, tests, rest=True),  # also a test that has another name once the core is broken
    ]


def in_turn(tests: Iterable[str], known: dict[str, Any]) -> list[str]:
    """The quickest first, but cases of a test that reach the same files mostly notice the same: the second counts twice
    its time, the third three times."""
    cases: Counter[tuple[str, ...]] = Counter()
    times = {}
    for test in tests:
        kind = (test.split("[")[0], *sorted(known["lines"].get(test, ())))
        cases[kind] += 1
        times[test] = known["seconds"][test] * cases[kind]
    return sorted(times, key=times.get)


def run_of(names: list[str], seconds: dict[str, float]) -> Run:
    return Run(list(dict.fromkeys(name.split("::")[0] for name in names)), names, seconds)


def recorded() -> dict[tuple[str, str], tuple[str, str]]:
    """Who noticed what breaks, and on which commit, by file and description."""
    text = RECORD.read_text(encoding="utf-8") if RECORD.is_file() else ""
    return {(file, breaks): (who, on) for file, breaks, who, on in ROW.findall(text)}


def verdict(found: list[str], count: bool) -> str:
    names = ", ".join(sorted({name.split("[")[0] for name in found}))
    return (f"{len(found)} tests: " * count + names) if found else "SURVIVED"


def tried_on() -> str:
    """The commit that there is."""
    sys.path.insert(0, str(ROOT))
    from tests.versions import commit

    return commit() or "-"


def record(found: dict[tuple[str, str], tuple[str, str]]) -> None:
    """Put these into the table, beside what it says of others, and into the README how many ways there are."""
    from bench.machine import circumstances

    known = recorded() | found
    rows = {key: known[key] for file, _, _, breaks in MUTATIONS if (key := (file, breaks)) in known}
    noticed = sum(who != "SURVIVED" for who, _ in rows.values())
    c = circumstances("cpu")
    where = f"{c['device']}, {c['cores']} cores, Python {c['python']}, PyTorch {c['torch']}, {c['date'][:10]}"
    lines = "\n".join(f"| `{file}` | {breaks} | `{who}` | {on} |" for (file, breaks), (who, on) in rows.items())
    RECORD.write_text(TABLE.format(noticed=noticed, count=len(MUTATIONS), where=where, rows=lines), encoding="utf-8")
    readme = ROOT / "README.md"
    readme.write_text(WAYS.sub(f"in {noticed} ways", readme.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutations whose description has one of these")
    parser.add_argument("--all", action="store_true", help="run to the end and count")
    parser.add_argument("--missing", action="store_true", help="only what the table does not have")
    parser.add_argument("--record", action="store_true", help="write the table")
    args = parser.parse_args()
    if args.record and args.all:
        parser.error("--record tells of the first test that fails")
    os.environ["OMP_NUM_THREADS"] = "1"  # as many processes as cores
    last = recorded()
    chosen = [m for m in MUTATIONS if not args.words or any(word in m[3] for word in args.words)]
    chosen = [m for m in chosen if not args.missing or (m[0], m[3]) not in last]
    stale = [m for m in chosen if occurrences(m[0], m[1]) != 1]
    for file, old, _, breaks in stale:
        print(f"{file:21} {breaks:52} DOES NOT APPLY: its text occurs {occurrences(file, old)} times")
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        workers = ProcessPoolExecutor(min(os.cpu_count() or 1, 8), PROCESSES, prepare, (folder,))
        try:
            known, failed = unbroken(workers)
            if failed:
                print(f"The tests fail before anything is broken: {', '.join(failed)}")
                return 1
            started, on = time.monotonic(), tried_on() if args.record else ""
            jobs = {}
            for m in chosen:
                if m not in stale:
                    runs = plan(m, known, last.get((m[0], m[3]), ("", ""))[0], args.all)
                    jobs[workers.submit(noticed_by, m, runs)] = m[0], m[3]
            for job in as_completed(jobs):
                key = file, breaks = jobs[job]
                rows[key] = verdict(job.result(), args.all), on
                print(f"{file:21} {breaks:52} {rows[key][0]}", flush=True)
                if args.record:  # at once: a run that is broken off has tried what it has tried
                    record(rows)
        finally:
            workers.shutdown(cancel_futures=True)
    noticed = sum(who != "SURVIVED" for who, _ in rows.values())
    print(f"{noticed} of {len(chosen)} mutations were noticed, in {time.monotonic() - started:.0f} s.")
    return int(noticed < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
