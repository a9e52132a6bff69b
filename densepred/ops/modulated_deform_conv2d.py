"""Modulated deformable convolution (Deformable ConvNets v2, CVPR 2019, arXiv:1811.11168, section 3.2).

    out[n, o, y, x] = bias[o] + sum over c of o's group and taps k = (ky, kx) of weight[o, c, k] * mask[n, d, k, y, x]
                      * bilinear(x[n, c], y * stride - padding + ky * dilation + dy, likewise x),  d = c // (C / deform_groups)

A tap of a column (taps times C numbers, one column an output pixel) is a weighted sum of four pixels: `embedding_bag`
sums the rows of a channels-last map without a tensor of the gathered pixels, and one matrix product with the weight
follows. Both run over a block of output pixels at a time, so that the columns stay in the cache and never exist as a
whole. The backward samples them again. Against one `grid_sample` of all taps and one product (CPU, float32, 3x3 taps): equally
fast forward and 1.2 times with the backward at 512 channels on 16x32, where the product is all, up to 2.9 and 2.4 times at
64 channels on 128x256, there in a fifth of the memory or less (`tools/benchmark.py ops`).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from densepred.ops.backend import check_tensors, uses_triton
from densepred.ops.precision import sum_dtype

_BLOCK = {"cpu": 1 << 20}
"""Numbers of columns held at a time: fewer cost more calls, more leave the caches. Elsewhere what keeps the device busy."""
_LARGE_BLOCK = 1 << 26


class _Grid(NamedTuple):
    """How the taps lie over the input: pairs (vertical, horizontal) and the two counts of groups."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    deform_groups: int


class _Taps(NamedTuple):
    """Where all taps sample and what for, output pixels P = B * h * w first; (P, taps, deform_groups)."""

    y: Tensor  # input pixels
    x: Tensor
    mask: Tensor
    image: Tensor  # (P, 1, 1), the number of the image's first pixel; its type is that of all rows


class _Corners(NamedTuple):
    """The pixels around n = p * taps * deform_groups samples."""

    rows: Tensor  # (n, 4), of the table, from the top left by rows
    y: tuple[Tensor, Tensor]  # (n,), the distances to the upper and the lower two, downwards
    x: tuple[Tensor, Tensor]
    mask: Tensor  # (n,)


def _taps(offset: Tensor, mask: Tensor, size: Sequence[int], kernel: Sequence[int], grid: _Grid) -> _Taps:
    batch, _, *sides = mask.shape
    groups, taps, device = grid.deform_groups, kernel[0] * kernel[1], mask.device
    lines, columns = (
        torch.arange(side, device=device)[:, None] * stride - padding + torch.arange(reach, device=device) * dilation
        for side, reach, stride, padding, dilation in zip(sides, kernel, *grid[:3], strict=True)
    )  # (h, kh), (w, kw)
    shape = (*sides, *kernel)
    y = lines[:, None, :, None].expand(shape).reshape(-1, taps).T  # (taps, h * w)
    x = columns[None, :, None, :].expand(shape).reshape(-1, taps).T
    offset = offset.reshape(batch, groups, taps, 2, -1)
    parts = (y + offset[:, :, :, 0], x + offset[:, :, :, 1], mask.reshape(batch, groups, taps, -1))
    parts = (part.permute(0, 3, 2, 1).reshape(-1, taps, groups).contiguous() for part in parts)
    index = torch.int32 if batch * size[0] * size[1] * groups < 2**31 else torch.int64
    image = torch.arange(batch, dtype=index, device=device).repeat_interleave(sides[0] * sides[1])
    image.mul_(size[0] * size[1])
    return _Taps(*parts, image[:, None, None])


def _along(at: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first of the two pixels that positions lie between, and the way to them from both.

    A linear weight, max(0, 1 - distance), vanishes where a position lies outside, so that no pixel needs a mask.
    """
    at = torch.where(at > -1, at, -2)  # at -1 the derivative is 0 too; nor does count what is no number
    first = at.floor().clamp_(0, max(side - 2, 0))
    at.sub_(first)
    return first, at, at - 1 if side > 1 else torch.full_like(at, -2)


def _corners(taps: _Taps, pixels: slice, size: Sequence[int]) -> _Corners:
    height, width = size
    line, *down = _along(taps.y[pixels], height)
    column, *across = _along(taps.x[pixels], width)
    groups, kind = line.shape[2], taps.image.dtype
    row = line.to(kind).mul_(width).add_(column.to(kind)).add_(taps.image[pixels]).mul_(groups)
    row.add_(torch.arange(groups, dtype=kind, device=row.device))
    below, right = (width * groups if height > 1 else 0), (groups if width > 1 else 0)
    rows = torch.stack([row, row + right, row + below, row + (below + right)], 3)  # (p, taps, deform_groups, 4)
    down, across = (tuple(part.view(-1) for part in parts) for parts in (down, across))
    return _Corners(rows.view(-1, 4), down, across, taps.mask[pixels].view(-1))


def _share(distance: Tensor) -> Tensor:
    """Return the linear weight of a pixel at a distance."""
    return distance.abs().neg_().add_(1).clamp_(min=0)


def _slope(distance: Tensor) -> Tensor:
    """Return the derivative of `_share`; at whole numbers that of greater distances."""
    below = distance.floor()
    return (below == -1).to(distance.dtype).sub_((below == 0).to(distance.dtype))


def _numbers(corners: _Corners) -> Tensor:
    """Return what the four pixels of every sample are worth, (n, 4)."""
    left, right = map(_share, corners.x)
    lines = (_share(part).mul_(corners.mask) for part in corners.y)
    return torch.stack([part for line in lines for part in (line * left, line * right)], 1)


def _rows(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return (B * H * W * groups, C / groups) of maps (B, C, H, W)."""
    pixels = x.to(dtype).flatten(2).transpose(1, 2)  # (B, H * W, C)
    if not pixels.is_contiguous():
        rows = torch.empty_like(pixels, memory_format=torch.contiguous_format)
        for image, source in zip(rows, pixels, strict=True):
            image.copy_(source)  # of one image a copy is 2.5 times as fast as of a batch
        pixels = rows
    return pixels.view(-1, x.shape[1] // groups)


def _blocks(pixels: int, numbers: int, device: torch.device) -> Iterator[slice]:
    size = max(1, _BLOCK.get(device.type, _LARGE_BLOCK) // max(numbers, 1))
    yield from (slice(start, min(start + size, pixels)) for start in range(0, pixels, size))


def _by_group(columns: Tensor, taps: int, groups: int, channels: int) -> Tensor:
    """Return (groups, p, taps * C / groups) of columns (p * taps * deform_groups, C / deform_groups)."""
    return columns.view(-1, taps, groups, channels // groups).permute(2, 0, 1, 3).flatten(2)


def _matrices(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return (groups, O / groups, taps * C / groups) of a weight (O, C / groups, kh, kw)."""
    return weight.to(dtype).permute(0, 2, 3, 1).flatten(1).unflatten(0, (groups, -1))


def _sample_and_multiply(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, grid: _Grid
) -> Tensor:
    dtype = sum_dtype(x, offset, mask, weight)
    batch, channels, *size = x.shape
    outputs, _, *kernel = weight.shape
    count = kernel[0] * kernel[1]
    out = x.new_zeros(batch, *mask.shape[2:], outputs, dtype=dtype)
    if bias is not None:
        out.add_(bias)
    pixels = out.view(-1, grid.groups, outputs // grid.groups).transpose(0, 1)  # (groups, P, O / groups)
    if x.numel():
        table = _rows(x, grid.deform_groups, dtype)
        taps = _taps(offset.to(dtype), mask.to(dtype), size, kernel, grid)
        matrices = _matrices(weight, grid.groups, dtype)
        for block in _blocks(pixels.shape[1], count * channels, x.device):
            corners = _corners(taps, block, size)
            columns = functional.embedding_bag(corners.rows, table, per_sample_weights=_numbers(corners), mode="sum")
            pixels[:, block].baddbmm_(_by_group(columns, count, grid.groups, channels), matrices.transpose(1, 2))
    return out.to(x.dtype).permute(0, 3, 1, 2)


def _sample_and_multiply_backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, offset, mask, weight)
    dtype = sum_dtype(*inputs)
    batch, channels, *size = x.shape
    outputs, _, *kernel = weight.shape
    count, groups, deform_groups = kernel[0] * kernel[1], grid.groups, grid.deform_groups
    if not x.numel() or not mask.numel():
        return tuple(map(torch.zeros_like, inputs))
    table = _rows(x, deform_groups, dtype)
    taps = _taps(offset.to(dtype), mask.to(dtype), size, kernel, grid)
    matrices = _matrices(weight, groups, dtype)
    pixels = _rows(grad, 1, dtype).view(-1, groups, outputs // groups).transpose(0, 1)  # (groups, P, O / groups)
    grad_table, grad_matrices = torch.zeros_like(table), torch.zeros_like(matrices)
    grad_y, grad_x, grad_mask = (torch.empty_like(taps.y) for _ in range(3))
    for block in _blocks(pixels.shape[1], count * channels, x.device):
        corners = _corners(taps, block, size)
        numbers, slopes = _numbers(corners), pixels[:, block]
        columns = functional.embedding_bag(corners.rows, table, per_sample_weights=numbers, mode="sum")
        grad_matrices.baddbmm_(slopes.transpose(1, 2), _by_group(columns, count, groups, channels))
        columns = torch.bmm(slopes, matrices)  # (groups, p, taps * C / groups), of gradients
        columns = columns.unflatten(2, (count, -1)).permute(1, 2, 0, 3).reshape(-1, table.shape[1])
        _scatter(columns, corners.rows, numbers, grad_table)
        parts = _tap_gradients(_dots(columns, table, corners.rows), corners)
        for whole, part in zip((grad_y, grad_x, grad_mask), parts, strict=True):
            whole[block].view(-1).copy_(part)

    def as_map(tensor: Tensor) -> Tensor:  # (P, taps, groups) -> (B, groups, taps, h, w)
        return tensor.view(batch, *mask.shape[2:], count, deform_groups).permute(0, 4, 3, 1, 2)

    gradients = (
        grad_table.view(batch, *size, channels).permute(0, 3, 1, 2),
        torch.stack([as_map(grad_y), as_map(grad_x)], 3).reshape(offset.shape),
        as_map(grad_mask).reshape(mask.shape),
        grad_matrices.view(outputs, *kernel, -1).permute(0, 3, 1, 2),
    )
    return tuple(torch.empty_like(t).copy_(g) for g, t in zip(gradients, inputs, strict=True))


def _tap_gradients(dots: Tensor, corners: _Corners) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of y, x and the mask, each (n,), from the dot products (n, 4) of `_dots`."""
    top_left, top_right, bottom_left, bottom_right = dots.T.contiguous()
    (top, bottom), (left, right) = (map(_share, distances) for distances in (corners.y, corners.x))
    upper = (top_left * left).addcmul_(top_right, right)
    lower = (bottom_left * left).addcmul_(bottom_right, right)
    mask = (upper * top).addcmul_(lower, bottom)
    y = upper.mul_(_slope(corners.y[0])).addcmul_(lower, _slope(corners.y[1])).mul_(corners.mask)
    x = top_left.mul_(top).addcmul_(bottom_left, bottom).mul_(_slope(corners.x[0]))
    x.addcmul_(top_right.mul_(top).addcmul_(bottom_right, bottom), _slope(corners.x[1])).mul_(corners.mask)
    return y, x, mask


def _scatter(columns: Tensor, rows: Tensor, numbers: Tensor, out: Tensor) -> None:
    """Add the gradients of the samples, times their numbers, to the rows that they were sampled from."""
    # Sorted by row, the gradient is a bag too: faster than `index_add_`, and its order of summation is fixed.
    touched, place = rows.view(-1).sort(stable=True)
    touched, sizes = touched.unique_consecutive(return_counts=True)
    bags = place >> 2
    weights = numbers.view(-1).index_select(0, place)
    sums = functional.embedding_bag(bags, columns, sizes.cumsum(0) - sizes, per_sample_weights=weights, mode="sum")
    out.index_add_(0, touched, sums)


def _dots(columns: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """Return the dot product of every sample's gradient with its four pixels, (n, 4)."""
    starts = torch.arange(0, rows.numel(), 4, device=rows.device)
    bags = torch.arange(len(rows), device=rows.device).repeat_interleave(4)
    # What autograd calls for `embedding_bag`; below autograd, where an op's backward runs, it has no public name.
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(columns, table, rows.view(-1), starts, bags, 0)
    return dots.view(rows.shape)


class Backend(NamedTuple):
    """The two halves of one implementation; the grid is (stride, padding, dilation, groups, deform_groups).

    Attributes:
        forward: (x, offset, mask, weight, bias, grid) -> out in the dtype of x, channels-last.
        backward: (gradient of out, x, offset, mask, weight, grid) -> their four gradients in their dtypes.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, _Grid], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, _Grid], tuple[Tensor, Tensor, Tensor, Tensor]]


_EAGER = Backend(_sample_and_multiply, _sample_and_multiply_backward)


def _implementation(*tensors: Tensor) -> Backend:
    if all(tensor.numel() for tensor in tensors) and uses_triton("modulated_deform_conv2d", tensors):
        from densepred.ops.kernels import modulated_deform_conv2d as kernels  # lazily: Triton need not be installed

        fixed_order = torch.are_deterministic_algorithms_enabled()
        return Backend(kernels.forward, _EAGER.backward if fixed_order else kernels.backward)
    return _EAGER


@torch.library.custom_op("densepred::modulated_deform_conv2d", mutates_args=())
def _modulated_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    deform_groups: int,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        implementation = _implementation(x, offset, mask, weight, *([] if bias is None else [bias]))
        grid = _Grid(stride, padding, dilation, groups, deform_groups)
        return implementation.forward(x, offset, mask, weight, bias, grid)


@torch.library.custom_op("densepred::modulated_deform_conv2d_backward", mutates_args=())
def _modulated_deform_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    deform_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        implementation = _implementation(x, offset, mask, weight, grad)
        grid = _Grid(stride, padding, dilation, groups, deform_groups)
        return implementation.backward(grad, x, offset, mask, weight, grid)


@_modulated_deform_conv2d.register_fake
def _output_shape(
    x: Tensor, _offset: Tensor, mask: Tensor, weight: Tensor, _bias: Tensor | None, *_grid: Sequence[int] | int
) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *mask.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_modulated_deform_conv2d_backward.register_fake
def _gradient_shapes(
    _grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, *_grid: Sequence[int] | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(map(torch.empty_like, (x, offset, mask, weight)))


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, bias, stride, padding, dilation, groups, deform_groups = inputs
    ctx.save_for_backward(*tensors)
    ctx.grid = (stride, padding, dilation, groups, deform_groups)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _modulated_deform_conv2d_backward(grad, *ctx.saved_tensors, *ctx.grid)
    grad_bias = None if ctx.bias_dtype is None else grad.sum((0, 2, 3), dtype=sum_dtype(grad)).to(ctx.bias_dtype)
    return *gradients, grad_bias, *(None for _ in ctx.grid)


_modulated_deform_conv2d.register_autograd(_gradients, setup_context=_save_for_backward)


def modulated_deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    deform_groups: int = 1,
) -> Tensor:
    """Convolve with taps that are moved and weighted at every output pixel.

    A tap counts only where ``-1 < y < H`` and ``-1 < x < W``; pixels outside count as zero. The derivative by an offset is
    that of the bilinear interpolation, at whole pixels the right-hand one, and 0 for taps that do not count. The sums run
    in float32 (float64 where an input is), also under autocast. A gradient of a gradient is not implemented.

    The Triton kernels round what is sampled, and the weight, to the dtype of ``x`` before they multiply.

    Determinism: the forward always; of the backward all but the kernels' gradient of ``x``, which is added up atomically.
    Under ``torch.use_deterministic_algorithms(True)`` the backward is the eager one, which sorts instead.

    Args:
        x: (B, C, H, W), any float dtype, fastest if channels-last.
        offset: (B, 2 * deform_groups * kh * kw, h, w) in input pixels, channels ``2 * (d * kh * kw + ky * kw + kx)`` for y
            and the next for x; h and w as those of a plain convolution.
        mask: (B, deform_groups * kh * kw, h, w), any numbers.
        weight: (O, C / groups, kh, kw).
        bias: (O,) or None.
        stride, padding, dilation: one number, or (vertical, horizontal).
        groups: of the convolution.
        deform_groups: of input channels that have offsets and masks of their own; independent of ``groups``.

    Returns:
        (B, O, h, w) in the dtype of ``x``, channels-last in memory.

    Raises:
        ValueError: shapes that disagree.
    """
    stride, padding, dilation = (_pair(number) for number in (stride, padding, dilation))
    grid = _Grid(stride, padding, dilation, groups, deform_groups)
    check_tensors("modulated_deform_conv2d", x=x, offset=offset, mask=mask, weight=weight, bias=bias)
    _check_shapes(x, offset, mask, weight, bias, grid)
    return _modulated_deform_conv2d(x, offset, mask, weight, bias, *grid)


def _pair(number: int | Sequence[int]) -> tuple[int, int]:
    pair = (number, number) if isinstance(number, int) else tuple(number)
    if len(pair) != 2:
        raise ValueError(f"modulated_deform_conv2d: {pair}: one number or (vertical, horizontal)")
    return pair


def _check_shapes(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, grid: _Grid) -> None:
    op = "modulated_deform_conv2d"
    if x.dim() != 4 or weight.dim() != 4:
        raise ValueError(
            f"{op}: x {tuple(x.shape)} must be (B, C, H, W) and weight {tuple(weight.shape)} (O, C / groups, kh, kw)"
        )
    channels, outputs, kernel = x.shape[1], weight.shape[0], weight.shape[2:]
    groups, deform_groups = grid.groups, grid.deform_groups
    if channels != weight.shape[1] * groups or outputs % groups or channels % deform_groups:
        raise ValueError(
            f"{op}: groups={groups} and deform_groups={deform_groups} must divide the {channels} channels of x, groups the "
            f"{outputs} outputs, and weight {tuple(weight.shape)} must have {channels} / groups channels"
        )
    if min(*grid.stride, *grid.dilation) < 1 or min(grid.padding) < 0:
        raise ValueError(f"{op}: stride and dilation must be at least 1 and padding 0: {grid}")
    size = tuple(
        (side + 2 * padding - dilation * (reach - 1) - 1) // stride + 1
        for side, reach, stride, padding, dilation in zip(x.shape[2:], kernel, *grid[:3], strict=True)
    )
    if min(size) < 1:
        raise ValueError(f"{op}: x {tuple(x.shape)} is smaller than the kernel of {tuple(kernel)} taps, {grid}")
    taps = deform_groups * kernel[0] * kernel[1]
    wanted = {
        "offset": (offset, (x.shape[0], 2 * taps, *size)),
        "mask": (mask, (x.shape[0], taps, *size)),
        "bias": (bias, (outputs,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{op}: {name} is {tuple(tensor.shape)}, but {shape} goes with x {tuple(x.shape)}, weight "
                f"{tuple(weight.shape)} and {grid}"
            )


class ModulatedDeformConv2d(nn.Module):
    """A modulated deformable convolution that predicts its own offsets and masks from its input.

    ``conv_offset_mask``, of the same kernel, stride, padding and dilation, gives ``3 * deform_groups * kh * kw`` channels:
    two thirds are offsets, the rest, through a sigmoid, masks. It starts at zero, hence as half a plain convolution. Keys
    as in DCNv2's own module: ``weight``, ``bias``, ``conv_offset_mask.weight``, ``conv_offset_mask.bias``.

    Args:
        in_channels, out_channels: of the maps.
        kernel_size, stride, padding, dilation: one number, or (vertical, horizontal).
        groups: of the convolution.
        deform_groups: of input channels with offsets and masks of their own.
        bias: learn one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        deform_groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups or in_channels % deform_groups:
            raise ValueError(
                f"ModulatedDeformConv2d: groups={groups} must divide in_channels={in_channels} and "
                f"out_channels={out_channels}, and deform_groups={deform_groups} in_channels"
            )
        kernel = _pair(kernel_size)
        self.grid = _Grid(_pair(stride), _pair(padding), _pair(dilation), groups, deform_groups)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *kernel))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        channels = 3 * deform_groups * kernel[0] * kernel[1]
        self.conv_offset_mask = nn.Conv2d(in_channels, channels, kernel, *self.grid[:3])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from +-1 / sqrt(in_channels * kh * kw); everything else is zero."""
        bound = (self.conv_offset_mask.in_channels * self.weight[0, 0].numel()) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        for parameter in (self.bias, self.conv_offset_mask.weight, self.conv_offset_mask.bias):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve maps (B, in_channels, H, W); see `modulated_deform_conv2d`."""
        moves = self.conv_offset_mask(x)  # (B, 3 * deform_groups * taps, h, w)
        taps = moves.shape[1] // 3
        offset, mask = moves[:, : 2 * taps], moves[:, 2 * taps :].sigmoid()
        return modulated_deform_conv2d(x, offset, mask, self.weight, self.bias, *self.grid)


__all__ = ["Backend", "ModulatedDeformConv2d", "modulated_deform_conv2d"]
