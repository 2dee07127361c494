"""Uncertainty of measurements. The unit is the image, because tokens of one picture are not independent."""

from __future__ import annotations

import math

import numpy as np

RESAMPLES = 2000
# Student's t, 97.5 %, by degrees of freedom; in between, the next smaller entry is used, which is conservative.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 7: 2.36, 10: 2.23, 15: 2.13, 23: 2.07, 31: 2.04, 63: 2.0,
           95: 1.985, 127: 1.979, 255: 1.969}  # fmt: skip


def half_width(values: np.ndarray) -> float:
    """Half of the 95 % interval of the mean of `values`; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    factor = next((t for n, t in reversed(STUDENT.items()) if n <= len(values) - 1))
    return factor * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def ratio_interval(above: np.ndarray, below: np.ndarray) -> tuple[float, float]:
    """95 % interval of mean(above) / mean(below), paired by image: percentile bootstrap."""
    pick = np.random.default_rng(0).integers(0, len(above), (RESAMPLES, len(above)))
    ratios = above[pick].mean(1) / below[pick].mean(1)
    return float(np.quantile(ratios, 0.025)), float(np.quantile(ratios, 0.975))


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    z, p = 1.96, hits / count
    middle, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (middle - spread) / (1 + z * z / count), (middle + spread) / (1 + z * z / count)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features N F, each fitted by a Gaussian (Heusel et al., arXiv 1706.08500)."""
    values, vectors = np.linalg.eigh(np.cov(a, rowvar=False))
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ np.cov(b, rowvar=False) @ root).clip(min=0)
    spread = values.sum() + np.trace(np.cov(b, rowvar=False)) - 2 * np.sqrt(cross).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + spread)


def frechet_excess(a: np.ndarray, b: np.ndarray, real: np.ndarray, groups: int) -> tuple[float, float]:
    """95 % interval of how much farther features `a` are from `real` than `b`, for the same prompts and noise.

    Bootstrap over pairs within each group (pictures i, i + groups, … are of one class), because classes are given, not
    sampled.
    """
    source, count = np.random.default_rng(0), len(a)
    of_group = [np.arange(group, count, groups) for group in range(min(groups, count))]
    found = []
    for _ in range(400):
        pick = np.concatenate([source.choice(members, len(members)) for members in of_group])
        found.append(frechet(a[pick], real) - frechet(b[pick], real))
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))
