"""Forward kernels of k-means attention: the assignment, and the centre sums as a product with it.

Tiling. `_assign` gives a program 64 pixels, whose logits it reads once; every thread keeps the first maximum of each 8th
query, and one reduction over the 8 ends it. `_add_up` gives a program a run of pixels of one image, 128 or 256 channels
and up to 256 queries, and walks the run by tiles: values (channels, pixels) times the tile's one-hot assignment, which
exists in shared memory only, added up in registers (64 or 128 floats a thread) while the next tile is on its way.
float32 values are three bfloat16 terms, 24 bits and so exact; half precision is multiplied as it is. Every program
writes its sums once, (runs, B, D, Q) in float32, and those are added in a fixed order: no atomics, always
deterministic. Values and logits are read once: 40 MB for an image of 161 x 161 in float32, 9 us at 4.3 TB/s. Where there
are few pixels `_add_up` finds the assignment itself, which reads logits once per 128 channels, but saves a launch.

A value that is infinite or NaN makes its channel's sums of all queries NaN, as the product with a one-hot matrix does.

Backward has no kernel: it is a gather of (B, D, Q) by the assignment, which writes the gradient of the values once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ASSIGNED_PIXELS = 64
"""Pixels of a program of `_assign`."""
WARPS = 8
FUSED_PIXELS = 1 << 14
"""Pixels of a batch up to which `_add_up` finds the assignment; beyond it reading the logits twice costs more."""
PROCESSORS = 132
"""Programs of `_add_up` at once, as many as an H200 has processors: each one takes most of a processor's registers."""
RUN_COST = 1 / 16
"""What a run costs (its sums are written and read once) in units of a tile."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _first_maximum(logits, at, inside, queries, pixels, BLOCK_P: tl.constexpr, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)
    best = tl.full([ROWS, BLOCK_P], -float("inf"), tl.float32)
    winner = tl.broadcast_to(row[:, None], [ROWS, BLOCK_P])
    for first in tl.range(0, queries, ROWS, loop_unroll_factor=8):
        q = first + row
        mask = (q[:, None] < queries) & inside[None, :]
        x = tl.load(logits + (q[:, None] * pixels + at[None, :]), mask, -float("inf")).to(tl.float32)
        better = (best == best) & ((x > best) | (x != x))  # nothing is better than NaN
        best = tl.where(better, x, best)
        winner = tl.where(better, q[:, None], winner)
    # Floats ordered as whole numbers, NaN above all, zeros of either sign alike; then the least query.
    bits = (best + 0.0).to(tl.int32, bitcast=True)
    order = tl.where(best == best, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    key = order.to(tl.int64) * 2147483648 + (0x7FFFFFFF - winner)
    return 0x7FFFFFFF - (tl.max(key, 0) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _assign(logits, assignment, queries, pixels, BLOCK_P: tl.constexpr, ROWS: tl.constexpr):
    batch = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = at < pixels
    winner = _first_maximum(logits + batch * queries * pixels, at, inside, queries, pixels, BLOCK_P, ROWS)
    tl.store(assignment + batch * pixels + at, winner.to(tl.int64), inside)


@triton.jit
def _add_product(sums, value, hot):
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        value = value.to(tl.float32)
    return tl.dot(value, tl.trans(hot.to(value.dtype)), sums, input_precision="ieee")


@triton.jit
def _add_up(
    values,
    logits,
    assignment,
    partial,
    depth,
    queries,
    pixels,
    steps,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
    FUSED: tl.constexpr,
):
    run, block, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    query_blocks = tl.cdiv(queries, BLOCK_Q)
    d = block // query_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    q = block % query_blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    values += batch * depth * pixels
    logits += batch * queries * pixels
    assignment += batch * pixels
    sums = tl.zeros([BLOCK_D, BLOCK_Q], tl.float32)
    for step in range(run * steps, (run + 1) * steps):
        at = step * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = at < pixels
        value = tl.load(values + (d[:, None] * pixels + at[None, :]), (d[:, None] < depth) & inside[None, :], 0.0)
        if FUSED:
            winner = _first_maximum(logits, at, inside, queries, pixels, BLOCK_P, ROWS)
            if block == 0:
                tl.store(assignment + at, winner.to(tl.int64), inside)
        else:
            winner = tl.load(assignment + at, inside, 0).to(tl.int32)
        hot = q[:, None] == winner[None, :]
        if value.dtype == tl.float32:
            high = value.to(tl.bfloat16)
            rest = value - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            sums = _add_product(sums, low, hot)
            sums = _add_product(sums, middle, hot)
            sums = _add_product(sums, high, hot)
        else:
            sums = _add_product(sums, value, hot)
    partial += (run.to(tl.int64) * tl.num_programs(2) + batch) * depth * queries
    tl.store(partial + d[:, None] * queries + q[None, :], sums, (d[:, None] < depth) & (q[None, :] < queries))


def forward(pixel_value: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre sums (B, D, Q) float32 and the assignment int64 of (B, D, ...) and (B, Q, ...).

    Maps that are not contiguous are copied first, as in the eager form.
    """
    values, logits = pixel_value.flatten(2).contiguous(), mask_logits.flatten(2).contiguous()  # (B, D, P), (B, Q, P)
    (batch, depth, pixels), queries = values.shape, logits.shape[1]
    assignment = torch.empty((batch, *mask_logits.shape[2:]), dtype=torch.int64, device=logits.device)
    if not assignment.numel() or not depth:
        return values.new_zeros((batch, depth, queries), dtype=torch.float32), assignment
    block_q = min(max(16, triton.next_power_of_2(queries)), 256)
    block_d = min(max(16, triton.next_power_of_2(depth)), 256 if batch >= 4 and block_q <= 128 else 128)
    blocks = triton.cdiv(depth, block_d) * triton.cdiv(queries, block_q)
    fused = batch * pixels <= FUSED_PIXELS and queries <= block_q
    block_p = 32 if fused or block_q > 128 or values.dtype == torch.float32 else 64
    tiles = triton.cdiv(pixels, block_p)
    most_runs = max(1, PROCESSORS // (batch * blocks))
    steps = max(triton.cdiv(tiles, most_runs), round((tiles * RUN_COST) ** 0.5), 1)
    runs = triton.cdiv(tiles, steps)
    partial = torch.empty((runs, batch, depth, queries), dtype=torch.float32, device=values.device)
    with torch.cuda.device_of(values):
        if not fused:
            grid = (triton.cdiv(pixels, ASSIGNED_PIXELS), batch)
            _assign[grid](logits, assignment, queries, pixels, ASSIGNED_PIXELS, WARPS, num_warps=WARPS)
        _add_up[(runs, blocks, batch)](
            values,
            logits,
            assignment,
            partial,
            depth,
            queries,
            pixels,
            steps,
            BLOCK_D=block_d,
            BLOCK_Q=block_q,
            BLOCK_P=block_p,
            ROWS=WARPS,
            FUSED=fused,
            num_warps=WARPS,
            num_stages=1 if fused else 3,
        )
    return partial[0] if runs == 1 else partial.sum(0), assignment


__all__ = ["forward"]
