"""Boundary IoU: overlap of the pixels near the contours only, where a large region's IoU says little.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021), eq. 2; the width of the
contour, its square neighbourhood and the image's border, which is a contour too, follow
https://github.com/bowenc0221/boundary-iou-api. That tool erodes every mask by itself. Here one minimum and one maximum filter
over the label map find the contours of all its regions at once, so that the cost does not grow with their number.
"""

import math

import cv2
import numpy as np

from densepred.structures import IGNORE_INDEX

COCO_RATIO = 0.02
"""Width of the contour over the image's diagonal, for COCO and in general."""
CITYSCAPES_RATIO = 0.005
SQUARE = np.ones((3, 3), np.uint8)
"""Of neighbours; OpenCV joins many passes with it into one separable filter."""
SHARED, TRUE, FOUND = range(3)
"""Columns of the counts."""


def contour_width(size: tuple[int, int], ratio: float) -> int:
    """Return how many pixels of a region, counted from its edge, are its contour, at least 1.

    Args:
        size: Of the image, (H, W).
        ratio: Of the width to the diagonal.

    Raises:
        ValueError: The ratio is not in (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(
            f"a boundary ratio of {ratio} is outside (0, 1); {COCO_RATIO} is usual, Cityscapes {CITYSCAPES_RATIO}"
        )
    return max(1, round(ratio * math.sqrt(size[0] ** 2 + size[1] ** 2)))


def contours(labels: np.ndarray, ratio: float) -> np.ndarray:
    """Return the pixels (H, W) bool that lie on the contour of their own region.

    Args:
        labels: (H, W) integers below 2**53 in size; equal values are one region.
        ratio: Width of the contour, see `contour_width`.
    """
    width = contour_width(labels.shape, ratio)
    found = np.ones(labels.shape, bool)
    if min(labels.shape) <= 2 * width:  # the image's border reaches everywhere
        return found
    fast = _filterable(labels)
    edge = cv2.erode(fast, SQUARE, iterations=width) != cv2.dilate(fast, SQUARE, iterations=width)
    inner = (slice(width, -width), slice(width, -width))
    found[inner] = edge[inner]
    return found


def mask_contour(mask: np.ndarray, ratio: float) -> np.ndarray:
    """Return the contour (H, W) bool of one mask (H, W) bool; looks at its bounding box only."""
    width = contour_width(mask.shape, ratio)
    found = np.zeros(mask.shape, bool)
    if not mask.any():
        return found
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    part = np.ascontiguousarray(mask[box]).view(np.uint8)
    outside = dict(borderType=cv2.BORDER_CONSTANT, borderValue=0)
    found[box] = part > cv2.erode(part, SQUARE, iterations=width, **outside)
    return found


def boundary_counts(
    gt: np.ndarray, pred: np.ndarray, num_classes: int, ratio: float, ignore_index: int = IGNORE_INDEX
) -> np.ndarray:
    """Count the contours of one image's classes.

    Ignored pixels do not count, and what is predicted on them is taken for ignored before the contours are drawn: a
    prediction that is right wherever the truth is known scores 1, whatever it says of the rest.

    Args:
        gt: (H, W) integers, true classes 0..C-1 or ``ignore_index``.
        pred: (H, W) integers, predicted classes; C means none of them.
        num_classes: C.
        ratio: Width of a contour, see `contour_width`.
        ignore_index: True label of pixels that do not count.

    Returns:
        (C, 3) int64: pixels on the contours of a class in both maps, in the truth, in the prediction.
    """
    dtype = np.uint8 if num_classes < 255 else np.int64
    unknown = gt == ignore_index
    true, found = (np.where(unknown, num_classes + 1, labels).astype(dtype) for labels in (gt, pred))  # (H, W)
    known = ~unknown
    true_contour, found_contour = contours(true, ratio) & known, contours(found, ratio) & known
    both = true_contour & found_contour & (true == found)
    columns = [np.bincount(true[where], minlength=num_classes + 1) for where in (both, true_contour)]
    columns.append(np.bincount(found[found_contour], minlength=num_classes + 1))
    return np.stack(columns, axis=1)[:num_classes]


def boundary_iou(counts: np.ndarray) -> np.ndarray:
    """Return the boundary IoU (C,), 0..1, of counts (C, 3), NaN for a class without a contour in either map."""
    union = counts[:, TRUE] + counts[:, FOUND] - counts[:, SHARED]
    return np.divide(counts[:, SHARED], union, out=np.full(len(counts), np.nan), where=union > 0)


def _filterable(labels: np.ndarray) -> np.ndarray:
    """Return the labels in a type that OpenCV filters, values kept."""
    if labels.dtype in (np.uint8, np.uint16):
        return labels
    return labels.astype(np.uint16 if labels.min() >= 0 and labels.max() < 1 << 16 else np.float64)
