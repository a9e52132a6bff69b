"""Boundary loss on signed distances (Kervadec et al., MIDL 2019, arXiv:1812.07032, equation 5).

Where a class is predicted far outside its region costs most. Official code: LIViAETS/boundary-loss. Differences: the mean
is over pixels and classes that count, and nothing is assumed of ignored pixels, see `signed_distances`.
"""

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from densepred.losses.semantic import mean_over_entries
from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import IGNORE_INDEX


def signed_distances(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return each pixel's distance to the boundary of each class.

    Outside a class it is the distance to its nearest pixel, at least 1; inside, 1 minus the distance to the nearest valid
    pixel of another class, at most 0. It is 0 in ignored pixels, and everywhere for a class that is absent or alone.

    Args:
        labels: (H, W), 0..C-1 or 255 = ignored.
        num_classes: C.

    Returns:
        (C, H, W) float32, pixels.
    """
    distances = np.zeros((num_classes, *labels.shape), np.float32)
    valid = labels != IGNORE_INDEX
    classes = np.unique(labels[valid])
    for c in classes if len(classes) > 1 else ():
        inside = labels == c
        to_others = distance_transform_edt(inside | ~valid)
        distances[c] = np.where(inside, 1 - to_others, distance_transform_edt(~inside)) * valid
    return distances


def boundary_map(probs: Tensor, labels: Tensor) -> Tensor:
    """Return probabilities (B, C, H, W) times signed distances to the boundaries in labels (B, H, W); 0 where ignored."""
    maps = [signed_distances(image, probs.shape[1]) for image in labels.cpu().numpy()]
    return probs * torch.from_numpy(np.stack(maps)).to(probs)


@MODELS.register_module()
class BoundaryLoss(nn.Module):
    """The mean of `boundary_map` over valid pixels and classes; may be negative. Use it beside a loss on regions.

    The distances are made by SciPy on the CPU, which makes an accelerator wait and takes two transforms a present class.
    The paper raises the weight from 0.01 by 0.01 an epoch; here it is constant.

    Args:
        include_background: whether class 0 counts.
        loss_weight: factor on the value.
        name: the value is logged as ``loss_`` and this.
    """

    def __init__(self, include_background: bool = True, loss_weight: float = 0.01, name: str = "boundary") -> None:
        super().__init__()
        self.first = 0 if include_background else 1
        self.loss_weight, self.name = loss_weight, name

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses = boundary_map(upcast(logits).softmax(1), labels)[:, self.first :]  # (B, C', H, W)
        return self.loss_weight * mean_over_entries(losses, labels, "valid")
