"""From packed images to a normalised batch on the model's device."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor
from torch import Tensor

from densepred.registry import MODELS
from densepred.structures import IGNORE_INDEX, PanopticMap, SegSample


@MODELS.register_module()
class SegPreprocessor(BaseDataPreprocessor):
    """Normalise images, then pad them right and bottom with zeros into one batch; pad targets with void.

    Padding after the normalisation makes padded pixels equal to the mean colour, as the published models were trained.

    Args:
        mean: per channel, in 0..255, in the order RGB, or BGR if ``bgr``.
        std: likewise.
        size: (H, W) of the batch; an image larger than it is an error.
        size_divisor: the batch takes the largest image's size rounded up to a multiple of this. Given together with
            ``size``, it holds in evaluation and ``size`` in training: mmsegmentation pads training crops to the crop and
            test images not at all (1).
        bgr: the model was trained on OpenCV's order of the channels and gets it.

    Raises:
        ValueError: neither ``size`` nor ``size_divisor`` is given.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: Sequence[int] | None = None,
        size_divisor: int | None = None,
        bgr: bool = False,
    ) -> None:
        super().__init__()
        if size is None and size_divisor is None:
            raise ValueError("SegPreprocessor: give size=(H, W) of the batches, or size_divisor, or both")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.size = tuple(size) if size else None
        self.size_divisor = size_divisor
        self.bgr = bgr

    def forward(self, data: dict, training: bool = False) -> dict:
        """Return ``dict(inputs=(B, 3, H, W) float tensor, data_samples=list of SegSample)``.

        Args:
            data: ``inputs``, a list of (3, h, w) tensors (or one stacked tensor), and ``data_samples``.
            training: whether targets are padded to the batch; in evaluation they stay at the file's size.
        """
        data = self.cast_data(data)
        images, samples = list(data["inputs"]), data.get("data_samples") or [SegSample() for _ in data["inputs"]]
        height, width = self._batch_size(images, samples, training)
        batch = torch.stack(
            [self._normalise(image, sample, height, width) for image, sample in zip(images, samples, strict=True)]
        )  # (B, 3, H, W)
        for image, sample in zip(images, samples, strict=True):
            sample.set_metainfo({"pad_shape": (height, width), "img_shape": tuple(image.shape[-2:])})
            if training:
                pad_targets(sample, height, width)
        return {"inputs": batch, "data_samples": samples}

    def _batch_size(self, images: list[Tensor], samples: list[SegSample], training: bool) -> tuple[int, int]:
        height, width = (max(image.shape[axis] for image in images) for axis in (-2, -1))
        if self.size is None or (self.size_divisor is not None and not training):
            step = self.size_divisor
            return -(-height // step) * step, -(-width // step) * step
        if height > self.size[0] or width > self.size[1]:
            names = [s.get("img_path", "?") for s in samples]
            raise ValueError(
                f"data_preprocessor.size is {self.size[0]}x{self.size[1]}, but the pipeline delivered {height}x{width} "
                f"(one of {names}): resize or crop to that box in the pipeline, or raise image_size"
            )
        return self.size

    def _normalise(self, image: Tensor, sample: SegSample, height: int, width: int) -> Tensor:
        image = image.flip(0) if self.bgr else image
        image = (image.to(self.mean.dtype) - self.mean) / self.std
        if "padding" in sample:
            image = image.masked_fill(sample.padding[None], 0.0)
        return F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2]))  # (3, H, W)


def pad_targets(sample: SegSample, height: int, width: int) -> None:
    """Pad a sample's ground truth maps right and bottom with void to (height, width), in place."""

    def pad(label_map: Tensor, value: int) -> Tensor:
        return F.pad(label_map, (0, width - label_map.shape[-1], 0, height - label_map.shape[-2]), value=value)

    if "gt_panoptic" in sample:
        sample.gt_panoptic = PanopticMap(pad(sample.gt_panoptic.ids, 0), sample.gt_panoptic.segments)
    if "gt_semantic" in sample:
        sample.gt_semantic = pad(sample.gt_semantic, IGNORE_INDEX)
    if "gt_instances" in sample:
        sample.gt_instances.masks = pad(sample.gt_instances.masks, 0)
