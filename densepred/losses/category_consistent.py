"""Category consistent loss (CCNet, TPAMI 2020, arXiv:1811.11721, section 3.4, equations 3 to 7).

Features of a class shall lie near the mean of that class, and means of different classes apart. The authors published no
code. Where the paper is silent: classes are those of the whole batch, the gradient goes through the means, and with a
single class nothing is pushed apart. Beyond ``delta_d`` the pull has slope 1, as the paper writes; some ports have another.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import IGNORE_INDEX


class CategoryConsistency(NamedTuple):
    """The three terms, scalars; all 0 without a valid pixel."""

    variance: Tensor  # mean over classes of the mean pull of a class's features to their mean
    distance: Tensor  # mean over ordered pairs of classes of the push between their means
    size: Tensor  # mean over classes of the norm of their mean


def category_consistent_loss(
    features: Tensor, labels: Tensor, delta_v: float = 0.5, delta_d: float = 1.5
) -> CategoryConsistency:
    """Return the three terms, unweighted; gradients are finite also where distances are 0.

    Args:
        features: (B, D, h, w); half precision is computed in float32.
        labels: (B, h, w) int64, 0..254, or 255 = ignored.
        delta_v: distance to the mean below which a feature is left alone.
        delta_d: distance to the mean beyond which the pull grows linearly; means twice as far apart are left alone.
    """
    labels = labels.flatten()  # (N,)
    valid = labels != IGNORE_INDEX
    pixels = upcast(features).movedim(1, -1).flatten(0, 2)  # (N, D)
    pixels = torch.where(valid[:, None], pixels, 0)
    # A row for every label there may be: no size depends on the labels, so that no device is waited for.
    counts = torch.zeros(IGNORE_INDEX + 1, dtype=pixels.dtype, device=pixels.device).index_add(
        0, labels, valid.to(pixels)
    )
    sums = pixels.new_zeros(len(counts), pixels.shape[1]).index_add(0, labels, pixels)
    means = sums / counts.clamp(min=1)[:, None]  # (256, D)
    present = counts > 0
    classes = present.sum().clamp(min=1)

    spread = torch.linalg.vector_norm(pixels - means[labels], dim=1)  # (N,), with gradient 0 at 0
    near, far = (spread - delta_v).clamp(min=0).square(), spread - delta_d + (delta_d - delta_v) ** 2
    share = torch.where(valid, 1 / counts.clamp(min=1)[labels], 0) / classes
    variance = (torch.where(spread <= delta_d, near, far) * share).sum()

    gaps = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")  # (256, 256), with gradient 0 at 0
    pairs = (present[:, None] & present).fill_diagonal_(False)
    distance = torch.where(pairs, (2 * delta_d - gaps).clamp(min=0).square(), 0).sum() / pairs.sum().clamp(min=1)
    return CategoryConsistency(variance, distance, torch.linalg.vector_norm(means, dim=1).sum() / classes)


@MODELS.register_module()
class CategoryConsistentLoss(nn.Module):
    """See `category_consistent_loss`; the defaults are the paper's.

    Args:
        delta_v, delta_d: distances between features.
        alpha, beta, gamma: weights of the three terms.
        loss_weight: factor on all of them.
    """

    def __init__(
        self,
        delta_v: float = 0.5,
        delta_d: float = 1.5,
        alpha: float = 1.0,
        beta: float = 1.0,
        gamma: float = 0.001,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.delta_v, self.delta_d = delta_v, delta_d
        self.weights = [loss_weight * weight for weight in (alpha, beta, gamma)]

    def forward(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the weighted terms ``var``, ``dis`` and ``reg``.

        Args:
            features: (B, D, h, w).
            labels: (B, H, W) int64 of any size; the label under the centre of each feature counts.
        """
        size = features.shape[-2:]
        if labels.shape[-2:] != size:
            labels = F.interpolate(labels[:, None].to(torch.uint8), size, mode="nearest-exact")[:, 0].long()
        terms = category_consistent_loss(features, labels, self.delta_v, self.delta_d)
        return {
            name: weight * term for name, weight, term in zip(("var", "dis", "reg"), self.weights, terms, strict=True)
        }
