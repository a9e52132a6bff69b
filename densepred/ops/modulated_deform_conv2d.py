"""Modulated deformable convolution (Deformable ConvNets v2, CVPR 2019, arXiv:1811.11168, section 3.2).

    out[n, o, y, x] = bias[o] + sum over c of o's group and taps k = (ky, kx) of weight[o, c, k] * mask[n, d, k, y, x]
                      * bilinear(x[n, c], y * stride - padding + ky * dilation + dy, likewise x),  d = c // (C / deform_groups)

A tap of a column (taps times C numbers, one column an output pixel) is a weighted sum of four pixels: `embedding_bag`
sums the rows of a channels-last map without a tensor of the gathered pixels, and one matrix product with the weight
follows. Both run over some hundred output pixels at a time, so that the columns stay in the cache and never exist as a
whole. The backward samples them again.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from densepred.ops.backend import backend_name

_BLOCK = {"cpu": 1 << 18}
"""Numbers of columns held at a time, by device: what a core's cache takes. Elsewhere what keeps the device busy."""
_LARGE_BLOCK = 1 << 26


class _Grid(NamedTuple):
    """How the taps lie over the input: pairs (vertical, horizontal) and the two counts of groups."""

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    deform_groups: int


class _Taps(NamedTuple):
    """Where all taps sample, output pixels P = B * h * w first."""

    y: Tensor  # (P, taps, deform_groups), input pixels
    x: Tensor
    mask: Tensor
    image: Tensor  # (P, 1, 1), the number of the image's first pixel


class _Corners(NamedTuple):
    """The four pixels around n = p * taps * deform_groups samples, from the top left by rows."""

    rows: Tensor  # (n, 4), of the table
    y: tuple[Tensor, Tensor]  # (n,), the distances to the upper and the lower two, downwards
    x: tuple[Tensor, Tensor]
    mask: Tensor  # (n, 1)


def _taps(offset: Tensor, mask: Tensor, size: Sequence[int], kernel: Sequence[int], grid: _Grid) -> _Taps:
    batch, _, *sides = mask.shape
    groups, taps, device = grid.deform_groups, kernel[0] * kernel[1], mask.device
    offset = offset.reshape(batch, groups, taps, 2, -1).permute(3, 0, 4, 2, 1)  # (2, B, h * w, taps, groups)
    y, x = (
        torch.arange(side, device=device)[:, None] * stride - padding + torch.arange(reach, device=device) * dilation
        for side, reach, stride, padding, dilation in zip(sides, kernel, *grid[:3], strict=True)
    )  # (h, kh), (w, kw)
    shape = (*sides, *kernel)
    y = y[:, None, :, None].expand(shape).reshape(-1, taps, 1) + offset[0]
    x = x[None, :, None, :].expand(shape).reshape(-1, taps, 1) + offset[1]
    mask = mask.reshape(batch, groups, taps, -1).permute(0, 3, 2, 1)
    image = torch.arange(batch, device=device).repeat_interleave(sides[0] * sides[1]) * (size[0] * size[1])
    return _Taps(y.flatten(0, 1), x.flatten(0, 1), mask.flatten(0, 1), image[:, None, None])


def _along(at: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first of the two pixels that positions lie between, and the way to them from both.

    A linear weight, max(0, 1 - distance), vanishes where a position lies outside, so that no pixel needs a mask.
    """
    at = at.masked_fill(~(at > -1), -2)  # at -1 the derivative is 0 too; nor does count what is no number
    first = at.floor().clamp_(0, max(side - 2, 0))
    return first, at - first, at - (first + 1 if side > 1 else torch.inf)


def _corners(taps: _Taps, pixels: slice, size: Sequence[int]) -> _Corners:
    height, width = size
    line, *down = _along(taps.y[pixels], height)
    column, *across = _along(taps.x[pixels], width)
    groups = line.shape[2]
    row = line.long().mul_(width).add_(column.long()).add_(taps.image[pixels]).mul_(groups)
    row.add_(torch.arange(groups, device=row.device))
    below, right = (width * groups if height > 1 else 0), (groups if width > 1 else 0)
    steps = torch.tensor([0, right, below, below + right], device=row.device)
    down, across = (tuple(part.flatten() for part in parts) for parts in (down, across))
    return _Corners(row.view(-1, 1) + steps, down, across, taps.mask[pixels].reshape(-1, 1))


def _share(distance: Tensor) -> Tensor:
    """Return the linear weight of a pixel at a distance."""
    return distance.abs().neg_().add_(1).clamp_(min=0)


def _slope(distance: Tensor) -> Tensor:
    """Return the derivative of `_share`; at whole numbers that of greater distances."""
    rising, falling = (distance >= -1) & (distance < 0), (distance >= 0) & (distance < 1)
    return rising.to(distance.dtype).sub_(falling.to(distance.dtype))


def _products(y: Sequence[Tensor], x: Sequence[Tensor]) -> Tensor:
    return torch.stack([down * across for down in y for across in x], 1)  # (n, 4)


def _bilinear(corners: _Corners) -> Tensor:
    return _products([_share(part) for part in corners.y], [_share(part) for part in corners.x])


def _rows(x: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return (B * H * W * groups, C / groups) of maps (B, C, H, W)."""
    return x.to(dtype).permute(0, 2, 3, 1).reshape(-1, x.shape[1] // groups)


def _blocks(pixels: int, numbers: int, device: torch.device) -> Iterator[slice]:
    size = max(1, _BLOCK.get(device.type, _LARGE_BLOCK) // max(numbers, 1))
    yield from (slice(start, min(start + size, pixels)) for start in range(0, pixels, size))


def _by_group(columns: Tensor, taps: int, groups: int, channels: int) -> Tensor:
    """Return (groups, p, taps * C / groups) of columns (p * taps * deform_groups, C / deform_groups)."""
    return columns.view(-1, taps, groups, channels // groups).permute(2, 0, 1, 3).flatten(2)


def _matrices(weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """Return (groups, taps * C / groups, O / groups) of a weight (O, C / groups, kh, kw)."""
    return weight.to(dtype).unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1).flatten(1, 3)


def _sample_and_multiply(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, grid: _Grid
) -> Tensor:
    dtype = _sum_dtype(x, offset, mask, weight)
    batch, channels, *size = x.shape
    outputs, _, *kernel = weight.shape
    count = kernel[0] * kernel[1]
    out = x.new_zeros(batch, *mask.shape[2:], outputs, dtype=dtype)
    pixels = out.view(-1, grid.groups, outputs // grid.groups).transpose(0, 1)  # (groups, P, O / groups)
    if x.numel():
        table = _rows(x, grid.deform_groups, dtype)
        taps = _taps(offset.to(dtype), mask.to(dtype), size, kernel, grid)
        matrices = _matrices(weight, grid.groups, dtype)
        for block in _blocks(pixels.shape[1], count * channels, x.device):
            corners = _corners(taps, block, size)
            columns = functional.embedding_bag(
                corners.rows, table, per_sample_weights=_bilinear(corners).mul_(corners.mask), mode="sum"
            )
            pixels[:, block] = torch.bmm(_by_group(columns, count, grid.groups, channels), matrices)
    if bias is not None:
        out.add_(bias)
    return out.to(x.dtype).permute(0, 3, 1, 2)


def _sample_and_multiply_backward(
    grad: Tensor, x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, offset, mask, weight)
    dtype = _sum_dtype(*inputs)
    batch, channels, *size = x.shape
    outputs, _, *kernel = weight.shape
    count, groups, deform_groups = kernel[0] * kernel[1], grid.groups, grid.deform_groups
    if not x.numel() or not mask.numel():
        return tuple(tensor.new_zeros(tensor.shape) for tensor in inputs)
    table = _rows(x, deform_groups, dtype)
    taps = _taps(offset.to(dtype), mask.to(dtype), size, kernel, grid)
    matrices = _matrices(weight, groups, dtype)
    pixels = _rows(grad, 1, dtype).view(-1, groups, outputs // groups).transpose(0, 1)  # (groups, P, O / groups)
    grad_table, grad_matrices = torch.zeros_like(table), torch.zeros_like(matrices)
    grad_y, grad_x, grad_mask = (torch.empty_like(taps.y) for _ in range(3))
    for block in _blocks(pixels.shape[1], count * channels, x.device):
        corners = _corners(taps, block, size)
        bilinear, slopes = _bilinear(corners), pixels[:, block]
        numbers = bilinear * corners.mask
        columns = functional.embedding_bag(corners.rows, table, per_sample_weights=numbers, mode="sum")
        grad_matrices.baddbmm_(_by_group(columns, count, groups, channels).transpose(1, 2), slopes)
        columns = torch.bmm(slopes, matrices.transpose(1, 2))  # (groups, p, taps * C / groups), of gradients
        columns = columns.unflatten(2, (count, -1)).permute(1, 2, 0, 3).reshape(-1, table.shape[1])
        _scatter(columns, corners.rows, numbers, grad_table)
        dots = _dots(columns, table, corners.rows)  # (n, 4)
        shape = grad_mask[block].shape
        grad_mask[block] = (dots * bilinear).sum(1).view(shape)
        dots.mul_(corners.mask)
        shares = [[_share(part) for part in parts] for parts in (corners.y, corners.x)]
        grad_y[block] = (dots * _products([_slope(part) for part in corners.y], shares[1])).sum(1).view(shape)
        grad_x[block] = (dots * _products(shares[0], [_slope(part) for part in corners.x])).sum(1).view(shape)

    def as_map(tensor: Tensor) -> Tensor:  # (P, taps, groups) -> (B, groups, taps, h, w)
        return tensor.view(batch, *mask.shape[2:], count, deform_groups).permute(0, 4, 3, 1, 2)

    gradients = (
        grad_table.view(batch, *size, channels).permute(0, 3, 1, 2),
        torch.stack([as_map(grad_y), as_map(grad_x)], 3).view(offset.shape),
        as_map(grad_mask).reshape(mask.shape),
        grad_matrices.unflatten(1, (*kernel, -1)).permute(0, 4, 3, 1, 2).reshape(weight.shape),
    )
    return tuple(g.to(t.dtype).contiguous() for g, t in zip(gradients, inputs, strict=True))


def _scatter(columns: Tensor, rows: Tensor, numbers: Tensor, out: Tensor) -> None:
    """Add the gradients of the samples, times their numbers, to the rows that they were sampled from."""
    # Sorted by row, the gradient is a bag too: faster than `index_add_`, and its order of summation is fixed.
    touched, place = rows.view(-1).sort(stable=True)
    touched, sizes = touched.unique_consecutive(return_counts=True)
    bags = place.div(4, rounding_mode="floor")
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


def _sum_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class Backend(NamedTuple):
    """The two halves of one implementation; the grid is (stride, padding, dilation, groups, deform_groups).

    Attributes:
        forward: (x, offset, mask, weight, bias, grid) -> out in the dtype of x, channels-last.
        backward: (gradient of out, x, offset, mask, weight, grid) -> their four gradients in their dtypes.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, _Grid], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, _Grid], tuple[Tensor, Tensor, Tensor, Tensor]]


BACKENDS: dict[str, Backend] = {"eager": Backend(_sample_and_multiply, _sample_and_multiply_backward)}
"""Implementations by the names that the environment variable ``DENSEPRED_OPS_BACKEND`` may take."""


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
        implementation = BACKENDS[backend_name(BACKENDS, x.device)]
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
        implementation = BACKENDS[backend_name(BACKENDS, x.device)]
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
    return tuple(tensor.new_empty(tensor.shape) for tensor in (x, offset, mask, weight))


def _save_for_backward(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, bias, stride, padding, dilation, groups, deform_groups = inputs
    ctx.save_for_backward(*tensors)
    ctx.grid = (stride, padding, dilation, groups, deform_groups)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _modulated_deform_conv2d_backward(grad, *ctx.saved_tensors, *ctx.grid)
    grad_bias = None if ctx.bias_dtype is None else grad.sum((0, 2, 3)).to(ctx.bias_dtype)
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
        ValueError: shapes that disagree, or ``DENSEPRED_OPS_BACKEND`` names an unknown backend.
    """
    stride, padding, dilation = (_pair(number) for number in (stride, padding, dilation))
    grid = _Grid(stride, padding, dilation, groups, deform_groups)
    _check_shapes(x, offset, mask, weight, bias, grid)
    return _modulated_deform_conv2d(x, offset, mask, weight, bias, *grid)


def _pair(number: int | Sequence[int]) -> tuple[int, int]:
    return (number, number) if isinstance(number, int) else tuple(number)


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


__all__ = ["BACKENDS", "Backend", "ModulatedDeformConv2d", "modulated_deform_conv2d"]
