"""Drawing the rows of a file, a batch at a time: what one machine does, and each worker of many."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import text
from ..checkpoints.families import ModelInfo
from ..checkpoints.library import ModelFiles, class_label, load_model
from ..errors import UserError
from ..loop.drafts import check
from ..loop.generate import Run, evict, generate
from ..loop.graph import Graphs, use_graphs
from ..loop.micro_batches import MicroBatch, MicroBatches
from ..loop.scales import generate_scales
from ..loop.threads import limit_threads
from ..models.packed import pack
from ..pictures.preview import decode
from ..pictures.sheet import to_image, write_png
from ..plan import MAX_SEED, CachePlan, SamplePlan
from ..prompts import Prompt
from .folder import PICTURES, Drawn
from .table import Row, Skipped

ADVICE = "lower --at-once or --budget (`plan` shows what they take)"


@dataclass(frozen=True)
class Job:
    """What to draw with: everything that a worker needs besides the rows. It can be sent to another machine.

    files     the model's
    grid      rows and cols, for files that do not state their own
    pixels    width and height, for models that offer a choice
    device    None: the best there is where it is drawn
    dtype     of decoder and cache; None: the usual one of the device
    sample    how to draw; its seed is of row 1
    step      "auto", "eager" or "graph", see `loop.graph`
    images    pictures a row
    negative  the negative prompt of rows without their own
    encoder   a text encoder, for models that need one
    size      pixels that pictures are enlarged to
    codes     whether a picture's codes go into its metadata
    weight_dtype  how the decoder's large matrices are stored, see `load_model`
    """

    files: ModelFiles
    plan: CachePlan
    sample: SamplePlan
    grid: tuple[int, int] | None = None
    pixels: tuple[int, int] | None = None
    device: str | None = None
    dtype: torch.dtype | None = None
    step: str = "auto"
    images: int = 1
    negative: str = ""
    encoder: str | None = None
    size: int = 0
    codes: bool = False
    weight_dtype: str | None = None


@dataclass(frozen=True)
class Picture:
    """A picture to draw: number `image` of the pictures of a row."""

    row: Row
    image: int
    seed: int
    name: str  # of its file in the folder


def pictures_of(rows: Sequence[Row], job: Job) -> list[Picture]:
    """All pictures of these rows.

    Picture i of row n has the seed of the job, plus the pictures of n - 1 rows, plus i; or the row's own seed plus i.
    So it is the same whatever else is drawn, and where.
    """
    found = []
    for row in rows:
        first = (row.number - 1) * job.images + job.sample.seed if row.seed is None else row.seed
        for image in range(job.images):
            which = f"_{image + 1:02d}" if job.images > 1 else ""
            found.append(
                Picture(row, image, (first + image) % (MAX_SEED + 1), f"{PICTURES}/{row.number:06d}{which}.png")
            )
    return found


def batches_of(pictures: Sequence[Picture], at_once: int, job: Job) -> list[list[Picture]]:
    """The pictures in batches of at most `at_once`, each with one negative prompt.

    Who draws which batch does not matter, and every batch is drawn as a whole: so its arithmetic is the same, too.
    """
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.row.negative or job.negative, []).append(picture)
    return [group[i : i + at_once] for group in groups.values() for i in range(0, len(group), at_once)]


def check_rows(rows: Sequence[Row], info: ModelInfo) -> tuple[list[Row], list[Skipped]]:
    """The rows that this model may draw, and those that name no class of its."""
    kept, skipped = [], []
    for row in rows:
        try:
            if not info.text:
                class_label(info, row.prompt)
                if row.negative:
                    raise UserError(f"negative: {info.name} draws classes, not texts.")
            kept.append(row)
        except UserError as error:
            skipped.append(Skipped(row.number, str(error)))
    return kept, skipped


class Drawer:
    """A model, loaded once, that draws batch after batch."""

    def __init__(self, job: Job, tell: Callable[[str], None] = lambda note: None):
        self.job, self.at_once = job, 0  # pictures that fit at once, if memory has run out; 0: not so far
        device = job.device or best_device()
        if device == "cpu" and (note := limit_threads()):
            tell(f"note: {note}.")
        dtype = job.dtype or usual_dtype(device)
        model = load_model(job.files, grid=job.grid, device=device, dtype=dtype, weight_dtype=job.weight_dtype)
        pack(model.decoder)  # on the CPU only, where it halves the time of a step
        self.model = replace(model, info=model.info.with_size(job.pixels) if job.pixels else model.info)
        self.encoder = text.find_text_encoder(job.encoder) if job.encoder else None
        self._load_encoder = lru_cache(maxsize=1)(text.load_encoder)  # kept, as every batch brings new texts
        if model.info.own_tokenizer:
            model.text_tokenizer  # noqa: B018 - says now if its file is missing

    def draw(self, batch: Sequence[Picture]) -> list[Drawn | Skipped]:
        """Draw these pictures, which have one negative prompt. A row that the model cannot read is skipped.

        Raises UserError for what concerns all of them, such as memory that ran out twice.
        """
        prompt, left, skipped = self._prompt(batch)
        return [*skipped, *(self._draw(prompt, left) if prompt is not None else ())]

    def _draw(self, prompt: Prompt, batch: Sequence[Picture]) -> Iterator[Drawn]:
        sample = replace(self.job.sample, seeds=tuple(picture.seed for picture in batch))
        parts = MicroBatches(prompt, sample, self.at_once or len(batch), advice=ADVICE)
        for part in parts:
            with parts.watch(part):
                for line in self._lines(part):
                    part.runs[0].add(line)
        if parts.halved_from:
            self.at_once = parts.max_images
        run = parts.runs[0]
        for picture, image, codes in zip(batch, self._decode(run), run.tokens, strict=True):
            yield self._finish(picture, image, codes)

    def _lines(self, part: MicroBatch) -> Iterator[Any]:
        model, job, name = self.model, self.job, self.model.info.name
        prompt, sample, above = part.prompt, part.sample, part.above[0]
        if model.info.pyramid is not None:
            quantizer = model.tokenizer.quantize
            return generate_scales(model.decoder, quantizer, prompt, job.plan, sample, given=above, name=name)
        sequences = prompt.rows * (2 if sample.guided else 1)
        graphs = use_graphs(job.step, model.decoder.device, sequences)
        more: dict[str, Any] = Graphs(model.decoder.step, evict, check).kwargs if graphs else {}
        return generate(model.decoder, prompt, job.plan, sample, above=above, name=name, **more)

    def _decode(self, run: Run) -> Tensor:
        return decode(self.model.tokenizer, run.tokens if run.canvas is None else run.canvas)

    def _finish(self, picture: Picture, image: Tensor, codes: Tensor) -> Drawn:
        row, job, info = picture.row, self.job, self.model.info
        said = {"negative": negative} if (negative := row.negative or job.negative) else {}
        known = {"row": row.number, "file_name": picture.name, "prompt": row.prompt, **said, "seed": picture.seed}
        settings = asdict(job.plan) | asdict(replace(job.sample, seed=picture.seed))
        del settings["seeds"]  # `seed` is the picture's own
        notes = {"model": info.name, "text" if info.text else "class": row.prompt, **said, **settings}
        file = io.BytesIO()
        write_png(to_image(image, job.size), file, notes)
        if job.codes:
            known["codes"] = codes.flatten().tolist()
        return Drawn({**row.more, **known}, file.getvalue())

    def _prompt(self, batch: Sequence[Picture]) -> tuple[Prompt | None, Sequence[Picture], list[Drawn | Skipped]]:
        """The prompt of the rows that the model can read, their pictures, and what is wrong with the other rows."""
        try:
            return self._prompt_of(batch), batch, []
        except UserError:
            reasons = {picture.row.number: self._problem(picture) for picture in batch}
        left = [picture for picture in batch if not reasons[picture.row.number]]
        skipped: list[Drawn | Skipped] = [Skipped(number, reason) for number, reason in reasons.items() if reason]
        return self._prompt_of(left) if left else None, left, skipped

    def _problem(self, picture: Picture) -> str:
        try:
            self._prompt_of([picture])
        except UserError as error:
            return str(error)
        return ""

    def _prompt_of(self, batch: Sequence[Picture]) -> Prompt:
        """One row a picture. Raises UserError for a text that the model cannot read, or an unknown class."""
        model, texts = self.model, [picture.row.prompt for picture in batch]
        negative = batch[0].row.negative or self.job.negative
        if model.info.own_tokenizer:
            prompt = model.prompt(texts, negative)
        elif self.encoder is not None:
            load = self._load_encoder
            prompt = text.prompt(texts, self.encoder, negative=negative, model=model.info, load=load)
        else:
            prompt = model.class_prompt(texts)
        model.check(prompt)
        return prompt


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def usual_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def draw_here(
    job: Job, batches: Sequence[list[Picture]], tell: Callable[[str], None]
) -> Iterator[list[Drawn | Skipped]]:
    """Draw all batches in this process, one after the other."""
    drawer = Drawer(job, tell)
    for batch in batches:
        yield drawer.draw(batch)
