"""Choosing the vertices of an object's polygon from its outline or its mask.

Three selections of CenterPoly (Perreault et al., CRV 2021; facts from KatiaJDL/CenterPoly-v2, ``create_annotations.py``). Two
walk over the pixels of a mask from outside until they meet the object; they make one star-like polygon around all parts of
an object. All coordinates are pixels of the image, xy, y down; polygons run clockwise on the screen, from the top left.
"""

import math

import cv2
import numpy as np
from PIL import Image, ImageDraw

SELECTIONS = ("regular_interval", "grid_based", "real_points")


def from_mask(mask: np.ndarray, box: np.ndarray, num_vertices: int, selection: str) -> np.ndarray | None:
    """Return the polygon (V, 2) float64 of an object by its mask, or None for one that is a single row or column.

    Args:
        mask: (h, w) bool with a pixel, the part of the object's mask inside box and image.
        box: (4,) xyxy of the first and the last pixels, see `regular_interval`.
        num_vertices: V.
        selection: one of `SELECTIONS`; ``real_points`` takes the outline of the largest part.
    """
    if (box[2:] <= box[:2]).any():
        return None
    if selection == "real_points":
        outline = mask_outline(mask)
        return from_outline(outline + box[:2], mask.shape, num_vertices, selection) if len(outline) > 2 else None
    walk = regular_interval if selection == "regular_interval" else grid_based
    return (walk(mask, box, num_vertices) + corner(box)).astype(np.float64)


def from_outline(outline: np.ndarray, size: tuple[int, int], num_vertices: int, selection: str) -> np.ndarray | None:
    """Return the polygon (V, 2) float64 of an object by its outline (P, 2) in an image of this (H, W).

    None for an outline of fewer than three points, with all of them on one line, or outside the image.
    """
    if len(outline) < 3 or not spans_area(outline[None])[0]:
        return None
    if selection == "real_points":
        return real_points(clockwise(outline), num_vertices)
    mask, box = outline_mask(outline, size)
    return from_mask(mask, box, num_vertices, selection) if mask.size else None


def mirrored_first(polygons: np.ndarray, selection: str) -> np.ndarray:
    """Return (N,) int64: which vertex of each polygon (N, V, 2) comes first once the image is mirrored and the order reversed.

    It is the one that lies top right now, so that the mirrored polygon has the order its selection would have given it.
    """
    count, vertices = polygons.shape[:2]
    if selection == "real_points":
        top_right = np.stack([polygons[..., 0].max(1), polygons[..., 1].min(1)], -1)  # (N, 2)
        return np.linalg.norm(polygons - top_right[:, None], axis=-1).argmin(1)
    first = vertices // 4 if selection == "regular_interval" else vertices // 2 - 1
    return np.full(count, first, np.int64)


def regular_interval(mask: np.ndarray, box: np.ndarray, num_vertices: int) -> np.ndarray:
    """Walk from points at equal distances on the box to its centre; the first pixels of the object are the vertices.

    A quarter of the points lies on each side. A walk that meets nothing ends at the box's centre.

    Args:
        mask: (h, w) bool, the part of the object's mask inside box and image.
        box: (4,) xyxy of the first and the last pixels; it may reach beyond the image, as annotations may.
        num_vertices: V, a multiple of 4.

    Returns:
        (V, 2) int64, relative to `corner`, where the mask begins.
    """
    x0, y0, x1, y1 = np.trunc(box)
    steps = np.arange(num_vertices // 4)  # (V/4,)
    across, down = (steps * ((box[i + 2] - box[i]) / len(steps)) for i in (0, 1))
    fixed = np.zeros(len(steps))
    # Rounded as positions in the image: halves go to the even pixel.
    xs = np.rint(np.concatenate([box[0] + across, fixed + x1, box[2] - across, fixed + x0]))
    ys = np.rint(np.concatenate([fixed + y0, box[1] + down, fixed + y1, box[3] - down]))
    centre = (box[:2] + (box[2:] - box[:2]) / 2).astype(np.int64)
    starts = np.stack([xs, ys], -1).astype(np.int64)  # (V, 2)
    return first_hits(mask, starts - corner(box), np.broadcast_to(centre - corner(box), starts.shape))


def grid_based(mask: np.ndarray, box: np.ndarray, num_vertices: int) -> np.ndarray:
    """Walk along V/2 vertical lines, from above in turn to the right, then from below in turn to the left.

    A walk that meets nothing ends at the box's other side. Arguments and result as of `regular_interval`; V even.
    """
    xs = np.rint(np.linspace(box[0] + 1, box[2] - 1, num_vertices // 2)).astype(np.int64)  # (V/2,)
    above, below = (np.stack([xs, np.full_like(xs, box[side])], -1) for side in (1, 3))
    starts, ends = np.concatenate([above, below[::-1]]), np.concatenate([below, above[::-1]])  # (V, 2)
    return first_hits(mask, starts - corner(box), ends - corner(box))


def box_of(points: np.ndarray) -> np.ndarray:
    """Return the box (4,) xyxy of points (P, 2), P >= 1."""
    return np.concatenate([points.min(0), points.max(0)])


def corner(box: np.ndarray) -> np.ndarray:
    """Return (2,) int64, the first pixel of the image that a box (4,) xyxy holds."""
    return np.maximum(box[:2], 0).astype(np.int64)


def first_hits(mask: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the first True pixel (V, 2) xy on each Bresenham line, or its last pixel where there is none.

    Args:
        mask: (h, w) bool; pixels of a line outside it are moved to its border.
        starts: (V, 2) int64 xy.
        ends: (V, 2) int64 xy.
    """
    delta = ends - starts
    length = np.abs(delta)
    long, short = length.max(1), length.min(1)  # (V,)
    step = np.minimum(np.arange(long.max() + 1), long[:, None])  # (V, L)
    minor = (2 * short[:, None] * step + long[:, None]) // np.maximum(2 * long, 1)[:, None]
    steep = (length[:, 1] >= length[:, 0])[:, None]
    xs = starts[:, :1] + np.sign(delta[:, :1]) * np.where(steep, minor, step)
    ys = starts[:, 1:] + np.sign(delta[:, 1:]) * np.where(steep, step, minor)
    # np.clip takes longer than the walk of a small object.
    xs, ys = (np.minimum(np.maximum(at, 0), mask.shape[axis] - 1) for at, axis in ((xs, 1), (ys, 0)))
    hit = mask[ys, xs]  # (V, L)
    hit[:, -1] = True
    rows, first = np.arange(len(hit)), hit.argmax(1)
    return np.stack([xs[rows, first], ys[rows, first]], -1)


def real_points(outline: np.ndarray, num_vertices: int, start: np.ndarray | None = None) -> np.ndarray:
    """Thin out or refine an outline to V vertices.

    While there are too many, the first vertex of the shortest edge goes; while too few, the longest edge gets its middle,
    rounded towards zero. The closing edge never counts.

    Args:
        outline: (P, 2) xy.
        num_vertices: V.
        start: (2,) the vertex nearest to it comes first; ``None``: the top left corner of the outline's box. The published
            annotations used (x0, x1) of the box, by mistake.
    """
    start = outline.min(0) if start is None else start
    vertices = _refine(_thin(outline.astype(np.float64), num_vertices), num_vertices)  # (V, 2)
    return np.roll(vertices, -int(np.linalg.norm(vertices - start, axis=1).argmin()), axis=0)


def _thin(points: np.ndarray, count: int) -> np.ndarray:
    """Delete the first vertex of the shortest edge of (P, 2) points until no more than ``count`` are left."""
    edges = np.append(np.linalg.norm(np.diff(points, axis=0), axis=1), np.inf)  # (P,), each at its first vertex
    before, after = list(range(-1, len(points) - 1)), list(range(1, len(points) + 1))
    kept, places = np.ones(len(points), bool), points.tolist()
    for _ in range(len(points) - count):
        i = int(edges.argmin())
        previous, following = before[i], after[i]
        kept[i], edges[i], before[following] = False, np.inf, previous
        if previous >= 0:
            after[previous], edges[previous] = following, math.dist(places[previous], places[following])
    return points[kept]


def _refine(points: np.ndarray, count: int) -> np.ndarray:
    """Insert the middle of the longest edge of (P, 2) points until there are ``count``."""
    while len(points) < count:
        # Among equal edges NumPy's sort decides, as it did for the published annotations; it may vary with the processor.
        i = int(np.linalg.norm(np.diff(points, axis=0), axis=1).argsort()[-1])
        points = np.insert(points, i + 1, np.trunc((points[i] + points[i + 1]) / 2), axis=0)
    return points


def clockwise(outline: np.ndarray) -> np.ndarray:
    """Return the outline (P, 2) so that it runs clockwise on the screen."""
    x, y = outline.T
    area = np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y)
    return outline if area >= 0 else outline[::-1]


def outline_mask(outline: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw an outline, filled but without its own line, as the published annotations were made.

    Args:
        outline: (P, 2) xy, P >= 3; it may leave the image.
        size: (H, W) of the image.

    Returns:
        The mask (h, w) bool of the part of the outline's box that lies inside the image, empty where none does, and the box
        (4,) xyxy.
    """
    box = box_of(outline)
    first = corner(box)
    columns, rows = np.minimum(box[2:].astype(np.int64) + 1, size[::-1]) - first
    if columns < 1 or rows < 1:
        return np.zeros((0, 0), bool), box
    picture = Image.new("L", (int(columns), int(rows)), 0)
    points = outline.astype(np.int64) - first
    ImageDraw.Draw(picture).polygon([tuple(point) for point in points.tolist()], outline=0, fill=1)
    return np.asarray(picture, bool), box


def mask_outline(mask: np.ndarray) -> np.ndarray:
    """Return the outline (P, 2) float64 of the largest part of a mask (h, w) that has a pixel, relative to its corner."""
    parts, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    return max(parts, key=cv2.contourArea)[:, 0].astype(np.float64)


def spans_area(polygons: np.ndarray) -> np.ndarray:
    """Return (N,) bool: whether the vertices of each polygon (N, V, 2) do not all lie on one line."""
    relative = (polygons - polygons[:, :1]).astype(np.float64)
    rows = np.arange(len(relative))
    far = relative[rows, np.abs(relative).sum(-1).argmax(1)][:, None]  # (N, 1, 2)
    twice = np.abs(relative[..., 0] * far[..., 1] - relative[..., 1] * far[..., 0])  # (N, V), areas of triangles
    return twice.max(1) > 1e-3
