"""Events: what a run reports while an image is drawn. No torch at run time.

`generate` yields one Line per row, with tensors that are on the host already. A Trace turns lines into JSON: one
Started, then for each line a Row with only what has changed, and one Finished. The widget in web/ gets them live (event
`linear_ar.line`) and afterwards (the node's `ui`). Replayed, they give every line's shares and, for the first image,
what each layer and head held. web/state.js uses these field names, and a test compares the two.

A batch that does not fit is drawn in micro-batches, each reported as a run of its own. What the node keeps afterwards
is one run with all images, as if drawn at once; its `cache_bytes` are those of the largest micro-batch.

Numbers travel as base64 of little-endian uint16 or uint8 (codes above 65,535: uint32 or uint64), arrays in C order.
"""

from __future__ import annotations

import base64
import re
import sys
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

EVENT = "linear_ar.line"
IMAGES = 4  # images of a batch whose shares are sent
CELLS = 1 << 16  # of all these images together, as numbers of cells travel as uint16
HEAD_BYTES = 1 << 19  # evictions are sent per head up to this size for a whole run, else per layer
NONE = 0xFFFF  # pads lists of evictions of unequal length


@dataclass(frozen=True)
class Line:
    """One finished row of every image of the batch.

    row         0-based
    rows        rows of the image
    tokens      codes of this row, int64 B cols
    share       share of layers and heads that see each image token once victims have been chosen, float32 B rows cols;
                0 if it is evicted or not drawn yet. A lazy victim counts until the next line overwrites it.
    held        image tokens held per head after the line, mean over layers, heads and images
    seconds     since the previous line
    cache_bytes keys and values, as allocated
    by_head     which image tokens (end-of-line tokens included) each layer and head of the first image holds: bool
                L H rows*stride
    replayed    the row was given and fed, not drawn
    stands      how many tokens each image token's slot stands for, mean over the layers and heads that hold it, float32
                B rows cols; None unless victims are folded
    passes      forward passes that the line took with drafts, mean over micro-batches; 0 without drafts
    accepted    share of the checked drafts that were right, mean over micro-batches
    """

    row: int
    rows: int
    tokens: Tensor
    share: Tensor
    held: float
    seconds: float
    cache_bytes: int
    by_head: Tensor | None = None
    replayed: bool = False
    stands: Tensor | None = None
    passes: float = 0
    accepted: float = 0.0


@dataclass(frozen=True)
class Stage:
    """One finished scale of every image of the batch: what a Line is to models that draw in scales.

    stage       0-based
    stages      scales of the image
    tokens      numbers of this scale's tokens in raster order, int64 B n: codes, or as many bits as a model draws
    canvas      the running picture, float32 B Z h w: what a tokenizer decodes
    share       share of layers and heads that hold each token of all scales after this one, float32 B N; 0 if it is
                evicted, not drawn yet, or of the last scale, which is never held
    held        tokens held per head after the scale, mean over layers, heads and images
    seconds     since the previous scale
    cache_bytes the most that keys and values have taken so far
    by_head     which tokens each layer and head of the first image holds: bool L H N
    replayed    the scale was given, not drawn
    stands      how many tokens each token's slot stands for, mean over the layers and heads that hold it, float32 B N;
                None unless victims are folded
    """

    stage: int
    stages: int
    tokens: Tensor
    canvas: Tensor
    share: Tensor
    held: float
    seconds: float
    cache_bytes: int
    by_head: Tensor | None = None
    replayed: bool = False
    stands: Tensor | None = None

    @property
    def row(self) -> int:
        """The stage, as a Line calls it: a run can be told of either."""
        return self.stage

    @property
    def rows(self) -> int:
        """The number of stages, as a Line calls it."""
        return self.stages

    @property
    def passes(self) -> float:
        """Passes with drafts, as a Line calls them: there are none."""
        return 0

    @property
    def accepted(self) -> float:
        """Share of drafts that were right, as a Line calls it."""
        return 0.0


@dataclass(frozen=True)
class Step:
    """One finished step of every image of the batch: what a Line is to models that draw masked tokens.

    step        0-based
    steps       of the picture. Those that would draw only what was given do not take place
    latents     what is known so far, float32 B Z h w; NaN where nothing is known
    drawn       which places this step drew: bool B rows cols
    age         steps since the keys and values of each place were computed, int64 B rows cols; 0: in this one
    computed    slots of each image that the decoder computed in this step, of `slots`: int64 B. 0: it drew nothing
    slots       copies of the class, and places
    seconds     since the previous step; of these `transformer` and `head`, which makes numbers of what it says
    cache_bytes keys and values that are kept from step to step, as allocated: memory that is *added*; 0 if none are
    """

    step: int
    steps: int
    latents: Tensor
    drawn: Tensor
    age: Tensor
    computed: Tensor
    slots: int
    seconds: float
    transformer: float
    head: float
    cache_bytes: int

    @property
    def full(self) -> bool:
        """Whether everything was computed, in all images that drew."""
        return bool(((self.computed == self.slots) | (self.computed == 0)).all())

    @property
    def row(self) -> int:
        """The step, as a Line calls it."""
        return self.step

    @property
    def rows(self) -> int:
        """The number of steps, as a Line calls it."""
        return self.steps


@dataclass(frozen=True)
class Started:
    """Description of a run, before its first line.

    run         identifies this run among others of the same node
    stride      tokens per line, end-of-line token included
    images      images of the batch; shares are sent for `shown` of them
    columns     images next to each other in the preview picture
    detail      "heads": evictions are sent for each layer and head of the first image; "layers": a share per layer;
                "": neither, as two models with layers of their own draw one after the other
    lines       lines that are kept when a line has ended (all of them with the full cache)
    cache_bytes keys and values as allocated; `full_bytes`: of a cache for all lines
    codebook    what the codes stand for (ImageModel.codebook); "": not stated
    list_index  which of the node's runs within one prompt: ComfyUI runs a node once for each entry of a list
    sides       rows and columns of each scale, if the picture is drawn in scales: `rows` is then their number, `cols`
                and `stride` are those of the last one, and `lines` is the number of tokens that a head keeps. The cells
                of an image are the tokens of all scales, one scale after the other. Empty: it is drawn in lines
    kept        uint8, a bit for each cell of the images shown, the lowest first: 1 where the code is kept of an image
                that exists already, 0 where it is drawn. Empty: all are drawn, or whole rows kept
    seeds       of each image, between commas, where they are not seed, seed + 1, …; a text, as a page rounds numbers
                beyond 2**53
    state_bytes what a model without a cache carries from scale to scale, in its place; 0: there is a cache
    beside      what the run on the left is, where it is another model's: its name; empty: the same with a full cache
    """

    run: str
    rows: int
    cols: int
    stride: int
    images: int
    shown: int
    columns: int
    layers: int
    heads: int
    detail: str
    seed: int
    policy: str
    release: str
    lines: int
    anchors: int
    recent: int
    cache_bytes: int
    full_bytes: int
    kind: str = "started"
    codebook: str = ""
    list_index: int = 0
    sides: list[list[int]] = field(default_factory=list)
    seeds: str = ""
    state_bytes: int = 0
    beside: str = ""
    kept: str = ""

    @property
    def cells(self) -> int:
        """Cells of an image: tokens, without ends of lines."""
        return sum(rows * cols for rows, cols in self.sides) or self.rows * self.cols


@dataclass(frozen=True)
class Row:
    """What one line, or one scale, changed. Cell c of image i has number i*rows*cols + c; of scales, i*cells + c.

    tokens    uint16 images cols: the codes of this row, or of all tokens of this scale; uint32 or uint64 if one of
              them needs it, as the length tells
    cells     uint16 N: cells whose share has changed
    shares    uint8 N: their new share of layers and heads, 255 for all
    evicted   uint16 layers heads n: image tokens that each head of the first image held after the previous line, or
              that belong to this line, and that it no longer holds. Lists of unequal length are padded with 65535. The
              last scale is held by no head and not listed.
              Empty unless the run's detail is "heads". The picture's last token is never fed, so the last line lists
              it.
    by_layer  uint8 layers N', N' being the number of `cells` of the first image: their share of that layer's heads.
              Empty unless the run's detail is "layers".
    merged    uint16 M: cells whose slots stand for another number of tokens than before; empty unless victims fold
    stands    uint16 M: that number, mean over the layers and heads that hold the cell, in eighths
    seconds   since the previous line
    tokens_per_second  of all images together, for this line
    passes    forward passes of this line with drafts, mean over the parts of a batch; 0 without drafts
    accepted  share of the checked drafts that were right
    side      rows and columns of this scale, for a page that came too late to be told of the run; empty: it is a line
    """

    run: str
    row: int
    rows: int
    cols: int
    seconds: float
    tokens_per_second: float
    held: float
    lines: int
    cache_bytes: int
    full_bytes: int
    replayed: bool
    tokens: str
    cells: str
    shares: str
    evicted: str
    by_layer: str
    merged: str = ""
    stands: str = ""
    passes: float = 0
    accepted: float = 0.0
    kind: str = "row"
    side: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Picture:
    """The next preview picture shows `lines` lines. Sent live only; not part of a trace."""

    run: str
    lines: int
    kind: str = "picture"


@dataclass(frozen=True)
class Finished:
    """Totals of the run. `rows` were drawn or replayed: fewer than the image has if it was stopped early.

    `passes` and `accepted` are those of all rows drawn with drafts; 0 without.
    """

    run: str
    rows: int
    seconds: float
    tokens_per_second: float
    held: float
    passes: float = 0
    accepted: float = 0.0
    kind: str = "finished"


class Trace:
    """Turns lines into events. `events` are all of them so far, as JSON objects."""

    def __init__(self, started: Started):
        self.started = started
        self.events: list[dict[str, Any]] = [asdict(started)]
        self._shares: Tensor | None = None
        self._by_head: Tensor | None = None
        self._layered: Tensor | None = None
        self._stands: Tensor | None = None
        self._rows: list[Row] = []

    @property
    def latest(self) -> dict[str, Any]:
        return self.events[-1]

    def add(self, line: Line | Stage) -> dict[str, Any]:
        """Add a line, or a scale, and return its event."""
        run = self.started
        share = (line.share[: run.shown] * 255).round().byte().flatten()
        layers = self._layers(line)
        changed = share > 0 if self._shares is None else share != self._shares
        if layers is not None:
            by_layer = layers > 0 if self._layered is None else layers != self._layered
            changed[: run.cells] |= by_layer.any(0)
        cells = changed.nonzero()[:, 0]
        merged, stands = self._merged(line)
        seconds = max(line.seconds, 1e-9)
        event = Row(
            run=run.run,
            row=line.row,
            rows=line.rows,
            cols=run.sides[line.row][1] if run.sides else run.cols,
            seconds=round(line.seconds, 6),
            tokens_per_second=round(line.tokens.numel() / seconds, 1),
            held=line.held,
            lines=run.lines,
            cache_bytes=line.cache_bytes,
            full_bytes=run.full_bytes,
            replayed=line.replayed,
            tokens=pack_tokens(line.tokens.flatten().tolist()),
            cells=pack(cells.tolist()),
            shares=pack(share[cells].tolist(), "B"),
            evicted=self._evicted(line),
            by_layer="" if layers is None else pack(layers[:, cells[cells < layers.shape[1]]].flatten().tolist(), "B"),
            merged=merged,
            stands=stands,
            passes=line.passes,
            accepted=round(line.accepted, 3),
            side=run.sides[line.row] if run.sides else [],
        )
        self._shares, self._by_head, self._layered = share, line.by_head, layers
        self._rows.append(event)
        self.events.append(asdict(event))
        return self.latest

    def finish(self) -> dict[str, Any]:
        """Add and return the last event. Its speed is that of the rows drawn, without replayed ones."""
        drawn = [row for row in self._rows if not row.replayed]
        seconds = sum(row.seconds for row in drawn)
        sides, cols = self.started.sides, self.started.cols
        each = (sides[row.row][0] * sides[row.row][1] if sides else cols for row in drawn)
        tokens = sum(each) * self.started.images
        held = max((row.held for row in self._rows if row.row + 1 < row.rows), default=0.0)
        speed = round(tokens / seconds, 1) if seconds else 0.0
        seconds = sum(row.seconds for row in self._rows)
        passes, accepted = totals(self._rows)
        self.events.append(
            asdict(Finished(self.started.run, len(self._rows), round(seconds, 6), speed, held, passes, accepted))
        )
        return self.latest

    def _own(self, row: int) -> slice:
        """The tokens that a line wrote into the cache; of a scale, none if it is the last."""
        run = self.started
        if not run.sides:
            return slice(row * run.stride, (row + 1) * run.stride)
        sizes = [rows * cols for rows, cols in run.sides]
        return slice(sum(sizes[:row]), sum(sizes[: row + 1]) if row + 1 < run.rows else 0)

    def _evicted(self, line: Line | Stage) -> str:
        if self.started.detail != "heads" or line.by_head is None:
            return ""
        before = line.by_head.new_zeros(line.by_head.shape) if self._by_head is None else self._by_head.clone()
        before[..., self._own(line.row)] = True
        evicted = before & ~line.by_head
        counts = evicted.sum(-1)
        longest = int(counts.max())
        numbers = evicted.nonzero()[:, 2].tolist()
        if longest * counts.numel() == len(numbers):
            return pack(numbers)
        lists, start = [], 0
        for count in counts.flatten().tolist():
            lists += numbers[start : start + count] + [NONE] * (longest - count)
            start += count
        return pack(lists)

    def _merged(self, line: Line | Stage) -> tuple[str, str]:
        if line.stands is None:
            return "", ""
        stands = (line.stands[: self.started.shown] * 8).round().clamp(max=NONE).int().flatten()
        # A token stands for itself until something is folded into its slot, and for nothing once it is evicted.
        changed = stands > 8 if self._stands is None else (stands != self._stands) & ((stands > 8) | (self._stands > 8))
        self._stands = stands
        cells = changed.nonzero()[:, 0]
        return pack(cells.tolist()), pack(stands[cells].tolist())

    def _layers(self, line: Line | Stage) -> Tensor | None:
        """Share of each layer's heads that hold each cell of the first image: uint8 L cells."""
        if self.started.detail != "layers" or line.by_head is None:
            return None
        run = self.started
        held = line.by_head
        if not run.sides:
            held = held.unflatten(-1, (run.rows, run.stride))[..., : run.cols].flatten(2)
        return (held.float().mean(1) * 255).round().byte()


def totals(lines: Iterable[Line] | Iterable[Row]) -> tuple[float, float]:
    """Forward passes of all lines drawn with drafts, and the share of drafts that were right."""
    drafted = [line for line in lines if line.passes]
    passes = sum(line.passes for line in drafted)
    accepted = sum(line.passes * line.accepted for line in drafted) / passes if passes else 0.0
    return round(passes, 3), round(accepted, 3)


def images_shown(images: int, rows: int, cols: int) -> int:
    """How many images of a batch are shown while they are drawn, of so many lines and columns."""
    return max(1, min(images, IMAGES, CELLS // (rows * cols)))


def detail(layers: int, heads: int, tokens: int) -> str:
    """'heads' if the evictions of a whole run fit into HEAD_BYTES (every token leaves every head at most once)."""
    return "heads" if 2 * layers * heads * tokens <= HEAD_BYTES else "layers"


def pack(numbers: Iterable[int], kind: str = "H") -> str:
    """Base64 of little-endian uint8 ("B"), uint16 ("H"), uint32 ("I") or uint64 ("Q") numbers."""
    packed = array(kind, numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")


def unpack(text: str, kind: str = "H") -> list[int]:
    """The numbers that `pack` encoded."""
    packed = array(kind)
    packed.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


def mark_cells(cells: Tensor) -> str:
    """Bool ... as a bit each, the lowest first, in base64."""
    bits = cells.flatten().tolist()
    return pack((sum(bit << n for n, bit in enumerate(bits[i : i + 8])) for i in range(0, len(bits), 8)), "B")


def pack_tokens(codes: list[int]) -> str:
    """Base64 of little-endian uint16, or of uint32 or uint64 if a code needs it: some models have 131,072 codes, and
    tokens made of bits have up to 56 of them.
    """
    most = max(codes, default=0)
    return pack(codes, "H" if most < 1 << 16 else "I" if most < 1 << 32 else "Q")


def unpack_tokens(text: str, count: int) -> list[int]:
    """The `count` codes that `pack_tokens` encoded."""
    size = len(base64.b64decode(text, validate=True)) // max(count, 1)
    return unpack(text, {4: "I", 8: "Q"}.get(size, "H"))


def pack_codes(codes: Tensor) -> str:
    """Codes B rows cols as text, "images x rows x cols : base64", see `pack_tokens`; of scales B N, "images x tokens".

    web/state.js writes the same, and " : codebook" behind it where the run says so.
    """
    return f"{'x'.join(map(str, codes.shape))}:{pack_tokens(codes.flatten().tolist())}"


def unpack_codes(text: str) -> tuple[tuple[int, int, int], list[int]]:
    """(images, rows, cols) and the codes that `pack_codes` encoded. Raises ValueError for anything else."""
    (images, rows, cols), codes = _unpack(text, 3)
    return (images, rows, cols), codes


def unpack_scales(text: str) -> tuple[tuple[int, int], list[int]]:
    """(images, tokens) and the codes of scales that `pack_codes` encoded. Raises ValueError for anything else."""
    (images, tokens), codes = _unpack(text, 2)
    return (images, tokens), codes


def _unpack(text: str, count: int) -> tuple[list[int], list[int]]:
    written, _, data = text.partition(":")
    sizes = [int(size) for size in written.split("x")]
    codes = unpack_tokens(data.partition(":")[0], prod(sizes))
    if len(sizes) != count or min(sizes) < 1 or len(codes) != prod(sizes):
        raise ValueError(f"{len(codes)} codes are not {written}")
    return sizes, codes


def codebooks_of(text: str) -> set[str]:
    """The codebooks that a text of `pack_codes`, or several in one, says its codes are from."""
    return set(re.findall(r":([0-9a-f]{16})(?![^;])", text))


class Kept(NamedTuple):
    """Codes that the widget hands back: of the run with this list index, which had this seed; None: of every run.

    `seeds` are those of each image, if the run had a list of them; `seed` is then the first.
    """

    list_index: int | None
    seed: int | None
    sizes: tuple[int, ...]  # images, rows, cols; of scales images, tokens
    codes: list[int]
    seeds: tuple[int, ...] = ()


def unpack_kept(text: str) -> list[Kept]:
    """What the widget keeps of a node's runs, lines or scales, that of the run it shows first. web/state.js writes it.

    Of one run "codes", as `pack_codes` has them; of several, or with seeds of their own, "list index @ seeds | codes ;
    ...". Raises ValueError for anything else.
    """
    kept = []
    for part in text.split(";"):
        which, bar, codes = part.rpartition("|")
        list_index, at, written = which.partition("@")
        seeds = written.split(",")
        if bar and not (list_index.isdecimal() and at and all(s.isdecimal() and int(s) < 1 << 64 for s in seeds)):
            raise ValueError(f"'{which[:40]}' names no run")
        sizes, numbers = unpack_codes(codes) if codes.partition(":")[0].count("x") > 1 else unpack_scales(codes)
        if not bar:
            kept.append(Kept(None, None, sizes, numbers))
            continue
        own = tuple(map(int, seeds))
        kept.append(Kept(int(list_index), own[0], sizes, numbers, own if len(own) > 1 else ()))
    return kept
