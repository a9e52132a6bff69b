"""Multi-scale deformable attention: the sampling kernels of the plain and of the fused op.

Tiling. A program owns up to 64 queries of one head; 16 bytes of a row of values to a lane, so that 8 lanes (4 in half
precision) hold a query and a warp gathers for 4 (8) at once, where the published kernel spends a warp on one. Coordinates
and bilinear weights are computed once a sample for all channels of a lane, without branches: the two pixels of an axis
are neighbours inside the level, and their linear weights, max(0, 1 - distance), vanish outside it. Where queries are the
values' own pixels, a tile is a square of 8 x 8 (`_along_bands`: an order of the queries, so it never changes a result):
its samples lie close together, and most corners come from L1. Sums stay in registers. Sides of the levels are read in
the kernel: nothing waits for the host.

Bytes. Values, locations, weights and output once each from memory (69 MB an image of 1024 x 1024 with 3 levels in
float32), 4 rows a sample from L1 and L2 (1.06 GB), about 20 instructions a sample. The fused form reads offsets and
logits in their own type and never makes locations.

Backward. The same with 32 queries. Gradients of values are added by float32 atomics of 16 bytes into a zeroed float32
buffer: their order, hence the last bits, differ from run to run, and under deterministic algorithms the op takes its
eager backward. All other gradients are sums over channels by shuffles, the same in every run. Slopes jump at whole
pixels, so there the whole part of a coordinate is exact: a rounded one is put right by the sign of an exact remainder.

Precision. Positions are kept relative to a whole pixel by fused multiply-adds; sums run in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from densepred.ops.kernels.ms_deform_attn_fused import softmax_backward, softmax_sums

BAND = tl.constexpr(8)
"""Rows of a tile where queries are pixels."""
LOG2_E = tl.constexpr(1.4426950408889634)
BELOW_ONE = tl.constexpr(1 - 2.0**-24)
INFINITY = tl.constexpr(float("inf"))
PART = tl.constexpr(4)
"""Channels of a lane in the backward kernel: 16 bytes of float32, which one atomic adds."""
FORWARD_TILE, BACKWARD_TILE, SMALL_TILE = 2048, 1024, 512
"""Elements (queries x channels) of a program. The backward needs more registers for each; few queries want small tiles, to
reach all multiprocessors."""
FEW_PROGRAMS = 512
WIDE_FROM = 2**31
"""Elements of one image's values that need 64-bit offsets."""
SIZES = ("pixels", "queries", "heads", "reference_stride")


@triton.jit
def _along_bands(position, shapes, queries, LEVELS: tl.constexpr):
    """Pixels of the levels in bands of 8 rows, each column by column; positions as they are if queries are not pixels."""
    begin = 0
    place = position
    origin = position * 0
    height = origin + 1
    width = origin + 1
    for level in tl.static_range(LEVELS):
        level_height = tl.load(shapes + 2 * level).to(tl.int32)
        level_width = tl.load(shapes + 2 * level + 1).to(tl.int32)
        end = begin + level_height * level_width
        here = (position >= begin) & (position < end)
        place = tl.where(here, position - begin, place)
        origin = tl.where(here, begin, origin)
        height = tl.where(here, level_height, height)
        width = tl.where(here, level_width, width)
        begin = end
    band = (place.to(tl.uint32) // (width * BAND).to(tl.uint32)).to(tl.int32) * BAND
    lines = tl.maximum(tl.minimum(height - band, BAND), 1)  # 1: where the levels do not fill the queries
    within = place - band * width
    column = (within.to(tl.uint32) // lines.to(tl.uint32)).to(tl.int32)
    query = origin + (band + within - column * lines) * width + column
    return tl.where(begin == queries, query, position)


@triton.jit
def _tile(shapes, queries, heads, LEVELS: tl.constexpr, M: tl.constexpr, GRID: tl.constexpr):
    """This program's image and head, M queries of it, and which of them are not repeats of the last."""
    program = tl.program_id(0)
    tiles = tl.cdiv(queries, M)
    image = (program // heads // tiles).to(tl.int64)
    position = program // heads % tiles * M + tl.arange(0, M)
    query = tl.minimum(position, queries - 1)
    if GRID:
        query = _along_bands(query, shapes, queries, LEVELS)
    return image, program % heads, query, position < queries


@triton.jit
def _level(shapes, starts, level, pixels, step):
    """Sides of a level, its first row, the ways to the next pixels (0 where there is none), half a pixel.

    In an empty level the half is infinite, so that all samples lie far outside; at the end it may start past the table.
    """
    height = tl.load(shapes + 2 * level).to(tl.int32)
    width = tl.load(shapes + 2 * level + 1).to(tl.int32)
    filled = height * width > 0
    start = tl.minimum(tl.load(starts + level).to(tl.int32), pixels - 1)
    right = tl.where(filled & (width > 1), step, 0)
    below = tl.where(filled & (height > 1), width * step, 0)
    return height, width, start, right, below, tl.where(filled, 0.5, INFINITY)


@triton.jit
def _axes(references, level, height, width, half, FUSED: tl.constexpr):
    if FUSED:
        x = tl.load(references + 2 * level).to(tl.float32)
        y = tl.load(references + 2 * level + 1).to(tl.float32)
        return _around(x, width, half), _around(y, height, half)
    else:
        return _axis(width, half), _axis(height, half)


@triton.jit
def _axis(side, half):
    """How locations become positions along an axis: factor, bias, what the bias lost, least and greatest whole pixel."""
    return side.to(tl.float32), -half, 0.0, 0.0, tl.maximum(side - 2, 0).to(tl.float32)


@triton.jit
def _around(reference, side, half):
    """The same for offsets: positions count from the whole pixel before the reference point, so that no bits are lost."""
    length = side.to(tl.float32)
    last = tl.maximum(side - 2, 0).to(tl.float32)
    product = tl.fma(reference, length, 0.0)  # which no compiler draws into the next sum
    cell = tl.minimum(tl.maximum(tl.floor(product - 0.5), 0.0), last)
    return 1.0, product - cell - half, tl.fma(reference, length, -product), -cell, last - cell


@triton.jit
def _along(x, axis, FUSED: tl.constexpr, EXACT: tl.constexpr):
    """The first of the two pixels that a position lies between, and the way from it."""
    factor, bias, lost, least, greatest = axis
    if FUSED:
        if not EXACT:
            bias += lost
        first = tl.minimum(tl.maximum(tl.floor(x + bias), least), greatest)
        distance = (x - first) + bias
        if EXACT:
            distance += lost
    else:
        first = tl.minimum(tl.maximum(tl.floor(tl.fma(x, factor, bias)), least), greatest)
        distance = tl.fma(x, factor, bias - first)
    if EXACT:
        back = (distance < 0) & (first > least)
        first = tl.where(back, first - 1, first)
        distance = tl.where(back, tl.minimum(distance + 1, BELOW_ONE), distance)
        if FUSED:
            ahead = (distance >= 1) & (first < greatest)
            first = tl.where(ahead, first + 1, first)
            distance = tl.where(ahead, distance - 1, distance)
    return first.to(tl.int32), distance


@triton.jit
def _shares(distance, side):
    """The linear weights of the two pixels along an axis; none of a distance that is no number."""
    gap = tl.where(side > 1, 1.0, INFINITY)
    first, second = 1 - tl.abs(distance), 1 - tl.abs(distance - gap)
    return tl.maximum(first, 0.0, tl.PropagateNan.ALL), tl.maximum(second, 0.0, tl.PropagateNan.ALL)


@triton.jit
def _slopes(distance, side):
    """Their derivatives; at whole numbers those of greater distances."""
    first = tl.where((distance >= -1) & (distance < 1), tl.where(distance < 0, 1.0, -1.0), 0.0)
    second = tl.where((side > 1) & (distance >= 0) & (distance < 2), tl.where(distance < 1, 1.0, -1.0), 0.0)
    return first, second


@triton.jit
def _row(table, at, channel, D: tl.constexpr, PADDED: tl.constexpr, VECTOR: tl.constexpr):
    """Rows of a table as float32; a lane takes VECTOR channels at most."""
    pointers = tl.max_contiguous(table + at, (1, VECTOR))
    if D < PADDED:
        return tl.load(pointers, mask=channel < D, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    value,
    shapes,
    starts,
    references,
    sums,
    locations,
    weights,
    out,
    pixels,
    queries,
    heads,
    reference_stride,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    UNROLL: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    GRID: tl.constexpr,
    WIDE: tl.constexpr,
    FUSED: tl.constexpr,
):
    image, head, query, inside = _tile(shapes, queries, heads, LEVELS, M, GRID)
    bag = (image * queries + query) * heads + head
    table = value + (image * pixels * heads + head) * D
    channel = tl.arange(0, PADDED)[None, :]
    step = (heads * D).to(tl.int64) if WIDE else heads * D
    reference_at = references
    if FUSED:
        reference_at = references + image * reference_stride + query.to(tl.int64) * (2 * LEVELS)
        greatest = tl.load(sums + 2 * bag)
        inverse = tl.load(sums + 2 * bag + 1)
    total = tl.zeros((M, PADDED), tl.float32)
    for level in range(LEVELS):
        height, width, origin, right, below, half = _level(shapes, starts, level, pixels, step)
        xs, ys = _axes(reference_at, level, height, width, half, FUSED)
        if FUSED:
            origin = origin - ys[3].to(tl.int32) * width - xs[3].to(tl.int32)
        for chunk in range(POINTS // UNROLL):
            first = bag * (LEVELS * POINTS) + level * POINTS + chunk * UNROLL
            for j in tl.static_range(UNROLL):
                weight = tl.load(weights + first + j).to(tl.float32)
                if FUSED:
                    weight = tl.exp2((weight - greatest) * LOG2_E)
                column, dx = _along(tl.load(locations + 2 * first + 2 * j).to(tl.float32), xs, FUSED, False)
                line, dy = _along(tl.load(locations + 2 * first + 2 * j + 1).to(tl.float32), ys, FUSED, False)
                left, across = _shares(dx, width)
                top, down = _shares(dy, height)
                top *= weight
                down *= weight
                at = ((origin + line * width + column) * step)[:, None] + channel
                total += (top * left)[:, None] * _row(table, at, channel, D, PADDED, PADDED)
                total += (top * across)[:, None] * _row(table, at + right, channel, D, PADDED, PADDED)
                total += (down * left)[:, None] * _row(table, at + below, channel, D, PADDED, PADDED)
                total += (down * across)[:, None] * _row(table, at + right + below, channel, D, PADDED, PADDED)
    if FUSED:
        total *= inverse[:, None]
    tl.store(out + (bag * D)[:, None] + channel, total.to(out.dtype.element_ty), mask=inside[:, None] & (channel < D))


@triton.jit
def _dots(slope, table, at, channel, D: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    """Products of output gradients and rows, summed over the channels of a lane: (M, PADDED / 4), no shuffles yet."""
    products = slope * _row(table, at, channel, D, PADDED, PART)
    return tl.sum(tl.reshape(products, (M, PADDED // PART, PART)), 2)


@triton.jit
def _add(table, at, x, real, D: tl.constexpr, PADDED: tl.constexpr):
    if D < PADDED:
        tl.atomic_add(table + at, x, mask=real, sem="relaxed")
    else:  # repeats of the last query add zeros
        tl.atomic_add(table + at, x, sem="relaxed")


@triton.jit
def _gradients(a, b, c, d, left, across, top, down, dx, dy, width, height, pull_x, pull_y):
    """Gradients of the weight and of x and y, each (M,), from the corners' dots (M, lanes), row by row."""
    left_slope, across_slope = _slopes(dx, width)
    top_slope, down_slope = _slopes(dy, height)
    upper = left[:, None] * a + across[:, None] * b
    lower = left[:, None] * c + across[:, None] * d
    by_weight = top[:, None] * upper + down[:, None] * lower
    by_y = (top_slope * pull_y)[:, None] * upper + (down_slope * pull_y)[:, None] * lower
    by_x = (left_slope * pull_x * top)[:, None] * a + (across_slope * pull_x * top)[:, None] * b
    by_x += (left_slope * pull_x * down)[:, None] * c + (across_slope * pull_x * down)[:, None] * d
    return tl.sum(by_weight, 1), tl.sum(by_x, 1), tl.sum(by_y, 1)


@triton.jit
def _store_samples(pointers, tile, channel, inside, COUNT: tl.constexpr):
    """The first COUNT columns of a tile, which one or two lanes hold."""
    pointers = tl.max_contiguous(pointers[:, None] + channel, (1, PART))
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=inside[:, None] & (channel < COUNT))


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad,
    value,
    shapes,
    starts,
    references,
    sums,
    locations,
    weights,
    grad_value,
    grad_locations,
    grad_weights,
    pixels,
    queries,
    heads,
    reference_stride,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    UNROLL: tl.constexpr,
    D: tl.constexpr,
    PADDED: tl.constexpr,
    M: tl.constexpr,
    GRID: tl.constexpr,
    WIDE: tl.constexpr,
    FUSED: tl.constexpr,
):
    image, head, query, inside = _tile(shapes, queries, heads, LEVELS, M, GRID)
    bag = (image * queries + query) * heads + head
    table = value + (image * pixels * heads + head) * D
    grad_table = grad_value + (image * pixels * heads + head) * D
    channel = tl.arange(0, PADDED)[None, :]
    real = inside[:, None] & (channel < D)
    slope = tl.load(tl.max_contiguous(grad + (bag * D)[:, None] + channel, (1, PART)), mask=real, other=0.0)
    slope = slope.to(tl.float32)
    step = (heads * D).to(tl.int64) if WIDE else heads * D
    reference_at = references
    if FUSED:
        reference_at = references + image * reference_stride + query.to(tl.int64) * (2 * LEVELS)
        greatest = tl.load(sums + 2 * bag)
        inverse = tl.load(sums + 2 * bag + 1)
    for level in range(LEVELS):
        height, width, origin, right, below, half = _level(shapes, starts, level, pixels, step)
        xs, ys = _axes(reference_at, level, height, width, half, FUSED)
        if FUSED:
            origin = origin - ys[3].to(tl.int32) * width - xs[3].to(tl.int32)
        for chunk in range(POINTS // UNROLL):
            first = bag * (LEVELS * POINTS) + level * POINTS + chunk * UNROLL
            by_weight = tl.zeros((M, PADDED), tl.float32)
            by_location = tl.zeros((M, PADDED), tl.float32)
            for j in tl.static_range(UNROLL):
                weight = tl.load(weights + first + j).to(tl.float32)
                if FUSED:
                    weight = tl.exp2((weight - greatest) * LOG2_E) * inverse
                column, dx = _along(tl.load(locations + 2 * first + 2 * j).to(tl.float32), xs, FUSED, True)
                line, dy = _along(tl.load(locations + 2 * first + 2 * j + 1).to(tl.float32), ys, FUSED, True)
                left, across = _shares(dx, width)
                top, down = _shares(dy, height)
                at = ((origin + line * width + column) * step)[:, None] + channel
                a = _dots(slope, table, at, channel, D, PADDED, M)
                b = _dots(slope, table, at + right, channel, D, PADDED, M)
                c = _dots(slope, table, at + below, channel, D, PADDED, M)
                d = _dots(slope, table, at + right + below, channel, D, PADDED, M)
                _add(grad_table, at, (top * weight * left)[:, None] * slope, real, D, PADDED)
                _add(grad_table, at + right, (top * weight * across)[:, None] * slope, real, D, PADDED)
                _add(grad_table, at + below, (down * weight * left)[:, None] * slope, real, D, PADDED)
                _add(grad_table, at + right + below, (down * weight * across)[:, None] * slope, real, D, PADDED)
                gw, gx, gy = _gradients(
                    a, b, c, d, left, across, top, down, dx, dy, width, height, weight * xs[0], weight * ys[0]
                )
                # Columns repeat, so that a lane's choice is made by the compiler.
                by_weight = tl.where(channel % UNROLL == j, gw[:, None], by_weight)
                by_location = tl.where(channel % (2 * UNROLL) == 2 * j, gx[:, None], by_location)
                by_location = tl.where(channel % (2 * UNROLL) == 2 * j + 1, gy[:, None], by_location)
            _store_samples(grad_weights + first, by_weight, channel, inside, UNROLL)
            _store_samples(grad_locations + 2 * first, by_location, channel, inside, 2 * UNROLL)


def forward(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """Sum the samples; arguments as the op has them."""
    return _forward(value, shapes, starts, None, locations, weights)


def forward_fused(
    value: Tensor, shapes: Tensor, starts: Tensor, references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """Sum the samples around reference points; arguments as the fused op has them."""
    return _forward(value, shapes, starts, references, offsets, logits)


def backward(
    grad: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights."""
    return _backward(grad, value, shapes, starts, None, locations, weights)


def backward_fused(
    grad: Tensor, value: Tensor, shapes: Tensor, starts: Tensor, references: Tensor, offsets: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, offsets and logits."""
    grad_value, grad_offsets, slopes = _backward(grad, value, shapes, starts, references, offsets, logits)
    if not logits.numel():
        return grad_value, grad_offsets, slopes.to(logits.dtype)
    with torch.cuda.device_of(value):
        return grad_value, grad_offsets, softmax_backward(logits, slopes)


def _forward(
    value: Tensor, shapes: Tensor, starts: Tensor, references: Tensor | None, locations: Tensor, weights: Tensor
) -> Tensor:
    batch, _, heads, depth = value.shape
    out = value.new_empty(batch, weights.shape[1], heads * depth)
    if not value.numel() or not weights.numel():
        return out.zero_()
    grid, sizes, constants = _launch(value, weights, references, FORWARD_TILE, 16 // value.element_size())
    with torch.cuda.device_of(value):
        tensors = _prepared(value, shapes, starts, references, locations, weights)
        _forward_kernel[grid](*tensors, out, *sizes, **constants)
    return out


def _backward(
    grad: Tensor,
    value: Tensor,
    shapes: Tensor,
    starts: Tensor,
    references: Tensor | None,
    locations: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value and locations, and of weights: fused, in float32, those of the softmax."""
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    grad_locations = torch.empty(locations.shape, dtype=locations.dtype, device=value.device)
    weight_dtype = weights.dtype if references is None else torch.float32
    grad_weights = torch.empty(weights.shape, dtype=weight_dtype, device=value.device)
    if not value.numel() or not weights.numel():
        return grad_value.to(value.dtype), grad_locations.zero_(), grad_weights.zero_()
    grid, sizes, constants = _launch(value, weights, references, BACKWARD_TILE, PART.value)
    with torch.cuda.device_of(value):
        tensors = _prepared(value, shapes, starts, references, locations, weights)
        _backward_kernel[grid](
            grad.contiguous(), *tensors, grad_value, grad_locations, grad_weights, *sizes, **constants
        )
    return grad_value.to(value.dtype), grad_locations, grad_weights


def _prepared(
    value: Tensor, shapes: Tensor, starts: Tensor, references: Tensor | None, locations: Tensor, weights: Tensor
) -> list[Tensor | None]:
    """Return the tensors that both kernels take: densely packed, on one device, with the sums of the softmax."""
    tensors = [x.contiguous() for x in (value, shapes.to(value.device), starts.to(value.device))]
    if references is None:
        return [*tensors, None, None, locations.contiguous(), weights.contiguous()]
    return [*tensors, references.contiguous(), softmax_sums(weights), locations.contiguous(), weights.contiguous()]


def _launch(
    value: Tensor, weights: Tensor, references: Tensor | None, tile: int, vector: int
) -> tuple[tuple[int], tuple[int, ...], dict[str, int]]:
    """Return the grid, the sizes that the kernels take, and their constants."""
    batch, pixels, heads, depth = value.shape
    _, queries, _, levels, points = weights.shape
    padded = max(8, triton.next_power_of_2(depth))
    if batch * heads * queries * padded < FEW_PROGRAMS * tile:
        tile = SMALL_TILE
    rows = max(1, tile // padded)
    of_image = 0 if references is None or len(references) == 1 else queries * levels * 2
    constants = {
        "LEVELS": levels,
        "POINTS": points,
        "UNROLL": next(n for n in (4, 2, 1) if points % n == 0),
        "D": depth,
        "PADDED": padded,
        "M": rows,
        "GRID": queries == pixels,
        "WIDE": pixels * heads * depth >= WIDE_FROM,
        "FUSED": references is not None,
        "num_warps": min(max(rows * padded // (32 * vector), 1), 16),
    }
    return (batch * heads * triton.cdiv(queries, rows),), (pixels, queries, heads, of_image), constants
