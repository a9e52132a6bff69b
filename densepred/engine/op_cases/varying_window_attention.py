"""varying_window_attention: what is measured, against which formulation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import varying_window_attention


def varying_window_inputs(height: int, width: int, channels: int, ratio: int, random: Generator) -> tuple[Tensor, ...]:
    """Return the queries, the embedded map, and the projections of keys and values, of one image."""
    maps = (torch.randn(1, c, height, width, generator=random) for c in (channels, channels // ratio**2))
    weight = torch.randn(2 * channels, channels, generator=random) / channels**0.5
    return *maps, weight, torch.randn(2 * channels, generator=random)


def varying_window_by_unfold(
    query: Tensor, context: Tensor, weight: Tensor, bias: Tensor, heads: int, ratio: int
) -> Tensor:
    """VWFormer's formulation: a map padded by copies, 8 x 8 unfolded windows, every token of each projected."""
    batch, channels, *size = query.shape
    side = [length // 8 for length in size]
    for axis, p in zip((3, 2), reversed(side), strict=True):
        near, reach = (ratio + 1) * p // 2, ratio * p
        left, right = (context.narrow(axis, at, reach - near) for at in (near, context.shape[axis] - reach))
        context = torch.cat([left, context, right], dim=axis)
    windows = F.unfold(context, [ratio * p for p in side], stride=side).transpose(1, 2).flatten(0, 1)
    blocks = windows.view(-1, channels // ratio**2, side[0], ratio, side[1], ratio).permute(0, 2, 4, 3, 5, 1)
    tokens = blocks.reshape(-1, side[0] * side[1], channels)  # (B * 64, P, C)
    keys, values = F.linear(tokens, weight, bias).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    shape = (batch, heads, -1, 8, side[0], 8, side[1])
    queries = query.view(shape).permute(0, 3, 5, 1, 4, 6, 2).reshape(keys.shape)  # (B * 64, heads, P, d)
    weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
    out = (weights @ values).view(batch, 8, 8, heads, *side, -1)
    return out.permute(0, 3, 6, 1, 4, 2, 5).reshape(query.shape)


def varying_window_flops(ratio: int, query: Tensor, _context: Tensor, weight: Tensor, _bias: Tensor) -> tuple[int, int]:
    """Return the operations of the forward pass and of both, every token projected once.

    The backward pass forms the scores and the weights' gradients again, and three gradients; the projection two.
    """
    pixels, channels = query[:, 0].numel(), query.shape[1]
    product = 2 * pixels * (query[0, 0].numel() // 64) * channels  # of all queries and keys
    projection = 2 * (pixels // ratio**2) * weight.numel()
    return 2 * product + projection, 7 * product + 3 * projection


def _varying_window_case(
    height: int, width: int, channels: int, ratio: int, heads: int, devices: tuple[str, ...] = ("cpu", "cuda")
) -> OpCase:
    return OpCase(
        "varying_window_attention",
        f"{height}x{width}x{channels}, ratio {ratio}, {heads} head{'s'[: heads - 1]}",
        "unfold",
        partial(varying_window_inputs, height, width, channels, ratio),
        lambda *arguments: varying_window_attention(*arguments, heads, (ratio, ratio)),
        lambda *arguments: varying_window_by_unfold(*arguments, heads, ratio),
        (0, 1, 2, 3),
        partial(varying_window_flops, ratio),
        devices,
    )


CASES: tuple[OpCase, ...] = (
    *(_varying_window_case(64, 64, 512, ratio, 1) for ratio in (2, 4, 8)),
    *(_varying_window_case(64, 128, 512, ratio, 16) for ratio in (2, 4, 8)),
    _varying_window_case(80, 80, 512, 4, 1),
    *(_varying_window_case(128, 256, 512, ratio, 16, ("cuda",)) for ratio in (2, 4, 8)),
    *(_varying_window_case(128, 256, 512, ratio, 1, ("cuda",)) for ratio in (2, 4, 8)),
)
