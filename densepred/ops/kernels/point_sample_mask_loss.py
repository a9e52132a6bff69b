"""Triton kernels of the mask losses on sampled points.

Sampling: a program gathers the four pixels of `POINTS` points of one map, 4 points a thread, hence 16 loads in flight, of
bytes where the map is bool. Programs of a map are neighbours in the grid: at any time the maps at work lie in the L2
(256x256 float32: 256 KiB), so that memory is read once and the cost is the L2's sectors, two a point. Nothing but the
samples is written. Backward: the same tiling, four atomic additions a point to a gradient of zeros; for half precision
into float32 copies of the sampled maps alone, which are then put into place. Atomic additions come in any order: the op
takes another way where determinism is asked for. Distances to pixels are computed by a fused multiply-add from the
location, not from the rounded coordinate, so that wide maps lose no digits.

Losses: a program holds one mask's sums over its points in registers and reads logits and targets once, 8 bytes a point;
the backward program needs the overlap and the size from it and writes 4 bytes a point. log(1 + e), e in 0..1, is
2 artanh(e / (2 + e)) by its series: no digits are lost where a prediction is sure. Deterministic.

Costs: points are sorted first, line by line, since all queries and targets of an image share them: a warp then reads a few
lines of the cache where it would else read 32. Per set of predictions, samples of all queries (one launch) meet the samples
of the targets (one launch an image for all sets). A program of `_cost_kernel` owns `QUERIES` queries, up to 64 targets and
a share of the points: it turns a tile of logits into probabilities and softplus in registers, once, and multiplies logits
and probabilities with the targets' tile on the tensor cores in three TF32 products each (float32 to about 1e-6). The
shares' sums are added afterwards, in order: no atomics, deterministic.

The choice of uncertain points stays with `torch.topk`, a radix selection that reads 4 bytes a candidate five times.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from densepred.ops.point_sample_mask_loss import DICE_SMOOTH, upload

POINTS = 512
"""Points of a program that samples."""
LOSS_POINTS = 1024
"""Points of a mask that a program of the losses holds at a time."""
QUERIES, COST_POINTS = 32, 32
"""A program's queries and the points of a step in the costs."""
COST_PROGRAMS = 528
"""Programs of the costs that keep a GPU busy: four for each of 132 multiprocessors."""


@triton.jit
def _along(x, side):
    """Return the pixels before and after locations along an axis, each with its linear weight, 0 where outside."""
    side = side * 1.0
    first = tl.floor(tl.fma(x, side, -0.5))
    after = tl.fma(x, side, -0.5 - first)
    # Written so that what is no number lies outside.
    has_first = (first >= 0) & (first < side)
    has_second = (first >= -1) & (first < side - 1)
    return (
        tl.where(has_first, first, 0).to(tl.int32),
        tl.where(has_second, first + 1, 0).to(tl.int32),
        tl.where(has_first, 1 - after, 0.0),
        tl.where(has_second, after, 0.0),
    )


@triton.jit
def _load_points(pairs_ptr, row, at, valid, points):
    """Return x and y of a row's points; each pair is an int64, so that a thread reads 16 bytes at a time."""
    pair = tl.load(pairs_ptr + row.to(tl.int64) * points + at, valid, other=0)
    return pair.to(tl.int32).to(tl.float32, bitcast=True), (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _sample_kernel(
    maps_ptr,
    pairs_ptr,
    rows_ptr,
    out_ptr,
    maps,
    queries,
    points,
    group,
    height,
    width,
    stride_image,
    stride_query,
    stride_y,
    stride_x,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(points, BLOCK)
    row = tl.program_id(0) // chunks
    at = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    valid = at < points
    number = row.to(tl.int64)
    if HAS_ROWS:
        number = tl.load(rows_ptr + row)
        number = tl.where((number >= 0) & (number < maps), number, 0)
    x, y = _load_points(pairs_ptr, row // group, at, valid, points)
    left, right, by_left, by_right = _along(x, width)
    top, bottom, by_top, by_bottom = _along(y, height)
    base = maps_ptr + (number // queries) * stride_image + (number % queries) * stride_query
    upper, lower = base + top * stride_y, base + bottom * stride_y
    left, right = left * stride_x, right * stride_x
    a = tl.load(upper + left, (by_left != 0) & (by_top != 0), other=0).to(tl.float32)
    b = tl.load(upper + right, (by_right != 0) & (by_top != 0), other=0).to(tl.float32)
    c = tl.load(lower + left, (by_left != 0) & (by_bottom != 0), other=0).to(tl.float32)
    d = tl.load(lower + right, (by_right != 0) & (by_bottom != 0), other=0).to(tl.float32)
    out = by_top * (by_left * a + by_right * b) + by_bottom * (by_left * c + by_right * d)
    tl.store(out_ptr + row.to(tl.int64) * points + at, out, valid)


@triton.jit
def _sample_backward_kernel(
    grad_ptr,
    pairs_ptr,
    rows_ptr,
    out_ptr,
    maps,
    points,
    group,
    height,
    width,
    stride_grad,
    HAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(points, BLOCK)
    row = tl.program_id(0) // chunks
    at = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    valid = at < points
    number = row.to(tl.int64)
    if HAS_ROWS:
        number = tl.load(rows_ptr + row)
    exists = (number >= 0) & (number < maps)
    number = tl.where(exists, number, 0)
    x, y = _load_points(pairs_ptr, row // group, at, valid, points)
    grad = tl.load(grad_ptr + row.to(tl.int64) * stride_grad + at, valid, other=0).to(tl.float32)
    grad = tl.where(exists, grad, 0.0)
    left, right, by_left, by_right = _along(x, width)
    top, bottom, by_top, by_bottom = _along(y, height)
    base = out_ptr + number * (height * width)
    upper, lower = base + top * width, base + bottom * width
    by_top, by_bottom = by_top * grad, by_bottom * grad
    tl.atomic_add(upper + left, by_top * by_left, (by_top != 0) & (by_left != 0), sem="relaxed")
    tl.atomic_add(upper + right, by_top * by_right, (by_top != 0) & (by_right != 0), sem="relaxed")
    tl.atomic_add(lower + left, by_bottom * by_left, (by_bottom != 0) & (by_left != 0), sem="relaxed")
    tl.atomic_add(lower + right, by_bottom * by_right, (by_bottom != 0) & (by_right != 0), sem="relaxed")


def _pairs(points: Tensor) -> Tensor:
    """Return points (G, P, 2) as (G, P, 1) int64, x in the lower half."""
    points = points.float().contiguous()
    return (points.clone() if points.storage_offset() % 2 else points).view(torch.int64)


def _launch_sampling(maps: Tensor, points: Tensor, rows: Tensor | None, out: Tensor) -> None:
    """Sample maps (B, Q, H, W) into out (R, P) at points (G, P, 2): G divides R, and R / G rows after another share."""
    batch, queries, height, width = maps.shape
    if not out.numel():
        return
    if not batch * queries * height * width:
        out.zero_()
        return
    if (height - 1) * maps.stride(2) + (width - 1) * maps.stride(3) >= 2**31:
        maps = maps.contiguous()
    maps = maps.view(torch.uint8) if maps.dtype == torch.bool else maps
    count = out.shape[1]
    with torch.cuda.device_of(maps):
        _sample_kernel[(len(out) * triton.cdiv(count, POINTS),)](
            maps,
            _pairs(points),
            rows,
            out,
            batch * queries,
            queries,
            count,
            len(out) // len(points),
            height,
            width,
            *maps.stride(),
            HAS_ROWS=rows is not None,
            BLOCK=POINTS,
            num_warps=4,
        )


def sample(maps: Tensor, points: Tensor, rows: Tensor | None) -> Tensor:
    count = maps.shape[0] * maps.shape[1] if rows is None else len(rows)
    out = torch.empty(count, points.shape[1], dtype=torch.float32, device=maps.device)
    _launch_sampling(maps, points, rows, out)
    return out


def sample_backward(
    grad: Tensor, points: Tensor, rows: Tensor | None, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    count, maps, pixels = len(grad), shape[0] * shape[1], shape[2] * shape[3]
    if dtype == torch.float32 or rows is None:
        return _scatter(grad, points, rows, maps, shape[2:]).view(shape).to(dtype)
    found = _scatter(grad, points, None, count, shape[2:])
    out = grad.new_zeros(maps + 1, pixels, dtype=dtype)  # row -1 comes last and is cut off
    out.index_copy_(0, rows % (maps + 1), found.to(dtype))
    return out[:-1].view(tuple(shape))


def _scatter(grad: Tensor, points: Tensor, rows: Tensor | None, maps: int, size: Sequence[int]) -> Tensor:
    """Return the float32 gradient (maps, H W) of maps sampled by the rows of grad (R, P)."""
    out = grad.new_zeros(maps, size[0] * size[1], dtype=torch.float32)
    if grad.numel() and out.numel():
        grad = grad if grad.stride(1) == 1 else grad.contiguous()
        with torch.cuda.device_of(grad):
            _sample_backward_kernel[(len(grad) * triton.cdiv(grad.shape[1], POINTS),)](
                grad,
                _pairs(points),
                rows,
                out,
                maps,
                grad.shape[1],
                len(grad) // len(points),
                *size,
                grad.stride(0),
                HAS_ROWS=rows is not None,
                BLOCK=POINTS,
                num_warps=4,
            )
    return out


@triton.jit
def _sigmoid_and_softplus(x):
    """Return 1 / (1 + exp(-x)) and log(1 + exp(x))."""
    e = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x >= 0, 1.0, e) / (1 + e)
    z = e / (2 + e)  # 0..1/3
    square = z * z
    series = 1 + square * (
        1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))))
    )
    return sigmoid, tl.where(x < 0, 0.0, x) + 2 * z * series


@triton.jit
def _losses_kernel(
    logits_ptr, targets_ptr, bce_ptr, dice_ptr, sums_ptr, masks, points, SMOOTH: tl.constexpr, BLOCK: tl.constexpr
):
    mask = tl.program_id(0)
    start = mask.to(tl.int64) * points
    bce = tl.zeros([BLOCK], tl.float32)
    overlap = tl.zeros([BLOCK], tl.float32)
    size = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, points, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + start + at, at < points, other=-float("inf")).to(tl.float32)
        y = tl.load(targets_ptr + start + at, at < points, other=0).to(tl.float32)
        sigmoid, softplus = _sigmoid_and_softplus(x)  # both 0 past the end
        bce += softplus - tl.where(at < points, x, 0.0) * y
        overlap += sigmoid * y
        size += sigmoid + y
    bce, overlap, size = tl.sum(bce, 0), tl.sum(overlap, 0), tl.sum(size, 0)
    tl.store(bce_ptr + mask, bce / points)
    tl.store(dice_ptr + mask, 1 - (2 * overlap + SMOOTH) / (size + SMOOTH))
    tl.store(sums_ptr + mask, overlap)
    tl.store(sums_ptr + masks + mask, size)


@triton.jit
def _losses_backward_kernel(
    grad_bce_ptr,
    grad_dice_ptr,
    logits_ptr,
    targets_ptr,
    sums_ptr,
    out_ptr,
    masks,
    points,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunks = tl.cdiv(points, BLOCK)
    mask = tl.program_id(0) // chunks
    at = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    start = mask.to(tl.int64) * points
    x = tl.load(logits_ptr + start + at, at < points, other=0).to(tl.float32)
    y = tl.load(targets_ptr + start + at, at < points, other=0).to(tl.float32)
    by_bce = tl.load(grad_bce_ptr + mask).to(tl.float32) / points
    size = tl.load(sums_ptr + masks + mask) + SMOOTH
    by_dice = tl.load(grad_dice_ptr + mask).to(tl.float32) / size
    overlap = (2 * tl.load(sums_ptr + mask) + SMOOTH) / size
    e = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x >= 0, 1.0, e) / (1 + e)
    slope = e / ((1 + e) * (1 + e))
    grad = by_bce * (sigmoid - y) + by_dice * (overlap - 2 * y) * slope
    tl.store(out_ptr + start + at, grad, at < points)


def losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shape, points = logits.shape[:-1], logits.shape[-1]
    bce, dice, sums = (
        torch.empty(size, dtype=torch.float32, device=logits.device) for size in (shape, shape, (2, *shape))
    )
    if bce.numel():
        with torch.cuda.device_of(logits):
            _losses_kernel[(bce.numel(),)](
                logits.contiguous(),
                targets.contiguous(),
                bce,
                dice,
                sums,
                bce.numel(),
                points,
                SMOOTH=DICE_SMOOTH,
                BLOCK=LOSS_POINTS,
                num_warps=4,
            )
    return bce, dice, sums


def losses_backward(grad_bce: Tensor, grad_dice: Tensor, logits: Tensor, targets: Tensor, sums: Tensor) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    masks, points = grad_bce.numel(), logits.shape[-1]
    if out.numel():
        with torch.cuda.device_of(logits):
            _losses_backward_kernel[(masks * triton.cdiv(points, LOSS_POINTS),)](
                grad_bce.contiguous(),
                grad_dice.contiguous(),
                logits.contiguous(),
                targets.contiguous(),
                sums,
                out,
                masks,
                points,
                SMOOTH=DICE_SMOOTH,
                BLOCK=LOSS_POINTS,
                num_warps=4,
            )
    return out


@triton.jit
def _cost_kernel(
    logits_ptr,
    targets_ptr,
    starts_ptr,
    out_ptr,
    queries,
    points,
    stride_target,
    stride_share,
    stride_kind,
    shares,
    share_points,
    query_tiles,
    target_tiles,
    QUERIES: tl.constexpr,
    TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    share = tl.program_id(0) % shares
    tile = tl.program_id(0) // shares
    query = (tile % query_tiles) * QUERIES + tl.arange(0, QUERIES)
    tile = tile // query_tiles
    image = tile // target_tiles
    start = tl.load(starts_ptr + image)
    target = start + (tile % target_tiles) * TARGETS + tl.arange(0, TARGETS)
    has_query, has_target = query < queries, target < tl.load(starts_ptr + image + 1)
    logits = logits_ptr + (image.to(tl.int64) * queries + query)[:, None] * points
    targets = targets_ptr + target.to(tl.int64)[:, None] * stride_target
    agreement = tl.zeros([QUERIES, TARGETS], tl.float32)
    overlap = tl.zeros([QUERIES, TARGETS], tl.float32)
    softplus_sum = tl.zeros([QUERIES], tl.float32)
    sigmoid_sum = tl.zeros([QUERIES], tl.float32)
    target_sum = tl.zeros([TARGETS], tl.float32)
    begin = share * share_points
    end = tl.minimum(begin + share_points, points)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)[None, :]
        inside = has_query[:, None] & (at < end)
        x = tl.load(logits + at, inside, other=0)
        y = tl.load(targets + at, has_target[:, None] & (at < end), other=0)
        sigmoid, softplus = _sigmoid_and_softplus(x)
        sigmoid, softplus = tl.where(inside, sigmoid, 0.0), tl.where(inside, softplus, 0.0)
        softplus_sum += tl.sum(softplus, 1)
        sigmoid_sum += tl.sum(sigmoid, 1)
        target_sum += tl.sum(y, 1)
        y = tl.trans(y)
        agreement = tl.dot(x, y, agreement, input_precision="tf32x3")
        overlap = tl.dot(sigmoid, y, overlap, input_precision="tf32x3")
    out = out_ptr + share.to(tl.int64) * stride_share + target.to(tl.int64)[None, :] * queries + query[:, None]
    inside = has_query[:, None] & has_target[None, :]
    tl.store(out, softplus_sum[:, None] - agreement, inside)
    tl.store(out + stride_kind, overlap, inside)
    tl.store(out + 2 * stride_kind, sigmoid_sum[:, None] + target_sum[None, :], inside)


def costs(masks: Sequence[Tensor], targets: Sequence[Tensor], points: Tensor) -> tuple[Tensor, Tensor]:
    batch, queries, count = len(targets), masks[0].shape[1], points.shape[2]
    numbers = [len(target) for target in targets]
    total, most = sum(numbers), max(numbers, default=0)
    device = points.device
    points = _in_reading_order(points, masks[0].shape[2])
    if not total or not queries:
        return tuple(points.new_zeros(len(masks), total, queries, dtype=torch.float32) for _ in range(2))
    starts = upload(torch.tensor([0, *numbers], dtype=torch.int32).cumsum(0, dtype=torch.int32), device)
    samples = torch.empty(total, len(masks), count, dtype=torch.float32, device=device)
    for target, part, shared in zip(targets, samples.split(numbers), points, strict=True):
        _launch_sampling(target[None], shared.reshape(1, -1, 2), None, part.flatten(1))
    tile = min(64, max(16, triton.next_power_of_2(most)))
    tiles = (triton.cdiv(queries, QUERIES), triton.cdiv(most, tile))
    share = _share(count, batch * tiles[0] * tiles[1])
    shares = triton.cdiv(count, share)
    sums = torch.empty(shares, 3, len(masks), total, queries, dtype=torch.float32, device=device)
    logits = torch.empty(batch * queries, count, dtype=torch.float32, device=device)
    for s, mask in enumerate(masks):
        _launch_sampling(mask, points[:, s], None, logits)
        with torch.cuda.device_of(logits):
            _cost_kernel[(shares * tiles[0] * tiles[1] * batch,)](
                logits,
                samples[:, s],
                starts,
                sums[:, :, s],
                queries,
                count,
                samples.stride(0),
                *sums.stride()[:2],
                shares,
                share,
                *tiles,
                QUERIES=QUERIES,
                TARGETS=tile,
                BLOCK=COST_POINTS,
                num_warps=4,
                num_stages=2,
            )
    bce, overlap, size = sums.sum(0)  # (S, T, Q)
    return bce / count, 1 - (2 * overlap + DICE_SMOOTH) / (size + DICE_SMOOTH)


def _in_reading_order(points: Tensor, height: int) -> Tensor:
    """Return points (B, S, P, 2) line by line of maps of a height, from left to right."""
    order = ((points[..., 1] * height).floor() + points[..., 0]).argsort(-1)  # (B, S, P)
    return points.gather(2, order[..., None].expand_as(points))


def _share(points: int, programs: int) -> int:
    """Return how many points a program of the costs takes where each is split among several: whole steps."""
    shares = max(1, min(COST_PROGRAMS // programs, points // (8 * COST_POINTS)))
    return triton.cdiv(triton.cdiv(points, shares), COST_POINTS) * COST_POINTS
