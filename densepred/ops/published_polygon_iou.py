"""What CenterPoly v2 computes under the name of an intersection over union, to repeat the training of its checkpoints.

Facts of github.com/KatiaJDL/CenterPoly-v2: `published_iou` at commit 4b5164f, `published_iou_9913da9` at that commit. For
anything else use `densepred.ops.polygon_iou`. Both formulas have

* areas in which the edge from the first to the second vertex counts twice;
* an intersection that counts as the smaller area if its own is 0, as between disjoint polygons.

They go pair by pair, as one walk or clip tells the next where to go. Half precision is computed in float32.
"""

import math

import torch
from torch import Tensor

from densepred.ops.polygons import polar_to_cartesian
from densepred.ops.precision import upcast

TINY = 1e-8
"""Added to both sides of an arc tangent."""


def published_iou(pred: Tensor, target: Tensor) -> Tensor:
    """A walk in the manner of Weiler and Atherton along two polygons, around crossings that it often confuses.

    Vertices are read as (r, theta) whatever they are; the predicted ones are sorted by theta, and their radii made
    positive. Where the published walk never ends, because no crossing is left that leads into the target, this one stops.

    Args:
        pred: (N, V, 2).
        target: (N, W, 2).

    Returns:
        (N,), 0 to far above 1, with gradients for both.
    """
    pred, target = upcast(pred), upcast(target)
    pred = pred.gather(1, pred[..., 1:].argsort(1).expand_as(pred))
    subject = polar_to_cartesian(torch.stack([pred[..., 0].abs(), pred[..., 1]], -1))
    return _ratio(subject, polar_to_cartesian(target), _walk_outline)


def published_iou_9913da9(pred: Tensor, target: Tensor) -> Tensor:
    """Sutherland-Hodgman with its inside test turned round: for clockwise polygons nothing is left of them.

    What remains is, nearly always, the smaller area over the larger one.

    Args:
        pred: (N, V, 2) vertices, x and y.
        target: (N, W, 2).

    Returns:
        (N,), 0 to about 1, with gradients for both.
    """
    return _ratio(upcast(pred), upcast(target), _clip_outline)


def _ratio(subjects: Tensor, clips: Tensor, outline) -> Tensor:
    found = [published_area(outline(subject, clip)) for subject, clip in zip(subjects, clips, strict=True)]
    found = torch.stack(found) if found else subjects.sum((1, 2))  # (N,)
    first, second = published_area(subjects), published_area(clips)
    found = torch.where(found == 0, torch.minimum(first, second), found)
    return found / (first + second - found + 1e-6)


def published_area(vertices: Tensor) -> Tensor:
    """Return the area (...) of (..., K, 2), the first edge taken twice; 0 for no vertices."""
    x, y = vertices.unbind(-1)
    cross = x * y.roll(-1, -1) - x.roll(-1, -1) * y
    return (cross.sum(-1) + cross[..., :1].sum(-1)).abs() / 2


def _sides(vertices: Tensor, points: Tensor) -> Tensor:
    """Return the cross product (K, M) of edges k - 1 -> k of vertices (K, 2) with what leads to points (M, 2)."""
    start = vertices.roll(1, 0)
    edge, way = vertices - start, points - start[:, None]
    return edge[:, None, 0] * way[..., 1] - edge[:, None, 1] * way[..., 0]


def _cross_lines(p1: Tensor, p2: Tensor, p3: Tensor, p4: Tensor) -> Tensor:
    """Return where lines through p1, p2 and through p3, p4 meet, all (M, 2), by slopes and intercepts."""
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = (p.unbind(-1) for p in (p1, p2, p3, p4))
    upright, other_upright = x1 == x2, x3 == x4
    slope = (y2 - y1) / torch.where(upright, 1.0, x2 - x1)
    other_slope = (y4 - y3) / torch.where(other_upright, 1.0, x4 - x3)
    start, other_start = y1 - slope * x1, y3 - other_slope * x3
    tilt = torch.where(upright | other_upright, 1.0, slope - other_slope)
    x = torch.where(upright, x1, torch.where(other_upright, x3, (other_start - start) / tilt))
    return torch.stack([x, torch.where(upright, other_slope * x + other_start, slope * x + start)], -1)


# 9913da9 --------------------------------------------------------------------------------------------------------------


def _clip_outline(subject: Tensor, clip: Tensor) -> Tensor:
    """Return what is left (K, 2) of a subject after every edge of the clip, keeping what lies left of it (y down)."""
    for start, stop in zip(clip.roll(1, 0), clip, strict=True):
        if len(subject) == 0:
            break
        inside = _sides(torch.stack([start, stop]), subject)[1] <= 0  # (K,)
        entering = inside != inside.roll(1)
        met = subject.new_zeros(subject.shape)
        if entering.any():
            ends = start.expand_as(subject), stop.expand_as(subject)
            met = met.index_put((entering,), _cross_lines(*(p[entering] for p in (subject.roll(1, 0), subject, *ends))))
        subject = torch.stack([met, subject], 1)[torch.stack([entering, inside], 1)]  # (K', 2)
    return subject


# 4b5164f --------------------------------------------------------------------------------------------------------------


def _walk_outline(subject: Tensor, clip: Tensor) -> Tensor:
    """Return the vertices (K, 2) that the walk collects."""
    of_subject, of_clip = _sides(clip, subject).sign(), _sides(subject, clip).sign().mT  # (W, V)
    start, stop = of_subject.roll(1, 1), of_subject  # of the subject's edge, 1 outside, -1 inside, 0 on the line
    crossed = of_clip.roll(1, 0) != of_clip
    leading_out, leading_in = crossed & (start > 0) & (stop <= 0), crossed & (stop > 0) & (start <= 0)
    clip_edge, edge = (leading_out | leading_in).nonzero().unbind(1)  # clip edge after clip edge
    ends = subject.roll(1, 0)[edge], subject[edge], clip.roll(1, 0)[clip_edge], clip[clip_edge]
    table = torch.cat([subject, clip, _polar_and_back(_cross_lines(*ends))])
    first = len(subject) + len(clip)
    events = [(j, i, first + k) for k, (j, i) in enumerate(zip(edge.tolist(), clip_edge.tolist(), strict=True))]
    out = leading_out[clip_edge, edge].tolist()
    outs, ins = ([e for e, o in zip(events, out, strict=True) if o == wanted] for wanted in (True, False))
    return table[
        torch.tensor(walk_crossings(outs, ins, len(subject), len(clip)), dtype=torch.int64, device=table.device)
    ]


def walk_crossings(outs: list, ins: list, subject: int, clip: int) -> list[int]:
    """Return the numbers of collected vertices: those of the subject, then those of the clip, then the crossings.

    Args:
        outs, ins: crossings (edge of the subject, edge of the clip, number of the vertex).
        subject, clip: numbers of vertices.
    """
    line, used = [], 0
    while used < len(ins) and outs:
        (j, i, _), begun = ins[0], False
        stop = (j, i)
        while ins and ((j, i) != stop or not begun):
            begun = True
            while not (found := [e for e in outs if e[0] == j]):
                line.append(j)
                j = (j + 1) % subject
            i = found[0][1]
            line.append(found[0][2])
            while not (found := [e for e in ins if e[1] == i]):
                line.append(subject + i)
                i = (i + 1) % clip
            j = found[0][0]
            line.append(found[0][2])
            ins = [e for e in ins if e is not found[0]]
            used += 1
    return line


def _polar_and_back(points: Tensor) -> Tensor:
    """Return points (M, 2) as they come back from polar coordinates by an arc tangent of (y + TINY) / (x + TINY)."""
    x, y = points.unbind(-1)
    angle = torch.atan((y + TINY) / (x + TINY))
    angle = torch.where(x < 0, angle + math.pi, torch.where(y < 0, angle + 2 * math.pi, angle))
    return polar_to_cartesian(torch.stack([(x * x + y * y).sqrt(), angle], -1))
