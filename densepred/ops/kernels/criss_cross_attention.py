"""Criss-cross attention as Triton kernels, on pixels (B, *axes, C) with the channels last; an axis after another.

Tiling. The lines of an axis are independent sequences: pixel i of a line lies ``inner`` pixels behind pixel i - 1, so that
one kernel serves rows, columns and the third axis, and every access takes whole pixels' vectors of adjacent channels. In
the forward a program owns 128 queries of a line and 128 channels of v (97 x 97 x 512: 388 programs, two on a
multiprocessor), and passes over the line's keys 32 at a time: one product gives energies, a running maximum and sum their
weights, another adds to the output, which stays in registers. Energies are computed again for each slice of the channels;
q and k have an eighth of them. The first axis writes output and log-sum-exp, each further one starts from both as the sum
so far and leaves the pixel itself out. No weights are ever stored.

Bytes. An axis reads q, k, v and writes the output, from the second on it reads the output too: 53 MB in half precision at
97 x 97 x 512, 185 MB at 128 x 256 x 512, most of it in the L2 cache. FLOPs: those of the dense form, and three times the
products of q and k more. Exponentials are of base 2, one multiply-add and one instruction each.

Backward. Weights are exp(energy - log_sum), computed again. `_delta` gives every pixel the product of its output and that
one's gradient. For each axis `_value_gradients` is the forward with the roles of queries and keys changed, without a sum to
run; `_energy_gradients` has one program a line, which holds a map of 128 x 128 gradients of weights in registers while it
passes over the channels, and derives from it what goes to q and k (these sums stay in float32 between axes). Every number
is written by one program, an axis after another: no atomics, and the same bits in every run.

float32 runs on the tensor cores as three products of TF32 parts, with a relative error of a few millionths.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from densepred.ops.criss_cross_attention import pixels_last

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
REGISTERS = 128
"""A thread's, so that 16 warps share a multiprocessor; what does not fit is kept in memory outside of the loops only."""


def tiles(length: int, energy_channels: int, wide: bool) -> dict[str, int]:
    """Return tile sizes and warps by a line's length and the (padded) channels of q; ``wide``: float32.

    A program owns OWNED pixels and WIDTH channels and passes over the line PASSED pixels at a time.
    """
    if wide:  # twice the bytes, and registers for both parts of a split operand
        return {
            "OWNED": 64 if energy_channels <= 64 else 32,
            "PASSED": 32,
            "WIDTH": 128,
            "num_warps": 4,
            "num_stages": 2,
        }
    owned = 128 if length > 64 and energy_channels <= 64 else 64 if energy_channels <= 128 else 32
    return {"OWNED": owned, "PASSED": 32, "WIDTH": 128, "num_warps": max(4, owned // 16), "num_stages": 3}


@triton.jit
def _high(x):
    """Return float32 numbers rounded to the 11 bits that TF32 keeps."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(a, b, sums):
    """Return ``sums + a @ b``; of float32 in three products of TF32 that keep 22 bits."""
    if a.dtype == tl.float32:
        a_high, b_high = _high(a), _high(b)
        sums = tl.dot(a - a_high, b_high, sums, input_precision="tf32")
        sums = tl.dot(a_high, b - b_high, sums, input_precision="tf32")
        return tl.dot(a_high, b_high, sums, input_precision="tf32")
    elif INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _convert(x, TYPE: tl.constexpr):
    """Round float32 numbers to a type."""
    if INTERPRETED and tl.bfloat16 == TYPE:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 32767 + ((bits >> 16) & 1) & -65536).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def _start(line, length, inner):
    """Return the number of a line's first pixel; its pixels lie `inner` apart."""
    return (line // inner).to(tl.int64) * length * inner + line % inner


@triton.jit
def _place(maps, pixels, inside, first, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return where WIDTH channels of some pixels lie, and which of them there are."""
    column = first + tl.arange(0, WIDTH)
    there = inside[:, None]
    if CHANNELS % WIDTH != 0:
        there = there & (column < CHANNELS)[None, :]
    return maps + pixels[:, None] * CHANNELS + column[None, :], there


@triton.jit
def _tile(maps, pixels, inside, first, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    place, there = _place(maps, pixels, inside, first, CHANNELS, WIDTH)
    return tl.load(place, mask=there, other=0.0)


@triton.jit
def _store_tile(maps, tile, pixels, inside, first, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    place, there = _place(maps, pixels, inside, first, CHANNELS, WIDTH)
    tl.store(place, _convert(tile, maps.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["length"])
def _forward(
    q, k, v, earlier, out, log_sum, length, inner,
    ENERGY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ENERGY: tl.constexpr, OWN_KEY: tl.constexpr,
    PARTS: tl.constexpr, OWNED: tl.constexpr, PASSED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slices: tl.constexpr = tl.cdiv(CHANNELS, WIDTH)
    program = tl.program_id(0)
    first = program % slices * WIDTH
    start = _start(program // slices // PARTS, length, inner)
    row = program // slices % PARTS * OWNED + tl.arange(0, OWNED)
    pixels, inside = start + row.to(tl.int64) * inner, row < length
    queries = _tile(q, pixels, inside, 0, ENERGY_CHANNELS, ENERGY)  # (OWNED, ENERGY)
    if OWN_KEY:
        largest = tl.full((OWNED,), float("-inf"), tl.float32)
        total = tl.zeros((OWNED,), tl.float32)
        result = tl.zeros((OWNED, WIDTH), tl.float32)
    else:  # go on from the axes before: their sum of weights is exp(earlier) * 1
        largest = tl.load(earlier + pixels, mask=inside, other=0.0) * LOG2_E
        total = tl.full((OWNED,), 1.0, tl.float32)
        result = _tile(out, pixels, inside, first, CHANNELS, WIDTH).to(tl.float32)
    for begin in range(0, length, PASSED):
        key = begin + tl.arange(0, PASSED)
        key_pixels, key_inside = start + key.to(tl.int64) * inner, key < length
        keys = _tile(k, key_pixels, key_inside, 0, ENERGY_CHANNELS, ENERGY)  # (PASSED, ENERGY)
        values = _tile(v, key_pixels, key_inside, first, CHANNELS, WIDTH)  # (PASSED, WIDTH)
        energies = _add_product(queries, tl.trans(keys), tl.zeros((OWNED, PASSED), tl.float32))
        counts = key_inside[None, :]
        if not OWN_KEY:
            counts = counts & (row[:, None] != key[None, :])
        energies = tl.where(counts, energies, float("-inf"))
        larger = tl.maximum(largest, tl.max(energies, 1) * LOG2_E)
        weights = tl.exp2(energies * LOG2_E - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        result = _add_product(_convert(weights, values.dtype), values, result * shrink[:, None])
        largest = larger
    _store_tile(out, result * (1.0 / total)[:, None], pixels, inside, first, CHANNELS, WIDTH)
    if first == 0:
        tl.store(log_sum + pixels, (largest + tl.log2(total)) * LN_2, mask=inside)


@triton.jit
def _delta(grad, out, delta, pixels, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    """Write each pixel's product of its output and that one's gradient: what its weights are worth on average."""
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    products = tl.zeros((PIXELS, WIDTH), tl.float32)
    for first in range(0, CHANNELS, WIDTH):
        slopes = _tile(grad, pixel, inside, first, CHANNELS, WIDTH).to(tl.float32)
        products += slopes * _tile(out, pixel, inside, first, CHANNELS, WIDTH).to(tl.float32)
    tl.store(delta + pixel, tl.sum(products, 1), mask=inside)


@triton.jit(do_not_specialize=["length"])
def _value_gradients(
    q, k, grad, log_sum, grad_v, length, inner,
    ENERGY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ENERGY: tl.constexpr, OWN_KEY: tl.constexpr,
    PARTS: tl.constexpr, OWNED: tl.constexpr, PASSED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    slices: tl.constexpr = tl.cdiv(CHANNELS, WIDTH)
    program = tl.program_id(0)
    first = program % slices * WIDTH
    start = _start(program // slices // PARTS, length, inner)
    key = program // slices % PARTS * OWNED + tl.arange(0, OWNED)
    pixels, inside = start + key.to(tl.int64) * inner, key < length
    keys = _tile(k, pixels, inside, 0, ENERGY_CHANNELS, ENERGY)  # (OWNED, ENERGY)
    result = tl.zeros((OWNED, WIDTH), tl.float32)
    for begin in range(0, length, PASSED):
        row = begin + tl.arange(0, PASSED)
        row_pixels, row_inside = start + row.to(tl.int64) * inner, row < length
        queries = _tile(q, row_pixels, row_inside, 0, ENERGY_CHANNELS, ENERGY)  # (PASSED, ENERGY)
        slopes = _tile(grad, row_pixels, row_inside, first, CHANNELS, WIDTH)  # (PASSED, WIDTH)
        # As a tile of eight equal columns: of a mere vector each thread would fetch its eight numbers one by one (3.6).
        copies = log_sum + row_pixels[:, None] + 0 * tl.arange(0, 8)[None, :]
        total = tl.max(tl.load(copies, mask=row_inside[:, None], other=float("inf")), 1)
        energies = _add_product(keys, tl.trans(queries), tl.zeros((OWNED, PASSED), tl.float32))
        weights = tl.exp2(energies * LOG2_E - total[None, :] * LOG2_E)
        if not OWN_KEY:
            weights = tl.where(key[:, None] == row[None, :], 0.0, weights)
        result = _add_product(_convert(weights, slopes.dtype), slopes, result)
    if not OWN_KEY:
        result += _tile(grad_v, pixels, inside, first, CHANNELS, WIDTH)
    _store_tile(grad_v, result, pixels, inside, first, CHANNELS, WIDTH)


@triton.jit(do_not_specialize=["length"])
def _energy_gradients(
    q, k, v, grad, log_sum, delta, sum_q, sum_k, grad_q, grad_k, length, inner,
    ENERGY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, ENERGY: tl.constexpr, OWN_KEY: tl.constexpr,
    LAST: tl.constexpr, OWNED: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    start = _start(tl.program_id(0), length, inner)
    for key_begin in range(0, length, OWNED):
        key = key_begin + tl.arange(0, OWNED)
        key_pixels, key_inside = start + key.to(tl.int64) * inner, key < length
        keys = _tile(k, key_pixels, key_inside, 0, ENERGY_CHANNELS, ENERGY)
        if OWN_KEY:
            of_keys = tl.zeros((OWNED, ENERGY), tl.float32)
        else:
            of_keys = _tile(sum_k, key_pixels, key_inside, 0, ENERGY_CHANNELS, ENERGY)
        for begin in range(0, length, OWNED):
            row = begin + tl.arange(0, OWNED)
            pixels, inside = start + row.to(tl.int64) * inner, row < length
            queries = _tile(q, pixels, inside, 0, ENERGY_CHANNELS, ENERGY)
            average = tl.load(delta + pixels, mask=inside, other=0.0)
            worth = tl.zeros((OWNED, OWNED), tl.float32) - average[:, None]
            for first in range(0, CHANNELS, SLICE):
                slopes = _tile(grad, pixels, inside, first, CHANNELS, SLICE)
                values = _tile(v, key_pixels, key_inside, first, CHANNELS, SLICE)
                if slopes.dtype == tl.float32:  # tensor cores round sums towards zero: keep these short
                    worth += _add_product(slopes, tl.trans(values), tl.zeros((OWNED, OWNED), tl.float32))
                else:
                    worth = _add_product(slopes, tl.trans(values), worth)
            total = tl.load(log_sum + pixels, mask=inside, other=float("inf"))
            energies = _add_product(queries, tl.trans(keys), tl.zeros((OWNED, OWNED), tl.float32))
            weights = tl.exp2(energies * LOG2_E - total[:, None] * LOG2_E)
            counts = key_inside[None, :]
            if not OWN_KEY:
                counts = counts & (row[:, None] != key[None, :])
            changes = _convert(tl.where(counts, weights * worth, 0.0), keys.dtype)  # (OWNED, OWNED)
            of_keys = _add_product(tl.trans(changes), queries, of_keys)
            of_queries = _add_product(changes, keys, tl.zeros((OWNED, ENERGY), tl.float32))
            if key_begin > 0 or not OWN_KEY:
                of_queries += _tile(sum_q, pixels, inside, 0, ENERGY_CHANNELS, ENERGY)
            if LAST:  # masks, as Triton 3.6 cannot pipeline the loop beside a branch
                done = 0 * row + key_begin + OWNED >= length
                _store_tile(grad_q, of_queries, pixels, inside & done, 0, ENERGY_CHANNELS, ENERGY)
                inside = inside & ~done
            _store_tile(sum_q, of_queries, pixels, inside, 0, ENERGY_CHANNELS, ENERGY)
        _store_tile(grad_k if LAST else sum_k, of_keys, key_pixels, key_inside, 0, ENERGY_CHANNELS, ENERGY)
        tl.debug_barrier()  # what other threads of this program stored is read for the next keys


def _axes(pixels: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (lines, length, pixels between neighbours on a line) of each axis that the eager form takes, in its order."""
    last, count = pixels.dim() - 2, pixels.shape[:-1].numel()
    for axis in range(last, 0, -1):
        length = pixels.shape[axis]
        if axis == last or length > 1:
            yield count // length, length, pixels.shape[axis + 1 : -1].numel()


def _launches(query: Tensor, value: Tensor) -> Iterator[tuple[int, tuple[int, int], dict, dict]]:
    """Yield an axis's lines, its (length, stride), what all kernels are compiled for, and the tiles."""
    energy_channels, channels = query.shape[-1], value.shape[-1]
    padded = max(16, triton.next_power_of_2(energy_channels))
    wide = torch.float32 in (query.dtype, value.dtype)
    for number, (lines, length, inner) in enumerate(_axes(value)):
        fixed = {"ENERGY_CHANNELS": energy_channels, "CHANNELS": channels, "ENERGY": padded, "OWN_KEY": number == 0}
        yield lines, (length, inner), fixed, tiles(length, padded, wide)


def _shared_out(lines: int, length: int, channels: int, sizes: dict) -> tuple[tuple[int], dict]:
    """Return the grid of programs that own OWNED pixels and WIDTH channels each, and their options."""
    parts = triton.cdiv(length, sizes["OWNED"])
    options = sizes | {"PARTS": parts}
    if sizes["num_stages"] > 2:
        options["maxnreg"] = REGISTERS
    return (lines * parts * triton.cdiv(channels, sizes["WIDTH"]),), options


def _energy_pixels(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(q.dtype, k.dtype)  # both sides of a product
    return pixels_last(q, dtype), pixels_last(k, dtype)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output and the log-sum-exp; see `densepred.ops.criss_cross_attention.Backend`."""
    (query, key), value = _energy_pixels(q, k), pixels_last(v, v.dtype)
    out, log_sum = torch.empty_like(value), torch.empty(value.shape[:-1], dtype=torch.float32, device=v.device)
    if not value.numel():
        return out.movedim(-1, 1), log_sum
    with torch.cuda.device_of(v):
        for lines, line, fixed, sizes in _launches(query, value):
            # Programs of the same pixels and other channels read the earlier sums while one of them writes the new.
            earlier, log_sum = log_sum, log_sum if fixed["OWN_KEY"] else torch.empty_like(log_sum)
            grid, options = _shared_out(lines, line[0], v.shape[1], sizes)
            _forward[grid](query, key, value, earlier, out, log_sum, *line, **fixed, **options)
    return out.movedim(-1, 1), log_sum


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; see `densepred.ops.criss_cross_attention.Backend`."""
    (query, key), value = _energy_pixels(q, k), pixels_last(v, v.dtype)
    slope, result = pixels_last(grad, v.dtype), pixels_last(out, v.dtype)
    grads = [torch.empty_like(pixels) for pixels in (query, key, value)]
    if value.numel():
        # Sums over axes and over tiles of a line, in float32; where that is the gradients' type, in their place.
        sums = [x if x.dtype == torch.float32 else torch.empty_like(x, dtype=torch.float32) for x in grads[:2]]
        delta, count = torch.empty_like(log_sum), log_sum.numel()
        launches = list(_launches(query, value))
        with torch.cuda.device_of(v):
            _delta[(triton.cdiv(count, 16),)](slope, result, delta, count, CHANNELS=v.shape[1], PIXELS=16, WIDTH=256)
            for number, (lines, line, fixed, sizes) in enumerate(launches):
                _energy_gradients[(lines,)](
                    query, key, value, slope, log_sum, delta, *sums, *grads[:2], *line, **fixed,
                    LAST=number + 1 == len(launches), OWNED=sizes["OWNED"], SLICE=64 if sizes["num_stages"] > 2 else 32,
                    num_warps=sizes["num_warps"], num_stages=sizes["num_stages"],
                )  # fmt: skip
                grid, options = _shared_out(lines, line[0], v.shape[1], sizes)
                _value_gradients[grid](query, key, slope, log_sum, grads[2], *line, **fixed, **options)
    maps = (pixels.movedim(-1, 1).to(x.dtype) for pixels, x in zip(grads, (q, k, v), strict=True))
    return tuple(maps)


__all__ = ["backward", "forward"]
