"""Reports on the results of the quality lab: a table, targets, a plot, a contact sheet."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bench.rows import PUBLISHED, Field, Results, Row
from linear_core.pictures.sheet import contact_sheet, save

PICTURED = (0, 2, 3, 5, 6, 7, 9, 11)  # classes on the sheet, one per column


def write_report(results: Results, kinds: list[str], pictures: Callable[[Row, list[int]], Tensor]) -> list[Path]:
    """Write all reports that `results` allow, next to their file; returns the files written.

    kinds     names of the classes or texts, in the order in which samples were drawn
    pictures  of a row of samples, B H W 3 in 0..1: those of these kinds
    """
    field = Field(results.data["rows"], results.weights, results.lines)
    if not field.rows:
        return []
    written = [results.file.with_suffix(".md")]
    results.data |= {"bars": bars(field), "pairs": pairs(field)}
    results.save()
    written[0].write_text(table(field, results.data), encoding="utf-8")
    try:
        from bench.plot import plot
    except ImportError:
        print("no plot: it needs matplotlib (pip install matplotlib)")
    else:
        written.append(results.file.with_suffix(".png"))
        plot(field, results.model, written[-1])
    if results.data["samples"]:
        written.append(results.file.with_name(results.file.stem + "-sheet.png"))
        sheet(results, kinds, pictures, written[-1])
    return written


def bars(field: Field) -> list[Row]:
    """The targets that were set, each with the measured values."""
    sixth, twelfth, half = (max(1, field.lines // n) for n in (6, 12, 2))
    targets = [
        ("fold at 1/6 has at most a quarter of line's KL", ("fold", sixth), (PUBLISHED, sixth), 0.25),
        ("fold at 1/12 beats line at 1/6", ("fold", twelfth), (PUBLISHED, sixth), 1.0),
    ]
    for name in field.rivals(sixth)[:1]:
        text = f"fold at 1/6 has at most half of the best rival's KL ({name})"
        targets.insert(1, (text, ("fold", sixth), (name, sixth), 0.5))
    found = []
    for text, ours, theirs, limit in targets:
        if pair := field.pair(ours, theirs):
            found.append({"bar": text, "limit": limit, "met": pair["kl_ratio"] <= limit, **pair})
    if at_half := {n: field.rows[n, half]["kl"] for n in field.names if (n, half) in field.rows}:
        over = {name: round(kl, 5) for name, kl in at_half.items() if kl > 0.002}
        text = f"at 1/2 every policy is within 0.002 nats of full ({len(at_half)} measured)"
        found.append({"bar": text, "limit": 0.002, "met": not over, "over": over})
    return found


def pairs(field: Field) -> list[Row]:
    """Every cache against the control, the published rule and fold, at the same budget and on the same pictures."""
    found = [
        field.pair((name, budget), (other, budget))
        for budget in field.budgets
        for other in ("random", PUBLISHED, "fold")
        for name in field.names
        if name != other
    ]
    return [pair for pair in found if pair]


def figure(value: float, ci: float) -> str:
    """A value and its interval, with two significant digits of the interval."""
    digits = 4 if not ci or np.isnan(ci) else min(5, max(3, 1 - int(np.floor(np.log10(ci)))))
    return f"{value:.{digits}f} ± {ci:.{digits}f}"


def table(field: Field, data: dict[str, Any]) -> str:
    """All results as Markdown."""
    about, images = data["circumstances"], next(iter(field.rows.values()))["images"]
    lines = [
        f"# Quality: {about['model']}",
        "",
        f"KL divergence from the full cache, nats per token, mean and 95 % interval over {images} held-out pictures "
        f"({about['pictures']}).",
        f"{about['device']}, {about['cores']} cores; torch {about['torch']}, {about['threads']} thread(s), "
        f"{about['dtype']}.",
        "",
        *header("policy", *(field.share(b) for b in field.budgets)),
    ]
    for name in field.names:
        cells = [field.rows.get((name, b)) for b in field.budgets]
        lines.append(table_row(name, *(figure(r["kl"], r["kl_ci"]) if r else "" for r in cells)))
    for budget in field.budgets:
        lines += ["", f"## {field.share(budget)}: {budget} lines of {field.lines}", "", *at_budget(field, budget)]
    if field.further:
        lines += ["", "## Other pictures", "", *elsewhere(field)]
    lines += ["", "## Bars", "", *map(verdict, data["bars"])]
    if data["samples"]:
        lines += ["", "## Drawn", "", *drawn(field, data["samples"])]
    return "\n".join(lines) + "\n"


def header(*cells: str) -> list[str]:
    return [table_row(*cells), "|---" * len(cells) + "|"]


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def at_budget(field: Field, budget: int) -> list[str]:
    """All measurements at one budget, the closest to the full cache first."""
    lines = header("policy", "anchors, recent lines", "dNLL", "attention lost", "tokens held", "MiB held", "MiB taken",
                 "KL less random's", "KL / published rule's")  # fmt: skip
    for name in sorted((n for n, b in field.rows if b == budget), key=lambda n: field.rows[n, budget]["kl"]):
        r = field.rows[name, budget]
        random, published = (field.pair((name, budget), (other, budget)) for other in ("random", PUBLISHED))
        beside = figure(random["kl_difference"], random["kl_difference_ci"]) if random and name != "random" else ""
        ratio = (
            with_interval(published["kl_ratio"], published["kl_ratio_interval"])
            if published and name != PUBLISHED
            else ""
        )
        mib = (f"{r[k] / 2**20:.2f}" for k in ("bytes_held", "bytes"))
        lines.append(
            table_row(name, f"{r['anchors']}, {r['recent']}", figure(r["dnll"], r["dnll_ci"]), f"{r['lost']:.3f}",
                 f"{r['tokens']:.1f}", *mib, beside, ratio)
        )  # fmt: skip
    return lines


def elsewhere(field: Field) -> list[str]:
    """Measurements that were repeated on other held-out pictures, next to the first."""
    seeds = list(dict.fromkeys(r["seed"] for r in field.further))
    images = {r["images"] for r in field.further}
    lines = [
        f"KL on other sets of {' or '.join(map(str, sorted(images)))} held-out pictures, each drawn from a seed.",
        "",
        *header("policy", "budget", "seed of the table above", *(f"seed {seed}" for seed in seeds)),
    ]
    rows = {(name, r["budget"], r["seed"]): r for r in field.further for name in r["names"]}
    for name, budget in dict.fromkeys((name, budget) for name, budget, _ in rows):
        first = field.rows.get((name, budget))
        again = [rows.get((name, budget, seed)) for seed in seeds]
        cells = (figure(r["kl"], r["kl_ci"]) if r else "" for r in (first, *again))
        lines.append(table_row(name, field.share(budget), *cells))
    return lines


def with_interval(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


def verdict(bar: Row) -> str:
    """A target and whether it was met, in one line."""
    if "over" in bar:
        values = f"over it: {', '.join(f'{n} {kl}' for n, kl in bar['over'].items()) or 'none'}"
    else:
        difference = figure(bar["kl_difference"], bar["kl_difference_ci"])
        values = f"ratio {with_interval(bar['kl_ratio'], bar['kl_ratio_interval'])}, difference {difference}"
    return f"- {'met' if bar['met'] else '**not met**'}: {bar['bar']}; {values}"


def drawn(field: Field, samples: list[Row]) -> list[str]:
    """Measurements of drawn pictures."""
    lines = [
        f"{samples[0]['images']} pictures for each cache, classes in turn, the same noise. Agreement: share of codes "
        "equal to the full cache's. Fréchet distance: to held-out scenes, in the classifier's features; it falls with "
        "the number of pictures, so only rows of this table can be compared. Intervals are of 95 %.",
        "",
        *header("cache", "budget", "agreement", "class right", "Fréchet distance", "more than the full cache's"),
    ]
    for s in samples:
        budget = "all" if s["policy"] == "full" else field.share(s["budget"])
        right = "{:.1%} ({:.1%} to {:.1%})".format(s["accuracy"], *s["accuracy_ci"]) if "accuracy" in s else ""
        distance = f"{s['frechet']:.3f}" if "frechet" in s else ""
        more = "{:+.3f} to {:+.3f}".format(*s["frechet_excess"]) if "frechet" in s else ""
        lines.append(table_row(s["name"], budget, figure(s["agreement"], s["agreement_ci"]), right, distance, more))
    return lines


def sheet(results: Results, kinds: list[str], pictures: Callable[[Row, list[int]], Tensor], path: Path) -> None:
    """Contact sheet: the same classes and noise under every cache that drew them."""
    samples = results.data["samples"]
    columns = [c for c in PICTURED if c < min(len(kinds), samples[0]["images"])] or [0]
    rows = []
    for s in samples:
        if s["seed"] != samples[0]["seed"]:
            continue
        what = "every line" if s["policy"] == "full" else f"{s['budget']} of {results.lines} lines"
        right = f", class right in {s['accuracy']:.0%} of {s['images']}" if "accuracy" in s else ""
        said = "" if s["policy"] == "full" else f", {s['agreement']:.0%} of codes as with the full cache"
        rows.append((s["name"], what + said + right, pictures(s, columns)))
    notes = {"seed": samples[0]["seed"], "model": results.model}
    save(contact_sheet(rows, [kinds[c] for c in columns], 192), path, notes)
