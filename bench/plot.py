"""Quality against memory, every policy a line. The one file that takes matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

from linear_core.plan import CachePlan

if TYPE_CHECKING:
    from bench.quality import Lab
    from bench.report import Field

# Okabe and Ito's colours, which differ to everybody, and a mark each, so that colour is not needed.
STYLE = {
    "fold": ("#0072B2", "o"),
    "line (published)": ("#D55E00", "s"),
    "random": ("#000000", "X"),
    "line fold": ("#56B4E9", "v"),
}
RIVALS = (("#009E73", "D"), ("#CC79A7", "^"))
GREY, INK = "#b4b8bd", "#202226"


def plot(field: Field, lab: Lab, path: Path) -> None:
    """One PNG, readable at the width of a README."""
    shape = lab.model.decoder.cache_shape()
    whole = shape.bytes(lab.grid, CachePlan("full"), 1)
    style = dict(STYLE)
    for name, look in zip(field.rivals(max(1, field.lines // 6))[:2], RIVALS, strict=False):
        style[name] = look
    figure, axes = plt.subplots(figsize=(10, 6.6), dpi=130)
    ends = []
    shown = (
        [n for n in field.names if n != "line"] if any(n == "line (published)" for n in field.names) else field.names
    )
    for name in sorted(shown, key=lambda n: n in style):  # what is highlighted lies on top
        rows = [field.rows[name, b] for b in field.budgets if (name, b) in field.rows]
        x = np.array([100 * r["bytes"] / whole for r in rows])
        y, ci = (np.array([r[k] for r in rows]) for k in ("kl", "kl_ci"))
        keep = y > 1e-6  # nothing lost has no place on a logarithmic axis
        x, y, ci = x[keep], y[keep], np.nan_to_num(ci[keep])
        if not len(x):
            continue
        colour, mark = style.get(name, (GREY, "."))
        strong = name in style
        axes.plot(
            x, y, color=colour, marker=mark, lw=2.2 if strong else 1, ms=7 if strong else 4, zorder=3 if strong else 1
        )
        if strong:
            axes.fill_between(x, np.maximum(y - ci, y / 5), y + ci, color=colour, alpha=0.18, lw=0, zorder=2)
        ends.append((name, x[-1], y[-1], colour if strong else "#7a7f86", strong))
    axes.set_xscale("log")
    axes.set_yscale("log")
    marks = [b for b in field.budgets]
    axes.set_xticks([100 * shape.bytes(lab.grid, CachePlan("line", b), 1) / whole for b in marks],
                    [f"{100 * shape.bytes(lab.grid, CachePlan('line', b), 1) / whole:.0f} %\n{field.share(b)}"
                     for b in marks])  # fmt: skip
    axes.minorticks_off()
    axes.set_xlabel(
        "memory taken by the cache, of the full cache's; below it, the lines kept when a line has ended", color=INK
    )
    axes.set_ylabel("KL divergence from the full cache, nats a token", color=INK)
    images = next(iter(field.rows.values()))["images"]
    title = (
        f"{lab.model.info.name}: {images} held-out pictures, teacher-forced; bands are 95 % intervals; lower is better"
    )
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(True, which="major", color="#e6e8ea", lw=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(axes, ends)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def _label(axes, ends: list[tuple[str, float, float, str, bool]]) -> None:
    """A name at the left end of each line, pushed apart where they would lie on each other."""
    if not ends:
        return
    low, high = axes.get_ylim()
    step = np.log(high / low) / 36
    left = min(x for _, x, *_ in ends)
    ends = sorted(ends, key=lambda e: e[2])
    want = np.array([np.log(y) for _, _, y, *_ in ends])
    place = want.copy()
    for _ in range(200):  # neighbours that are too near move apart by halves until none are
        gaps = np.diff(place)
        for i in np.where(gaps < step - 1e-9)[0]:
            push = (step - gaps[i]) / 2
            place[i] -= push
            place[i + 1] += push
    axes.set_xlim(left / 1.75, None)
    for (name, x, y, colour, strong), at in zip(ends, np.exp(place), strict=True):
        axes.annotate(
            name, (x, y), (left / 1.12, at), color=colour, fontsize=10 if strong else 8.5, ha="right", va="center",
            fontweight="bold" if strong else "normal", arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6},
        )  # fmt: skip
