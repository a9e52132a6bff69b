"""What travels through every room: one image's ground truth and predictions, and the features between the parts."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor

IGNORE_INDEX = 255
"""Label of pixels that no loss and no metric looks at."""


@dataclass
class PanopticMap:
    """A panoptic segmentation of one image.

    Attributes:
        ids: (H, W) integer tensor, the segment number of every pixel; 0 = void.
        segments: one record a segment, in the order of the annotation: ``id`` (int, > 0, as in ``ids``), ``label``
            (int, contiguous class 0..C-1), ``isthing`` (bool), ``iscrowd`` (bool); predictions may add ``score`` (0..1).
    """

    ids: Tensor
    segments: list[dict]

    def to(self, *args, **kwargs) -> "PanopticMap":
        """Move or cast ``ids`` as ``Tensor.to`` does (MMEngine moves samples by this name)."""
        return PanopticMap(self.ids.to(*args, **kwargs), self.segments)

    def numpy(self) -> np.ndarray:
        """Return ``ids`` as an array on the CPU."""
        return self.ids.cpu().numpy()


class SegSample(BaseDataElement):
    """One image's ground truth and predictions.

    Every field is optional and absent until somebody sets it:

    * ``gt_semantic``, ``pred_semantic``: (H, W) int64 tensor of classes; ground truth 255 = ignore;
    * ``gt_panoptic``, ``pred_panoptic``: `PanopticMap`;
    * ``gt_instances``, ``pred_instances``: MMEngine ``InstanceData`` with ``labels`` (N,), ``masks`` (N, H, W) bool,
      ``bboxes`` (N, 4) xyxy pixels, predictions also ``scores`` (N,); those of polygon models also ``polygons``
      (N, V, 2) xy in pixels of the file and ``depths`` (N,), 0 = nearest, and masks only when asked;
    * ``gt_polygons``: ``InstanceData`` with ``polygons`` (N, V, 2) xy in pixels of the network's input, ``labels`` (N,)
      and ``depths`` (N,).

    Metadata: ``img_path``, ``img_id``, ``ori_shape`` (H, W) of the file, ``img_shape`` (H, W) after the transforms and
    before padding, ``pad_shape`` (H, W) of the batch, ``label_path``; for polygons ``affine`` (2, 3), pixels of the file ->
    pixels of the input.
    """


@dataclass
class Features:
    """What a decoder hands to a head.

    Attributes:
        pixels: (B, C, h, w), the finest map, for masks or logits.
        levels: multi-scale maps for queries, coarse to fine.
        encoder: the encoder's own maps, finest first, for heads with an auxiliary branch on them.
        deep: further maps that deep supervision classifies, shallowest first; ``pixels`` comes after them.
        embedding: (B, D, h, w), an embedding of each pixel for losses on features; training only.
    """

    pixels: Tensor
    levels: list[Tensor]
    encoder: list[Tensor]
    deep: list[Tensor] = field(default_factory=list)
    embedding: Tensor | None = None


def segment_masks(ids: Tensor, segments: list[dict]) -> tuple[Tensor, Tensor]:
    """Return the masks (N, H, W) bool and the labels (N,) int64 of the segments that are no crowd.

    Args:
        ids: (H, W) segment numbers.
        segments: their records, see `PanopticMap`.
    """
    kept = [s for s in segments if not s["iscrowd"]]
    numbers = torch.tensor([s["id"] for s in kept], dtype=ids.dtype, device=ids.device)
    labels = torch.tensor([s["label"] for s in kept], dtype=torch.int64, device=ids.device)
    return ids[None] == numbers[:, None, None], labels  # (N, H, W), (N,)


def require_fields(sample: Mapping, *names: str) -> list:
    """Return fields of a sample in MMEngine's dict form, as metrics get them.

    Raises:
        ValueError: the sample lacks one: its data set delivers no such truth, or the head no such prediction.
    """
    for name in names:
        if name not in sample:
            origin = "data set delivers no such truth" if name.startswith("gt_") else "head delivers no such prediction"
            raise ValueError(
                f"{sample.get('img_path', 'a sample')} has no {name}: the {origin}; choose other tasks (--tasks) or "
                "another config"
            )
    return [sample[name] for name in names]


__all__ = ["IGNORE_INDEX", "Features", "InstanceData", "PanopticMap", "SegSample", "require_fields", "segment_masks"]
