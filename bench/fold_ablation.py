"""Ablation of folding: its constants and choices are patched one at a time, on the pictures for choosing.

    python bench/fold_ablation.py [--images 24] [--shares 6 12] [--recent 1]

Teacher-forced on the split `choose` of bench/quality.py, never on the reported one. Each variant is paired with the
default, picture by picture. Writes fold-ablation-MODEL.json and .md to --out; takes minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import check_out, in_any_case
from bench.quality import CHOOSE, ROOT, Lab, circumstances
from bench.report import figure, header, table_row
from bench.uncertainty import half_width
from linear_core.cache import fold as folding
from linear_core.cache import line_cache, view
from linear_core.cache.look_ahead import HORIZONS, upcast
from linear_core.cache.view import View
from linear_core.checkpoints.library import bundled_files
from linear_core.plan import CachePlan


class FinishedLineClosed(View):
    """A view in which no token of the finished line can receive a victim; otherwise unchanged."""

    def candidates(self) -> Tensor:
        newest = self.grid.prompt + self.row * self.grid.stride
        return super().candidates() & (self.index < newest)

    def importance(self) -> Tensor:
        return View(**init_fields(self)).importance()


def init_fields(view_: View) -> dict[str, Any]:
    return {f.name: getattr(view_, f.name) for f in fields(view_) if f.init}


def fold_outside_finished_line(view_: View, victims: Tensor, count: Tensor) -> folding.Folded:
    return folding.fold(FinishedLineClosed(**init_fields(view_)), victims, count)


def equal_importance(view_: View) -> Tensor:
    """Importance of every token is the same, whatever attention it will receive."""
    return upcast(view_.bias).exp()


def fold_with_plain_means(view_: View, victims: Tensor, count: Tensor) -> folding.Folded:
    """Victims are chosen as usual, but keys and values are folded with plain means."""
    with patch.object(View, "importance", equal_importance):
        return folding.fold(view_, victims, count)


# What is varied -> the default, and the variants: a name and what to patch.
VARIANTS: dict[str, tuple[str, dict[str, list[tuple[Any, str, Any]]]]] = {
    "lines looked ahead": (
        ", ".join(map(str, HORIZONS)),
        {", ".join(map(str, n)): [(View.look_ahead, "__defaults__", (n,))] for n in ((1,), (1, 2), (1, 2, 4))},
    ),
    "FLOOR, the least importance of a token, of the mean": (
        str(view.FLOOR),
        {str(x): [(view, "FLOOR", x)] for x in (0.0, 0.03, 0.3, 1.0)},
    ),
    "SLACK, ln of how far a weight may be from the number of tokens": (
        str(folding.SLACK),
        {str(x): [(folding, "SLACK", x)] for x in (0.0, 2.0, 3.0)},
    ),
    "what counts in means of keys and values": (
        "attention foreseen",
        {"tokens": [(line_cache, "fold", fold_with_plain_means)]},
    ),
    "what counts in victims and means": ("attention foreseen", {"tokens": [(View, "importance", equal_importance)]}),
    "the finished line absorbs": ("yes", {"no": [(line_cache, "fold", fold_outside_finished_line)]}),
}


@contextmanager
def patched(patches: list[tuple[Any, str, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(patch.object(owner, name, value))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=CHOOSE.images)
    parser.add_argument("--shares", type=int, nargs="+", default=(6, 12), help="budgets: N keeps 1/N of the lines")
    parser.add_argument("--recent", type=int, default=1, help="number of protected recent lines")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    args = parser.parse_args()
    check_out(args.out, parser, folder=True)
    lab, split = Lab(bundled_files(), args.out), replace(CHOOSE, images=args.images)
    budgets = [max(1, lab.grid.rows // share) for share in args.shares]
    rows: list[dict[str, Any]] = []

    def measure(what: str, value: str, patches: list, default: dict[int, Any]) -> dict[int, Any]:
        found = {}
        for budget in budgets:
            started = time.perf_counter()
            with patched(patches):
                plan = CachePlan("fold", budget, 4, args.recent)
                kl = found[budget] = lab.measure(plan, split)["kl"]
            row = {"varied": what, "value": value, "budget_lines": budget, "kl": kl.mean(), "kl_ci": half_width(kl)}
            if default:
                difference = kl - default[budget]
                row |= {"difference": difference.mean(), "difference_ci": half_width(difference)}
            rows.append(row)
            print(json.dumps(row), f"{time.perf_counter() - started:.0f} s", flush=True)
        return found

    path = args.out / f"fold-ablation-{lab.model.info.name}.json"

    def write(stopped: dict[str, str]) -> None:
        about = {**circumstances(lab), "images": split.images, "seed": split.seed, "recent": args.recent, **stopped}
        header, lines = json.dumps(about, indent=1), ",\n".join(json.dumps(row) for row in rows)
        if rows:
            path.write_text(f'{{"circumstances": {header},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")

    with in_any_case(write):
        default = measure("nothing", "", [], {})
        for what, (_, others) in VARIANTS.items():
            for value, patches in others.items():
                measure(what, value, patches, default)
    path.with_suffix(".md").write_text(table(rows, budgets, lab.grid.rows, split.images), encoding="utf-8")


def table(rows: list[dict[str, Any]], budgets: list[int], lines: int, images: int) -> str:
    shares = [f"1/{lines / budget:.3g}" for budget in budgets]
    found = {(r["varied"], r["value"], r["budget_lines"]): r for r in rows}
    text = [f"KL from the full cache, nats per token, {images} pictures of the split `choose`; in brackets the paired "
            "difference, with its 95 % interval.", "", *header("varied", "to", *shares)]  # fmt: skip
    cells = (figure(found["nothing", "", b]["kl"], found["nothing", "", b]["kl_ci"]) for b in budgets)
    text.append(table_row("nothing", "", *cells))
    for what, (default, others) in VARIANTS.items():
        for value in others:
            variant = (found[what, value, b] for b in budgets)
            cells = (f"{r['kl']:.4f} ({figure(r['difference'], r['difference_ci'])})" for r in variant)
            text.append(table_row(f"{what}; default: {default}", value, *cells))
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
