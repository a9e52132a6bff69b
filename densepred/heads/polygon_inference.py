"""From a polygon head's maps to polygons in the file's pixels: peaks, what stands at their cells, the inverse affine.

CenterNet's decoding (arXiv:1904.07850) as CenterPoly v2 has it, for a batch at once and without a loop over classes or
objects. What differs: the best K are found among all classes together, which are the same as the best of each class's best
K; polygons are neither clipped to the image nor cut to whole pixels here.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from densepred.ops.polygons import decode_polygons


@dataclass
class Detections:
    """The K best peaks of each image, best first.

    Attributes:
        scores: (B, K), 0 where the image has fewer peaks.
        labels: (B, K) int64.
        polygons: (B, K, V, 2) xy in cells of the map.
        depths: (B, K).
    """

    scores: Tensor
    labels: Tensor
    polygons: Tensor
    depths: Tensor


def decode(
    heatmap: Tensor, offset: Tensor, polygon: Tensor, pseudo_depth: Tensor, k: int, coordinates: str
) -> Detections:
    """Return the K best detections of each image.

    Args:
        heatmap: (B, C, h, w) probabilities.
        offset: (B, 2, h, w), what the centre is beyond its cell, xy.
        polygon: (B, 2V, h, w), or (B, V, h, w) for ``fixed_angles``; vertices relative to the centre, in cells, both
            numbers of a vertex in turn.
        pseudo_depth: (B, 1, h, w), smaller is nearer.
        k: K; a map with fewer cells gives as many as it has.
        coordinates: one of `densepred.ops.polygons.COORDINATES`.
    """
    scores, places = best_peaks(heatmap, k)
    width, area = heatmap.shape[-1], heatmap.shape[-2] * heatmap.shape[-1]
    labels, cells = places // area, places % area
    centres = torch.stack([cells % width, cells // width], -1) + gather_cells(offset, cells)  # (B, K, 2)
    code = gather_cells(polygon, cells)  # (B, K, 2V or V)
    if coordinates != "fixed_angles":
        code = code.unflatten(-1, (-1, 2))
    polygons = decode_polygons(code, coordinates) + centres[:, :, None]  # (B, K, V, 2)
    return Detections(scores, labels, polygons, gather_cells(pseudo_depth, cells)[..., 0])


def gather_cells(maps: Tensor, cells: Tensor) -> Tensor:
    """Return what maps (B, D, h, w) hold at cells (B, K) int64, y * w + x, as (B, K, D)."""
    return maps.flatten(2).gather(2, cells[:, None].expand(-1, maps.shape[1], -1)).transpose(1, 2)


@torch.no_grad()
def best_peaks(heatmap: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the scores (B, K), descending, and places (B, K), int64 in the flattened (C, h, w), of the best peaks.

    A peak is a cell with no greater one among its eight neighbours of the same class; equal neighbours are peaks all.
    """
    peaks = neighbourhood_maximum(heatmap)
    torch.eq(peaks, heatmap, out=peaks).mul_(heatmap)  # in place: fresh memory costs more than the arithmetic
    rows = peaks.flatten(1, 2)  # (B, C h, w)
    count, width = rows.shape[1:]
    best_rows = rows.amax(2).topk(min(k, count), sorted=False).indices  # the best K cells lie in these
    chosen = rows.gather(1, best_rows[..., None].expand(-1, -1, width)).flatten(1)
    scores, within = chosen.topk(min(k, chosen.shape[1]))
    return scores, best_rows.gather(1, within // width) * width + within % width


@torch.no_grad()
def neighbourhood_maximum(x: Tensor) -> Tensor:
    """Return the maximum of each cell of (..., h, w) and its eight neighbours: of three rows, then of three columns."""
    for axis in (-2, -1):
        largest, others = x.clone(), x.shape[axis] - 1
        for here, there in ((0, 1), (1, 0)):
            part = largest.narrow(axis, here, others)
            torch.maximum(part, x.narrow(axis, there, others), out=part)
        x = largest
    return x


def to_file(polygons: Tensor, meta: dict, stride: tuple[float, float]) -> Tensor:
    """Return polygons (..., 2) xy in pixels of the file, from cells of the map.

    Args:
        polygons: in cells.
        meta: ``affine`` (2, 3), file to input; without it the input is the file resized from ``ori_shape`` to ``img_shape``.
        stride: input pixels a cell, (y, x).
    """
    affine = meta.get("affine")
    if affine is None:
        (height, width), (from_height, from_width) = meta["img_shape"], meta["ori_shape"]
        affine = np.array([[width / from_width, 0, 0], [0, height / from_height, 0]])
    affine = np.asarray(affine, np.float64)
    linear = np.linalg.inv(affine[:, :2])  # input -> file
    shift = polygons.new_tensor(-linear @ affine[:, 2])
    return polygons @ polygons.new_tensor(linear * np.array(stride[::-1])).T + shift
