"""Losses of polygon models (CenterPoly v2): heat map, offset and depth, polygons, their order and their region.

Pure functions on the objects that count, gathered at their centres: N objects of the batch (the caller leaves the others
out), V vertices relative to the centre in cells of the map, in one of the coordinate systems of `densepred.ops.polygons`:
(N, V, 2), or (N, V) for ``fixed_angles``. Every function divides as github.com/KatiaJDL/CenterPoly-v2 (commit 4b5164f)
does and gives its number; what differs, and why:

* without objects a loss is 0 with gradients 0 (there the region term is 1);
* `region_loss` is exact by default: what the repository computes is no intersection over union (see
  `densepred.ops.published_polygon_iou`) and keeps its own names, ``published`` and ``published_9913da9``;
* there the order term shifts angles in place, so that the polygon loss of the same step sees them shifted; here the
  caller hands `shift_angles` of the prediction to both to repeat that;
* half precision is computed in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.ops.polygon_iou import polygon_iou
from densepred.ops.polygons import decode_polygons, require_coordinates
from densepred.ops.precision import upcast
from densepred.ops.published_polygon_iou import published_iou, published_iou_9913da9

REGIONS = ("exact", "published", "published_9913da9")
PROBABILITY = 1e-4
"""Smallest distance of a probability of the heat map from 0 and 1."""
LARGE = 20.0
"""Cells; `polygon_relu_loss` leaves coordinates nearer than this alone."""
TURN = 6.28
"""A full turn as the published order term has it."""


def heatmap_focal_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """CornerNet's focal loss of heat maps (arXiv:1808.01244, equation 1).

    Args:
        logits: (B, C, h, w).
        targets: (B, C, h, w), 0..1, exactly 1 at the centres and nowhere else.

    Returns:
        A scalar, divided by the number of centres; undivided if there are none.
    """
    probs = upcast(logits).sigmoid().clamp(PROBABILITY, 1 - PROBABILITY)
    centres = targets == 1
    at_centre = (1 - probs) ** 2 * probs.log()
    elsewhere = (1 - targets) ** 4 * probs**2 * (1 - probs).log()
    return -torch.where(centres, at_centre, elsewhere).sum() / centres.sum().clamp(min=1)


def centre_l1_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of what stands at the centres, offsets (N, 2) or pseudo depths (N, 1); a scalar."""
    return (upcast(pred) - target).abs().sum() / (pred.numel() + 1e-4)


def centre_smooth_l1_loss(pred: Tensor, target: Tensor) -> Tensor:
    """The same with smooth L1, divided by N alone and not by the channels, as CenterNet has it."""
    return F.smooth_l1_loss(upcast(pred), target.to(upcast(pred).dtype), reduction="sum") / (len(pred) + 1e-4)


# Polygons -------------------------------------------------------------------------------------------------------------


def polygon_l1_loss(pred: Tensor, target: Tensor, coordinates: str = "cartesian") -> Tensor:
    """L1 between polygons: of coordinates or radii, with 1 - cos for angles.

    Args:
        pred: (N, V, 2), or (N, V) for ``fixed_angles``.
        target: of the same shape.
        coordinates: one of `densepred.ops.polygons.COORDINATES`.

    Returns:
        A scalar, divided by 2 N V in every coordinate system.
    """
    return _polygon_distance(upcast(pred), target, coordinates, torch.abs)


def polygon_smooth_l1_loss(pred: Tensor, target: Tensor, coordinates: str = "cartesian") -> Tensor:
    """As `polygon_l1_loss` with smooth L1 (quadratic below one cell) for coordinates and radii."""
    return _polygon_distance(upcast(pred), target, coordinates, _smooth)


def polygon_relu_loss(pred: Tensor, target: Tensor, coordinates: str = "cartesian") -> Tensor:
    """As `polygon_l1_loss`, where coordinates wrong by less than `LARGE` cells cost nothing; meant beside a region loss.

    Only cartesian coordinates are cut off; the others are as in `polygon_l1_loss`.
    """
    cut = _beyond if coordinates == "cartesian" else torch.abs
    return _polygon_distance(upcast(pred), target, coordinates, cut)


def _smooth(difference: Tensor) -> Tensor:
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none")


def _beyond(difference: Tensor) -> Tensor:
    size = difference.abs()
    return torch.where(size >= LARGE, size, 0.0)


def _polygon_distance(pred: Tensor, target: Tensor, coordinates: str, distance) -> Tensor:
    """Sum ``distance`` over all differences (1 - cos over those of polar angles), over 2 N V."""
    difference = pred - target
    numbers = pred.numel() * (2 if require_coordinates(coordinates) == "fixed_angles" else 1)
    if coordinates == "polar":
        radii, angles = difference.unbind(-1)
        total = distance(radii).sum() + (1 - angles.cos()).sum()
    else:
        total = distance(difference).sum()
    return total / (numbers + 1e-6)


def shift_angles(angles: Tensor) -> Tensor:
    """Return angles (N, V) in radians where those below 0 that come after one above 0 have `TURN` added."""
    before = (angles > 0).cumsum(-1) > 0
    return angles + TURN * ((angles < 0) & before).to(angles.dtype)


def order_loss(angles: Tensor) -> Tensor:
    """Push the angles of polar vertices into ascending order, clockwise on the screen.

    Args:
        angles: (N, V) predicted angles in radians; `shift_angles` is applied here (a second time does nothing).

    Returns:
        A scalar: the sum of what earlier angles exceed later ones by, over 10 N.
    """
    angles = shift_angles(upcast(angles))
    excess = (angles[:, :, None] - angles[:, None, :]).clamp(min=0)  # (N, V, V)
    return excess.triu(1).sum() / (10 * len(angles) + 1e-4)


# Region ---------------------------------------------------------------------------------------------------------------


def region_loss(pred: Tensor, target: Tensor, coordinates: str = "cartesian", formula: str = "exact") -> Tensor:
    """One minus the mean intersection over union of polygons, both relative to their own centre.

    Args:
        pred: (N, V, 2), or (N, V) for ``fixed_angles``.
        target: of the same shape.
        coordinates: one of `densepred.ops.polygons.COORDINATES`.
        formula: ``exact``: `polygon_iou`, with gradients for ``target`` too. ``published``: `published_iou`, which reads
            (N, V, 2) as polar whatever ``coordinates`` says. ``published_9913da9``: `published_iou_9913da9`.

    Returns:
        A scalar, 0..1 if exact; the published ones may be negative or large.

    Raises:
        ValueError: an unknown formula or coordinate system, or ``published`` for ``fixed_angles``.
    """
    if formula not in REGIONS:
        raise ValueError(f"formula={formula!r}: region_loss knows {', '.join(map(repr, REGIONS))}")
    if formula == "published":
        if require_coordinates(coordinates) == "fixed_angles":
            raise ValueError("formula='published' needs an angle for every vertex: use 'exact' with fixed_angles")
        iou = published_iou(pred, target)
    else:
        vertices = [decode_polygons(upcast(code), coordinates) for code in (pred, target)]
        iou = polygon_iou(*vertices) if formula == "exact" else published_iou_9913da9(*vertices)
    if len(pred) == 0:
        return iou.sum()
    return 1 - iou.sum() / (len(pred) + (0 if formula == "exact" else 1e-6))
