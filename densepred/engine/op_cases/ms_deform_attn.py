"""ms_deform_attn, plain and fused: what is measured, against which formulation.

Shapes are Mask2Former's encoder (three levels of stride 8, 16 and 32, a query per pixel) and decoders of few queries. Where
the package ``torch-ms-deform-attn`` is installed, cases against it are added: it holds Deformable DETR's compiled kernels.
"""

import importlib.util
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import ms_deform_attn
from densepred.ops.ms_deform_attn import ms_deform_attn_fused

HEADS, DEPTH, POINTS = 8, 32, 4
SPREAD = 2.0
"""Standard deviation of offsets in pixels."""
COMPILED = "torch_ms_deform_attn"
MOST_QUERIES = 16 * 5376
"""Of a batch, against a baseline that keeps all samples: their float64 form takes 25 KB a query."""


def _levels(sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    shapes = torch.tensor([(side, side) for side in sides])
    pixels = shapes.prod(1)
    return shapes, pixels.cumsum(0) - pixels


def _centres(sides: Sequence[int]) -> Tensor:
    """Return the centres (S, 2) of all pixels as (x, y) in [0, 1]."""
    grids = []
    for side in sides:
        axis = (torch.arange(side) + 0.5) / side
        grids.append(torch.stack([axis.expand(side, side), axis[:, None].expand(side, side)], -1).flatten(0, 1))
    return torch.cat(grids)


def _off_the_lines(positions: Tensor, random: Generator) -> Tensor:
    """Return positions in the same pixels, a tenth away from whole numbers.

    The slope of the interpolation jumps there; a baseline that rounds locations falls on the other side of a whole
    number, and half precision onto it.
    """
    return positions.floor_().add_(0.1).add_(torch.rand(positions.shape, generator=random), alpha=0.8)


def deformable_inputs(
    sides: Sequence[int], queries: int, random: Generator, batch: int = 1, near: bool = False
) -> tuple[Tensor, ...]:
    """Return the arguments for square levels, 8 heads of 32 channels and 4 points.

    Args:
        sides: of the levels.
        queries: Q.
        random: draws everything.
        batch: B.
        near: samples lie around the queries' own pixels, which are those of all levels; else anywhere inside.
    """
    shapes, starts = _levels(sides)
    value = torch.randn(batch, int(shapes.prod(1).sum()), HEADS, DEPTH, generator=random)
    size = (batch, queries, HEADS, len(sides), POINTS)
    lengths = shapes[:, :1, None].float()  # (L, 1, 1)
    if near:
        positions = torch.randn(*size, 2, generator=random).mul_(SPREAD)
        positions += _centres(sides)[:, None, None, None] * lengths - 0.5
    else:
        positions = torch.rand(*size, 2, generator=random) * lengths - 0.5
    locations = _off_the_lines(positions, random).add_(0.5).div_(lengths)
    weights = torch.randn(*size[:3], len(sides) * POINTS, generator=random).softmax(-1)
    return value, shapes, starts, locations, weights.unflatten(-1, (len(sides), POINTS))


def deformable_fused_inputs(
    sides: Sequence[int], queries: int, random: Generator, batch: int = 1
) -> tuple[Tensor, ...]:
    """Return the arguments of the fused form: offsets of about 2 pixels, from the pixels of all levels if there is a query
    for each, else from anywhere."""
    shapes, starts = _levels(sides)
    pixels = int(shapes.prod(1).sum())
    value = torch.randn(batch, pixels, HEADS, DEPTH, generator=random)
    centres = _centres(sides) if queries == pixels else torch.rand(queries, 2, generator=random)
    # Exact in half precision, to which they too are rounded.
    references = centres.bfloat16().float()[None, :, None].expand(-1, -1, len(sides), -1).contiguous()
    origins = references[:, :, None, :, None] * shapes[:, :1, None] - 0.5  # (1, Q, 1, L, 1, 2)
    positions = torch.randn(batch, queries, HEADS, len(sides), POINTS, 2, generator=random).mul_(SPREAD)
    offsets = _off_the_lines(positions.add_(origins), random).sub_(origins)
    logits = torch.randn(offsets.shape[:-1], generator=random)
    return value, shapes, starts, references, offsets, logits


def _located(shapes: Tensor, references: Tensor, offsets: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """What Deformable DETR's module does before its op, in float32."""
    references, offsets, logits = (x if x.dtype == torch.float64 else x.float() for x in (references, offsets, logits))
    locations = references[:, :, None, :, None] + offsets / shapes.flip(1)[:, None]
    return locations, logits.flatten(3).softmax(-1).view(logits.shape)


def deformable_by_grid_sample(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Deformable DETR's fallback: one `grid_sample` a level, a stack of all samples, a weighted sum; half in float32."""
    batch, queries, heads = weights.shape[:3]
    dtype = value.dtype
    value, locations, weights = (x if x.dtype == torch.float64 else x.float() for x in (value, locations, weights))
    samples = []
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (B * heads, Q, P, 2)
        samples.append(F.grid_sample(maps, grid, align_corners=False))  # (B * heads, D, Q, P)
    factors = weights.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]  # (B * heads, 1, Q, L * P)
    out = (torch.stack(samples, dim=-2).flatten(-2) * factors).sum(-1)  # (B * heads, D, Q)
    return out.view(batch, -1, queries).transpose(1, 2).to(dtype)


def deformable_by_compiled_kernel(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Deformable DETR's own kernel, as people run it: half precision through float32."""
    from torch_ms_deform_attn import ms_deform_attn as compiled

    inputs = [x if x.dtype == torch.float64 else x.float() for x in (value, locations, weights)]
    return compiled(inputs[0], shapes, starts, *inputs[1:]).to(value.dtype)


def deformable_fused_by_grid_sample(
    value: Tensor, shapes: Tensor, starts: Tensor, references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The published module's elementwise steps and its fallback."""
    return deformable_by_grid_sample(value, shapes, starts, *_located(shapes, references, offsets, logits))


def deformable_fused_by_compiled_kernel(
    value: Tensor, shapes: Tensor, starts: Tensor, references: Tensor, offsets: Tensor, logits: Tensor
) -> Tensor:
    """The published module's elementwise steps and its kernel."""
    return deformable_by_compiled_kernel(value, shapes, starts, *_located(shapes, references, offsets, logits))


def _flops(*arguments: Tensor) -> tuple[int, int]:
    """A multiplication and an addition for each channel of a sample's four rows; backward the same for dots and sums."""
    forward = 8 * arguments[-1].numel() * arguments[0].shape[-1]
    return forward, 3 * forward


def _cases(sides: Sequence[int], queries: int, batch: int, devices: tuple[str, ...]) -> list[OpCase]:
    """Return one shape against every baseline: samples anywhere, near the queries' pixels if they have one, and fused."""
    name = f"levels {', '.join(map(str, sides))}, {queries} queries, batch {batch}"
    near = [True] * (queries == sum(side**2 for side in sides))
    baselines = [("grid_sample", deformable_by_grid_sample, deformable_fused_by_grid_sample)]
    if batch * queries > MOST_QUERIES:
        baselines = []
    if importlib.util.find_spec(COMPILED):
        baselines.append(("compiled kernel", deformable_by_compiled_kernel, deformable_fused_by_compiled_kernel))
    cases = []
    for words, theirs, fused_theirs in baselines:
        for close in (False, *near):
            inputs = partial(deformable_inputs, sides, queries, batch=batch, near=close)
            shape = f"{name}, samples {'near' if close else 'anywhere'}"
            plain = ("ms_deform_attn", shape, words, inputs, ms_deform_attn, theirs, (0, 3, 4))
            cases.append(OpCase(*plain, flops=_flops, devices=devices))
        inputs = partial(deformable_fused_inputs, sides, queries, batch=batch)
        fused = ("ms_deform_attn_fused", name, words, inputs, ms_deform_attn_fused, fused_theirs, (0, 4, 5))
        cases.append(OpCase(*fused, flops=_flops, devices=devices))
    return cases


CASES: tuple[OpCase, ...] = (
    *_cases((64, 32, 16), 5376, 1, ("cpu", "cuda")),
    *_cases((64, 32, 16), 100, 1, ("cpu", "cuda")),
    *(
        case
        for sides in ((64, 32, 16), (100, 50, 25), (128, 64, 32))  # of 512, 800 and 1024 squared
        for batch in (2, 16)
        for case in _cases(sides, sum(side**2 for side in sides), batch, ("cuda",))
    ),
    *(case for queries in (300, 100) for case in _cases((128, 64, 32), queries, 2, ("cuda",))),
)
