"""Exact, differentiable intersection over union of polygons.

`polygon_iou` finds the areas of two polygons, A and B, and of their symmetric difference D, all by the even-odd rule; the
intersection is (A + B - D) / 2. D is the even-odd area of the edges of both polygons taken together, so one rule covers
everything, polygons that cross themselves and either direction of the vertices included:

* On a vertical line the edges alternate between entering and leaving the region. So an edge's side is known from the
  parity of the number of edges below it, which flips where the edge crosses another one. The area is the sum over edges of
  plus or minus the integral under the edge, and its gradient is the same sign times the motion of the edge; crossings
  add nothing to it, as the sums on both sides of one are equal.
* Whether an edge lies above another is decided once for a pair, at the ends of the stretch of x that they share, and ties
  go by the number of the edge. So rounding moves areas by rounding errors only, also for identical polygons, shared edges,
  vertices on edges and vertices on vertices.
* "Vertical" is a slanted direction that no edge of a real polygon has, see `SLANT`.

Letters: N pairs, V and W vertices, E = V + W edges of a pair, numbered by the vertex where they start.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from densepred.ops.backend import backend_name
from densepred.ops.precision import upcast

SLANT = 0.7548776662466927
"""A line x + SLANT y = constant counts as vertical: irrational, so not the direction of an edge between grid points."""


class _Edges(NamedTuple):
    """Edges from their left to their right end; all (N, E).

    Attributes:
        x0, y0, x1, y1: the ends.
        left, right: their slanted positions, x + SLANT y; left <= right.
        flipped: whether the polygon runs along the edge from right to left.
    """

    x0: Tensor
    y0: Tensor
    x1: Tensor
    y1: Tensor
    left: Tensor
    right: Tensor
    flipped: Tensor


def _edges(vertices: Tensor, follower: Tensor) -> _Edges:
    """Return the edges of vertices (N, E, 2) to those numbered ``follower`` (E,)."""
    x, y = vertices.unbind(-1)
    position = x + SLANT * y
    ends = [(v, v[:, follower]) for v in (x, y, position)]
    flipped = ends[2][1] < ends[2][0]
    (x0, x1), (y0, y1), (left, right) = ((torch.where(flipped, b, a), torch.where(flipped, a, b)) for a, b in ends)
    return _Edges(x0, y0, x1, y1, left, right, flipped)


def _height(x: Tensor, y: Tensor, position: Tensor, edges: _Edges) -> Tensor:
    """Return by how much vertices (N, E) lie above edges; (N, E vertices, E edges), exactly 0 at an edge's own ends.

    A vertex that rounding cannot tell from a point on the edge lies below it, by next to nothing and most in its middle,
    as if every edge were the chord of one very flat bowl.
    """
    left, right = edges.left[:, None], edges.right[:, None]
    x0, y0 = edges.x0[:, None], edges.y0[:, None]
    dx, dy = edges.x1[:, None] - x0, edges.y1[:, None] - y0
    area = dx * (y[..., None] - y0) - dy * (x[..., None] - x0)
    epsilon = torch.finfo(x.dtype).eps
    reach = torch.maximum(edges.x0.abs(), edges.y0.abs()).amax(1)[:, None, None]
    flat = (position[..., None] - left) * (position[..., None] - right) * epsilon**4
    return torch.where(area.abs() <= 4 * epsilon * reach * (dx.abs() + dy.abs()), flat, area / _safe(right - left))


def _safe(length: Tensor) -> Tensor:
    return torch.where(length > 0, length, 1.0)


def _crossings(edges: _Edges) -> tuple[Tensor, Tensor]:
    """Follow every edge i from left to right past every other edge j.

    Returns:
        where i crosses j, as a part 0..1 of i, 1 where it does not; whether j is below i where i starts; both (N, i, j).
    """
    left, right = edges.left, edges.right
    left_i, left_j, right_i, right_j = left[:, :, None], left[:, None], right[:, :, None], right[:, None]
    number = torch.arange(left.shape[1], device=left.device)
    later = number[:, None] > number
    shared = (torch.maximum(left_i, left_j) < torch.minimum(right_i, right_j)) & (number[:, None] != number)
    # How high i is over j where the shared stretch begins and where it ends: known from an end of i or from one of j.
    starts = (left_i > left_j) | ((left_i == left_j) & later)
    stops = (right_i < right_j) | ((right_i == right_j) & later)
    begin = _height(edges.x0, edges.y0, left, edges)
    begin = torch.where(starts, begin, -begin.mT)
    end = _height(edges.x1, edges.y1, right, edges)
    end = torch.where(stops, end, -end.mT)
    above = (begin > 0) | ((begin == 0) & later)
    crossed = shared & (above != ((end > 0) | ((end == 0) & later)))
    fall = begin - end
    part = begin / torch.where(fall == 0, 1.0, fall)
    scale = 1 / _safe(right - left)[..., None]
    first, last = ((left_j - left_i) * scale).clamp(min=0), ((right_j - left_i) * scale).clamp(max=1)
    at = torch.where(crossed, first + part * (last - first), 1.0)
    return at, shared & (left_j <= left_i) & above


def _signed_moments(at: Tensor, below: Tensor) -> Tensor:
    """Integrate the side of edges along their length.

    Args:
        at: (N, I, J), see `_crossings`.
        below: (N, I, J).

    Returns:
        (N, I, 2), the integrals over t = 0..1 of s (1 - t) and s t; s = 1 where the region ends at the edge, going up, and
        -1 where it begins.
    """
    count = at.shape[-1]
    signs = 1.0 - 2.0 * (torch.arange(count, device=at.device) % 2).to(at.dtype)
    at = at.sort(-1).values
    tail = 1.0 - 2.0 * (count % 2)
    whole, second = 2 * (at @ signs) + tail, at.square() @ signs + tail / 2
    side = 2.0 * (below.sum(-1) % 2).to(at.dtype) - 1  # (N, I)
    return side[..., None] * torch.stack([whole - second, second], -1)


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    split, vertices = a.shape[1], torch.cat([a, b], 1)  # (N, E, 2)
    number = torch.arange(vertices.shape[1], device=a.device)
    blocks = (slice(0, split), slice(split, None))
    follower = torch.cat([number[block].roll(-1) for block in blocks])
    edges = _edges(vertices, follower)
    at, below = _crossings(edges)
    own = torch.cat([_signed_moments(at[:, block, block], below[:, block, block]) for block in blocks], 1)
    moments = torch.stack([own, _signed_moments(at, below)], 1)  # (N, 2, E, 2)
    under = (edges.right - edges.left)[..., None] * torch.stack([edges.y0, edges.y1], -1)
    areas = (moments * under[:, None]).sum(-1)  # (N, 2, E)
    own_a, own_b = (areas[:, 0, block].sum(-1) for block in blocks)
    difference = areas[:, 1, blocks[0]].sum(-1) + areas[:, 1, blocks[1]].sum(-1)  # 0 to the last bit for equal ones
    outward = torch.stack([edges.y0 - edges.y1, edges.x1 - edges.x0], -1)[:, None]  # (N, 1, E, 2)
    flipped = edges.flipped[:, None]
    of_start, of_end = (
        torch.where(flipped, moments[..., 1 - k], moments[..., k])[..., None] * outward for k in (0, 1)
    )  # (N, 2, E, 2)
    slopes = of_start + torch.zeros_like(of_end).index_copy_(2, follower, of_end)
    return torch.stack([own_a, own_b, difference], 1), slopes


BACKENDS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {"eager": _areas}
"""Implementations by the names that the environment variable ``DENSEPRED_OPS_BACKEND`` may take.

(a (N, V, 2), b (N, W, 2)) -> the areas (N, 3) of a, of b and of their symmetric difference, and their derivatives
(N, 2, E, 2): those of the own area and those of the difference, by the vertices of a, then of b.
"""


@torch.library.custom_op("densepred::polygon_areas", mutates_args=())
def _polygon_areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return BACKENDS[backend_name(BACKENDS, a.device)](a, b)


@_polygon_areas.register_fake
def _output_shapes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(len(a), 3), a.new_empty(len(a), 2, a.shape[1] + b.shape[1], 2)


def _save_for_backward(ctx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.split = inputs[0].shape[1]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor]:
    (slopes,) = ctx.saved_tensors
    own, difference = slopes.unbind(1)  # (N, E, 2)
    shared = grad[:, 2, None, None] * difference
    of_a = grad[:, 0, None, None] * own[:, : ctx.split] + shared[:, : ctx.split]
    return of_a, grad[:, 1, None, None] * own[:, ctx.split :] + shared[:, ctx.split :]


_polygon_areas.register_autograd(_gradients, setup_context=_save_for_backward)


def polygon_areas(a: Tensor, b: Tensor) -> Tensor:
    """Measure pairs of polygons by the even-odd rule.

    Any polygons: convex or not, either direction, crossing or touching themselves, without area. Half precision is computed
    in float32. A gradient of a gradient is not implemented.

    Args:
        a: (N, V, 2) vertices, V >= 1; the last one is joined to the first.
        b: (N, W, 2).

    Returns:
        (N, 3): the areas of a, of b and of their symmetric difference.

    Raises:
        ValueError: shapes that are no pairs of polygons.
    """
    if (
        a.dim() != 3
        or b.dim() != 3
        or a.shape[-1] != 2
        or b.shape[-1] != 2
        or len(a) != len(b)
        or 0 in (*a.shape[1:], *b.shape[1:])
    ):
        raise ValueError(
            f"polygons {tuple(a.shape)} and {tuple(b.shape)}: want (N, V, 2) and (N, W, 2), V and W at least 1"
        )
    a, b = upcast(a), upcast(b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return _polygon_areas(a.to(dtype), b.to(dtype))[0]


def polygon_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact intersection over union of pairs of polygons, by the even-odd rule; see `polygon_areas`.

    It is 1 for equal polygons, whatever vertex they start with and whichever way they run, and 0 for disjoint ones and for
    two without area. The gradient is exact wherever there is one. Between disjoint polygons it is 0, on purpose: a pull
    towards each other is the business of the loss on coordinates that stands beside this one, and polygons around a common
    centre hardly ever miss each other. At equal polygons, the tip of a roof, it is one of the slopes around.

    Args:
        a: (N, V, 2) vertices, any float type.
        b: (N, W, 2).

    Returns:
        (N,), 0..1, in float32, or float64 where an input is.
    """
    own_a, own_b, difference = polygon_areas(a, b).unbind(1)
    both = own_a + own_b
    union = both + difference  # twice the union; the intersection twice is both - difference
    return torch.where(union > 0, both - difference, 0.0) / torch.where(union > 0, union, 1.0)
