"""The quality lab: how close a few lines come to the full cache, for every policy and budget.

    python bench/quality.py              everything, with the bundled model: takes hours on one core. It can be stopped
                                         at any time: rows in the results are not computed again
    python bench/quality.py --quick      two pictures, three policies, one budget: a smoke run
    python bench/quality.py --write      table, plot and contact sheet from existing results
    python bench/quality.py --policies line fold random --shares 6 12
    python bench/quality.py --weights int8 int4 --images 24
                                         what weights in 8 and 4 bits cost instead (bench/weights.py)
    python bench/quality.py --model models/ar_image/c2i_B_256.pt

1. Teacher-forced: held-out pictures go through each cache a line at a time, and through the full cache. Measured are
   the Kullback-Leibler divergence, the increase of the negative log-likelihood, the attention lost, and the tokens and
   bytes held. The number of recent lines that a policy protects is chosen on one set of pictures (`choose`), and the
   results are reported on another (`report`). The most important ones are repeated on further sets (--seeds).
2. Drawn: the same classes and noise under a few caches. Measured are the agreement of tokens with the full cache, the
   accuracy of the class and the Fréchet distance in the features of a small classifier (bundled classes only).
3. Written to --out: quality-MODEL.json (with the values of each picture, for paired differences), .md, .png,
   -sheet.png.

Models that draw in scales are measured by bench/scales.py, with the same options.

Held-out pictures are scenes that were never trained on; for another model, pictures that it drew with the full cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import machine, scales, weights
from bench.forced import Reference, drift, reference
from bench.merging import CONTROLS, METHODS, MergePlan, merging
from bench.report import write_report
from bench.rows import Results, Row
from bench.uncertainty import frechet, frechet_excess, half_width, share_interval
from linear_core.checkpoints.library import ModelFiles, bundled_files, find_tokenizer, load_model, read_info
from linear_core.errors import UserError
from linear_core.loop.generate import Run, generate
from linear_core.loop.threads import limit_threads
from linear_core.models.quantised import QUANTISATIONS
from linear_core.pictures.preview import decode
from linear_core.plan import CachePlan
from linear_core.policies import POLICIES, SCALE_POLICIES
from linear_core.prompts import Prompt, class_prompt

ROOT = Path(__file__).parents[1]
SCRATCH = ROOT / "out" / "quality"  # cached codes
SHARES = (6, 12, 2, 4, 24, 8)  # N keeps 1/N of the lines; in this order
FIRST = ("line", "fold", "random")
ANCHORS, RECENT = 4, (0, 1, 2)
BATCH = 8  # pictures at a time, so that they fit into a CPU's cache
KEEP_BYTES = 2 * 2**30  # for results of the full cache; the others are computed again for each row
# Files of linear_core that do not affect rows.
UNRELATED = {"__main__", "convert", "download", "errors", "events", "heatmap", "library", "preview", "published",
             "quantised", "quantised_kernel", "sheet", "text", "weights"}  # fmt: skip
DRAWN = ("line", "random", "fold")  # at SHARES[:2], with the two best others; also measured on further pictures
DRAWN_BATCH, DRAWN_SEED, OTHER_SEED = 24, 5000, 905_000

TEXTS = ("a red fox in the snow", "a lighthouse at dusk", "a bowl of oranges", "a steam train in the mountains",
         "an old sailor", "a city street in the rain", "a field of sunflowers", "a glass chess set")  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Held-out pictures. Training used the seeds 1, 999983 and 1000 to 1011, the classifier 70001 and 70002."""

    name: str
    seed: int
    images: int


CHOOSE, REPORT = Split("choose", 9001, 24), Split("report", 20_011, 256)
SEEDS = (REPORT.seed, 40_011, 60_011)


@dataclass(frozen=True)
class Contender:
    """A policy with a release and a storage.

    published  with the recent lines that it was published with
    merge      one of CONTROLS, a way in which others merge victims; "": as the release says
    """

    policy: str
    release: str = "auto"
    storage: str = "full"
    published: bool = False
    merge: str = ""

    @property
    def name(self) -> str:
        if self.merge:
            return self.merge
        own = CachePlan(self.policy)
        parts = [
            self.policy,
            "" if self.release in ("auto", own.release) else self.release,
            "" if self.storage == own.storage else self.storage,
            "(published)" if self.published else "",
        ]
        return " ".join(filter(None, parts))


def contenders(policies: list[str]) -> list[Contender]:
    """Every policy with its usual release, the published rule, and other releases; the most informative first."""
    special = [
        Contender("line", published=True),
        Contender("fold"),
        Contender("random"),
        Contender("line"),
        Contender("line", "fold"),
        Contender("random", "fold"),
        Contender("fold", "strict"),
        Contender("line", "lazy"),
        Contender("fold", storage="int8"),
        Contender("full", storage="int8"),
        Contender("fold", storage="int4"),
        Contender("full", storage="int4"),
    ]
    names = {c.policy for c in special}
    others = [Contender(name) for name in POLICIES if name not in names and name != "full"]
    controls = [Contender(control.policy, "fold", merge=name) for name, control in CONTROLS.items()]
    found = special[:6] + others + special[6:] + controls
    return [c for c in found if (c.merge.split()[-1] if c.merge else c.policy) in policies]


class Lab:
    """A model, its held-out pictures, and the results so far."""

    def __init__(self, files: ModelFiles, out: Path, grid: tuple[int, int] | None = None):
        self.model = load_model(files, grid=grid)
        info = self.model.info
        if info.text and not info.own_tokenizer:
            raise UserError(
                f"{info.name}: needs a text encoder; measure a model with classes or with a tokenizer of its own."
            )
        self.kinds = len(TEXTS) if info.text else info.config.classes
        self.files = files
        self.scratch = SCRATCH
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.grid = self.model.decoder.grid
        self.core, self.weights = hash_of_core(), hash_of_model(files)
        self.results = Results(out / f"quality-{info.name}.json", info.name, self.weights, self.grid.rows)
        self.data = self.results.data
        self.codes: dict[Split, tuple[Prompt, Tensor]] = {}
        self.references: dict[tuple[Split, int], Reference] = {}

    # -- pictures ----------------------------------------------------------------------------------------------------

    @property
    def scenic(self) -> bool:
        """Whether the classes are those of the bundled model, whose scenes can be painted."""
        return self.model.info.classes == read_info(bundled_files().decoder).classes

    def prompt(self, kinds: list[int]) -> Prompt:
        """One picture for each class or text, by number."""
        return self.model.prompt([TEXTS[k] for k in kinds]) if self.model.info.text else class_prompt(kinds)

    def name(self, kind: int) -> str:
        """Name of a class, or a text."""
        info = self.model.info
        return TEXTS[kind] if info.text else info.classes[kind] if info.classes else f"class {kind}"

    def held_out(self, split: Split) -> tuple[Prompt, Tensor]:
        """Prompts and codes B rows cols of a split."""
        if split not in self.codes:
            path = self.scratch / f"codes-{self.weights}-{split.seed}-{split.images}.safetensors"
            if not path.exists():
                labels, codes = self.scenes(split) if self.scenic else self.own(split)
                save_file({"labels": labels, "codes": codes.contiguous()}, path)
            stored = load_file(path)
            self.codes[split] = self.prompt(stored["labels"].tolist()), stored["codes"]
        return self.codes[split]

    def scenes(self, split: Split) -> tuple[Tensor, Tensor]:
        from training.scenes import batch  # paints; needs nothing that the lab does not have
        from training.train_classifier import pictures

        images, labels = batch(split.seed, split.images)
        with torch.inference_mode():
            codes = torch.cat([self.model.tokenizer.encode(x) for x in pictures(images).split(BATCH)])
        return torch.from_numpy(labels), codes

    def own(self, split: Split) -> tuple[Tensor, Tensor]:
        """Pictures that the model draws with the full cache, of random classes or texts."""
        source = np.random.default_rng(split.seed)
        labels = torch.from_numpy(source.integers(0, self.kinds, split.images))
        return labels, self.draw(CachePlan("full"), labels.tolist(), split.seed)

    def reference(self, split: Split, start: int, prompt: Prompt, codes: Tensor) -> Reference:
        if (split, start) in self.references:
            return self.references[split, start]
        found = reference(self.model.decoder, prompt, codes)
        if sum(r.nbytes for r in self.references.values()) + found.nbytes <= KEEP_BYTES:
            self.references[split, start] = found
        return found

    # -- rows --------------------------------------------------------------------------------------------------------

    def measure(self, plan: CachePlan, split: Split, images: int | None = None) -> dict[str, Any]:
        """For each of the first `images` pictures kl, dnll and the share of attention lost, and the tokens held."""
        prompt, codes = self.held_out(split)
        parts = []
        for start in range(0, images or split.images, BATCH):
            batch = range(start, min(start + BATCH, split.images))
            prompts, batch_codes = prompt.select(batch), codes[batch.start : batch.stop]
            full = self.reference(split, start, prompts, batch_codes)
            with merging(plan):
                parts.append(drift(self.model.decoder, prompts, batch_codes, plan, full))
        return {
            "kl": torch.cat([p.kl for p in parts]).numpy(),
            "dnll": torch.cat([p.dnll for p in parts]).numpy(),
            "lost": torch.cat([p.lost for p in parts]).numpy(),
            "tokens": max(p.tokens for p in parts),
        }

    def row(self, name: str, plan: CachePlan, split: Split) -> dict[str, Any]:
        """The row of a plan on a split: from the results if it is still valid, else computed and stored."""
        key = {"split": split.name, "seed": split.seed, "images": split.images, "merge": "", **asdict(plan),
               "model": self.weights}  # fmt: skip
        defaults = asdict(MergePlan())  # for settings that are newer than a row
        for row in self.data["rows"]:
            if all(row.get(k, defaults.get(k)) == v for k, v in key.items()):
                if self.core in (row["core"], row.get("confirmed")) or self.confirm(row, plan, split):
                    if name not in row["names"]:
                        row["names"].append(name)
                        self.save()
                    return row
                self.data["rows"].remove(row)
                break
        started = time.perf_counter()
        found = self.measure(plan, split)
        shape = self.model.decoder.cache_shape(self.held_out(split)[0].length)
        token_bytes = 2 * shape.layers * shape.heads * shape.head_dim * shape.bytes_per_element
        row = {
            "names": [name],
            **key,
            "budget_lines": plan.budget,
            "budget_ratio": plan.ratio(self.grid),
            **{k: float(found[k].mean()) for k in ("kl", "dnll", "lost")},
            **{f"{k}_ci": half_width(found[k]) for k in ("kl", "dnll", "lost")},
            "tokens": found["tokens"],
            "bytes_held": round((shape.prompt + found["tokens"]) * token_bytes),
            "bytes": shape.bytes(self.grid, plan, 1),
            "bytes_full": shape.bytes(self.grid, CachePlan("full"), 1),
            "seconds": round(time.perf_counter() - started, 1),
            "date": date.today().isoformat(),
            "core": self.core,
            "each": {k: [float(f"{v:.4e}") for v in found[k]] for k in ("kl", "dnll")},
        }
        self.data["rows"].append(row)
        self.save()
        print(f"{split.name:7}{name:22} 1/{self.grid.rows / plan.budget:<4.3g} anchors {plan.anchors} recent "
              f"{plan.recent}  KL {row['kl']:.5f} ± {row['kl_ci']:.5f}  dNLL {row['dnll']:+.5f} ± {row['dnll_ci']:.5f}"
              f"  lost {row['lost']:.3f}  {row['seconds']:.0f} s", flush=True)  # fmt: skip
        return row

    def confirm(self, row: dict[str, Any], plan: CachePlan, split: Split) -> bool:
        """Whether a row computed by other code is still valid: its first pictures have to give the same values."""
        before = np.array(row["each"]["kl"][:BATCH])
        after = self.measure(plan, split, len(before))["kl"]
        same = bool(np.allclose(before, after, rtol=2e-3, atol=1e-6))
        print(f"{split.name:7}{row['names'][0]:22} {'still valid' if same else 'changed'}", flush=True)
        if same:
            row["confirmed"] = self.core
            self.save()
        return same

    def fits(self, plan: CachePlan) -> bool:
        """Whether the plan is possible on this grid."""
        try:
            plan.check(self.grid)
        except UserError:
            return False
        return True

    def plans(self, contender: Contender, budget: int) -> list[CachePlan]:
        """The plans to choose from: every number of recent lines that fits; as published, the most up to 2."""
        plain = CachePlan(contender.policy, budget, ANCHORS, 0, contender.release, contender.storage)
        if contender.merge:
            plain = MergePlan(**asdict(plain), merge=contender.merge)
        if contender.policy == "full":
            return [replace(plain, budget=self.grid.rows)]
        fitting = [p for p in (replace(plain, recent=recent) for recent in RECENT) if self.fits(p)]
        if not fitting:  # the anchors exceed the budget
            return [replace(plain, anchors=0)]
        return fitting[-1:] if contender.published else fitting

    def chosen(self, contender: Contender, budget: int, split: Split) -> CachePlan:
        """The plan with the least divergence on `split`, chosen at a sixth or a twelfth of the lines."""
        plans = self.plans(contender, budget)
        if len(plans) == 1:
            return plans[0]
        rows = self.grid.rows
        decided_at = max(1, rows // 12 if budget * 12 <= rows else rows // 6)
        trials = [p for p in self.plans(contender, decided_at) if p.recent in [q.recent for q in plans]]
        best = min(trials, key=lambda p: self.row(contender.name, p, split)["kl"]).recent if trials[1:] else 0
        return next(p for p in plans if p.recent == best)

    # -- pictures drawn ----------------------------------------------------------------------------------------------

    def draw(self, plan: CachePlan, labels: list[int], seed: int) -> Tensor:
        """Codes B rows cols, drawn with the model's own settings; image i with seed + i."""
        drawn = []
        for start in range(0, len(labels), DRAWN_BATCH):
            run, part = Run(), labels[start : start + DRAWN_BATCH]
            sample = replace(self.model.info.defaults, seed=seed + start)
            with merging(plan):
                for line in generate(self.model.decoder, self.prompt(part), plan, sample):
                    run.add(line)
            drawn.append(run.tokens)
        return torch.cat(drawn)

    def sample(self, plan: CachePlan, count: int, seed: int, core: str | None = None) -> Tensor:
        """Codes of `count` pictures, classes in turn. Cached in the scratch folder, by code and weights."""
        labels = [i % self.kinds for i in range(count)]
        what = json.dumps([asdict(plan), count, seed, core or self.core, self.weights])
        path = self.scratch / f"drawn-{hashlib.sha256(what.encode()).hexdigest()[:16]}.safetensors"
        if not path.exists():
            started = time.perf_counter()
            save_file({"codes": self.draw(plan, labels, seed).contiguous()}, path)
            print(f"drew {count} pictures, {plan}: {time.perf_counter() - started:.0f} s", flush=True)
        return load_file(path)["codes"]

    def drawn(self, row: dict[str, Any]) -> Tensor:
        """The codes of a row of `samples`."""
        kind = MergePlan if row.get("merge") else CachePlan
        plan = kind(**{f.name: row[f.name] for f in fields(kind) if f.name in row})
        return self.sample(plan, row["images"], row["seed"], row["core"])

    def pictures(self, row: Row, kinds: list[int]) -> Tensor:
        """Pictures of a row of `samples`, those of these classes or texts: B H W 3 in 0..1."""
        return decode(self.model.tokenizer, self.drawn(row)[kinds])

    def save(self) -> None:
        """Save the results with the current circumstances."""
        self.data["circumstances"] = circumstances(self)
        self.results.save()

    def report(self) -> None:
        """Write table, plot and contact sheet, and print their paths."""
        self.data["circumstances"] = circumstances(self)
        for path in write_report(self.results, [self.name(k) for k in range(self.kinds)], self.pictures):
            print(f"wrote {path}", flush=True)


def contents(path: Path) -> list[Path]:
    return sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]


def hash_of_core() -> str:
    """Of the files that rows depend on."""
    files = [f for f in sorted((ROOT / "linear_core").rglob("*.py")) if f.stem not in UNRELATED]
    return hash_of([*files, ROOT / "bench" / "merging.py"])


def hash_of_model(files: ModelFiles) -> str:
    return hash_of([f for top in dict.fromkeys([files.decoder, files.tokenizer]) for f in contents(top)])


def hash_of(files: list[Path]) -> str:
    """Hash of names and contents, the first 12 digits."""
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:12]


def circumstances(lab: Lab) -> dict[str, Any]:
    """What the results depend on, and the machine."""
    return {
        "model": lab.files.decoder.name,
        "weights_sha256": lab.weights,
        "core_sha256": lab.core,
        "grid": [lab.grid.rows, lab.grid.cols],
        "dtype": str(lab.model.decoder.dtype).removeprefix("torch."),
        "guidance": "none when teacher-forced; the model's own when drawn",
        "pictures": "scenes" if lab.scenic else "drawn by the model with the full cache",
        **machine.circumstances(str(lab.model.decoder.device)),
    }


def best_others(rows: list[dict[str, Any]], budget: int, count: int, seed: int = REPORT.seed) -> list[str]:
    """The policies other than line, fold and random that came closest to the full cache at `budget`."""
    own = [
        r for r in rows if (r["split"], r["seed"], r["budget"]) == ("report", seed, budget) and r["policy"] not in FIRST
    ]
    names = dict.fromkeys(r["names"][0] for r in sorted(own, key=lambda r: r["kl"]))
    return list(names)[:count]


def key_contenders(lab: Lab, budget: int, policies: list[str], seed: int) -> list[Contender]:
    """Ours, the published rule, the control and the two best others at `budget`."""
    names = [*(n for n in DRAWN if n in policies), *best_others(lab.data["rows"], budget, 2, seed)]
    known = {c.name: c for c in contenders([*POLICIES, *METHODS])}
    return [Contender("line", published=True) if name == "line" else known[name] for name in names]


def draw_all(lab: Lab, budgets: list[int], choose: Split, report: Split, policies: list[str], count: int) -> None:
    """Draw pictures under a few caches with the same noise, and classify them."""
    full = CachePlan("full")
    rows = {sample_key(s): s for s in lab.data["samples"] if (s["images"], s["core"]) == (count, lab.core)}
    wanted = [("full", full, DRAWN_SEED), ("full, other noise", full, OTHER_SEED)]
    for budget in budgets:
        for contender in key_contenders(lab, budget, policies, report.seed):
            wanted.append((contender.name, lab.chosen(contender, budget, choose), DRAWN_SEED))
    first = lab.sample(full, count, DRAWN_SEED)
    judge = Judge(lab, report, first) if lab.scenic else None
    for name, plan, seed in wanted:
        codes = lab.sample(plan, count, seed)
        same = (codes == first).flatten(1).double().mean(1).numpy()
        row = {
            "name": name,
            **asdict(plan),
            "budget_ratio": plan.ratio(lab.grid),
            "images": count,
            "seed": seed,
            "core": lab.core,
            "agreement": float(same.mean()),
            "agreement_ci": half_width(same),
            **(judge.figures(codes) if judge else {}),
        }
        rows[sample_key(row)] = row
        lab.data["samples"] = list(rows.values())
        lab.save()
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def sample_key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["name"], row["budget"], row["seed"]


class Judge:
    """The small classifier, with the features of real scenes after the tokenizer and of the full cache's pictures."""

    def __init__(self, lab: Lab, split: Split, full: Tensor):
        from training.train_classifier import load_classifier

        self.lab, self.classifier = lab, load_classifier()
        self.real, _ = self.classify(lab.held_out(split)[1])
        self.full, _ = self.classify(full)

    @torch.inference_mode()
    def classify(self, codes: Tensor) -> tuple[np.ndarray, Tensor]:
        """Features N F and classes N of pictures."""
        parts = [self.lab.model.tokenizer.decode(c).clamp(-1, 1) for c in codes.split(BATCH)]
        features = torch.cat([self.classifier.features(p) for p in parts])
        return features.double().numpy(), self.classifier.head(features).argmax(1)

    def figures(self, codes: Tensor) -> dict[str, Any]:
        features, classes = self.classify(codes)
        correct = int((classes == torch.arange(len(codes)) % self.lab.kinds).sum())
        return {
            "accuracy": correct / len(codes),
            "accuracy_ci": share_interval(correct, len(codes)),
            "frechet": frechet(features, self.real),
            "frechet_excess": frechet_excess(features, self.full, self.real, self.lab.kinds),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        type=Path,
        help="checkpoint, file or folder, with classes or its own tokenizer (default: the bundled model)",
    )
    parser.add_argument("--grid", type=int, nargs=2, help="rows and columns, if the file does not say")
    every = [*POLICIES, *SCALE_POLICIES, *METHODS]
    parser.add_argument("--policies", nargs="+", default=every, choices=every, metavar="POLICY")
    parser.add_argument("--shares", type=int, nargs="+", help="budgets: N keeps 1/N of the lines, or of a full cache")
    parser.add_argument(
        "--images", type=int, help="number of held-out pictures to report on (default: 256; 24 for models of scales)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=SEEDS, help="of the pictures to report on, then of further sets"
    )
    parser.add_argument(
        "--choose-images", type=int, default=CHOOSE.images, help="number of other pictures, to choose recent lines on"
    )
    parser.add_argument(
        "--samples",
        type=int,
        help="number of pictures to draw for each cache; 0: none (default: 96; 12 for models of scales)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, for models of scales (default: 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--quick", action="store_true", help="smoke run; its numbers mean nothing")
    parser.add_argument("--weights", nargs="+", choices=list(QUANTISATIONS), help="only measure weights stored so")
    parser.add_argument("--write", action="store_true", help="only write table, plot and contact sheet again")
    args = parser.parse_args()
    machine.check_out(args.out, parser, folder=True)
    if args.quick:
        args.policies, args.shares, args.images, args.choose_images, args.samples = list(FIRST), (6,), 2, 2, 2
        args.seeds = SEEDS[:2]
    try:
        files = ModelFiles(args.model, find_tokenizer(args.model)) if args.model else bundled_files()
        if note := limit_threads():
            print(f"note: {note}.", file=sys.stderr)
        if read_info(files.decoder).pyramid is not None:
            args.policies = [name for name in args.policies if name not in METHODS]
            scales.run(files, args, hash_of_model(files), hash_of_core())
            return
        args.shares, args.images = args.shares or SHARES, args.images or REPORT.images
        args.samples = 96 if args.samples is None else args.samples
        args.policies = [name for name in args.policies if name not in SCALE_POLICIES]
        lab = Lab(files, args.out, tuple(args.grid) if args.grid else None)
        run(lab, args)
    except UserError as error:
        sys.exit(str(error))


def run(lab: Lab, args: argparse.Namespace) -> None:
    choose = replace(CHOOSE, images=args.choose_images)
    report, *further = (replace(REPORT, images=args.images, seed=seed) for seed in args.seeds)
    budgets = list(dict.fromkeys(max(1, lab.grid.rows // share) for share in args.shares))
    if args.weights:
        measure_weights(lab, replace(choose, images=args.images), args.weights)
        return
    field = contenders(args.policies)[: len(FIRST) if args.quick else None]
    print(
        f"{lab.model.info.name}: {len(field)} contenders x {len(budgets)} budgets, {report.images} pictures each; "
        f"{len(lab.data['rows'])} rows exist. Stop at any time, and resume with the same command."
    )
    if args.write:
        lab.report()
        return
    for stage in (budgets[:2], budgets[2:]):  # the most common budgets first
        for budget in stage:
            for contender in field:
                if contender.policy != "full" or budget == budgets[0]:  # its budget is always the whole picture
                    lab.row(contender.name, lab.chosen(contender, budget, choose), report)
        if args.samples and stage == budgets[:2]:
            draw_all(lab, stage, choose, report, args.policies, args.samples)
        for split in further if stage == budgets[:2] else []:
            for budget in stage:
                for contender in key_contenders(lab, budget, args.policies, report.seed):
                    lab.row(contender.name, lab.chosen(contender, budget, choose), split)
        lab.report()


def measure_weights(lab: Lab, split: Split, kinds: list[str]) -> None:
    """Rows of quantised weights, for the lab's model and a tiny text model."""
    fold = CachePlan("fold", max(1, lab.grid.rows // SHARES[0]), recent=0)
    found = []
    for name, given in ((lab.model.info.name, (lab.model.decoder, *lab.held_out(split))),
                        (weights.TEXT_MODEL.name, weights.text_model(min(split.images, BATCH)))):  # fmt: skip
        found += [{"model": name, **row} for row in weights.rows(*given, kinds, fold)]
    lab.data["weights"] = found
    lab.save()
    print(weights.table(found))


if __name__ == "__main__":
    main()
