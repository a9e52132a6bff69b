"""Masks of overlapping polygons: how the writers of CenterPoly v2 turn detections into instance masks, and plain filling.

Jodogne-del Litto and Bilodeau, "Real-time instance segmentation with polygons using an Intersection-over-Union loss" (2023);
the rules follow the writers of https://github.com/KatiaJDL/CenterPoly-v2, pixel by pixel (`RULES` lists them). Theirs fill
one frame a polygon and draw a circle a pixel of the outline; here everything stays inside the polygon's box.

Coordinates are image pixels, x before y, pixel centres at whole numbers. What no rule of theirs covers:

* a vertex that is not finite: the polygon has no mask and is not kept;
* a vertex beyond +-`REACH`: it is moved there; only what lies in the image counts;
* an outline that crosses itself: even-odd;
* fewer than three distinct vertices: what is drawn of them, a stroke under ``cityscapes``, at most a dot under ``kitti``
  and ``idd``, a line or a dot under ``each``.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from densepred.ops.polygon_fill import fill_polygon

REACH = 32767
"""Largest coordinate in pixels."""
OCCLUDER_SCORE = 0.5
"""From this score on a detection hides what lies behind it."""
RADIUS = 2
STAMP = np.array(
    [(dx, dy) for dy in range(-RADIUS, RADIUS + 1) for dx in range(-RADIUS, RADIUS + 1) if abs(dx * dy) < 4]
)
"""(21, 2) pixels of Pillow's filled circle of `RADIUS`."""
DECIMALS = 2
"""Of the coordinates in every result file."""


class Rule(NamedTuple):
    """How overlapping polygons share the pixels of an image.

    Attributes:
        inclusive: whether a score equal to the threshold passes.
        occlusion: whether nearer detections hide farther ones.
        by_class: whether only those of one class hide each other.
        thick: whether a circle is drawn on every pixel of the outline (otherwise the outline is taken off the mask, not off
            what it hides).
        min_pixels: smallest mask that is kept.
    """

    inclusive: bool = False
    occlusion: bool = True
    by_class: bool = False
    thick: bool = False
    min_pixels: int = 0


RULES = {
    "cityscapes": Rule(thick=True, min_pixels=101),
    "kitti": Rule(by_class=True),
    "idd": Rule(by_class=True, inclusive=True),
    "each": Rule(occlusion=False, min_pixels=1),
}
"""``each`` fills every polygon by itself, see `densepred.ops.polygon_fill.fill_polygon`."""


class Box(NamedTuple):
    """A window of the image: rows [top, bottom), columns [left, right)."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.top, self.bottom), slice(self.left, self.right)


def compose_masks(
    polygons: Tensor,
    scores: Tensor,
    depths: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    rule: str = "cityscapes",
    score_threshold: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """Turn detected polygons into masks, the nearest first.

    Under a rule with occlusion a mask loses the pixels of every nearer detection whose score is at least `OCCLUDER_SCORE`;
    of equal depths the lower class, then the earlier detection is the nearer one, and a depth that is no number is the
    farthest.

    Args:
        polygons: (N, V, 2) vertices x, y in pixels of the image; may be empty.
        scores: (N,) 0..1.
        depths: (N,) pseudo depths, lower = nearer; ``each`` does not look at them.
        labels: (N,) classes.
        size: (H, W) of the image.
        rule: a key of `RULES`.
        score_threshold: detections must exceed it (``idd``: reach it).

    Returns:
        masks: (N, H, W) bool in the order given, on the device of ``polygons``; empty for those that are not kept.
        kept: (N,) bool, the detections that the rule writes; under ``kitti`` and ``idd`` their masks may be empty.

    Raises:
        ValueError: the rule is unknown, or ``polygons`` has another form.
    """
    if rule not in RULES:
        raise ValueError(f"compose rule {rule!r} is unknown; choose among {', '.join(RULES)}")
    if polygons.ndim != 3 or polygons.shape[1] < 3 or polygons.shape[2] != 2:
        raise ValueError(f"polygons are (N, V, 2) vertices, V >= 3, not {tuple(polygons.shape)}")
    how = RULES[rule]
    vertices = polygons.detach().cpu().double().numpy()
    confidence, depth, classes = (t.detach().cpu().double().numpy() for t in (scores, depths, labels))
    passed = (confidence >= score_threshold) if how.inclusive else (confidence > score_threshold)
    passed &= np.isfinite(vertices).all(axis=(1, 2))
    vertices = np.clip(np.where(passed[:, None, None], vertices, 0), -REACH, REACH)
    groups = classes if how.by_class else np.zeros(len(classes))
    order = [n for n in np.lexsort((classes, depth, groups)) if passed[n]]
    if how.occlusion:
        masks = _front_to_back(whole_pixels(vertices), confidence >= OCCLUDER_SCORE, groups, order, size, how.thick)
    else:
        masks = _each(round_coordinates(vertices), order, size)
    for n in order:
        box = _clipped_box(vertices[n], size)
        own = masks[n][box.slices] if box else masks[n, :0]
        if np.count_nonzero(own) < how.min_pixels:
            passed[n] = own[...] = False
    return torch.from_numpy(masks).to(polygons.device), torch.from_numpy(passed).to(polygons.device)


def depth_order(instances: Mapping[str, Tensor]) -> list[int]:
    """Return the numbers of detections, the nearest first, by ``depths`` (N,) and ``labels`` (N,) as `compose_masks` has it."""
    return np.lexsort([instances[name].cpu().numpy() for name in ("labels", "depths")]).tolist()


def whole_pixels(vertices: np.ndarray) -> np.ndarray:
    """Return coordinates as the writers cut them: rounded to `DECIMALS`, then truncated towards zero; int64."""
    nearest = np.rint(vertices)
    # Exact, unlike rounding by a product: a decimal rounding ends on a whole number within half of its last digit.
    up = np.abs(vertices - nearest) <= 0.5 * 10.0**-DECIMALS
    return np.where(up, nearest, np.trunc(vertices)).astype(np.int64)


def round_coordinates(vertices: np.ndarray) -> np.ndarray:
    """Return coordinates as result files hold them: float64 of `DECIMALS` decimals."""
    return np.round(vertices.astype(np.float64), DECIMALS) + 0.0  # no -0.0


def outline_pixels(cells: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Walk along the closed outlines of polygons by Bresenham's algorithm.

    Args:
        cells: (N, V, 2) integer vertices.
        size: (H, W); the walk leaves out what lies more than `RADIUS` pixels outside.

    Returns:
        pixels: (P, 2) integer x, y, all outlines one after the other.
        starts: (N + 1,) where each of them begins, and the end of the last.
    """
    count, per_polygon = len(cells), cells.shape[1]
    begin = cells.reshape(-1, 2)  # (E, 2)
    step = np.roll(cells, -1, axis=1).reshape(-1, 2) - begin
    length = np.abs(step).max(axis=1)  # (E,) steps along the longer axis
    edge = np.arange(len(begin))
    longer = np.abs(step).argmax(axis=1)
    start, sign = begin[edge, longer], np.where(step[edge, longer] < 0, -1, 1)
    limit = np.array([size[1], size[0]])[longer] - 1 + RADIUS
    first = np.maximum(0, np.where(sign > 0, -RADIUS - start, start - limit))
    last = np.minimum(length, np.where(sign > 0, limit - start, start + RADIUS))
    runs = np.maximum(0, last - first + 1)  # (E,)
    ends = np.cumsum(runs)
    edge = np.repeat(edge, runs)  # (P,)
    t = np.arange(len(edge)) - (ends - runs)[edge] + first[edge]
    moved = (2 * np.abs(step)[edge] * t[:, None] + length[edge, None]) // np.maximum(1, 2 * length)[edge, None]
    pixels = begin[edge] + np.sign(step)[edge] * moved  # (P, 2)
    starts = np.concatenate([[0], ends])[: count * per_polygon + 1 : per_polygon]
    return pixels, starts


def _front_to_back(
    cells: np.ndarray, hides: np.ndarray, groups: np.ndarray, order: list[int], size: tuple[int, int], thick: bool
) -> np.ndarray:
    """Fill polygons (N, V, 2) in an order, each less what hiding ones of its group have claimed; (N, H, W) bool."""
    masks = np.zeros((len(cells), *size), bool)  # untouched pages cost nothing
    canvas = Image.new("L", (size[1], size[0]), 0)
    claimed, group = np.zeros(size, bool), None
    pixels, starts = outline_pixels(cells, size) if thick else (None, None)
    for n in order:
        if groups[n] != group:
            claimed, group = (claimed if group is None else np.zeros(size, bool)), groups[n]
        box = _clipped_box(cells[n], size)
        if box is None:
            continue
        filled = _fill(canvas, cells[n], box)
        if thick:
            shape = filled = filled | _circles(pixels[starts[n] : starts[n + 1]], box)
        else:
            shape = _fill(canvas, cells[n], box, outline=0)
        np.greater(shape, claimed[box.slices], out=masks[n][box.slices])  # in the shape and not claimed
        if hides[n]:
            claimed[box.slices] |= filled
    return masks


def _fill(canvas: Image.Image, cells: np.ndarray, box: Box, outline: int | None = None) -> np.ndarray:
    """Fill a polygon as Pillow does on an empty canvas, left empty again; (h, w) bool inside the box.

    The canvas has the image's size, since Pillow's rounding depends on where in the image an edge lies.
    """
    ImageDraw.Draw(canvas).polygon(cells.ravel().tolist(), outline=outline, fill=1)
    filled = np.asarray(canvas.crop(box)).view(bool)
    canvas.paste(0, box)
    return filled


def _circles(pixels: np.ndarray, box: Box) -> np.ndarray:
    """Draw a filled circle on each pixel (P, 2); (h, w) bool inside the box."""
    height, width = box.bottom - box.top, box.right - box.left
    margin = 2 * RADIUS  # pixels up to one radius outside the box reach into it, and one more may be drawn
    x, y = pixels[:, 0] - box.left, pixels[:, 1] - box.top
    near = (x >= -RADIUS) & (x < width + RADIUS) & (y >= -RADIUS) & (y < height + RADIUS)
    stride = width + 2 * margin
    area = np.zeros((height + 2 * margin, stride), bool)
    places = (y[near] + margin) * stride + x[near] + margin
    area.reshape(-1)[places[:, None] + (STAMP[:, 1] * stride + STAMP[:, 0])] = True
    return area[margin : margin + height, margin : margin + width]


def _clipped_box(points: np.ndarray, size: tuple[int, int]) -> Box | None:
    """Return the box of points (V, 2), widened by the circles, inside the image; ``None`` if nothing of it is there."""
    left, top = np.maximum(np.floor(points.min(axis=0)).astype(int) - RADIUS, 0).tolist()
    right, bottom = np.minimum(np.ceil(points.max(axis=0)).astype(int) + RADIUS + 1, (size[1], size[0])).tolist()
    return Box(left, top, right, bottom) if left < right and top < bottom else None


def _each(vertices: np.ndarray, order: list[int], size: tuple[int, int]) -> np.ndarray:
    """Fill every polygon (N, V, 2) by itself; (N, H, W) bool."""
    masks = np.zeros((len(vertices), *size), bool)
    for n in order:
        window, inside = fill_polygon(vertices[n], size)
        masks[n][window] = inside
    return masks
