"""kmeans_attention: what is measured, against which formulation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import kmeans_attention


def kmeans_inputs(side: int, channels: int, queries: int, random: Generator) -> tuple[Tensor, ...]:
    """Return pixel values and mask logits of one square image."""
    return tuple(torch.randn(1, c, side, side, generator=random) for c in (channels, queries))


def kmeans_by_one_hot(pixel_value: Tensor, mask_logits: Tensor) -> Tensor:
    """kMaX-DeepLab's formulation: the sums are a product with the one-hot assignment."""
    one_hot = F.one_hot(mask_logits.argmax(1), mask_logits.shape[1]).to(pixel_value.dtype)  # (B, H, W, Q)
    return torch.einsum("bdhw,bhwq->bdq", pixel_value, one_hot)


CASES: tuple[OpCase, ...] = (
    *(
        OpCase(
            "kmeans_attention",
            f"{side}x{side}, 256 channels, 128 queries",
            "one-hot",
            partial(kmeans_inputs, side, 256, 128),
            lambda pixel_value, mask_logits: kmeans_attention(pixel_value, mask_logits)[0],
            kmeans_by_one_hot,
            (0,),
        )
        for side in (41, 161)
    ),
)
