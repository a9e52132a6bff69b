"""Triton kernels of varying window attention: contexts read by index, no window copied, no sum by atomics.

Tokens: along each axis the blocks of all phases stand one behind the other, so that every phase of windows is a rectangle of
one grid of Ny x Nx tokens, which one kernel cuts from the map, one library product turns into keys and values, and in which
a window reads a rectangle of p x p tokens. Tokens are few (a map's values by R^2 where R divides the windows' side).

Heads of up to 128 channels (64 in float32): a program of `_attend` holds a tile of a window's queries and their sums in
registers and passes over the window's keys and values with a running softmax, so that a head's scores never leave the
multiprocessor; what is kept is their log-sum-exp. Bytes: queries and outputs once; keys and values, which all heads and
windows nearby share, once a tile of queries, from the L2. The backward forms the scores twice: `_attend_query_backward` as
the forward pass does, `_attend_token_backward` by rectangles of 64 tokens of the grid, each of which gathers from all windows
that read one of its tokens (from lists made on the host; the rectangle is of the shape that the fewest pairs come of), in parts
where there are few rectangles. Nothing is summed by atomics, sums have one order: gradients are the same from run to run.

Wider heads (one of 512 channels) go through maps of weights, in `varying_window_maps`.

Half precision: a query's slopes sum to 0 over its keys, but for what rounding the output to 8 bits took from it; whatever
all keys share, a bias say, would be multiplied by that. `_attend_query_backward` takes the sum times the mean key off again.

Where the queries are not channels-last, the result's own memory first holds a copy of them that is: a program reads its tile
before it writes there. All sums run in float32, float32 products as three of TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from densepred.ops.kernels import varying_window_maps as maps
from densepred.ops.kernels.varying_window_tokens import (
    LOG2E,
    Call,
    add_product,
    add_tokens,
    convert,
    cut_tokens,
    find_reader,
    find_window,
    locate,
    make_plan,
    share_steps,
)
from densepred.ops.varying_window_attention import Layout

WIDEST_HEAD = 128
"""Channels of a head up to which scores stay in registers; half of it in float32."""
PROGRAMS = 512
"""Programs that fill a GPU: about four for each multiprocessor of an H200."""


@triton.jit(do_not_specialize=["pixels", "tiles"])
def _dot_rows(out, grad, delta, pixels, tiles,
              HEADS: tl.constexpr, DEPTH: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Write (B, heads, h * w), the products of outputs and their gradients (B, h * w, heads, d)."""
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    head = tl.program_id(0) // tiles % HEADS
    image = (tl.program_id(0) // (tiles * HEADS)).to(tl.int64)
    at = (image * pixels + m)[:, None] * (HEADS * DEPTH) + head * DEPTH
    total = tl.zeros((BM, BD), tl.float32)
    for first in range(0, DEPTH, BD):
        c = first + tl.arange(0, BD)[None, :]
        there = (m < pixels)[:, None] & (c < DEPTH)
        total += tl.load(out + at + c, mask=there, other=0.0).to(tl.float32) * tl.load(
            grad + at + c, mask=there, other=0.0
        ).to(tl.float32)
    tl.store(delta + (image * HEADS + head) * pixels + m, tl.sum(total, 1), mask=m < pixels)


@triton.jit(do_not_specialize=["py", "px", "line", "grid"])
def _attend(query, pairs, firsts, out, lse, scale, py, px, line, grid, HEADS: tl.constexpr, DEPTH: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
            BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """A tile of a window's queries over all its tokens; ``out`` may be the queries' own memory."""
    count = py * px
    tiles = tl.cdiv(count, BM)
    head, row, column, image, first_row, first_column = find_window(
        tl.program_id(0) // tiles, firsts, HEADS, ROWS, COLUMNS
    )
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    pixel = locate(m, row * py, column * px, px, COLUMNS * px)
    pixels = count * ROWS * COLUMNS
    c = head * DEPTH + tl.arange(0, BD)[None, :]
    mine = (m < count)[:, None] & (tl.arange(0, BD) < DEPTH)[None, :]
    at = (image * pixels + pixel)[:, None] * (HEADS * DEPTH) + c
    q = tl.load(query + at, mask=mine, other=0.0)
    most = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    result = tl.zeros((BM, BD), tl.float32)
    for start in range(0, count, BN):
        n = start + tl.arange(0, BN)
        token = image * grid + locate(n, first_row, first_column, px, line)
        key = pairs + token[:, None] * (2 * HEADS * DEPTH) + c
        there = (n < count)[:, None] & (tl.arange(0, BD) < DEPTH)[None, :]
        k = tl.load(key, mask=there, other=0.0)
        v = tl.load(key + HEADS * DEPTH, mask=there, other=0.0)
        scores = add_product(q, tl.trans(k), tl.zeros((BM, BN), tl.float32))
        if not EVEN:
            scores = tl.where((n < count)[None, :], scores, -float("inf"))
        new = tl.maximum(most, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new[:, None])
        fade = tl.exp2(most - new)
        total = total * fade + tl.sum(weights, 1)
        result = add_product(convert(weights, v.dtype), v, result * fade[:, None])
        most = new
    tl.store(out + at, convert(result / total[:, None], out.dtype.element_ty), mask=mine)
    tl.store(lse + (image * HEADS + head) * pixels + pixel, most + tl.log2(total), mask=m < count)


@triton.jit(do_not_specialize=["py", "px", "line", "grid"])
def _attend_query_backward(query, pairs, firsts, grad, lse, delta, out, scale, factor, py, px, line, grid,
                           HEADS: tl.constexpr, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                           EVEN: tl.constexpr, CENTER: tl.constexpr,
                           BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """The gradient of a tile of a window's queries; ``out`` may be the queries' own memory."""
    count = py * px
    tiles = tl.cdiv(count, BM)
    head, row, column, image, first_row, first_column = find_window(
        tl.program_id(0) // tiles, firsts, HEADS, ROWS, COLUMNS
    )
    m = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    pixel = locate(m, row * py, column * px, px, COLUMNS * px)
    pixels = count * ROWS * COLUMNS
    c = head * DEPTH + tl.arange(0, BD)[None, :]
    mine = (m < count)[:, None] & (tl.arange(0, BD) < DEPTH)[None, :]
    at = (image * pixels + pixel)[:, None] * (HEADS * DEPTH) + c
    q = tl.load(query + at, mask=mine, other=0.0)
    g = tl.load(grad + at, mask=mine, other=0.0)
    number = (image * HEADS + head) * pixels + pixel
    norm = tl.load(lse + number, mask=m < count, other=float("inf"))
    mean = tl.load(delta + number, mask=m < count, other=0.0)
    result = tl.zeros((BM, BD), tl.float32)
    keys = tl.zeros((BM, BD), tl.float32)
    excess = tl.zeros((BM,), tl.float32)
    for start in range(0, count, BN):
        n = start + tl.arange(0, BN)
        token = image * grid + locate(n, first_row, first_column, px, line)
        key = pairs + token[:, None] * (2 * HEADS * DEPTH) + c
        there = (n < count)[:, None] & (tl.arange(0, BD) < DEPTH)[None, :]
        k = tl.load(key, mask=there, other=0.0)
        v = tl.load(key + HEADS * DEPTH, mask=there, other=0.0)
        scores = add_product(q, tl.trans(k), tl.zeros((BM, BN), tl.float32))
        weights = tl.exp2(scores * scale - norm[:, None])
        if not EVEN:
            weights = tl.where((n < count)[None, :], weights, 0.0)
        slopes = weights * (add_product(g, tl.trans(v), tl.zeros((BM, BN), tl.float32)) - mean[:, None])
        result = add_product(convert(slopes, k.dtype), k, result)
        if CENTER:
            keys = add_product(convert(weights, k.dtype), k, keys)
            excess += tl.sum(slopes, 1)
    if CENTER:
        result -= excess[:, None] * keys
    tl.store(out + at, convert(result * factor, out.dtype.element_ty), mask=mine)


@triton.jit(do_not_specialize=["py", "px", "line", "grid", "most_down", "most_across", "images", "parts"])
def _attend_token_backward(query, pairs, firsts, grad, lse, delta, out, rows, columns, scale, factor, py, px, line, grid,
                           most_down, most_across, images, parts, HEADS: tl.constexpr, DEPTH: tl.constexpr,
                           ROWS: tl.constexpr, COLUMNS: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
                           BM: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    """Gradients of the keys and values of a tile of tokens from (a part of) the windows that read it."""
    count, pixels, across = py * px, py * px * ROWS * COLUMNS, tl.cdiv(line, TX)
    program = tl.program_id(0)
    head, program = program % HEADS, program // HEADS
    tile_column, program = program % across, program // across
    tile_row, program = program % tl.cdiv(grid // line, TY), program // tl.cdiv(grid // line, TY)
    image, part = (program % images).to(tl.int64), program // images
    n = tl.arange(0, TY * TX)
    y, x = tile_row * TY + n // TX, tile_column * TX + n % TX
    d = tl.arange(0, BD)[None, :]
    there = (y * line + x < grid)[:, None] & (x < line)[:, None] & (d < DEPTH)
    at = (image * grid + y * line + x)[:, None] * (2 * HEADS * DEPTH) + head * DEPTH + d
    k = tl.load(pairs + at, mask=there, other=0.0)
    v = tl.load(pairs + at + HEADS * DEPTH, mask=there, other=0.0)
    of_keys = tl.zeros((TY * TX, BD), tl.float32)
    of_values = tl.zeros((TY * TX, BD), tl.float32)
    tiles = tl.cdiv(count, BM)
    first, last = share_steps(tile_row, tile_column, rows, columns, most_down, most_across, tiles, part, parts)
    for step in range(first, last):
        row, column, tile = find_reader(step, tiles, tile_row, tile_column, rows, columns, most_down, most_across)
        near, left = y - tl.load(firsts + row), x - tl.load(firsts + ROWS + column)
        m = tile * BM + tl.arange(0, BM)
        pixel = locate(m, row * py, column * px, px, COLUMNS * px)
        place = (image * pixels + pixel)[:, None] * (HEADS * DEPTH) + head * DEPTH + d
        mine = (m < count)[:, None] & (d < DEPTH)
        q = tl.load(query + place, mask=mine, other=0.0)
        g = tl.load(grad + place, mask=mine, other=0.0)
        number = (image * HEADS + head) * pixels + pixel
        norm = tl.load(lse + number, mask=m < count, other=float("inf"))
        mean = tl.load(delta + number, mask=m < count, other=0.0)
        inside = (near >= 0) & (near < py) & (left >= 0) & (left < px)
        scores = add_product(k, tl.trans(q), tl.zeros((TY * TX, BM), tl.float32))  # (tokens, queries)
        weights = tl.where(inside[:, None], tl.exp2(scores * scale - norm[None, :]), 0.0)
        of_values = add_product(convert(weights, g.dtype), g, of_values)
        slopes = weights * (add_product(v, tl.trans(g), tl.zeros((TY * TX, BM), tl.float32)) - mean[None, :])
        of_keys = add_product(convert(slopes, q.dtype), q, of_keys)
    out += part.to(tl.int64) * images * grid * (2 * HEADS * DEPTH)
    tl.store(out + at, convert(of_keys * factor, out.dtype.element_ty), mask=there)
    tl.store(out + at + HEADS * DEPTH, convert(of_values, out.dtype.element_ty), mask=there)


def forward(query: Tensor, context: Tensor, weight: Tensor, bias: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the outputs (B, h, w, C), contiguous, and the scores' log2-sum-exp2 (B, heads, h, w) in float32.

    Args:
        query: (B, h, w, C), not empty, of any strides.
        context: (B, C / (Ry Rx), h, w), of any strides.
        weight: (2 C, C).
        bias: (2 C,).
        layout: sizes.
    """
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(len(query), layout.heads, *query.shape[1:3], dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        plan = make_plan(layout, query.device)
        pairs = functional.linear(cut_tokens(context, plan, layout), weight, bias)
        call = Call(_channels_last(query, out), pairs, plan, layout)
        attend = maps.attend if _is_wide(call) else _attend_narrow
        attend(call, out, lse)
    return out, lse


def backward(
    grad: Tensor,
    query: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of query, context, weight and bias; ``out`` and ``lse`` are `forward`'s."""
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    with torch.cuda.device_of(query):
        plan, channels, grad = make_plan(layout, query.device), query.shape[3], grad.contiguous()
        tokens = cut_tokens(context, plan, layout)
        pairs = functional.linear(tokens, weight, bias)
        call = Call(_channels_last(query, grad_query), pairs, plan, layout)
        attend_backward = maps.attend_backward if _is_wide(call) else _attend_narrow_backward
        parts = attend_backward(call, grad, lse, _dot_outputs(call, out, grad), grad_query)
        del pairs, call
        slopes = (parts.sum(0) if len(parts) > 1 else parts[0]).view(-1, 2 * channels)
        del parts
        grad_bias = slopes.sum(0, dtype=torch.float32).to(bias.dtype)
        slopes = slopes.to(tokens.dtype)
        grad_weight = slopes.t() @ tokens.view(-1, channels)
        del tokens
        grad_context = add_tokens(slopes @ weight, context, plan, layout)
    return grad_query, grad_context, grad_weight, grad_bias


def _channels_last(query: Tensor, result: Tensor) -> Tensor:
    """Return the queries, contiguous; where they are not, their copy in the result's memory."""
    return query if query.is_contiguous() else result.copy_(query)


def _dot_outputs(call: Call, out: Tensor, grad: Tensor) -> Tensor:
    """Return (B, heads, h, w), the product of each output and its gradient."""
    batch, height, width, _ = out.shape
    delta = torch.empty(batch, call.layout.heads, height, width, dtype=torch.float32, device=out.device)
    tiles, depth = triton.cdiv(height * width, 32), min(128, triton.next_power_of_2(call.depth))
    _dot_rows[(tiles * batch * call.layout.heads,)](
        out, grad, delta, height * width, tiles, call.layout.heads, call.depth, 32, depth
    )
    return delta


def _is_wide(call: Call) -> bool:
    return call.depth > (WIDEST_HEAD // 2 if call.precise else WIDEST_HEAD)


def _options(call: Call, queries: int, steps: int, warps: int = 4) -> dict[str, int]:
    """Return launch parameters; tokens of a step are 0 where a program owns its tokens."""
    options = call.constants | dict(BM=call.side(queries), BD=_padded(call), num_warps=warps, num_stages=2)
    if steps:
        steps = call.side(steps)
        options |= dict(BN=steps, EVEN=call.count % steps == 0)
    return options


def _padded(call: Call) -> int:
    return max(16, triton.next_power_of_2(call.depth))


def _attend_narrow(call: Call, out: Tensor, lse: Tensor) -> None:
    wide = _padded(call) > 64
    options = _options(call, 64 if call.precise or wide else 128, 32 if call.precise else 64)
    _attend[(call.windows * triton.cdiv(call.count, options["BM"]),)](
        *(call.queries, call.pairs, call.plan.firsts, out, lse, LOG2E * call.factor, *call.sides), **options
    )


def _attend_narrow_backward(call: Call, grad: Tensor, lse: Tensor, delta: Tensor, grad_query: Tensor) -> Tensor:
    depth, (ty, tx), scale = _padded(call), call.plan.tile, LOG2E * call.factor
    if call.precise:  # as many queries as registers have room for
        options = _options(call, min(32, 1024 // depth), 0)
    else:
        options = _options(call, 64, 0, 8 if depth > 64 else 4)
    grad_pairs = call.token_slopes(PROGRAMS // call.tiles, options["BM"])
    _attend_token_backward[(call.tiles * len(grad_pairs),)](
        *(call.queries, call.pairs, call.plan.firsts, grad, lse, delta, grad_pairs, *call.plan.readers, scale),
        *(call.factor, *call.sides, *(table.shape[1] for table in call.plan.readers), len(grad), len(grad_pairs)),
        **(options | dict(TY=ty, TX=tx)),
    )
    options = _options(call, 64, 32 if call.precise else 64)
    _attend_query_backward[(call.windows * triton.cdiv(call.count, options["BM"]),)](
        *(call.queries, call.pairs, call.plan.firsts, grad, lse, delta, grad_query, scale, call.factor, *call.sides),
        **(options | dict(CENTER=not call.precise)),
    )
    return grad_pairs


__all__ = ["backward", "forward"]
