"""Criterion of kMaX-DeepLab (k-means Mask Transformer, ECCV 2022, arXiv:2207.04044).

Follows github.com/bytedance/kmax-deeplab (commit f8e1d04) number for number. Every term is a pure function of flattened
maps; `KMaXCriterion` holds the plain numbers and calls them. Letters: B images, Q queries, N targets of an image (the
batch's largest number where padded), C classes, D feature channels, P = H W pixels, K sampled pixels.

What differs, and why:

* fewer pixels than ``sample_k`` means that all of them are taken (the official top-k crashes);
* the terms gather the matched queries instead of spreading the targets over all queries, and the K x K target of the
  instance discrimination is never built: the same numbers in less time and memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from densepred.losses.matcher import hungarian_match
from densepred.ops.precision import upcast
from densepred.registry import MODELS

WEIGHT_FLOOR = 1e-5
"""Least weight of a query in the class term and of a matched query in the dice term (the official "eos_coef")."""
FOCAL_ALPHA = 0.75
"""Share of the matched queries in the class term; the rest belongs to the unmatched ones. Also scales the dice term."""
CONTRASTIVE_TEMPERATURE = 0.3
DICE_SMOOTH = 1.0
EPSILON = 1e-5
"""Guard of the divisions in the matching."""
VOID_PENALTY = 99999.0
"""Taken off the sampling logit of a void pixel: such pixels are drawn when nothing else is left."""

Noise = Callable[[str, tuple[int, int]], Tensor]


@dataclass
class Match:
    """One image's matching: queries and targets (M,) int64 (targets ascending), and each pair's similarities (M,)."""

    query: Tensor
    target: Tensor
    dice: Tensor
    class_prob: Tensor


@dataclass
class MatchedTargets:
    """A batch's targets as the loss terms read them; padding has query 0, an empty mask and weight 0.

    Attributes:
        query: (B, N) int64, the query of each target.
        masks: (B, N, P), each target's share of every pixel (overlapping targets share equally).
        mask_weight: (B, N), the pair's weight in the dice term: its class probability.
        labels: (B, Q) int64, class of every query, C = void.
        class_weight: (B, Q), weight in the class term: the pair's dice, or an unmatched query's share on void.
        void: (B, P) bool, pixels of no target.
        inverse_area: (B, P), P / area of the pixel's target; P on void.
    """

    query: Tensor
    masks: Tensor
    mask_weight: Tensor
    labels: Tensor
    class_weight: Tensor
    void: Tensor
    inverse_area: Tensor


# Matching -------------------------------------------------------------------------------------------------------------


def mask_similarity(probs: Tensor, masks: Tensor) -> Tensor:
    """Return the dice (Q, N) of soft masks (Q, P) with 0/1 masks (N, P); pixels of no mask (void) do not count."""
    valid = (masks.sum(0) > 0).to(probs.dtype)  # (P,)
    overlap = probs @ masks.T  # (Q, N)
    area = (probs @ valid)[:, None] + masks.sum(1)  # (Q, N)
    return overlap / (area / 2 + EPSILON)


def class_similarity(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the probability (Q, N) of every target's class (N,) under class logits (Q, C + 1)."""
    return logits.softmax(-1)[:, labels]


def match_image(logits: Tensor, probs: Tensor, masks: Tensor, labels: Tensor) -> Match:
    """Match one image's queries and targets by dice times class probability, without weights.

    Args:
        logits: (Q, C + 1).
        probs: (Q, P), softmax of the mask logits over the queries.
        masks: (N, P), 0/1.
        labels: (N,) int64.
    """
    dice = mask_similarity(probs, masks)
    class_prob = class_similarity(logits, labels)
    query, target = hungarian_match(-dice * class_prob)
    return Match(query, target, dice[query, target], class_prob[query, target])


def image_targets(match: Match, probs: Tensor, masks: Tensor, labels: Tensor, num_classes: int, size: int) -> tuple:
    """Return one image's fields of `MatchedTargets` (without the batch axis, padded to ``size`` targets), in order.

    Args:
        match: the image's matching; targets without a query become void.
        probs: (Q, P), softmax of the mask logits over the queries.
        masks: (N, P), 0/1; may overlap.
        labels: (N,) int64.
        num_classes: C.
        size: number of targets to pad to.
    """
    masks = masks[match.target]  # (M, P)
    count = masks.sum(0)  # (P,)
    void, masks = count < 1, masks / count.clamp(min=1)
    on_void = probs @ void.to(probs.dtype) / (probs.sum(1) + EPSILON)  # (Q,)
    class_weight = on_void.index_put((match.query,), match.dice).clamp(min=WEIGHT_FLOOR)
    query_labels = torch.full_like(on_void, num_classes, dtype=torch.int64)
    query_labels[match.query] = labels[match.target]
    area = masks.sum(1) @ masks  # (P,), of the pixel's target
    inverse_area = masks.shape[1] / area.clamp(min=1)
    padding = size - len(match.query)
    return (
        F.pad(match.query, (0, padding)),
        F.pad(masks, (0, 0, 0, padding)),
        F.pad(match.class_prob.clamp(min=WEIGHT_FLOOR), (0, padding)),
        query_labels,
        class_weight,
        void,
        inverse_area,
    )


@torch.no_grad()
def match_targets(logits: Tensor, mask_logits: Tensor, masks: list[Tensor], labels: list[Tensor]) -> MatchedTargets:
    """Match a batch's queries and targets, and write down what the loss terms need.

    Args:
        logits: (B, Q, C + 1) class logits, void last.
        mask_logits: (B, Q, P).
        masks: per image (N, P), 0/1 of ``mask_logits``'s type; may overlap.
        labels: per image (N,) int64, 0..C-1.
    """
    probs = mask_logits.softmax(1)  # (B, Q, P)
    images = list(zip(logits, probs, masks, labels, strict=True))
    matches = [match_image(*image) for image in images]
    size = max(1, *(len(m.query) for m in matches))
    num_classes = logits.shape[-1] - 1
    rows = [image_targets(m, *image[1:], num_classes, size) for m, image in zip(matches, images, strict=True)]
    return MatchedTargets(*(torch.stack(column) for column in zip(*rows, strict=True)))


# Loss terms -----------------------------------------------------------------------------------------------------------


def mean_nonzero(loss: Tensor) -> Tensor:
    """Average (B, n) over the values that are not exactly 0, image by image, then over the images."""
    return (loss.sum(1) / loss.count_nonzero(1).clamp(min=1)).mean()


def class_loss(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted cross entropy of class logits (B, Q, C + 1) with labels and weights (B, Q)."""
    void = labels == logits.shape[-1] - 1
    loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (B, Q)
    return mean_nonzero(loss * weight * torch.where(void, 1 - FOCAL_ALPHA, FOCAL_ALPHA))


def matched_log_probs(mask_logits: Tensor, query: Tensor) -> Tensor:
    """Return log softmax over the queries of (B, Q, P), for the queries (B, N) only: (B, N, P)."""
    batch, num_queries, _ = mask_logits.shape
    rows = query + num_queries * torch.arange(batch, device=query.device)[:, None]  # (B, N)
    chosen = mask_logits.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)  # (B, N, P)
    return chosen - mask_logits.logsumexp(1, keepdim=True)


def mask_id_loss(log_probs: Tensor, masks: Tensor, void: Tensor) -> Tensor:
    """Return the cross entropy over the queries of every pixel that is not void.

    Args:
        log_probs: (B, N, P) of the matched queries, see `matched_log_probs`.
        masks: (B, N, P) shares of the targets.
        void: (B, P) bool.
    """
    return mean_nonzero(-(log_probs * masks).sum(1) * ~void)


def pq_dice_loss(log_probs: Tensor, masks: Tensor, weight: Tensor, num_queries: int, void: Tensor | None) -> Tensor:
    """Return the PQ-style dice loss: each pair's dice weighted by its class probability.

    Args:
        log_probs: (B, N, P) of the matched queries.
        masks: (B, N, P) shares of the targets.
        weight: (B, N), 0 = padding.
        num_queries: Q, the divisor.
        void: (B, P) bool, pixels on which the probabilities do not count; None = all count.
    """
    probs = log_probs.exp()
    if void is not None:
        probs = probs * ~void[:, None]
    overlap = (probs * masks).sum(2)  # (B, N)
    loss = 1 - (2 * overlap + DICE_SMOOTH) / (probs.sum(2) + masks.sum(2) + DICE_SMOOTH)
    return (loss * weight).sum(1).mean() * FOCAL_ALPHA / num_queries


class _GramLogSumExp(torch.autograd.Function):
    """log sum_j exp(f_j . f_k / t) of features (B, D, K) -> (B, K), at half the time of the plain operations.

    The exponentials are made in place and are all that is kept; the backward pass is two products with them and touches
    no other K x K array.
    """

    @staticmethod
    def forward(ctx, feature: Tensor, temperature: float) -> Tensor:
        logits = torch.bmm(feature.transpose(1, 2), feature / temperature)  # (B, K, K)
        peak = logits.amax(1, keepdim=True)
        exps = logits.sub_(peak).exp_()
        total = exps.sum(1)
        ctx.save_for_backward(feature, exps, total)
        ctx.temperature = temperature
        return peak[:, 0] + total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        feature, exps, total = ctx.saved_tensors
        scale = (grad / total)[:, None]  # (B, 1, K)
        grad_feature = torch.bmm(feature * scale, exps.transpose(1, 2)) + torch.bmm(feature, exps) * scale
        return grad_feature / ctx.temperature, None


def instance_discrimination_loss(feature: Tensor, masks: Tensor) -> Tensor:
    """Return the pixel-wise contrast: pixels of one segment attract, all others repel.

    The target of a pair is sum_n y_nj y_nk, divided by its sum over j (or by 1 if that is less). Its product with the
    logits is a product with each segment's summed features, so that only the log-partition needs all K x K pairs.

    Args:
        feature: (B, D, K), L2-normalised over D.
        masks: (B, N, K) shares of the targets; a pixel in none of them is only a negative for the others.
    """
    log_partition = _GramLogSumExp.apply(feature, CONTRASTIVE_TEMPERATURE)  # (B, K)
    total = torch.einsum("bn,bnk->bk", masks.sum(2), masks)  # column sums of the target
    centres = torch.bmm(masks, feature.transpose(1, 2))  # (B, N, D)
    attraction = (torch.bmm(centres.transpose(1, 2), masks) * feature).sum(1)  # (B, K)
    norm = total.clamp(min=1)
    return mean_nonzero((log_partition * total - attraction / CONTRASTIVE_TEMPERATURE) / norm)


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of (B, C, n) logits with (B, n) labels, negative = void, averaged image by image."""
    loss = F.cross_entropy(logits, labels.clamp(min=-1), ignore_index=-1, reduction="none")  # (B, n)
    return mean_nonzero(loss)


# Sampling -------------------------------------------------------------------------------------------------------------


def sample_pixels(inverse_area: Tensor, void: Tensor, k: int, temperature: float, uniforms: Tensor) -> Tensor:
    """Draw k pixels an image without replacement (Gumbel top-k): small segments oftener, void last.

    Args:
        inverse_area: (B, P), positive.
        void: (B, P) bool.
        k: at most P.
        temperature: power of ``inverse_area``; 0 = every pixel alike.
        uniforms: (B, P) in [0, 1], the randomness.

    Returns:
        (B, k) int64 pixel numbers, in no order.
    """
    eps = torch.finfo(uniforms.dtype).eps
    gumbel = -(-uniforms.clamp(eps, 1 - eps).log()).log()
    logits = temperature * inverse_area.log() - VOID_PENALTY * void
    return (logits + gumbel).topk(k, dim=1, sorted=False).indices


def sampled_index(
    inverse_area: Tensor, void: Tensor, k: int, temperature: float, noise: Noise, name: str
) -> Tensor | None:
    """Return `sample_pixels` with the noise of the term ``name``, or None where k is 0 or there is no more to draw."""
    if k == 0 or k >= void.shape[1]:
        return None
    return sample_pixels(inverse_area, void, k, temperature, noise(name, tuple(void.shape)))


def take_pixels(maps: Tensor, index: Tensor | None) -> Tensor:
    """Return the pixels ``index`` (B, K) of maps (B, n, P) or (B, P); None = all of them."""
    if index is None:
        return maps
    if maps.ndim == 2:
        return maps.gather(1, index)
    return maps.gather(2, index[:, None].expand(-1, maps.shape[1], -1))


def target_stride(target_size: tuple[int, int], pred_size: tuple[int, int]) -> int:
    """Return the stride that brings a target map to the size of a prediction, (target - 1) // (prediction - 1).

    Raises:
        ValueError: the two axes disagree, or the strided map has another size.
    """
    sizes = tuple(zip(target_size, pred_size, strict=True))
    strides = {max(1, (t - 1) // (p - 1)) for t, p in sizes if p > 1} or {max(target_size)}
    stride = strides.pop()
    if strides or tuple(-(-t // stride) for t in target_size) != tuple(pred_size):
        raise ValueError(
            f"auxiliary semantic prediction of {pred_size[0]}x{pred_size[1]} pixels does not lie on the target of "
            f"{target_size[0]}x{target_size[1]} by one stride for both axes; use an input whose sides are 32 k + 1"
        )
    return stride


# The criterion --------------------------------------------------------------------------------------------------------


def _numbered(outputs: dict) -> list[tuple[str, dict]]:
    """Return the final output and the intermediate ones, each with the suffix of its terms' names."""
    return [("", outputs), *((f"_{i}", aux) for i, aux in enumerate(outputs.get("aux_outputs") or []))]


def check_targets(outputs: dict, targets: list[dict], num_classes: int) -> None:
    """Raise ValueError where classes or sizes of outputs and targets disagree (see `KMaXCriterion.forward`)."""
    columns = outputs["pred_logits"].shape[-1]
    if columns != num_classes + 1:
        raise ValueError(
            f"pred_logits has {columns} columns; num_classes {num_classes} needs {num_classes + 1} with void"
        )
    size = tuple(outputs["pred_masks"].shape[-2:])
    for i, target in enumerate(targets):
        maps = {"masks": target["masks"].shape[-2:]}
        if outputs.get("aux_semantic_pred") is not None:
            maps["semantic"] = target["semantic"].shape
        for name, found in maps.items():
            if tuple(found) != size:
                raise ValueError(
                    f"target {name} of image {i} has size {tuple(found)}, pred_masks {size}; resize it first"
                )
        labels = target["labels"]
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"labels of image {i} are {labels.tolist()}; with num_classes {num_classes} they lie below it"
            )


def _torch_noise(device: torch.device, dtype: torch.dtype) -> Noise:
    return lambda name, shape: torch.rand(shape, device=device, dtype=dtype)


@MODELS.register_module()
class KMaXCriterion(nn.Module):
    """The weighted loss terms of the final and of every intermediate output.

    Args:
        num_classes: C, without void.
        class_weight: factor of ``loss_ce``.
        dice_weight: factor of ``loss_dice``.
        mask_weight: factor of ``loss_mask`` (cross entropy over the queries).
        insdis_weight: factor of ``loss_pixel_insdis``.
        aux_semantic_weight: factor of ``loss_aux_semantic``.
        insdis_temperature: how much the sampled pixels favour small segments (Cityscapes 0.6).
        insdis_sample_k: pixels an image in the instance discrimination; all of them where the map has fewer.
        aux_semantic_temperature: as ``insdis_temperature``, for the semantic term.
        aux_semantic_sample_k: pixels an image in the semantic term; 0 = all (Cityscapes).
        share_final_matching: whether the final output's matching and weights serve the intermediate outputs.
        masking_void_pixel: whether predictions on void pixels count for nothing in the dice term. (They never count in
            the matching: the official matcher takes the flag and does not look at it.)
    """

    def __init__(
        self,
        num_classes: int,
        class_weight: float = 3.0,
        dice_weight: float = 3.0,
        mask_weight: float = 0.3,
        insdis_weight: float = 1.0,
        aux_semantic_weight: float = 1.0,
        insdis_temperature: float = 1.5,
        insdis_sample_k: int = 4096,
        aux_semantic_temperature: float = 2.0,
        aux_semantic_sample_k: int = 4096,
        share_final_matching: bool = True,
        masking_void_pixel: bool = True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.class_weight = class_weight
        self.dice_weight = dice_weight
        self.mask_weight = mask_weight
        self.insdis_weight = insdis_weight
        self.aux_semantic_weight = aux_semantic_weight
        self.insdis_temperature = insdis_temperature
        self.insdis_sample_k = insdis_sample_k
        self.aux_semantic_temperature = aux_semantic_temperature
        self.aux_semantic_sample_k = aux_semantic_sample_k
        self.share_final_matching = share_final_matching
        self.masking_void_pixel = masking_void_pixel

    def forward(self, outputs: dict, targets: list[dict], noise: Noise | None = None) -> dict[str, Tensor]:
        """Return the weighted terms by name; those of ``aux_outputs[i]`` end in ``_i``.

        Everything is computed in float32 (float64 for float64 outputs) whatever autocast says.

        Args:
            outputs: ``pred_logits`` (B, Q, C + 1) void last, ``pred_masks`` (B, Q, H, W), ``pixel_feature``
                (B, D, H, W) L2-normalised, optionally ``aux_outputs`` (a list of such dicts of the same sizes) and
                ``aux_semantic_pred`` (B, C or more, h, w).
            targets: per image ``masks`` (N, H, W) bool or 0/1, ``labels`` (N,) int64, and where there is an
                ``aux_semantic_pred``, ``semantic`` (H, W) int64, -1 = void. N may be 0.
            noise: (name of the term, shape (B, P)) -> uniform numbers in (0, 1) for its sampling; None draws them from
                Torch's generator of the device.

        Raises:
            ValueError: sizes or classes of outputs and targets disagree, or the predictions are not finite.
        """
        with torch.autocast(outputs["pred_masks"].device.type, enabled=False):
            final = upcast(outputs["pred_masks"])
            check_targets(outputs, targets, self.num_classes)
            noise = noise or _torch_noise(final.device, final.dtype)
            masks = [t["masks"].flatten(1).to(final.dtype) for t in targets]
            labels = [t["labels"] for t in targets]
            losses, shared = {}, None
            for suffix, output in _numbered(outputs):
                matched = shared if shared and self.share_final_matching else self._match(output, masks, labels)
                shared = shared or matched
                losses |= {name + suffix: v for name, v in self._output_losses(output, matched, suffix, noise).items()}
            if outputs.get("aux_semantic_pred") is not None:
                semantic = torch.stack([t["semantic"] for t in targets])  # (B, H, W)
                losses["loss_aux_semantic"] = self._semantic(outputs["aux_semantic_pred"], semantic, shared, noise)
        return losses

    def _match(self, output: dict, masks: list[Tensor], labels: list[Tensor]) -> MatchedTargets:
        logits, mask_logits = upcast(output["pred_logits"]), upcast(output["pred_masks"]).flatten(2)
        return match_targets(logits, mask_logits, masks, labels)

    def _output_losses(self, output: dict, matched: MatchedTargets, suffix: str, noise: Noise) -> dict[str, Tensor]:
        mask_logits = upcast(output["pred_masks"]).flatten(2)  # (B, Q, P)
        log_probs = matched_log_probs(mask_logits, matched.query)  # (B, N, P)
        masked = matched.void if self.masking_void_pixel else None
        dice = pq_dice_loss(log_probs, matched.masks, matched.mask_weight, mask_logits.shape[1], masked)
        ce = class_loss(upcast(output["pred_logits"]), matched.labels, matched.class_weight)

        name = "loss_pixel_insdis" + suffix
        void, area = matched.void, matched.inverse_area
        index = sampled_index(area, void, self.insdis_sample_k, self.insdis_temperature, noise, name)
        feature = take_pixels(upcast(output["pixel_feature"]).flatten(2), index)  # (B, D, K)
        insdis = instance_discrimination_loss(feature, take_pixels(matched.masks, index))
        return {
            "loss_ce": self.class_weight * ce,
            "loss_mask": self.mask_weight * mask_id_loss(log_probs, matched.masks, matched.void),
            "loss_dice": self.dice_weight * dice,
            "loss_pixel_insdis": self.insdis_weight * insdis,
        }

    def _semantic(self, pred: Tensor, semantic: Tensor, matched: MatchedTargets, noise: Noise) -> Tensor:
        size = semantic.shape[-2:]  # (H, W)
        step = target_stride(tuple(size), tuple(pred.shape[-2:]))

        def strided(x: Tensor) -> Tensor:
            return x.unflatten(-1, size)[..., ::step, ::step].flatten(1)  # (B, h w)

        k, temperature = self.aux_semantic_sample_k, self.aux_semantic_temperature
        void, inverse_area = strided(matched.void), strided(matched.inverse_area)
        index = sampled_index(inverse_area, void, k, temperature, noise, "loss_aux_semantic")
        logits = take_pixels(upcast(pred).flatten(2), index)  # (B, C, n)
        labels = take_pixels(strided(semantic.flatten(1)), index)  # (B, n)
        return self.aux_semantic_weight * semantic_loss(logits, labels)
