"""Sliding windows and test-time augmentation of models that score every pixel for every class.

The functions know nothing of the model: they take ``logits_of(images (B, 3, h, w)) -> (B, C, h, w)``, for any size.
"""

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

LogitsOf = Callable[[Tensor], Tensor]

TTA = dict(scales=(0.5, 0.75, 1.0, 1.25, 1.5, 1.75), flip=True)
"""The augmentation of the published "multi-scale and flip" figures on ADE20K and Cityscapes."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return where windows along one axis begin: every ``stride``, the last one moved back inside.

    An axis no longer than the window has one, at 0. Source: mmsegmentation's sliding inference; CCNet's is the same for
    images that are no smaller than a window.
    """
    steps = -(-max(length - window, 0) // stride)
    return [min(i * stride, max(length - window, 0)) for i in range(steps + 1)]


def slide(logits_of: LogitsOf, images: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Return logits (B, C, H, W): for each pixel, the mean over the windows that see it.

    Args:
        logits_of: the model, called once a window.
        images: (B, 3, H, W).
        size: (height, width) of a window in pixels; an image smaller than it is one window, not padded.
        stride: (rows, columns) between windows, no larger than the window.
    """
    height, width = images.shape[-2:]
    total, visits = None, images.new_zeros(height, width)
    for top in window_starts(height, size[0], stride[0]):
        for left in window_starts(width, size[1], stride[1]):
            rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
            logits = logits_of(images[..., rows, columns])  # (B, C, h, w)
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, width)
            total[..., rows, columns] += logits
            visits[rows, columns] += 1
    return total / visits.to(total.dtype)  # (B, C, H, W)


def augmented_probabilities(
    logits_of: LogitsOf,
    image: Tensor,
    ori_shape: Sequence[int],
    scales: Sequence[float],
    flip: bool,
    align_corners: bool = False,
) -> Tensor:
    """Return class probabilities (1, C, H, W) at the file's size: the mean over scaled and mirrored copies of an image.

    Each copy's logits go to the file's size before the softmax, as in mmsegmentation. The copies are made from the tensor
    that the pipeline delivered, without the rounding to grey levels of a second image resize.

    Args:
        logits_of: the model; it may slide.
        image: (1, 3, h, w), without padding.
        ori_shape: (H, W) of the file.
        scales: factors on h and w.
        flip: also mirror each copy left to right.
        align_corners: of the logits' resize to the file.
    """
    total, copies = 0.0, 0
    for scale in scales:
        size = [max(int(side * scale + 0.5), 1) for side in image.shape[-2:]]
        scaled = F.interpolate(image, size, mode="bilinear", align_corners=False)
        for mirrored in (False, True)[: 1 + flip]:
            logits = logits_of(scaled.flip(-1)).flip(-1) if mirrored else logits_of(scaled)
            logits = F.interpolate(logits, tuple(ori_shape), mode="bilinear", align_corners=align_corners)
            total = total + logits.softmax(1)
            copies += 1
    return total / copies  # (1, C, H, W)


def check_sliding(sliding: dict | None) -> None:
    """Raise ``ValueError`` unless ``sliding`` is None or has a size and a stride that leave no pixel out."""
    if sliding is None:
        return
    pairs = [isinstance(value, Sequence) and [type(side) for side in value] == [int, int] for value in sliding.values()]
    if set(sliding) != {"size", "stride"} or not all(pairs):
        raise ValueError(f"model.sliding={sliding}: give size=(height, width) and stride=(rows, columns) in pixels")
    for size, stride in zip(sliding["size"], sliding["stride"], strict=True):
        if not 0 < stride <= size:
            raise ValueError(f"model.sliding={sliding}: a stride must be at least 1 and at most the window's size")


def check_tta(tta: dict | None) -> None:
    """Raise ``ValueError`` unless ``tta`` is None or has positive scales and a flag for mirrored copies."""
    if tta is None:
        return
    if set(tta) != {"scales", "flip"} or not isinstance(tta["scales"], Sequence) or min(tta["scales"], default=0) <= 0:
        raise ValueError(f"model.tta={tta}: give scales=(factors above 0) and flip=True or False")
