"""Post-processing of Mask2Former: from class and mask logits to panoptic, semantic and instance results.

Cheng et al. (CVPR 2022); the numbers are those of github.com/facebookresearch/Mask2Former (commit 9b0651c), but for the
boxes of the instances, which are zeros there. Mask logits are resized to the padded input, cropped to the image and
resized to the file, both times bilinearly without aligned corners; both steps together are one weighted sum of a few
rows, then of a few columns, of the head's map. That sum is taken for a band of the file's rows at a time, of the queries
that matter only, so that no full-size map of logits ever exists.

Letters: Q queries, K those that matter, C classes, h w the head's map, H W the file's size, n the rows of a band.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor

from densepred.decoders.kmax import upcast
from densepred.heads.kmax_inference import mask_boxes
from densepred.structures import PanopticMap

BAND_BYTES = 64 << 20
"""What all temporary tensors of a band may take together on an accelerator (at least one row is done at a time)."""
CPU_BAND_BYTES = 24 << 20
"""The same on the CPU, where a band that stays in the cache is up to twice as fast."""
EPSILON = 1e-6
"""Guard of an instance's mean mask probability."""
CLASS_MULTIPLE = 16
"""The matrix product is faster with rows of a multiple of this many classes; those added have probability 0."""

Size = tuple[int, int]


@dataclass(frozen=True)
class Taps:
    """A resize along one axis: output i is the sum of ``weights[i, t] * input[indices[i, t]]`` over t.

    Attributes:
        indices: (n_out, T) int64.
        weights: (n_out, T), each row sums to 1.
    """

    indices: Tensor
    weights: Tensor

    def __getitem__(self, outputs: slice) -> "Taps":
        return Taps(self.indices[outputs], self.weights[outputs])

    def then(self, second: "Taps") -> "Taps":
        """Return both resizes as one; the second may read the first's beginning only (a crop)."""
        weights = second.weights[:, :, None] * self.weights[second.indices]  # (n_out, T2, T1)
        return Taps(self.indices[second.indices].flatten(1), weights.flatten(1))

    def narrowed(self) -> tuple[slice, "Taps"]:
        """Return the inputs that are needed, and the resize that reads from those alone."""
        first, last = int(self.indices.min()), int(self.indices.max())
        return slice(first, last + 1), Taps(self.indices - first, self.weights)

    def on(self, tensor: Tensor) -> "Taps":
        """Return the resize on a tensor's device and in its type."""
        device = tensor.device
        return Taps(
            self.indices.to(device, non_blocking=True), self.weights.to(device, tensor.dtype, non_blocking=True)
        )

    def apply(self, x: Tensor) -> Tensor:
        """Resize the first axis of (n_in, A, B), contiguous, to (n_out, A, B)."""
        # An embedding bag is a weighted sum of rows in one pass over memory, 4 times faster than gathering and adding.
        flat = F.embedding_bag(self.indices, x.flatten(1), per_sample_weights=self.weights, mode="sum")
        return flat.view(-1, *x.shape[1:])


def bilinear_taps(n_in: int, n_out: int) -> Taps:
    """Return the linear resize of one axis, corners not aligned, in float64 on the CPU."""
    if n_in == n_out:
        return Taps(torch.arange(n_in)[:, None], torch.ones(n_in, 1, dtype=torch.float64))
    centres = (torch.arange(n_out, dtype=torch.float64) + 0.5) * (n_in / n_out) - 0.5
    centres = centres.clamp(min=0)
    low = centres.long().clamp(max=n_in - 1)
    high = (low + 1).clamp(max=n_in - 1)
    weight = centres - low
    return Taps(torch.stack([low, high], 1), torch.stack([1 - weight, weight], 1))


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
    ids = torch.zeros(ori_shape, dtype=torch.int32, device=mask_logits.device)  # (H, W)
    if not len(sure):
        return PanopticMap(ids, [])
    scores, labels, things = scores[sure], labels[sure].tolist(), set(thing_classes)
    candidates = [
        dict(label=label, isthing=label in things, iscrowd=False, score=score)
        for label, score in zip(labels, scores.tolist(), strict=True)
    ]
    rows, columns = _taps(mask_logits, pad_shape, img_shape, ori_shape)
    areas = _assign_pixels(ids, _logit_bands(mask_logits[sure], rows, columns, 4 * len(sure) + 8), scores)
    numbers, segments = _walk(areas.tolist(), candidates, overlap_threshold)
    table = torch.tensor([0, *numbers], dtype=torch.int32, device=ids.device)
    for band in _row_bands(ids.shape[0], 8 * ids.shape[1], 0, ids.device):
        ids[band] = table[ids[band]]
    return PanopticMap(ids, segments)


def _assign_pixels(ids: Tensor, bands: Iterator[tuple[slice, Tensor]], scores: Tensor) -> Tensor:
    """Write owner + 1 into ``ids`` where the owner's probability is at least a half; return the areas (K, 3).

    These are, by query, the pixels it owns, those written, and those where it has that probability.
    """
    queries = len(scores)
    areas = torch.zeros(3, queries, dtype=torch.int64, device=ids.device)
    for band, logits in bands:
        probs = logits.sigmoid_()  # (W, n, K)
        owner = (probs * scores).argmax(-1, keepdim=True)  # (W, n, 1)
        written = torch.where(probs.gather(-1, owner) >= 0.5, owner + 1, 0)[..., 0]  # (W, n), 0 = nobody
        ids[band] = written.T
        areas[0] += owner.flatten().bincount(minlength=queries)
        areas[1] += written.flatten().bincount(minlength=queries + 1)[1:]
        areas[2] += _count(probs >= 0.5).long()
    return areas.T


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
    labels = torch.empty(ori_shape, dtype=torch.int64, device=mask_logits.device)
    for band, scores in _score_bands(pred_logits, mask_logits, pad_shape, img_shape, ori_shape, alone):
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
    size = (pred_logits.shape[-1] - 1, *ori_shape)
    result = torch.empty(size, dtype=upcast(mask_logits[:0]).dtype, device=mask_logits.device)
    for band, scores in _score_bands(pred_logits, mask_logits, pad_shape, img_shape, ori_shape, alone):
        result[:, band] = scores.permute(2, 1, 0)
    return result


@torch.no_grad()
def _score_bands(
    pred_logits: Tensor, mask_logits: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size, alone: bool
) -> Iterator[tuple[slice, Tensor]]:
    """Yield bands of rows and their class scores (W, n, C)."""
    num_classes = pred_logits.shape[-1] - 1
    probs = F.pad(upcast(pred_logits).softmax(-1)[:, :-1], (0, -num_classes % CLASS_MULTIPLE))  # (Q, C'), C' >= C
    if alone and tuple(img_shape) != tuple(ori_shape):
        bands = _resized_score_bands(mask_logits, probs, pad_shape, img_shape, ori_shape)
    else:
        rows, columns = _taps(mask_logits, pad_shape, img_shape, ori_shape)
        values = sum(probs.shape) + max(probs.shape) + 4  # the last band lives until its loop variable is bound anew
        logits = _logit_bands(mask_logits, rows, columns, values)
        bands = ((band, _scores(x, probs)) for band, x in logits)
    for band, scores in bands:
        yield band, scores[..., :num_classes]


def _resized_score_bands(
    mask_logits: Tensor, probs: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size
) -> Iterator[tuple[slice, Tensor]]:
    """Yield bands of the scores (W, n, C') of the padded input, cropped and resized."""
    inner_rows, inner_columns = _taps(mask_logits, pad_shape, img_shape, img_shape)
    rows, columns = (bilinear_taps(n_in, n_out) for n_in, n_out in zip(img_shape, ori_shape, strict=True))
    queries, classes = probs.shape
    columns = columns.on(probs)
    inner = max(img_shape[1], ori_shape[1]) * (classes + max(queries, classes)) + 2 * mask_logits.shape[2] * queries
    item, ratio = probs.element_size(), img_shape[0] / ori_shape[0]
    per_row = item * (ratio * inner + ori_shape[1] * (2 * classes + 4))
    for band in _row_bands(ori_shape[0], per_row, 2 * item * inner, probs.device):
        needed, taps = rows[band].narrowed()
        taps = taps.on(probs)
        # One expression, so that each step's input is freed at once: (w', m, Q or C'), (W, m, C'), (m, W, C'), (n, W, C').
        yield (
            band,
            taps.apply(
                _swapped(columns.apply(_scores(_resized(mask_logits, inner_rows[needed], inner_columns), probs)))
            ).transpose(0, 1),  # (W, n, C')
        )


def _scores(logits: Tensor, probs: Tensor) -> Tensor:
    """Return the scores (W, n, C') of mask logits (W, n, Q), which are overwritten, also under autocast in full precision."""
    with torch.autocast(logits.device.type, enabled=False):
        return logits.sigmoid_() @ probs


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
    class_probs = upcast(pred_logits).softmax(-1)[:, :-1]  # (Q, C)
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
    for band in _row_bands(masks.shape[1], masks.shape[0] * masks.shape[2], 0, masks.device):
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
    rows, columns = _taps(mask_logits, pad_shape, img_shape, ori_shape)
    for band, logits in _logit_bands(mask_logits, rows, columns, 3 * queries + len(slot)):
        inside = logits > 0  # (W, n, K)
        masks[:, band] = inside.permute(2, 1, 0)[slot]
        sums[0] += _count(inside)
        sums[1] += logits.sigmoid_().mul_(inside).sum((0, 1))
    return masks, (sums[1] / (sums[0] + EPSILON)).to(upcast(mask_logits[:0]).dtype)


def _taps(mask_logits: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size) -> tuple[Taps, Taps]:
    """Return the resize of the rows (on the CPU, where bands are cut) and of the columns from the map to the file."""
    rows, columns = (
        bilinear_taps(small, padded).then(bilinear_taps(image, file))
        for small, padded, image, file in zip(mask_logits.shape[-2:], pad_shape, img_shape, ori_shape, strict=True)
    )
    return rows, columns.on(upcast(mask_logits[:0]))


def _logit_bands(
    mask_logits: Tensor, rows: Taps, columns: Taps, values_per_pixel: int
) -> Iterator[tuple[slice, Tensor]]:
    """Yield bands of the file's rows and their logits (W, n, K), which the caller may overwrite.

    Args:
        mask_logits: (K, h, w).
        rows: Resize to H.
        columns: Resize to W.
        values_per_pixel: What the caller holds of a pixel at once, these logits included, in units of a logit.
    """
    queries, h, w = mask_logits.shape
    height, width = len(rows.indices), len(columns.indices)
    item = columns.weights.element_size()
    low = 2 * item * queries * w  # a row of the head's map, and its copy
    per_row = low * (1 + h / height) + item * width * values_per_pixel
    for band in _row_bands(height, per_row, 3 * low, mask_logits.device):
        yield band, _resized(mask_logits, rows[band], columns)


def _row_bands(height: int, per_row: float, fixed: float, device: torch.device) -> Iterator[slice]:
    """Cut rows into bands of ``fixed`` + n ``per_row`` bytes within the bound, n at least 1."""
    bound = CPU_BAND_BYTES if device.type == "cpu" else BAND_BYTES
    step = max(1, int((bound - fixed) / max(per_row, 1)))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def _resized(mask_logits: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Return (n_columns, n_rows, K) of (K, h, w): queries last, so that all steps run over contiguous memory."""
    needed, rows = rows.narrowed()
    low = upcast(mask_logits[:, needed].permute(1, 2, 0).contiguous())  # (m, w, K)
    return columns.apply(_swapped(rows.on(low).apply(low)))


def _swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()


def _count(mask: Tensor) -> Tensor:
    """Return how many of (W, n, K) are true (K,); a band is small enough for float32 to be exact, and that is faster."""
    return mask.float().sum((0, 1))
