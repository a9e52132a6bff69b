"""point_sample_mask_loss: what is measured, against which formulation.

First the ops alone, matching and loss of one set at given points and with a given matching; then the whole criterion of
Mask2Former with its backward pass, which draws points, samples candidates and solves assignments in both formulations.
There both draw the same points, from seeds. Which of two equally uncertain candidates is kept, rounding decides; hence the
criterion is held against float64 by its losses, the gradient of the class logits, and the sum of every mask's gradient.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.losses.mask2former import Mask2FormerCriterion
from densepred.ops import point_mask_losses, point_matching_costs, sample_points

NAME = "point_sample_mask_loss"
CLASSES, QUERIES = 133, 100
PURPOSES = ("matching", "candidates", "random")
POINTS, OVERSAMPLED, UNCERTAIN = 12544, 37632, 9408


def target_masks(images: int, most: int, side: int, random: Generator) -> Tensor:
    """Return (B, N, side, side) bool: ellipses of many sizes, the same N for every image."""
    y, x, height, width = torch.rand(4, most, 1, 1, generator=random)
    line = torch.arange(side) / side
    masks = ((line[:, None] - y) / (0.05 + height / 3)) ** 2 + ((line - x) / (0.05 + width / 3)) ** 2 < 1
    return masks.expand(images, -1, -1, -1)


def counts_of(images: int, most: int) -> list[int]:
    """Return how many of its targets every image has: from half of them on, all in the last image."""
    return [most - (images - 1 - image) % (most // 2 + 1) for image in range(images)]


# The ops alone --------------------------------------------------------------------------------------------------------


def one_set_inputs(
    batch: int, most: int, side: int, queries: int, points: int, random: Generator
) -> tuple[Tensor, ...]:
    """Return mask logits, targets, the points of the matching and of the loss, and every target's query."""
    counts = counts_of(batch, most)
    masks = 3 * torch.randn(1, queries, side // 4, side // 4, generator=random)
    matched = [image * queries + torch.randperm(queries, generator=random)[:n] for image, n in enumerate(counts)]
    return (
        masks.repeat(batch, 1, 1, 1),
        target_masks(batch, most, side, random),
        torch.rand(batch, points, 2, generator=random),
        torch.rand(sum(counts), points, 2, generator=random),
        torch.cat(matched),
    )


def one_set_by_ops(masks: Tensor, targets: Tensor, shared: Tensor, points: Tensor, rows: Tensor) -> Tensor:
    """Return the costs of all pairs and the losses of the matched ones, one after another."""
    shared, points = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (shared, points))
    targets = [target[:n] for target, n in zip(targets, counts_of(*targets.shape[:2]), strict=True)]
    costs = point_matching_costs([masks.detach()], targets, shared[:, None])
    at = points.split([len(target) for target in targets])
    samples = torch.cat([sample_points(target, part) for target, part in zip(targets, at, strict=True)])
    losses = point_mask_losses(sample_points(masks, points, rows), samples)
    return torch.cat([part.flatten() for part in (*costs, *losses)])


def one_set_by_grid_sample(masks: Tensor, targets: Tensor, shared: Tensor, points: Tensor, rows: Tensor) -> Tensor:
    """The same by the published formulation, image by image, with all targets as floats."""
    dtype = torch.promote_types(masks.dtype, torch.float32)
    shared, points = shared.to(dtype), points.to(dtype)
    targets = [target[:n].to(dtype) for target, n in zip(targets, counts_of(*targets.shape[:2]), strict=True)]
    pairs = zip(masks.detach().to(dtype), targets, shared, strict=True)
    bce, dice = zip(*(pair_costs(*pair) for pair in pairs), strict=True)
    x = sampled(masks.flatten(0, 1)[rows].to(dtype), points)
    costs = [torch.cat([cost.T.flatten() for cost in part]) for part in (bce, dice)]
    return torch.cat([*costs, *pair_losses(x, sampled(torch.cat(targets), points))])


def sampled(masks: Tensor, points: Tensor) -> Tensor:
    """Return samples (M, P) of masks (M, h, w) at points (M, P, 2)."""
    return F.grid_sample(masks[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def pair_costs(masks: Tensor, targets: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross entropy and dice cost, each (Q, N), of an image's queries with its targets at points (P, 2)."""
    x, y = (sampled(maps, points.expand(len(maps), -1, -1)) for maps in (masks, targets))
    positive = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    negative = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
    bce = torch.einsum("qp,np->qn", positive, y) + torch.einsum("qp,np->qn", negative, 1 - y)
    s = x.sigmoid()
    size = s.sum(1)[:, None] + y.sum(1)
    return bce / x.shape[1], 1 - (2 * torch.einsum("qp,np->qn", s, y) + 1) / (size + 1)


def pair_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return cross entropy and dice loss, each (M,), of samples (M, P)."""
    s = logits.sigmoid()
    dice = 1 - (2 * (s * targets).sum(1) + 1) / (s.sum(1) + targets.sum(1) + 1)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1), dice


# The criterion --------------------------------------------------------------------------------------------------------


class _Shift(torch.autograd.Function):
    """masks + offset where all offsets are 0: the masks themselves; what goes back is the sum of a mask's gradient."""

    @staticmethod
    def forward(ctx, offset: Tensor, masks: Tensor) -> Tensor:
        return masks.view_as(masks)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.sum((-2, -1)), None


def criterion_inputs(
    sets: int, batch: int, most: int, side: int, queries: int, random: Generator
) -> tuple[Tensor, ...]:
    """Return class logits, an offset of 0 for every mask, mask logits at a quarter of the side, labels and targets."""
    masks = 3 * torch.randn(queries, side // 4, side // 4, generator=random)
    return (
        torch.randn(sets, batch, queries, CLASSES + 1, generator=random),
        torch.zeros(sets, batch, queries),
        masks.expand(sets, batch, -1, -1, -1),
        torch.randint(CLASSES, (batch, most), generator=random),
        target_masks(batch, most, side, random),
    )


def seeded_points(device: torch.device, dtype: torch.dtype) -> Callable[[str, int, tuple[int, ...]], Tensor]:
    """Return a source of points for the criterion: float32 numbers whatever the type, the same in every call."""

    def points(name: str, number: int, shape: tuple[int, ...]) -> Tensor:
        random = torch.Generator(device).manual_seed(3 * number + PURPOSES.index(name))
        return torch.rand(shape, generator=random, device=device).to(dtype)

    return points


def criterion_by_ops(logits: Tensor, offset: Tensor, masks: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the sum of `Mask2FormerCriterion`'s terms."""
    pairs = zip(logits, offset, masks, strict=True)
    sets = [dict(pred_logits=c, pred_masks=_Shift.apply(o, m)) for c, o, m in pairs]
    counts = zip(labels, targets, counts_of(*labels.shape), strict=True)
    images = [dict(labels=label[:n], masks=target[:n]) for label, target, n in counts]
    points = seeded_points(masks.device, torch.promote_types(masks.dtype, torch.float32))
    return sum(Mask2FormerCriterion(CLASSES)(sets[0] | {"aux_outputs": sets[1:]}, images, points).values())


@torch.compiler.disable  # solvers on the host in every layer of every image: nothing to compile
def criterion_by_loop(logits: Tensor, offset: Tensor, masks: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The published criterion: layer by layer, matched image by image, targets padded to one tensor of floats."""
    dtype = torch.promote_types(masks.dtype, torch.float32)
    counts = zip(labels, targets, counts_of(*labels.shape), strict=True)
    images = [(label[:n], target[:n]) for label, target, n in counts]
    points = seeded_points(masks.device, dtype)
    total = 0
    for number, (layer, shift, mask) in enumerate(zip(logits, offset, masks, strict=True)):
        layer, mask = layer.to(dtype), _Shift.apply(shift, mask)
        pairs = match_by_image(
            layer.detach(), mask.detach(), images, points("matching", number, (len(mask), POINTS, 2))
        )
        total = total + layer_loss(layer, mask, images, pairs, partial(points, number=number))
    return total


def match_by_image(
    logits: Tensor, masks: Tensor, images: Sequence[tuple[Tensor, Tensor]], points: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return the matched queries and targets of every image, on the CPU, targets ascending."""
    pairs = []
    for layer, mask, (label, target), shared in zip(logits, masks, images, points, strict=True):
        classes = -layer.softmax(-1)[:, label]
        bce, dice = pair_costs(mask.to(layer.dtype), target.to(layer.dtype), shared)
        query, row = linear_sum_assignment((2 * classes + 5 * bce + 5 * dice).cpu())
        order = np.argsort(row)
        pairs.append((torch.from_numpy(query[order]), torch.from_numpy(row[order])))
    return pairs


def layer_loss(
    logits: Tensor,
    masks: Tensor,
    images: Sequence[tuple[Tensor, Tensor]],
    pairs: Sequence[tuple[Tensor, Tensor]],
    points: Callable[..., Tensor],
) -> Tensor:
    """Return the weighted sum of a layer's three losses."""
    image = torch.cat([torch.full_like(query, b) for b, (query, _) in enumerate(pairs)])
    query, target = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    classes = torch.full(logits.shape[:2], CLASSES, device=logits.device)
    matched = [label[row.to(label.device)] for (label, _), (_, row) in zip(images, pairs, strict=True)]
    classes[image, query] = torch.cat(matched)
    weight = torch.ones(CLASSES + 1, dtype=logits.dtype, device=logits.device)
    weight[-1] = 0.1
    ce = F.cross_entropy(logits.transpose(1, 2), classes, weight)

    chosen = masks[image, query].to(logits.dtype)  # (T, h, w)
    most = max(len(label) for label, _ in images)
    padded = images[0][1].new_zeros(len(images), most, *images[0][1].shape[1:])
    for slot, (_, mask) in zip(padded, images, strict=True):
        slot[: len(mask)].copy_(mask)
    goals = padded.to(logits.dtype)[image, target]  # (T, H, W)
    with torch.no_grad():
        candidates = points("candidates", shape=(len(chosen), OVERSAMPLED, 2))
        index = (-sampled(chosen, candidates).abs()).topk(UNCERTAIN, dim=1).indices
        kept = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        at = torch.cat([kept, points("random", shape=(len(chosen), POINTS - UNCERTAIN, 2))], 1)
        goals = sampled(goals, at)
    bce, dice = pair_losses(sampled(chosen, at), goals)
    return 2 * ce + 5 * (bce.sum() + dice.sum()) / max(len(chosen), 1)


def _one_set_case(batch: int, most: int, side: int, devices: tuple[str, ...]) -> OpCase:
    return OpCase(
        NAME,
        f"costs and losses, batch {batch}, up to {most} targets of {side}x{side}, {QUERIES} queries",
        "grid_sample, einsum",
        partial(one_set_inputs, batch, most, side, QUERIES, POINTS),
        one_set_by_ops,
        one_set_by_grid_sample,
        (0,),
        devices=devices,
    )


def _criterion_case(sets: int, batch: int, most: int, side: int, devices: tuple[str, ...]) -> OpCase:
    return OpCase(
        NAME,
        f"criterion, {sets} layers, batch {batch}, up to {most} targets of {side}x{side}, {QUERIES} queries",
        "a loop over layers and images",
        partial(criterion_inputs, sets, batch, most, side, QUERIES),
        criterion_by_ops,
        criterion_by_loop,
        (0, 1),
        devices=devices,
    )


CASES: tuple[OpCase, ...] = (
    _one_set_case(2, 12, 512, ("cpu", "cuda")),
    _one_set_case(16, 40, 1024, ("cuda",)),
    _criterion_case(10, 2, 12, 512, ("cpu", "cuda")),
    _criterion_case(10, 16, 20, 512, ("cuda",)),
    _criterion_case(10, 16, 40, 1024, ("cuda",)),
)
