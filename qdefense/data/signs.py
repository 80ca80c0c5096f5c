"""Built-in data: twelve procedural traffic signs, 32x32, drawn from a seed.

Eight of the classes share shape and colours with another and differ in the glyph alone, so a linear model fails where
a small ResNet does not. Only operations that round alike on every CPU are used on the way to a pixel (no sines, no
Gaussian, no matrix product; vertices are rounded before they are drawn): the same seed gives the same bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from qdefense.data.images import DataError, Images, ImageSet, Labels, NoSplitError
from qdefense.data.selection import choose_rows

SIZE = 32
SPLIT_SIZES = {"train": 6000, "test": 2000}
SET_SEED = 0
_SPLIT_IDS = {"train": 0, "test": 1}
_SCALE = 3
_CANVAS = SIZE * _SCALE
_ROWS_PER_BATCH = 500

Colour = tuple[int, int, int]
Polygon = tuple[tuple[float, float], ...]
Reals = NDArray[np.float64]

RED: Colour = (190, 25, 35)
WHITE: Colour = (235, 235, 235)
BLUE: Colour = (20, 80, 175)
YELLOW: Colour = (245, 190, 20)
BLACK: Colour = (25, 25, 25)


def _regular(corners: int, turn: float) -> Polygon:
    # Rounded, because the last bit of a cosine differs between C libraries.
    angles = [2 * math.pi * (corner + turn) / corners for corner in range(corners)]
    return tuple((round(math.cos(angle), 6), round(math.sin(angle), 6)) for angle in angles)


def _bar(x0: float, y0: float, x1: float, y1: float, width: float) -> Polygon:
    """A straight stroke with square ends."""
    length = math.sqrt((x1 - x0) * (x1 - x0) + (y1 - y0) * (y1 - y0))
    dx, dy = (y0 - y1) * width / (2 * length), (x1 - x0) * width / (2 * length)
    return ((x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy), (x0 - dx, y0 - dy))


def _letter(strokes: str, box: tuple[float, float, float, float], thick: float) -> tuple[Polygon, ...]:
    """A letter of strokes named as in a seven-segment display, t the stem of a T; ``box``: centre, width and height."""
    x, y, width, height = box
    left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
    over, half = thick / 2, thick / 2
    ends = {
        "a": (left - half, top, right + half, top),
        "b": (right, top - over, right, y + over),
        "c": (right, y - over, right, bottom + over),
        "d": (left - half, bottom, right + half, bottom),
        "e": (left, y - over, left, bottom + over),
        "f": (left, top - over, left, y + over),
        "g": (left - half, y, right + half, y),
        "t": (x, top, x, bottom + over),
    }
    return tuple(_bar(*ends[stroke], thick) for stroke in strokes)


def _number(tens: str) -> tuple[Polygon, ...]:
    return _letter(tens, (-0.3, 0, 0.3, 0.72), 0.19) + _letter("abcdef", (0.3, 0, 0.3, 0.72), 0.19)


def _bend(side: int) -> tuple[Polygon, ...]:
    head = ((side * 0.72, -0.2), (side * 0.22, -0.62), (side * 0.22, 0.22))
    return (_bar(-side * 0.28, 0.62, -side * 0.28, -0.33, 0.26), _bar(-side * 0.28, -0.2, side * 0.3, -0.2, 0.26), head)


_CIRCLE = _regular(24, 0)
_TRIANGLE: Polygon = ((0, -0.98), (1.05, 0.84), (-1.05, 0.84))
_YIELD: Polygon = ((0, 0.98), (1.05, -0.84), (-1.05, -0.84))
_SQUARE: Polygon = ((-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86))
_AHEAD = (_bar(0, 0.66, 0, -0.1, 0.28), ((0, -0.74), (0.46, -0.08), (-0.46, -0.08)))
_STOP = (
    *_letter("afgcd", (-0.54, 0, 0.16, 0.46), 0.1),
    *_letter("at", (-0.17, 0, 0.16, 0.46), 0.1),
    *_letter("abcdef", (0.19, 0, 0.16, 0.46), 0.1),
    *_letter("abgfe", (0.55, 0, 0.16, 0.46), 0.1),
)
_DANGER = (((-0.14, -0.36), (0.14, -0.36), (0.08, 0.28), (-0.08, 0.28)), _bar(0, 0.38, 0, 0.6, 0.24))
_CROSSROADS = (_bar(-0.36, -0.12, 0.36, 0.6, 0.2), _bar(0.36, -0.12, -0.36, 0.6, 0.2))
_BUMPS = (
    _bar(-0.62, 0.56, 0.62, 0.56, 0.14),
    ((-0.56, 0.56), (-0.42, 0.2), (-0.16, 0.2), (-0.02, 0.56)),
    ((0.02, 0.56), (0.16, 0.2), (0.42, 0.2), (0.56, 0.56)),
)


@dataclass(frozen=True, kw_only=True)
class _Sign:
    """Outline in the rim's colour, the outline again at ``inner`` of its size in the fill's, then the glyph."""

    outline: Polygon
    rim: Colour
    fill: Colour
    inner: float
    ink: Colour = BLACK
    glyph: tuple[Polygon, ...] = ()
    vertices: Reals = field(init=False)
    stops: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        cx = sum(x for x, _ in self.outline) / len(self.outline)
        cy = sum(y for _, y in self.outline) / len(self.outline)
        inside = tuple((cx + self.inner * (x - cx), cy + self.inner * (y - cy)) for x, y in self.outline)
        shapes = (self.outline, inside, *self.glyph)
        object.__setattr__(self, "vertices", np.array([point for shape in shapes for point in shape]))
        object.__setattr__(self, "stops", tuple(np.cumsum([len(shape) for shape in shapes]).tolist()))


def _speed(tens: str) -> _Sign:
    return _Sign(outline=_CIRCLE, rim=RED, fill=WHITE, inner=0.78, glyph=_number(tens))


def _order(glyph: tuple[Polygon, ...]) -> _Sign:
    return _Sign(outline=_CIRCLE, rim=WHITE, fill=BLUE, inner=0.92, ink=WHITE, glyph=glyph)


def _warning(glyph: tuple[Polygon, ...]) -> _Sign:
    return _Sign(outline=_TRIANGLE, rim=RED, fill=WHITE, inner=0.7, glyph=glyph)


_SIGNS = {
    "speed_30": _speed("abgcd"),
    "speed_50": _speed("afgcd"),
    "ahead_only": _order(_AHEAD),
    "turn_right": _order(_bend(1)),
    "turn_left": _order(_bend(-1)),
    "danger": _warning(_DANGER),
    "crossroads": _warning(_CROSSROADS),
    "bumps": _warning(_BUMPS),
    "yield": _Sign(outline=_YIELD, rim=RED, fill=WHITE, inner=0.62),
    "stop": _Sign(outline=_regular(8, 0.5), rim=WHITE, fill=RED, inner=0.93, ink=WHITE, glyph=_STOP),
    "parking": _Sign(
        outline=_SQUARE, rim=WHITE, fill=BLUE, inner=0.92, ink=WHITE, glyph=_letter("abgfe", (0, 0, 0.5, 1.0), 0.24)
    ),
    "priority_road": _Sign(outline=_regular(4, 0), rim=WHITE, fill=YELLOW, inner=0.74),
}
CLASS_NAMES = tuple(_SIGNS)
_BY_LABEL = tuple(_SIGNS.values())


def load_signs(*, split: str | None, limit: int | None, seed: int) -> ImageSet:
    """The built-in set: 6,000 signs to train on, 2,000 to test; ``seed`` picks rows, the set itself never changes.

    Raises:
        DataError: no such split, or ``limit`` is not positive.
    """
    wanted = split or "test"
    _split_id(wanted)
    return _draw_rows(choose_rows(SPLIT_SIZES[wanted], limit=limit, seed=seed), seed=SET_SEED, split=wanted)


def draw_signs(count: int, *, seed: int, split: str) -> ImageSet:
    """The first ``count`` signs of an endless set: balanced (any prefix within one image per class), shuffled.

    Args:
        count: how many.
        seed: another seed is another set.
        split: "train" or "test"; they share no image.

    Raises:
        DataError: no such split, or ``count`` is not positive.
    """
    if count <= 0:
        raise DataError(f"signs: count is {count}: ask for at least one image")
    return _draw_rows(np.arange(count, dtype=np.int64), seed=seed, split=split)


def _split_id(split: str) -> int:
    if split not in _SPLIT_IDS:
        raise NoSplitError(f"signs: no split {split!r}; it has {', '.join(map(repr, sorted(_SPLIT_IDS)))}")
    return _SPLIT_IDS[split]


def _draw_rows(rows: NDArray[np.int64], *, seed: int, split: str) -> ImageSet:
    split_id = _split_id(split)
    labels = _labels(rows, seed, split_id)
    images = np.empty((len(rows), SIZE, SIZE, 3), dtype=np.uint8)
    for start in range(0, len(rows), _ROWS_PER_BATCH):
        part = slice(start, start + _ROWS_PER_BATCH)
        images[part] = _draw_batch(rows[part], labels[part], seed, split_id)
    return ImageSet(
        images=images,
        labels=labels,
        class_names=CLASS_NAMES,
        source=f"signs {split}",
        detection="signs: the built-in set",
    )


def _labels(rows: NDArray[np.int64], seed: int, split_id: int) -> Labels:
    """Rows in blocks of twelve, each a permutation of the classes: any row's label is known without the others."""
    classes = len(CLASS_NAMES)
    blocks = {int(block) for block in rows // classes}
    orders = {block: np.random.default_rng([seed, split_id, block, 1]).permutation(classes) for block in blocks}
    return np.array([orders[int(row) // classes][int(row) % classes] for row in rows], dtype=np.int64)


def _draw_batch(rows: NDArray[np.int64], labels: Labels, seed: int, split_id: int) -> Images:
    drawn = np.empty((len(rows), SIZE, SIZE, 3), dtype=np.uint8)
    noise = np.empty((len(rows), SIZE, SIZE, 3), dtype=np.float32)
    light = np.empty((len(rows), 9, 1, 1, 1), dtype=np.float32)
    for position, row in enumerate(rows.tolist()):
        # One generator per row, so that any subset can be drawn alone.
        rng = np.random.default_rng([seed, split_id, row])
        drawn[position] = _draw(rng, _BY_LABEL[labels[position]])
        light[position, :, 0, 0, 0] = rng.random(9) * 2 - 1
        grains = rng.integers(0, 256, (4, SIZE, SIZE, 3), dtype=np.uint8)
        noise[position] = grains.sum(axis=0, dtype=np.int32) - 510
    return _photograph(drawn.astype(np.float32), light, noise)


def _draw(rng: np.random.Generator, sign: _Sign) -> Images:
    cells = int(rng.integers(2, 6))
    ground = rng.integers(0, 256, 3) // 2 + rng.integers(0, 128, (cells, cells, 3))
    image = Image.fromarray(ground.astype(np.uint8)).resize((_CANVAS, _CANVAS), Image.Resampling.BILINEAR)
    brush = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):
        _draw_distractor(rng, brush)
    _draw_sign(rng, brush, sign)
    return np.asarray(image.reduce(_SCALE))


def _draw_distractor(rng: np.random.Generator, brush: ImageDraw.ImageDraw) -> None:
    kind, x, y, wide, high, paint = rng.integers(0, (4, _CANVAS, _CANVAS, 40, 40, 10)).tolist()
    # Some wear the colours of a sign, so that colour alone tells little.
    palette = (RED, WHITE, BLUE, YELLOW, BLACK)
    colour = palette[paint] if paint < len(palette) else tuple(rng.integers(0, 256, 3).tolist())
    if kind == 0:
        brush.ellipse((x - wide, y - high, x + wide, y + high), fill=colour)
    elif kind == 1:
        brush.rectangle((x - wide, y - high, x + wide, y + high), fill=colour)
    elif kind == 2:
        brush.polygon((x - wide, y + high, x + wide, y + high, x, y - high), fill=colour)
    else:
        brush.polygon((x - wide, y, x - wide, y + 5, x + wide, y - high + 5, x + wide, y - high), fill=colour)


def _draw_sign(rng: np.random.Generator, brush: ImageDraw.ImageDraw, sign: _Sign) -> None:
    points = _project(rng, sign.vertices)
    rim, fill, ink = (_worn(rng, colour) for colour in (sign.rim, sign.fill, sign.ink))
    colours = (rim, fill, *[ink] * len(sign.glyph))
    start = 0
    for stop, colour in zip(sign.stops, colours, strict=True):
        brush.polygon(points[start:stop].ravel().tolist(), fill=colour)
        start = stop


def _worn(rng: np.random.Generator, colour: Colour) -> Colour:
    red, green, blue = np.clip(np.array(colour) + rng.integers(-25, 26, 3), 0, 255).tolist()
    return red, green, blue


def _project(rng: np.random.Generator, vertices: Reals) -> NDArray[np.int64]:
    """Sign plane to canvas by a random homography: scale, turn, shear, tilt, shift."""
    size, turn, shear, tilt_x, tilt_y, shift_x, shift_y = (rng.random(7) * 2 - 1).tolist()
    # tan(angle / 2) gives sine and cosine by division, which rounds alike everywhere; 0.18 is 20 degrees.
    half = 0.18 * turn
    cosine, sine = (1 - half * half) / (1 + half * half), 2 * half / (1 + half * half)
    x, y = vertices[:, 0], vertices[:, 1]
    sheared = x + 0.16 * shear * y
    depth = 1 + 0.16 * tilt_x * x + 0.16 * tilt_y * y
    radius = SIZE * (0.35 + 0.09 * size)
    u = radius * (cosine * sheared - sine * y) / depth + SIZE * (0.5 + 0.14 * shift_x)
    v = radius * (sine * sheared + cosine * y) / depth + SIZE * (0.5 + 0.14 * shift_y)
    corners: NDArray[np.int64] = np.rint(_SCALE * np.stack([u, v], axis=1)).astype(np.int64)
    return corners


def _photograph(scene: NDArray[np.float32], light: NDArray[np.float32], noise: NDArray[np.float32]) -> Images:
    """Blur, expose, shade, tint, add grain: ``scene: (N, 32, 32, 3)`` to 255, ``light: (N, 9, 1, 1, 1) in [-1, 1]``."""
    blur, gain, contrast, offset, slope_x, slope_y, red, blue, grain = (light[:, number] for number in range(9))
    scene = scene + (blur + 1) / 2 * (_blurred(scene) - scene)
    ramp = np.linspace(-1, 1, SIZE, dtype=np.float32)
    shade = 1 + (slope_x * ramp[:, None] + slope_y * ramp[:, None, None]) / 5
    cast = 1 + np.concatenate([red, np.zeros_like(red), blue], axis=3) / 8
    exposed = ((scene - 128) * (3 + contrast) / 4 + 128) * (5 + 2 * gain) / 6 + 20 * offset
    grainy = exposed * shade * cast + noise * (grain + 1) / 25
    return np.clip(np.rint(grainy), 0, 255).astype(np.uint8)


def _blurred(scene: NDArray[np.float32]) -> NDArray[np.float32]:
    """The binomial 1-2-1 kernel along rows and columns, twice."""
    for _ in range(2):
        wide = np.pad(scene, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        tall = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
        scene = (tall[:, :, :-2] + 2 * tall[:, :, 1:-1] + tall[:, :, 2:]) / 16
    return scene
