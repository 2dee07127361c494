"""Profile: what a calibration found out about the heads of a next-scale model. Policies read it instead of a survey.

`python -m linear_core calibrate MODEL` writes it as JSON next to the model (`loop/calibrate.py` measures it).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UserError
from .pyramid import Pyramid

FORMAT = 1
SUFFIX = ".profile.json"
MAX_BYTES = 2**27  # of a file that is read


@dataclass(frozen=True)
class Profile:
    """Means over a few pictures. L layers, H heads, S scales.

    model       name of the model
    samples     pictures
    sides       the scales, as `Pyramid.text` says them
    mass        L H S S: attention that the queries of a scale pay to all tokens of another, 0 where it comes later
    variance    L H: how much attention depends on the query: variance over queries, sum over tokens, mean over scales
    similarity  L S: cosine of each place's values and those of the scale before, heads together; 0 for the first scale
    """

    model: str
    samples: int
    sides: str
    mass: Tensor
    variance: Tensor
    similarity: Tensor

    @property
    def stages(self) -> int:
        return self.mass.shape[-1]

    @property
    def earlier(self) -> Tensor:
        """Share of attention that goes to earlier scales, mean over scales: L H."""
        return self.mass.tril(-1).sum(-1)[..., 1:].mean(-1)

    def check(self, layers: int, heads: int, pyramid: Pyramid, name: str) -> None:
        """Raise UserError if it was made for another model, or knows fewer scales than the picture has."""
        if self.mass.shape[:2] != (layers, heads):
            raise UserError(
                f"profile: it describes {self.model} with {self.mass.shape[0]} layers of {self.mass.shape[1]} heads, "
                f"but {name} has {layers} of {heads}; make one with `python -m linear_core calibrate`."
            )
        if self.stages < pyramid.stages:
            raise UserError(
                f"profile: it was made from pictures of {self.stages} scales, but this one has {pyramid.stages}; make "
                "another with `python -m linear_core calibrate` at this size."
            )

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        numbers = {name: getattr(self, name) for name in ("mass", "variance", "similarity")}
        text = {name: _rounded(x.double().tolist()) for name, x in numbers.items()}
        about = {"format": FORMAT, "model": self.model, "samples": self.samples, "sides": self.sides}
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(about | text), encoding="utf-8")
        part.replace(path)


def profile_path(decoder: Path) -> Path:
    """Where the profile of the model at `decoder`, a file or a folder, is looked for."""
    return decoder / SUFFIX.removeprefix(".") if decoder.is_dir() else decoder.with_suffix(SUFFIX)


def read_profile(path: Path) -> Profile:
    """Raises UserError naming the file if it is not a profile."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("it is too large")
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise ValueError(f"its format is {data['format']}")
        mass, variance, similarity = (
            torch.tensor(data[name], dtype=torch.float32) for name in ("mass", "variance", "similarity")
        )
        layers, heads, stages = mass.shape[:3]
        if mass.shape != (layers, heads, stages, stages) or variance.shape != (layers, heads):
            raise ValueError("its numbers do not fit together")
        if similarity.shape != (layers, stages) or not layers * heads * stages:
            raise ValueError("its numbers do not fit together")
        if not all(bool(x.isfinite().all()) for x in (mass, variance, similarity)):
            raise ValueError("not all of its numbers are finite")
        return Profile(str(data["model"]), int(data["samples"]), str(data["sides"]), mass, variance, similarity)
    except (KeyError, ValueError, TypeError, OSError, RecursionError, OverflowError) as error:
        raise UserError(
            f"{path}: is not a profile of a model's heads ({error}); delete it, or make it again with `python -m "
            "linear_core calibrate`."
        ) from error


def _rounded(x: Any) -> Any:
    """Numbers with five digits, in lists of lists."""
    if isinstance(x, list):
        return [_rounded(one) for one in x]
    return round(x, 4 - math.floor(math.log10(abs(x)))) if x else 0
