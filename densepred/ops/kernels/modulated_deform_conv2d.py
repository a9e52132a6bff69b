"""Modulated deformable convolution as Triton kernels on channels-last maps: matrix products whose columns never exist.

Tiling. A program of the forward owns 64 output pixels, 8 x 8, and up to 64 outputs (128 in half precision). Step by step it
takes one tap and 64 channels (128): it finds the four pixels around each sample, reads them in 16-byte loads along the
channels, weighs them in float32, and multiplies this tile of columns with a slice of the weight on the tensor cores; sums
stay in registers. All taps of some channels come before the next channels, so that the 200 pixels or so that a tile's taps
touch, 50 KB of them, are in the first cache after the first tap. Where tiles are too few for the GPU, the steps of a tile
are split among programs, and a second kernel adds the parts, in order. Maps whose channels are not last are copied first.

Bytes. The maps (about three times from the second cache, once from memory), offsets, masks and outputs; im2col writes and
reads 72 more for each input number in float32. The forward is bound by the issue of instructions, by count about 32 for each
number that a thread samples (22 in half precision); the tensor cores of an H200 need 770 cycles of the 1010 of a step in
float32. This runs there as three products of TF32 parts, split by a rounding and a subtraction; an infinite number
makes its sum NaN.

Backward. A first kernel owns pixels too. For each tap it multiplies the outputs' gradient with the weight's slice, which is
the gradient of 32 channels of columns, adds its four shares to the maps' gradient by atomic additions of 16 bytes, in
float32, and sums up its products with the four pixels: all that offsets and masks need. A second kernel owns a tile of the
weight's gradient, samples again and multiplies with the outputs' gradient; where programs split its pixels, their parts are
added in order. Only the atomic additions come in any order: the maps' gradient differs in its last bits from run to run,
all else is deterministic. Under `torch.use_deterministic_algorithms` the op takes the eager backward instead.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
PIXELS = 64
"""Output pixels of a tile, 8 x 8 where the map has 8 lines: a square one's taps touch the fewest pixels."""
PROGRAMS = 396
"""Programs wanted at least, 3 for each of an H200's 132 multiprocessors; sums are split to come near."""


REGISTERS = {4: 168, 8: 128}
"""Of a thread of `forward`, by its warps: so that 12 or 16 warps fit on a multiprocessor."""


def tiles(dtype: torch.dtype, cell: int, outputs: int) -> dict[str, int]:
    """Return the tile sizes and warps of the programs that sample and multiply.

    Args:
        dtype: of the maps.
        cell: channels that share a group of the weight and their offsets.
        outputs: of a group.
    """
    whole = dtype == torch.float32  # twice the bytes, and both halves of a split operand in registers
    return {
        "CHANNELS": _power(cell, 32 if whole else 64),
        "OUTPUTS": _power(outputs, 64 if whole else 128),
        "num_warps": 4 if whole else 8,
    }


def _power(number: int, largest: int) -> int:
    return min(largest, max(16, triton.next_power_of_2(number)))


@triton.jit
def _high(x):
    """Return float32 numbers rounded to the 11 bits that TF32 keeps."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _add_product(a, b, total):
    """Return total + a @ b; float32 as three products of TF32 that keep 22 bits.

    Tensor cores round their sums towards zero: 4608 numbers add up to an error of 4e-5. Tiles are therefore added outside.
    """
    if a.dtype == tl.float32:
        a_high, b_high = _high(a), _high(b)
        part = tl.dot(a - a_high, b_high, input_precision="tf32")
        part = tl.dot(a_high, b - b_high, part, input_precision="tf32")
        return total + tl.dot(a_high, b_high, part, input_precision="tf32")
    elif INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _pixels(tile, height, width, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """Return lines and columns of a tile's output pixels, (LINES * COLUMNS,) each, and which of them exist."""
    place, across = tl.arange(0, LINES * COLUMNS), tl.cdiv(width, COLUMNS)
    y = tile // across * LINES + place // COLUMNS
    x = tile % across * COLUMNS + place % COLUMNS
    return y, x, (y < height) & (x < width)


@triton.jit
def _along(base, move, side):
    """Return the first of two pixels, how many positions base + move lie further on, and the rest of the way.

    Positions lie between the two, or one pixel before or after them where the map ends; 2 marks those that do not count.
    The whole part of a move goes to the base: the rest stays exact wherever the base lies.
    """
    whole = tl.floor(move)
    rest = move - whole
    before = base.to(tl.float32) + whole
    counts = (before >= -1) & (before < side) & ((before >= 0) | (rest > 0))  # False for what is no number
    before = tl.where(counts, before, 0.0).to(tl.int32)
    first = tl.maximum(tl.minimum(before, side - 2), 0)
    return first, tl.where(counts, before - first, 2), rest


@triton.jit
def _shares(shift, rest, side):
    """Return the linear weights of the two pixels."""
    near = tl.where(shift == 0, 1 - rest, tl.where(shift == -1, rest, 0.0))
    far = tl.where(shift == 0, rest, tl.where(shift == 1, 1 - rest, 0.0))
    return near, tl.where(side > 1, far, 0.0)


@triton.jit
def _slopes(shift, side):
    """Return the derivatives of `_shares`."""
    near = tl.where(shift == 0, -1.0, tl.where(shift == -1, 1.0, 0.0))
    far = tl.where(shift == 0, 1.0, tl.where(shift == 1, -1.0, 0.0))
    return near, tl.where(side > 1, far, 0.0)


@triton.jit
def _tap(
    offset, offset_channel, mask, mask_channel, own, tap, y, x, inside, H, W,
    stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, ACROSS: tl.constexpr, index: tl.constexpr,
):  # fmt: skip
    """Return a tap's first pixel of four, its place by `_along` and its mask, 0 outside the output; (pixels,) each."""
    offset += (2 * own).to(index) * offset_channel
    dy = tl.load(offset, mask=inside, other=0.0).to(tl.float32)
    dx = tl.load(offset + offset_channel, mask=inside, other=0.0).to(tl.float32)
    number = tl.load(mask + own.to(index) * mask_channel, mask=inside, other=0.0).to(tl.float32)
    top, shift_y, rest_y = _along(y * stride_y - padding_y + tap // ACROSS * dilation_y, dy, H)
    left, shift_x, rest_x = _along(x * stride_x - padding_x + tap % ACROSS * dilation_x, dx, W)
    return (top * W + left).to(index), shift_y, rest_y, shift_x, rest_x, number


@triton.jit
def _load(pointers, within, EVEN: tl.constexpr):
    if EVEN:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=within, other=0.0)
    return values.to(tl.float32)


@triton.jit
def _columns(pointers, right, down, top, bottom, left, right_share, number, within, EVEN: tl.constexpr):
    """Return what a tap samples, (pixels, channels)."""
    top, bottom = top * number, bottom * number
    columns = _load(pointers, within, EVEN) * (top * left)[:, None]
    columns += _load(pointers + right, within, EVEN) * (top * right_share)[:, None]
    columns += _load(pointers + down, within, EVEN) * (bottom * left)[:, None]
    columns += _load(pointers + (down + right), within, EVEN) * (bottom * right_share)[:, None]
    return columns


@triton.jit
def _forward(
    maps, weight, bias, out, steps, images,
    offset, mask, H, W, h, w, outputs, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_y, offset_x, mask_image, mask_channel, mask_y, mask_x,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, GROUPS: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
    SHARED: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, PIECES: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write a tile of outputs, or, if SPLIT, what some taps and channels add to it."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    SPAN: tl.constexpr = CHANNELS * PIECES
    C: tl.constexpr = CELL * CELLS * GROUPS
    parts, tiles = tl.cdiv(outputs, OUTPUTS) * GROUPS, tl.cdiv(h, LINES) * tl.cdiv(w, COLUMNS)
    program = tl.program_id(0)
    group = program % GROUPS
    output = program % parts // GROUPS * OUTPUTS + tl.arange(0, OUTPUTS)
    image = (program // parts // tiles).to(tl.int64)
    y, x, inside = _pixels(program // parts % tiles, h, w, LINES, COLUMNS)
    maps += image * H * W * C + group * (CELL * CELLS)
    offset += image * offset_image + y.to(index) * offset_y + x.to(index) * offset_x
    mask += image * mask_image + y.to(index) * mask_y + x.to(index) * mask_x
    rows = weight + (group * outputs + output)[None, :] * (TAPS * CELL * CELLS)
    right, down = tl.where(W > 1, C, 0), tl.where(H > 1, W * C, 0)
    total = tl.zeros((LINES * COLUMNS, OUTPUTS), tl.float32)
    begin = tl.program_id(1) * steps
    for step in range(begin, tl.minimum(begin + steps, TAPS * ((CELL + SPAN - 1) // SPAN) * CELLS)):
        # All taps of some channels before the next channels: what they share stays in the first cache.
        tap, cell, start = step % TAPS, step // TAPS % CELLS, step // (TAPS * CELLS) * SPAN
        row, shift_y, rest_y, shift_x, rest_x, number = _tap(
            offset, offset_channel, mask, mask_channel, (group * CELLS + cell) // SHARED * TAPS + tap, tap, y, x, inside,
            H, W, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, ACROSS, index,
        )  # fmt: skip
        top, bottom = _shares(shift_y, rest_y, H)
        left, right_share = _shares(shift_x, rest_x, W)
        for piece in range(PIECES):
            channels = start + piece * CHANNELS + tl.arange(0, CHANNELS)
            within = channels < CELL
            channels += cell * CELL
            columns = _columns(
                maps + row[:, None] * C + channels[None, :], right, down,
                top, bottom, left, right_share, number, within[None, :], CELL % SPAN == 0,
            )  # fmt: skip
            some = within[:, None] & (output < outputs)[None, :]
            weights = tl.load(rows + (tap * (CELL * CELLS) + channels)[:, None], mask=some, other=0.0)
            total = _add_product(columns.to(weights.dtype), weights, total)
    place = group * outputs + output
    if SPLIT:
        image += tl.program_id(1) * images
    elif bias is not None:
        total += tl.load(bias + place, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    pointers = out + image * h * w * (outputs * GROUPS) + (y.to(index) * w + x)[:, None] * (outputs * GROUPS)
    some = inside[:, None] & (output < outputs)[None, :]
    tl.store(pointers + place[None, :], total.to(out.dtype.element_ty), mask=some)


@triton.jit
def _add_parts(parts, bias, out, number, count, outputs, BLOCK: tl.constexpr):
    """Add up what the programs of a split sum wrote, and the bias."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(number):
        total += tl.load(parts + place, mask=place < count, other=0.0)
        parts += count
    if bias is not None:
        total += tl.load(bias + place % outputs).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=place < count)


@triton.jit
def _freed(product):
    """Return a product, (pixels, channels), in the layout that its users choose.

    The compiler carries a product's layout over the registers to everything that is computed from it, and so would move 12
    tiles through shared memory, all pixels in and all results out. It does not carry it through a sum, here one with zeros.
    """
    return tl.sum(tl.join(product, tl.zeros_like(product)), 2)


@triton.jit
def _corner(values, gradient, slopes, share, within, EVEN: tl.constexpr):
    """Give pixels their share of the samples' gradients; return the products of these with their values, (pixels,)."""
    worth = tl.sum(slopes * _load(values, within, EVEN), 1)
    tl.atomic_add(gradient, slopes * share[:, None], mask=within & (share != 0)[:, None], sem="relaxed")
    return worth


@triton.jit
def _sample_gradients(
    maps, weight, grad, grad_maps, grad_offset, grad_mask, taps_each, chunks_each, images,
    offset, mask, H, W, h, w, outputs, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_y, offset_x, mask_image, mask_channel, mask_y, mask_x,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, GROUPS: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
    SHARED: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Add to the maps' gradient and write those of offsets and masks, for a tile, some taps and some channels."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    EVEN: tl.constexpr = CELL % CHANNELS == 0
    C: tl.constexpr = CELL * CELLS * GROUPS
    DEFORM_GROUPS: tl.constexpr = CELLS * GROUPS // SHARED
    tiles = tl.cdiv(h, LINES) * tl.cdiv(w, COLUMNS)
    deform_group = tl.program_id(0) % DEFORM_GROUPS
    image = (tl.program_id(0) // DEFORM_GROUPS // tiles).to(tl.int64)
    y, x, inside = _pixels(tl.program_id(0) // DEFORM_GROUPS % tiles, h, w, LINES, COLUMNS)
    maps += image * H * W * C
    grad_maps += image * H * W * C
    offset += image * offset_image + y.to(index) * offset_y + x.to(index) * offset_x
    mask += image * mask_image + y.to(index) * mask_y + x.to(index) * mask_x
    pixel = y.to(index) * w + x
    grad += image * h * w * (outputs * GROUPS) + pixel[:, None] * (outputs * GROUPS)
    right, down = tl.where(W > 1, C, 0), tl.where(H > 1, W * C, 0)
    own_maps = ((tl.program_id(2) * images + image) * DEFORM_GROUPS + deform_group) * TAPS
    first_tap, first_chunk = tl.program_id(1) * taps_each, tl.program_id(2) * chunks_each
    last_chunk = tl.minimum(first_chunk + chunks_each, (CELL + CHANNELS - 1) // CHANNELS * SHARED)
    for tap in range(first_tap, tl.minimum(first_tap + taps_each, TAPS)):
        row, shift_y, rest_y, shift_x, rest_x, number = _tap(
            offset, offset_channel, mask, mask_channel, deform_group * TAPS + tap, tap, y, x, inside,
            H, W, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, ACROSS, index,
        )  # fmt: skip
        top, bottom = _shares(shift_y, rest_y, H)
        left, right_share = _shares(shift_x, rest_x, W)
        top_left = tl.zeros((LINES * COLUMNS,), tl.float32)
        top_right, bottom_left, bottom_right = top_left, top_left, top_left
        for chunk in range(first_chunk, last_chunk):
            cell = deform_group * SHARED + chunk % SHARED
            channels = chunk // SHARED * CHANNELS + tl.arange(0, CHANNELS)
            within = channels < CELL
            channels += cell * CELL
            slopes = tl.zeros((LINES * COLUMNS, CHANNELS), tl.float32)  # of what the tap samples
            for first in range(0, outputs, OUTPUTS):
                output = first + tl.arange(0, OUTPUTS)
                some = inside[:, None] & (output < outputs)[None, :]
                grads = tl.load(grad + (cell // CELLS * outputs + output)[None, :], mask=some, other=0.0)
                some = within[None, :] & (output < outputs)[:, None]
                rows = weight + (tap * C + channels)[None, :] * outputs
                slopes = _add_product(grads, tl.load(rows + output[:, None], mask=some, other=0.0), slopes)
            slopes = _freed(slopes)
            corner, some, share = row[:, None] * C + channels[None, :], within[None, :], number * top
            values, gradient = maps + corner, grad_maps + corner
            top_left += _corner(values, gradient, slopes, share * left, some, EVEN)
            top_right += _corner(values + right, gradient + right, slopes, share * right_share, some, EVEN)
            share, values, gradient = number * bottom, values + down, gradient + down
            bottom_left += _corner(values, gradient, slopes, share * left, some, EVEN)
            bottom_right += _corner(values + right, gradient + right, slopes, share * right_share, some, EVEN)
        upper, lower = top_left * left + top_right * right_share, bottom_left * left + bottom_right * right_share
        tl.store(grad_mask + (own_maps + tap) * h * w + pixel, upper * top + lower * bottom, mask=inside)
        place = grad_offset + 2 * (own_maps + tap) * h * w + pixel
        near, far = _slopes(shift_y, H)
        tl.store(place, (upper * near + lower * far) * number, mask=inside)
        near, far = _slopes(shift_x, W)
        move = (top_left * top + bottom_left * bottom) * near + (top_right * top + bottom_right * bottom) * far
        tl.store(place + h * w, move * number, mask=inside)


@triton.jit
def _weight_gradient(
    maps, grad, grad_weight, tiles_each, images,
    offset, mask, H, W, h, w, outputs, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x,
    offset_image, offset_channel, offset_y, offset_x, mask_image, mask_channel, mask_y, mask_x,
    TAPS: tl.constexpr, ACROSS: tl.constexpr, GROUPS: tl.constexpr, CELL: tl.constexpr, CELLS: tl.constexpr,
    SHARED: tl.constexpr, WIDE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """Write what some tiles add to the gradient of one tap of some channels and outputs."""
    index: tl.constexpr = tl.int64 if WIDE else tl.int32
    C: tl.constexpr = CELL * CELLS * GROUPS
    tiles, program = tl.cdiv(h, LINES) * tl.cdiv(w, COLUMNS), tl.program_id(0)
    cell, tap = program % (CELLS * GROUPS), program // (CELLS * GROUPS) % TAPS
    program = program // (CELLS * GROUPS * TAPS)
    output = program % tl.cdiv(outputs, OUTPUTS) * OUTPUTS + tl.arange(0, OUTPUTS)
    channels = program // tl.cdiv(outputs, OUTPUTS) * CHANNELS + tl.arange(0, CHANNELS)
    within, group = channels < CELL, cell // CELLS
    right, down = tl.where(W > 1, C, 0), tl.where(H > 1, W * C, 0)
    total = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    begin = tl.program_id(1) * tiles_each
    for tile in range(begin, tl.minimum(begin + tiles_each, images * tiles)):
        image = (tile // tiles).to(tl.int64)
        y, x, inside = _pixels(tile % tiles, h, w, LINES, COLUMNS)
        row, shift_y, rest_y, shift_x, rest_x, number = _tap(
            offset + image * offset_image + y.to(index) * offset_y + x.to(index) * offset_x, offset_channel,
            mask + image * mask_image + y.to(index) * mask_y + x.to(index) * mask_x, mask_channel,
            cell // SHARED * TAPS + tap, tap, y, x, inside,
            H, W, stride_y, stride_x, padding_y, padding_x, dilation_y, dilation_x, ACROSS, index,
        )  # fmt: skip
        top, bottom = _shares(shift_y, rest_y, H)
        left, right_share = _shares(shift_x, rest_x, W)
        columns = _columns(
            maps + image * H * W * C + row[:, None] * C + (cell * CELL + channels)[None, :], right, down,
            top, bottom, left, right_share, number, within[None, :], CELL % CHANNELS == 0,
        )  # fmt: skip
        pixels = grad + image * h * w * (outputs * GROUPS) + (y.to(index) * w + x)[:, None] * (outputs * GROUPS)
        some = inside[:, None] & (output < outputs)[None, :]
        grads = tl.load(pixels + (group * outputs + output)[None, :], mask=some, other=0.0)
        total = _add_product(tl.trans(grads), columns.to(grads.dtype), total)
    part = tl.program_id(1).to(tl.int64) * outputs * (GROUPS * TAPS * CELL * CELLS)
    rows = (group * outputs + output)[:, None] * (TAPS * CELL * CELLS) + (tap * (CELL * CELLS) + cell % CELLS * CELL)
    some = (output < outputs)[:, None] & within[None, :]
    tl.store(grad_weight + part + rows + channels[None, :], total, mask=some)


def _geometry(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, grid: Sequence) -> dict[str, Any]:
    """Return the arguments that all kernels share, by name."""
    stride, padding, dilation, groups, deform_groups = grid
    cells = math.lcm(groups, deform_groups)
    lines = min(8, triton.next_power_of_2(mask.shape[2]))
    spans = [sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in (offset, mask)]
    names = ("image", "channel", "y", "x")
    return dict(
        offset=offset, mask=mask, H=x.shape[2], W=x.shape[3], h=mask.shape[2], w=mask.shape[3],
        outputs=weight.shape[0] // groups,
        stride_y=stride[0], stride_x=stride[1], padding_y=padding[0], padding_x=padding[1],
        dilation_y=dilation[0], dilation_x=dilation[1],
        **{f"offset_{name}": number for name, number in zip(names, offset.stride(), strict=True)},
        **{f"mask_{name}": number for name, number in zip(names, mask.stride(), strict=True)},
        TAPS=weight[0, 0].numel(), ACROSS=weight.shape[3], GROUPS=groups, CELL=x.shape[1] // cells,
        CELLS=cells // groups, SHARED=cells // deform_groups,
        WIDE=max(*spans, x[0].numel(), mask[0, 0].numel() * weight.shape[0]) >= 2**31,
        LINES=lines, COLUMNS=PIXELS // lines,
    )  # fmt: skip


def _pixels_last(maps: Tensor, dtype: torch.dtype) -> Tensor:
    return maps.to(dtype).permute(0, 2, 3, 1).contiguous()


def _split(number: int, programs: int) -> tuple[int, int]:
    """Return how many of a number of steps a program takes, and how many programs then share them."""
    each = triton.cdiv(number, min(number, max(1, PROGRAMS // programs)))
    return each, triton.cdiv(number, each)


def forward(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, grid: Sequence) -> Tensor:
    """Return the convolution in the dtype of ``x``, channels-last; see `densepred.ops.modulated_deform_conv2d`.

    Args:
        x, offset, mask, weight, bias: as the op takes them, none empty.
        grid: (stride, padding, dilation, groups, deform_groups).
    """
    common = _geometry(x, offset, mask, weight, grid)
    cell, groups, outputs = common["CELL"], common["GROUPS"], common["outputs"]
    sizes = tiles(x.dtype, cell, outputs)
    pieces = min(2, triton.cdiv(cell, sizes["CHANNELS"]))
    programs = _number_of_tiles(common) * len(x) * triton.cdiv(outputs, sizes["OUTPUTS"]) * groups
    steps = common["TAPS"] * common["CELLS"] * triton.cdiv(cell, sizes["CHANNELS"] * pieces)
    each, splits = _split(steps, programs)
    out = x.new_empty(len(x), *mask.shape[2:], len(weight))
    parts = out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _forward[programs, splits](
            _pixels_last(x, x.dtype), _pixels_last(weight, x.dtype), bias, parts, each, len(x), **common,
            **sizes, PIECES=pieces, SPLIT=splits > 1, maxnreg=REGISTERS[sizes["num_warps"]], num_stages=1,
        )  # fmt: skip
        if splits > 1:
            blocks = triton.cdiv(out.numel(), 1024)
            _add_parts[(blocks,)](parts, bias, out, splits, out.numel(), len(weight), BLOCK=1024)
    return out.permute(0, 3, 1, 2)


def _number_of_tiles(common: dict[str, Any]) -> int:
    return triton.cdiv(common["h"], common["LINES"]) * triton.cdiv(common["w"], common["COLUMNS"])


def backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, grid: Sequence
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, ``offset``, ``mask`` and ``weight`` in their dtypes and layouts; see `forward`."""
    common = _geometry(x, offset, mask, weight, grid)
    maps, grad = _pixels_last(x, x.dtype), _pixels_last(grad, x.dtype)
    with torch.cuda.device_of(x):
        gradients = (
            *_gradients_of_samples(maps, grad, weight, common),
            _gradient_of_weight(maps, grad, weight, common),
        )
    return tuple(_like(*pair) for pair in zip(gradients, (x, offset, mask, weight), strict=True))


def _gradients_of_samples(
    maps: Tensor, grad: Tensor, weight: Tensor, common: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    groups, cells, taps = common["GROUPS"], common["GROUPS"] * common["CELLS"], common["TAPS"]
    deform_groups, chunks = cells // common["SHARED"], triton.cdiv(common["CELL"], 32) * common["SHARED"]
    programs = _number_of_tiles(common) * len(maps) * deform_groups
    taps_each, tap_splits = _split(taps, programs)
    chunks_each, splits = _split(chunks, programs * tap_splits)
    rows = weight.to(maps.dtype).unflatten(0, (groups, -1)).flatten(3).permute(3, 0, 2, 1).contiguous()
    grad_maps = torch.zeros_like(maps, dtype=torch.float32)
    shape, options = (splits, len(maps), deform_groups * taps, *grad.shape[1:3]), dict(dtype=torch.float32)
    grad_mask = torch.empty(shape, device=maps.device, **options)
    grad_offset = torch.empty((*shape[:2], 2 * shape[2], *shape[3:]), device=maps.device, **options)
    _sample_gradients[programs, tap_splits, splits](
        maps, rows, grad, grad_maps, grad_offset, grad_mask, taps_each, chunks_each, len(maps), **common,
        CHANNELS=_power(common["CELL"], 32), OUTPUTS=_power(common["outputs"], 32 if maps.dtype == torch.float32 else 64),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return grad_maps.permute(0, 3, 1, 2), _total(grad_offset), _total(grad_mask)


def _gradient_of_weight(maps: Tensor, grad: Tensor, weight: Tensor, common: dict[str, Any]) -> Tensor:
    """Return (O, C / groups, kh, kw) in float32."""
    cell, outputs, taps = common["CELL"], common["outputs"], common["TAPS"]
    sizes = tiles(maps.dtype, cell, outputs) | {"CHANNELS": _power(cell, 64)}
    programs = triton.cdiv(cell, sizes["CHANNELS"]) * triton.cdiv(outputs, sizes["OUTPUTS"]) * taps
    programs *= common["GROUPS"] * common["CELLS"]
    each, splits = _split(_number_of_tiles(common) * len(maps), programs)
    shape = (splits, len(weight), *weight.shape[2:], weight.shape[1])
    parts = torch.empty(shape, dtype=torch.float32, device=maps.device)
    _weight_gradient[programs, splits](maps, grad, parts, each, len(maps), **common, **sizes, num_stages=1)
    return _total(parts).permute(0, 3, 1, 2)


def _total(parts: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _like(gradient: Tensor, tensor: Tensor) -> Tensor:
    if gradient.dtype == tensor.dtype and gradient.stride() == tensor.stride():
        return gradient
    return torch.empty_like(tensor).copy_(gradient)
