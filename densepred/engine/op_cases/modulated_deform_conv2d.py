"""modulated_deform_conv2d: what is measured, against which formulation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import modulated_deform_conv2d


def deform_conv_inputs(height: int, width: int, channels: int, outputs: int, random: Generator) -> tuple[Tensor, ...]:
    """Return x, offsets around 3 x 3 taps (standard deviation about one pixel), masks, weight and bias of one image.

    No offset lies within 0.01 of a whole number. The slope of the interpolation jumps there, and the float32 coordinates
    of `grid_sample`, scaled to [-1, 1] and back, fall on the other side of it: 4e-4 of its gradients at 128 x 256.
    """
    x = torch.randn(1, channels, height, width, generator=random)
    offset = torch.randn(1, 18, height, width, generator=random).floor_() + 0.01
    offset += 0.98 * torch.rand(offset.shape, generator=random)
    mask = torch.rand(1, 9, height, width, generator=random)
    weight = torch.randn(outputs, channels, 3, 3, generator=random) / (9 * channels) ** 0.5
    return x, offset, mask, weight, torch.randn(outputs, generator=random)


def deform_conv_by_grid_sample(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """DCNv2 in plain PyTorch: one `grid_sample` of all taps, times the masks, one product with the weight."""
    batch, channels, height, width = x.shape
    offset = offset.view(batch, 3, 3, 2, height, width)
    y, x_at = (torch.arange(-1, side - 1, dtype=x.dtype, device=x.device) for side in (height, width))
    tap = torch.arange(3, device=x.device)
    y = (y[:, None] + tap[:, None, None, None] + offset[:, :, :, 0]) * (2 / (height - 1)) - 1
    x_at = (x_at + tap[:, None, None] + offset[:, :, :, 1]) * (2 / (width - 1)) - 1
    grid = torch.stack([x_at, y], -1).view(batch, -1, width, 2)  # (B, 9 H, W, 2)
    columns = F.grid_sample(x, grid, align_corners=True).view(batch, channels, 9, -1) * mask.view(batch, 1, 9, -1)
    out = torch.einsum("oct,bctn->bon", weight.flatten(2), columns)
    return out.view(batch, -1, height, width) + bias[:, None, None]


CASES: tuple[OpCase, ...] = (
    *(
        OpCase(
            "modulated_deform_conv2d",
            f"{height}x{width}, {channels} to {outputs} channels",
            "grid_sample",
            partial(deform_conv_inputs, height, width, channels, outputs),
            lambda *arguments: modulated_deform_conv2d(*arguments, padding=1),
            deform_conv_by_grid_sample,
            (0, 1, 2, 3, 4),
        )
        for height, width, channels, outputs in (
            (16, 32, 512, 256),
            (32, 64, 256, 128),
            (64, 128, 128, 64),
            (128, 256, 64, 64),
        )
    ),
)
