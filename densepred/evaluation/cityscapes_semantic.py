"""Cityscapes' semantic benchmark: IoU and iIoU of classes and categories, as a metric and on files.

Cordts et al., "The Cityscapes Dataset" (CVPR 2016), section 4.1; the details follow ``evalPixelLevelSemanticLabeling`` of
https://github.com/mcordts/cityscapesScripts 2.3.0, whose numbers these equal. A prediction of an id that the benchmark
ignores is a miss and no false positive. iIoU weighs each object's pixels by (mean size of its class / its own size), so
that small objects count as much as large ones; false positives have weight 1.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import dist
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger

from densepred.data.class_tables import CITYSCAPES
from densepred.data.dataset import resolve_data_root
from densepred.data.loading import read_label_map
from densepred.evaluation.cityscapes_instance import NUM_LABELS, TRUTH_SUFFIX, read_instance_ids
from densepred.evaluation.record import check_counted, write_record
from densepred.evaluation.table import text_table
from densepred.registry import METRICS
from densepred.structures import require_fields

NAMES = {label: name for label, name, *_ in CITYSCAPES}
"""The 19 label ids that count, and their names."""
CATEGORIES = {
    "flat": range(7, 11),
    "construction": range(11, 17),
    "object": range(17, 21),
    "nature": range(21, 23),
    "sky": range(23, 24),
    "human": range(24, 26),
    "vehicle": range(26, 34),
}
"""Label ids of a category, ignored ones included."""
MEAN_SIZES = {
    24: 3462.4756337644,
    25: 3930.4788056518,
    26: 12794.0202738185,
    27: 27855.1264367816,
    28: 35732.1511111111,
    31: 67583.7075812274,
    32: 6298.7200839748,
    33: 4672.3249222261,
}
"""Pixels of a class's mean object, constants of the official script."""


def frame_counts(instance_ids: np.ndarray, pred_ids: np.ndarray) -> np.ndarray:
    """Count one frame.

    Args:
        instance_ids: (H, W) truth as in instanceIds files: class * 1000 + number of objects, else the label id. (The
            official script reads the classes from labelIds files, which say the same.)
        pred_ids: (H, W) predicted label ids, 0..33.

    Returns:
        (2, 34, 34) float64, row = truth, column = prediction: pixels, and pixels of objects, weighted.

    Raises:
        ValueError: The sizes differ or a label is outside 0..33.
    """
    if instance_ids.shape != pred_ids.shape:
        sizes = ["x".join(map(str, array.shape)) for array in (pred_ids, instance_ids)]
        raise ValueError(f"the prediction is {sizes[0]} pixels and the ground truth {sizes[1]}")
    for what, ids, end in (("predicted", pred_ids, NUM_LABELS), ("true", instance_ids, 1000 * NUM_LABELS)):
        if ids.max(initial=0) >= end:
            raise ValueError(
                f"{what} id {ids.max()} is not below {end}; Cityscapes' label ids are 0..33, not train ids"
            )
    pairs = instance_ids.astype(np.int64).ravel() * NUM_LABELS + pred_ids.ravel()
    parts = np.bincount(pairs, minlength=1000 * NUM_LABELS**2).reshape(-1, NUM_LABELS)  # (34000, 34)
    counts = np.zeros((2, NUM_LABELS, NUM_LABELS))
    for number in np.flatnonzero(parts.any(1)).tolist():
        label, found = number if number < 1000 else number // 1000, parts[number]
        counts[0, label] += found
        if number > 1000 and label in MEAN_SIZES:
            counts[1, label] += found * (MEAN_SIZES[label] / found.sum())
    return counts


def cityscapes_quality(counts: np.ndarray) -> dict[str, Any]:
    """Turn counts into scores, in 0..1, NaN where there is nothing to measure.

    Args:
        counts: (2, 34, 34), the sum of `frame_counts` over frames.

    Returns:
        ``classes`` and ``categories``: name -> ``iou``, ``iiou``; ``mIoU``, ``miIoU`` and, of categories, ``mIoU_cat``,
        ``miIoU_cat``: their means over what is not NaN.
    """
    counted = np.isin(np.arange(NUM_LABELS), list(NAMES))
    pixels, weighted = counts[0] * counted[:, None], counts[1]  # rows of ignored truth do not count
    classes = {name: _scores(pixels, weighted, [label], [label]) for label, name in NAMES.items()}
    categories = {
        name: _scores(pixels, weighted, [label for label in members if counted[label]], members)
        for name, members in CATEGORIES.items()
    }
    return {
        "mIoU": _mean(classes, "iou"),
        "miIoU": _mean(classes, "iiou"),
        "mIoU_cat": _mean(categories, "iou"),
        "miIoU_cat": _mean(categories, "iiou"),
        "classes": classes,
        "categories": categories,
    }


@METRICS.register_module()
class CityscapesIoU(BaseMetric):
    """What Cityscapes' semantic benchmark measures beside IoU: iIoU, and both for categories, in percent.

    The truth is read from the label files, ``gtFine/<split>/<city>/<frame>_gtFine_instanceIds.png``: it holds the objects.
    Keeps one (2, 34, 34) array. `evaluate` returns ``miIoU``, ``mIoU_cat`` and ``miIoU_cat`` and prints the official
    table; the mIoU in it equals that of `densepred.evaluation.semantic.SemanticIoU`, beside which this one stands in a config
    (``semantic=[dict(type="SemanticIoU"), dict(type="CityscapesIoU", data_root=...)]``) and which also writes predictions.

    Args:
        data_root: Folder with ``gtFine/``, see `densepred.data.dataset.resolve_data_root`.
        split: ``train`` or ``val``.

    Attributes:
        per_class: Name -> ``iou``, ``iiou`` (0..1, NaN where there is nothing to measure) of the last evaluation.

    Raises:
        FileNotFoundError: There are no labels of the split.
    """

    def __init__(self, data_root: str, split: str = "val") -> None:
        super().__init__(prefix="cityscapes")  # without one MMEngine warns; `evaluate` does without
        self.gt_dir = Path(resolve_data_root(data_root)) / "gtFine" / split
        if not self.gt_dir.is_dir():
            raise FileNotFoundError(f"CityscapesIoU: {self.gt_dir} does not exist; see datasets/README.md")
        self.per_class: dict[str, dict] = {}
        self._record: dict[str, Any] | None = None
        self._reset()

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count a batch of samples (as dictionaries, see MMEngine's ``Evaluator``)."""
        ids = np.asarray(self.dataset_meta["category_ids"])
        if not set(ids.tolist()) <= NAMES.keys():
            raise ValueError(
                f"CityscapesIoU: category_ids {ids.tolist()} are not Cityscapes' 7..33; use SemanticIoU alone"
            )
        for sample in data_samples:
            (prediction,) = require_fields(sample, "pred_semantic")
            frame = Path(sample["img_path"]).stem.removesuffix("_leftImg8bit")
            truth = read_instance_ids(self.gt_dir / frame.split("_")[0] / f"{frame}{TRUTH_SUFFIX}")
            classes = prediction.cpu().numpy()
            if classes.size and not 0 <= classes.min() <= classes.max() < len(ids):
                raise ValueError(f"{sample['img_path']}: predicted classes outside 0..{len(ids) - 1}")
            try:
                self._counts += frame_counts(truth, ids[classes])
            except ValueError as error:
                raise ValueError(f"{sample['img_path']}: {error}") from error
            self._images += 1

    def evaluate(self, size: int) -> dict[str, float]:
        """Sum over the processes, print the table, begin anew, and return the metrics on every rank.

        Args:
            size: Images in the data set.

        Raises:
            ValueError: The processes together did not count each image once.
        """
        total = torch.from_numpy(np.append(self._counts.ravel(), float(self._images)))  # (2 * 34 * 34 + 1,)
        self._reset()
        dist.all_reduce(total)
        check_counted("CityscapesIoU", int(total[-1]), size)
        metrics = self.compute_metrics([total[:-1].numpy().reshape(self._counts.shape)])
        if dist.is_main_process():
            MMLogger.get_current_instance().info("\n" + cityscapes_table(self.metrics_record()))
        return metrics

    def compute_metrics(self, results: list[np.ndarray]) -> dict[str, float]:
        """Return the metrics in percent of a list of counts (2, 34, 34), and keep the record."""
        self._record = cityscapes_quality(sum(results))
        self.per_class = self._record["classes"]
        return {name: 100 * self._record[name] for name in ("miIoU", "mIoU_cat", "miIoU_cat")}

    def metrics_record(self) -> dict[str, Any]:
        """Return the last evaluation in full, see `cityscapes_quality`."""
        if self._record is None:
            raise ValueError("CityscapesIoU has no record yet: call `evaluate` first")
        return self._record

    def _reset(self) -> None:
        self._counts = np.zeros((2, NUM_LABELS, NUM_LABELS))
        self._images = 0


def evaluate_files(gt_dir: str | Path, pred_dir: str | Path) -> dict[str, Any]:
    """Score predictions in the official format: one PNG of label ids a frame, its name beginning as the truth's does.

    Args:
        gt_dir: Folder with ``*_gtFine_instanceIds.png`` in it or below.
        pred_dir: Folder with ``<city>_<sequence>_<frame>*.png`` in it or below.

    Returns:
        See `cityscapes_quality`.

    Raises:
        FileNotFoundError: There is no truth, or a frame has no prediction.
        ValueError: A file cannot be used, or a frame has several predictions.
    """
    pairs = pair_frames(Path(gt_dir), Path(pred_dir))

    def count(some: Sequence[tuple[Path, Path]]) -> np.ndarray:
        total = np.zeros((2, NUM_LABELS, NUM_LABELS))
        for truth, prediction in some:
            maps = read_instance_ids(truth), read_label_map(prediction)
            try:
                total += frame_counts(*maps)
            except ValueError as error:
                raise ValueError(f"{prediction} (truth {truth}): {error}") from error
        return total

    workers = cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        return cityscapes_quality(sum(pool.map(count, (pairs[i::workers] for i in range(workers)))))


def pair_frames(gt_dir: Path, pred_dir: Path) -> list[tuple[Path, Path]]:
    """Return the files of truth and prediction of every frame, see `evaluate_files`."""
    truths = sorted(gt_dir.rglob(f"*{TRUTH_SUFFIX}"))
    if not truths:
        raise FileNotFoundError(f"{gt_dir}: no *{TRUTH_SUFFIX} in it; give gtFine/val or the folder above")
    predictions: dict[str, list[Path]] = {}
    for path in pred_dir.rglob("*.png"):
        predictions.setdefault(_frame(path), []).append(path)
    pairs = []
    for truth in truths:
        found = sorted(predictions.get(_frame(truth), []))
        if not found:
            raise FileNotFoundError(f"{pred_dir}: no prediction {_frame(truth)}*.png of {truth}; write label ids there")
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} are both predictions of {truth}; leave one")
        pairs.append((truth, found[0]))
    return pairs


def evaluate_and_print(gt_dir: str, pred_dir: str, out: str | None = None) -> None:
    """Print the table of `evaluate_files` and write its figures as JSON to ``out`` (NaN becomes null)."""
    record = evaluate_files(gt_dir, pred_dir)
    print(cityscapes_table(record))
    if out is not None:
        write_record(out, record)


def cityscapes_table(record: dict[str, Any]) -> str:
    """Return the table of a record of `cityscapes_quality`, in percent."""
    rows: list[Sequence] = []
    for group, suffix in (("classes", ""), ("categories", "_cat")):
        rows += [[name, 100 * values["iou"], 100 * values["iiou"]] for name, values in record[group].items()]
        rows += [[f"mean of {group}", 100 * record[f"mIoU{suffix}"], 100 * record[f"miIoU{suffix}"]], []]
    return text_table(["class", "IoU", "iIoU"], rows[:-1], title="Cityscapes, semantic")


def _frame(path: Path) -> str:
    return "_".join(path.stem.split("_")[:3])


def _scores(
    pixels: np.ndarray, weighted: np.ndarray, labels: Sequence[int], instance_labels: Sequence[int]
) -> dict[str, float]:
    """Return IoU and iIoU of classes as one.

    Args:
        pixels: (34, 34) of the rows that count.
        weighted: (34, 34).
        labels: The classes, for the IoU.
        instance_labels: The same with the ignored ones, which the official iIoU takes for right.
    """
    right, all_true = pixels[np.ix_(labels, labels)].sum(), pixels[labels].sum()
    spurious = pixels[:, labels].sum() - right
    scores = {"iou": _ratio(right, all_true + spurious), "iiou": float("nan")}
    if set(labels) <= MEAN_SIZES.keys():  # objects are known of all
        right = weighted[np.ix_(labels, instance_labels)].sum()
        outside = np.delete(pixels, list(instance_labels), axis=0)
        scores["iiou"] = _ratio(right, weighted[labels].sum() + outside[:, instance_labels].sum())
    return scores


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("nan")


def _mean(groups: dict[str, dict[str, float]], score: str) -> float:
    known = [values[score] for values in groups.values() if values[score] == values[score]]
    return sum(known) / len(known) if known else float("nan")
