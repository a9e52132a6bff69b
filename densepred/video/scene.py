"""What a frame shows, in the form that is quick to draw: one map of small numbers and a list of objects."""

from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.ndimage import find_objects

from densepred.ops.polygon_fill import FARTHEST, SHIFT, fixed_point
from densepred.structures import InstanceData, PanopticMap, SegSample

MAX_ITEMS = 255
"""Objects and areas of one frame; what comes after them, by score, is not drawn."""


class Item(NamedTuple):
    """An object or an area.

    Attributes:
        label: its class.
        thing: whether it is an object with an identity.
        score: 0..1, where the model tells.
        box: (4,) xyxy pixels; of an area, of a coarse map.
        polygon: (V, 2) xy pixels, where the model gives one.
    """

    label: int
    thing: bool
    score: float | None
    box: np.ndarray
    polygon: np.ndarray | None = None


@dataclass
class Scene:
    """A frame's objects and areas.

    Attributes:
        index: (H, W) uint8, ``k`` where ``items[k - 1]`` is seen, 0 where nothing is.
        items: at most 255; one may be hidden behind others and be seen nowhere.
    """

    index: np.ndarray
    items: list[Item] = field(default_factory=list)


def make_scene(sample: SegSample, size: tuple[int, int], score_threshold: float) -> Scene:
    """Take a scene from what a model predicted: panoptic, else semantic, else instances.

    Args:
        sample: from `densepred.inference.predict_image`, at the frame's size.
        size: (H, W) of the frame.
        score_threshold: instances below it, 0..1, are left out.

    Raises:
        ValueError: the sample has no prediction.
    """
    if "pred_panoptic" in sample:
        return _panoptic_scene(sample.pred_panoptic)
    if "pred_semantic" in sample:
        return _semantic_scene(sample.pred_semantic)
    if "pred_instances" in sample:
        found = sample.pred_instances
        chosen = torch.nonzero(found.scores >= score_threshold)[:, 0]
        best = chosen[found.scores[chosen].argsort(descending=True, stable=True)][:MAX_ITEMS]
        found = found[best].cpu()
        return _polygon_scene(found, size) if "polygons" in found else _mask_scene(found, size)
    raise ValueError(f"the model predicts {', '.join(sample.keys()) or 'nothing'}; a video shows a segmentation")


def _semantic_scene(labels: torch.Tensor) -> Scene:
    """Take a scene from (H, W) classes; 255 is void."""
    labels = labels.to(torch.uint8).cpu().numpy()
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256)[:255])
    table = np.zeros(256, np.uint8)
    table[present] = np.arange(1, len(present) + 1)
    index = cv2.LUT(labels, table)
    boxes = boxes_of(index, len(present))
    return Scene(index, [Item(int(label), False, None, boxes[k]) for k, label in enumerate(present)])


def _panoptic_scene(panoptic: PanopticMap) -> Scene:
    segments = panoptic.segments[:MAX_ITEMS]
    ids = panoptic.ids
    table = torch.zeros(max([0, *(s["id"] for s in panoptic.segments)]) + 1, dtype=torch.uint8)
    for k, segment in enumerate(segments):
        table[segment["id"]] = k + 1
    index = table.to(ids.device)[ids.long()].cpu().numpy()  # (H, W)
    boxes = boxes_of(index, len(segments))
    return Scene(index, [Item(s["label"], s["isthing"], s.get("score"), boxes[k]) for k, s in enumerate(segments)])


def _mask_scene(found: InstanceData, size: tuple[int, int]) -> Scene:
    """Paint masks (N, H, W), best first in the list, so that the best lie on top."""
    index = np.zeros(size, np.uint8)
    for k in reversed(range(len(found.labels))):
        mask = found.masks[k].numpy().view(np.uint8)
        index = cv2.copyTo(np.full_like(index, k + 1), mask, index)
    boxes = boxes_of(index, len(found.labels))
    pairs = zip(found.labels.tolist(), found.scores.tolist(), boxes, strict=True)
    return Scene(index, [Item(label, True, score, box) for label, score, box in pairs])


def _polygon_scene(found: InstanceData, size: tuple[int, int]) -> Scene:
    """Paint polygons (N, V, 2), the nearest on top where there are depths (lower = nearer), else the best."""
    polygons = found.polygons.detach().double().numpy()
    order = (
        found.depths.argsort(descending=True, stable=True) if "depths" in found else range(len(polygons) - 1, -1, -1)
    )
    index = np.zeros(size, np.uint8)
    items = []
    for label, score, polygon in zip(found.labels.tolist(), found.scores.tolist(), polygons, strict=True):
        finite = np.nan_to_num(polygon, posinf=FARTHEST, neginf=-FARTHEST).clip(-FARTHEST, FARTHEST)
        items.append(Item(label, True, score, np.concatenate((finite.min(0), finite.max(0))), finite))
    for k in order:
        cv2.fillPoly(index, [fixed_point(items[k].polygon)], int(k) + 1, shift=SHIFT)
    return Scene(index, items)


def boxes_of(index: np.ndarray, count: int) -> np.ndarray:
    """Return the boxes (N, 4) xyxy of what a map shows, to two pixels; zeros of what it shows nowhere.

    Args:
        index: (H, W) uint8, numbers 1..N and 0.
        count: N.
    """
    boxes = np.zeros((count, 4))
    for k, found in enumerate(find_objects(np.ascontiguousarray(index[::2, ::2]), count)):
        if found is not None:
            rows, columns = found
            boxes[k] = 2 * columns.start, 2 * rows.start, 2 * columns.stop, 2 * rows.stop
    return boxes
