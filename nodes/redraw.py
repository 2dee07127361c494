"""What Generate does with a mask: which codes stay, and which of several fills is kept."""

from __future__ import annotations

import logging
from dataclasses import replace

from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.events import Started, Trace, mark_cells
from ..linear_core.loop.forced import following_likelihood
from ..linear_core.loop.generate import Run
from ..linear_core.loop.redraw import DRAW, best_of, candidates, following, keep_outside, masked_cells
from ..linear_core.pictures.fit import fit, stretch
from ..linear_core.plan import CachePlan, SamplePlan
from ..linear_core.prompts import Prompt
from . import host
from .live import left, sheet
from .sockets import Model, Tokens

log = logging.getLogger(__name__)
SCORED = 8  # pictures whose likelihoods are computed together


def kept_codes(model: Model, tokens: Tokens, mask: Tensor, images: int, node_id: str) -> Tensor:
    """Codes of `tokens` outside a MASK, B rows cols, and DRAW inside, for one picture or for all `images`.

    The mask belongs to the image that the tokens are of, and is cropped as that was.
    """
    if model.image.info.pyramid is not None:
        raise UserError(f"mask: {model.image.info.name} draws in scales and takes no mask; disconnect it.")
    grid, factor = model.image.info.grid, model.image.tokenizer.config.factor
    if tokens.codes.shape[1:] != (grid.rows, grid.cols):
        found = " x ".join(map(str, tokens.codes.shape[1:]))
        raise UserError(
            f"tokens: they are {found}, but {grid.rows} x {grid.cols} are drawn; encode an image of that size to draw "
            "a region of it anew."
        )
    size = tokens.pixels or (grid.rows * factor, grid.cols * factor)
    if tuple(mask.shape[1:]) != size:
        height, width = mask.shape[1:]
        note = f"the mask of {width} x {height} pixels is stretched to the image's {size[1]} x {size[0]}"
        log.warning("LineAR: %s", note)
        host.tell(node_id, note)
        mask = stretch(mask, size)
    fitted = fit(mask[..., None], grid.rows * factor, grid.cols * factor)[:, 0]
    kept = keep_outside(tokens.codes, masked_cells(fitted, grid.rows, grid.cols))
    if len(kept) not in (1, images):
        raise UserError(
            f"mask: images and masks make {len(kept)} pictures, but {images} are drawn; give one, or one for each (see "
            "batch_size)."
        )
    return kept


def check_fills(kept: Tensor | None, count: int) -> None:
    """Raise UserError if `count` fills of a region cannot be told apart."""
    if count > 1 and kept is None:
        raise UserError("candidates: they are fills of a masked region; connect a mask and tokens, or set it to 1.")
    if kept is not None and count > 1 and not following(kept).flatten(1).any(1).all():
        raise UserError(
            "candidates: nothing is kept behind the masked region, so there is nothing to judge fills by; set it to 1."
        )


def copies(
    kept: Tensor, above: Tensor | None, sample: SamplePlan, images: int, count: int
) -> tuple[Tensor, Tensor | None, SamplePlan]:
    """What is kept, the rows above and the seeds for `count` fills of each image, copies next to each other.

    The page hands back the fills themselves where a run was stopped, with their seeds.
    """
    kept = kept.expand(images, -1, -1).repeat_interleave(count, 0)
    if above is not None and len(above) == images:
        above = above.repeat_interleave(count, 0)
    own = len(sample.seeds) == images * count
    return kept, above, sample if own else candidates(sample, images, count)


def best_fills(
    model: Model,
    plan: CachePlan,
    sample: SamplePlan,
    prompt: Prompt,
    run: Run,
    begun: Started,
    kept: Tensor,
    count: int,
) -> tuple[Run, Prompt, dict[str, object]]:
    """Of `count` fills of each picture, copies next to each other in `run`, the one under which the kept codes behind
    the region are the most likely; the first if the run was stopped before them. With the prompt and the page's events
    for what is left.
    """
    images = prompt.rows // count
    chosen = [image * count for image in range(images)]
    if len(run.lines) == model.image.info.grid.rows:
        host.load(model.decoder, memory=begun.cache_bytes)
        scores = following_likelihood(model.image.decoder, prompt, run.tokens, kept, plan, sample, SCORED)
        chosen = best_of(scores, count)
        told = ", ".join(f"{n % count + 1} of {count} ({scores[n]:.1f})" for n in chosen)
        log.info("LineAR: fills kept, by ln likelihood of what follows: %s", told)
    best = Run()
    for line in run.lines:
        stands = None if line.stands is None else line.stands[chosen]
        best.lines.append(replace(line, tokens=line.tokens[chosen], share=line.share[chosen], stands=stands))
    own, prompt = sample.select(chosen), prompt.select(chosen)
    shown = min(begun.shown, images)
    seeds = ",".join(map(str, own.image_seeds(images))) if own.seeds else ""
    event = replace(
        begun, images=images, shown=shown, columns=min(begun.columns, images), detail="", seed=own.seed, seeds=seeds,
        run=f"{begun.run}-best", kept=mark_cells(kept[chosen][:shown] != DRAW),
    )  # fmt: skip
    trace = Trace(event)
    for line in best.lines:
        trace.add(line)
    trace.finish()
    whole = len(best.lines) == model.image.info.grid.rows
    picture = sheet(model.pictures(best.tokens[:shown]).cpu()) if whole else None
    return best, prompt, left(trace, picture)
