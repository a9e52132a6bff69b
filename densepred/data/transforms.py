"""Transforms between loading and the model; every random number comes from ``results["rng"]``.

Label maps that move with the image, all optional: ``panoptic`` (void 0), ``semantic`` (void 255), ``padding`` (True
where the image holds no pixels of any photo, set by `CopyPaste`) and ``masks`` (N, H, W) bool with ``mask_labels`` (N,).
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from numpy.random import Generator
from PIL import Image

from densepred.registry import TRANSFORMS
from densepred.structures import IGNORE_INDEX, InstanceData, PanopticMap, SegSample

VOID = {"panoptic": 0, "semantic": IGNORE_INDEX, "padding": False, "masks": False}
"""The label maps, and what stands where they know nothing."""

Transform = Callable[[dict], dict]


def build_pipeline(transforms: list[dict | Transform]) -> list[Transform]:
    """Build the transforms of a nested pipeline; callables are taken as they are."""
    return [TRANSFORMS.build(transform) if isinstance(transform, dict) else transform for transform in transforms]


def run_pipeline(transforms: list[Transform], results: dict) -> dict:
    """Apply the transforms one after the other."""
    for transform in transforms:
        results = transform(results)
    return results


def draw_image(results: dict) -> dict:
    """Return the fresh results of a random image of the same data set, with the same generator."""
    rng, dataset = results["rng"], results["dataset"]
    info = dataset.get_data_info(int(rng.integers(len(dataset))))
    return {**info, "rng": rng, "dataset": dataset}


def drop_vanished(results: dict) -> dict:
    """Remove the segments without a pixel in ``panoptic`` (the ids of the others stay) and the masks without a pixel."""
    if "panoptic" in results:
        largest = max((s["id"] for s in results["segments"]), default=0)
        areas = np.bincount(results["panoptic"].ravel(), minlength=largest + 1)
        results["segments"] = [s for s in results["segments"] if areas[s["id"]]]
    if "masks" in results:
        visible = results["masks"].any(axis=(1, 2))
        if not visible.all():
            results["masks"], results["mask_labels"] = results["masks"][visible], results["mask_labels"][visible]
    return results


def nearest_index(old: int, new: int) -> np.ndarray:
    """Return (new,) indices into ``old`` pixels: Pillow's own nearest rule for RGB images, ties included."""
    row = Image.fromarray(np.arange(old, dtype=np.int32)[None])
    return np.asarray(row.resize((new, 1), Image.Resampling.NEAREST))[0]


def resize(
    results: dict, shape: tuple[int, int], offset: tuple[int, int] = (0, 0), window: tuple[int, int] | None = None
) -> dict:
    """Resize the image and its labels to ``shape`` and keep a window of the result.

    Only the window is computed, up to five times cheaper than resize and crop. Images go through Pillow's bilinear
    filter, which widens when it shrinks (as detectron2's ``ResizeTransform``, unlike OpenCV's); Pillow holds the window's
    corner in float32, so that ties may round the other way than in a crop of the whole: one or two grey levels, rarely.

    Args:
        shape: (H, W) of the whole resized image.
        offset: (top, left) of the window in it.
        window: (H, W) of the window; None = all of it.
    """
    height, width = results["img"].shape[:2]
    (top, left), (rows, columns) = offset, window or shape
    y, x = height / shape[0], width / shape[1]
    box = (left * x, top * y, min((left + columns) * x, width), min((top + rows) * y, height))
    image = Image.fromarray(results["img"]).resize((columns, rows), Image.Resampling.BILINEAR, box=box)
    results["img"] = np.array(image)  # (rows, columns, 3)
    results["img_shape"] = (rows, columns)
    ys, xs = _indices((height, width), shape, offset, (rows, columns))
    for key in VOID:
        if key in results:
            results[key] = _take_masks(results[key], ys, xs) if key == "masks" else _take(results[key], ys, xs)
    return drop_vanished(results)


def _indices(
    old: tuple[int, int], new: tuple[int, int], offset: tuple[int, int], window: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the ``old`` pixels that a window of the ``new`` size shows; all sizes (H, W)."""
    ys, xs = (
        nearest_index(before, after)[start : start + length]
        for before, after, start, length in zip(old, new, offset, window, strict=True)
    )
    return ys, xs


def _take(labels: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Return ``labels[ys[:, None], xs]`` for ascending indices; the axis that shrinks goes first."""
    labels = labels[ys[0] : ys[-1] + 1]
    if len(ys) < len(labels):
        return np.take(np.take(labels, ys - ys[0], 0), xs, 1)
    return np.take(np.take(labels, xs, 1), ys - ys[0], 0)  # (len(ys), len(xs))


def _take_masks(masks: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Return ``masks[:, ys[:, None], xs]`` for ascending indices, reading and writing no more than each mask's box."""
    taken = np.zeros((len(masks), len(ys), len(xs)), bool)
    for source, target in zip(masks, taken, strict=True):
        x, y, width, height = cv2.boundingRect(source.view(np.uint8))
        top, bottom = np.searchsorted(ys, (y, y + height))
        left, right = np.searchsorted(xs, (x, x + width))
        if top < bottom and left < right:
            target[top:bottom, left:right] = _take(source, ys[top:bottom], xs[left:right])
    return taken


def resize_and_crop(results: dict, shape: tuple[int, int], size: tuple[int, int]) -> dict:
    """Resize to ``shape`` and keep a window of at most ``size`` (H, W) at a uniformly random place."""
    rng: Generator = results["rng"]
    window = min(shape[0], size[0]), min(shape[1], size[1])
    offset = int(rng.integers(shape[0] - window[0] + 1)), int(rng.integers(shape[1] - window[1] + 1))
    return resize(results, shape, offset, window)


def short_edge_shape(height: int, width: int, short_edge: int, max_size: int) -> tuple[int, int]:
    """Return (H, W) with the short side at ``short_edge``, or with the long one at ``max_size`` if that is smaller.

    The order of the operations is detectron2's, whose rounding it decides.
    """
    scale = short_edge / min(height, width)
    sides = [float(short_edge), scale * max(height, width)]
    if sides[1] > max_size:
        sides = [side * (max_size / sides[1]) for side in sides]
    short, long = (max(int(side + 0.5), 1) for side in sides)
    return (short, long) if height < width else (long, short)


@TRANSFORMS.register_module()
class ResizeToFit(BaseTransform):
    """Scale to the largest size that fits into a box, up or down, aspect kept: the test-time resize.

    Args:
        size: (H, W) of the box in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def transform(self, results: dict) -> dict:
        height, width = results["img"].shape[:2]
        scale = min(self.size[0] / height, self.size[1] / width)
        return resize(results, (max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)))


@TRANSFORMS.register_module()
class ScaleJitter(BaseTransform):
    """Fit into a randomly scaled box, then crop at random to at most the box itself (large-scale jitter).

    Smaller results stay unpadded: `PadTo` pads before the normalisation, else the preprocessor does after it. kMaX's
    mapper jitters the colours between resize and crop; colours change pixel by pixel, so that doing it after the crop
    gives the same at less cost. detectron2's FixedSizeCrop, which Mask2Former takes on COCO, draws one number for both
    axes, so that its crops lie on the diagonal; here both are drawn.

    Args:
        size: (H, W) of the box in pixels.
        ratio_range: limits of the uniform scale of the box.
    """

    def __init__(self, size: tuple[int, int], ratio_range: tuple[float, float] = (0.2, 2.0)) -> None:
        self.size, self.ratio_range = size, ratio_range

    def transform(self, results: dict) -> dict:
        height, width = results["img"].shape[:2]
        scale = results["rng"].uniform(*self.ratio_range) * min(self.size[0] / height, self.size[1] / width)
        shape = max(round(height * scale), 1), max(round(width * scale), 1)
        return resize_and_crop(results, shape, self.size)


@TRANSFORMS.register_module()
class ShortEdgeJitter(BaseTransform):
    """Scale the short side to a random one of some lengths, then crop at random: detectron2's augmentation of crops.

    Smaller results stay unpadded, see `PadTo`.

    Args:
        short_edges: lengths of the short side in pixels, all equally likely.
        max_size: limit of the long side in pixels.
        crop_size: (H, W) of the crop.
    """

    def __init__(self, short_edges: Sequence[int], max_size: int, crop_size: tuple[int, int]) -> None:
        self.short_edges, self.max_size, self.crop_size = list(short_edges), max_size, crop_size

    def transform(self, results: dict) -> dict:
        short_edge = self.short_edges[int(results["rng"].integers(len(self.short_edges)))]
        shape = short_edge_shape(*results["img"].shape[:2], short_edge, self.max_size)
        return resize_and_crop(results, shape, self.crop_size)


@TRANSFORMS.register_module()
class ScaleAndCrop(BaseTransform):
    """Scale by a random factor, aspect kept, then crop at random: the augmentation of most semantic recipes.

    Results smaller than the crop stay unpadded; the preprocessor's ``size`` pads them after the normalisation. With
    ``max_class_share`` a crop is drawn anew, up to ten times in all, until no class has that share of its labelled pixels
    (nor is everything ignored); the last one is taken as it is. The numbers are those of mmsegmentation's ``RandomResize``
    and ``RandomCrop``.

    Args:
        crop_size: (H, W) of the crop in pixels.
        base_size: (long, short) sides in pixels of the box that the factor multiplies and the image is fitted into,
            whichever way it lies; ``None``: the image's own size.
        ratio_range: limits of the uniform factor.
        ratios: instead of ``ratio_range``, factors that are all equally likely.
        max_class_share: 0..1; 1: any crop will do.

    Raises:
        ValueError: a share outside (0, 1]; or shares are to be looked at and the results have no ``semantic``.
    """

    TRIES = 10

    def __init__(
        self,
        crop_size: tuple[int, int],
        base_size: tuple[int, int] | None = None,
        ratio_range: tuple[float, float] = (0.5, 2.0),
        ratios: Sequence[float] | None = None,
        max_class_share: float = 1.0,
    ) -> None:
        if not 0 < max_class_share <= 1:
            raise ValueError(f"ScaleAndCrop: max_class_share={max_class_share} is no share; it lies in 0 < share <= 1")
        self.crop_size, self.base_size = tuple(crop_size), base_size
        self.ratio_range, self.ratios = ratio_range, ratios
        self.max_class_share = max_class_share

    def transform(self, results: dict) -> dict:
        rng: Generator = results["rng"]
        ratio = rng.uniform(*self.ratio_range) if self.ratios is None else rng.choice(self.ratios)
        shape = self._scaled(*results["img"].shape[:2], ratio)
        window = min(shape[0], self.crop_size[0]), min(shape[1], self.crop_size[1])
        return resize(results, shape, self._offset(results, shape, window), window)

    def _scaled(self, height: int, width: int, ratio: float) -> tuple[int, int]:
        if self.base_size is not None:
            short, long = sorted(int(side * ratio) for side in self.base_size)
            ratio = min(long / max(height, width), short / min(height, width))
        return max(int(height * ratio + 0.5), 1), max(int(width * ratio + 0.5), 1)

    def _offset(self, results: dict, shape: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
        """Return (top, left) of a crop that passes, or the last one drawn."""
        rng = results["rng"]
        if self.max_class_share < 1 and "semantic" not in results:
            raise ValueError("ScaleAndCrop with max_class_share below 1 wants `semantic`: load the labels before it")
        for _ in range(1 if self.max_class_share == 1 else self.TRIES):
            top, left = (int(rng.integers(whole - part + 1)) for whole, part in zip(shape, window, strict=True))
            if self.max_class_share == 1 or window == shape:
                break
            labels = results["semantic"]
            labels = _take(labels, *_indices(labels.shape, shape, (top, left), window))
            if largest_share(labels) < self.max_class_share:
                break
        return top, left


def largest_share(labels: np.ndarray) -> float:
    """Return the share that the most frequent class has of the labelled pixels, 1 where everything is ignored."""
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


@TRANSFORMS.register_module()
class ResizeShortEdge(BaseTransform):
    """Scale the short side to a length, but the long side to no more than a limit: a test-time resize.

    Args:
        short_edge: length of the short side in pixels.
        max_size: limit of the long side in pixels.
        multiple: round both sides up to a multiple of this, which changes the aspect a little.
    """

    def __init__(self, short_edge: int, max_size: int, multiple: int = 1) -> None:
        self.short_edge, self.max_size, self.multiple = short_edge, max_size, multiple

    def transform(self, results: dict) -> dict:
        height, width = short_edge_shape(*results["img"].shape[:2], self.short_edge, self.max_size)
        step = self.multiple
        return resize(results, (-(-height // step) * step, -(-width // step) * step))


@TRANSFORMS.register_module()
class PadTo(BaseTransform):
    """Pad right and bottom to a size, the image with grey, labels with void.

    Mask2Former's models were trained on images padded before the normalisation; ``padding``, which the preprocessor
    zeroes after it, does therefore not grow.

    Args:
        size: (H, W) in pixels.
        fill: grey value of the padding, 0..255.

    Raises:
        ValueError: an image is larger than the size.
    """

    def __init__(self, size: tuple[int, int], fill: int = 128) -> None:
        self.size, self.fill = tuple(size), fill

    def transform(self, results: dict) -> dict:
        height, width = results["img"].shape[:2]
        if height > self.size[0] or width > self.size[1]:
            raise ValueError(
                f"PadTo(size={self.size}) got an image of {height} x {width} ({results.get('img_path', '?')}); crop to that "
                "size before, or enlarge it"
            )
        for key, fill in {"img": self.fill, **VOID}.items():
            if key in results:
                results[key] = _pad(results[key], self.size, fill, axis=0 if key == "img" else -2)
        results["img_shape"] = self.size
        return results


def _pad(array: np.ndarray, size: tuple[int, int], fill: int, axis: int) -> np.ndarray:
    """Pad the two axes from ``axis`` on at their ends."""
    shape = list(array.shape)
    window = [slice(length) for length in shape]
    axis %= array.ndim
    shape[axis : axis + 2] = size
    # Zeros are pages not yet allocated: with many masks much cheaper than np.pad.
    padded = np.full(shape, fill, array.dtype) if fill else np.zeros(shape, array.dtype)
    padded[tuple(window)] = array
    return padded


@TRANSFORMS.register_module()
class LoadSemanticFromPanoptic(BaseTransform):
    """Replace ``panoptic`` by ``semantic``, the classes of its segments, crowds included; void becomes 255.

    So that semantic segmentation can be learnt from panoptic annotations, as Mask2Former's preparation derives it. Named as
    what loads labels is: a bare image goes without.
    """

    def transform(self, results: dict) -> dict:
        panoptic, segments = results.pop("panoptic"), results.pop("segments")
        table = np.full(max((s["id"] for s in segments), default=0) + 1, IGNORE_INDEX, np.uint8)
        table[[s["id"] for s in segments]] = [s["label"] for s in segments]
        results["semantic"] = table[panoptic]  # (H, W)
        return results


@TRANSFORMS.register_module()
class SSDColorJitter(BaseTransform):
    """The photometric distortion of SSD (arXiv:1512.02325), in its order, which no Albumentations transform has.

    Brightness; then contrast, saturation, hue, or saturation, hue, contrast, by a coin; each with probability one half.
    Every step rounds towards zero and clips to uint8, as the reference does.

    Args:
        brightness: largest shift of the grey values.
        contrast: limits of the factor on the grey values.
        saturation: limits of the factor on the saturation.
        hue: largest shift in units of 2 degrees (OpenCV's 0..179 hue).
    """

    def __init__(
        self,
        brightness: float = 32,
        contrast: tuple[float, float] = (0.5, 1.5),
        saturation: tuple[float, float] = (0.5, 1.5),
        hue: int = 18,
    ) -> None:
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def transform(self, results: dict) -> dict:
        rng: Generator = results["rng"]
        steps = [self._saturation, self._hue]
        steps.insert(0 if rng.random() < 0.5 else 2, self._contrast)
        for step in (self._brightness, *steps):
            if rng.random() < 0.5:
                results["img"] = step(results["img"], rng)
        return results

    def _brightness(self, img: np.ndarray, rng: Generator) -> np.ndarray:
        return cv2.LUT(img, _affine_table(1, rng.uniform(-self.brightness, self.brightness)))

    def _contrast(self, img: np.ndarray, rng: Generator) -> np.ndarray:
        return cv2.LUT(img, _affine_table(rng.uniform(*self.contrast), 0))

    def _saturation(self, img: np.ndarray, rng: Generator) -> np.ndarray:
        return _map_hsv(img, 1, _affine_table(rng.uniform(*self.saturation), 0))

    def _hue(self, img: np.ndarray, rng: Generator) -> np.ndarray:
        return _map_hsv(img, 0, ((np.arange(256) + rng.integers(-self.hue, self.hue + 1)) % 180).astype(np.uint8))


def _affine_table(factor: float, shift: float) -> np.ndarray:
    return np.clip(np.arange(256, dtype=np.float32) * factor + shift, 0, 255).astype(np.uint8)


def _map_hsv(img: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    tables = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)  # (256, 3)
    tables[:, channel] = table
    return cv2.cvtColor(cv2.LUT(cv2.cvtColor(img, cv2.COLOR_RGB2HSV), tables[None]), cv2.COLOR_HSV2RGB)


@TRANSFORMS.register_module()
class Redraw(BaseTransform):
    """Run a pipeline, and run it again on another random image of the set until enough pixels carry a label.

    The pixels of segments that are no crowd are counted on every fourth row and column, where the losses that
    sample ``min_labelled`` pixels look.

    Args:
        transforms: the pipeline, from loading on.
        min_labelled: a sample needs more labelled pixels than this, and at least one segment.
        max_share: of the grid, on small crops that cannot hold ``min_labelled``; at the published 1281 x 1281 pixels,
            4096 is the lesser of the two.
        tries: images to try before giving up.

    Raises:
        ValueError: none of the tries had enough labels.
    """

    def __init__(
        self,
        transforms: list[dict],
        min_labelled: int = 4096,
        max_share: float = 0.04,
        stride: int = 4,
        tries: int = 50,
    ) -> None:
        self.transforms = build_pipeline(transforms)
        self.min_labelled, self.max_share, self.tries = min_labelled, max_share, tries

    def transform(self, results: dict) -> dict:
        first = results["img_path"]
        for _ in range(self.tries):
            results = run_pipeline(self.transforms, results)
            if self._has_enough(results):
                return results
            results = draw_image(results)
        raise ValueError(
            f"{first} and {self.tries - 1} more random images have no more than min_labelled={self.min_labelled} labelled "
            f"pixels on every fourth row and column; lower min_labelled or enlarge the training size"
        )

    def _has_enough(self, results: dict) -> bool:
        grid = results["panoptic"][::4, ::4]
        kept = [s["id"] for s in results["segments"] if not s["iscrowd"]]
        return np.isin(grid, kept).sum() > min(self.min_labelled, self.max_share * grid.size)


@TRANSFORMS.register_module()
class PackSegInputs(BaseTransform):
    """End a pipeline: ``dict(inputs=(3, H, W) uint8 tensor, data_samples=SegSample)``.

    The sample carries ``gt_panoptic`` (ids int32) when the results have ``panoptic``, ``gt_semantic`` (int64) when they
    have ``semantic``, ``gt_instances`` when they have ``masks`` (those without a pixel are left out; boxes are xyxy at
    pixel edges), ``gt_polygons`` (``polygons`` (N, V, 2) xy, ``bboxes``, ``labels``, ``depths``) when they have
    ``polygons``, ``padding`` (H, W) bool when they have that; ``affine``, if set, is metadata. The rest stays behind.
    """

    def transform(self, results: dict) -> dict:
        sample = SegSample(metainfo={key: results[key] for key in ("img_path", "img_id", "ori_shape", "img_shape")})
        for key in ("panoptic_path", "semantic_path", "instance_path", "affine"):
            if key in results:
                sample.set_metainfo({key if key == "affine" else "label_path": results[key]})
        if "panoptic" in results:
            ids = torch.from_numpy(results["panoptic"].astype(np.int32))
            sample.gt_panoptic = PanopticMap(ids, results["segments"])
        if "semantic" in results:
            sample.gt_semantic = torch.from_numpy(results["semantic"].astype(np.int64))
        if "masks" in results:
            sample.gt_instances = _pack_instances(results["masks"], results["mask_labels"])
        if "polygons" in results:
            fields = dict(polygons="polygons", bboxes="polygon_boxes", labels="polygon_labels", depths="pseudo_depths")
            sample.gt_polygons = InstanceData(**{name: torch.from_numpy(results[key]) for name, key in fields.items()})
        if "padding" in results:
            sample.padding = torch.from_numpy(np.ascontiguousarray(results["padding"]))
        inputs = torch.from_numpy(np.ascontiguousarray(results["img"].transpose(2, 0, 1)))  # (3, H, W)
        return dict(inputs=inputs, data_samples=sample)


def _pack_instances(masks: np.ndarray, labels: np.ndarray) -> InstanceData:
    boxes = np.array([cv2.boundingRect(mask) for mask in masks.view(np.uint8)], np.float32).reshape(-1, 4)  # xywh
    boxes[:, 2:] += boxes[:, :2]
    visible = boxes[:, 2] > boxes[:, 0]
    if not visible.all():
        boxes, masks, labels = boxes[visible], masks[visible], labels[visible]
    return InstanceData(
        labels=torch.from_numpy(labels.astype(np.int64)),
        masks=torch.from_numpy(np.ascontiguousarray(masks)),
        bboxes=torch.from_numpy(boxes),
    )
