"""Criterion of Mask2Former (CVPR 2022, arXiv:2112.01527, section 3.3): matching and mask losses on sampled points.

Follows github.com/facebookresearch/Mask2Former (commit 9b0651c) number for number. What touches masks is an op
(`densepred.ops.point_sample_mask_loss`), every term a pure function of tensors; `Mask2FormerCriterion` holds the plain
numbers and calls them. Letters: S prediction sets (the last layer, then ``aux_outputs``), B images, Q queries, N targets
of an image, T targets of the batch, C classes, P points; h, w the size of the predicted masks, H, W that of the targets.
Points are (x, y) in [0, 1) from edge to edge of a mask; samples are bilinear, with zeros outside.

What differs, and why:

* all sets of all images are matched before the first loss, so that the costs reach the solver in one transfer, for
  which alone the host waits in a step; hence the points of all matchings are drawn first (see `Mask2FormerCriterion`);
* a target looks up its query, not the reverse: rows run over the targets, and one without a query has row -1 and
  counts for nothing, so that no shape depends on the matching.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from torch import Tensor, nn

from densepred.losses.matcher import hungarian_match
from densepred.ops.point_sample_mask_loss import (
    point_mask_losses,
    point_matching_costs,
    sample_points,
    uncertain_points,
    upload,
)
from densepred.registry import MODELS

Points = Callable[[str, int, tuple[int, ...]], Tensor]
"""(what the points are for, number of the set, shape (..., 2)) -> uniform numbers in [0, 1)."""
MAX_SOLVERS = 8
"""Threads that solve assignments at the same time."""


# Matching -------------------------------------------------------------------------------------------------------------


def class_costs(logits: Tensor, labels: list[Tensor]) -> Tensor:
    """Return minus the probability of every target's class for every query of its image.

    Args:
        logits: (S, B, Q, C + 1).
        labels: per image (N,) int64.

    Returns:
        (S, T, Q).
    """
    probs = logits.softmax(-1).mT  # (S, B, C + 1, Q)
    return -torch.cat([table.index_select(1, label) for table, label in zip(probs.unbind(1), labels, strict=True)], 1)


def match_sets(costs: Tensor, labels: list[Tensor], num_classes: int) -> Tensor:
    """Match every image's queries and targets in every set; costs and labels reach the CPU in one transfer.

    Args:
        costs: (S, T, Q).
        labels: per image (N,) int64; they only travel along to be checked.
        num_classes: C.

    Returns:
        (S, T) int64 on the device of the costs: for every target of the batch ``image * Q + query``, or -1 where there
        are more targets than queries and it got none.

    Raises:
        ValueError: a label lies outside 0..C-1.
        FloatingPointError: a cost is NaN or infinite; set, image, query and target are named.
    """
    counts = [len(label) for label in labels]
    sent = torch.cat([costs.flatten(), *(label.to(costs.dtype) for label in labels)]).cpu()  # the host waits here
    table, host_labels = sent.split([costs.numel(), sum(counts)])
    return upload(_assign(table.view(costs.shape), host_labels.split(counts), num_classes), costs.device)


def _assign(costs: Tensor, labels: tuple[Tensor, ...], num_classes: int) -> Tensor:
    """`match_sets` on the host."""
    from scipy.optimize import linear_sum_assignment

    _check_labels(labels, num_classes)
    if not costs.isfinite().all():
        _name_infinite(costs, [len(label) for label in labels])
    ends = list(accumulate((len(label) for label in labels), initial=0))
    rows = torch.full(costs.shape[:2], -1)
    table, found = costs.numpy(), rows.numpy()

    def solve(place: tuple[int, int]) -> None:
        number, image = place
        part = slice(ends[image], ends[image + 1])
        targets, queries = linear_sum_assignment(table[number, part])
        found[number, part][targets] = image * costs.shape[2] + queries

    places = [(s, image) for s in range(len(costs)) for image, label in enumerate(labels) if len(label)]
    # SciPy lets go of the interpreter's lock while it solves.
    with ThreadPoolExecutor(min(MAX_SOLVERS, os.cpu_count() or 1)) as pool:
        list(pool.map(solve, places))
    return rows


def _name_infinite(costs: Tensor, counts: list[int]) -> None:
    for s, table in enumerate(costs):
        for image, cost in enumerate(table.split(counts)):
            hungarian_match(cost.T, f"{_set_name(s)}, image {image}")  # raises


def _set_name(number: int) -> str:
    return f"aux_outputs[{number - 1}]" if number else "last layer"


def _check_labels(labels: tuple[Tensor, ...], num_classes: int) -> None:
    for image, values in enumerate(labels):
        for target, label in enumerate(values.long().tolist()):
            if not 0 <= label < num_classes:
                raise ValueError(
                    f"target {target} of image {image} has label {label}, but num_classes {num_classes} allows "
                    f"0..{num_classes - 1}: set the head's num_classes to the data set's number of classes, or map "
                    "the data set's labels to 0..C-1"
                )


# Loss terms -----------------------------------------------------------------------------------------------------------


def class_loss(logits: Tensor, labels: Tensor, no_object_weight: float) -> Tensor:
    """Return every set's weighted cross entropy (S,), divided by the sum of the weights.

    Args:
        logits: (S, B, Q, C + 1), no object last.
        labels: (S, B, Q) int64, C = no object.
        no_object_weight: weight of a query without a target; the others have 1.
    """
    loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten(), reduction="none").view(labels.shape)
    weight = torch.ones_like(loss).masked_fill_(labels == logits.shape[-1] - 1, no_object_weight)
    return (loss * weight).sum((1, 2)) / weight.sum((1, 2))


# The criterion --------------------------------------------------------------------------------------------------------


def check_targets(outputs: dict, targets: list[dict], num_classes: int) -> None:
    """Raise ValueError where outputs and targets disagree in numbers or sizes (labels: see `match_sets`)."""
    batch, _, columns = outputs["pred_logits"].shape
    if columns != num_classes + 1:
        raise ValueError(
            f"pred_logits has {columns} columns; num_classes {num_classes} needs {num_classes + 1} with no object"
        )
    if len(targets) != batch:
        raise ValueError(f"{len(targets)} targets for a batch of {batch} images")
    size = tuple(targets[0]["masks"].shape[1:])
    for image, target in enumerate(targets):
        masks, labels = target["masks"], target["labels"]
        if masks.shape[1:] != size:
            raise ValueError(
                f"target masks of image {image} have size {tuple(masks.shape[1:])}, those of image 0 {size}: "
                "pad all of them to the size of the input batch"
            )
        if len(masks) != len(labels):
            raise ValueError(f"image {image} has {len(masks)} target masks but {len(labels)} labels")


def _query_labels(rows: Tensor, labels: Tensor, queries: int, num_classes: int) -> Tensor:
    """Return the class (S, queries) of every query, C = no object, of each target's row (S, T) and label (T,)."""
    classes = labels.new_full((len(rows), queries + 1), num_classes)  # the last column takes targets without a query
    classes.scatter_(1, rows.masked_fill(rows < 0, queries), labels.expand(len(rows), -1))
    return classes[:, :-1]


def _torch_points(device: torch.device, dtype: torch.dtype) -> Points:
    return lambda _name, _set, shape: torch.rand(shape, device=device, dtype=dtype)


@MODELS.register_module()
class Mask2FormerCriterion(nn.Module):
    """Classification, mask and dice loss of every prediction set, each matched and sampled anew.

    The weights serve the matching and the losses alike.

    Args:
        num_classes: C, without no object.
        class_weight: factor of ``loss_ce`` and of the class in the matching.
        mask_weight: factor of ``loss_mask`` (binary cross entropy) and of that cost.
        dice_weight: factor of ``loss_dice`` and of that cost.
        no_object_weight: weight of an unmatched query in the cross entropy (the official "eos_coef").
        num_points: P, points a mask, in the matching and in the losses.
        oversample_ratio: candidates a mask, as a multiple of P.
        importance_sample_ratio: share of the P points that are the candidates with the least certain logits; the
            others are fresh ones.
    """

    def __init__(
        self,
        num_classes: int,
        class_weight: float = 2.0,
        mask_weight: float = 5.0,
        dice_weight: float = 5.0,
        no_object_weight: float = 0.1,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.class_weight = class_weight
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight
        self.num_points = num_points
        self.num_candidates = int(num_points * oversample_ratio)
        self.num_uncertain = int(num_points * importance_sample_ratio)

    def forward(self, outputs: dict, targets: list[dict], points: Points | None = None) -> dict[str, Tensor]:
        """Return the weighted terms ``loss_ce``, ``loss_mask``, ``loss_dice``; those of ``aux_outputs[i]`` end in ``_i``.

        Everything is computed in float32 (float64 for float64 outputs) whatever autocast says. The divisor of the mask
        terms is the number of targets of the batch, averaged over the processes, at least 1. Without any target the
        mask terms are 0, yet every output has a gradient.

        Args:
            outputs: ``pred_logits`` (B, Q, C + 1) no object last, ``pred_masks`` (B, Q, h, w) logits, optionally
                ``aux_outputs``, a list of such dicts of the same sizes.
            targets: per image ``labels`` (N,) int64 and ``masks`` (N, H, W) bool on the device of the outputs, H and W
                the same for all images; N may be 0, and more than Q.
            points: source of the points; None draws them from Torch's generator of the device. Set 0 is the last
                layer, set i + 1 ``aux_outputs[i]``. First every set's ``("matching", set, (B, P, 2))``, then set by set
                ``("candidates", set, (T, oversample_ratio P, 2))`` and ``("random", set, (T, rest of P, 2))``.

        Raises:
            ValueError: numbers, sizes or classes of outputs and targets disagree.
            FloatingPointError: the predictions are not finite.
        """
        sets = [outputs, *(outputs.get("aux_outputs") or [])]
        check_targets(outputs, targets, self.num_classes)
        masks = outputs["pred_masks"]
        dtype = torch.promote_types(masks.dtype, torch.float32)
        points = points or _torch_points(masks.device, dtype)
        with torch.autocast(masks.device.type, enabled=False):
            logits = torch.stack([output["pred_logits"] for output in sets]).to(dtype)  # (S, B, Q, C + 1)
            rows = self._match(logits.detach(), sets, targets, points)  # (S, T)
            terms = self._class_terms(logits, rows, targets) | self._mask_terms(sets, rows, targets, points)
        suffixes = ["", *(f"_{i}" for i in range(len(sets) - 1))]
        return {
            name + suffix: value
            for name, values in terms.items()
            for suffix, value in zip(suffixes, values.unbind(), strict=True)
        }

    @torch.no_grad()
    def _match(self, logits: Tensor, sets: list[dict], targets: list[dict], points: Points) -> Tensor:
        shape = (len(targets), self.num_points, 2)
        shared = torch.stack([points("matching", s, shape) for s in range(len(sets))], 1)  # (B, S, P, 2)
        masks = [output["pred_masks"] for output in sets]
        bce, dice = point_matching_costs(masks, [target["masks"] for target in targets], shared)  # (S, T, Q)
        labels = [target["labels"] for target in targets]
        # Labels out of range would stop a GPU for good before `match_sets` can name them.
        classes = class_costs(logits, [label.clamp(0, self.num_classes - 1) for label in labels])
        costs = self.mask_weight * bce + self.class_weight * classes + self.dice_weight * dice
        return match_sets(costs, labels, self.num_classes)

    def _class_terms(self, logits: Tensor, rows: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        labels = torch.cat([target["labels"] for target in targets])
        classes = _query_labels(rows, labels, logits.shape[1] * logits.shape[2], self.num_classes)
        loss = class_loss(logits, classes.view(logits.shape[:3]), self.no_object_weight)
        return {"loss_ce": self.class_weight * loss}

    def _mask_terms(self, sets: list[dict], rows: Tensor, targets: list[dict], points: Points) -> dict[str, Tensor]:
        masks = [output["pred_masks"] for output in sets]
        chosen = [self._choose(s, m, rows[s], points) for s, m in enumerate(masks)]  # S of (T, P, 2)
        logits = [sample_points(m, at, row) for m, at, row in zip(masks, chosen, rows, strict=True)]
        logits = torch.stack(logits, 1)  # (T, S, P)
        split = torch.cat(chosen, 1).split([len(target["labels"]) for target in targets])  # B of (N, S P, 2)
        pairs = zip(targets, split, strict=True)
        samples = torch.cat([sample_points(target["masks"], at) for target, at in pairs]).view(logits.shape)
        bce, dice = point_mask_losses(logits, samples)  # (T, S)
        matched = (rows >= 0).T
        num_masks = average_targets(len(logits), logits)
        return {
            "loss_mask": self.mask_weight * (bce * matched).sum(0) / num_masks,
            "loss_dice": self.dice_weight * (dice * matched).sum(0) / num_masks,
        }

    @torch.no_grad()
    def _choose(self, number: int, masks: Tensor, rows: Tensor, points: Points) -> Tensor:
        """Return the points (T, P, 2) of one set's losses."""
        candidates = points("candidates", number, (len(rows), self.num_candidates, 2))
        random = points("random", number, (len(rows), self.num_points - self.num_uncertain, 2))
        kept = uncertain_points(sample_points(masks, candidates, rows), candidates, self.num_uncertain)
        return torch.cat([kept, random], 1)


def average_targets(count: int, like: Tensor) -> Tensor:
    """Return the processes' mean number of targets, at least 1, as a scalar of the type and device of ``like``."""
    total = like.new_full((), count)
    all_reduce(total, op="mean")
    return total.clamp(min=1)
