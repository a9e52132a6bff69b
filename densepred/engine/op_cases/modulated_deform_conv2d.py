"""modulated_deform_conv2d: what is measured, against which formulation."""

import importlib.util
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import modulated_deform_conv2d
from densepred.ops.precision import sum_dtype

SHAPES = ((16, 32, 512, 256), (32, 64, 256, 128), (64, 128, 128, 64), (128, 256, 64, 64))
"""Height, width, channels and outputs in CenterPoly's decoders at 512 x 1024."""


def deform_conv_inputs(
    height: int, width: int, channels: int, outputs: int, random: Generator, batch: int = 1
) -> tuple[Tensor, ...]:
    """Return x, offsets around 3 x 3 taps (standard deviation about one pixel), masks, weight and bias.

    Offsets are odd multiples of 1/32 under 8, which every type holds exactly. So none is a whole number, where the slope of
    the interpolation jumps and the coordinates of `grid_sample`, scaled to [-1, 1] and back, fall on either side of it.
    """
    x = torch.randn(batch, channels, height, width, generator=random)
    offset = torch.randn(batch, 18, height, width, generator=random).floor_().clamp_(-7, 6)
    offset += torch.randint(16, offset.shape, generator=random) / 16 + 1 / 32
    mask = torch.rand(batch, 9, height, width, generator=random)
    weight = torch.randn(outputs, channels, 3, 3, generator=random) / (9 * channels) ** 0.5
    return x, offset, mask, weight, torch.randn(outputs, generator=random)


def deform_conv_by_grid_sample(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """DCNv2 in plain PyTorch: one `grid_sample` of all taps, times the masks, one product with the weight.

    Coordinates of half precision would miss their pixels, so that samples are taken in float32 and rounded for the product.
    """
    batch, channels, height, width = x.shape
    dtype = sum_dtype(x)
    offset = offset.to(dtype).view(batch, 3, 3, 2, height, width)
    y, x_at = (torch.arange(-1, side - 1, dtype=dtype, device=x.device) for side in (height, width))
    tap = torch.arange(3, device=x.device)
    y = (y[:, None] + tap[:, None, None, None] + offset[:, :, :, 0]) * (2 / (height - 1)) - 1
    x_at = (x_at + tap[:, None, None] + offset[:, :, :, 1]) * (2 / (width - 1)) - 1
    grid = torch.stack([x_at, y], -1).view(batch, -1, width, 2)  # (B, 9 H, W, 2)
    columns = F.grid_sample(x.to(dtype), grid, align_corners=True).view(batch, channels, 9, -1)
    columns = (columns * mask.view(batch, 1, 9, -1)).to(x.dtype)
    out = torch.einsum("oct,bctn->bon", weight.flatten(2), columns)
    return out.view(batch, -1, height, width) + bias[:, None, None]


def deform_conv_by_torchvision(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torchvision's compiled op; of bfloat16, which it does not take, in float32, as it runs under autocast."""
    from torchvision.ops import deform_conv2d

    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    tensors = (tensor.to(dtype) for tensor in (x, offset, weight, bias))
    return deform_conv2d(*tensors, padding=1, mask=mask.to(dtype)).to(x.dtype)


def deform_conv_flops(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> tuple[int, int]:
    """Return the FLOPs of the products, and 8 a sample: four pixels; in the backward pass again, their dots, their shares."""
    pixels = mask[:, 0].numel()
    product, samples = 2 * weight.numel() * pixels, mask.numel() * x.shape[1]
    return product + 8 * samples, 3 * product + 32 * samples


def _case(baseline: str, theirs: Callable[..., Tensor], shape: tuple[int, ...], batch: int, **options) -> OpCase:
    height, width, channels, outputs = shape
    return OpCase(
        "modulated_deform_conv2d",
        f"{batch}x{height}x{width}, {channels} to {outputs} channels",
        baseline,
        partial(deform_conv_inputs, *shape, batch=batch),
        lambda *arguments: modulated_deform_conv2d(*arguments, padding=1),
        theirs,
        (0, 1, 2, 3, 4),
        deform_conv_flops,
        **options,
    )


CASES: tuple[OpCase, ...] = (
    *(_case("grid_sample", deform_conv_by_grid_sample, shape, 1) for shape in SHAPES),
    *(_case("grid_sample", deform_conv_by_grid_sample, shape, 16, devices=("cuda",)) for shape in SHAPES),
    *(
        _case("torchvision", deform_conv_by_torchvision, shape, batch, devices=("cuda",))
        for batch in (1, 16)
        for shape in SHAPES
        if importlib.util.find_spec("torchvision")
    ),
)
