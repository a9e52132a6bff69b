"""Mask losses on sampled points (PointRend, CVPR 2020, arXiv:1912.08193; Mask2Former, arXiv:2112.01527, section 3.3).

Masks are compared at P points each, not at all pixels: sampled bilinearly, then binary cross entropy and dice, of every
query with every target in the matching (`point_matching_costs`) and of matched pairs in the loss (`sample_points`,
`point_mask_losses`). Points are (x, y), [0, 1] from edge to edge of a mask; outside of it there are zeros.

The eager forms never hold all target masks as floats, sample rows of maps without a copy of them that outlives the call,
and turn the cross entropy of every query with every target into one product (see `_mask_costs`).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.ops.backend import uses_triton
from densepred.ops.precision import sum_dtype, upcast

DICE_SMOOTH = 1.0
GROUP = 64
"""Factors in [0.5, 1] whose product stays far from float32's smallest number."""
CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Pixels of maps that are copied, or made floats, at the same time: on a CPU what fits its cache."""
NAME = "point_sample_mask_loss"


# Sampling -------------------------------------------------------------------------------------------------------------


def _chunks(maps: Sequence[int], count: int, device: torch.device) -> list[slice]:
    size = max(1, CHUNK.get(device.type, CHUNK["cuda"]) // max(1, maps[-2] * maps[-1]))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _grid(points: Tensor, count: int) -> Tensor:
    """Return what `grid_sample` takes for so many rows: (R, P, 1, 2), -1..1."""
    grid = points.new_full((), -1).add(points, alpha=2)  # in one pass
    return grid[:, :, None].expand(count, -1, -1, -1)


def _sample(maps: Tensor, points: Tensor, rows: Tensor | None) -> Tensor:
    dtype = sum_dtype(maps, points)
    maps = maps.flatten(0, 1)
    count = len(maps) if rows is None else len(rows)
    grid = _grid(points.to(dtype), count)
    samples = [grid.new_empty(0, points.shape[1])]
    for part in _chunks(maps.shape, count, maps.device):
        chosen = maps[part] if rows is None else maps.index_select(0, rows[part].clamp(min=0))
        found = F.grid_sample(chosen[:, None].to(dtype), grid[part], align_corners=False)
        samples.append(found[:, 0, :, 0])
    return torch.cat(samples) if len(samples) != 2 else samples[1]  # (R, P)


def _sample_backward(
    grad: Tensor, points: Tensor, rows: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    grid = _grid(points.to(grad.dtype), len(grad))
    grad_maps = grad.new_zeros(shape[0] * shape[1] + 1, *shape[2:], dtype=dtype)  # row -1 comes last and is cut off
    for part in _chunks(shape, len(grad), grad.device):
        # What autograd calls for `grid_sample` (bilinear, zeros outside); the maps serve only the grid's gradient.
        maps = grad.new_zeros(()).expand(part.stop - part.start, 1, *shape[2:])
        grad_rows, _ = torch.ops.aten.grid_sampler_2d_backward(
            grad[part, None, :, None].contiguous(), maps, grid[part], 0, 0, False, [True, False]
        )
        at = torch.arange(part.start, part.stop, device=grad.device) if rows is None else rows[part] % len(grad_maps)
        grad_maps.index_copy_(0, at, grad_rows[:, 0].to(dtype))
    return grad_maps[:-1].view(shape)


def _sample_backward_in_order(
    grad: Tensor, points: Tensor, rows: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The same on a GPU without atomic additions: what falls on a pixel is sorted, then summed."""
    pixels, weights = _corners(points.to(grad.dtype), *shape[2:])  # (R or 1, P, 4)
    first = torch.arange(len(grad), device=grad.device) if rows is None else rows
    values = grad[..., None] * weights * (first >= 0)[:, None, None]  # (R, P, 4)
    index = pixels + first.clamp(min=0)[:, None, None] * (shape[2] * shape[3])
    grad_maps = grad.new_zeros(torch.Size(shape).numel())
    grad_maps.index_put_((index.flatten(),), values.flatten(), accumulate=True)
    return grad_maps.view(shape).to(dtype)


def _corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the four pixels around points (..., 2), numbered row by row, and their weights: (..., 4) int64 and float."""
    columns, rows = _axis(points[..., 0], width), _axis(points[..., 1], height)
    pixels = [row * width + column for row, _ in rows for column, _ in columns]
    weights = [down * across for _, down in rows for _, across in columns]
    return torch.stack(pixels, -1), torch.stack(weights, -1)


def _axis(x: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """Return the pixel before and the one after x, each with its linear weight; outside the weight is 0."""
    at = x * side - 0.5
    at = torch.where((at > -1) & (at < side), at, -2)  # nor does count what is no number
    floor = at.floor()
    after, first = at - floor, floor.long()
    before = (1 - after) * (first >= 0)
    after = after * ((first >= -1) & (first + 1 < side))
    return [(first.clamp(min=0), before), ((first + 1).clamp(0, side - 1), after)]


# Losses ---------------------------------------------------------------------------------------------------------------


def _losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits, targets = upcast(logits), upcast(targets)
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(-1)
    probs = logits.sigmoid()
    overlap, size = (probs * targets).sum(-1), probs.sum(-1) + targets.sum(-1)
    return bce, 1 - (2 * overlap + DICE_SMOOTH) / (size + DICE_SMOOTH), torch.stack([overlap, size])


def _losses_backward(grad_bce: Tensor, grad_dice: Tensor, logits: Tensor, targets: Tensor, sums: Tensor) -> Tensor:
    overlap, size = (2 * sums[0] + DICE_SMOOTH)[..., None], (sums[1] + DICE_SMOOTH)[..., None]
    probs, targets = upcast(logits).sigmoid(), upcast(targets)
    # By the probabilities the dice loss has the slope overlap / size^2 - 2 target / size.
    by_probs = (overlap / size - 2 * targets).mul_(grad_dice[..., None] / size)
    by_probs.mul_(probs).mul_(1 - probs)
    return by_probs.add_((probs - targets).mul_(grad_bce[..., None] / logits.shape[-1])).to(logits.dtype)


# Costs ----------------------------------------------------------------------------------------------------------------


def _sum_softplus(logits: Tensor, probs: Tensor) -> Tensor:
    """Return sum_p log(1 + exp(x)) (Q,) of logits (P, Q) and their sigmoids, which it overwrites.

    log(1 + exp(x)) = max(x, 0) - log max(s, 1 - s): one logarithm of a product serves `GROUP` points.
    """
    factors = probs.sub_(0.5).abs_().add_(0.5)  # (P, Q), max(s, 1 - s)
    whole = len(factors) // GROUP * GROUP
    products = torch.cat([factors[:whole].unflatten(0, (-1, GROUP)).prod(1), factors[whole:].prod(0, keepdim=True)])
    return logits.clamp_(min=0).sum(0) - products.log_().sum(0)


def _mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean cross entropy and dice, each (N, Q), of logits (P, Q), overwritten, and targets (N, P) in 0..1.

    The cross entropy of logits x with targets y is log(1 + exp(x)) - x y: one sum a query and one product.
    """
    probs = logits.sigmoid()  # (P, Q)
    overlap, agreement = targets @ probs, targets @ logits  # (N, Q)
    size = probs.sum(0) + targets.sum(1)[:, None]  # (N, Q)
    bce = (_sum_softplus(logits, probs) - agreement) / len(logits)
    return bce, 1 - (2 * overlap + DICE_SMOOTH) / (size + DICE_SMOOTH)


def _image_costs(masks: Sequence[Tensor], targets: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return both costs, each (S, N, Q), of S sets of masks (Q, h, w), targets (N, H, W), and points (S, P, 2)."""
    queries, *size = masks[0].shape
    samples = _sample(targets[None], points.flatten(0, 1)[None], None).unflatten(1, points.shape[:2])  # (N, S, P)
    pixels, weights = _corners(points, *size)  # (S, P, 4)
    # The points that a matching shares are rows of a channels-last table.
    table = points.new_empty(size[0] * size[1], queries)
    costs = []
    for s, mask in enumerate(masks):
        table.copy_(mask.flatten(1).T)
        logits = F.embedding_bag(pixels[s], table, per_sample_weights=weights[s], mode="sum")  # (P, Q)
        costs.append(_mask_costs(logits, samples[:, s]))
    bce, dice = zip(*costs, strict=True)
    return torch.stack(bce), torch.stack(dice)


def _costs(masks: Sequence[Tensor], targets: Sequence[Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    points = points.to(sum_dtype(*masks, points))
    none = points.new_empty(len(masks), 0, masks[0].shape[1])
    costs = [(none, none)]
    for image, target in enumerate(targets):
        if len(target):
            costs.append(_image_costs([mask[image] for mask in masks], target, points[image]))
    bce, dice = (torch.cat(parts, 1) for parts in zip(*costs, strict=True))
    return bce, dice


# The ops --------------------------------------------------------------------------------------------------------------


class Backend(NamedTuple):
    """One implementation, called with the arguments of the ops of these names."""

    sample: Callable[..., Tensor]
    sample_backward: Callable[..., Tensor]
    losses: Callable[..., tuple[Tensor, Tensor, Tensor]]
    losses_backward: Callable[..., Tensor]
    costs: Callable[..., tuple[Tensor, Tensor]]


_EAGER = Backend(_sample, _sample_backward, _losses, _losses_backward, _costs)


def _implementation(*tensors: Tensor) -> Backend:
    chosen, on_cpu = _EAGER, tensors[0].device.type == "cpu"
    if uses_triton(NAME, tensors):
        from densepred.ops.kernels import point_sample_mask_loss as kernels

        chosen, on_cpu = Backend(*(getattr(kernels, name) for name in Backend._fields)), False
    if torch.are_deterministic_algorithms_enabled() and not on_cpu:
        return chosen._replace(sample_backward=_sample_backward_in_order)
    return chosen


@torch.library.custom_op("densepred::sample_points", mutates_args=())
def _sample_points(maps: Tensor, points: Tensor, rows: Tensor | None) -> Tensor:
    return _implementation(maps, points).sample(maps, points, rows)


@torch.library.custom_op("densepred::sample_points_backward", mutates_args=())
def _sample_points_backward(
    grad: Tensor, points: Tensor, rows: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return _implementation(grad, points).sample_backward(grad, points, rows, shape, dtype)


@_sample_points.register_fake
def _samples_shape(maps: Tensor, points: Tensor, rows: Tensor | None) -> Tensor:
    count = maps.shape[0] * maps.shape[1] if rows is None else rows.shape[0]
    return points.new_empty(count, points.shape[1], dtype=sum_dtype(maps, points))


@_sample_points_backward.register_fake
def _maps_shape(
    grad: Tensor, _points: Tensor, _rows: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return grad.new_empty(shape, dtype=dtype)


def _save_points(ctx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    maps, points, rows = inputs
    ctx.save_for_backward(points, rows)
    ctx.shape, ctx.dtype = maps.shape, maps.dtype


def _sample_gradient(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return _sample_points_backward(grad, *ctx.saved_tensors, ctx.shape, ctx.dtype), None, None


_sample_points.register_autograd(_sample_gradient, setup_context=_save_points)


@torch.library.custom_op("densepred::point_mask_losses", mutates_args=())
def _point_mask_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(logits, targets).losses(logits, targets)


@torch.library.custom_op("densepred::point_mask_losses_backward", mutates_args=())
def _point_mask_losses_backward(
    grad_bce: Tensor, grad_dice: Tensor, logits: Tensor, targets: Tensor, sums: Tensor
) -> Tensor:
    return _implementation(logits, targets).losses_backward(grad_bce, grad_dice, logits, targets, sums)


@_point_mask_losses.register_fake
def _losses_shape(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = logits.shape[:-1], sum_dtype(logits, targets)
    return tuple(logits.new_empty(size, dtype=dtype) for size in (shape, shape, (2, *shape)))


@_point_mask_losses_backward.register_fake
def _logits_shape(_bce: Tensor, _dice: Tensor, logits: Tensor, _targets: Tensor, _sums: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save_losses(ctx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.mark_non_differentiable(output[2])


def _losses_gradient(ctx, grad_bce: Tensor, grad_dice: Tensor, _sums: Tensor | None) -> tuple[Tensor, None]:
    return _point_mask_losses_backward(grad_bce, grad_dice, *ctx.saved_tensors), None


_point_mask_losses.register_autograd(_losses_gradient, setup_context=_save_losses)


@torch.library.custom_op("densepred::point_matching_costs", mutates_args=())
def _point_matching_costs(masks: Sequence[Tensor], targets: Sequence[Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(points.device.type, enabled=False):
        return _implementation(*masks, points).costs(masks, targets, points)


@_point_matching_costs.register_fake
def _costs_shape(masks: Sequence[Tensor], targets: Sequence[Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    shape = (len(masks), sum(target.shape[0] for target in targets), masks[0].shape[1])
    dtype = sum_dtype(*masks, points)
    return points.new_empty(shape, dtype=dtype), points.new_empty(shape, dtype=dtype)


# What others call -----------------------------------------------------------------------------------------------------


def sample_points(maps: Tensor, points: Tensor, rows: Tensor | None = None) -> Tensor:
    """Sample maps bilinearly, each at its own points or all at the same ones; differentiable in float maps.

    Whole numbers and bool become floats only a few at a time, or never. Computed in float32, in float64 where maps or
    points are. A gradient of a gradient is not implemented.

    Determinism: the forward pass always is; so is the backward pass on a CPU. On a GPU it adds atomically, unless
    ``torch.use_deterministic_algorithms`` is on: then it sorts, which takes several times as long.

    Args:
        maps: (M, H, W) or (B, Q, H, W), M = B Q: bool, uint8 or any float dtype.
        points: (R, P, 2), or (1, P, 2) for all rows alike; may lie outside.
        rows: (R,) int64, for every row of the result the number of its map in 0..M - 1, no map twice; -1 samples map 0 and
            gives it no gradient. None: all maps in turn.

    Returns:
        (R, P) float32 or float64.

    Raises:
        ValueError: shapes that disagree.
    """
    if maps.dim() not in (3, 4) or points.dim() != 3 or points.shape[-1] != 2:
        raise ValueError(
            f"sample_points: maps {tuple(maps.shape)} must be (M, H, W) or (B, Q, H, W), points {tuple(points.shape)} "
            "(R, P, 2)"
        )
    count = maps.shape[:-2].numel() if rows is None else len(rows)
    if len(points) not in (1, count):
        raise ValueError(f"sample_points: points for {len(points)} rows, but there are {count}: give {count} or 1")
    _check_devices("sample_points", maps=maps, points=points, rows=rows)
    return _sample_points(maps if maps.dim() == 4 else maps[None], points, rows)


def uncertain_points(logits: Tensor, points: Tensor, count: int) -> Tensor:
    """Keep the points whose logits are nearest to 0.

    Args:
        logits: (M, K), at the points.
        points: (M, K, 2).
        count: how many to keep, at most K.

    Returns:
        (M, count, 2), in no order.
    """
    # The bits of non-negative floats are in the order of their values, and integers are compared in 2/3 of the time.
    bits = logits.abs().view(torch.int64 if logits.dtype == torch.float64 else torch.int32)
    index = bits.topk(count, dim=1, largest=False, sorted=False).indices  # (M, count)
    # As complex numbers both coordinates move at once.
    return torch.view_as_real(torch.view_as_complex(points).gather(1, index))


def point_mask_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return every mask's binary cross entropy, the mean over its points, and its dice loss.

    The dice loss of probabilities s and targets t is 1 - (2 sum(s t) + 1) / (sum s + sum t + 1). Differentiable in the
    logits; a gradient of a gradient is not implemented. Computed in float32 (float64 where an input is).

    Determinism: always.

    Args:
        logits: (..., P), any float dtype.
        targets: (..., P), 0..1.

    Returns:
        Two tensors (...) of float32 or float64.

    Raises:
        ValueError: shapes that disagree.
    """
    if logits.shape != targets.shape or not logits.dim():
        raise ValueError(
            f"point_mask_losses: logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must both be (..., P)"
        )
    _check_devices("point_mask_losses", logits=logits, targets=targets)
    return _point_mask_losses(logits, targets)[:2]


@torch.no_grad()
def point_matching_costs(masks: Sequence[Tensor], targets: Sequence[Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    """Return what it costs to match every target with every query of its image, in several sets of predictions.

    The costs are `point_mask_losses` of the query's mask with the target, at points that an image's masks share. No
    gradient. Computed in float32 (float64 where an input is).

    Determinism: always.

    Args:
        masks: per set (B, Q, h, w) logits, any float dtype.
        targets: per image (N, H, W) bool or uint8; N may be 0, H and W differ between images.
        points: (B, S, P, 2), for every image and set.

    Returns:
        Binary cross entropy and dice cost, each (S, T, Q): T targets of the batch, those of image 0 first.

    Raises:
        ValueError: shapes that disagree.
    """
    batch, sets = len(targets), len(masks)
    if any(mask.dim() != 4 or mask.shape != masks[0].shape for mask in masks) or len(masks[0]) != batch:
        shapes = sorted({tuple(mask.shape) for mask in masks})
        raise ValueError(f"point_matching_costs: masks are {shapes}, every set must be ({batch}, Q, h, w)")
    if points.dim() != 4 or (*points.shape[:2], points.shape[3]) != (batch, sets, 2):
        raise ValueError(f"point_matching_costs: points {tuple(points.shape)} must be ({batch}, {sets}, P, 2)")
    named = {f"targets[{image}]": target for image, target in enumerate(targets)}
    _check_devices("point_matching_costs", masks=masks[0], points=points, **named)
    return _point_matching_costs(masks, targets, points)


def _check_devices(op: str, **tensors: Tensor | None) -> None:
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    (first, device), *others = devices.items()
    for name, other in others:
        if other != device:
            raise ValueError(f"{op}: {name} is on {other}, {first} on {device}: move them to one device")


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Return a CPU tensor on a device; to a GPU it goes from pinned memory, which nobody has to wait for."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


__all__ = ["Backend", "point_mask_losses", "point_matching_costs", "sample_points", "uncertain_points", "upload"]
