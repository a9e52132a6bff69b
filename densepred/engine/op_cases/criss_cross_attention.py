"""criss_cross_attention: what is measured, against which formulation."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import criss_cross_attention


def criss_cross_inputs(
    batch: int, height: int, width: int, channels: int, layout: torch.memory_format, random: Generator
) -> tuple[Tensor, ...]:
    """Return q, k (an eighth of the channels, as CCNet has it) and v."""
    sizes = (channels // 8, channels // 8, channels)
    return tuple(torch.randn(batch, c, height, width, generator=random).contiguous(memory_format=layout) for c in sizes)


def criss_cross_by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CCNet's formulation: copies with rows and with columns first, batched products, one softmax of H + W energies."""
    batch, _, height, width = v.shape
    columns = [x.permute(0, 3, 2, 1).reshape(batch * width, height, -1) for x in (q, k, v)]
    rows = [x.permute(0, 2, 3, 1).reshape(batch * height, width, -1) for x in (q, k, v)]
    own = torch.zeros(height, height, dtype=q.dtype, device=q.device).fill_diagonal_(-torch.inf)
    by_column = torch.bmm(columns[0], columns[1].transpose(1, 2)) + own
    by_column = by_column.view(batch, width, height, height).transpose(1, 2)  # (B, H, W, H)
    by_row = torch.bmm(rows[0], rows[1].transpose(1, 2)).view(batch, height, width, width)
    weights = torch.cat([by_column, by_row], dim=3).softmax(dim=3)  # (B, H, W, H + W)
    of_column = weights[..., :height].transpose(1, 2).reshape(batch * width, height, height)
    of_row = weights[..., height:].reshape(batch * height, width, width)
    column = torch.bmm(of_column, columns[2]).view(batch, width, height, -1).permute(0, 3, 2, 1)
    return column + torch.bmm(of_row, rows[2]).view(batch, height, width, -1).permute(0, 3, 1, 2)


def criss_cross_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in einsum, as later ports have it; the fastest of these on channels-last maps."""
    height = q.shape[2]
    own = torch.eye(height, dtype=torch.bool, device=q.device)[:, None]  # (H, 1, H)
    column = torch.einsum("bchw,bciw->bhwi", q, k).masked_fill(own, -torch.inf)
    weights = torch.cat([column, torch.einsum("bchw,bchj->bhwj", q, k)], dim=3).softmax(dim=3)
    out = torch.einsum("bhwi,bciw->bchw", weights[..., :height], v)
    return out + torch.einsum("bhwj,bchj->bchw", weights[..., height:], v)


def criss_cross_by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all pairs of pixels of which all but the cross are masked."""
    height, width = q.shape[-2:]
    y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (height, width)), indexing="ij"))
    cross = ((y[:, None] == y) | (x[:, None] == x)).to(q.device)  # (H W, H W)
    energies = q.flatten(2).transpose(1, 2) @ k.flatten(2)
    weights = energies.masked_fill(~cross, -torch.inf).softmax(2)
    return (v.flatten(2) @ weights.transpose(1, 2)).view(v.shape)


def criss_cross_flops(q: Tensor, _: Tensor, v: Tensor) -> tuple[int, int]:
    """Return the operations of the forward pass and of both: H + W - 1 keys a pixel, products by q, k and v alone.

    The backward pass forms the energies and their gradients (a product by q and by v) and three gradients.
    """
    pairs = v.shape[0] * v[0, 0].numel() * (v.shape[2] + v.shape[3] - 1)
    forward = 2 * pairs * (q.shape[1] + v.shape[1])
    return forward, forward + 2 * pairs * (3 * q.shape[1] + 2 * v.shape[1])


def _criss_cross_case(
    height: int,
    width: int,
    channels: int,
    baseline: str,
    theirs: Callable[..., Tensor],
    layout: torch.memory_format = torch.contiguous_format,
    batch: int = 1,
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> OpCase:
    inputs = partial(criss_cross_inputs, batch, height, width, channels, layout)
    name = f"{f'{batch}x' if batch > 1 else ''}{height}x{width}x{channels}"
    name += ", channels last" if layout == torch.channels_last else ""
    return OpCase(
        "criss_cross_attention",
        name,
        baseline,
        inputs,
        criss_cross_attention,
        theirs,
        (0, 1, 2),
        criss_cross_flops,
        devices,
    )


_LAST = torch.channels_last
CASES: tuple[OpCase, ...] = (
    _criss_cross_case(97, 97, 512, "bmm", criss_cross_by_bmm),
    _criss_cross_case(97, 97, 512, "bmm", criss_cross_by_bmm, _LAST, devices=("cuda",)),
    _criss_cross_case(97, 97, 512, "einsum", criss_cross_by_einsum, _LAST),
    _criss_cross_case(128, 256, 512, "bmm", criss_cross_by_bmm, _LAST, devices=("cuda",)),
    _criss_cross_case(128, 256, 512, "einsum", criss_cross_by_einsum, _LAST),
    _criss_cross_case(97, 97, 512, "einsum", criss_cross_by_einsum, _LAST, 8, ("cuda",)),
    _criss_cross_case(45, 60, 512, "bmm", criss_cross_by_bmm),
    _criss_cross_case(45, 60, 512, "(HW)^2, masked", criss_cross_by_mask),
)
