"""Criterion of Mask2Former (CVPR 2022, arXiv:2112.01527, section 3.3): matching and mask losses on sampled points.

Follows github.com/facebookresearch/Mask2Former (commit 9b0651c) number for number. Every term is a pure function of
tensors; `Mask2FormerCriterion` holds the plain numbers and calls them. Letters: S prediction sets (the last layer, then
``aux_outputs``), B images, Q queries, N targets of an image, T targets of the batch, C classes, P points; h, w the
size of the predicted masks, H, W that of the targets. Points are (x, y) in [0, 1) from edge to edge of a mask; samples
are bilinear, with zeros outside.

What differs, and why:

* all sets of all images are matched before the first loss, so that the costs reach the solver in one transfer; hence
  the points of all matchings are drawn first (see `Mask2FormerCriterion`);
* a target looks up its query, not the reverse: rows run over the targets, and one without a query has row -1 and
  counts for nothing, so that no shape depends on the matching;
* the cross entropy of every query with every target is one product (see `mask_costs`), the points that a matching
  shares are rows of a channels-last table, and the backward pass of the sampling keeps nothing but the points.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from densepred.losses.matcher import hungarian_match
from densepred.registry import MODELS

DICE_SMOOTH = 1.0
GROUP = 64
"""Factors in [0.5, 1] whose product stays far from float32's smallest number."""
CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Pixels of target masks that are floats at the same time: on a CPU what fits its cache."""

Points = Callable[[str, int, tuple[int, ...]], Tensor]
"""(what the points are for, number of the set, shape (..., 2)) -> uniform numbers in [0, 1)."""


# Sampling -------------------------------------------------------------------------------------------------------------


def sample_targets(masks: Tensor, points: Tensor) -> Tensor:
    """Sample target masks, of which only a few at a time become floats.

    Args:
        masks: (N, H, W) bool or uint8.
        points: (N, P, 2), or (1, P, 2) for all masks alike.

    Returns:
        (N, P) of the type of ``points``, 0..1.
    """
    grid = (2 * points - 1)[:, :, None].expand(len(masks), -1, -1, -1)  # (N, P, 1, 2)
    samples = points.new_empty(grid.shape[:2])
    chunk = max(1, CHUNK.get(masks.device.type, CHUNK["cuda"]) // max(1, masks[0:1].numel()))
    for start in range(0, len(masks), chunk):
        part = slice(start, start + chunk)
        maps = masks[part, None].to(points.dtype)  # (n, 1, H, W)
        samples[part] = F.grid_sample(maps, grid[part], align_corners=False)[:, 0, :, 0]
    return samples


class _SampleQueries(torch.autograd.Function):
    """Bilinear samples of some rows of masks (B, Q, h, w); for the backward pass it keeps the points, no row's copy."""

    @staticmethod
    def forward(ctx, masks: Tensor, rows: Tensor, points: Tensor) -> Tensor:
        ctx.save_for_backward(masks, rows, points)
        return F.grid_sample(*_rows_and_grid(masks, rows, points), align_corners=False)[:, 0, :, 0]  # (M, P)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        masks, rows, points = ctx.saved_tensors
        # What autograd calls for `grid_sample` (bilinear, zeros outside, no gradient of the grid).
        grad_rows, _ = torch.ops.aten.grid_sampler_2d_backward(
            grad[:, None, :, None].contiguous(), *_rows_and_grid(masks, rows, points), 0, 0, False, [True, False]
        )
        # Row -1 comes last and is cut off.
        grad_masks = masks.new_zeros(masks.shape[:2].numel() + 1, *masks.shape[2:])
        grad_masks.index_copy_(0, rows % len(grad_masks), grad_rows[:, 0].to(masks.dtype))
        return grad_masks[:-1].view(masks.shape), None, None


def _rows_and_grid(masks: Tensor, rows: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    chosen = masks.flatten(0, 1).index_select(0, rows.clamp(min=0)).to(points.dtype)
    return chosen[:, None], (2 * points - 1)[:, :, None]  # (M, 1, h, w), (M, P, 1, 2)


def sample_queries(masks: Tensor, rows: Tensor, points: Tensor) -> Tensor:
    """Sample the mask logits of some queries, each at its own points; differentiable in the masks.

    Args:
        masks: (B, Q, h, w), any float type.
        rows: (M,) int64, ``image * Q + query``, no query twice; -1 = row 0 without a gradient.
        points: (M, P, 2), float32 or float64: the type that is computed in.

    Returns:
        (M, P) of the type of ``points``.
    """
    return _SampleQueries.apply(masks, rows, points)


def bilinear_corners(points: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the four pixels around points (..., 2), numbered row by row, and their weights: (..., 4) int64 and float."""
    columns, rows = _axis(points[..., 0], width), _axis(points[..., 1], height)
    pixels = [row * width + column for row, _ in rows for column, _ in columns]
    weights = [down * across for _, down in rows for _, across in columns]
    return torch.stack(pixels, -1), torch.stack(weights, -1)


def _axis(x: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """Return the pixel before and the one after x in [0, 1), each with its linear weight; outside the weight is 0."""
    at = x * side - 0.5
    floor = at.floor()
    after, first = at - floor, floor.long()
    before = (1 - after) * (first >= 0)
    return [(first.clamp(min=0), before), ((first + 1).clamp(max=side - 1), after * (first + 1 < side))]


def uncertain_points(logits: Tensor, points: Tensor, count: int) -> Tensor:
    """Keep the points whose logits are nearest to 0.

    Args:
        logits: (M, K), at the points.
        points: (M, K, 2).
        count: how many to keep, at most K.

    Returns:
        (M, count, 2), in no order.
    """
    # The bits of non-negative floats are in the order of their values, and integers are compared in 2/3 of the time.
    bits = logits.abs().view(torch.int64 if logits.dtype == torch.float64 else torch.int32)
    index = bits.topk(count, dim=1, largest=False, sorted=False).indices  # (M, count)
    # As complex numbers both coordinates move at once.
    return torch.view_as_real(torch.view_as_complex(points).gather(1, index))


# Matching -------------------------------------------------------------------------------------------------------------


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Return minus the probability (..., Q, N) of every target's class (N,) under class logits (..., Q, C + 1)."""
    return -logits.softmax(-1).index_select(-1, labels)


def _sum_softplus(logits: Tensor, probs: Tensor) -> Tensor:
    """Return sum_p log(1 + exp(x)) (Q,) of logits (P, Q) and their sigmoids, which it overwrites.

    log(1 + exp(x)) = max(x, 0) - log max(s, 1 - s): one logarithm of a product serves `GROUP` points.
    """
    factors = probs.sub_(0.5).abs_().add_(0.5)  # (P, Q), max(s, 1 - s)
    whole = len(factors) // GROUP * GROUP
    products = torch.cat([factors[:whole].unflatten(0, (-1, GROUP)).prod(1), factors[whole:].prod(0, keepdim=True)])
    return logits.clamp_(min=0).sum(0) - products.log_().sum(0)


def mask_costs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean binary cross entropy and the dice cost, each (Q, N), of every query with every target.

    The cross entropy of logits x with targets y is log(1 + exp(x)) - x y: one sum a query and one product.

    Args:
        logits: (P, Q), overwritten.
        targets: (N, P), 0..1.
    """
    probs = logits.sigmoid()  # (P, Q)
    overlap, agreement = targets @ probs, targets @ logits  # (N, Q)
    size = probs.sum(0) + targets.sum(1)[:, None]  # (N, Q)
    bce = (_sum_softplus(logits, probs) - agreement) / len(logits)
    dice = 1 - (2 * overlap + DICE_SMOOTH) / (size + DICE_SMOOTH)
    return bce.T, dice.T


def image_mask_costs(masks: list[Tensor], targets: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return `mask_costs` of one image in every set, each (S, Q, N).

    Args:
        masks: per set (Q, h, w) logits, any float type.
        targets: (N, H, W) bool or uint8.
        points: (S, P, 2), float32 or float64: the type that is computed in.
    """
    queries, *size = masks[0].shape
    samples = sample_targets(targets, points.flatten(0, 1)[None]).unflatten(1, points.shape[:2])  # (N, S, P)
    pixels, weights = bilinear_corners(points, *size)  # (S, P, 4)
    table = points.new_empty(size[0] * size[1], queries)
    costs = []
    for s, mask in enumerate(masks):
        table.copy_(mask.flatten(1).T)
        logits = F.embedding_bag(pixels[s], table, per_sample_weights=weights[s], mode="sum")  # (P, Q)
        costs.append(mask_costs(logits, samples[:, s]))
    bce, dice = zip(*costs, strict=True)
    return torch.stack(bce), torch.stack(dice)


def match_sets(costs: list[Tensor], labels: list[Tensor], num_classes: int) -> Tensor:
    """Match every image's queries and targets in every set; costs and labels reach the CPU in one transfer.

    Args:
        costs: per image (S, Q, N).
        labels: per image (N,) int64; they only travel along to be checked.
        num_classes: C.

    Returns:
        (S, T) int64 on the device of the costs: for every target of the batch ``image * Q + query``, or -1 where there
        are more targets than queries and it got none.

    Raises:
        ValueError: a label lies outside 0..C-1.
        FloatingPointError: a cost is NaN or infinite; set, image, query and target are named.
    """
    num_sets, queries = costs[0].shape[:2]
    counts = [len(label) for label in labels]
    parts = [cost.flatten() for cost in costs] + [label.to(costs[0].dtype) for label in labels]
    *tables, host_labels = torch.cat(parts).cpu().split([cost.numel() for cost in costs] + [sum(counts)])
    _check_labels(host_labels.split(counts), num_classes)
    rows = torch.full((num_sets, sum(counts)), -1)
    for image, (table, columns) in enumerate(zip(tables, rows.split(counts, dim=1), strict=True)):
        for s, cost in enumerate(table.view(num_sets, queries, -1) if len(table) else []):
            query, target = hungarian_match(cost, f"{_set_name(s)}, image {image}")
            columns[s, target] = image * queries + query
    return rows.to(costs[0].device, non_blocking=True)


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


def mask_loss(logits: Tensor, targets: Tensor, matched: Tensor, num_masks: Tensor | float) -> Tensor:
    """Return every set's binary cross entropy (S,): mean over points, sum over masks, divided by ``num_masks``.

    Args:
        logits: (S, T, P).
        targets: (S, T, P), 0..1.
        matched: (S, T) bool, masks that count.
        num_masks: the divisor.
    """
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(2)  # (S, T)
    return (loss * matched).sum(1) / num_masks


def dice_loss(logits: Tensor, targets: Tensor, matched: Tensor, num_masks: Tensor | float) -> Tensor:
    """Return every set's dice loss (S,), summed over masks and divided by ``num_masks``; arguments as `mask_loss`."""
    probs = logits.sigmoid()
    overlap, size = (probs * targets).sum(2), probs.sum(2) + targets.sum(2)  # (S, T)
    loss = 1 - (2 * overlap + DICE_SMOOTH) / (size + DICE_SMOOTH)
    return (loss * matched).sum(1) / num_masks


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
    classes.scatter_(1, torch.where(rows < 0, queries, rows), labels.expand(len(rows), -1))
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
        costs = []
        for image, target in enumerate(targets):
            masks = [output["pred_masks"][image] for output in sets]
            bce, dice = image_mask_costs(masks, target["masks"], shared[image])
            # Labels out of range would stop a GPU for good before `match_sets` can name them.
            classes = class_cost(logits[:, image], target["labels"].clamp(0, self.num_classes - 1))
            costs.append(self.mask_weight * bce + self.class_weight * classes + self.dice_weight * dice)
        return match_sets(costs, [target["labels"] for target in targets], self.num_classes)

    def _class_terms(self, logits: Tensor, rows: Tensor, targets: list[dict]) -> dict[str, Tensor]:
        labels = torch.cat([target["labels"] for target in targets])
        classes = _query_labels(rows, labels, logits.shape[1] * logits.shape[2], self.num_classes)
        loss = class_loss(logits, classes.view(logits.shape[:3]), self.no_object_weight)
        return {"loss_ce": self.class_weight * loss}

    def _mask_terms(self, sets: list[dict], rows: Tensor, targets: list[dict], points: Points) -> dict[str, Tensor]:
        masks = [output["pred_masks"] for output in sets]
        chosen = torch.stack([self._choose(s, m, rows[s], points) for s, m in enumerate(masks)], 1)  # (T, S, P, 2)
        logits = torch.stack([sample_queries(m, rows[s], chosen[:, s]) for s, m in enumerate(masks)])  # (S, T, P)
        split = zip(targets, chosen.flatten(1, 2).split([len(t["labels"]) for t in targets]), strict=True)
        samples = torch.cat([sample_targets(target["masks"], part) for target, part in split])  # (T, S P)
        samples = samples.view(*chosen.shape[:3]).transpose(0, 1)  # (S, T, P)
        num_masks = average_targets(len(chosen), logits)
        return {
            "loss_mask": self.mask_weight * mask_loss(logits, samples, rows >= 0, num_masks),
            "loss_dice": self.dice_weight * dice_loss(logits, samples, rows >= 0, num_masks),
        }

    @torch.no_grad()
    def _choose(self, number: int, masks: Tensor, rows: Tensor, points: Points) -> Tensor:
        """Return the points (T, P, 2) of one set's losses."""
        candidates = points("candidates", number, (len(rows), self.num_candidates, 2))
        random = points("random", number, (len(rows), self.num_points - self.num_uncertain, 2))
        kept = uncertain_points(sample_queries(masks, rows, candidates), candidates, self.num_uncertain)
        return torch.cat([kept, random], 1)


def average_targets(count: int, like: Tensor) -> Tensor:
    """Return the processes' mean number of targets, at least 1, as a scalar of the type and device of ``like``."""
    total = like.new_full((), count)
    all_reduce(total, op="mean")
    return total.clamp(min=1)
