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

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.ops.precision import upcast

SLANT = 0.7548776662466927
"""A line x + SLANT y = constant counts as vertical: irrational, so not the direction of an edge between grid points."""


class _Plan(NamedTuple):
    """Numbers that depend on V and W alone; P = E (E - 1) / 2 pairs of edges, whose 2 P entries are those looking at j from
    i, i < j, then those looking at i from j.

    Attributes:
        follower, leader: (E,) the vertices after and before each.
        first, second: (P,) i and j.
        counted: (2, E, 2 P), 1 where an entry looks from an edge: at one of its own polygon; at any.
        columns: for the same two, (E, S) an edge's entries; 2 P where there is none.
    """

    follower: Tensor
    leader: Tensor
    first: Tensor
    second: Tensor
    counted: Tensor
    columns: tuple[Tensor, Tensor]


@lru_cache(maxsize=16)
def _plan(v: int, w: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    number = torch.arange(v + w)
    first, second = torch.triu_indices(v + w, v + w, 1)
    viewer, viewed = torch.cat([first, second]), torch.cat([second, first])
    entries = torch.full((v + w, v + w), len(viewer)).index_put((viewer, viewed), torch.arange(len(viewer)))
    own = [F.pad(block, (0, max(v, w) - len(block)), value=len(viewer)) for block in (entries[:v, :v], entries[v:, v:])]
    counted = number[:, None] == viewer
    counted = torch.stack([counted & ((viewer < v) == (viewed < v)), counted]).to(dtype)
    follower, leader = (torch.cat([number[:v].roll(k), number[v:].roll(k)]) for k in (-1, 1))
    tensors = (t.to(device) for t in (follower, leader, first, second, counted))
    return _Plan(*tensors, (torch.cat(own).to(device), entries.to(device)))


class _Edges(NamedTuple):
    """Edges from their left to their right end, in slanted coordinates (x + SLANT y, y), in which areas are the same.

    Attributes:
        left, low: (E, N) or (P, N), the left end.
        right, high: the right end.
        slope: (high - low) / (right - left).
    """

    left: Tensor
    low: Tensor
    right: Tensor
    high: Tensor
    slope: Tensor


def _rise(rise: Tensor, run: Tensor, rest: Tensor, slope: Tensor, blur: Tensor) -> Tensor:
    """Return by how much edge i lies above edge j at an end of either, within the other edge.

    A vertex that rounding cannot tell from a point on the other edge lies below it, by next to nothing and most in the
    middle of that edge, as if edges were chords of one very flat bowl.

    Args:
        rise, run: (P, N), from the end of j to that of i.
        rest: from the end to the far one of the other edge.
        slope: of the other edge.
        blur: (N,), what rounding may move a coordinate by.
    """
    above = rise - slope * run
    return torch.where(above.abs() <= blur * (1 + slope.abs()), run * rest * torch.finfo(run.dtype).eps ** 4, above)


def _crossings(i: _Edges, j: _Edges, blur: Tensor) -> tuple[Tensor, Tensor]:
    """Look at pairs of edges where they share a stretch of x; of equal ones j is above.

    Returns:
        where the viewer crosses the other edge, as a part 0..1 of itself, 1 if it does not; whether the other one is below
        the viewer where that starts, as 0 or 1; both (2 P, N), as the entries of a `_Plan`.
    """
    begin, end = torch.maximum(i.left, j.left), torch.minimum(i.right, j.right)
    later, longer = i.left - j.left, i.right - j.right
    inner = later > 0
    rest, slope = begin - torch.where(inner, j.right, i.right), torch.where(inner, j.slope, i.slope)
    first = _rise(i.low - j.low, later, rest, slope, blur)
    inner = longer < 0
    rest, slope = end - torch.where(inner, j.left, i.left), torch.where(inner, j.slope, i.slope)
    last = _rise(i.high - j.high, longer, rest, slope, blur)
    above, shared = first > 0, begin < end
    crossed = shared & (above != (last > 0))
    way = first / (first - last) * (end - begin)
    parts = [torch.where(crossed, (begin - e.left + way) / (e.right - e.left), 1.0) for e in (i, j)]
    below = shared & (later >= 0) & above, shared & (later <= 0) & ~above
    return torch.cat(parts), torch.cat(below).to(way.dtype)


def _moments(at: Tensor, below: Tensor, counted: Tensor, columns: Tensor) -> Tensor:
    """Integrate s (1 - t) and s t along edges, t = 0..1; s = 1 where the region ends at the edge, going up, else -1.

    Args:
        at, below: see `_crossings`.
        counted, columns: of one of the two regions of a `_Plan`.

    Returns:
        (2, E, N).
    """
    side = 2 * ((counted @ below) % 2) - 1  # (E, N), at t = 0
    edges, count = columns.shape
    at = torch.cat([at, at.new_ones(1, at.shape[1])]).index_select(0, columns.flatten())
    at = at.T.reshape(-1, count).sort(-1).values  # (N E, S)
    signs = 1 - 2 * (torch.arange(count, device=at.device) % 2).to(at.dtype)
    tail = 1 - 2 * (count % 2)
    sums = torch.stack([at * signs, at * at * signs]).sum(-1).view(2, -1, edges).mT  # equal rows give equal sums
    whole, second = side * (2 * sums[0] + tail), side * (sums[1] + tail / 2)
    return torch.stack([whole - second, second])


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas (N, 3) of a, of b and of their symmetric difference, and their derivatives (N, 2, E, 2).

    The derivatives are those of the own area and those of the difference, by the vertices of a, then of b.
    """
    split, plan = a.shape[1], _plan(a.shape[1], b.shape[1], a.dtype, a.device)
    vertices = torch.cat([a, b], 1).permute(2, 1, 0)  # (2, E, N)
    start = torch.stack([vertices[0] + SLANT * vertices[1], vertices[1]])
    stop = start[:, plan.follower]
    flipped = stop[0] < start[0]
    (left, low), (right, high) = torch.where(flipped, stop, start), torch.where(flipped, start, stop)
    far, up = right - left, high - low
    edges = torch.stack([left, low, right, high, up / far])
    reach = vertices.abs().amax((0, 1))  # (N,)
    blur = 4 * torch.finfo(a.dtype).eps * reach
    at, below = _crossings(
        _Edges(*edges.index_select(1, plan.first)), _Edges(*edges.index_select(1, plan.second)), blur
    )
    moments = torch.stack([_moments(at, below, *p) for p in zip(plan.counted, plan.columns, strict=True)])
    parts = ((moments[:, 0] * low + moments[:, 1] * high) * far).split([split, len(low) - split], 1)
    (own_a, of_a), (own_b, of_b) = (part.sum(1) for part in parts)  # (N,)
    nothing = len(low) * blur * reach / 2  # what is less is rounding: equal polygons are equal, disjoint ones disjoint
    own_a, own_b, difference = (torch.where(area.abs() <= nothing, 0.0, area) for area in (own_a, own_b, of_a + of_b))
    disjoint = (own_a + own_b - difference).abs() <= nothing
    areas = torch.stack([own_a, own_b, torch.where(disjoint, own_a + own_b, difference)], 1)
    outward = torch.stack([-up, far - SLANT * up])  # (2, E, N)
    start, stop = (torch.where(flipped, moments.flip(1), moments)[:, :, None] * outward).unbind(1)
    slopes = (start + stop[:, :, plan.leader]).permute(3, 0, 2, 1)  # (N, 2, E, 2)
    return areas, slopes.contiguous()


@torch.library.custom_op("densepred::polygon_areas", mutates_args=())
def _polygon_areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(a.device.type, enabled=False):
        return _areas(a, b)


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
        (N, 3): the areas of a, of b and of their symmetric difference; 0, or the sum of the two, where rounding sees no
        difference from that.

    Raises:
        ValueError: shapes that are no pairs of polygons.
    """
    shapes = tuple(a.shape), tuple(b.shape)
    if any(len(shape) != 3 or shape[1] < 1 or shape[2] != 2 for shape in shapes) or len(a) != len(b):
        raise ValueError(
            f"polygons {shapes[0]} and {shapes[1]}: want vertices (N, V, 2) and (N, W, 2), V and W at least 1"
        )
    dtype = torch.promote_types(upcast(a).dtype, b.dtype)
    return _polygon_areas(a.to(dtype), b.to(dtype))[0]


def polygon_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the exact intersection over union of pairs of polygons, by the even-odd rule; see `polygon_areas`.

    It is 1 for equal polygons, whatever vertex they start with and whichever way they run, and 0 for disjoint ones and where
    neither has an area beyond rounding. The gradient is that of the areas. It is 0 between disjoint polygons, on purpose: to
    pull them together is the business of the loss on coordinates that stands beside this one, and polygons around a common
    centre hardly ever miss each other. At equal polygons, the tip of a roof, it is one of the slopes around.

    Args:
        a: (N, V, 2) vertices, any float type.
        b: (N, W, 2).

    Returns:
        (N,), 0..1 up to rounding, in float32, or float64 where an input is.
    """
    own_a, own_b, difference = polygon_areas(a, b).unbind(1)
    both = own_a + own_b
    union = both + difference  # twice the union; the intersection twice is both - difference
    return (both - difference) / torch.where(union == 0, 1.0, union)
