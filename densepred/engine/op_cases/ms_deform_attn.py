"""ms_deform_attn: what is measured, against which formulation."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import ms_deform_attn


def deformable_inputs(sides: Sequence[int], queries: int, random: Generator) -> tuple[Tensor, ...]:
    """Return the arguments for square levels, 8 heads of 32 channels and 4 points; samples lie anywhere inside."""
    shapes = torch.tensor([(side, side) for side in sides])
    pixels = shapes.prod(1)
    value = torch.randn(1, int(pixels.sum()), 8, 32, generator=random)
    locations = torch.rand(1, queries, 8, len(sides), 4, 2, generator=random)
    weights = torch.randn(1, queries, 8, len(sides) * 4, generator=random).softmax(-1)
    return value, shapes, pixels.cumsum(0) - pixels, locations, weights.unflatten(-1, (len(sides), 4))


def deformable_by_grid_sample(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Deformable DETR's fallback: one `grid_sample` a level, a stack of all samples, a weighted sum."""
    batch, queries, heads = weights.shape[:3]
    samples = []
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (B * heads, Q, P, 2)
        samples.append(F.grid_sample(maps, grid, align_corners=False))  # (B * heads, D, Q, P)
    factors = weights.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]  # (B * heads, 1, Q, L * P)
    out = (torch.stack(samples, dim=-2).flatten(-2) * factors).sum(-1)  # (B * heads, D, Q)
    return out.view(batch, -1, queries).transpose(1, 2)


CASES: tuple[OpCase, ...] = (
    *(
        OpCase(
            "ms_deform_attn",
            f"levels 64, 32, 16, {queries} queries",
            "grid_sample",
            partial(deformable_inputs, (64, 32, 16), queries),
            ms_deform_attn,
            deformable_by_grid_sample,
            (0, 3, 4),
        )
        for queries in (5376, 100)
    ),
)
