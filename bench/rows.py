"""The data of a quality report: one row for each cache that was measured, kept as JSON and paired over pictures."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from bench.uncertainty import half_width, ratio_interval

Row = dict[str, Any]
OURS = ("line", "fold", "random", "full")  # every other policy is a rival
PUBLISHED = "line (published)"


class Results:
    """What was measured of one model, in a JSON file.

    model    its name
    weights  hash of its files; rows of other weights are kept, but not reported
    lines    of its grid
    data     circumstances, bars, rows, samples, pairs, and weights if they were measured
    """

    def __init__(self, file: Path, model: str, weights: str, lines: int):
        self.file, self.model, self.weights, self.lines = file, model, weights, lines
        self.data: dict[str, Any] = {"circumstances": {}, "bars": [], "rows": [], "samples": [], "pairs": []}
        if file.exists():
            self.data |= json.loads(file.read_text(encoding="utf-8"))

    def save(self) -> None:
        """Write the file with one row per line, so that changes can be read as a diff."""
        parts = [f'"{key}": {json.dumps(self.data[key], indent=1)}' for key in ("circumstances", "bars")]
        if "speed" in self.data:
            parts.append(f'"speed": {json.dumps(self.data["speed"], indent=1)}')
        for key in ("rows", "samples", "pairs", *(["weights"] if "weights" in self.data else [])):
            parts.append(f'"{key}": [\n' + ",\n".join(json.dumps(row) for row in self.data[key]) + "\n]")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
        part.replace(self.file)


class Field:
    """The reported rows of one model, by name and budget in lines: those of the set of pictures with the most rows.

    further  rows of the other sets of pictures
    """

    def __init__(self, rows: list[Row], weights: str, lines: int):
        found = [r for r in rows if r["split"] == "report" and r["model"] == weights]
        seed = mode(r["seed"] for r in found) if found else 0
        self.further = [r for r in found if r["seed"] != seed]
        found = [r for r in found if r["seed"] == seed]
        most = max((r["images"] for r in found), default=0)
        self.lines = lines
        self.rows = {(name, r["budget"]): r for r in found if r["images"] == most for name in r["names"]}
        self.budgets = sorted({budget for _, budget in self.rows}, reverse=True)
        sixth = max(1, lines // 6)
        self.names = sorted(
            {name for name, _ in self.rows}, key=lambda n: self.rows.get((n, sixth), {"kl": np.inf})["kl"]
        )

    def share(self, budget: int) -> str:
        """A budget as a share of the lines: 1/6."""
        return f"1/{self.lines / budget:.3g}"

    def rivals(self, budget: int) -> list[str]:
        """Policies at `budget` that are neither ours nor the published rule nor the control, best first."""
        names = [n for n, b in self.rows if b == budget and n.split()[0] not in OURS]
        return sorted(names, key=lambda n: self.rows[n, budget]["kl"])

    def pair(self, a: tuple[str, int], b: tuple[str, int]) -> Row | None:
        """Paired over the pictures: mean difference a - b and ratio a / b of KL, with 95 % intervals."""
        if a not in self.rows or b not in self.rows:
            return None
        one, other = (np.array(self.rows[key]["each"]["kl"]) for key in (a, b))
        return {
            "a": a[0], "a_budget": a[1], "b": b[0], "b_budget": b[1], "images": len(one),
            "kl_difference": float((one - other).mean()), "kl_difference_ci": half_width(one - other),
            "kl_ratio": float(one.mean() / other.mean()), "kl_ratio_interval": ratio_interval(one, other),
        }  # fmt: skip
