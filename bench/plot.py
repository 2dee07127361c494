"""Plot of quality against memory, one line per policy. The only file that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from statistics import mode

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator

from bench.rows import Field

# Okabe and Ito's colours (except one), which everybody can tell apart, and a marker each, so that colour is optional.
STYLE = {
    "fold": ("#0072B2", "o"),
    "line (published)": ("#D55E00", "s"),
    "random": ("#000000", "X"),
    "line fold": ("#56B4E9", "v"),
    "random fold": ("#882255", "<"),
    "fold int8": ("#332288", "P"),
    "fold int4": ("#117733", "h"),
}
RIVALS = (("#009E73", "D"), ("#CC79A7", "^"))
GREY, INK = "#b4b8bd", "#202226"


def plot(field: Field, model: str, path: Path, of: str = "the lines") -> None:
    """Write a PNG that is readable at the width of a README. Budgets are shares `of` something."""
    style = dict(STYLE)
    for name, look in zip(field.rivals(max(1, field.lines // 6))[:2], RIVALS, strict=False):
        style[name] = look
    figure, axes = plt.subplots(figsize=(10, 7.2), dpi=120)
    ends = []
    # `line` coincides with the published rule, a full cache in 8 bits is a single point far below, and other ways to
    # merge what `fold` evicts have a table of their own.
    shown = [n for n in field.names if n != "line" and n.split()[0] != "full" and " merged as " not in n]
    budgets = sorted({b for n, b in field.rows if n in shown}, reverse=True)
    for name in sorted(shown, key=lambda n: n in style):  # highlighted lines on top
        rows = [field.rows[name, b] for b in budgets if (name, b) in field.rows]
        x = np.array([memory_percent(r) for r in rows])
        y, ci = (np.array([r[k] for r in rows]) for k in ("kl", "kl_ci"))
        keep = y > 1e-6  # zero loss cannot be shown on a logarithmic axis
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
    usual = [mode(memory_percent(r) for (_, b), r in field.rows.items() if b == budget) for budget in budgets]
    names = [f"{percent:.0f} %\n{field.share(b)}" for percent, b in zip(usual, budgets, strict=True)]
    axes.set_xticks(usual, names, fontsize=9)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel(f"memory of the cache relative to the full cache; below, share of {of} that are kept", color=INK)
    axes.set_ylabel("KL divergence from the full cache, nats per token", color=INK)
    images = next(iter(field.rows.values()))["images"]
    title = f"{model}: {images} held-out pictures, teacher-forced, 95 % intervals; lower is better"
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.grid(True, which="major", color="#e6e8ea", lw=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    _label(axes, ends)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


def memory_percent(row: dict) -> float:
    """Memory of a row's cache, per cent of the full cache."""
    return 100 * row["bytes"] / row["bytes_full"]


def _label(axes, ends: list[tuple[str, float, float, str, bool]]) -> None:
    """Write the names in a column at the left, each joined to the left end of its line."""
    if not ends:
        return
    left, right = min(x for _, x, *_ in ends), axes.get_xlim()[1]
    room = (right / left) ** 0.22  # on a logarithmic axis, so much of the width for the names
    axes.set_xlim(left / room, right)
    low, high = np.log(axes.get_ylim())
    ends = sorted(ends, key=lambda end: end[2])
    positions = _spread_apart(np.log([y for _, _, y, *_ in ends]), low, high, (high - low) / max(38, len(ends)))
    for (name, x, y, colour, strong), at in zip(ends, np.exp(positions), strict=True):
        axes.annotate(
            name, (x, y), (left / room**0.12, at), color=colour, ha="right", va="center", zorder=4,
            fontsize=10 if strong else 8.5, fontweight="bold" if strong else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1 if strong else 0.5, "relpos": (1, 0.5)},
        )  # fmt: skip


def _spread_apart(want: np.ndarray, low: float, high: float, step: float) -> np.ndarray:
    """Ascending positions at least `step` apart and within the bounds, as close to `want` as possible."""
    blocks: list[list[float]] = []  # positions that move together: isotonic regression after the steps are subtracted
    for i, position in enumerate(want):
        blocks.append([position - i * step])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = np.concatenate([np.full(len(block), np.mean(block)) for block in blocks])
    most = high - (len(want) - 0.5) * step
    return level.clip(low + step / 2, most) + step * np.arange(len(want))
