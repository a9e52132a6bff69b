"""The region losses of polygons against CenterPoly's way of computing one: a loop in Python over all pairs of edges.

The published way is written here from its description: one object after another, one edge of the prediction against one edge
of the target after another, every side and every crossing from numbers that are tensors of their own, each converted from
polar coordinates where it is needed.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor

from densepred.losses.polygon import REGIONS, region_loss
from densepred.ops.polygons import cartesian_to_polar, polar_to_cartesian, radii_to_cartesian
from densepred.ops.published_polygon_iou import TINY, published_area, published_iou, walk_crossings


def region_rows(objects: int = 128, vertices: int = 16) -> Iterator[tuple[str, Callable, Callable, Callable]]:
    """Yield what ``densepred.engine.benchmark_polygons`` measures: loss and gradient of the objects of a batch.

    The exact loss is another number than the published one. So the difference is, in both rows, that of the published way
    from `published_iou`.
    """
    pred, target = region_inputs(torch.Generator().manual_seed(0), objects, vertices)
    expected = published_iou(pred, target).detach()

    def run(formula: str) -> Callable[[], None]:
        def ours() -> None:
            leaf = pred.clone().requires_grad_()
            region_loss(leaf, target, "polar", formula).backward()

        return ours

    def published() -> Tensor:
        leaf = pred.clone().requires_grad_()
        iou = torch.stack([iou_by_loops(*pair) for pair in zip(leaf, target, strict=True)])
        (1 - iou.sum() / (len(iou) + 1e-6)).backward()
        return iou.detach()

    def difference(_: Any, found: Tensor) -> float:
        return (found - expected).abs().max().item()

    for formula in REGIONS[:2]:
        yield (
            f"region loss {formula}, {objects} x {vertices} vertices, with gradient",
            run(formula),
            published,
            difference,
        )


def region_inputs(random: Generator, objects: int, vertices: int) -> tuple[Tensor, Tensor]:
    """Return predicted and true polygons in polar coordinates, (N, V, 2) each: star-shaped ones, and the same with noise."""
    radii = 5 + 10 * torch.rand(objects, vertices, generator=random)
    target = radii_to_cartesian(radii)
    pred = target + 0.5 * torch.randn(target.shape, generator=random)
    return cartesian_to_polar(pred), cartesian_to_polar(target)


def iou_by_loops(pred: Tensor, target: Tensor) -> Tensor:
    """Return the published formula for one object, see `published_iou`.

    Args:
        pred: (V, 2), (r, theta).
        target: (W, 2).
    """
    pred = pred[pred[:, 1].argsort()]
    pred = torch.stack([pred[:, 0].abs(), pred[:, 1]], 1)
    outs, ins, points = [], [], [*pred, *target]
    for i in range(len(target)):
        for j in range(len(pred)):
            clip, edge = (target[i - 1], target[i]), (pred[j - 1], pred[j])
            start, stop = _side(*clip, edge[0]), _side(*clip, edge[1])
            leaving = start > 0 and stop <= 0
            if (leaving or (stop > 0 and start <= 0)) and _side(*edge, clip[0]) * _side(*edge, clip[1]) <= 0:
                (outs if leaving else ins).append((j, i, len(points)))
                points.append(_crossing(*edge, *clip))
    line = walk_crossings(outs, ins, len(pred), len(target))
    own, other = (published_area(polar_to_cartesian(p)) for p in (pred, target))
    found = published_area(polar_to_cartesian(torch.stack([points[k] for k in line]))) if line else own.new_zeros(())
    if found == 0:
        found = torch.minimum(own, other)
    return found / (own + other - found + 1e-6)


def _cartesian(point: Tensor) -> tuple[Tensor, Tensor]:
    return point[0] * torch.cos(point[1]), point[0] * torch.sin(point[1])


def _side(start: Tensor, stop: Tensor, point: Tensor) -> Tensor:
    (x0, y0), (x1, y1), (x, y) = (_cartesian(p) for p in (start, stop, point))
    return (x1 - x0) * (y - y0) - (y1 - y0) * (x - x0)


def _crossing(*ends: Tensor) -> Tensor:
    (x0, y0), (x1, y1), (x2, y2), (x3, y3) = (_cartesian(p) for p in ends)
    slope, other = (y1 - y0) / (x1 - x0), (y3 - y2) / (x3 - x2)
    start, other_start = y0 - slope * x0, y2 - other * x2
    x = (other_start - start) / (slope - other)
    y = slope * x + start
    angle = torch.atan((y + TINY) / (x + TINY))
    if x < 0:
        angle = angle + math.pi
    elif y < 0:
        angle = angle + 2 * math.pi
    return torch.stack([torch.sqrt(x * x + y * y), angle])
