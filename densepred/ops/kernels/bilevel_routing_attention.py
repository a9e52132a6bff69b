"""Bi-level routing attention: blockwise attention that reads the table of regions, without copies of keys or a map of weights.

Tiling. A program owns a tile of rows of one head and walks over a list of regions, a tile of columns at a time: in the
forward and for dq it owns queries of a region and walks over that region's K entries of the table; for dk and dv it owns
keys of a region and walks over the regions that read it. Rows, running sums and sums of values stay in registers; a column
tile is loaded once, while the one before is worked on, and serves all products. Regions with fewer tokens than a tile has
columns are packed, rows fetched where the table says: at 512 x 512, stage 3 of BiFormer has regions of 16 tokens, two to a
tile of 32 columns, so that products are full, and its row tile of 16 is worked by one warp alone, which waits for no other.
Larger regions take several tiles (stages 1 and 2: 64 x 64, four warps of 16 rows). Tensors are read where they lie, as views
of a projection's output, if their channels are adjacent and tokens equally far apart; else they are copied first.

Bytes. The forward reads q once, k and v K times (S tokens each; 2 to 30 MB an image, which the L2 cache holds), and writes
out and log_sum; the dense form writes the K copies and reads them again, and passes over the map of weights four times
(T * K * S a region and head). FLOPs are those of the dense form; float32 runs them on the tensor cores in three
products of TF32 parts, split here by a mask and a subtraction: Triton's own split guards against infinities and rounds in
many more instructions than there are products; here an infinite number makes its row NaN. Relative error about 5e-7.

Backward. Weights are computed again from log_sum. A first kernel gives dq and the rows' dot products of out and its
gradient; another inverts the table (each region scans it and finds its readers in order); the third gives dk and dv. No
atomics: results are the same bit for bit in every run. A region that all others read takes its program longer, nothing
else. The host is never waited for.

A region out of range is not read: the rows that name it become NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TABLE_BLOCK = 1024
"""Entries of the table that the inversion looks at in one step."""


@triton.jit
def _high(x):
    """The part of float32 numbers that TF32 keeps, by truncation, as the tensor cores do it."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _product(a, b, sums):
    """``sums + a @ b``; of float32 in three products of TF32 parts."""
    if a.dtype == tl.float32:
        a_high, b_high = _high(a), _high(b)
        sums = tl.dot(a - a_high, b_high, sums, input_precision="tf32")
        sums = tl.dot(a_high, b - b_high, sums, input_precision="tf32")
        sums = tl.dot(a_high, b_high, sums, input_precision="tf32")
    elif INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def _place(tile, entries, length, SPAN: tl.constexpr, N: tl.constexpr):
    """Where the N columns of a tile lie in a list of regions: entry of the list, token of that region, and if both exist."""
    column = tl.arange(0, N)
    if SPAN < N:  # N / SPAN regions in a tile
        entry = tile * (N // SPAN) + column // SPAN
        token = column % SPAN
        inside = (entry < entries) & (token < length)
    else:  # a tile of one region; the entry is a scalar, and exists
        tiles = tl.cdiv(length, N)
        entry = tile // tiles
        token = tile % tiles * N + column
        inside = token < length
    return entry, token, inside


@triton.jit
def _num_tiles(entries, length, SPAN: tl.constexpr, N: tl.constexpr):
    if SPAN < N:
        return tl.cdiv(entries, N // SPAN)
    else:
        return entries * tl.cdiv(length, N)


@triton.jit
def _load_rows(start, row, stride, inside, CHANNELS: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix (tokens, channels) as a tile (rows, PADDED); 0 outside."""
    channel = tl.arange(0, PADDED)[None, :]
    pointers = start + (row.to(tl.int64) * stride)[:, None] + channel
    if CHANNELS < PADDED:
        return tl.load(pointers, mask=inside[:, None] & (channel < CHANNELS), other=0.0)
    elif MASKED:
        return tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _store_rows(start, row, stride, inside, tile, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    channel = tl.arange(0, PADDED)[None, :]
    pointers = start + (row.to(tl.int64) * stride)[:, None] + channel
    tl.store(pointers, tile.to(start.dtype.element_ty), mask=inside[:, None] & (channel < CHANNELS))


@triton.jit
def _owned(heads, length, M: tl.constexpr):
    """This program's head, region (counted through all images) and M tokens of that region."""
    program = tl.program_id(0)
    tiles = tl.cdiv(length, M)
    region = (program // heads // tiles).to(tl.int64)
    return program % heads, region, program // heads % tiles * M + tl.arange(0, M)


@triton.jit
def _read_table(regions, entry, topk, num_regions):
    """The regions at some places of a row of the table, 0 beyond its end or out of range, and which are out of range."""
    named = tl.load(regions + entry, mask=entry < topk, other=0)
    right = named.to(tl.uint64, bitcast=True) < num_regions
    return tl.where(right, named.to(tl.int32), 0), 1 - right.to(tl.int32)


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    regions,
    out,
    log_sum,
    factor,
    heads,
    num_regions,
    topk,
    queries,
    keys,
    q_stride,
    k_stride,
    v_stride,
    D: tl.constexpr,
    C: tl.constexpr,
    D_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    head, region, query = _owned(heads, queries, M)
    image = region - region % num_regions  # its first region; rows are counted from there in 32 bits
    known = query < queries
    row = region * queries + query
    own = _load_rows(q + head * D, row, q_stride, known, D, D_PAD, True)
    regions += region * topk
    k += image * keys * k_stride + head * D
    v += image * keys * v_stride + head * C
    largest = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    sums = tl.zeros((M, C_PAD), tl.float32)
    wrong = 0
    for tile in range(_num_tiles(topk, keys, SPAN, N)):
        entry, key, inside = _place(tile, topk, keys, SPAN, N)
        source, out_of_range = _read_table(regions, entry, topk, num_regions)
        wrong |= tl.max(out_of_range, 0) if SPAN < N else out_of_range
        key_row = source * keys + key
        key_tile = _load_rows(k, key_row, k_stride, inside, D, D_PAD, MASKED)
        value_tile = _load_rows(v, key_row, v_stride, inside, C, C_PAD, MASKED)
        logits = _product(own, tl.trans(key_tile), tl.zeros((M, N), tl.float32)) * factor
        if MASKED:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        sums = _product(weights.to(value_tile.dtype), value_tile, sums * shrink[:, None])
        largest = larger
    total = tl.where(wrong > 0, float("nan"), total)
    _store_rows(out + head * C, row, heads * C, known, sums / total[:, None], C, C_PAD)
    tl.store(log_sum + (region * heads + head) * queries + query, (largest + tl.log2(total)) * LN_2, mask=known)


@triton.jit
def _query_gradient_kernel(
    grad,
    q,
    k,
    v,
    regions,
    out,
    log_sum,
    mean,
    dq,
    factor,
    scale,
    heads,
    num_regions,
    topk,
    queries,
    keys,
    grad_stride,
    q_stride,
    k_stride,
    v_stride,
    D: tl.constexpr,
    C: tl.constexpr,
    D_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    head, region, query = _owned(heads, queries, M)
    image = region - region % num_regions
    known = query < queries
    row = region * queries + query
    own = _load_rows(q + head * D, row, q_stride, known, D, D_PAD, True)
    slope = _load_rows(grad + head * C, row, grad_stride, known, C, C_PAD, True)
    result = _load_rows(out + head * C, row, heads * C, known, C, C_PAD, True)
    worth = tl.sum(slope.to(tl.float32) * result.to(tl.float32), 1)  # of the mean key to the result
    statistics = (region * heads + head) * queries + query
    tl.store(mean + statistics, worth, mask=known)
    log2_sum = tl.load(log_sum + statistics, mask=known, other=float("inf")) * LOG2_E
    regions += region * topk
    k += image * keys * k_stride + head * D
    v += image * keys * v_stride + head * C
    sums = tl.zeros((M, D_PAD), tl.float32)
    for tile in range(_num_tiles(topk, keys, SPAN, N)):
        entry, key, inside = _place(tile, topk, keys, SPAN, N)
        source, _ = _read_table(regions, entry, topk, num_regions)
        key_row = source * keys + key
        key_tile = _load_rows(k, key_row, k_stride, inside, D, D_PAD, MASKED)
        value_tile = _load_rows(v, key_row, v_stride, inside, C, C_PAD, MASKED)
        logits = _product(own, tl.trans(key_tile), tl.zeros((M, N), tl.float32))
        weights = tl.exp2(logits * factor - log2_sum[:, None])
        if MASKED:
            weights = tl.where(inside[None, :], weights, 0.0)
        changes = _product(slope, tl.trans(value_tile), tl.zeros((M, N), tl.float32))
        changes = weights * (changes - worth[:, None])
        sums = _product(changes.to(key_tile.dtype), key_tile, sums)
    _store_rows(dq + head * D, row, heads * D, known, sums * scale, D, D_PAD)


@triton.jit
def _invert_kernel(regions, starts, readers, num_regions, topk, BLOCK: tl.constexpr):
    """List who reads a region: ``readers[starts[region]:starts[region + 1]]`` of each image, in order."""
    image = (tl.program_id(0) // num_regions).to(tl.int64)
    region = tl.program_id(0) % num_regions
    entries = num_regions * topk
    regions += image * entries
    readers += image * entries
    starts += image * (num_regions + 1) + region
    column = tl.arange(0, BLOCK)
    start = tl.sum(tl.zeros((BLOCK,), tl.int32), 0)
    for first in range(0, entries, BLOCK):
        named = tl.load(regions + first + column, mask=first + column < entries, other=num_regions)
        start += tl.sum((named < region).to(tl.int32), 0)
    tl.store(starts, start)
    for first in range(0, entries, BLOCK):
        named = tl.load(regions + first + column, mask=first + column < entries, other=num_regions)
        found = (named == region).to(tl.int32)
        tl.store(readers + start + tl.cumsum(found, 0) - 1, (first + column) // topk, mask=found > 0)
        start += tl.sum(found, 0)
    tl.store(starts + 1, start, mask=region == num_regions - 1)


@triton.jit
def _key_gradient_kernel(
    grad,
    q,
    k,
    v,
    starts,
    readers,
    log_sum,
    mean,
    dk,
    dv,
    factor,
    scale,
    heads,
    num_regions,
    topk,
    queries,
    keys,
    grad_stride,
    q_stride,
    k_stride,
    v_stride,
    D: tl.constexpr,
    C: tl.constexpr,
    D_PAD: tl.constexpr,
    C_PAD: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    MASKED: tl.constexpr,
):
    head, region, key = _owned(heads, keys, M)
    image = region - region % num_regions
    known = key < keys
    row = region * keys + key
    own = _load_rows(k + head * D, row, k_stride, known, D, D_PAD, True)
    value = _load_rows(v + head * C, row, v_stride, known, C, C_PAD, True)
    starts += region + region // num_regions  # num_regions + 1 an image
    start = tl.load(starts)
    entries = tl.load(starts + 1) - start
    readers += image * topk + start
    q += image * queries * q_stride + head * D
    grad += image * queries * grad_stride + head * C
    log_sum += (image * heads + head) * queries
    mean += (image * heads + head) * queries
    key_sums = tl.zeros((M, D_PAD), tl.float32)
    value_sums = tl.zeros((M, C_PAD), tl.float32)
    for tile in range(_num_tiles(entries, queries, SPAN, N)):
        entry, query, inside = _place(tile, entries, queries, SPAN, N)
        reader = tl.load(readers + entry, mask=entry < entries, other=0)
        query_row = reader * queries + query
        query_tile = _load_rows(q, query_row, q_stride, inside, D, D_PAD, MASKED)
        slope = _load_rows(grad, query_row, grad_stride, inside, C, C_PAD, MASKED)
        statistics = reader * heads * queries + query
        log2_sum = tl.load(log_sum + statistics, mask=inside, other=float("inf")) * LOG2_E  # outside exp(-inf) = 0
        worth = tl.load(mean + statistics, mask=inside, other=0.0)
        logits = _product(own, tl.trans(query_tile), tl.zeros((M, N), tl.float32))  # (keys, queries)
        weights = tl.exp2(logits * factor - log2_sum[None, :])
        value_sums = _product(weights.to(slope.dtype), slope, value_sums)
        changes = _product(value, tl.trans(slope), tl.zeros((M, N), tl.float32))
        changes = weights * (changes - worth[None, :])
        key_sums = _product(changes.to(query_tile.dtype), query_tile, key_sums)
    _store_rows(dk + head * D, row, heads * D, known, key_sums * scale, D, D_PAD)
    _store_rows(dv + head * C, row, heads * C, known, value_sums, C, C_PAD)


def _matrices(*tensors: Tensor) -> list[Tensor]:
    """Return tokens (B, R, T, C) as matrices (B * R * T, C) of one dtype with adjacent channels, copied where they are not."""
    dtype = torch.float32 if len({tensor.dtype for tensor in tensors}) > 1 else tensors[0].dtype
    matrices = [tensor.to(dtype).flatten(0, 2) for tensor in tensors]
    return [matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in matrices]


def _tiling(own: int, others: int, entries: int | None, heads: int, q: Tensor, v: Tensor) -> dict:
    """Return the constants of a kernel that owns regions of ``own`` tokens and walks over ``others`` tokens a region.

    Args:
        entries: regions that it walks over; None: it differs.
    """
    widths = q.shape[-1] // heads, v.shape[-1] // heads
    padded = [max(16, triton.next_power_of_2(width)) for width in widths]
    # A tile of 64 x 64 weights of BiFormer's heads of 32 channels lets a multiprocessor hold four programs, of float32 two.
    # Fewer rows want more programs, and wide heads leave room for less.
    width = max(padded)
    m = min(64 if width <= 64 else 32 if width <= 128 else 16, max(16, triton.next_power_of_2(own)))
    n = 64 if m == 64 and width * q.element_size() <= 128 else 32 if width <= 128 else 16
    span = min(n, triton.next_power_of_2(max(1, others)))
    full = others % span == 0 and (span == n or (entries is not None and entries % (n // span) == 0))
    return dict(
        zip(("D", "C", "D_PAD", "C_PAD"), (*widths, *padded), strict=True),
        M=m,
        N=n,
        SPAN=span,
        MASKED=not full,
        num_warps=m // 16 if width <= 64 else 4,
        num_stages=1 if width > 64 else 2 if m == 64 else 3,  # three where entries of the table are fetched ahead, too
    )


def forward(q: Tensor, k: Tensor, v: Tensor, regions: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return what `densepred.ops.bilevel_routing_attention.Backend` says; one launch."""
    (batch, num_regions, queries, _), (keys, channels) = q.shape, v.shape[2:]
    out = v.new_empty((batch, num_regions, queries, channels))
    log_sum = v.new_empty((batch, num_regions, heads, queries), dtype=torch.float32)
    sizes = (heads, num_regions, regions.shape[2], queries, keys)
    q, k, v = _matrices(q, k, v)
    tiling = _tiling(queries, keys, regions.shape[2], heads, q, v)
    programs = batch * num_regions * heads * triton.cdiv(queries, tiling["M"])
    if programs:
        tensors, strides = (q, k, v, regions.contiguous(), out, log_sum), (q.stride(0), k.stride(0), v.stride(0))
        with torch.cuda.device_of(v):
            _forward_kernel[(programs,)](*tensors, scale * LOG2_E.value, *sizes, *strides, **tiling)
    return out, log_sum


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    out: Tensor,
    log_sum: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `densepred.ops.bilevel_routing_attention.Backend` says; three launches."""
    (batch, num_regions, queries, _), keys, topk = q.shape, k.shape[2], regions.shape[2]
    grads = dq, dk, dv = [tokens.new_empty(tokens.shape) for tokens in (q, k, v)]
    mean = torch.empty_like(log_sum)
    starts = regions.new_empty(batch * (num_regions + 1), dtype=torch.int32)
    readers = regions.new_empty(regions.numel(), dtype=torch.int32)
    inputs = grad, q, k, v = _matrices(grad, q, k, v)
    numbers = (
        scale * LOG2_E.value,
        scale,
        heads,
        num_regions,
        topk,
        queries,
        keys,
        *(part.stride(0) for part in inputs),
    )
    regions = regions.contiguous()
    tilings = _tiling(queries, keys, topk, heads, q, v), _tiling(keys, queries, None, heads, q, v)
    rows = batch * num_regions * heads
    programs = tuple(rows * triton.cdiv(own, tiling["M"]) for own, tiling in zip((queries, keys), tilings, strict=True))
    with torch.cuda.device_of(v):
        if programs[0]:
            tensors = (*inputs, regions, out, log_sum, mean, dq)
            _query_gradient_kernel[programs[:1]](*tensors, *numbers, **tilings[0])
        if programs[1]:
            _invert_kernel[(batch * num_regions,)](regions, starts, readers, num_regions, topk, TABLE_BLOCK)
            tensors = (*inputs, starts, readers, log_sum, mean, dk, dv)
            _key_gradient_kernel[programs[1:]](*tensors, *numbers, **tilings[1])
    return tuple(grads)


__all__ = ["backward", "forward"]
