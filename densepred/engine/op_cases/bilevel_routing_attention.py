"""bilevel_routing_attention: what is measured, against which formulation."""

from functools import partial

import torch
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import bilevel_routing_attention, route_regions


def routed_inputs(
    batch: int, tokens: int, channels: int, topk: int, random: Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k and v of 8 x 8 regions, slices of one projection as in the model, and the regions chosen by their means."""
    projected = torch.randn(batch, 64, tokens, 3 * channels, generator=random)
    q, k, v = projected.split(channels, dim=-1)
    return q, k, v, route_regions(q.mean(2), k.mean(2), topk)


def routed_by_gather(q: Tensor, k: Tensor, v: Tensor, regions: Tensor, heads: int, scale: float) -> Tensor:
    """BiFormer's formulation: copies of the chosen regions' keys and values, a dense softmax."""
    batch, num_regions, tokens, _ = q.shape
    gathered = []
    for x in (k, v):
        index = regions[..., None, None].expand(-1, -1, -1, *x.shape[2:])  # (B, R, K, S, C)
        gathered.append(torch.gather(x[:, None].expand(-1, num_regions, -1, -1, -1), 2, index).flatten(2, 3))
    queries, keys, values = (x.flatten(0, 1).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, *gathered))
    weights = ((queries * scale) @ keys.transpose(2, 3)).softmax(-1)  # (B * R, heads, T, K * S)
    return (weights @ values).transpose(1, 2).reshape(batch, num_regions, tokens, -1)


def _flops(heads: int, q: Tensor, k: Tensor, v: Tensor, regions: Tensor) -> tuple[int, int]:
    """Two products forward, five more backward with the one that finds the weights again."""
    weights = q.shape[:3].numel() * regions.shape[2] * k.shape[2]
    forward = 2 * weights * (q.shape[3] + v.shape[3])
    return forward, forward + 2 * weights * (3 * q.shape[3] + 2 * v.shape[3])


def _routed_case(batch: int, side: int, channels: int, topk: int, devices: tuple[str, ...]) -> OpCase:
    heads, scale = channels // 32, channels**-0.5
    return OpCase(
        "bilevel_routing_attention",
        f"{batch}x{side}x{side}x{channels}, 8x8 regions, top {topk}, {heads} heads",
        "gather",
        partial(routed_inputs, batch, (side // 8) ** 2, channels, topk),
        lambda *arguments: bilevel_routing_attention(*arguments, heads, scale),
        lambda *arguments: routed_by_gather(*arguments, heads, scale),
        (0, 1, 2),
        flops=partial(_flops, heads),
        devices=devices,
    )


_STAGES = ((128, 64, 1), (64, 128, 4), (32, 256, 16))
"""Side, channels and regions chosen of the first three stages of BiFormer-S at 512 x 512."""

CASES: tuple[OpCase, ...] = (
    *(_routed_case(1, *stage, ("cpu", "cuda")) for stage in _STAGES),
    *(_routed_case(4, *stage, ("cuda",)) for stage in _STAGES),
)
