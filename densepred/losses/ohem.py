"""Online hard example mining: cross entropy of the pixels whose true class is improbable (arXiv:1604.03540).

Three published forms. "ccnet": speedinghzl/CCNet (commit 1fae6c6), which looks for its threshold on probabilities zoomed
by 1/8. "pidnet": the loss of PIDNet, which looks at all pixels. "mmseg": mmsegmentation's pixel sampler (1.2.2), the same
but for a count an image instead of a process, and for the divisor. None waits for the device: no number is read from it.

Letters: B images, C classes, H W the size of the labels, P pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densepred.losses.semantic import class_weights, cross_entropy_map, pixel_divisor
from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import IGNORE_INDEX

AVERAGES = {"ccnet": "kept", "pidnet": "kept", "mmseg": "all"}
"""What each form's published recipes divide by."""
ZOOM = 8
"""CCNet looks for its threshold on every eighth pixel of either axis."""


def zoom_places(size: int, device: torch.device) -> Tensor:
    """Return the places (n,), in float64, at which ``scipy.ndimage.zoom`` by 1 / ZOOM reads an axis."""
    small = round(size / ZOOM)
    step = (size - 1) / (small - 1) if small > 1 else 1.0
    return torch.arange(small, dtype=torch.float64, device=device) * step


def zoomed_probabilities(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Zoom the probabilities linearly and the labels to the nearest as SciPy does; return those of the true classes.

    Where rounding lifts an axis's last place above its last index (480, never 512, 769 or 1024), SciPy reads outside: it
    sees probability 0 and label 0. So does this.

    Returns:
        (B, h, w) probabilities and (B, h, w) whether the label is valid.
    """
    (height, width), device = labels.shape[1:], labels.device
    y, x = zoom_places(height, device), zoom_places(width, device)
    inside = (y <= height - 1)[:, None] & (x <= width - 1)  # (h, w)
    rows, columns = (y + 0.5).long().clamp(max=height - 1), (x + 0.5).long().clamp(max=width - 1)
    small = torch.where(inside, labels[:, rows][:, :, columns], 0)  # (B, h, w)
    valid = small != IGNORE_INDEX
    index = torch.where(valid, small, 0)[:, None]  # (B, 1, h, w)
    probs = torch.zeros_like(small, dtype=logits.dtype)
    for row, row_weight in linear_neighbours(y, height):
        for column, column_weight in linear_neighbours(x, width):
            corner = logits[:, :, row][:, :, :, column].softmax(1).gather(1, index)[:, 0]  # (B, h, w)
            probs += corner * (row_weight[:, None] * column_weight).to(logits.dtype)
    return probs * inside, valid


def linear_neighbours(places: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the two indices (n,) around each place on an axis, each with its weight (n,)."""
    low = places.long().clamp(max=size - 1)
    weight = places - low
    return [(low, 1 - weight), ((low + 1).clamp(max=size - 1), weight)]


def smallest(values: Tensor, valid: Tensor, k: int) -> Tensor:
    """Return the k-th smallest of the valid values, k from 1; infinite with fewer than k."""
    flat = values.masked_fill(~valid, math.inf).flatten()
    return flat.kthvalue(k).values if k <= len(flat) else flat.new_tensor(math.inf)


@torch.no_grad()
def zoomed_threshold(logits: Tensor, labels: Tensor, thresh: float, min_kept: int) -> Tensor:
    """Return the largest probability of the true class at which a pixel is hard for CCNet.

    It is the (min_kept / 64)-th smallest of the zoomed pixels, but at least ``thresh``; 1 where there are no more valid ones
    than that.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64, 0..C-1 or 255 = ignored.
        thresh: 0..1.
        min_kept: pixels of the batch, in full size.
    """
    probs, valid = zoomed_probabilities(logits, labels)
    k = min_kept // ZOOM**2
    threshold = smallest(probs, valid, k).clamp(min=thresh) if k else probs.new_tensor(thresh)
    return torch.where(valid.sum() <= k, 1.0, threshold)


@torch.no_grad()
def kept_below(probs: Tensor, labels: Tensor, thresh: float, min_kept: int) -> Tensor:
    """Return the hard pixels (B, H, W) bool: those whose true class's probability is below the threshold.

    The threshold is the (min_kept + 1)-th smallest probability, or the largest where there are fewer, but at least
    ``thresh``.

    Args:
        probs: (B, H, W) of the true classes.
        labels: (B, H, W), 255 = ignored.
        thresh: 0..1.
        min_kept: pixels of the batch.
    """
    valid = labels != IGNORE_INDEX
    threshold = torch.minimum(smallest(probs, valid, min_kept + 1), (probs * valid).amax())
    return (probs < threshold.clamp(min=thresh)) & valid


@torch.no_grad()
def kept_largest(losses: Tensor, labels: Tensor, min_kept: int) -> Tensor:
    """Return where the ``min_kept`` largest losses (B, H, W) of valid pixels are, bool."""
    valid = labels != IGNORE_INDEX
    flat = losses.masked_fill(~valid, -math.inf).flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(min(min_kept, len(flat)), sorted=False).indices] = True
    return kept.view_as(valid) & valid


@MODELS.register_module()
class OHEMCrossEntropyLoss(nn.Module):
    """Cross entropy of the hard pixels.

    Args:
        thresh: probability of the true class above which a pixel is easy, unless too few are kept. None, for "mmseg" only:
            the ``min_kept`` pixels of largest loss.
        min_kept: pixels to keep at least; of a process's batch, with "mmseg" of an image.
        variant: "ccnet", "pidnet" or "mmseg", see the module.
        class_weight: of each class, a factor on the losses.
        average: divide by the ``"kept"``, the ``"valid"`` or ``"all"`` pixels; the latter two weighted by class, if classes
            are. Default: as the variant is published, kept, and all with "mmseg".
        loss_weight: factor on the value.
        name: the value is logged as ``loss_`` and this.

    Raises:
        ValueError: an unknown ``variant`` or ``average``, or no ``thresh`` with another variant than "mmseg".
    """

    def __init__(
        self,
        thresh: float | None = 0.7,
        min_kept: int = 100000,
        variant: str = "ccnet",
        class_weight: Sequence[float] | None = None,
        average: str | None = None,
        loss_weight: float = 1.0,
        name: str = "ohem",
    ) -> None:
        super().__init__()
        if variant not in AVERAGES:
            raise ValueError(f"OHEMCrossEntropyLoss: variant={variant!r}: choose one of {', '.join(AVERAGES)}")
        if thresh is None and variant != "mmseg":
            raise ValueError(
                f"OHEMCrossEntropyLoss: variant={variant!r} needs thresh (0..1); only 'mmseg' does without"
            )
        if average not in (None, "kept", "valid", "all"):
            raise ValueError(f"OHEMCrossEntropyLoss: average={average!r}: choose 'kept', 'valid' or 'all'")
        self.thresh, self.min_kept, self.variant, self.class_weight = thresh, min_kept, variant, class_weight
        self.average = average or AVERAGES[variant]
        self.loss_weight, self.name = loss_weight, name

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = upcast(logits)
        losses = cross_entropy_map(logits, labels)  # (B, H, W)
        weights = class_weights(self.class_weight, losses)
        weighted = losses if weights is None else losses * weights[labels.clamp(max=len(weights) - 1)]
        kept = self.kept(logits.detach(), labels, losses.detach(), weighted.detach())
        if self.average == "kept":
            return self.loss_weight * (weighted * kept).sum() / kept.sum().clamp(min=1)
        return self.loss_weight * (weighted * kept).sum() / pixel_divisor(labels, self.average, losses, weights)

    def kept(self, logits: Tensor, labels: Tensor, losses: Tensor, weighted: Tensor) -> Tensor:
        """Return the hard pixels (B, H, W) bool, by the losses (B, H, W) before and after weighing by class."""
        if self.variant == "ccnet":
            threshold = zoomed_threshold(logits, labels, self.thresh, self.min_kept)
            return ((-losses).exp() <= threshold) & (labels != IGNORE_INDEX)
        min_kept = self.min_kept * (len(labels) if self.variant == "mmseg" else 1)
        if self.thresh is None:
            return kept_largest(weighted, labels, min_kept)
        return kept_below((-losses).exp(), labels, self.thresh, min_kept)
