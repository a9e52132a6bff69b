"""Losses of semantic segmentation on dense logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.registry import MODELS
from densepred.structures import IGNORE_INDEX

EPSILON = torch.finfo(torch.float32).eps
"""Added to divisors that may be 0, as mmsegmentation does."""


def full_precision(x: Tensor) -> Tensor:
    """Return half precision as float32; leave float32 and float64 alone."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the softmax cross entropy, averaged over the valid pixels; 0 where there are none.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64, 0..C-1 or 255 = ignored.
    """
    pixels = F.cross_entropy(full_precision(logits), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    return pixels / ((labels != IGNORE_INDEX).sum() + EPSILON)


@MODELS.register_module()
class CrossEntropyLoss(nn.Module):
    """See `cross_entropy`.

    Args:
        loss_weight: factor on the value.
        name: the value's name in the log is ``loss_`` and this.
    """

    def __init__(self, loss_weight: float = 1.0, name: str = "ce") -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self.name = name

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss_weight * cross_entropy(logits, labels)
