"""Kernels of `mask_argmax` and `mask_owner`: from small mask logits to labels of the file's pixels, without a large map.

Tiling. A program owns 4 x 32 pixels of the file and walks the queries by 16. For every (query, pixel) it gathers the
taps from the small logits (a tile's lie within a few rows and about 10 columns of each query, so they come from the L1
and are read from memory once), adds them up by the products of both weights, and takes the sigmoid; none is written.
`_argmax_classes` multiplies the tile (pixels, queries) by the class probabilities (queries, classes) on the tensor cores, each
float32 as two TF32 terms of 11 bits and three products, so that scores are as exact as float32 sums, keeps the scores in
registers, and writes a label a pixel. `_assign_owners` keeps each pixel's best query and adds up three counts a query;
integers, so that their atomic additions give one result in any order.

Of 1024 x 2048 pixels and 100 queries it reads 52 MB and writes 17 MB (16 us at 4.3 TB/s); what it is bound by are the 210
million sigmoids, about 36 instructions each with their gathers, 0.28 ms at one instruction a cycle and scheduler.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from densepred.ops.linear_resize import Taps

ROWS, COLUMNS = 4, 32
"""Pixels of a program."""
QUERIES = 16
"""Queries that it looks at together."""
LOG2_E = tl.constexpr(math.log2(math.e))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _pixels(height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the rows and columns (P,) of a program's pixels, and which of them are inside."""
    across = tl.cdiv(width, COLUMNS)
    pixel = tl.arange(0, ROWS * COLUMNS)
    y = tl.program_id(0) // across * ROWS + pixel // COLUMNS
    x = tl.program_id(0) % across * COLUMNS + pixel % COLUMNS
    return y, x, (y < height) & (x < width)


@triton.jit
def _taps(
    logits,
    row_indices,
    row_weights,
    column_indices,
    column_weights,
    area,
    small_width,
    y,
    x,
    inside,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
):
    """Return where the pixels' taps lie in the first query's map and their weights, (P,) each, of all taps.

    Those of a pixel outside are the map's first value, with weight 0.
    """
    places, weights = (), ()
    for i in tl.static_range(ROW_TAPS):
        row = tl.load(row_indices + y * ROW_TAPS + i, inside, 0).to(tl.int32)
        row = tl.minimum(tl.maximum(row, 0), area // small_width - 1) * small_width
        row_weight = tl.load(row_weights + y * ROW_TAPS + i, inside, 0.0)
        for j in tl.static_range(COLUMN_TAPS):
            column = tl.load(column_indices + x * COLUMN_TAPS + j, inside, 0).to(tl.int32)
            column = tl.minimum(tl.maximum(column, 0), small_width - 1)
            # Not contiguous, but so said that neighbouring pixels go to neighbouring lanes; vectors it does not make.
            place = tl.max_contiguous(logits + (row + column), 2)
            weight = row_weight * tl.load(column_weights + x * COLUMN_TAPS + j, inside, 0.0)
            places, weights = places + (place,), weights + (weight,)  # noqa: RUF005 Triton knows no unpacking
    return places, weights


@triton.jit
def _sigmoid(x):
    if INTERPRETED:
        return 1 / (1 + tl.exp(-x))
    # `tl.exp` and a division take 12 instructions, for numbers so small or large that they do not change the result.
    power = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [-LOG2_E * x], tl.float32, True, 1)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + power], tl.float32, True, 1)


@triton.jit
def _probabilities(q, area, places, weights, TAPS: tl.constexpr):
    """Return the sigmoids (Q, P) of resized logits."""
    total = 0.0
    for tap in tl.static_range(TAPS):
        value = tl.load(places[tap][None, :] + (q * area)[:, None])
        total += weights[tap][None, :] * value.to(tl.float32)
    return _sigmoid(total)


@triton.jit
def _two_terms(x):
    """Return a float32 as its first 11 bits and the rest, both of them exact in TF32 but for 2 bits of the rest."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def _add_product(scores, high, low, probs, q, classes, width):
    p = tl.load(probs + q[:, None] * width + classes[None, :], classes[None, :] < width, 0.0)
    p_high, p_low = _two_terms(p)
    scores = tl.dot(low, p_high, scores, input_precision="tf32")
    scores = tl.dot(high, p_low, scores, input_precision="tf32")
    return tl.dot(high, p_high, scores, input_precision="tf32")


@triton.jit
def _first_of_largest(scores, classes, width, FULL: tl.constexpr):
    """Return the largest of (P, C) and its first class; where all are NaN, whatever and the first of all."""
    if not FULL:
        scores = tl.where(classes[None, :] < width, scores, -float("inf"))
    best = tl.max(scores, 1)
    return best, tl.min(tl.where(scores < best[:, None], 2147483647, classes[None, :]), 1)


@triton.jit
def _argmax_classes(
    logits,
    probs,
    row_indices,
    row_weights,
    column_indices,
    column_weights,
    labels,
    queries,
    num_classes,
    area,
    small_width,
    height,
    width,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    y, x, inside = _pixels(height, width, ROWS, COLUMNS)
    places, weights = _taps(
        logits,
        row_indices,
        row_weights,
        column_indices,
        column_weights,
        area,
        small_width,
        y,
        x,
        inside,
        ROW_TAPS,
        COLUMN_TAPS,
    )
    best = tl.full([ROWS * COLUMNS], -float("inf"), tl.float32)
    label = tl.zeros([ROWS * COLUMNS], tl.int32)
    for first in range(0, num_classes, MAIN + REST):
        main = first + tl.arange(0, MAIN)
        scores = tl.zeros([ROWS * COLUMNS, MAIN], tl.float32)
        if REST:
            rest = first + MAIN + tl.arange(0, REST)
            more_scores = tl.zeros([ROWS * COLUMNS, REST], tl.float32)
        for start in range(0, queries, BLOCK_Q):
            q = start + tl.arange(0, BLOCK_Q)
            last = tl.minimum(q, queries - 1)
            found = _probabilities(last, area, places, weights, ROW_TAPS * COLUMN_TAPS)
            # Without this choice the compiler would exchange the lanes of every tap, not of their sum.
            found = tl.where((q < queries)[:, None], found, 0.0)
            high, low = _two_terms(tl.trans(found))
            scores = _add_product(scores, high, low, probs, last, main, num_classes)
            if REST:
                more_scores = _add_product(more_scores, high, low, probs, last, rest, num_classes)
        value, where = _first_of_largest(scores, main, num_classes, FULL)
        label = tl.where(value > best, where, label)
        best = tl.maximum(value, best)
        if REST:
            value, where = _first_of_largest(more_scores, rest, num_classes, False)
            label = tl.where(value > best, where, label)
            best = tl.maximum(value, best)
    tl.store(labels + y.to(tl.int64) * width + x, label.to(tl.int64), inside)


@triton.jit
def _assign_owners(
    logits,
    factors,
    row_indices,
    row_weights,
    column_indices,
    column_weights,
    ids,
    areas,
    queries,
    area,
    small_width,
    height,
    width,
    ROW_TAPS: tl.constexpr,
    COLUMN_TAPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    y, x, inside = _pixels(height, width, ROWS, COLUMNS)
    places, weights = _taps(
        logits,
        row_indices,
        row_weights,
        column_indices,
        column_weights,
        area,
        small_width,
        y,
        x,
        inside,
        ROW_TAPS,
        COLUMN_TAPS,
    )
    best = tl.full([ROWS * COLUMNS], -float("inf"), tl.float32)
    owner = tl.zeros([ROWS * COLUMNS], tl.int32)
    written = owner > 0
    for start in range(0, queries, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        known = q < queries
        last = tl.minimum(q, queries - 1)
        found = _probabilities(last, area, places, weights, ROW_TAPS * COLUMN_TAPS)
        strong = (found >= 0.5) & known[:, None] & inside[None, :]
        count = tl.sum(strong.to(tl.int32), 1)
        tl.atomic_add(areas + q * 3 + 2, count.to(tl.int64), count > 0, sem="relaxed")
        score = found * tl.load(factors + last)[:, None]
        score = tl.where(score == score, score, float("inf"))  # NaN is larger than any number
        score = tl.where(known[:, None], score, -float("inf"))
        value = tl.max(score, 0)
        where = tl.min(tl.where(score == value[None, :], q[:, None], 2147483647), 0)
        sure = tl.max((strong & (q[:, None] == where[None, :])).to(tl.int32), 0) > 0
        better = value > best
        owner = tl.where(better, where, owner)
        written = (better & sure) | (written & (value <= best))
        best = tl.maximum(value, best)
    tl.store(ids + y.to(tl.int64) * width + x, tl.where(written, owner + 1, 0), inside)
    for start in range(0, queries, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        owned = (q[:, None] == owner[None, :]) & inside[None, :]
        count = tl.sum(owned.to(tl.int32), 1)
        tl.atomic_add(areas + q * 3, count.to(tl.int64), count > 0, sem="relaxed")
        count = tl.sum((owned & written[None, :]).to(tl.int32), 1)
        tl.atomic_add(areas + q * 3 + 1, count.to(tl.int64), count > 0, sem="relaxed")


def _class_blocks(classes: int) -> tuple[int, int]:
    """Return two powers of two, or one and 0, that hold as many of the classes as a program's registers do."""
    if classes > 256:
        return 128, 128
    if classes <= 64:
        return max(16, triton.next_power_of_2(classes)), 0
    main = min(128, 1 << (classes.bit_length() - 1))
    rest = classes - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def _launch(mask_logits: Tensor, rows: Taps, columns: Taps) -> tuple[tuple[int], dict]:
    """Return the grid and the arguments that both kernels take."""
    (height, row_taps), (width, column_taps) = rows.indices.shape, columns.indices.shape
    arguments = dict(
        row_indices=rows.indices.contiguous(),
        row_weights=rows.weights.contiguous(),
        column_indices=columns.indices.contiguous(),
        column_weights=columns.weights.contiguous(),
        queries=mask_logits.shape[0],
        area=mask_logits[0].numel(),
        small_width=mask_logits.shape[2],
        height=height,
        width=width,
        ROW_TAPS=row_taps,
        COLUMN_TAPS=column_taps,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return (triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS),), arguments


def argmax(mask_logits: Tensor, probs: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Return the labels (H, W) int64, see `densepred.ops.mask_argmax`; arguments are copied where not contiguous."""
    grid, arguments = _launch(mask_logits, rows, columns)
    labels = torch.empty(arguments["height"], arguments["width"], dtype=torch.int64, device=probs.device)
    main, rest = _class_blocks(probs.shape[1])
    taps = arguments["ROW_TAPS"] * arguments["COLUMN_TAPS"]
    if labels.numel():
        with torch.cuda.device_of(mask_logits):
            _argmax_classes[grid](
                logits=mask_logits.contiguous(),
                probs=probs.float().contiguous(),
                labels=labels,
                num_classes=probs.shape[1],
                BLOCK_Q=QUERIES,
                MAIN=main,
                REST=rest,
                FULL=main <= probs.shape[1] <= main + rest,
                num_warps=4 if main + rest <= 32 else 8,
                num_stages=1,
                maxnreg=128 if main + rest <= 160 and taps <= 4 else None,  # two programs of 8 warps fit a processor
                **arguments,
            )
    return labels


def owner(mask_logits: Tensor, scores: Tensor, rows: Taps, columns: Taps) -> tuple[Tensor, Tensor]:
    """Return ids (H, W) int32 and areas (K, 3) int64, see `densepred.ops.mask_owner`; copies as in `argmax`."""
    grid, arguments = _launch(mask_logits, rows, columns)
    ids = torch.empty(arguments["height"], arguments["width"], dtype=torch.int32, device=scores.device)
    areas = torch.zeros(len(scores), 3, dtype=torch.int64, device=scores.device)
    if ids.numel():
        with torch.cuda.device_of(mask_logits):
            _assign_owners[grid](
                logits=mask_logits.contiguous(),
                factors=scores.float().contiguous(),
                ids=ids,
                areas=areas,
                BLOCK_Q=QUERIES,
                num_warps=4,
                num_stages=1,
                **arguments,
            )
    return ids, areas


__all__ = ["argmax", "owner"]
