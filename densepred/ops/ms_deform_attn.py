"""Multi-scale deformable attention (Deformable DETR, ICLR 2021, arXiv:2010.04159, equation 3).

A head of a query sums ``levels * points`` bilinear samples, hence four times as many rows of the values times one
number each: a weighted bag of rows. `embedding_bag` sums such a bag without a tensor of the gathered rows; the
gradient of the numbers is a dot product per row, that of the values is again a bag, of output gradients per pixel.
The two pixels along an axis are always neighbours inside the level; their linear weights, max(0, 1 - distance), vanish
where the sample lies outside, so that no corner needs a mask. Against one `grid_sample` per level and a stack of the
samples (CPU, float32, 1 image, 8 heads of 32 channels, levels of 64, 32 and 16 squared, 4 points): with a query per
pixel 5.7 times as fast forward and 2.2 times with the backward, with 100 queries 2.1 and 1.3 times.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from densepred.ops.backend import check_tensors, uses_triton
from densepred.ops.precision import sum_dtype

MAX_ROWS = 2**24
"""From here on float32 cannot number pixels; such values go the eager way."""


class _Axis(NamedTuple):
    """Numbers of the levels along one axis, written out for the n = heads * L * P samples of a query, each (n,)."""

    side: Tensor
    shift: Tensor  # a half; infinite in an empty level, whose samples thus lie far outside
    last: Tensor  # the greatest pixel that has a successor, or 0
    gap: Tensor  # the distance to that successor: 1; infinite where the side is 1
    step: Tensor  # the rows of the table between the two, 0 where there is no second


class _Table(NamedTuple):
    """Where samples lie in the values seen as (B * S * heads, D). A broadcast over a few numbers only is slow."""

    y: _Axis
    x: _Axis
    line: Tensor  # (n,), pixels of a line
    start: Tensor  # (B, 1, n), the row of the level's first pixel
    heads: int


class _Samples(NamedTuple):
    """The four pixels around every sample, (y, x) from the top left, as (B, Q, n)."""

    rows: tuple[Tensor, Tensor, Tensor, Tensor]
    y: tuple[Tensor, Tensor]  # the distances to the first and the second line, down from it
    x: tuple[Tensor, Tensor]


def _table(value: Tensor, shapes: Tensor, starts: Tensor, points: int, dtype: torch.dtype) -> _Table:
    batch, pixels, heads, _ = value.shape
    shapes, starts = shapes.to(value.device), starts.to(value.device)
    index = torch.int32 if batch * pixels * heads < 2**31 else torch.int64
    filled = shapes.prod(1) > 0  # (L,)

    def written_out(numbers: Tensor, kind: torch.dtype) -> Tensor:  # (heads or 1, L) -> (n,)
        return numbers.to(kind)[..., None].expand(heads, -1, points).reshape(-1)

    def axis(side: Tensor, rows: Tensor) -> _Axis:
        infinite = torch.full_like(side, torch.inf, dtype=dtype)
        return _Axis(
            side=written_out(side, dtype),
            shift=written_out(torch.where(filled, 0.5, infinite), dtype),
            last=written_out((side - 2).clamp(min=0), dtype),
            gap=written_out(torch.where(side > 1, 1.0, infinite), dtype),
            step=written_out(rows * ((side > 1) & filled), index),
        )

    height, width = shapes.unbind(1)
    head = torch.arange(heads, device=value.device)[:, None]
    image = torch.arange(batch, dtype=index, device=value.device)[:, None, None] * (pixels * heads)
    # An empty level at the end may start past the table.
    start = written_out(starts.clamp(max=pixels - 1) * heads + head, index) + image
    return _Table(axis(height, width * heads), axis(width, heads), written_out(width, index), start, heads)


def _along(location: Tensor, axis: _Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first of the two pixels that a location may lie between, and the way to it from both."""
    at = (location * axis.side).sub_(axis.shift)
    first = at.floor()
    # fmax: a location that is no number has a pixel too, and a weight that is none.
    torch.fmax(torch.minimum(first, axis.last, out=first), first.new_zeros(()), out=first)
    return first, at.sub_(first), at - axis.gap


def _sample(locations: Tensor, table: _Table) -> _Samples:
    """Look up locations (B, Q, heads, L, P, 2)."""
    x, y = (part.flatten(2) for part in locations.unbind(-1))
    line, *down = _along(y, table.y)
    column, *across = _along(x, table.x)
    kind = table.start.dtype
    row = line.to(kind).mul_(table.line).add_(column.to(kind)).mul_(table.heads).add_(table.start)
    below = row + table.y.step
    return _Samples((row, row + table.x.step, below, below + table.x.step), tuple(down), tuple(across))


def _share(distance: Tensor) -> Tensor:
    """Return the linear weight of a pixel at a distance; destroys the distance."""
    return distance.abs_().neg_().add_(1).clamp_(min=0)


def _slope(distance: Tensor) -> Tensor:
    """Return the derivative of `_share`; at whole numbers that of greater distances."""
    return ((distance >= -1) & (distance < 0)).to(distance.dtype) - ((distance >= 0) & (distance < 1)).to(
        distance.dtype
    )


def _sum_bags(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, sampling_locations: Tensor, weights: Tensor
) -> Tensor:
    batch, _, heads, depth = value.shape
    queries, samples, points = weights.shape[1], weights.shape[3:].numel(), weights.shape[4]
    if not value.numel() or not weights.numel():
        return value.new_zeros(batch, queries, heads * depth)
    dtype = sum_dtype(value, sampling_locations, weights)
    rows, down, across = _sample(
        sampling_locations.to(dtype), _table(value, spatial_shapes, level_start_index, points, dtype)
    )
    (top, bottom), (left, right) = (map(_share, distances) for distances in (down, across))
    weights = weights.to(dtype).flatten(2)  # (B, Q, n)
    top, bottom = top.mul_(weights), bottom.mul_(weights)
    table = value.to(dtype).reshape(-1, depth)  # (B * S * heads, D)
    sums = None
    # A bag for each corner: to interleave the four would cost more.
    for row, numbers in zip(rows, (top * left, top.mul_(right), left.mul_(bottom), right.mul_(bottom)), strict=True):
        part = functional.embedding_bag(
            row.reshape(-1, samples), table, per_sample_weights=numbers.reshape(-1, samples), mode="sum"
        )
        sums = part if sums is None else sums.add_(part)
    return sums.reshape(batch, queries, heads * depth).to(value.dtype)


def _corners(y: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack([down * across for down in y for across in x], 2)  # (B, Q, 4, n)


def _sum_bags_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (value, sampling_locations, weights)
    if not value.numel() or not weights.numel():
        return tuple(tensor.new_zeros(tensor.shape) for tensor in inputs)
    heads, samples, points = value.shape[2], weights.shape[3:].numel(), weights.shape[4]
    dtype = sum_dtype(*inputs)
    placed = _table(value, spatial_shapes, level_start_index, points, dtype)
    corners, down, across = _sample(sampling_locations.to(dtype), placed)
    slopes = [tuple(map(_slope, distances)) for distances in (down, across)]
    shares = [tuple(map(_share, distances)) for distances in (down, across)]
    bilinear, factors = _corners(*shares), weights.to(dtype).flatten(2)[:, :, None]  # (B, Q, 4 or 1, n)

    def bags(corners: Tensor) -> Tensor:  # (B, Q, 4, n) -> (B * Q * heads, 4 * L * P)
        return corners.unflatten(3, (heads, samples)).transpose(2, 3).reshape(-1, 4 * samples)

    rows = bags(torch.stack(corners, 2))
    grad = grad.to(dtype).reshape(rows.shape[0], -1)  # (B * Q * heads, D)
    grad_value = _scatter(grad, rows, bags(bilinear * factors), value.shape[:3].numel()).reshape(value.shape)
    dots = _dots(grad, value.to(dtype).reshape(-1, value.shape[-1]), rows)
    dots = dots.reshape(*weights.shape[:3], 4, samples).transpose(2, 3).flatten(3)  # (B, Q, 4, n)
    grad_weights = (dots * bilinear).sum(2).reshape(weights.shape)
    dots.mul_(factors)
    grad_y = (dots * _corners(slopes[0], shares[1])).sum(2).mul_(placed.y.side)
    grad_x = (dots * _corners(shares[0], slopes[1])).sum(2).mul_(placed.x.side)
    grad_locations = torch.stack([grad_x, grad_y], -1).reshape(sampling_locations.shape)
    gradients = (grad_value, grad_locations, grad_weights)
    return tuple(gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True))


def _scatter(grad: Tensor, rows: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Return (count, D): for every row the sum of the gradients of the bags that hold it, times its numbers."""
    # Sorted by row, the gradient is a bag too: faster than `index_add_`, and its order of summation is fixed.
    flat = rows.reshape(-1)
    order = flat.sort(stable=True).indices
    sizes = flat.bincount(minlength=count)
    bags = order.div(rows.shape[1], rounding_mode="floor")
    sorted_numbers = numbers.reshape(-1).index_select(0, order)
    return functional.embedding_bag(
        bags, grad, sizes.cumsum(0) - sizes, per_sample_weights=sorted_numbers, mode="sum"
    )  # (count, D)


def _dots(grad: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Return the dot product of every row in a bag with the gradient of the bag."""
    starts = torch.arange(0, rows.numel(), rows.shape[1], device=rows.device)
    bags = torch.arange(len(rows), device=rows.device).repeat_interleave(rows.shape[1])
    # What autograd calls for `embedding_bag`; below autograd, where an op's backward runs, it has no public name.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad, table, rows.reshape(-1), starts, bags, 0)
    return dots.reshape(rows.shape)


def _placed(
    spatial_shapes: Tensor, references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the fused op leaves to the plain one: locations, weights (B, Q, heads, L, P), sides (L, P, 2)."""
    dtype, points = sum_dtype(references, offsets, logits), offsets.shape[4]
    # References and sides are written out for every point: a broadcast over a few numbers only is slow.
    sides = spatial_shapes.to(offsets.device, dtype).flip(1).clamp(min=1)  # an empty level is sampled nowhere
    sides = sides[:, None].expand(-1, points, -1).contiguous()
    references = references.to(dtype)[:, :, None, :, None].expand(-1, -1, -1, -1, points, -1).contiguous()
    # Along the last axis a softmax over a dozen numbers takes five times as long.
    weights = logits.to(dtype).flatten(3).movedim(-1, 0).softmax(0).movedim(0, -1)
    return references + offsets.to(dtype) / sides, weights.unflatten(3, logits.shape[3:]), sides


def _fused_sum_bags(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> Tensor:
    locations, weights, _ = _placed(spatial_shapes, references, offsets, logits)
    return _sum_bags(value, spatial_shapes, level_start_index, locations, weights)


def _fused_sum_bags_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    references: Tensor,
    offsets: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    locations, weights, sides = _placed(spatial_shapes, references, offsets, logits)
    grad_value, grad_locations, grad_weights = _sum_bags_backward(
        grad, value, spatial_shapes, level_start_index, locations, weights
    )
    # What autograd calls for a softmax, along the axis that lies first in memory.
    slopes, shares = (x.flatten(3).movedim(-1, 0) for x in (grad_weights, weights))
    grad_logits = torch.ops.aten._softmax_backward_data(slopes, shares, 0, shares.dtype).movedim(0, -1)
    return (
        grad_value,
        grad_locations.div_(sides).to(offsets.dtype),
        grad_logits.to(logits.dtype).reshape(logits.shape).contiguous(),
    )


class Backend(NamedTuple):
    """The two halves of one implementation, called with the arguments of the op; the backward's first is its gradient."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


_EAGER = Backend(_sum_bags, _sum_bags_backward)
_FUSED_EAGER = Backend(_fused_sum_bags, _fused_sum_bags_backward)


def _implementation(fused: bool, value: Tensor, *floats: Tensor) -> Backend:
    unfit = None
    if value.shape[1] >= MAX_ROWS:
        unfit = f"value has {value.shape[1]} rows, the kernels number fewer than {MAX_ROWS} in float32"
    if not uses_triton("ms_deform_attn", (value, *floats), unfit):
        return _FUSED_EAGER if fused else _EAGER
    from densepred.ops.kernels import ms_deform_attn as kernels

    if fused:
        return Backend(kernels.forward_fused, kernels.backward_fused)
    return Backend(kernels.forward, kernels.backward)


@torch.library.custom_op("densepred::ms_deform_attn", mutates_args=())
def _ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    _check_levels(value.shape[1], spatial_shapes, level_start_index)
    implementation = _implementation(False, value, sampling_locations, attention_weights)
    return implementation.forward(
        value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )  # (B, Q, heads * D)


@torch.library.custom_op("densepred::ms_deform_attn_backward", mutates_args=())
def _ms_deform_attn_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _implementation(False, value, sampling_locations, attention_weights)
    if torch.are_deterministic_algorithms_enabled():
        implementation = _EAGER
    return implementation.backward(
        grad, value, spatial_shapes, level_start_index, sampling_locations, attention_weights
    )


@torch.library.custom_op("densepred::ms_deform_attn_fused", mutates_args=())
def _ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    _check_levels(value.shape[1], spatial_shapes, level_start_index)
    implementation = _implementation(True, value, reference_points, offsets, attention_logits)
    return implementation.forward(
        value, spatial_shapes, level_start_index, reference_points, offsets, attention_logits
    )  # (B, Q, heads * D)


@torch.library.custom_op("densepred::ms_deform_attn_fused_backward", mutates_args=())
def _ms_deform_attn_fused_backward(
    grad: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation = _implementation(True, value, reference_points, offsets, attention_logits)
    if torch.are_deterministic_algorithms_enabled():
        implementation = _FUSED_EAGER
    return implementation.backward(
        grad, value, spatial_shapes, level_start_index, reference_points, offsets, attention_logits
    )


@_ms_deform_attn.register_fake
def _output_shape(value: Tensor, *others: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], others[-1].shape[1], value.shape[2] * value.shape[3])


_ms_deform_attn_fused.register_fake(_output_shape)


@_ms_deform_attn_backward.register_fake
def _gradient_shapes(_grad: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (value, *others[-2:]))


_ms_deform_attn_fused_backward.register_fake(_gradient_shapes)


def _save_for_backward(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor, None, None, Tensor, Tensor]:
    grad_value, grad_locations, grad_weights = _ms_deform_attn_backward(grad, *ctx.saved_tensors)
    return grad_value, None, None, grad_locations, grad_weights


def _fused_gradients(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, Tensor, Tensor]:
    grad_value, grad_offsets, grad_logits = _ms_deform_attn_fused_backward(grad, *ctx.saved_tensors)
    return grad_value, None, None, None, grad_offsets, grad_logits


_ms_deform_attn.register_autograd(_gradients, setup_context=_save_for_backward)
_ms_deform_attn_fused.register_autograd(_fused_gradients, setup_context=_save_for_backward)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sum bilinear samples of several maps, weighted, for every query and head.

    A location (x, y) lies at pixel ``x * W - 0.5, y * H - 0.5`` of its level; pixels outside count as zero. The sums
    run in float32 (float64 where an input is). A gradient of a gradient is not implemented.

    Determinism: on a GPU the gradient of `value` is summed in no fixed order, unless `torch.use_deterministic_algorithms`
    is on: then the backward runs in its eager form, which sorts. All else is the same in every run.

    Args:
        value: (B, S, heads, D), any float dtype: the levels one after another, each row by row.
        spatial_shapes: (L, 2) int64, height and width of every level; a side of 0 makes an empty level.
        level_start_index: (L,) int64, the first row of every level in `value`.
        sampling_locations: (B, Q, heads, L, P, 2) as (x, y), [0, 1] from edge to edge of a level; may lie outside.
        attention_weights: (B, Q, heads, L, P), any numbers.

    Returns:
        (B, Q, heads * D), the channels of head 0 first, in the dtype of `value`.

    Raises:
        ValueError: shapes that disagree, levels that do not lie within `value` (looked at where the two small tensors
            are on the CPU: elsewhere it would stop the device).
    """
    check_tensors(
        "ms_deform_attn", value=value, sampling_locations=sampling_locations, attention_weights=attention_weights
    )
    _check_shapes(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    return _ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    reference_points: Tensor,
    offsets: Tensor,
    attention_logits: Tensor,
) -> Tensor:
    """Sum samples around reference points, weighted by a softmax over all levels and points of a head: `ms_deform_attn`
    of locations ``reference_points + offsets / (W, H)`` and of the softmax, neither of which is kept.

    Args:
        value: (B, S, heads, D), as for `ms_deform_attn`, like the next two.
        spatial_shapes: (L, 2) int64.
        level_start_index: (L,) int64.
        reference_points: (B or 1, Q, L, 2) as (x, y), [0, 1] from edge to edge of a level. They get no gradient.
        offsets: (B, Q, heads, L, P, 2) as (x, y), in pixels of their level.
        attention_logits: (B, Q, heads, L, P).

    Returns:
        (B, Q, heads * D), the channels of head 0 first, in the dtype of `value`.

    Raises:
        ValueError: as `ms_deform_attn`; `reference_points` that want a gradient.
    """
    check_tensors(
        "ms_deform_attn_fused",
        value=value,
        reference_points=reference_points,
        offsets=offsets,
        attention_logits=attention_logits,
    )
    if reference_points.requires_grad:
        raise ValueError(
            "ms_deform_attn_fused gives reference_points no gradient: detach them, or call ms_deform_attn with locations"
        )
    names = ("offsets", "attention_logits")
    _check_shapes(value, spatial_shapes, level_start_index, offsets, attention_logits, names)
    _, queries, _, levels, _ = attention_logits.shape
    if reference_points.shape[1:] != (queries, levels, 2) or len(reference_points) not in (1, len(value)):
        raise ValueError(
            f"ms_deform_attn_fused: reference_points is {tuple(reference_points.shape)}, but "
            f"{(len(value), queries, levels, 2)} or {(1, queries, levels, 2)} goes with attention_logits "
            f"{tuple(attention_logits.shape)}"
        )
    return _ms_deform_attn_fused(value, spatial_shapes, level_start_index, reference_points, offsets, attention_logits)


def _check_shapes(
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    locations: Tensor,
    weights: Tensor,
    names: tuple[str, str] = ("sampling_locations", "attention_weights"),
) -> None:
    if value.dim() != 4 or weights.dim() != 5:
        raise ValueError(
            f"ms_deform_attn: value {tuple(value.shape)} must be (B, S, heads, D) and "
            f"{names[1]} {tuple(weights.shape)} (B, Q, heads, L, P)"
        )
    batch, _, heads, _ = value.shape
    _, queries, _, levels, points = weights.shape
    wanted = {
        names[1]: (weights, (batch, queries, heads, levels, points)),
        names[0]: (locations, (batch, queries, heads, levels, points, 2)),
        "spatial_shapes": (shapes, (levels, 2)),
        "level_start_index": (starts, (levels,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"ms_deform_attn: {name} is {tuple(tensor.shape)}, but {shape} goes with value {tuple(value.shape)} "
                f"and {names[1]} {tuple(weights.shape)}"
            )


def _check_levels(pixels: int, shapes: Tensor, starts: Tensor) -> None:
    if shapes.device.type != "cpu" or starts.device.type != "cpu":
        return
    for (height, width), start in zip(shapes.tolist(), starts.tolist(), strict=True):
        if min(height, width, start) < 0 or start + height * width > pixels:
            raise ValueError(
                f"ms_deform_attn: the level of {height} x {width} pixels from row {start} on does not lie within "
                f"the {pixels} rows of value"
            )


__all__ = ["Backend", "ms_deform_attn", "ms_deform_attn_fused"]
