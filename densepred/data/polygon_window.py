"""The window of CenterNet's recipes onto image and polygons, and its colour jitter.

Source: Zhou et al., Objects as Points (arXiv:1904.07850), as CenterPoly trains with it.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from numpy.random import Generator

from densepred.data.polygon_vertices import spans_area
from densepred.data.transforms import VOID
from densepred.registry import TRANSFORMS

LIGHTING_VALUES = np.array([0.2141788, 0.01817699, 0.00341571])
LIGHTING_VECTORS = np.array(
    [
        [-0.58752847, -0.69563484, 0.41340352],
        [-0.5832747, 0.00994535, -0.81221408],
        [-0.56089297, 0.71832671, 0.41158938],
    ]
)
"""Principal components of COCO's colours, CenterNet's figures: a row a channel, blue, green, red; a column a component."""
GREY = np.array([0.299, 0.587, 0.114])
"""What red, green and blue give to the grey value (ITU-R BT.601)."""


@TRANSFORMS.register_module()
class PolygonWindow(BaseTransform):
    """Show a window of the image at the network's size, and move the polygons with it.

    The window keeps the aspect; what it shows of outside the image is black. Without ``random`` it is centred on the image
    and holds all of it. With it its size is multiplied by one of ``scales``, its centre is any pixel that far inside the
    image that ``border`` says (halved until there is one), and the image is mirrored with probability ``flip``.

    Sets ``img``, ``img_shape`` and ``affine`` (2, 3) float64, which maps pixels of the file to those of the window.
    ``polygons`` and ``polygon_boxes``, if there, are mapped and clipped to 0..W-1 and 0..H-1; an object that is left
    without area goes. Depths
    are not counted anew.

    Args:
        size: (H, W) of the window in the network's pixels.
        scales: factors on the window, all equally likely; below 1 enlarges what is seen.
        border: pixels between the window's centre and the image's edges.
        flip: probability of mirroring.
        reorder_flip: reverse the order of a mirrored polygon's vertices, so that it runs clockwise again, and begin with
            the one that then is top left; CenterPoly v1 did not.
        whole: the window holds the whole image before it is scaled. False: its sides are those that show the longer side
            of the image along its width, as published: it cuts images that are taller than it is (IDD in 512 x 1024).
        random: draw a window; False: the test form.

    Raises:
        ValueError: label maps or masks are loaded already; they would not move.
    """

    def __init__(
        self,
        size: tuple[int, int],
        scales: Sequence[float] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3),
        border: int = 128,
        flip: float = 0.5,
        reorder_flip: bool = True,
        whole: bool = True,
        random: bool = True,
    ) -> None:
        self.size, self.scales, self.border, self.flip = tuple(size), tuple(scales), border, flip
        self.reorder_flip, self.whole, self.random = reorder_flip, whole, random

    def transform(self, results: dict) -> dict:
        loaded = [key for key in VOID if key in results]
        if loaded:
            raise ValueError(
                f"PolygonWindow moves polygons alone: load {', '.join(loaded)} after it, at the file's size"
            )
        affine, mirrored = self._draw(results)
        columns, rows = self.size[::-1]
        results["img"] = cv2.warpAffine(results["img"], affine, (columns, rows), flags=cv2.INTER_LINEAR)
        results["img_shape"], results["affine"] = self.size, affine
        return self._move(results, mirrored) if "polygons" in results else results

    def _draw(self, results: dict) -> tuple[np.ndarray, bool]:
        """Return the affine (2, 3) from the image's pixels to the window's, and whether it mirrors."""
        height, width = results["img"].shape[:2]
        extent = window_extent((height, width), self.size, self.whole)
        if not self.random:
            return window_affine((width / 2, height / 2), extent, self.size), False
        rng: Generator = results["rng"]
        extent *= rng.choice(self.scales)
        margins = [_margin(self.border, side) for side in (width, height)]
        centre = [int(rng.integers(m, side - m)) for m, side in zip(margins, (width, height), strict=True)]
        if rng.random() >= self.flip:
            return window_affine(centre, extent, self.size), False
        mirror = np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]])
        return window_affine((width - centre[0] - 1, centre[1]), extent, self.size) @ mirror, True

    def _move(self, results: dict, mirrored: bool) -> dict:
        polygons = results["polygons"].astype(np.float64)  # (N, V, 2)
        if mirrored and self.reorder_flip:
            polygons = reverse_order(polygons, results["mirrored_first"])
        corners = results["polygon_boxes"].astype(np.float64).reshape(-1, 2, 2)
        polygons, corners = (
            np.clip(map_points(points, results["affine"]), 0, np.array(self.size[::-1]) - 1).astype(np.float32)
            for points in (polygons, corners)
        )
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1)  # (N, 4)
        kept = spans_area(polygons) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        results["polygons"], results["polygon_boxes"] = polygons[kept], boxes[kept]
        for key in ("polygon_labels", "pseudo_depths", "mirrored_first"):
            results[key] = results[key][kept]
        return results


def window_extent(shape: tuple[int, int], size: tuple[int, int], whole: bool = True) -> float:
    """Return how many pixels of an image of ``shape`` (H, W) the width of a window of ``size`` (H, W) shows.

    CenterNet takes the longer side; ``whole`` takes more where an image is taller than the window's aspect allows.
    """
    height, width = shape
    return float(max(width, height * size[1] / size[0]) if whole else max(width, height))


def window_affine(centre: Sequence[float], extent: float, size: tuple[int, int]) -> np.ndarray:
    """Return the affine (2, 3) float64 that maps ``centre`` (x, y) to the middle of a window of ``size`` (H, W).

    Args:
        centre: in pixels of the image.
        extent: pixels of the image along the window's width.
        size: of the window.
    """
    zoom = size[1] / extent
    return np.array([[zoom, 0, size[1] / 2 - zoom * centre[0]], [0, zoom, size[0] / 2 - zoom * centre[1]]])


def map_points(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Return points (..., 2) xy mapped by an affine (2, 3)."""
    return points @ affine[:, :2].T + affine[:, 2]


def reverse_order(polygons: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Return polygons (N, V, 2) with their vertices in reverse order, beginning with the given ones (N,)."""
    index = (first[:, None] - np.arange(polygons.shape[1])) % polygons.shape[1]  # (N, V)
    return np.take_along_axis(polygons, index[..., None], axis=1)


def _margin(border: int, side: int) -> int:
    """Return the border, halved until a side has pixels on its inside."""
    parts = 1
    while side - border // parts <= border // parts:
        parts *= 2
    return border // parts


@TRANSFORMS.register_module()
class CenterNetColorJitter(BaseTransform):
    """CenterNet's photometric jitter: brightness, contrast and saturation in random order, then PCA lighting.

    Each of the three draws a factor 1 +- its strength; contrast blends with the image's mean grey, saturation with the grey
    of each pixel, both of the image before any step. As all steps are linear they are applied as one, in fixed point (a
    grey level off at most), and clipped to uint8 once; the reference goes on with unclipped floats. Lighting adds the
    principal components of COCO's colours.

    Args:
        brightness, contrast, saturation: strengths, 0..1.
        lighting: standard deviation of the components' weights.
    """

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, lighting: float = 0.1
    ) -> None:
        self.strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.lighting = lighting

    def transform(self, results: dict) -> dict:
        rng: Generator = results["rng"]
        names = list(self.strengths)
        steps = [names[i] for i in rng.permutation(3)]
        factors = [1 + rng.uniform(-self.strengths[name], self.strengths[name]) for name in steps]
        weights = rng.normal(scale=self.lighting, size=3)
        mean = float(GREY @ cv2.mean(results["img"])[:3])
        results["img"] = cv2.transform(results["img"], jitter_matrix(steps, factors, weights, mean))
        return results


def jitter_matrix(steps: Sequence[str], factors: Sequence[float], weights: np.ndarray, mean: float) -> np.ndarray:
    """Return the matrix (3, 4) that maps (R, G, B, 1) of 0..255 to the jittered (R, G, B).

    Args:
        steps: ``brightness``, ``contrast`` and ``saturation`` in the order they are applied.
        factors: of the steps.
        weights: (3,) of the lighting's components.
        mean: grey value of the image.
    """
    pixel, grey, constant = 1.0, 0.0, 0.0  # of which the image is now the sum, so weighted
    for step, factor in zip(steps, factors, strict=True):
        pixel, grey, constant = pixel * factor, grey * factor, constant * factor
        if step == "contrast":
            constant += (1 - factor) * mean
        elif step == "saturation":
            grey += 1 - factor
    lighting = 255 * (LIGHTING_VECTORS @ (LIGHTING_VALUES * weights))[::-1]  # (3,), red first
    return np.column_stack([pixel * np.eye(3) + grey * GREY, constant + lighting])
