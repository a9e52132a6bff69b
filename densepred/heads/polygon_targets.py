"""What a polygon model is trained towards: class heat maps, and each object's centre, vertices and depth.

Facts: CornerNet's Gaussian radius (arXiv:1808.01244) in CenterNet's form (arXiv:1904.07850), CenterPoly's ellipses and
centres: an object's centre is the mean of its vertices, clipped into the map, not that of its box. Everything here is in
cells of the head's map: x of a vertex is its input pixel divided by the stride.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from densepred.structures import SegSample

OVERLAP = 0.7
"""Least IoU of a box whose corners lie within the Gaussian's radius with the true box."""


@dataclass
class PolygonTargets:
    """A batch's targets; N objects of all images in turn, in cells of the map (h, w).

    Attributes:
        heatmaps: (B, C, h, w), 1 at centres, falling to 0.
        images: (N,) int64, the image of each object.
        cells: (N,) int64, y * w + x of its centre's cell.
        offsets: (N, 2), centre minus cell, xy in 0..1.
        vertices: (N, V, 2), relative to the centre.
        depths: (N,), rank in its image, 0 = nearest.
    """

    heatmaps: Tensor
    images: Tensor
    cells: Tensor
    offsets: Tensor
    vertices: Tensor
    depths: Tensor


def polygon_targets(
    samples: Sequence[SegSample],
    size: tuple[int, int],
    stride: tuple[float, float],
    num_classes: int,
    num_vertices: int,
    max_objects: int,
    elliptical: bool,
    dtype: torch.dtype,
) -> PolygonTargets:
    """Return the targets of a batch.

    Vertices and boxes are clipped to the map's cells, 0..w-1 and 0..h-1, so that no centre lies outside. An object whose
    clipped box has no width or no height, as one outside the image, is left out. Of the others the first ``max_objects``
    of an image stay, the nearest ones where the sample is ordered by depth. Objects that share a cell stay both: they make
    one peak a class and pull the same values.

    Args:
        samples: with ``gt_polygons``: ``polygons`` (N, V, 2) xy in input pixels, ``labels`` (N,), ``depths`` (N,), and, if
            known, ``bboxes`` (N, 4) xyxy of the outlines that the vertices were chosen from; else the vertices' boxes count.
        size: (h, w) of the map.
        stride: input pixels a cell, (y, x).
        num_classes, num_vertices: C and V of the head.
        max_objects: of an image.
        elliptical: the Gaussian follows the box's shape; else it is round, with the radius of the shorter side.
        dtype: of the targets.

    Raises:
        ValueError: a sample without ``gt_polygons``, with another number of vertices or with a label beyond the classes.
    """
    maps, parts = [], []
    for index, sample in enumerate(samples):
        polygons, boxes, labels, depths = _annotation(sample, num_classes, num_vertices)
        vertices, boxes = (clip_to_map(x, size, stride, dtype) for x in (polygons, boxes))  # (N, V, 2), (N, 2, 2)
        extent = boxes[:, 1] - boxes[:, 0]  # (N, 2)
        kept = (extent > 0).all(1).nonzero()[:max_objects, 0]
        vertices, labels, extent = vertices[kept], labels[kept], extent[kept]
        centres = vertices.mean(1)  # (N, 2)
        cells = centres.long()
        maps.append(draw_heatmap(cells, gaussian_radii(extent, elliptical), labels, num_classes, size, dtype))
        flat = cells[:, 1] * size[1] + cells[:, 0]
        images = torch.full_like(flat, index)
        parts.append((images, flat, centres - cells, vertices - centres[:, None], depths[kept].to(dtype)))
    return PolygonTargets(torch.stack(maps), *map(torch.cat, zip(*parts, strict=True)))


def _annotation(sample: SegSample, num_classes: int, num_vertices: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the polygons (N, V, 2), boxes as two corners (N, 2, 2), labels (N,) and depths (N,), checked."""
    name = sample.get("img_path", "a sample")
    if "gt_polygons" not in sample:
        raise ValueError(f"{name} has no gt_polygons for PolygonHead: let the pipeline load them (LoadPolygons)")
    truth = sample.gt_polygons
    polygons, labels = truth.polygons, truth.labels
    if polygons.shape[1] != num_vertices:
        raise ValueError(
            f"{name}: polygons of {polygons.shape[1]} vertices for a head of {num_vertices}: set LoadPolygons' num_vertices "
            "and model.head.num_vertices to the same"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        bad = int(labels.max()) if int(labels.max()) >= num_classes else int(labels.min())
        raise ValueError(
            f"{name}: a polygon's label is {bad}, but model.head.num_classes is {num_classes}: labels are 0..{num_classes - 1}"
        )
    if "bboxes" in truth:
        boxes = truth.bboxes.unflatten(1, (2, 2))
    else:
        boxes = torch.stack([polygons.amin(1), polygons.amax(1)], 1)
    return polygons, boxes, labels, truth.depths


def clip_to_map(points: Tensor, size: tuple[int, int], stride: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """Return points (..., 2) xy of the input as cells of a map of ``size`` (h, w), clipped to the centres of its border."""
    points = points.to(dtype)
    cells = points / points.new_tensor(stride[::-1])
    return cells.clamp_min(0).minimum(points.new_tensor([size[1] - 1, size[0] - 1]))


def gaussian_radii(extent: Tensor, elliptical: bool) -> Tensor:
    """Return how far Gaussians reach, (N, 2) int64 xy, for boxes of width and height ``extent`` (N, 2) > 0.

    A round one has CornerNet's radius of the box, its sides rounded up, in CenterNet's form: of three quadratic equations
    the sum of -b and the root, halved, without dividing by a. An elliptical one has it along the longer side and that times
    the ratio of the sides along the other, in the published sense: long over short is the *box's* ratio.
    """
    width, height = extent.double().ceil().unbind(1)
    area, total = width * height, width + height
    equations = (
        (1.0, total, area * (1 - OVERLAP) / (1 + OVERLAP)),
        (4.0, 2 * total, (1 - OVERLAP) * area),
        (4 * OVERLAP, -2 * OVERLAP * total, (OVERLAP - 1) * area),
    )
    roots = [(b + (b * b - 4 * a * c).sqrt()) / 2 for a, b, c in equations]
    radius = torch.stack(roots).amin(0).clamp_min(0).floor()
    if not elliptical:
        return radius[:, None].expand(-1, 2).long()
    width, height = extent.double().unbind(1)
    return (radius[:, None] * torch.stack([width / height, height / width], 1).clamp_min(1)).long()


def draw_heatmap(
    cells: Tensor, radii: Tensor, labels: Tensor, num_classes: int, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return the class maps (C, h, w) of Gaussians with peaks of exactly 1, combined by maximum.

    One reaches ``radii`` rx, ry from its cell and is 0 beyond. With R = 2 ry + 1, C = 2 rx + 1 and M = max(R, C) it is
    exp(-((dy C / M)^2 + (dx R / M)^2) / (2 s^2)), s = (2 min(rx, ry) + 1) / 6: a product of one factor a row and one a column.

    Args:
        cells: (N, 2) int64 xy of the centres, inside the map.
        radii: (N, 2) int64 xy.
        labels: (N,) int64.
        num_classes: C.
        size: (h, w).
        dtype: of the result.
    """
    heatmap = torch.zeros(num_classes, *size, dtype=dtype, device=cells.device)
    diameters = (2 * radii + 1).to(torch.float64)
    sigma = diameters.amin(1) / 6
    ratios = diameters.flip(1) / diameters.amax(1, keepdim=True)  # (N, 2): of dx the rows', of dy the columns'
    factors = []
    for axis, length in ((1, size[0]), (0, size[1])):
        steps = torch.arange(length, device=cells.device) - cells[:, axis, None]  # (N, h or w)
        falling = torch.exp(-((steps * ratios[:, axis, None]) ** 2) / (2 * sigma[:, None] ** 2))
        factors.append(falling.masked_fill(steps.abs() > radii[:, axis, None], 0).to(dtype))
    for label in labels.unique().tolist():
        own = labels == label
        heatmap[label] = (factors[0][own, :, None] * factors[1][own, None, :]).amax(0)
    return heatmap


def trained_objects(code: Tensor, coordinates: str) -> Tensor:
    """Return which objects, (N,) bool, take part in the losses of offset, depth and polygon.

    All do, except in ``polar`` one whose third vertex has a smaller angle than its first, as published: from the top left
    on, clockwise, angles grow at least so far. Its peak stays.

    Args:
        code: (N, V, 2) as `densepred.ops.polygons.encode_polygons` makes it, or (N, V).
        coordinates: of it.
    """
    if coordinates != "polar":
        return torch.ones(len(code), dtype=torch.bool, device=code.device)
    return code[:, 0, 1] <= code[:, 2, 1]


def flood(values: Tensor, cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a map (D, h, w) in which every cell has the value of the nearest centre, for the oracle protocol.

    Distance is counted in 4-connected steps. Of equally near centres the first object's value counts, so too where several
    share a cell.

    Args:
        values: (N, D).
        cells: (N,) int64, y * w + x.
        size: (h, w). Without an object the map is 0.
    """
    if not len(cells):
        return values.new_zeros(values.shape[1], *size)
    rows, columns = (torch.arange(length, device=cells.device) for length in size)
    down = (rows - (cells // size[1])[:, None]).abs()  # (N, h)
    right = (columns - (cells % size[1])[:, None]).abs()  # (N, w)
    order = torch.arange(len(cells), device=cells.device)[:, None, None]
    keys = (down[:, :, None] + right[:, None, :]) * len(cells) + order  # (N, h, w): equal to no other object's
    return values[keys.amin(0) % len(cells)].movedim(2, 0)  # (D, h, w)
