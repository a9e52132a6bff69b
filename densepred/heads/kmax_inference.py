"""Post-processing of kMaX-DeepLab: from class and mask logits to panoptic, semantic and instance results.

Follows github.com/bytedance/kmax-deeplab (commit f8e1d04) number for number, but for the boxes of the instances, which are
zeros there. Letters: Q queries, C classes, h w the head's map, H W the file's size.
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor

from densepred.ops.precision import upcast
from densepred.structures import PanopticMap

MAX_INSTANCES = 100
"""(query, class) pairs an image that instance inference looks at."""
EPSILON = 1e-6
"""Guard of an instance's mean mask probability."""

Size = tuple[int, int]


def resize_mask_logits(mask_logits: Tensor, pad_shape: Size, ori_shape: Size, img_shape: Size) -> Tensor:
    """Undo the head's stride, the padding and the test-time resize.

    The published models scale an image's longer side to that of their padded input; the valid part is then
    round(H s), round(W s), s = longest padded side / longest side of the file, halves to the even number (so 1024 rows
    shown at 1025 lose the last one, as in the official code). An image resized otherwise is cropped to ``img_shape``,
    where the official formula would cut at the wrong place.

    Args:
        mask_logits: (Q, h, w) of one image.
        pad_shape: (height, width) of the network's input.
        ori_shape: (H, W) of the file, the size of the result.
        img_shape: (height, width) after the resize, before padding.

    Returns:
        (Q, H, W) logits, at least float32; bilinear twice, corners aligned where the padded width is odd.
    """
    align = pad_shape[1] % 2 == 1
    height, width = _valid_size(pad_shape, ori_shape, img_shape)
    padded = _resize(mask_logits, pad_shape, align)  # (Q, *pad_shape)
    return _resize(padded[:, :height, :width], ori_shape, align)


def _valid_size(pad_shape: Size, ori_shape: Size, img_shape: Size) -> Size:
    if max(img_shape) != max(pad_shape):
        return img_shape
    scale = max(pad_shape) / max(ori_shape)
    return max(1, round(ori_shape[0] * scale)), max(1, round(ori_shape[1] * scale))


def _resize(maps: Tensor, size: Size, align_corners: bool) -> Tensor:
    return F.interpolate(upcast(maps)[None], size=tuple(size), mode="bilinear", align_corners=align_corners)[0]


def panoptic_inference(
    pred_logits: Tensor,
    mask_logits: Tensor,
    thing_classes: Collection[int] | Tensor,
    thing_threshold: float = 0.7,
    stuff_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    pixel_threshold: float = 0.4,
    class_power: float = 1.0,
    mask_power: float = 1.0,
) -> PanopticMap:
    """Paste one image's queries, the surest first, on an empty canvas.

    A query is pasted if its class score exceeds the threshold of its kind and more than ``overlap_threshold`` of its
    pixels are still free. A stuff class found again joins its first segment. The defaults are COCO's; there is no filter
    of small segments.

    Args:
        pred_logits: (Q, C + 1) class logits, void last.
        mask_logits: (Q, H, W) at the size of the result.
        thing_classes: the classes that are things, as numbers or as a (C,) bool tensor.
        thing_threshold: least class score of a thing, 0..1.
        stuff_threshold: least class score of stuff, 0..1.
        overlap_threshold: share of a query's pixels that must be free, 0..1.
        pixel_threshold: least probability (softmax over the queries) of a query's pixels, 0..1.
        class_power: exponent of the class score in the order of pasting.
        mask_power: exponent of the mask score (mean probability of the query's pixels) in the order of pasting.

    Returns:
        (H, W) int32 ids from 1, 0 = void. A record's ``score`` is what the order of pasting goes by; that of joined stuff
        is its first query's.
    """
    scores, labels = upcast(pred_logits).softmax(-1)[:, :-1].max(-1)  # (Q,)
    isthing = _thing_table(thing_classes, pred_logits.shape[-1] - 1, pred_logits.device)[labels]  # (Q,)
    sure = (scores > torch.where(isthing, thing_threshold, stuff_threshold)).nonzero()[:, 0]  # (K,)
    masks, mask_scores = _binary_masks(mask_logits, sure, pixel_threshold)  # (K, H, W), (K,)
    ranks = scores[sure] ** class_power * mask_scores**mask_power
    order = ranks.argsort(descending=True, stable=True)
    candidates = [
        dict(label=label, isthing=thing, iscrowd=False, score=score)
        for label, thing, score in zip(
            labels[sure][order].tolist(), isthing[sure][order].tolist(), ranks[order].tolist(), strict=True
        )
    ]
    return _paste(masks[order], candidates, overlap_threshold)


def _thing_table(thing_classes: Collection[int] | Tensor, num_classes: int, device: torch.device) -> Tensor:
    """Return (C,) bool."""
    if isinstance(thing_classes, Tensor):
        return thing_classes.to(device, torch.bool)
    table = torch.zeros(num_classes, dtype=torch.bool, device=device)
    table[list(thing_classes)] = True
    return table


def _binary_masks(
    mask_logits: Tensor, queries: Tensor, threshold: float, epsilon: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the masks (K, H, W) bool of some queries (K,) and the mean probability (K,) of each one's pixels.

    The softmax runs over all the queries, but only the chosen ones become masks.
    """
    logits = upcast(mask_logits)
    probs = (logits[queries] - logits.logsumexp(0)).exp()  # (K, H, W)
    masks = probs > threshold
    areas = masks.sum((1, 2))
    means = (probs * masks).sum((1, 2)) / (areas + epsilon if epsilon else areas.clamp(min=1))
    return masks, means


def _paste(masks: Tensor, candidates: list[dict], overlap_threshold: float) -> PanopticMap:
    ids = torch.zeros(masks.shape[1:], dtype=torch.int32, device=masks.device)  # (H, W)
    free = torch.ones_like(ids, dtype=torch.bool)
    areas = masks.sum((1, 2)).tolist()
    segments, stuff = [], {}
    for mask, area, candidate in zip(masks, areas, candidates, strict=True):
        visible = mask & free
        if int(visible.sum()) <= overlap_threshold * area:
            continue
        label = candidate["label"]
        number = None if candidate["isthing"] else stuff.get(label)
        if number is None:
            number = len(segments) + 1
            segments.append(dict(id=number, **candidate))
            if not candidate["isthing"]:
                stuff[label] = number
        ids[visible] = number
        free &= ~mask
    return PanopticMap(ids, segments)


def semantic_inference(pred_logits: Tensor, mask_logits: Tensor) -> Tensor:
    """Return each pixel's class scores (C, H, W): class times mask probabilities, summed over the queries.

    Args:
        pred_logits: (Q, C + 1) class logits, void last.
        mask_logits: (Q, H, W) at the size of the result.
    """
    class_probs = upcast(pred_logits).softmax(-1)[:, :-1]  # (Q, C)
    return torch.einsum("qc,qhw->chw", class_probs, upcast(mask_logits).softmax(0))


def instance_inference(
    pred_logits: Tensor, mask_logits: Tensor, thing_classes: Collection[int] | Tensor, pixel_threshold: float = 0.4
) -> InstanceData:
    """Return the things among one image's best (query, class) pairs, best class probability first.

    Args:
        pred_logits: (Q, C + 1) class logits, void last.
        mask_logits: (Q, H, W) at the size of the result.
        thing_classes: the classes that are things, as numbers or as a (C,) bool tensor.
        pixel_threshold: least probability (softmax over the queries) of an instance's pixels, 0..1.

    Returns:
        ``scores`` (N,): class probability times the mean probability of the mask's pixels; ``labels`` (N,) int64;
        ``masks`` (N, H, W) bool, may overlap or be empty; ``bboxes`` (N, 4) xyxy, see `mask_boxes`. N <= 100.
    """
    class_probs = upcast(pred_logits).softmax(-1)[:, :-1]  # (Q, C)
    num_classes = class_probs.shape[1]
    scores, pairs = class_probs.flatten().topk(min(MAX_INSTANCES, class_probs.numel()))
    labels = pairs % num_classes
    kept = _thing_table(thing_classes, num_classes, pred_logits.device)[labels]  # (N',)
    scores, labels = scores[kept], labels[kept]
    queries, slot = (pairs[kept] // num_classes).unique(return_inverse=True)
    masks, means = _binary_masks(mask_logits, queries, pixel_threshold, EPSILON)
    boxes = mask_boxes(masks)
    return InstanceData(scores=scores * means[slot], labels=labels, masks=masks[slot], bboxes=boxes[slot])


def mask_boxes(masks: Tensor) -> Tensor:
    """Return the boxes (N, 4) float32 xyxy around masks (N, H, W) bool, in pixels, right and bottom edge exclusive.

    An empty mask has the box 0 0 0 0.
    """
    edges = []
    for axis in (1, 2):  # over the rows: columns in use; over the columns: rows in use
        used = masks.any(axis).to(torch.int32)  # (N, W) or (N, H)
        first, last = used.argmax(1), used.shape[1] - used.flip(1).argmax(1)
        edges.append((first, last))
    boxes = torch.stack([edges[0][0], edges[1][0], edges[0][1], edges[1][1]], 1).float()
    return boxes * masks.any(2).any(1)[:, None]
