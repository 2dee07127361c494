"""Class-labelled landscapes, painted with numpy: endless training data that nobody has to download.

    image = paint("alpine dawn", seed=7)            # uint8, 96 x 96 x 3
    images, labels = batch(seed=0, count=64)        # uint8 64 x 96 x 96 x 3, int64 64

A scene is a stack of layers painted back to front: sky, sun or moon, clouds, ridges that fade into haze, then water
or ground, then trees. Every edge is anti-aliased by its coverage of the pixel, so pictures are crisp without being
jagged. A scene depends on its class and seed alone.

`python training/scenes.py sheet.png` paints a contact sheet, one class per row.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np

SIZE = 96
_X = np.arange(SIZE, dtype=np.float32)[None, :]
_Y = np.arange(SIZE, dtype=np.float32)[:, None]

Colour = tuple[float, float, float]


def _rgb(text: str) -> np.ndarray:
    """'#rrggbb' as three floats in 0..1."""
    return np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)], np.float32) / 255


def _mix(a: np.ndarray, b: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    return a + (b - a) * share


class PreviewWorker:
    """A canvas and the random numbers of one scene. Heights and positions are in pixels, y grows downwards."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.canvas = np.zeros((SIZE, SIZE, 3), np.float32)
        self.light = 1.0 if rng.random() < 0.5 else -1.0  # the side that the light comes from: +1 is the right

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def tint(self, colour: str, amount: float = 0.035) -> np.ndarray:
        """A colour with a little of the scene's own mood."""
        return np.clip(_rgb(colour) + self.rng.normal(0, amount, 3).astype(np.float32), 0, 1)

    def blend(self, colour: np.ndarray, coverage: np.ndarray) -> None:
        """Paint `colour` (3, or H W 3) where `coverage` (H W, 0..1) says."""
        self.canvas += (colour - self.canvas) * coverage[..., None]

    # -- the sky -------------------------------------------------------------------------------------------------

    def sky(self, top: str, middle: str, bottom: str, horizon: float) -> None:
        t = np.clip(_Y / horizon, 0, 1)
        bend = self.uniform(0.45, 0.65)
        a, b, c = self.tint(top), self.tint(middle), self.tint(bottom)
        upper = _mix(a, b, np.clip(t / bend, 0, 1)[..., None])
        column = _mix(upper, c, np.clip((t - bend) / (1 - bend), 0, 1)[..., None])
        self.canvas[:] = np.broadcast_to(column, self.canvas.shape)

    def disc(self, x: float, y: float, radius: float, colour: str, glow: str, reach: float, strength: float) -> None:
        """A sun or a moon with its glow."""
        distance = np.hypot(_X - x, _Y - y)
        self.blend(_rgb(glow), strength * np.exp(-np.maximum(distance - radius, 0) / reach))
        self.blend(_rgb(colour), np.clip(radius + 0.5 - distance, 0, 1))

    def stars(self, count: int, horizon: float) -> None:
        for _ in range(count):
            x, y = self.rng.integers(1, SIZE - 1), int(self.uniform(1, horizon))
            self.canvas[y, x] = _mix(self.canvas[y, x], _rgb("#fdfbe8"), self.uniform(0.5, 1.0))

    def clouds(self, count: int, low: float, high: float, colour: str, shade: str) -> None:
        """Flat-bottomed clouds: a few bumps on a line."""
        light, dark = self.tint(colour, 0.02), self.tint(shade, 0.02)
        for _ in range(count):
            x, y, width = self.uniform(-5, SIZE + 5), self.uniform(low, high), self.uniform(10, 26)
            top = np.zeros(SIZE, np.float32)
            for _ in range(4):
                at, size = x + self.uniform(-0.6, 0.6) * width, self.uniform(0.3, 0.7) * width
                bump = np.sqrt(np.clip(1 - ((_X[0] - at) / size) ** 2, 0, 1))
                top = np.maximum(top, bump * size * self.uniform(0.25, 0.45))
            cover = np.clip(_Y - (y - top[None]) + 0.5, 0, 1) * np.clip(y - _Y + 0.5, 0, 1) * (top[None] > 0.3)
            depth = np.clip((_Y - (y - top[None])) / (top[None] + 1e-3), 0, 1)
            self.blend(_mix(light, dark, (depth**1.5)[..., None]), cover * self.uniform(0.7, 0.95))

    # -- the land ------------------------------------------------------------------------------------------------

    def ridge_line(self, base: float, height: float, rough: float, waves: float = 1.0) -> np.ndarray:
        """The upper edge of a ridge, one y per column: octaves of triangle waves, rougher with `rough` 0..1."""
        x = _X[0] / SIZE
        line, scale, frequency = np.zeros(SIZE, np.float32), 1.0, waves
        for octave in range(5):
            phase = self.uniform(0, 1)
            wave = np.abs(((x * frequency * self.uniform(0.8, 1.25) + phase) % 1) * 2 - 1) * 2 - 1
            smooth = np.sin(2 * np.pi * (x * frequency + phase))
            line += scale * _mix(smooth, wave, rough if octave < 3 else 1.0)
            scale, frequency = scale * (0.28 + 0.26 * rough), frequency * 2.1
        line = (line - line.min()) / max(float(np.ptp(line)), 1e-3)
        return (base - height * line).astype(np.float32)

    def ridge(
        self,
        line: np.ndarray,
        colour: np.ndarray,
        shade: np.ndarray,
        snow: float = 0.0,
        fade: float = 0.0,
        haze: np.ndarray | None = None,
        facets: bool = True,
    ) -> None:
        """A filled ridge: lit on the side of the light, `snow` pixels of cap, fading to `haze` towards its foot."""
        cover = np.clip(_Y - line[None] + 0.5, 0, 1)
        depth = _Y - line[None]
        body = np.broadcast_to(colour, self.canvas.shape).copy()
        if facets:
            lean = np.gradient(np.convolve(np.pad(line, 2, mode="edge"), np.ones(5) / 5, "valid")) * self.light
            shift = np.round(depth * 0.35).astype(int)  # the shaded side leans with depth, as a flank does
            columns = np.clip(np.arange(SIZE)[None] + (shift * self.light).astype(int), 0, SIZE - 1)
            dark = np.clip(0.5 - lean[columns] * 3, 0, 1)
            body = _mix(colour, shade, dark[..., None])
            if snow > 0:
                teeth = self.rng.uniform(0.5, 1.4, SIZE)
                teeth = np.convolve(np.pad(teeth, 1, mode="edge"), [0.25, 0.5, 0.25], "valid")
                high = np.clip((line.max() - line) / max(float(np.ptp(line)), 1e-3), 0, 1)
                cap = np.clip(snow * teeth * high * 1.4 - depth + 0.5, 0, 1)
                white = _mix(_rgb("#f4f6fb"), _rgb("#a9b6d3"), dark[..., None])
                body = _mix(body, white, cap[..., None])
        if haze is not None and fade > 0:
            body = _mix(body, haze, (np.clip(depth / 40, 0, 1) * fade)[..., None])
        self.blend(body, cover)

    def range(
        self,
        count: int,
        horizon: float,
        height: float,
        rough: float,
        far: np.ndarray,
        near: np.ndarray,
        haze: np.ndarray,
        snow: float = 0.0,
        waves: float = 1.2,
        spread: float = 7.0,
    ) -> np.ndarray:
        """Several ridges, the far ones paler; returns the nearest one's line."""
        line = np.full(SIZE, horizon, np.float32)
        for i in range(count):
            t = i / max(count - 1, 1)
            size = height * (1 - 0.45 * t) * self.uniform(0.85, 1.15)
            line = self.ridge_line(horizon + spread * i, size, rough, waves * (1 + 0.5 * t) * self.uniform(0.8, 1.2))
            colour = _mix(far, near, t)
            self.ridge(line, colour, colour * 0.72, snow * (1 - 0.7 * t), 0.75 * (1 - t) + 0.1, haze)
        return line

    def ground(self, line: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> None:
        """Smooth ground below `line`, darker towards the viewer."""
        depth = np.clip((_Y - line[None]) / np.maximum(SIZE - line[None], 1), 0, 1)
        self.blend(_mix(top, bottom, depth[..., None]), np.clip(_Y - line[None] + 0.5, 0, 1))

    def conifers(
        self, line: np.ndarray, count: int, low: float, high: float, colour: np.ndarray, snow: bool = False
    ) -> None:
        """Fir trees standing on `line`."""
        for x in np.sort(self.rng.uniform(0, SIZE, count)):
            height = self.uniform(low, high)
            foot = float(line[int(np.clip(x, 0, SIZE - 1))]) + 2
            t = (_Y - (foot - height)) / height
            tier = 0.72 + 0.28 * ((t * 4) % 1)
            half = np.clip(t, 0, 1) * height * 0.24 * tier
            cover = np.clip(half - np.abs(_X - x) + 0.5, 0, 1) * (t > 0) * (t < 1)
            body = colour * np.where(((_X - x) * self.light > 0)[..., None], 1.15, 0.88)
            if snow:
                body = _mix(body, _rgb("#eef3fa"), (((t * 4) % 1 < 0.45) * 0.85)[..., None])
            self.blend(np.clip(body, 0, 1), cover)

    def broadleaves(self, line: np.ndarray, count: int, low: float, high: float, colours: list[str]) -> None:
        """Round trees standing on `line`."""
        for x in np.sort(self.rng.uniform(0, SIZE, count)):
            radius = self.uniform(low, high)
            foot = float(line[int(np.clip(x, 0, SIZE - 1))]) + 1
            y = foot - radius * 1.7
            colour = self.tint(colours[int(self.rng.integers(len(colours)))])
            trunk = np.clip(0.9 - np.abs(_X - x), 0, 1) * (_Y > y) * (_Y < foot + 1)
            self.blend(_rgb("#4a3426"), trunk)
            distance = np.hypot(_X - x, (_Y - y) * 0.9)
            lit = np.clip(0.5 + ((_X - x) * self.light - (_Y - y)) / (2.4 * radius), 0, 1)
            self.blend(
                _mix(colour * 0.62, np.clip(colour * 1.15, 0, 1), lit[..., None]),
                np.clip(radius - distance + 0.5, 0, 1),
            )

    # -- the water -----------------------------------------------------------------------------------------------

    def water(self, level: float, near: np.ndarray, clarity: float, glint: tuple[float, str] | None = None) -> None:
        """Everything below `level` mirrors what is above it, in ripples; `glint` is (x, colour) of the light's path."""
        top = int(level)
        rows = np.arange(top, SIZE)
        depth = (rows - top) / max(SIZE - top, 1)
        source = np.clip(top - 1 - (rows - top) * self.uniform(0.9, 1.2), 0, top - 1).astype(int)
        wobble = np.round(np.sin(rows * self.uniform(1.1, 1.9) + self.uniform(0, 6)) * (0.4 + 2.2 * depth)).astype(int)
        columns = np.clip(np.arange(SIZE)[None] + wobble[:, None], 0, SIZE - 1)
        mirrored = self.canvas[source[:, None], columns]
        pool = _mix(mirrored, near, np.clip(1 - clarity + 0.45 * depth, 0, 1)[:, None, None])
        band = (np.sin(rows * self.uniform(0.9, 1.3) + 3 * np.sqrt(depth + 0.01)) > 0.55)[:, None, None] * 0.10
        self.canvas[top:] = _mix(pool, np.ones(3, np.float32), band)
        if glint is not None:
            x, colour = glint
            width = 1.5 + 9 * depth + 2 * np.sin(rows * 1.7)
            path = np.clip(width[:, None] - np.abs(_X - x) + 0.5, 0, 1) * (np.sin(rows * 2.1) > -0.35)[:, None]
            self.canvas[top:] = _mix(
                self.canvas[top:], _rgb(colour), (path * (0.75 - 0.35 * depth[:, None]))[..., None]
            )
        self.canvas[top] = _mix(self.canvas[top], np.ones(3, np.float32), 0.18)

    def mist(self, level: float, thickness: float, colour: np.ndarray, amount: float) -> None:
        self.blend(colour, amount * np.exp(-(((_Y - level) / thickness) ** 2)) * np.ones_like(_X))


# -- the scenes: one function a class --------------------------------------------------------------------------------


def _alpine(p: PreviewWorker, sky: tuple[str, str, str], far: str, near: str, sun: str, glow: str, ground: str) -> None:
    horizon = p.uniform(52, 62)
    p.sky(*sky, horizon)
    x = p.uniform(14, 82)
    p.light = 1.0 if x > 48 else -1.0
    p.disc(x, p.uniform(24, horizon - 12), p.uniform(4, 6.5), sun, glow, p.uniform(14, 22), 0.75)
    p.clouds(int(p.rng.integers(0, 4)), 8, 30, sky[2], sky[1])
    haze = p.tint(sky[2])
    line = p.range(3, horizon + 4, p.uniform(30, 42), 0.9, p.tint(far), p.tint(near), haze, snow=p.uniform(9, 15))
    if p.rng.random() < 0.5:
        p.water(p.uniform(72, 78), p.tint(near) * 0.8, 0.8, (x, sun))
    else:
        edge = p.ridge_line(p.uniform(82, 88), 8, 0.2, 0.8)
        p.ground(edge, p.tint(ground), p.tint(ground) * 0.6)
        p.conifers(edge, int(p.rng.integers(5, 13)), 8, 18, p.tint(ground) * 0.55)
    del line


def _alpine_dawn(p: PreviewWorker) -> None:
    _alpine(p, ("#7d9fd6", "#f3c1c6", "#ffe3b8"), "#b7a0bd", "#4d5a86", "#fff6d8", "#ffdca0", "#5d6f57")


def _alpine_dusk(p: PreviewWorker) -> None:
    _alpine(p, ("#2a2455", "#a8456f", "#f78d4d"), "#8a4b78", "#2c2244", "#ffd27a", "#ff7a3c", "#2d2a3a")


def _starry_night(p: PreviewWorker) -> None:
    horizon = p.uniform(62, 72)
    p.sky("#070b24", "#12205a", "#32508f", horizon)
    p.stars(int(p.rng.integers(22, 40)), horizon - 8)
    x = p.uniform(14, 82)
    p.light = 1.0 if x > 48 else -1.0
    p.disc(x, p.uniform(12, 30), p.uniform(4.5, 7), "#f7f3d6", "#8ea6dc", p.uniform(9, 14), 0.5)
    line = p.range(
        2, horizon + 6, p.uniform(16, 30), 0.7, p.tint("#25386f", 0.02), p.tint("#101a3c", 0.02), _rgb("#32508f")
    )
    if p.rng.random() < 0.5:
        p.water(p.uniform(76, 82), _rgb("#0b1434"), 0.85, (x, "#e6e4c8"))
    else:
        p.ground(line + 10, _rgb("#0d1630"), _rgb("#060a18"))
        p.conifers(line + 12, int(p.rng.integers(6, 14)), 8, 20, _rgb("#081022"))


def _desert(
    p: PreviewWorker, sky: tuple[str, str, str], sand: str, rock: str, sun: str, glow: str, sun_y: tuple[float, float]
) -> None:
    horizon = p.uniform(50, 60)
    p.sky(*sky, horizon)
    x = p.uniform(12, 84)
    p.light = 1.0 if x > 48 else -1.0
    p.disc(x, p.uniform(*sun_y), p.uniform(4.5, 7.5), sun, glow, p.uniform(8, 18), 0.6)
    stone = p.tint(rock)
    for _ in range(int(p.rng.integers(1, 4))):  # mesas: flat tops, steep flanks
        at, half, tall = p.uniform(0, SIZE), p.uniform(7, 17), p.uniform(8, 22)
        line = horizon + 2 - np.clip((half - np.abs(_X[0] - at)) * 2.2, 0, 1 * tall)
        body = _mix(stone, p.tint(sky[2]), 0.3)
        p.ridge(line.astype(np.float32), body, body * 0.75)
        band = np.clip(1 - np.abs(_Y - (horizon + 2 - tall * 0.55)), 0, 1) * (np.abs(_X - at) < half - 0.25 * tall)
        p.blend(body * 0.82, band)
    dune = p.tint(sand)
    for i in range(3):
        line = p.ridge_line(horizon + 8 + 12 * i, p.uniform(6, 12), 0.05, p.uniform(0.6, 1.1))
        colour = _mix(_mix(dune, p.tint(sky[2]), 0.35), dune, i / 2)
        p.ridge(line, colour, colour * 0.74, fade=0.5, haze=colour * 0.9)
    if p.rng.random() < 0.65:  # a cactus or two
        for _ in range(int(p.rng.integers(1, 4))):
            at, foot, tall = p.uniform(8, 88), p.uniform(76, 92), p.uniform(9, 16)
            green = p.tint("#3f6b3a") * (0.6 if sun_y[1] > 35 else 1.0)
            stem = np.clip(1.8 - np.abs(_X - at), 0, 1) * (_Y > foot - tall) * (_Y <= foot)
            arms = (np.abs(_Y - (foot - tall * 0.5)) < 1) * (np.abs(_X - at) < 4.5)
            left = (np.abs(_X - at + 4) < 1) * (_Y > foot - tall * 0.8) * (_Y < foot - tall * 0.45)
            right = (np.abs(_X - at - 4) < 1) * (_Y > foot - tall * 0.95) * (_Y < foot - tall * 0.45)
            p.blend(green, np.clip(stem + arms + left + right, 0, 1).astype(np.float32))


def _desert_day(p: PreviewWorker) -> None:
    _desert(p, ("#3f8fd8", "#86c1ea", "#e9e6cf"), "#e6bd74", "#b86f45", "#fffbe6", "#fff3c0", (9, 28))


def _desert_dusk(p: PreviewWorker) -> None:
    _desert(p, ("#3b2a63", "#c4506a", "#ffae5c"), "#b0623f", "#6a3247", "#fff0b0", "#ff9a4c", (34, 48))


def _ocean(
    p: PreviewWorker,
    sky: tuple[str, str, str],
    sea: str,
    sun: str,
    glow: str,
    sun_y: tuple[float, float],
    cloud: tuple[str, str],
    island: str,
) -> None:
    level = p.uniform(50, 60)
    p.sky(*sky, level)
    x = p.uniform(14, 82)
    p.light = 1.0 if x > 48 else -1.0
    p.disc(x, p.uniform(level * sun_y[0], level * sun_y[1]), p.uniform(5, 8), sun, glow, p.uniform(10, 20), 0.7)
    p.clouds(int(p.rng.integers(1, 6)), 8, level - 12, *cloud)
    if p.rng.random() < 0.6:  # an island on the horizon
        at, half = p.uniform(5, 91), p.uniform(10, 26)
        rise = np.clip(1 - np.abs(_X[0] - at) / half, 0, 1)
        line = level + 1 - rise * p.uniform(0.35, 0.8) * half + p.ridge_line(2, 3, 0.9, 3) * (rise > 0)
        colour = p.tint(island)
        p.ridge(line.astype(np.float32), colour, colour * 0.7)
    p.water(level, p.tint(sea), 0.55, (x, sun))
    if p.rng.random() < 0.5:  # a sailing boat
        at, foot = p.uniform(12, 84), p.uniform(level + 6, level + 18)
        sail = np.clip((_Y - (foot - 11)) * 0.5, 0, 5)
        p.blend(
            _rgb("#f7f3ea") * (1.0 if sun_y[1] < 0.7 else 0.75),
            ((_X > at) * (_X - at < sail) * (_Y < foot - 1.5) * (_Y > foot - 11)).astype(np.float32),
        )
        p.blend(
            _rgb("#5a2d25"), ((np.abs(_X - at - 1) < 5 - (_Y - foot)) * (np.abs(_Y - foot) < 1.5)).astype(np.float32)
        )
    if p.rng.random() < 0.45:  # a beach
        shore = p.ridge_line(p.uniform(88, 93), 5, 0.0, 0.5)
        sand = p.tint("#ead2a0") * (1.0 if sun_y[1] < 0.7 else 0.55)
        p.ground(shore - 2, np.ones(3, np.float32) * (0.95 if sun_y[1] < 0.7 else 0.7), sand)
        p.ground(shore, sand, sand * 0.85)


def _ocean_day(p: PreviewWorker) -> None:
    _ocean(
        p,
        ("#2f83d6", "#7dbdec", "#d9eef5"),
        "#1f6fae",
        "#fffdf0",
        "#fff6cf",
        (0.15, 0.45),
        ("#ffffff", "#c9dcec"),
        "#4d7f5c",
    )


def _ocean_dusk(p: PreviewWorker) -> None:
    _ocean(
        p,
        ("#33306e", "#b5547e", "#ffb163"),
        "#3a2c5e",
        "#fff1b8",
        "#ff8e45",
        (0.72, 0.98),
        ("#f59a7a", "#8d4a78"),
        "#3b2747",
    )


def _foggy_forest(p: PreviewWorker) -> None:
    fog = p.tint("#c9d6d3", 0.025)
    p.sky("#aebfc4", "#c6d3d2", "#dde4df", 80)
    far, near = fog * 0.74, p.tint("#22382f", 0.025)
    for i in range(4):
        t = i / 3
        line = p.ridge_line(48 + 15 * i, p.uniform(5, 12), 0.3, p.uniform(0.6, 1.4))
        colour = _mix(far, near, t**1.2)
        p.conifers(line, int(20 - 3 * i), 9 + 6 * t, 16 + 14 * t, colour)
        p.ground(line, colour, _mix(colour, fog, 0.75 * (1 - t)))
        if i < 3:
            p.mist(float(line.mean()) + 9, p.uniform(5, 9), fog, 0.55)


def _autumn_hills(p: PreviewWorker) -> None:
    horizon = p.uniform(46, 56)
    p.sky("#6fa3d2", "#b3cfe0", "#f3e6c8", horizon)
    p.clouds(int(p.rng.integers(1, 5)), 8, 30, "#fff8ec", "#d4cfd0")
    haze = p.tint("#e8d9b8")
    p.range(2, horizon + 4, p.uniform(14, 24), 0.4, p.tint("#a8a0a8"), p.tint("#8c7a5c"), haze)
    leaves = ["#c8502a", "#d98b2b", "#e3b23c", "#a8352b", "#8f7a34"]
    for i in range(3):
        line = p.ridge_line(horizon + 14 + 12 * i, p.uniform(5, 10), 0.1, p.uniform(0.6, 1.3))
        meadow = p.tint("#a59a48") * (1 - 0.08 * i)
        p.ground(line, meadow, meadow * 0.75)
        p.broadleaves(line, int(p.rng.integers(5, 10)), 2.2 + 0.9 * i, 3.8 + 1.4 * i, leaves)


def _winter_snow(p: PreviewWorker) -> None:
    horizon = p.uniform(48, 58)
    p.sky("#8fb0d3", "#c3d6e6", "#eef2f3", horizon)
    p.clouds(int(p.rng.integers(0, 4)), 8, 28, "#f7fafc", "#c8d3e0")
    p.range(
        2,
        horizon + 2,
        p.uniform(18, 30),
        0.8,
        p.tint("#a3b5cc", 0.02),
        p.tint("#7d93b0", 0.02),
        _rgb("#e3ebf3"),
        snow=p.uniform(10, 16),
    )
    for i in range(3):
        line = p.ridge_line(horizon + 12 + 12 * i, p.uniform(4, 9), 0.1, p.uniform(0.6, 1.2))
        snow = p.tint("#eef3f9", 0.012)
        p.ground(line, snow, snow * np.array([0.80, 0.87, 0.96], np.float32))
        p.conifers(line, int(p.rng.integers(3, 8)), 7 + 3 * i, 12 + 5 * i, p.tint("#2f4f47", 0.02), snow=True)
    if p.rng.random() < 0.5:  # a cabin with a lit window
        at, foot = p.uniform(14, 80), p.uniform(80, 88)
        p.blend(_rgb("#6b4530"), ((np.abs(_X - at) < 7) * (_Y > foot - 7) * (_Y <= foot)).astype(np.float32))
        p.blend(_rgb("#f6f9fd"), np.clip((_Y - (foot - 14)) * 1.3 - np.abs(_X - at), 0, 1) * (_Y < foot - 6))
        p.blend(_rgb("#ffd977"), ((np.abs(_X - at - 2) < 1.6) * (np.abs(_Y - foot + 3.5) < 1.6)).astype(np.float32))


def _green_valley(p: PreviewWorker) -> None:
    horizon = p.uniform(46, 56)
    p.sky("#3d8fdc", "#8cc4ee", "#dff0f4", horizon)
    p.disc(p.uniform(12, 84), p.uniform(8, 24), p.uniform(4, 6), "#fffdf0", "#fff6cf", 9, 0.5)
    p.clouds(int(p.rng.integers(2, 6)), 8, 32, "#ffffff", "#cddcea")
    p.range(
        2,
        horizon + 4,
        p.uniform(20, 32),
        0.7,
        p.tint("#8fb0c4"),
        p.tint("#5f8a7a"),
        p.tint("#cfe3e4"),
        snow=p.uniform(0, 8),
    )
    for i in range(3):
        line = p.ridge_line(horizon + 14 + 12 * i, p.uniform(5, 11), 0.05, p.uniform(0.6, 1.2))
        grass = p.tint("#6fae4a") * (1 - 0.1 * i)
        p.ground(line, grass, grass * 0.7)
        p.broadleaves(line, int(p.rng.integers(2, 6)), 2 + 0.8 * i, 3.4 + 1.2 * i, ["#3f7d3a", "#55923f", "#2f6b3f"])
    if p.rng.random() < 0.6:  # a white cottage with a red roof
        at, foot = p.uniform(14, 80), p.uniform(78, 88)
        p.blend(_rgb("#f4efe4"), ((np.abs(_X - at) < 6) * (_Y > foot - 6) * (_Y <= foot)).astype(np.float32))
        p.blend(_rgb("#b8402f"), np.clip((_Y - (foot - 12)) * 1.2 - np.abs(_X - at), 0, 1) * (_Y < foot - 5.5))
        p.blend(_rgb("#4a6076"), ((np.abs(_X - at + 2) < 1.1) * (np.abs(_Y - foot + 3) < 1.1)).astype(np.float32))


def _tropical_lagoon(p: PreviewWorker) -> None:
    level = p.uniform(52, 60)
    p.sky("#2f9be0", "#86d0ef", "#e3f5f0", level)
    x = p.uniform(16, 80)
    p.clouds(int(p.rng.integers(1, 5)), 8, level - 14, "#ffffff", "#c8e0ea")
    p.range(
        2,
        level + 1,
        p.uniform(12, 24),
        0.5,
        p.tint("#6fae9a"),
        p.tint("#2f7d54"),
        p.tint("#c8e8df"),
        waves=1.0,
        spread=1,
    )
    p.water(level, p.tint("#22b3b0"), 0.4)
    shore = p.ridge_line(p.uniform(84, 90), 7, 0.0, 0.5)
    p.ground(shore - 2, np.array([0.9, 0.98, 0.97], np.float32), _rgb("#f0dcae"))
    p.ground(shore, p.tint("#f2dfb2"), _rgb("#dcc08a"))
    for _ in range(int(p.rng.integers(1, 4))):  # palms: a leaning trunk, arched fronds
        foot_x, tall, lean = x + p.uniform(-30, 30), p.uniform(22, 36), p.uniform(-7, 7)
        foot = float(shore[int(np.clip(foot_x, 0, 95))]) + 4
        t = np.clip((foot - _Y) / tall, 0, 1)
        p.blend(
            _rgb("#7a5636"), np.clip(1.5 - np.abs(_X - foot_x - lean * t**2), 0, 1) * (_Y < foot) * (_Y > foot - tall)
        )
        top_x, top_y = foot_x + lean, foot - tall
        leaf = p.tint("#2f7a3a")
        for way in (-1, 1):
            for length, drop in ((9, 0.06), (11, 0.025), (7, 0.12)):
                d = (_X - top_x) * way
                arc = top_y + drop * d**2 - 0.35 * d + 0.4
                p.blend(leaf, np.clip(1.6 - np.abs(_Y - arc), 0, 1) * (d > -1) * (d < length))


SCENES: dict[str, Callable[[PreviewWorker], None]] = {
    "alpine dawn": _alpine_dawn,
    "alpine dusk": _alpine_dusk,
    "starry night": _starry_night,
    "desert day": _desert_day,
    "desert dusk": _desert_dusk,
    "ocean day": _ocean_day,
    "ocean dusk": _ocean_dusk,
    "foggy forest": _foggy_forest,
    "autumn hills": _autumn_hills,
    "winter snow": _winter_snow,
    "green valley": _green_valley,
    "tropical lagoon": _tropical_lagoon,
}
CLASSES = list(SCENES)


def paint(name: str, seed: int) -> np.ndarray:
    """One scene of class `name`: uint8, SIZE x SIZE x 3."""
    painter = PreviewWorker(np.random.default_rng([CLASSES.index(name), seed]))
    SCENES[name](painter)
    return (np.clip(painter.canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def batch(seed: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` scenes of evenly drawn classes: uint8 count x SIZE x SIZE x 3, labels int64 count."""
    labels = np.random.default_rng(seed).integers(0, len(CLASSES), count)
    return np.stack([paint(CLASSES[c], seed * 1_000_003 + i) for i, c in enumerate(labels)]), labels


def main() -> None:
    from PIL import Image

    rows = [np.concatenate([paint(name, seed) for seed in range(8)], 1) for name in CLASSES]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(sys.argv[1])


if __name__ == "__main__":
    main()
