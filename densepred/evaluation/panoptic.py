"""Panoptic quality: counting one image, averaging over classes, the streaming metric, and scoring of files.

Kirillov et al., "Panoptic Segmentation" (CVPR 2019), eq. 1; the details (void, crowds) follow the official tool,
https://github.com/cocodataset/panopticapi, whose numbers these equal. The counting is our own: pairs of segment numbers
are counted by runs of equal neighbours, so that only the few thousand ends of runs are looked up, not every pixel.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger

from densepred.evaluation.boundary import contours
from densepred.evaluation.coco_format import PredictionWriter, read_id_map, read_json, records_by_key
from densepred.evaluation.record import check_counted, write_record
from densepred.evaluation.table import panoptic_table
from densepred.registry import METRICS
from densepred.structures import require_fields

IOU_SUM, TP, FP, FN = range(4)
"""Columns of the counts."""


def panoptic_counts(
    gt_ids: np.ndarray,
    gt_segments: Sequence[Mapping],
    pred_ids: np.ndarray,
    pred_segments: Sequence[Mapping],
    num_classes: int,
    gt_areas: Mapping[int, int] | None = None,
    boundary_ratio: float | None = None,
) -> np.ndarray:
    """Count one image.

    A predicted and a true segment of one class match if their IoU is greater than 0.5; predicted pixels on void do not
    count in the union. Crowds are neither matched nor missed. An unmatched prediction of which more than half lies on
    void and the crowd of its class is forgiven; of several crowds of a class only the last one listed forgives.

    Args:
        gt_ids: (H, W) true segment numbers, 0 = void.
        gt_segments: Records as in `densepred.structures.PanopticMap` (``id``, ``label``, ``iscrowd``).
        pred_ids: (H, W) predicted segment numbers, 0 = void.
        pred_segments: Records (``id``, ``label``); exactly the segments that ``pred_ids`` shows.
        num_classes: C.
        gt_areas: True areas by segment number, where they are not to be counted (COCO's files state them).
        boundary_ratio: Take the smaller of IoU and boundary IoU for a pair's IoU (Boundary PQ), contours as wide as
            `densepred.evaluation.boundary.contour_width` says.

    Returns:
        (C, 4) float64: sum of IoU over matches, true positives, false positives, false negatives.

    Raises:
        ValueError: The maps' sizes differ, a label is outside 0..C-1, or map and records of the prediction disagree.
    """
    if gt_ids.shape != pred_ids.shape:
        raise ValueError(f"the prediction is {_size(pred_ids)} pixels and the ground truth {_size(gt_ids)}")
    true_id, true_label, crowd = _columns(gt_segments, num_classes, "true")
    pred_id, pred_label, _ = _columns(pred_segments, num_classes, "predicted")

    overlap, rows, columns = _overlaps(gt_ids, true_id, pred_ids, pred_id)
    _check_prediction(overlap, pred_ids, pred_id, columns)
    pred_area = overlap.sum(axis=0)[columns]  # (P,)
    if gt_areas is None:
        true_area = overlap.sum(axis=1)[rows]  # (G,)
    else:
        true_area = np.array([gt_areas[number] for number in true_id.tolist()], np.int64)
    on_void = overlap[0][columns]  # (P,)
    shared = overlap[np.ix_(rows, columns)]  # (G, P)

    candidate = (shared > 0) & (true_label[:, None] == pred_label) & ~crowd[:, None]
    t, p = np.nonzero(candidate)
    iou = shared[t, p] / (true_area[t] + pred_area[p] - shared[t, p] - on_void[p])
    if boundary_ratio is not None:
        iou = np.minimum(iou, _contour_iou(gt_ids, true_id, pred_ids, pred_id, boundary_ratio)[t, p])
    match = iou > 0.5
    t, p, iou = t[match], p[match], iou[match]

    missed = ~crowd
    missed[t] = False
    spurious = ~_forgiven(shared, true_label, crowd, pred_label, pred_area, on_void, num_classes)
    spurious[p] = False

    counts = np.empty((num_classes, 4))
    counts[:, IOU_SUM] = np.bincount(true_label[t], iou, num_classes)
    counts[:, TP] = np.bincount(true_label[t], minlength=num_classes)
    counts[:, FP] = np.bincount(pred_label[spurious], minlength=num_classes)
    counts[:, FN] = np.bincount(true_label[missed], minlength=num_classes)
    return counts


def panoptic_quality(counts: np.ndarray, isthing: Sequence[bool]) -> dict[str, Any]:
    """Turn counts into PQ, SQ and RQ, in 0..1.

    Args:
        counts: (C, 4), the sum of `panoptic_counts` over images.
        isthing: Whether each class is a thing.

    Returns:
        ``All``, ``Things``, ``Stuff``: ``pq``, ``sq``, ``rq`` (means over the classes with a count; NaN if there is
        none) and ``n`` (how many those are); ``per_class``: a list of ``pq``, ``sq``, ``rq``, ``tp``, ``fp``, ``fn``,
        ``iou_sum`` a class, 0 where nothing was counted.
    """
    iou_sum, tp, fp, fn = counts.T
    weight = tp + 0.5 * fp + 0.5 * fn
    counted, things = weight > 0, np.asarray(isthing, bool)
    scores = {
        "pq": np.divide(iou_sum, weight, out=np.zeros(len(counts)), where=counted),
        "sq": np.divide(iou_sum, tp, out=np.zeros(len(counts)), where=tp > 0),
        "rq": np.divide(tp, weight, out=np.zeros(len(counts)), where=counted),
    }
    quality: dict[str, Any] = {}
    for group, members in (("All", counted), ("Things", counted & things), ("Stuff", counted & ~things)):
        n = int(members.sum())
        means = {name: float(values[members].mean()) if n else float("nan") for name, values in scores.items()}
        quality[group] = {**means, "n": n}
    quality["per_class"] = [
        {
            **{name: float(values[c]) for name, values in scores.items()},
            **{"tp": int(tp[c]), "fp": int(fp[c]), "fn": int(fn[c]), "iou_sum": float(iou_sum[c])},
        }
        for c in range(len(counts))
    ]
    return quality


@METRICS.register_module()
class PanopticQuality(BaseMetric):
    """PQ, SQ and RQ of `SegSample` with ``gt_panoptic`` and ``pred_panoptic``, in percent.

    Keeps one (C, 4) array, whatever the number of images. `evaluate` returns ``PQ``, ``SQ``, ``RQ`` and the same with
    ``_th`` (things) and ``_st`` (stuff), and prints a table per class.

    Args:
        out_dir: Folder for the predictions in COCO's panoptic format: ``predictions.json`` and ``predictions/*.png``.

    Attributes:
        per_class: Name -> ``pq``, ``sq``, ``rq`` (0..1), ``tp``, ``fp``, ``fn``, ``iou_sum`` of the last evaluation.
    """

    def __init__(self, out_dir: str | None = None) -> None:
        super().__init__(prefix="PQ")  # without one MMEngine warns; `evaluate` does without
        self.per_class: dict[str, dict] = {}
        self._record: dict[str, Any] | None = None
        self._writer = None if out_dir is None else PredictionWriter(out_dir, dist.get_rank())
        self._reset()

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count a batch of samples (as dictionaries, see MMEngine's ``Evaluator``)."""
        for sample in data_samples:
            truth, prediction = require_fields(sample, "gt_panoptic", "pred_panoptic")
            ids, num_classes = prediction.numpy(), len(self.dataset_meta["classes"])
            try:
                counts = panoptic_counts(truth.numpy(), truth.segments, ids, prediction.segments, num_classes)
            except ValueError as error:
                raise ValueError(f"{sample.get('img_path', 'a sample')}: {error}") from error
            self._counts = counts if self._counts is None else self._counts + counts
            self._images += 1
            if self._writer is not None:
                segments = [_file_segment(s, self.dataset_meta["category_ids"]) for s in prediction.segments]
                self._writer.write(sample["img_id"], Path(sample["img_path"]).stem, ids, segments)

    def evaluate(self, size: int) -> dict[str, float]:
        """Sum over the processes, print the table, begin anew, and return the metrics on every rank.

        Args:
            size: Images in the data set.

        Raises:
            ValueError: The processes together did not count each image once.
        """
        counts, images = self._gather()
        check_counted("PanopticQuality", images, size)
        metrics = self.compute_metrics([counts])
        if dist.is_main_process():
            MMLogger.get_current_instance().info("\n" + panoptic_table(self.metrics_record()))
            if self._writer is not None:
                self._writer.merge(dist.get_world_size(), images)
        dist.barrier()  # nobody begins the next round's files before they are merged
        return metrics

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        """Return the metrics in percent of a list of counts (C, 4), and keep the record."""
        quality = panoptic_quality(sum(results), self.dataset_meta["isthing"])
        self.per_class = dict(zip(self.dataset_meta["classes"], quality["per_class"], strict=True))
        self._record = {**quality, "per_class": self.per_class}
        groups = (("", "All"), ("_th", "Things"), ("_st", "Stuff"))
        return {f"{s}{suffix}": 100 * quality[group][s.lower()] for suffix, group in groups for s in ("PQ", "SQ", "RQ")}

    def metrics_record(self) -> dict[str, Any]:
        """Return the last evaluation in full, values 0..1: ``All``, ``Things``, ``Stuff``, ``per_class`` by name."""
        if self._record is None:
            raise ValueError("PanopticQuality has no record yet: call `evaluate` first")
        return self._record

    def _reset(self) -> None:
        self._counts: np.ndarray | None = None
        self._images = 0

    def _gather(self) -> tuple[np.ndarray, int]:
        """Return the counts (C, 4) and the number of images of all processes, and begin anew."""
        if self._writer is not None:
            self._writer.close()
        num_classes = len(self.dataset_meta["classes"])
        counts = np.zeros((num_classes, 4)) if self._counts is None else self._counts
        total = torch.from_numpy(np.append(counts.ravel(), float(self._images)))  # (4C + 1,)
        self._reset()
        dist.all_reduce(total)
        return total[:-1].numpy().reshape(num_classes, 4), int(total[-1])


def evaluate_files(
    gt_json: str | Path,
    gt_dir: str | Path,
    pred_json: str | Path,
    pred_dir: str | Path,
    num_workers: int = 0,
    boundary_ratio: float | None = None,
) -> dict[str, Any]:
    """Score predictions in COCO's panoptic format; images of the prediction that the truth lacks are left out.

    Args:
        gt_json: Ground truth: ``categories`` and ``annotations``. Its areas are taken for the truth.
        gt_dir: Folder of its PNGs.
        pred_json: Predictions: ``annotations``.
        pred_dir: Folder of their PNGs.
        num_workers: Processes besides this one; 0 = this one does the work.
        boundary_ratio: Boundary PQ instead of PQ, see `panoptic_counts`; 0.02 for COCO, 0.005 for Cityscapes.

    Returns:
        As `panoptic_quality`, with ``per_class`` a dictionary by category id (a string).

    Raises:
        FileNotFoundError: A JSON or a PNG is missing.
        ValueError: A file is broken, truth and prediction do not fit together, or an image has no prediction.
    """
    truth, prediction = read_json(gt_json, ("categories", "annotations")), read_json(pred_json, ("annotations",))
    categories = records_by_key(truth["categories"], "id", ("id", "isthing"), f"{gt_json}: categories")
    needed = ("image_id", "file_name", "segments_info")
    true_images = records_by_key(truth["annotations"], "image_id", needed, f"{gt_json}: annotations")
    pred_images = records_by_key(prediction["annotations"], "image_id", needed, f"{pred_json}: annotations")
    missing = [image for image in true_images if image not in pred_images]
    if missing:
        raise ValueError(
            f"{pred_json}: no prediction for {len(missing)} images, the first with image_id {missing[0]!r}"
        )

    labels = {number: label for label, number in enumerate(categories)}
    pairs = [(record, pred_images[image]) for image, record in true_images.items()]
    folders = dict(gt_dir=Path(gt_dir), pred_dir=Path(pred_dir))
    count = partial(_count_files, **folders, labels=labels, boundary_ratio=boundary_ratio)
    counts = sum(_map(count, pairs, num_workers), np.zeros((len(labels), 4)))
    quality = panoptic_quality(counts, [bool(category["isthing"]) for category in categories.values()])
    return {**quality, "per_class": {str(number): quality["per_class"][label] for number, label in labels.items()}}


def evaluate_and_print(
    gt_json: str,
    gt_dir: str,
    pred_json: str,
    pred_dir: str,
    num_workers: int = 0,
    boundary_ratio: float | None = None,
    out: str | None = None,
) -> None:
    """Print the table of `evaluate_files` and write its figures as JSON to ``out`` (NaN becomes null)."""
    record = evaluate_files(gt_json, gt_dir, pred_json, pred_dir, num_workers, boundary_ratio)
    print(panoptic_table(record, category_names(gt_json)))
    if out is not None:
        write_record(out, record)


def category_names(gt_json: str | Path) -> dict[str, str]:
    """Return the class names of a COCO panoptic JSON by category id (a string), for `panoptic_table`."""
    categories = read_json(gt_json, ("categories",))["categories"]
    return {str(category["id"]): category.get("name", str(category["id"])) for category in categories}


def _overlaps(
    gt_ids: np.ndarray, true_id: np.ndarray, pred_ids: np.ndarray, pred_id: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count the pixels of each pair of segment numbers.

    Returns:
        (g, p) int64 pixels: row and column 0 void, the last ones numbers that no record has; the row of every true
        segment (G,) and the column of every predicted one (P,).
    """
    true, pred = gt_ids.ravel(), pred_ids.ravel()
    change = true[1:] != true[:-1]
    change |= pred[1:] != pred[:-1]
    ends = np.append(np.flatnonzero(change), true.size - 1) if true.size else np.empty(0, np.int64)
    lengths = np.diff(ends, prepend=-1)
    true_numbers, pred_numbers = np.unique([0, *true_id.tolist()]), np.unique([0, *pred_id.tolist()])
    row, column = _positions(true[ends], true_numbers), _positions(pred[ends], pred_numbers)
    shape = len(true_numbers) + 1, len(pred_numbers) + 1
    pixels = np.bincount(row * shape[1] + column, lengths, shape[0] * shape[1])  # float64 is exact up to 2**53
    overlap = pixels.astype(np.int64).reshape(shape)
    return overlap, np.searchsorted(true_numbers, true_id), np.searchsorted(pred_numbers, pred_id)


def _contour_iou(
    gt_ids: np.ndarray, true_id: np.ndarray, pred_ids: np.ndarray, pred_id: np.ndarray, ratio: float
) -> np.ndarray:
    """Return the boundary IoU (G, P) of all pairs; as in the official tool the contours are drawn before void is left out."""
    # -1, which no record has, stands for a segment's inside; void has none.
    edges = [np.where(contours(ids, ratio) | (ids == 0), ids.astype(np.int64), -1) for ids in (gt_ids, pred_ids)]
    overlap, rows, columns = _overlaps(edges[0], true_id, edges[1], pred_id)
    shared = overlap[np.ix_(rows, columns)]  # (G, P)
    union = overlap.sum(axis=1)[rows][:, None] + (overlap.sum(axis=0) - overlap[0])[columns] - shared
    return np.divide(shared, union, out=np.zeros(shared.shape), where=union > 0)


def _positions(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return where each value stands in the sorted numbers, ``len(numbers)`` where it does not."""
    values = values.astype(np.int64)
    at = np.searchsorted(numbers, values)
    known = numbers[np.minimum(at, len(numbers) - 1)] == values
    return np.where(known, at, len(numbers))


def _columns(segments: Sequence[Mapping], num_classes: int, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers, labels and crowd flags of records; of two with one number the last counts."""
    unique = {segment["id"]: segment for segment in segments}
    labels = np.array([segment["label"] for segment in unique.values()], np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() < num_classes:
        wrong = next(s for s in unique.values() if not 0 <= s["label"] < num_classes)
        raise ValueError(f"the {what} segment {wrong['id']} has label {wrong['label']}, outside 0..{num_classes - 1}")
    crowd = np.array([bool(segment.get("iscrowd", False)) for segment in unique.values()], bool)
    return np.array(list(unique), np.int64), labels, crowd


def _check_prediction(overlap: np.ndarray, ids: np.ndarray, numbers: np.ndarray, columns: np.ndarray) -> None:
    area = overlap.sum(axis=0)
    if area[-1]:
        unknown = np.setdiff1d(ids, [0, *numbers.tolist()])
        raise ValueError(f"the predicted map has segments {unknown[:5].tolist()} that its records lack; list them")
    if (area[columns] == 0).any():
        absent = numbers[area[columns] == 0]
        raise ValueError(f"the predicted records have segments {absent[:5].tolist()} without a pixel; leave them out")


def _forgiven(
    shared: np.ndarray,
    true_label: np.ndarray,
    crowd: np.ndarray,
    pred_label: np.ndarray,
    pred_area: np.ndarray,
    on_void: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """Return which predictions (P,) lie for more than half on void and the crowd of their class."""
    crowd_row = np.full(num_classes, -1)
    for row in np.flatnonzero(crowd):  # the last crowd of a class stays, as in the official tool
        crowd_row[true_label[row]] = row
    row = crowd_row[pred_label]  # (P,), -1 = no crowd
    ignored = on_void.copy()
    some = np.flatnonzero(row >= 0)
    ignored[some] += shared[row[some], some]
    return ignored / pred_area > 0.5


def _count_files(
    pair: tuple[dict, dict], gt_dir: Path, pred_dir: Path, labels: Mapping[int, int], boundary_ratio: float | None
) -> np.ndarray:
    """Count one image (C, 4) from its two annotations."""
    truth, prediction = pair
    gt_path, pred_path = gt_dir / truth["file_name"], pred_dir / prediction["file_name"]
    try:
        true_segments = _labelled(truth["segments_info"], ("id", "category_id", "iscrowd", "area"), labels, "true")
        pred_segments = _labelled(prediction["segments_info"], ("id", "category_id"), labels, "predicted")
        areas = {segment["id"]: segment["area"] for segment in true_segments}
        maps = read_id_map(gt_path), true_segments, read_id_map(pred_path), pred_segments
        return panoptic_counts(*maps, len(labels), areas, boundary_ratio)
    except ValueError as error:
        where = f"image_id {truth['image_id']!r} (truth {gt_path}, prediction {pred_path})"
        raise ValueError(f"{where}: {error}") from error


def _labelled(records: list[dict], needed: Sequence[str], labels: Mapping[int, int], what: str) -> list[dict]:
    """Return copies of segment records with the contiguous ``label`` of their category."""
    segments = records_by_key(records, "id", needed, f"{what} segments_info").values()
    for segment in segments:
        if segment["category_id"] not in labels:
            known = f"{min(labels)}..{max(labels)}" if labels else "none"
            raise ValueError(
                f"the {what} segment {segment['id']} has category_id {segment['category_id']!r}, which `categories` of "
                f"the ground truth lacks (it has {len(labels)}, {known})"
            )
    return [{**segment, "label": labels[segment["category_id"]]} for segment in segments]


def _file_segment(segment: Mapping, category_ids: Sequence[int]) -> dict[str, Any]:
    """Return a prediction's record in COCO's format."""
    record = {"id": int(segment["id"]), "category_id": int(category_ids[segment["label"]])}
    return record if segment.get("score") is None else {**record, "score": float(segment["score"])}


def _map(function: partial, items: list, num_workers: int) -> Iterable[np.ndarray]:
    """Yield the results one after another, from a pool of processes if workers are asked for."""
    if num_workers == 0:
        yield from map(function, items)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(function, items, chunksize=16)


def _size(ids: np.ndarray) -> str:
    return "x".join(str(side) for side in ids.shape)
