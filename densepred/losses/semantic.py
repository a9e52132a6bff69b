"""Losses of semantic segmentation on dense logits: pure functions, and the registered modules that hold their numbers.

Softmax and one-vs-rest cross entropy; Dice (V-Net, arXiv:1606.04797, and the forms of UNet++ and nnU-Net);
Lovász-Softmax and hinge (arXiv:1705.08790); focal loss (arXiv:1708.02002). With the arguments named below every term is
mmsegmentation's (1.2.2) number for number. Letters: B images, C classes, H W the size of the labels, P pixels.

What all of them share:

* a label 255 is ignored: such a pixel has no part in the loss, and without any other the loss is 0 with gradients 0;
* ``average="valid"``, the default, divides by the pixels that are not ignored; ``"all"``, mmsegmentation's default, by all
  pixels, so that crops with much void weigh less;
* half precision is computed in float32.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import IGNORE_INDEX

EPSILON = torch.finfo(torch.float32).eps
"""Added to divisors that may be 0, as mmsegmentation does."""
AVERAGES = ("valid", "all")


def one_hot(labels: Tensor, num_classes: int, like: Tensor) -> Tensor:
    """Return (B, C, H, W) of the type of ``like``, 1 at the labels (B, H, W); ignored pixels are 0 in all classes."""
    classes = torch.arange(num_classes, device=labels.device)[:, None, None]
    return (labels[:, None] == classes).to(like.dtype)


def require_average(average: str) -> str:
    """Return the argument.

    Raises:
        ValueError: it is none of `AVERAGES`.
    """
    if average not in AVERAGES:
        raise ValueError(f"average={average!r}: a semantic loss knows {' and '.join(map(repr, AVERAGES))}")
    return average


def class_weights(class_weight: Sequence[float] | None, like: Tensor) -> Tensor | None:
    """Return the weights (C,) on the device and in the type of ``like``."""
    return None if class_weight is None else torch.as_tensor(class_weight, dtype=like.dtype, device=like.device)


# Cross entropy --------------------------------------------------------------------------------------------------------


def cross_entropy_map(
    logits: Tensor, labels: Tensor, class_weight: Sequence[float] | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Return the softmax cross entropy of every pixel (B, H, W), weighted by class; 0 where ignored."""
    logits = upcast(logits)
    weights = class_weights(class_weight, logits)
    return F.cross_entropy(logits, labels, weights, ignore_index=ignore_index, reduction="none")


def pixel_divisor(
    labels: Tensor, average: str, like: Tensor, weights: Tensor | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Return what a sum of losses over pixels is divided by, a scalar in the type of ``like``, never 0.

    Args:
        labels: (B, H, W).
        average: see the module.
        like: any tensor of the losses' type.
        weights: (C,): the divisor is the sum of the weights of the labels; one outside 0..C-1 has none.
        ignore_index: the label that ``"valid"`` leaves out.
    """
    if weights is None and average == "all":
        return like.new_tensor(labels.numel())
    counted = torch.ones_like(labels, dtype=torch.bool) if average == "all" else labels != ignore_index
    if weights is not None:
        known = (labels >= 0) & (labels < len(weights))
        counted = weights[torch.where(known, labels, 0)] * (known & counted)
    return counted.sum().to(like) + EPSILON


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Sequence[float] | None = None,
    pixel_weight: Tensor | None = None,
    average: str = "valid",
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return the mean softmax cross entropy.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64, 0..C-1 or ``ignore_index``.
        class_weight: of each class. The divisor is then the sum of the weights of the pixels' labels; a label 255 has none,
            with either ``average`` (mmsegmentation fails there).
        pixel_weight: (B, H, W), a factor on each pixel's loss; not in the divisor.
        average: see the module.
        ignore_index: the label to ignore. One within 0..C-1 keeps its class weight in the divisor with ``"all"``.
    """
    losses = cross_entropy_map(logits, labels, class_weight, ignore_index)  # (B, H, W)
    if pixel_weight is not None:
        losses = losses * pixel_weight
    weights = class_weights(class_weight, losses)
    return losses.sum() / pixel_divisor(labels, average, losses, weights, ignore_index)


def binary_cross_entropy_map(logits: Tensor, labels: Tensor, pos_weight: Sequence[float] | None = None) -> Tensor:
    """Return the sigmoid cross entropy of every class against the rest (B, C, H, W); 0 where ignored.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64, 0..C-1 or 255 = ignored.
        pos_weight: of each class, a factor on its own pixels' losses.
    """
    logits = upcast(logits)
    weights = class_weights(pos_weight, logits)
    weights = weights if weights is None else weights[:, None, None]
    targets = one_hot(labels, logits.shape[1], logits)
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
    return losses * (labels != IGNORE_INDEX)[:, None]


def mean_over_entries(losses: Tensor, labels: Tensor, average: str) -> Tensor:
    """Return the mean of losses (B, C, H, W), 0 where ignored, over all classes of the pixels that ``average`` counts."""
    if average == "all":
        return losses.mean()
    return losses.sum() / (losses.shape[1] * (labels != IGNORE_INDEX).sum().to(losses) + EPSILON)


@MODELS.register_module()
class CrossEntropyLoss(nn.Module):
    """See `cross_entropy`; with ``sigmoid`` `binary_cross_entropy_map`, averaged over pixels and classes.

    Args:
        class_weight: of each class; with ``sigmoid`` a factor on its own pixels only.
        average: ``"valid"`` or ``"all"``, see the module.
        sigmoid: every class against the rest instead of softmax; not for heads with ``binary=True``, whose softmax is one.
        loss_weight: factor on the value.
        name: the value is logged as ``loss_`` and this.
    """

    def __init__(
        self,
        class_weight: Sequence[float] | None = None,
        average: str = "valid",
        sigmoid: bool = False,
        loss_weight: float = 1.0,
        name: str = "ce",
    ) -> None:
        super().__init__()
        self.class_weight, self.average, self.sigmoid = class_weight, require_average(average), sigmoid
        self.loss_weight, self.name = loss_weight, name

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.sigmoid:
            losses = binary_cross_entropy_map(logits, labels, self.class_weight)
            return self.loss_weight * mean_over_entries(losses, labels, self.average)
        return self.loss_weight * cross_entropy(logits, labels, self.class_weight, average=self.average)


# Dice -----------------------------------------------------------------------------------------------------------------


def dice_loss(probs: Tensor, targets: Tensor, batch: bool, per_class: bool, squared: bool, smooth: float) -> Tensor:
    """Return 1 - Dice of every set of entries that shares a ratio.

    Dice is (2 sum pt + smooth) / (sum p + sum t + smooth), and with ``squared`` 2 sum pt / (sum p^2 + sum t^2 + 2 smooth).

    Args:
        probs: (B, C, H, W) in 0..1; 0 in pixels that shall not count.
        targets: (B, C, H, W), 0 or 1.
        batch: one ratio over all images, not one an image.
        per_class: one ratio a class, not one over all classes.
        squared: see above.
        smooth: keeps ratios of empty sets defined.

    Returns:
        (B or 1, C or 1).
    """
    axes = [0] * batch + [1] * (not per_class) + [2, 3]
    intersection = (probs * targets).sum(axes, keepdim=True)
    if squared:
        total = (probs.square().sum(axes, keepdim=True) + smooth) + (targets.sum(axes, keepdim=True) + smooth)
        dice = 2 * intersection / total
    else:
        total = probs.sum(axes, keepdim=True) + targets.sum(axes, keepdim=True)
        dice = (2 * intersection + smooth) / (total + smooth)
    return 1 - dice[:, :, 0, 0]


@MODELS.register_module()
class DiceLoss(nn.Module):
    """The mean of `dice_loss`; ignored pixels are in no sum, and images without a valid pixel count as 0.

    nnU-Net, which trains UNet++, leaves the background out and else has the defaults (its value is smaller by 1: minus Dice).
    The Keras code of UNet++ takes ``smooth=1.0`` and no background (a head with ``binary=True``), beside half the cross
    entropy. mmsegmentation's defaults are ``sigmoid=True, batch=False, per_class=False, squared=True, smooth=1e-3``; its
    ignored pixels count as predictions without a target.

    Args:
        sigmoid: of every class's logit instead of softmax; not for heads with ``binary=True``, whose softmax is one.
        batch: see `dice_loss`.
        per_class: see `dice_loss`. A class that is absent has the loss of all its false positives.
        squared: see `dice_loss`.
        smooth: see `dice_loss`.
        include_background: whether class 0 counts.
        loss_weight: factor on the value.
        name: the value is logged as ``loss_`` and this.
    """

    def __init__(
        self,
        sigmoid: bool = False,
        batch: bool = True,
        per_class: bool = True,
        squared: bool = False,
        smooth: float = 1e-5,
        include_background: bool = True,
        loss_weight: float = 1.0,
        name: str = "dice",
    ) -> None:
        super().__init__()
        self.form = dict(batch=batch, per_class=per_class, squared=squared, smooth=smooth)
        self.sigmoid, self.first = sigmoid, 0 if include_background else 1
        self.loss_weight, self.name = loss_weight, name

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        logits = upcast(logits)
        probs = logits.sigmoid() if self.sigmoid else logits.softmax(1)
        valid = (labels != IGNORE_INDEX)[:, None]  # (B, 1, H, W)
        targets = one_hot(labels, logits.shape[1], logits)
        losses = dice_loss((probs * valid)[:, self.first :], targets[:, self.first :], **self.form)
        present = valid.flatten(1).any(1, keepdim=True)  # (B, 1)
        present = present.any(0, keepdim=True) if self.form["batch"] else present
        return self.loss_weight * (losses * present).mean()


# Lovász ---------------------------------------------------------------------------------------------------------------


def lovasz_extension(errors: Tensor, truth: Tensor) -> Tensor:
    """Return the Lovász extension of the Jaccard loss at errors (P,), for truth (P,) bool.

    Errors count only above 0, so ignored pixels are those with error 0 and truth false: they come last and add nothing.
    """
    errors, order = errors.sort(descending=True)
    truth = truth[order].to(errors.dtype)
    total = truth.sum()
    jaccard = 1 - (total - truth.cumsum(0)) / (total + (1 - truth).cumsum(0))
    return F.relu(errors) @ jaccard.diff(prepend=jaccard.new_zeros(1))


def lovasz_softmax(
    probs: Tensor,
    labels: Tensor,
    classes: str | Sequence[int] = "present",
    class_weight: Sequence[float] | None = None,
) -> Tensor:
    """Return the Lovász-Softmax loss of all pixels together, the plain mean of the classes' weighted losses.

    Args:
        probs: (B, C, H, W), 0..1.
        labels: (B, H, W) int64, 0..C-1 or 255 = ignored.
        classes: ``"present"``: those among the labels; ``"all"``, or a list of them.
        class_weight: of each class.
    """
    valid = labels != IGNORE_INDEX
    if classes == "present":  # one wait for the device spares it the sorting of every absent class
        classes = labels[valid].unique().tolist()
    elif classes == "all":
        classes = range(probs.shape[1])
    if not len(classes) or not valid.any():
        return 0 * probs.sum()
    weights = class_weights([1.0] * probs.shape[1] if class_weight is None else class_weight, probs)
    losses, maps = [], probs.unbind(1)
    for c in classes:
        truth = labels == c
        errors = (truth.to(probs.dtype) - maps[c]).abs() * valid  # (B, H, W)
        losses.append(weights[c] * lovasz_extension(errors.flatten(), truth.flatten()))
    return torch.stack(losses).mean()


def lovasz_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary Lovász hinge loss of all pixels together.

    Args:
        logits: (B, H, W) of class 1.
        labels: (B, H, W) int64, 0, 1 or 255 = ignored.
    """
    truth = labels == 1
    errors = torch.where(labels == IGNORE_INDEX, 0, 1 - logits * torch.where(truth, 1, -1))
    return lovasz_extension(errors.flatten(), truth.flatten())


@MODELS.register_module()
class LovaszLoss(nn.Module):
    """See `lovasz_softmax` and, for two classes, `lovasz_hinge` on the difference of their logits.

    Args:
        classes: see `lovasz_softmax`.
        class_weight: see `lovasz_softmax`.
        per_image: the mean of the images' losses, instead of one over the batch.
        hinge: the binary form.
        loss_weight: factor on the value.
        name: the value is logged as ``loss_`` and this.
    """

    def __init__(
        self,
        classes: str | Sequence[int] = "present",
        class_weight: Sequence[float] | None = None,
        per_image: bool = False,
        hinge: bool = False,
        loss_weight: float = 1.0,
        name: str = "lovasz",
    ) -> None:
        super().__init__()
        if isinstance(classes, str) and classes not in ("present", "all"):
            raise ValueError(f"LovaszLoss: classes={classes!r}: give 'present', 'all' or a list of classes")
        self.classes, self.class_weight, self.per_image, self.hinge = classes, class_weight, per_image, hinge
        self.loss_weight, self.name = loss_weight, name

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the weighted loss.

        Raises:
            ValueError: ``hinge`` with other than two classes.
        """
        logits = upcast(logits)
        if self.hinge and logits.shape[1] != 2:
            raise ValueError(f"LovaszLoss: hinge=True needs two classes, the logits have {logits.shape[1]}")
        parts = list(zip(logits.split(1), labels.split(1), strict=True)) if self.per_image else [(logits, labels)]
        return self.loss_weight * torch.stack([self._value(*part) for part in parts]).mean()

    def _value(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.hinge:
            return lovasz_hinge(logits[:, 1] - logits[:, 0], labels)
        return lovasz_softmax(logits.softmax(1), labels, self.classes, self.class_weight)


# Focal ----------------------------------------------------------------------------------------------------------------


def focal_map(logits: Tensor, labels: Tensor, gamma: float, alpha: float | Sequence[float]) -> Tensor:
    """Return the sigmoid focal loss of every class against the rest (B, C, H, W); 0 where ignored.

    It is a (1 - p_t)^gamma times the sigmoid cross entropy; p_t is the probability of what is true of the class there, and
    a is alpha in the class's own pixels, 1 - alpha in the others.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W) int64, 0..C-1 or 255 = ignored.
        gamma: 0 or at least 1.
        alpha: 0..1, one or one a class.
    """
    losses = binary_cross_entropy_map(logits, labels)
    own = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)[:, None, None]  # (B, C, H, W)
    alpha = torch.as_tensor(alpha, dtype=losses.dtype, device=losses.device).view(-1, 1, 1)
    return torch.where(own, alpha, 1 - alpha) * wrongness(losses).pow(gamma) * losses


def wrongness(losses: Tensor) -> Tensor:
    """Return 1 - p, exact also for small ones, of cross entropies -log p."""
    return -torch.expm1(-losses)


def softmax_focal(logits: Tensor, labels: Tensor, gamma: float, alpha: float | Sequence[float]) -> Tensor:
    """Return alpha (1 - p)^gamma times the softmax cross entropy of every pixel (B, H, W), p the true class's probability.

    Two logits (0, z) with alpha (1 - a, a) give the sigmoid focal loss of z with alpha a.
    """
    losses = cross_entropy_map(logits, labels)
    alpha = torch.as_tensor(alpha, dtype=losses.dtype, device=losses.device).view(-1)
    alpha = alpha.expand(logits.shape[1])[labels.clamp(max=logits.shape[1] - 1)]  # (B, H, W)
    return alpha * wrongness(losses).pow(gamma) * losses


@MODELS.register_module()
class FocalLoss(nn.Module):
    """The mean of `focal_map` over pixels and classes, or of `softmax_focal` over pixels.

    Args:
        gamma: 0 or at least 1.
        alpha: 0..1, one or one a class.
        class_weight: of each class (sigmoid form only); not in the divisor.
        average: ``"valid"`` or ``"all"``, see the module.
        sigmoid: the first form; heads with ``binary=True`` need the second.
        loss_weight: factor on the value.
        name: the value is logged as ``loss_`` and this.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | Sequence[float] = 0.5,
        class_weight: Sequence[float] | None = None,
        average: str = "valid",
        sigmoid: bool = True,
        loss_weight: float = 1.0,
        name: str = "focal",
    ) -> None:
        super().__init__()
        if gamma != 0 and gamma < 1:
            raise ValueError(
                f"FocalLoss: gamma={gamma}: give 0 or at least 1, between them the gradient is infinite at p = 1"
            )
        if class_weight is not None and not sigmoid:
            raise ValueError("FocalLoss: with sigmoid=False weigh the classes by a list as alpha, not by class_weight")
        self.gamma, self.alpha, self.class_weight, self.sigmoid = gamma, alpha, class_weight, sigmoid
        self.average = require_average(average)
        self.loss_weight, self.name = loss_weight, name

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.sigmoid:
            losses = focal_map(logits, labels, self.gamma, self.alpha)  # (B, C, H, W)
            if self.class_weight is not None:
                losses = losses * class_weights(self.class_weight, losses)[:, None, None]
        else:
            losses = softmax_focal(logits, labels, self.gamma, self.alpha)[:, None]  # (B, 1, H, W)
        return self.loss_weight * mean_over_entries(losses, labels, self.average)
