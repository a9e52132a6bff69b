"""kmeans_attention: what is measured, against which formulation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import kmeans_attention


def kmeans_inputs(side: int, channels: int, queries: int, random: Generator, batch: int = 1) -> tuple[Tensor, ...]:
    """Return pixel values and mask logits of square images."""
    return tuple(torch.randn(batch, c, side, side, generator=random) for c in (channels, queries))


def kmeans_by_one_hot(pixel_value: Tensor, mask_logits: Tensor) -> Tensor:
    """kMaX-DeepLab's formulation: the sums are a product with the one-hot assignment."""
    one_hot = F.one_hot(mask_logits.argmax(1), mask_logits.shape[1]).to(pixel_value.dtype)  # (B, H, W, Q)
    return torch.einsum("bdhw,bhwq->bdq", pixel_value, one_hot)


def _kmeans_case(batch: int, side: int, queries: int, devices: tuple[str, ...] = ("cuda",)) -> OpCase:
    return OpCase(
        "kmeans_attention",
        f"{f'{batch} x ' if batch > 1 else ''}{side}x{side}, 256 channels, {queries} queries",
        "one-hot",
        partial(kmeans_inputs, side, 256, queries, batch=batch),
        lambda pixel_value, mask_logits: kmeans_attention(pixel_value, mask_logits)[0],
        kmeans_by_one_hot,
        (0,),
        devices=devices,
    )


CASES: tuple[OpCase, ...] = (
    *(_kmeans_case(1, side, 128, ("cpu", "cuda")) for side in (41, 161)),
    *(_kmeans_case(batch, side, 128) for batch, side in ((1, 81), (16, 41), (16, 81), (16, 161))),
    *(_kmeans_case(batch, 161, 256) for batch in (1, 8)),
)
