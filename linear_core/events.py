"""Events: what people are told while an image grows. No torch at run time.

`generate` yields one Line per row; its tensors are on the host already. A Trace turns lines into JSON: one Started, a
Row with nothing but what has changed for each line, one Finished. These are what the widget in web/ is told while it
happens (event `linear_ar.line`) and what it reads afterwards (the node's `ui`); replayed, they give every line's share
and, for the first image, what each layer and head held. web/state.js uses these field names, and a test holds it to.

A batch that does not fit is drawn in parts, and each part is told of as a run of its own; what the node keeps
afterwards is one run with all images, as if drawn at once, whose `cache_bytes` are those of the largest part.

Numbers travel as base64 of little-endian uint16 or uint8, rows of arrays in C order.
"""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

EVENT = "linear_ar.line"
IMAGES = 4  # images of a batch whose shares are sent
HEAD_BYTES = 1 << 19  # evictions of every layer and head are sent while a whole run's stay below this, else by layer
NONE = 0xFFFF  # fills up lists of evictions of unequal length


@dataclass(frozen=True)
class Line:
    """One finished row of every image of the batch.

    row         0-based
    rows        rows the image will have
    tokens      codes of this row, int64 B cols
    share       share of layers and heads that see each image token once victims have been chosen, float32 B rows cols;
                0 for what is evicted or not there yet. A lazy victim is seen until the next line overwrites it.
    held        image tokens held per head after the line, mean over layers, heads and images
    seconds     time since the previous line
    cache_bytes keys and values, as allocated
    by_head     which image tokens (end-of-line tokens included) each layer and head of the first image holds: bool
                L H rows*stride
    replayed    the row was given and fed again, not drawn
    stands      how many tokens each image token stands for where it is held, mean over those layers and heads, float32
                B rows cols; None unless victims are folded
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


@dataclass(frozen=True)
class Started:
    """What a run is, before its first line.

    run         tells this run from others of the same node
    stride      tokens a line takes, end-of-line token included
    images      images of the batch; `shown` of them have their shares sent
    columns     images side by side in the preview picture
    detail      "heads": evictions are sent for each layer and head of the first image; "layers": a share by layer is
    lines       lines that survive a line's end (all of them with the full cache)
    cache_bytes keys and values as allocated; `full_bytes` what all lines would take
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


@dataclass(frozen=True)
class Row:
    """What one line changed. Cell c of image i is cell i*rows*cols + c.

    tokens    uint16 images cols: the codes of this row
    cells     uint16 N: cells whose share is not what it was
    shares    uint8 N: their new share of layers and heads, 255 for all
    evicted   uint16 layers heads n: image tokens that each head of the first image held after the line before, or that
              are of this line, and that it does not hold now. Unequal numbers are filled up with 65535. Empty unless
              the run's detail is "heads". The picture's last token is never fed, so the last line names it.
    by_layer  uint8 layers N', N' the number of `cells` of the first image: their share of that layer's heads. Empty
              unless the run's detail is "layers".
    merged    uint16 M: cells that do not stand for as many tokens as before; empty unless victims are folded
    stands    uint16 M: how many each stands for now where it is held, mean over those layers and heads, in eighths
    seconds   time since the line before
    tokens_per_second  of all images together, this line alone
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
    kind: str = "row"


@dataclass(frozen=True)
class Picture:
    """The preview that comes next shows so many lines. Told while it happens, and not part of a trace."""

    run: str
    lines: int
    kind: str = "picture"


@dataclass(frozen=True)
class Finished:
    """How the run went. `rows` were drawn or replayed: fewer than the image has where it was told to stop early."""

    run: str
    rows: int
    seconds: float
    tokens_per_second: float
    held: float
    kind: str = "finished"


class Trace:
    """Lines in, events out. `events` is all of them so far, as JSON."""

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

    def add(self, line: Line) -> dict[str, Any]:
        """The event of one more line."""
        run = self.started
        share = (line.share[: run.shown] * 255).round().byte().flatten()
        layers = self._layers(line)
        changed = share > 0 if self._shares is None else share != self._shares
        if layers is not None:
            some = layers > 0 if self._layered is None else layers != self._layered
            changed[: run.rows * run.cols] |= some.any(0)
        cells = changed.nonzero()[:, 0]
        merged, stands = self._merged(line)
        seconds = max(line.seconds, 1e-9)
        event = Row(
            run=run.run,
            row=line.row,
            rows=line.rows,
            cols=run.cols,
            seconds=round(line.seconds, 6),
            tokens_per_second=round(line.tokens.numel() / seconds, 1),
            held=line.held,
            lines=run.lines,
            cache_bytes=line.cache_bytes,
            full_bytes=run.full_bytes,
            replayed=line.replayed,
            tokens=pack(line.tokens.flatten().tolist()),
            cells=pack(cells.tolist()),
            shares=pack(share[cells].tolist(), "B"),
            evicted=self._evicted(line),
            by_layer="" if layers is None else pack(layers[:, cells[cells < layers.shape[1]]].flatten().tolist(), "B"),
            merged=merged,
            stands=stands,
        )
        self._shares, self._by_head, self._layered = share, line.by_head, layers
        self._rows.append(event)
        self.events.append(asdict(event))
        return self.latest

    def finish(self) -> dict[str, Any]:
        """The last event. Speed is that of the rows drawn."""
        drawn = [row for row in self._rows if not row.replayed]
        seconds = sum(row.seconds for row in drawn)
        tokens = len(drawn) * self.started.cols * self.started.images
        held = max((row.held for row in self._rows if row.row + 1 < row.rows), default=0.0)
        speed = round(tokens / seconds, 1) if seconds else 0.0
        seconds = sum(row.seconds for row in self._rows)
        self.events.append(asdict(Finished(self.started.run, len(self._rows), round(seconds, 6), speed, held)))
        return self.latest

    def _evicted(self, line: Line) -> str:
        if self.started.detail != "heads" or line.by_head is None:
            return ""
        stride = self.started.stride
        before = line.by_head.new_zeros(line.by_head.shape) if self._by_head is None else self._by_head.clone()
        before[..., line.row * stride : (line.row + 1) * stride] = True
        gone = before & ~line.by_head
        counts = gone.sum(-1)
        most = int(counts.max())
        numbers = gone.nonzero()[:, 2].tolist()
        if most * counts.numel() == len(numbers):
            return pack(numbers)
        lists, start = [], 0
        for count in counts.flatten().tolist():
            lists += numbers[start : start + count] + [NONE] * (most - count)
            start += count
        return pack(lists)

    def _merged(self, line: Line) -> tuple[str, str]:
        if line.stands is None:
            return "", ""
        stands = (line.stands[: self.started.shown] * 8).round().clamp(max=NONE).int().flatten()
        # A token stands for itself until something is folded into it, and for nothing once it is gone.
        changed = stands > 8 if self._stands is None else (stands != self._stands) & ((stands > 8) | (self._stands > 8))
        self._stands = stands
        cells = changed.nonzero()[:, 0]
        return pack(cells.tolist()), pack(stands[cells].tolist())

    def _layers(self, line: Line) -> Tensor | None:
        """Share of each layer's heads that hold each cell of the first image: uint8 L cells."""
        if self.started.detail != "layers" or line.by_head is None:
            return None
        run = self.started
        held = line.by_head.unflatten(-1, (run.rows, run.stride))[..., : run.cols].flatten(2)
        return (held.float().mean(1) * 255).round().byte()


def detail(layers: int, heads: int, tokens: int) -> str:
    """'heads' where the evictions of a whole run fit into HEAD_BYTES: at most every token leaves every head once."""
    return "heads" if 2 * layers * heads * tokens <= HEAD_BYTES else "layers"


def pack(numbers: Iterable[int], kind: str = "H") -> str:
    """Base64 of little-endian uint16 ("H") or uint8 ("B") numbers."""
    packed = array(kind, numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return base64.b64encode(packed.tobytes()).decode("ascii")


def unpack(text: str, kind: str = "H") -> list[int]:
    """The numbers that `pack` put into `text`."""
    packed = array(kind)
    packed.frombytes(base64.b64decode(text, validate=True))
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


def pack_codes(codes: Tensor) -> str:
    """Codes B rows cols as text: "images x rows x cols : base64 of uint16". web/state.js writes the same."""
    images, rows, cols = codes.shape
    return f"{images}x{rows}x{cols}:{pack(codes.flatten().tolist())}"


def unpack_codes(text: str) -> tuple[tuple[int, int, int], list[int]]:
    """(images, rows, cols) and the codes of what `pack_codes` wrote. Raises ValueError for anything else."""
    sizes, _, data = text.partition(":")
    images, rows, cols = map(int, sizes.split("x"))
    codes = unpack(data)
    if min(images, rows, cols) < 1 or len(codes) != images * rows * cols:
        raise ValueError(f"{len(codes)} codes are not {sizes}")
    return (images, rows, cols), codes
