"""Semantic segmentation: the confusion matrix, what it says, and the streaming metric.

All pixels of all images are counted together before any ratio is taken, as in the benchmarks (PASCAL VOC, Cityscapes,
ADE20K, and the Dice of U-Net's and UNet++'s papers, per class); a mean of the images' own ratios is another number.
Folders of label maps: see `densepred.evaluation.semantic_files`; Cityscapes' iIoU: `densepred.evaluation.cityscapes_semantic`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine import dist
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger

from densepred.evaluation.boundary import boundary_counts, boundary_iou, contour_width
from densepred.evaluation.confusion import write_confusion
from densepred.evaluation.record import check_counted
from densepred.evaluation.table import semantic_table
from densepred.registry import METRICS
from densepred.structures import IGNORE_INDEX, PanopticMap, require_fields

CITYSCAPES_IDS = range(7, 34)
"""Where all ``category_ids`` of a data set lie here, its files hold these label ids and not contiguous classes."""


def confusion_matrix(
    gt: np.ndarray, pred: np.ndarray, num_classes: int, ignore_index: int = IGNORE_INDEX
) -> np.ndarray:
    """Count the pixels of each pair of classes.

    Args:
        gt: (H, W) integers, true classes 0..C-1 or ``ignore_index``.
        pred: (H, W) integers, predicted classes 0..C-1, also where the truth is ignored.
        num_classes: C.
        ignore_index: True label of pixels that do not count.

    Returns:
        (C, C) int64, row = truth, column = prediction.

    Raises:
        ValueError: The sizes differ, or a label is outside 0..C-1.
    """
    if gt.shape != pred.shape:
        sizes = ["x".join(map(str, array.shape)) for array in (pred, gt)]
        raise ValueError(f"the prediction is {sizes[0]} pixels and the ground truth {sizes[1]}")
    counted = np.zeros((num_classes, num_classes), np.int64)
    if not gt.size:
        return counted
    ignored = gt == ignore_index
    row = np.where(ignored, 0, gt)
    _check_labels(row, num_classes, "true", f"; is ignore_index={ignore_index} right?")
    _check_labels(pred, num_classes, "predicted", "; a prediction names a class at every pixel, also at ignored ones")

    pair = row.astype(np.uint16 if num_classes * (num_classes + 1) <= 1 << 16 else np.int64)
    pair[ignored] = num_classes
    pair *= num_classes
    pair += pred.astype(pair.dtype)
    # Neighbours are mostly equal: counting ends of runs, weighted by length, is 3 times faster than counting pixels.
    pair = pair.ravel()
    ends = np.append(np.flatnonzero(pair[1:] != pair[:-1]), pair.size - 1)
    pixels = np.bincount(pair[ends], np.diff(ends, prepend=-1), (num_classes + 1) * num_classes)  # exact up to 2**53
    counted += pixels.astype(np.int64).reshape(-1, num_classes)[:-1]
    return counted


def semantic_quality(confusion: np.ndarray, boundary: np.ndarray | None = None) -> dict[str, Any]:
    """Turn counts into scores, in 0..1.

    Args:
        confusion: (C, C), row = truth, the sum of `confusion_matrix` over images. A further column counts predictions of
            none of the classes: misses of the true class, and of no class spurious.
        boundary: (C, 3), the sum of `densepred.evaluation.boundary.boundary_counts` over images.

    Returns:
        ``mIoU``, ``mAcc``, ``mDice``, ``mPrecision`` and, with ``boundary``, ``mBIoU`` (boundary IoU): means over the
        classes that have a value; ``aAcc``: share of right pixels; ``fwIoU``: IoU weighted by the classes' share of true
        pixels; ``per_class``: a list of ``iou``, ``acc``, ``dice``, ``precision``, ``boundary_iou`` and ``pixels`` (true
        ones) a class. What has nothing to divide by is NaN: IoU and Dice of a class in neither truth nor prediction,
        accuracy of one not in the truth, precision of one never predicted, everything if all pixels are ignored.
    """
    confusion = np.asarray(confusion, np.float64)  # exact up to 2**53
    right, true, found = confusion.diagonal(), confusion.sum(1), confusion.sum(0)[: len(confusion)]
    scores = {
        "iou": _ratio(right, true + found - right),
        "acc": _ratio(right, true),
        "dice": _ratio(2 * right, true + found),
        "precision": _ratio(right, found),
    }
    names = {"mIoU": "iou", "mAcc": "acc", "mDice": "dice", "mPrecision": "precision"}
    if boundary is not None:
        scores["boundary_iou"], names["mBIoU"] = boundary_iou(boundary), "boundary_iou"
    means = {mean: _mean(scores[name]) for mean, name in names.items()}
    total = true.sum()
    return {
        **means,
        "aAcc": float(_ratio(right.sum(), total)),
        "fwIoU": float(_ratio(np.nansum(true * scores["iou"]), total)),
        "per_class": [
            {**{name: float(values[c]) for name, values in scores.items()}, "pixels": int(true[c])}
            for c in range(len(confusion))
        ],
    }


@METRICS.register_module()
class SemanticIoU(BaseMetric):
    """IoU, accuracy and Dice of `SegSample` with ``pred_semantic``, in percent.

    The truth is ``gt_semantic`` or, without it, the classes of ``gt_panoptic``'s segments, crowds included. Keeps one
    (C, C) array, whatever the number of images. `evaluate` returns ``mIoU``, ``mAcc``, ``aAcc``, ``mDice`` and, where it was
    asked for, ``mBIoU``, and prints a table per class. Of a set with a foreground, look at its class in ``per_class``.

    Args:
        out_dir: Folder for the predictions, one PNG of classes an image; of label ids, as the official tools want
            them, if all the data set's ``category_ids`` are Cityscapes' (7..33).
        confusion_dir: Folder for the confusion matrix, ``confusion.csv`` and ``confusion.png``, anew at every evaluation;
            with ``out_dir`` it is ``out_dir/confusion`` unless said otherwise.
        boundary_ratio: Also measure boundary IoU: width of the contours over the image's diagonal, 0.02 in general,
            0.005 for Cityscapes.

    Attributes:
        per_class: Name -> ``iou``, ``acc``, ``dice``, ``precision``, ``boundary_iou`` (0..1, NaN where there is nothing to
            measure) and ``pixels`` of the last evaluation.
    """

    def __init__(
        self, out_dir: str | None = None, confusion_dir: str | None = None, boundary_ratio: float | None = None
    ) -> None:
        super().__init__(prefix="semantic")  # without one MMEngine warns; `evaluate` does without
        self.out_dir = None if out_dir is None else Path(out_dir)
        if confusion_dir is None and out_dir is not None:
            confusion_dir = self.out_dir / "confusion"
        self.confusion_dir = None if confusion_dir is None else Path(confusion_dir)
        if boundary_ratio is not None:
            contour_width((1, 1), boundary_ratio)  # refuses a bad one before the first image
        self.boundary_ratio = boundary_ratio
        self.per_class: dict[str, dict] = {}
        self._record: dict[str, Any] | None = None
        self._reset()

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count a batch of samples (as dictionaries, see MMEngine's ``Evaluator``)."""
        num_classes = len(self.dataset_meta["classes"])
        for sample in data_samples:
            (prediction,) = require_fields(sample, "pred_semantic")
            labels = prediction.cpu().numpy()
            try:
                truth = _truth(sample)
                counts = confusion_matrix(truth, labels, num_classes)
            except ValueError as error:
                raise ValueError(f"{sample.get('img_path', 'a sample')}: {error}") from error
            if self.boundary_ratio is not None:
                counts = np.hstack([counts, boundary_counts(truth, labels, num_classes, self.boundary_ratio)])
            self._counts = counts if self._counts is None else self._counts + counts
            self._images += 1
            if self.out_dir is not None:
                self._write(sample["img_path"], labels)

    def evaluate(self, size: int) -> dict[str, float]:
        """Sum over the processes, print the table, begin anew, and return the metrics on every rank.

        Args:
            size: Images in the data set.

        Raises:
            ValueError: The processes together did not count each image once.
        """
        counts, images = self._gather()
        check_counted("SemanticIoU", images, size)
        metrics = self.compute_metrics([counts])
        if dist.is_main_process():
            MMLogger.get_current_instance().info("\n" + semantic_table(self.metrics_record()))
            if self.confusion_dir is not None:
                for name in ("confusion.csv", "confusion.png"):
                    write_confusion(self.confusion_dir / name, counts[:, : len(counts)], self.dataset_meta["classes"])
        return metrics

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        """Return the metrics in percent of a list of counts, and keep the record.

        Args:
            results: (C, C) confusion matrices, with a ``boundary_ratio`` (C, C + 3) with the boundary's counts behind.
        """
        counts = sum(results)
        num_classes = len(counts)
        boundary = None if self.boundary_ratio is None else counts[:, num_classes:]
        quality = semantic_quality(counts[:, :num_classes], boundary)
        self.per_class = dict(zip(self.dataset_meta["classes"], quality["per_class"], strict=True))
        self._record = {**quality, "per_class": self.per_class}
        return {name: 100 * quality[name] for name in ("mIoU", "mAcc", "aAcc", "mDice", "mBIoU") if name in quality}

    def metrics_record(self) -> dict[str, Any]:
        """Return the last evaluation in full, as `semantic_quality` with ``per_class`` by name, values 0..1."""
        if self._record is None:
            raise ValueError("SemanticIoU has no record yet: call `evaluate` first")
        return self._record

    def _reset(self) -> None:
        self._counts: np.ndarray | None = None
        self._images = 0
        self._written: dict[str, str] = {}

    def _gather(self) -> tuple[np.ndarray, int]:
        """Return the counts and the number of images of all processes, and begin anew."""
        num_classes = len(self.dataset_meta["classes"])
        columns = num_classes + (0 if self.boundary_ratio is None else 3)
        counts = np.zeros((num_classes, columns), np.int64) if self._counts is None else self._counts
        total = torch.from_numpy(np.append(counts.ravel(), self._images))  # (C * columns + 1,)
        self._reset()
        dist.all_reduce(total)
        return total[:-1].numpy().reshape(num_classes, columns), int(total[-1])

    def _write(self, img_path: str, labels: np.ndarray) -> None:
        path = self.out_dir / f"{Path(img_path).stem}.png"
        first = self._written.setdefault(path.name, img_path)
        if first != img_path:
            raise ValueError(f"{path}: the prediction of both {first} and {img_path}; file names must be unique")
        ids = np.asarray(self.dataset_meta.get("category_ids", ()), np.int64)
        if len(ids) and all(number in CITYSCAPES_IDS for number in ids.tolist()):
            labels = ids[labels]
        self.out_dir.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), labels.astype(np.uint8 if labels.max(initial=0) < 256 else np.uint16)):
            raise OSError(f"{path}: cannot be written; is there space?")


def _truth(sample: Mapping) -> np.ndarray:
    """Return a sample's true classes (H, W), 255 = ignore."""
    if sample.get("gt_semantic") is not None:
        return sample["gt_semantic"].cpu().numpy()
    if sample.get("gt_panoptic") is None:
        raise ValueError("the sample has neither gt_semantic nor gt_panoptic; load the annotations in the pipeline")
    return _classes_of(sample["gt_panoptic"])


def _classes_of(panoptic: PanopticMap) -> np.ndarray:
    ids = panoptic.numpy()
    numbers = np.array([segment["id"] for segment in panoptic.segments], np.int64)
    table = np.full(
        max(ids.max(initial=0), numbers.max(initial=0)) + 1, IGNORE_INDEX, np.int16
    )  # (largest number + 1,)
    table[numbers] = [segment["label"] for segment in panoptic.segments]
    return table[ids]


def _check_labels(labels: np.ndarray, num_classes: int, what: str, hint: str) -> None:
    if labels.min() < 0 or labels.max() >= num_classes:
        values, counts = np.unique(labels[(labels < 0) | (labels >= num_classes)], return_counts=True)
        wrong = [f"{value} ({count} pixels)" for value, count in zip(values[:5], counts[:5], strict=True)]
        raise ValueError(
            f"{what} labels {', '.join(wrong)}{', ...' if len(values) > 5 else ''} are outside 0..{num_classes - 1}, the "
            f"{num_classes} classes{hint}"
        )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
