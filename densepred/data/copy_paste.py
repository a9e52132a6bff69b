"""Copy-paste of segments between two jittered images, as kMaX-DeepLab's data mapper does it."""

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from numpy.random import Generator

from densepred.data.transforms import build_pipeline, draw_image, drop_vanished, run_pipeline
from densepred.registry import TRANSFORMS


@TRANSFORMS.register_module()
class CopyPaste(BaseTransform):
    """Paste segments of a second random image of the set over this one.

    Both images are laid at the top left of a canvas of ``size``. Pasted are all things of the second image and a prefix,
    of random length, of its shuffled segments; void and crowds never. Stuff of one class becomes one segment, segments
    that end up hidden are removed, the rest is renumbered 1..N. ``padding`` (H, W) bool marks what neither image covers;
    there ``img`` is 0 and the preprocessor writes zeros after normalisation.

    Source: bytedance/kmax-deeplab, ``panoptic_kmaxdeeplab_dataset_mapper.py``.

    Args:
        transforms: the second image's pipeline, from loading on; its `ScaleJitter` has half the ratios of the first one's.
        size: (H, W) of the canvas; neither image may be larger.
    """

    def __init__(self, transforms: list[dict], size: tuple[int, int]) -> None:
        self.transforms, self.size = build_pipeline(transforms), size

    def transform(self, results: dict) -> dict:
        other = run_pipeline(self.transforms, draw_image(results))
        for part in (results, other):
            _lay_on_canvas(part, self.size)
        paste = np.isin(other["panoptic"], _choose(other["segments"], results["rng"]))  # (H, W)
        first = max((s["id"] for s in results["segments"]), default=0)
        cv2.copyTo(other["img"], paste.view(np.uint8), results["img"])
        np.copyto(results["panoptic"], other["panoptic"] + np.uint16(first), where=paste)
        results["padding"] &= ~paste
        results["segments"] = results["segments"] + [{**s, "id": s["id"] + first} for s in other["segments"]]
        return _renumber(drop_vanished(results))


def _lay_on_canvas(results: dict, size: tuple[int, int]) -> None:
    derived = [key for key in ("semantic", "masks", "padding") if key in results]
    height, width = results["img"].shape[:2]
    if derived or height > size[0] or width > size[1]:
        raise ValueError(
            f"CopyPaste(size={size}) got an image of {height} x {width} with {derived}; crop to the size before, and derive "
            "other label maps from the panoptic map after it"
        )
    img, panoptic, padding = np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint16), np.ones(size, bool)
    img[:height, :width], panoptic[:height, :width] = results["img"], results["panoptic"]
    padding[:height, :width] = False
    results.update(img=img, panoptic=panoptic, padding=padding, img_shape=tuple(size))


def _choose(segments: list[dict], rng: Generator) -> list[int]:
    """Return the ids to paste: all things, and the first k of the shuffled segments, k uniform in 0..N."""
    usable = [s for s in segments if not s["iscrowd"]]
    shuffled = rng.permutation([s["id"] for s in usable])
    prefix = shuffled[: rng.integers(len(usable) + 1)].tolist()
    return sorted({s["id"] for s in usable if s["isthing"]}.union(prefix))


def _renumber(results: dict) -> dict:
    """Number the segments 1..N in order; stuff of one class shares a number."""
    table = np.zeros(max((s["id"] for s in results["segments"]), default=0) + 1, np.uint16)
    records, stuff = [], {}
    for segment in results["segments"]:
        number = len(records) + 1
        if not (segment["isthing"] or segment["iscrowd"]):
            number = stuff.setdefault(segment["label"], number)
        table[segment["id"]] = number
        if number > len(records):
            records.append({**segment, "id": number})
    results["panoptic"], results["segments"] = table[results["panoptic"]], records
    return results
