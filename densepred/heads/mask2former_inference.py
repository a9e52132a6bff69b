"""Post-processing of Mask2Former: from class and mask logits to panoptic, semantic and instance results.

Cheng et al. (CVPR 2022); the numbers are those of github.com/facebookresearch/Mask2Former (commit 9b0651c), but for the
boxes of the instances, which are zeros there. Mask logits go to the file's size band by band (see `resizing`), of the queries
that matter only.

Letters: Q queries, K those that matter, C classes, h w the head's map, H W the file's size, n the rows of a band.
"""

from collections.abc import Collection, Iterator

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from densepred.heads.kmax_inference import mask_boxes
from densepred.heads.resizing import Size, resize_to_file
from densepred.ops.linear_resize import linear_taps, logit_bands, resized, row_bands, swapped
from densepred.ops.mask_argmax import mask_argmax, mask_owner, mask_score_bands, mask_scores, padded_classes
from densepred.ops.precision import upcast
from densepred.structures import PanopticMap

EPSILON = 1e-6
"""Guard of an instance's mean mask probability."""


@torch.no_grad()
def panoptic_inference(
    pred_logits: Tensor,
    mask_logits: Tensor,
    pad_shape: Size,
    img_shape: Size,
    ori_shape: Size,
    thing_classes: Collection[int],
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
) -> PanopticMap:
    """Give each pixel to one sure query, then keep the queries that got most of their mask.

    Queries of void or with a class score of at most ``object_mask_threshold`` are dropped. A pixel's owner is the query
    with the largest class score times mask probability. In query order, a query becomes a segment where it owns pixels
    with a mask probability of at least a half, if it owns (at any probability) at least ``overlap_threshold`` times as
    many pixels as have that probability; a stuff class found again joins its first segment.

    Args:
        pred_logits: (Q, C + 1) class logits of one image, void last.
        mask_logits: (Q, h, w).
        pad_shape: (height, width) of the network's input.
        img_shape: (height, width) after the resize, before padding.
        ori_shape: (H, W) of the file, the size of the result.
        thing_classes: The classes that are things.
        object_mask_threshold: Class score that a query must exceed, 0..1.
        overlap_threshold: See above, 0..1.

    Returns:
        (H, W) int32 ids from 1, 0 = void. A record's ``score`` is the class score; that of joined stuff is its first
        query's.
    """
    scores, labels = upcast(pred_logits).softmax(-1).max(-1)  # (Q,)
    sure = ((labels < pred_logits.shape[-1] - 1) & (scores > object_mask_threshold)).nonzero()[:, 0]  # (K,)
    if not len(sure):
        return PanopticMap(torch.zeros(ori_shape, dtype=torch.int32, device=mask_logits.device), [])
    scores, labels, things = scores[sure], labels[sure].tolist(), set(thing_classes)
    candidates = [
        dict(label=label, isthing=label in things, iscrowd=False, score=score)
        for label, score in zip(labels, scores.tolist(), strict=True)
    ]
    resizes = resize_to_file(mask_logits, pad_shape, img_shape, ori_shape)
    ids, areas = mask_owner(mask_logits[sure], scores, *resizes)  # (H, W), (K, 3)
    numbers, segments = _walk(areas.tolist(), candidates, overlap_threshold)
    table = torch.tensor([0, *numbers], dtype=torch.int32, device=ids.device)
    for band in row_bands(ids.shape[0], 8 * ids.shape[1], 0, ids.device):
        ids[band] = table[ids[band]]
    return PanopticMap(ids, segments)


def _walk(areas: list[list[int]], candidates: list[dict], overlap_threshold: float) -> tuple[list[int], list[dict]]:
    """Return each query's segment number, 0 = none, and the records of the segments."""
    numbers, segments, stuff = [], [], {}
    for (owned, written, strong), candidate in zip(areas, candidates, strict=True):
        if not written or owned / strong < overlap_threshold:  # what is written is owned and strong
            numbers.append(0)
            continue
        label = candidate["label"]
        number = None if candidate["isthing"] else stuff.get(label)
        if number is None:
            number = len(segments) + 1
            segments.append(dict(id=number, **candidate))
            if not candidate["isthing"]:
                stuff[label] = number
        numbers.append(number)
    return numbers, segments


@torch.no_grad()
def semantic_inference(
    pred_logits: Tensor, mask_logits: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size, alone: bool
) -> Tensor:
    """Return each pixel's best class (H, W) int64; the arguments are those of `semantic_scores`."""
    probs = _class_probabilities(pred_logits)
    if not _resizes_scores(alone, img_shape, ori_shape):
        return mask_argmax(mask_logits, probs, *resize_to_file(mask_logits, pad_shape, img_shape, ori_shape))
    labels = torch.empty(ori_shape, dtype=torch.int64, device=mask_logits.device)
    for band, scores in _resized_score_bands(mask_logits, probs, pad_shape, img_shape, ori_shape):
        labels[band] = scores.argmax(-1).T
    return labels


@torch.no_grad()
def semantic_scores(
    pred_logits: Tensor, mask_logits: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size, alone: bool
) -> Tensor:
    """Return each pixel's class scores (C, H, W): class times mask probabilities, summed over the queries; no distribution.

    Args:
        pred_logits: (Q, C + 1) class logits of one image, void last.
        mask_logits: (Q, h, w).
        pad_shape: (height, width) of the network's input.
        img_shape: (height, width) after the resize, before padding.
        ori_shape: (H, W) of the file, the size of the result.
        alone: Semantic segmentation is the only task: the scores are made at the padded size, then cropped and resized.
            Otherwise the mask logits are, and the scores differ.
    """
    probs = _class_probabilities(pred_logits)
    if _resizes_scores(alone, img_shape, ori_shape):
        bands = _resized_score_bands(mask_logits, probs, pad_shape, img_shape, ori_shape)
    else:
        bands = mask_score_bands(mask_logits, probs, *resize_to_file(mask_logits, pad_shape, img_shape, ori_shape))
    size = (probs.shape[1], *ori_shape)
    result = torch.empty(size, dtype=upcast(mask_logits[:0]).dtype, device=mask_logits.device)
    for band, scores in bands:
        result[:, band] = scores.permute(2, 1, 0)
    return result


def _class_probabilities(pred_logits: Tensor) -> Tensor:
    """Return (Q, C), without void."""
    return upcast(pred_logits).softmax(-1)[:, :-1]


def _resizes_scores(alone: bool, img_shape: Size, ori_shape: Size) -> bool:
    return alone and tuple(img_shape) != tuple(ori_shape)


def _resized_score_bands(
    mask_logits: Tensor, probs: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size
) -> Iterator[tuple[slice, Tensor]]:
    """Yield bands of rows and their scores (W, n, C), those of the padded input, cropped and resized."""
    num_classes, probs = probs.shape[1], padded_classes(probs)  # (Q, C')
    inner_rows, inner_columns = resize_to_file(mask_logits, pad_shape, img_shape, img_shape)
    rows, columns = (linear_taps(n_in, n_out) for n_in, n_out in zip(img_shape, ori_shape, strict=True))
    queries, classes = probs.shape
    columns = columns.on(probs)
    inner = max(img_shape[1], ori_shape[1]) * (classes + max(queries, classes)) + 2 * mask_logits.shape[2] * queries
    item, ratio = probs.element_size(), img_shape[0] / ori_shape[0]
    per_row = item * (ratio * inner + ori_shape[1] * (2 * classes + 4))
    for band in row_bands(ori_shape[0], per_row, 2 * item * inner, probs.device):
        needed, taps = rows[band].narrowed()
        taps = taps.on(probs)
        # One expression, so that each step's input is freed at once: (w', m, Q or C'), (W, m, C'), (m, W, C'), (n, W, C').
        yield (
            band,
            taps.apply(
                swapped(columns.apply(mask_scores(resized(mask_logits, inner_rows[needed], inner_columns), probs)))
            ).transpose(0, 1)[..., :num_classes],  # (W, n, C)
        )


@torch.no_grad()
def instance_inference(
    pred_logits: Tensor,
    mask_logits: Tensor,
    pad_shape: Size,
    img_shape: Size,
    ori_shape: Size,
    thing_classes: Collection[int] | None,
    max_instances: int = 100,
) -> InstanceData:
    """Return one image's best (query, class) pairs as instances, sorted by score.

    Args:
        pred_logits: (Q, C + 1) class logits of one image, void last.
        mask_logits: (Q, h, w).
        pad_shape: (height, width) of the network's input.
        img_shape: (height, width) after the resize, before padding.
        ori_shape: (H, W) of the file, the size of the masks.
        thing_classes: Keep only these of the best pairs (the panoptic task is on too); None keeps all.
        max_instances: (query, class) pairs that are looked at.

    Returns:
        ``scores`` (N,): class probability times the mean probability inside the mask, descending; ``labels`` (N,) int64;
        ``masks`` (N, H, W) bool, where the logit is positive, may overlap or be empty; ``bboxes`` (N, 4) float32 xyxy,
        see `mask_boxes`. N <= max_instances.
    """
    class_probs = _class_probabilities(pred_logits)  # (Q, C)
    num_classes = class_probs.shape[1]
    scores, pairs = class_probs.flatten().topk(min(max_instances, class_probs.numel()))
    labels = pairs % num_classes
    if thing_classes is not None:
        things = torch.tensor(sorted(thing_classes), dtype=torch.int64, device=labels.device)
        kept = torch.isin(labels, things)  # (N',)
        scores, labels, pairs = scores[kept], labels[kept], pairs[kept]
    queries, slot = (pairs // num_classes).unique(return_inverse=True)  # (K,), (N,)
    masks, means = _instance_masks(mask_logits[queries], slot, pad_shape, img_shape, ori_shape)
    scores, order = (scores * means[slot]).sort(descending=True, stable=True)
    for band in row_bands(masks.shape[1], masks.shape[0] * masks.shape[2], 0, masks.device):
        masks[:, band] = masks[order, band]
    return InstanceData(scores=scores, labels=labels[order], masks=masks, bboxes=mask_boxes(masks))


def _instance_masks(
    mask_logits: Tensor, slot: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size
) -> tuple[Tensor, Tensor]:
    """Return where the logits of queries (K, h, w) are positive, and the mean probability there.

    Returns:
        (N, H, W) bool, by ``slot`` (N,), which says whose mask it is; (K,).
    """
    queries = len(mask_logits)
    masks = torch.empty((len(slot), *ori_shape), dtype=torch.bool, device=mask_logits.device)
    sums = torch.zeros(2, queries, dtype=torch.float64, device=mask_logits.device)
    if not queries:
        return masks, sums[0].to(upcast(mask_logits).dtype)
    rows, columns = resize_to_file(mask_logits, pad_shape, img_shape, ori_shape)
    for band, logits in logit_bands(mask_logits, rows, columns, 3 * queries + len(slot)):
        inside = logits > 0  # (W, n, K)
        masks[:, band] = inside.permute(2, 1, 0)[slot]
        sums[0] += _count(inside)
        sums[1] += logits.sigmoid_().mul_(inside).sum((0, 1))
    return masks, (sums[1] / (sums[0] + EPSILON)).to(upcast(mask_logits[:0]).dtype)


def _count(mask: Tensor) -> Tensor:
    """Return how many of (W, n, K) are true (K,); a band is small enough for float32 to be exact, and that is faster."""
    return mask.float().sum((0, 1))
