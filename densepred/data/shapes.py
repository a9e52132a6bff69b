"""Shapes: a generated panoptic data set, so that everything can be tried without downloading anything.

A scene is a landscape of up to four stuff regions with wavy borders (sky, ground, water, grass; told apart by texture, as
their hues overlap) and two to six large objects on it: rotated and textured, in colours that hint at their class and
sometimes mislead, so that the outline has to tell. Objects hide each other; some scenes have a crowd (a cluster of small
objects of one class that is annotated as one segment) and some a patch of static, which is void.
`densepred.data.shapes_files` writes scenes in the layouts of real sets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np

from densepred.data.class_tables import Category


class ShapesClass(NamedTuple):
    """A class of Shapes and the ids under which the layouts store it."""

    name: str
    isthing: bool
    color: tuple[int, int, int]
    coco_id: int
    cityscapes_id: int
    ade20k_id: int
    camvid_id: int


CLASSES = (
    ShapesClass("cross", True, (220, 20, 60), 5, 24, 90, 9),
    ShapesClass("disc", True, (0, 0, 142), 37, 26, 119, 8),
    ShapesClass("triangle", True, (255, 140, 0), 38, 25, 132, 6),
    ShapesClass("ring", True, (160, 32, 240), 60, 33, 142, 10),
    ShapesClass("square", True, (0, 200, 170), 73, 27, 41, 1),
    ShapesClass("star", True, (250, 220, 40), 85, 32, 82, 2),
    ShapesClass("water", False, (58, 120, 200), 178, 8, 21, 4),
    ShapesClass("sky", False, (150, 205, 240), 187, 23, 2, 0),
    ShapesClass("grass", False, (90, 160, 60), 193, 22, 9, 5),
    ShapesClass("ground", False, (170, 130, 90), 194, 7, 13, 3),
)
"""Things, then stuff, each by ascending COCO id, as `CocoPanoptic` orders the classes of a file."""

CATEGORIES: tuple[Category, ...] = tuple((c.coco_id, c.name, c.isthing, c.color) for c in CLASSES)
THINGS = tuple(c.name for c in CLASSES if c.isthing)
RING_HOLE = 0.52
"""Inner radius of a ring by its outer one."""
MIN_INSIDE = 0.75
"""Share of an object that lies inside the image."""
MIN_VISIBLE = 0.4
"""Share of an object that later ones leave visible."""
MIN_STUFF = 0.003
"""Stuff smaller than this share of the image is void."""
ANY_HUE = 0.15
"""Share of objects whose colour says nothing about their class."""
HUE_SPREAD = 25.0
"""Standard deviation in degrees of the other objects' hue around that of their class; hues are 60 degrees apart."""
FAR = 1e3


@dataclass(frozen=True)
class Scene:
    """A generated image and its panoptic segmentation.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) int32 segment numbers, 0 = void.
        segments: number -> (name of the class, is a crowd).
        polygons: (name, is a crowd, (n, 2) float xy in pixels) from back to front, hidden parts included; the name of
            void is "void".
    """

    image: np.ndarray
    ids: np.ndarray
    segments: dict[int, tuple[str, bool]]
    polygons: list[tuple[str, bool, np.ndarray]]


class _Canvas:
    """The scene while it is being painted; every layer is a signed distance (negative inside) and a texture."""

    def __init__(self, height: int, width: int) -> None:
        self.image = np.zeros((height, width, 3), np.float32)
        self.ids = np.zeros((height, width), np.int32)
        self.segments: dict[int, tuple[str, bool]] = {}
        self.areas: dict[int, int] = {}
        self.polygons: list[tuple[str, bool, np.ndarray]] = []

    def add(
        self, distance: np.ndarray, texture: np.ndarray, name: str, iscrowd: bool = False, shadow: float = 0
    ) -> None:
        """Paint a layer: distance (H, W) in pixels, texture (H, W, 3) in 0..1, shadow its offset in pixels."""
        if shadow:
            self.image *= 1 - 0.45 * _soft_shadow(distance, shadow)
        alpha = np.clip(0.5 - distance, 0, 1)[..., None]
        self.image += alpha * (texture - self.image)
        number = 0
        if name != "void":
            number = len(self.segments) + 1
            self.segments[number] = (name, iscrowd)
            self.areas[number] = int((distance < 0).sum())
        self.ids[distance < 0] = number

    def leaves_others_visible(self, distance: np.ndarray) -> bool:
        """Return whether every object so far would stay visible under another layer."""
        left = np.bincount(self.ids[distance >= 0], minlength=len(self.segments) + 1)
        objects = (number for number, (name, _) in self.segments.items() if name in THINGS)
        return all(left[number] >= MIN_VISIBLE * self.areas[number] for number in objects)


def make_scene(rng: np.random.Generator, height: int = 128, width: int = 160) -> Scene:
    """Draw one scene; the same generator state gives the same bytes.

    Args:
        rng: source of all randomness.
        height, width: pixels, at least 32 each.
    """
    if min(height, width) < 32:
        raise ValueError(f"a scene of {height} x {width} pixels is too small; height and width start at 32")
    canvas = _Canvas(height, width)
    _paint_stuff(canvas, rng)
    if rng.random() < 0.25:
        _place(canvas, rng, _crowd)
    for _ in range(rng.integers(2, 7)):
        _place(canvas, rng, _object)
    if rng.random() < 0.4:
        _place(canvas, rng, _static)
    ids, segments = _without_slivers(canvas.ids, canvas.segments)
    image = canvas.image * rng.uniform(0.8, 1.1) + rng.normal(0, 0.018, canvas.image.shape)
    return Scene((np.clip(image, 0, 1) * 255).astype(np.uint8), ids, segments, canvas.polygons)


def _without_slivers(ids: np.ndarray, segments: dict) -> tuple[np.ndarray, dict]:
    """Drop segments that are hidden and make tiny rests of stuff void."""
    areas = np.bincount(ids.ravel(), minlength=len(segments) + 1)
    least = {number: 1 if name in THINGS else MIN_STUFF * ids.size for number, (name, _) in segments.items()}
    kept = {number: segments[number] for number in segments if areas[number] >= least[number]}
    return np.where(np.isin(ids, list(kept)), ids, 0).astype(np.int32), kept


# Stuff: regions one below the other, then a pond or a field as a blob.


def _paint_stuff(canvas: _Canvas, rng: np.random.Generator) -> None:
    height, width = canvas.ids.shape
    ys, xs = _grid(height, width)
    lower = list(rng.permutation(["grass", "ground", "water"]))
    horizon = rng.uniform(0.25, 0.5) * height
    border = rng.uniform(0.6, 0.8) * height
    layers = [("sky", np.full_like(ys, -FAR)), (lower[0], horizon + _wave(rng, width, 0.04 * height) - ys)]
    if rng.random() < 0.75:
        layers.append((lower[1], border + _wave(rng, width, 0.07 * height) - ys))
    if rng.random() < 0.6:
        centre = rng.uniform((0.1, 0.55), (0.9, 0.9)) * (width, height)
        layers.append(
            (lower[2], _blob_distance(rng, xs - centre[0], (ys - centre[1]) * 2, rng.uniform(0.2, 0.34) * width))
        )
    for name, distance in layers:
        canvas.add(distance, _STUFF_TEXTURES[name](rng, height, width), name)
        canvas.polygons.extend((name, False, outline) for outline in _outlines(distance < 0))


def _sky(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    top = np.array([[0.25, 0.5, 0.9], [0.35, 0.4, 0.62], [0.5, 0.56, 0.62]])[rng.integers(3)]
    bottom = np.array([[0.75, 0.88, 1.0], [1.0, 0.72, 0.5], [0.85, 0.87, 0.9]])[rng.integers(3)]
    ramp = np.linspace(0, 1.6, height)[:, None, None].clip(0, 1)
    clouds = np.clip(_noise(rng, height, width, 0.12, 0.3) * 2.2 - 1.1, 0, 0.8)[..., None]
    sky = top * (1 - ramp) + bottom * ramp
    return sky + clouds * (0.97 - sky)


def _water(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    color = np.array([[0.12, 0.4, 0.7], [0.1, 0.5, 0.55], [0.3, 0.42, 0.52]])[rng.integers(3)]
    ripples = 0.6 * _noise(rng, height, width, 0.02, 0.2) + 0.4 * _noise(rng, height, width, 0.012, 0.08)
    return color * (0.55 + 0.7 * ripples[..., None]) + 0.5 * np.clip(ripples - 0.62, 0, 1)[..., None] * 2


def _grass(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    color = np.array([[0.3, 0.55, 0.16], [0.52, 0.55, 0.2], [0.16, 0.42, 0.22]])[rng.integers(3)]
    blades = 0.7 * _noise(rng, height, width, 0.06, 0.008) + 0.3 * _noise(rng, height, width, 0.2, 0.2)
    return color * (0.45 + 1.0 * blades[..., None])


def _ground(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    color = np.array([[0.62, 0.46, 0.3], [0.78, 0.68, 0.48], [0.52, 0.5, 0.48]])[rng.integers(3)]
    patches = 0.75 + 0.4 * _noise(rng, height, width, 0.07, 0.07)
    pebbles = np.where(_noise(rng, height, width, 0.016, 0.016) > 0.72, 0.65, 1.0)
    return color * (patches * pebbles)[..., None]


_STUFF_TEXTURES: dict[str, Callable] = {"sky": _sky, "water": _water, "grass": _grass, "ground": _ground}


# Objects. A maker draws one from a generator: its distance, its texture and how to add it.


def _place(canvas: _Canvas, rng: np.random.Generator, make: Callable, tries: int = 12) -> None:
    """Add what ``make`` draws at the first place where it lies inside and leaves the others visible; else nothing."""
    for _ in range(tries):
        distance, full_area, paint = make(rng, *canvas.ids.shape)
        inside = (distance < 0).sum()
        if inside >= MIN_INSIDE * full_area and canvas.leaves_others_visible(distance):
            paint(canvas)
            return


def _object(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, float, Callable]:
    name = THINGS[rng.integers(len(THINGS))]
    radius = rng.uniform(0.13, 0.27) * min(height, width)
    centre = rng.uniform((0, 0.1), (1, 1)) * (width, height)
    distance, outline = _shape(name, centre, radius, rng.uniform(0, 2 * np.pi), height, width)

    def paint(canvas: _Canvas) -> None:
        canvas.add(distance, _object_texture(rng, distance, radius, name), name, shadow=0.16 * radius)
        canvas.polygons.append((name, False, outline))

    return distance, _polygon_area(outline), paint


def _crowd(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, float, Callable]:
    name, side = THINGS[rng.integers(len(THINGS))], min(height, width)
    centre = rng.uniform((0.15, 0.25), (0.85, 0.85)) * (width, height)
    members = []
    for _ in range(rng.integers(9, 15)):
        radius = rng.uniform(0.04, 0.06) * side
        place = centre + rng.normal(0, (0.13 * side, 0.07 * side))
        members.append((*_shape(name, place, radius, rng.uniform(0, 2 * np.pi), height, width), radius))
    union = np.min([distance for distance, _, _ in members], axis=0)

    def paint(canvas: _Canvas) -> None:
        texture = canvas.image.copy()
        for distance, _, radius in members:
            texture *= 1 - 0.3 * _soft_shadow(distance, 0.3 * radius)
            alpha = np.clip(0.5 - distance, 0, 1)[..., None]
            texture += alpha * (_object_texture(rng, distance, radius, name) - texture)
        canvas.add(union, texture, name, iscrowd=True, shadow=0.01 * side)
        canvas.polygons.extend((name, True, outline) for _, outline, _ in members)

    # Members may overlap, so that the full area is not known: ask for half of their sum.
    return union, 0.5 * sum(_polygon_area(outline) for _, outline, _ in members), paint


def _static(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, float, Callable]:
    ys, xs = _grid(height, width)
    centre = rng.uniform(0, 1, 2) * (width, height)
    distance = _blob_distance(rng, xs - centre[0], ys - centre[1], rng.uniform(0.07, 0.15) * min(height, width))

    def paint(canvas: _Canvas) -> None:
        canvas.add(distance, np.repeat(rng.random((height, width, 1)), 3, axis=2) * 0.8 + 0.1, "void")
        canvas.polygons.extend(("void", False, outline) for outline in _outlines(distance < 0))

    return distance, 1, paint


def _object_texture(rng: np.random.Generator, distance: np.ndarray, radius: float, name: str) -> np.ndarray:
    """Two colours in one of five patterns, shaded from one side, with a dark rim; black away from the object."""
    height, width = distance.shape
    near = _window(distance < 1)
    ys, xs = (coordinate[near] for coordinate in _grid(height, width))
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.35, 0.7) * radius
    along = (xs * np.cos(angle) + ys * np.sin(angle)) * (2 * np.pi / period)
    across = (ys * np.cos(angle) - xs * np.sin(angle)) * (2 * np.pi / period)
    kind = rng.integers(5)
    if kind == 0:
        pattern = _noise(rng, height, width, 0.05, 0.05)[near]
    elif kind == 1:
        pattern = np.sin(along) > 0
    elif kind == 2:
        pattern = np.sin(along) * np.sin(across) > 0
    elif kind == 3:
        pattern = np.cos(along) + np.cos(across) > 0.7
    else:
        pattern = np.zeros_like(xs)
    first = _random_color(rng, _class_hue(rng, name))
    second = first * rng.uniform(0.45, 0.75) if rng.random() < 0.5 else 0.5 * (first + _random_color(rng))
    shade = 1 + 0.12 * np.sin(along * period / (4 * radius))
    rim = np.clip(-distance[near] / (0.08 * radius + 1), 0.45, 1)
    mixed = first + (second - first) * np.asarray(pattern, np.float32)[..., None]
    texture = np.zeros((height, width, 3))
    texture[near] = (mixed * (shade * rim)[..., None]).clip(0, 1)
    return texture


def _class_hue(rng: np.random.Generator, name: str) -> float:
    """Return a hue in degrees: usually near that of the class, as with things in photographs, sometimes any."""
    if rng.random() < ANY_HUE:
        return rng.uniform(0, 360)
    return (360 / len(THINGS) * THINGS.index(name) + rng.normal(0, HUE_SPREAD)) % 360


def _random_color(rng: np.random.Generator, hue: float | None = None) -> np.ndarray:
    hue = rng.uniform(0, 360) if hue is None else hue
    hsv = np.array([[[hue, rng.uniform(0.4, 1), rng.uniform(0.55, 1)]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]


# Geometry: signed distances in pixels, negative inside.


def _shape(
    name: str, centre: np.ndarray, radius: float, angle: float, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the signed distance (H, W) of a shape and its outline (n, 2) xy; a ring's outline enters its hole."""
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    outline = _UNIT_OUTLINES[name] @ rotation * radius + centre  # (n, 2)
    ys, xs = _grid(height, width)
    xs, ys = xs - centre[0], ys - centre[1]
    if name in ("disc", "ring"):
        distance = np.hypot(xs, ys) - radius
        return (np.maximum(distance, -distance - (1 - RING_HOLE) * radius) if name == "ring" else distance), outline
    # Distances are needed near the shape only.
    distance = np.full((height, width), FAR, np.float32)
    near = (np.abs(xs) < 1.5 * radius + 2) & (np.abs(ys) < 1.5 * radius + 2)
    distance[near] = _polygon_distance(outline - centre, xs[near], ys[near])
    return distance, outline


def _polygon_distance(points: np.ndarray, xs: np.ndarray, ys: np.ndarray) -> np.ndarray:
    """Signed distance of the places (n,) to a polygon (m, 2)."""
    squared, inside = np.full(xs.shape, np.inf), np.zeros(xs.shape, bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        dx, dy, px, py = x1 - x0, y1 - y0, xs - x0, ys - y0
        t = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        squared = np.minimum(squared, (px - t * dx) ** 2 + (py - t * dy) ** 2)
        crosses = (ys < y0) != (ys < y1)
        inside ^= crosses & (px * (dy or 1) < py * dx) if dy > 0 else crosses & (px * (dy or 1) > py * dx)
    return np.where(inside, -1, 1) * np.sqrt(squared)


def _polygon_area(points: np.ndarray) -> float:
    x, y = points.T
    return 0.5 * abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1))))


def _star_points(count: int, inner: float) -> np.ndarray:
    angles = np.arange(2 * count) * np.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.where(np.arange(2 * count) % 2, inner, 1)[:, None]


def _circle_points(count: int = 40) -> np.ndarray:
    angles = np.arange(count) * 2 * np.pi / count
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _ring_points() -> np.ndarray:
    outer = np.concatenate([_circle_points(), _circle_points()[:1]])
    return np.concatenate([outer, outer[::-1] * RING_HOLE])


def _cross_points(half: float = 0.33) -> np.ndarray:
    corner = np.array([[1, -half], [1, half], [half, half]])
    quarter = np.array([[0, 1], [-1, 0]])
    return np.concatenate([corner @ np.linalg.matrix_power(quarter, k) for k in range(4)]) * 0.95


_UNIT_OUTLINES = {
    "disc": _circle_points(),
    "square": np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * 0.82,
    "triangle": _circle_points(3) * 1.15,
    "star": _star_points(5, 0.45) * 1.15,
    "ring": _ring_points(),
    "cross": _cross_points(),
}


def _blob_distance(rng: np.random.Generator, xs: np.ndarray, ys: np.ndarray, radius: float) -> np.ndarray:
    """Rough signed distance to a circle around the origin with a wavy border."""
    angle = np.arctan2(ys, xs)
    waves = sum(rng.uniform(0.03, 0.1) * np.sin(k * angle + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 5))
    return np.hypot(xs, ys) - radius * (1 + waves)


def _wave(rng: np.random.Generator, width: int, amplitude: float) -> np.ndarray:
    """Return a random smooth curve (width,) around 0."""
    x = np.linspace(0, 2 * np.pi, width)
    return amplitude * sum(np.sin(k * rng.uniform(0.5, 1.2) * x + rng.uniform(0, 6.28)) / k for k in (1, 2, 4))


def _noise(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Return smooth noise (H, W) in 0..1 whose cells measure these shares of the smaller side."""
    side = min(height, width)
    rows, columns = (max(2, round(n / max(cell * side, 1))) for n, cell in ((height, cell_y), (width, cell_x)))
    coarse = rng.random((rows, columns), dtype=np.float32)
    return np.clip(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def _soft_shadow(distance: np.ndarray, offset: float) -> np.ndarray:
    """Return (H, W, 1) in 0..1: the shape moved right and down by ``offset`` pixels and blurred."""
    solid = np.clip(0.5 - distance, 0, 1).astype(np.float32)
    move = np.array([[1, 0, offset], [0, 1, offset]], np.float32)
    moved = cv2.warpAffine(solid, move, solid.shape[::-1])
    return cv2.GaussianBlur(moved, (0, 0), max(0.8 * offset, 0.5))[..., None]


def _outlines(mask: np.ndarray) -> list[np.ndarray]:
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return [contour[:, 0].astype(float) for contour in contours if len(contour) >= 3]


def _window(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the slices of the box around the True pixels; all where there is none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return slice(None), slice(None)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


@lru_cache(maxsize=4)
def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels' rows and columns, (H, W) float32 each."""
    ys, xs = np.mgrid[:height, :width].astype(np.float32)
    ys.flags.writeable = xs.flags.writeable = False  # shared by all callers
    return ys, xs
