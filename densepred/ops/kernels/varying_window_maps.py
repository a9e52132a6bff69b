"""Varying window attention of wide heads (of 512 channels, say): maps of weights are written, as matrix products write sums.

A tile of outputs of such a head fills the registers, and a map of P x P weights a window is no larger than the queries where
P <= 512. Kernels that multiply tiles do less work then than a fused one, which would form scores again for every slice of
channels. `_score` writes scores, `_multiply_map` softmax times values; backward, `_map_backward` writes weights and their
slopes, which `_multiply_slopes` multiplies by keys (and takes off what rounding makes all of a query's slopes sum to) and
`_gather_map` by queries and gradients. Maps lie token by query: so every reader takes 16 bytes a thread. Each program sums
one tile; one of `_gather_map` owns 64 tokens of the grid and a slice of their channels, so that its sums have one order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densepred.ops.kernels.varying_window_tokens import (
    LOG2E,
    TOKENS,
    Call,
    add_product,
    convert,
    find_reader,
    find_window,
    locate,
    share_steps,
)

PROGRAMS = 128
"""Programs that fill a GPU: one for each multiprocessor of an H200."""


class _Tile(NamedTuple):
    queries: int
    tokens: int
    channels: int
    warps: int


TILES = {
    True: dict(
        score=_Tile(64, 128, 32, 8),
        multiply=_Tile(128, 32, 128, 8),
        slopes=_Tile(64, 128, 32, 8),
        gather=_Tile(32, TOKENS, 128, 4),
        query=_Tile(128, 32, 128, 8),
    ),
    False: dict(
        score=_Tile(128, 128, 64, 8),
        multiply=_Tile(128, 64, 128, 8),
        slopes=_Tile(128, 128, 32, 8),
        gather=_Tile(64, TOKENS, 128, 4),
        query=_Tile(128, 32, 128, 8),
    ),
}
"""Largest tiles, by whether tensors are float32. Small windows take smaller ones of 4 warps."""


def _options(call: Call, kernel: str) -> dict[str, int]:
    most = TILES[call.precise][kernel]
    queries, tokens = call.side(most.queries), call.side(most.tokens)
    small = queries * tokens < most.queries * most.tokens
    options = dict(BM=queries, BN=tokens, BD=most.channels, num_warps=4 if small else most.warps, num_stages=2)
    return call.constants | options


@triton.jit(do_not_specialize=["py", "px", "line", "grid"])
def _score(query, pairs, firsts, scores_map, lse, scale, py, px, line, grid, count, HEADS: tl.constexpr,
           DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Scores of all of a window's tokens and a tile of its queries, (tokens, queries), and their log-sum-exp."""
    tiles = tl.cdiv(count, BM)
    number = tl.program_id(0) // tiles
    head, row, column, image, first_row, first_column = find_window(number, firsts, HEADS, ROWS, COLUMNS)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    pixel = locate(m, row * py, column * px, px, COLUMNS * px)
    pixels = count * ROWS * COLUMNS
    source = query + (image * pixels + pixel)[:, None] * (HEADS * DEPTH) + head * DEPTH
    most = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for start in range(0, count, BN):
        n = start + tl.arange(0, BN)
        token = image * grid + locate(n, first_row, first_column, px, line)
        key = pairs + token[:, None] * (2 * HEADS * DEPTH) + head * DEPTH
        scores = tl.zeros((BN, BM), tl.float32)
        for first in range(0, DEPTH, BD):
            c = first + tl.arange(0, BD)[None, :]
            k = tl.load(key + c, mask=(n < count)[:, None] & (c < DEPTH), other=0.0)
            q = tl.load(source + c, mask=(m < count)[:, None] & (c < DEPTH), other=0.0)
            scores = add_product(k, tl.trans(q), scores)
        scores = tl.where((n < count)[:, None], scores * scale, -float("inf"))
        at = number.to(tl.int64) * count * count + n[:, None] * count + m[None, :]
        tl.store(scores_map + at, scores, mask=(n < count)[:, None] & (m < count)[None, :])
        new = tl.maximum(most, tl.max(scores, 0))
        total = total * tl.exp2(most - new) + tl.sum(tl.exp2(scores - new[None, :]), 0)
        most = new
    tl.store(lse + (image * HEADS + head) * pixels + pixel, most + tl.log2(total), mask=m < count)


@triton.jit(do_not_specialize=["py", "px", "line", "grid"])
def _multiply_map(scores_map, lse, pairs, firsts, out, py, px, line, grid, count, HEADS: tl.constexpr,
                  DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Sums of a window's values by the softmax of its scores, of a tile of queries and a slice of channels."""
    tiles, slices = tl.cdiv(count, BM), tl.cdiv(DEPTH, BD)
    number = tl.program_id(0) // (tiles * slices)
    head, row, column, image, first_row, first_column = find_window(number, firsts, HEADS, ROWS, COLUMNS)
    m = tl.program_id(0) // slices % tiles * BM + tl.arange(0, BM)
    d = tl.program_id(0) % slices * BD + tl.arange(0, BD)[None, :]
    pixel = locate(m, row * py, column * px, px, COLUMNS * px)
    pixels = count * ROWS * COLUMNS
    norm = tl.load(lse + (image * HEADS + head) * pixels + pixel, mask=m < count, other=float("inf"))
    result = tl.zeros((BM, BD), tl.float32)
    for start in range(0, count, BN):
        n = start + tl.arange(0, BN)
        token = image * grid + locate(n, first_row, first_column, px, line)
        at = number.to(tl.int64) * count * count + n[:, None] * count + m[None, :]
        there = (n < count)[:, None] & (m < count)[None, :]
        source = pairs + token[:, None] * (2 * HEADS * DEPTH) + (HEADS + head) * DEPTH + d
        values = tl.load(source, mask=(n < count)[:, None] & (d < DEPTH), other=0.0)
        weights = tl.exp2(tl.load(scores_map + at, mask=there, other=-float("inf")) - norm[None, :])
        result = add_product(tl.trans(convert(weights, values.dtype)), values, result)
    target = out + (image * pixels + pixel)[:, None] * (HEADS * DEPTH) + head * DEPTH + d
    tl.store(target, convert(result, out.dtype.element_ty), mask=(m < count)[:, None] & (d < DEPTH))


@triton.jit(do_not_specialize=["py", "px", "line", "grid"])
def _multiply_slopes(slopes_map, weights_map, excess, pairs, firsts, out, factor, py, px, line, grid, count,
                     HEADS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                     BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, STRIPE: tl.constexpr):  # fmt: skip
    """The gradient of a tile of a window's queries, a slice of channels."""
    tiles, slices = tl.cdiv(count, BM), tl.cdiv(DEPTH, BD)
    number = tl.program_id(0) // (tiles * slices)
    head, row, column, image, first_row, first_column = find_window(number, firsts, HEADS, ROWS, COLUMNS)
    m = tl.program_id(0) // slices % tiles * BM + tl.arange(0, BM)
    d = tl.program_id(0) % slices * BD + tl.arange(0, BD)[None, :]
    pixel = locate(m, row * py, column * px, px, COLUMNS * px)
    pixels = count * ROWS * COLUMNS
    result = tl.zeros((BM, BD), tl.float32)
    mean = tl.zeros((BM, BD), tl.float32)
    for start in range(0, count, BN):
        n = start + tl.arange(0, BN)
        token = image * grid + locate(n, first_row, first_column, px, line)
        at = number.to(tl.int64) * count * count + n[:, None] * count + m[None, :]
        there = (n < count)[:, None] & (m < count)[None, :]
        source = pairs + token[:, None] * (2 * HEADS * DEPTH) + head * DEPTH + d
        keys = tl.load(source, mask=(n < count)[:, None] & (d < DEPTH), other=0.0)
        result = add_product(tl.trans(tl.load(slopes_map + at, mask=there, other=0.0)), keys, result)
        if excess is not None:
            mean = add_product(tl.trans(tl.load(weights_map + at, mask=there, other=0.0)), keys, mean)
    if excess is not None:
        more = tl.zeros((BM,), tl.float32)
        for stripe in range(tl.cdiv(count, STRIPE)):
            part = (number * tl.cdiv(count, STRIPE) + stripe).to(tl.int64) * count
            more += tl.load(excess + part + m, mask=m < count, other=0.0)
        result -= more[:, None] * mean
    target = out + (image * pixels + pixel)[:, None] * (HEADS * DEPTH) + head * DEPTH + d
    tl.store(target, convert(result * factor, out.dtype.element_ty), mask=(m < count)[:, None] & (d < DEPTH))


@triton.jit(do_not_specialize=["py", "px", "line", "grid"])
def _map_backward(query, pairs, firsts, grad, lse, delta, slopes_map, weights_map, excess, scale, py, px, line, grid, count,
                  HEADS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Weights, and the slopes of scores, of a tile of a window's tokens and queries, (tokens, queries)."""
    tiles, stripes = tl.cdiv(count, BM), tl.cdiv(count, BN)
    number = tl.program_id(0) // (tiles * stripes)
    head, row, column, image, first_row, first_column = find_window(number, firsts, HEADS, ROWS, COLUMNS)
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    n = tl.program_id(0) // tiles % stripes * BN + tl.arange(0, BN)
    pixel = locate(m, row * py, column * px, px, COLUMNS * px)
    token = image * grid + locate(n, first_row, first_column, px, line)
    pixels = count * ROWS * COLUMNS
    place = (image * pixels + pixel)[:, None] * (HEADS * DEPTH) + head * DEPTH
    key = pairs + token[:, None] * (2 * HEADS * DEPTH) + head * DEPTH
    scores = tl.zeros((BN, BM), tl.float32)
    slopes = tl.zeros((BN, BM), tl.float32)
    for first in range(0, DEPTH, BD):
        c = first + tl.arange(0, BD)[None, :]
        there, mine = (n < count)[:, None] & (c < DEPTH), (m < count)[:, None] & (c < DEPTH)
        k = tl.load(key + c, mask=there, other=0.0)
        q = tl.load(query + place + c, mask=mine, other=0.0)
        scores = add_product(k, tl.trans(q), scores)
        v = tl.load(key + HEADS * DEPTH + c, mask=there, other=0.0)
        g = tl.load(grad + place + c, mask=mine, other=0.0)
        slopes = add_product(v, tl.trans(g), slopes)
    at = (image * HEADS + head) * pixels + pixel
    norm = tl.load(lse + at, mask=m < count, other=float("inf"))
    mean = tl.load(delta + at, mask=m < count, other=0.0)
    weights = tl.exp2(scores * scale - norm[None, :])
    slopes = weights * (slopes - mean[None, :])
    at = number.to(tl.int64) * count * count + n[:, None] * count + m[None, :]
    there = (n < count)[:, None] & (m < count)[None, :]
    tl.store(weights_map + at, convert(weights, weights_map.dtype.element_ty), mask=there)
    tl.store(slopes_map + at, convert(slopes, slopes_map.dtype.element_ty), mask=there)
    if excess is not None:
        more = tl.sum(tl.where((n < count)[:, None], slopes, 0.0), 0)
        tl.store(excess + (tl.program_id(0) // tiles).to(tl.int64) * count + m, more, mask=m < count)


@triton.jit(do_not_specialize=["py", "px", "line", "grid", "most_down", "most_across", "images", "parts"])
def _gather_map(slopes_map, weights_map, query, grad, firsts, out, rows, columns, factor, py, px, line, grid, count,
                most_down, most_across, images, parts, HEADS: tl.constexpr, DEPTH: tl.constexpr,
                ROWS: tl.constexpr, COLUMNS: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
                BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Gradients of the keys or values of a tile of tokens from (a part of) the windows that read it."""
    pixels, slices, across = count * ROWS * COLUMNS, tl.cdiv(DEPTH, BD), tl.cdiv(line, TX)
    program = tl.program_id(0)
    d, program = program % slices * BD + tl.arange(0, BD)[None, :], program // slices
    of_values, program = program % 2, program // 2
    head, program = program % HEADS, program // HEADS
    tile_column, program = program % across, program // across
    tile_row, program = program % tl.cdiv(grid // line, TY), program // tl.cdiv(grid // line, TY)
    image, part = (program % images).to(tl.int64), program // images
    if of_values:
        source, coefficients, factor = grad, weights_map, 1.0
    else:
        source, coefficients = query, slopes_map
    n = tl.arange(0, TY * TX)
    y, x = tile_row * TY + n // TX, tile_column * TX + n % TX
    tiles = tl.cdiv(count, BM)
    first, last = share_steps(tile_row, tile_column, rows, columns, most_down, most_across, tiles, part, parts)
    result = tl.zeros((TY * TX, BD), tl.float32)
    for step in range(first, last):
        row, column, tile = find_reader(step, tiles, tile_row, tile_column, rows, columns, most_down, most_across)
        near, left = y - tl.load(firsts + row), x - tl.load(firsts + ROWS + column)
        inside = (near >= 0) & (near < py) & (left >= 0) & (left < px)
        m = tile * BM + tl.arange(0, BM)
        window = ((image * ROWS + row) * COLUMNS + column) * HEADS + head
        at = window * count * count + (near * px + left)[:, None] * count + m[None, :]
        weights = tl.load(coefficients + at, mask=inside[:, None] & (m < count)[None, :], other=0.0)
        pixel = image * pixels + locate(m, row * py, column * px, px, COLUMNS * px)
        place = source + pixel[:, None] * (HEADS * DEPTH) + head * DEPTH + d
        values = tl.load(place, mask=(m < count)[:, None] & (d < DEPTH), other=0.0)
        result = add_product(weights, values, result)
    target = (part.to(tl.int64) * images + image) * grid + y * line + x
    target = target[:, None] * (2 * HEADS * DEPTH) + (of_values * HEADS + head) * DEPTH + d
    result = convert(result * factor, out.dtype.element_ty)
    tl.store(out + target, result, mask=(y * line + x < grid)[:, None] & (x < line)[:, None] & (d < DEPTH))


def _map(call: Call, dtype: torch.dtype) -> Tensor:
    return torch.empty(call.windows, call.count, call.count, dtype=dtype, device=call.queries.device)


def attend(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write the output (B, h, w, C), which may be the queries' memory, and its log2-sum-exp2 (B, heads, h, w)."""
    scores, sizes, options = _map(call, torch.float32), (*call.sides, call.count), _options(call, "score")
    _score[(call.windows * triton.cdiv(call.count, options["BM"]),)](
        *(call.queries, call.pairs, call.plan.firsts, scores, lse, LOG2E * call.factor, *sizes), **options
    )
    options = _options(call, "multiply")
    _multiply_map[(call.windows * triton.cdiv(call.count, options["BM"]) * triton.cdiv(call.depth, options["BD"]),)](
        *(scores, lse, call.pairs, call.plan.firsts, out, *sizes), **options
    )


def attend_backward(call: Call, grad: Tensor, lse: Tensor, delta: Tensor, grad_query: Tensor) -> Tensor:
    """Write the queries' gradient; return that of keys and values (parts, B, Ny, Nx, 2 C), to be summed."""
    (slopes, weights), sizes = (_map(call, grad.dtype) for _ in range(2)), (*call.sides, call.count)
    options = _options(call, "slopes")
    stripe = options["BN"]
    tiles, stripes = (triton.cdiv(call.count, options[side]) for side in ("BM", "BN"))
    excess = None if call.precise else delta.new_empty(call.windows * stripes * call.count)
    _map_backward[(call.windows * tiles * stripes,)](
        *(call.queries, call.pairs, call.plan.firsts, grad, lse, delta, slopes, weights, excess),
        *(LOG2E * call.factor, *sizes),
        **options,
    )
    options, (ty, tx) = _options(call, "gather"), call.plan.tile
    del options["BN"]
    programs = call.tiles * 2 * triton.cdiv(call.depth, options["BD"])
    grad_pairs = call.token_slopes(PROGRAMS // programs, options["BM"])
    _gather_map[(programs * len(grad_pairs),)](
        *(slopes, weights, call.queries, grad, call.plan.firsts, grad_pairs, *call.plan.readers, call.factor, *sizes),
        *(*(table.shape[1] for table in call.plan.readers), len(grad), len(grad_pairs)),
        **(options | dict(TY=ty, TX=tx)),
    )
    options = _options(call, "query")
    _multiply_slopes[(call.windows * triton.cdiv(call.count, options["BM"]) * triton.cdiv(call.depth, options["BD"]),)](
        *(slopes, weights, excess, call.pairs, call.plan.firsts, grad_query, call.factor, *sizes),
        **(options | dict(STRIPE=stripe)),
    )
    return grad_pairs


__all__ = ["attend", "attend_backward"]
