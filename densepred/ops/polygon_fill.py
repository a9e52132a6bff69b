"""Filling polygons whose coordinates are pixels, with centres at whole numbers, and writing them in COCO's coordinates."""

import cv2
import numpy as np

SHIFT = 4
"""Bits behind the point in the vertices that OpenCV draws."""
FARTHEST = 30_000
"""Pixels: vertices farther away are moved there, OpenCV counts in 16 bits."""
COCO_SHIFT = 0.5
"""From a pixel's centre at a whole number to COCO's coordinates, where its corner is there."""


def fixed_point(polygon: np.ndarray) -> np.ndarray:
    """Return vertices (V, 2) as OpenCV takes them, int32 with `SHIFT` bits behind the point."""
    return np.round(np.clip(polygon, -FARTHEST, FARTHEST) * 2**SHIFT).astype(np.int32)


def fill_polygon(polygon: np.ndarray, size: tuple[int, int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """Fill a polygon and its outline, even-odd where it crosses itself.

    The outline belongs to it because vertices are chosen on an object's outermost pixels, see `LoadPolygons`: without it
    every object would be a pixel too narrow.

    Args:
        polygon: (V, 2) finite vertices x, y in pixels.
        size: (H, W) of the image.

    Returns:
        The window of the image that it reaches into, and where in it the polygon is, (h, w) bool.
    """
    polygon = np.clip(polygon, -FARTHEST, FARTHEST)
    left, top = np.maximum(np.floor(polygon.min(axis=0)), 0).astype(int)
    right, bottom = np.minimum(np.ceil(polygon.max(axis=0)) + 1, size[::-1]).astype(int)
    inside = np.zeros((max(0, bottom - top), max(0, right - left)), np.uint8)
    if inside.size:
        cv2.fillPoly(inside, [fixed_point(polygon - (left, top))], 1, shift=SHIFT)
    return (slice(top, top + len(inside)), slice(left, left + inside.shape[1])), inside.astype(bool)


def coco_polygon(polygon: np.ndarray) -> list[float]:
    """Return vertices (V, 2) as a polygon [x, y, ...] of COCO's ``segmentation``."""
    return (polygon + COCO_SHIFT).ravel().tolist()
