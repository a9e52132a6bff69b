"""Cityscapes' instance AP: counting one frame, averaging, the streaming metric, and scoring of folders.

Cordts et al., "The Cityscapes Dataset" (CVPR 2016), section 4.2; the details follow ``evalInstanceLevelSemanticLabeling``
of https://github.com/mcordts/cityscapesScripts 2.3.0, whose numbers these equal. The counting is our own: one histogram of
the true ids under a predicted mask replaces a full-frame comparison per object, the ten overlaps are decided frame by
frame, and no cache file is read or written.
"""

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine import dist
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from PIL import Image

from densepred.data.dataset import resolve_data_root
from densepred.evaluation.boundary import contours, mask_contour
from densepred.evaluation.record import check_counted, write_record
from densepred.evaluation.table import text_table
from densepred.heads.polygon_masks import depth_order
from densepred.registry import METRICS
from densepred.structures import require_fields

OVERLAPS = np.arange(0.5, 1.0, 0.05)
"""(T,) IoU to be exceeded; the official steps, with their floating-point error."""
MIN_PIXELS = 100
"""Smaller objects are neither found nor missed."""
TRUTH_SUFFIX = "_gtFine_instanceIds.png"
NUM_LABELS = 34
"""Label ids in the files are 0..33."""
IGNORED, FOUND, SPURIOUS = range(3)
"""What a prediction is at one overlap."""


class FrameCounts(NamedTuple):
    """What is kept of one frame, or of many.

    Attributes:
        label_ids: (P,) int64 class of each prediction that is not empty.
        scores: (P,) float64.
        outcomes: (P, T) int8, `IGNORED`, `FOUND` or `SPURIOUS` at each of `OVERLAPS`.
        objects: (34,) int64, objects to be found by label id.
    """

    label_ids: np.ndarray
    scores: np.ndarray
    outcomes: np.ndarray
    objects: np.ndarray


def frame_counts(
    instance_ids: np.ndarray,
    predictions: Iterable[tuple[np.ndarray, int, float]],
    boundary_ratio: float | None = None,
) -> FrameCounts:
    """Count one frame.

    A prediction finds an object of its class if their IoU exceeds the overlap; of several the one with the highest score
    counts, the others are spurious. One that finds nothing is forgiven if the share of it on ignored classes, groups and
    small objects of its class exceeds the overlap, or if it fits such a group or small object.

    Args:
        instance_ids: (H, W) integer; ``label id * 1000 + number`` for an object, the bare label id for stuff and groups.
        predictions: Masks (H, W) bool, label ids and scores; read once, so they may be made on the way. Those of classes
            without instances and empty ones are left out.
        boundary_ratio: Take the smaller of IoU and boundary IoU, contours as wide as
            `densepred.evaluation.boundary.contour_width` says; what no contour touches then forgives nothing either.

    Raises:
        ValueError: A true or predicted label id does not exist, or the sizes differ.
    """
    instance_labels, ignored = _label_ids()
    numbers, index = _compact(instance_ids)
    true_label = np.where(numbers < 1000, numbers, numbers // 1000)  # (K,)
    if true_label.size and true_label.max() >= NUM_LABELS:
        raise ValueError(f"the ground truth has id {numbers[-1]}, but label ids end at {NUM_LABELS - 1}")
    area = np.bincount(index.ravel(), minlength=len(numbers))  # (K,)
    countable = np.isin(true_label, instance_labels) & (numbers >= 1000) & (area >= MIN_PIXELS)

    edges = None if boundary_ratio is None else contours(index, boundary_ratio)
    label_ids, scores, shared, edge_shared, edge_pixels = [], [], [], [], []
    for mask, label_id, score in predictions:
        if not -1 <= label_id < NUM_LABELS or math.isnan(score):
            raise ValueError(f"a prediction has label id {label_id} and score {score}; ids are 0..{NUM_LABELS - 1}")
        if mask.shape != index.shape:
            sizes = ["x".join(map(str, shape)) for shape in (mask.shape, index.shape)]
            raise ValueError(f"a predicted mask is {sizes[0]} pixels and the ground truth {sizes[1]}")
        if label_id not in instance_labels or not (rows := np.flatnonzero(mask.any(axis=1))).size:
            continue
        band = slice(rows[0], rows[-1] + 1)
        shared.append(np.bincount(index[band][mask[band]], minlength=len(numbers)))
        label_ids.append(label_id)
        scores.append(score)
        if edges is not None:
            edge = mask_contour(mask, boundary_ratio)
            edge_shared.append(np.bincount(index[edge & edges], minlength=len(numbers)))
            edge_pixels.append(np.count_nonzero(edge))

    overlap = np.array(shared, np.int64).reshape(len(shared), len(numbers))  # (P, K)
    predicted, confidence = np.array(label_ids, np.int64), np.array(scores, np.float64)
    pixels = overlap.sum(axis=1)  # (P,)
    on_void = overlap[:, np.isin(numbers, ignored)].sum(axis=1)
    overlap *= predicted[:, None] == true_label
    iou = overlap / (area + pixels[:, None] - overlap)  # (P, K)
    if edges is not None and label_ids:
        edge_overlap, edge_area = np.array(edge_shared), np.bincount(index[edges], minlength=len(numbers))
        overlap[edge_overlap == 0] = 0
        iou = np.minimum(iou, edge_overlap / (edge_area + np.array(edge_pixels)[:, None] - edge_overlap))
    outcomes = _outcomes(overlap, iou, area, pixels, on_void, countable, numbers < 1000, confidence)
    objects = np.bincount(true_label[countable], minlength=NUM_LABELS)
    return FrameCounts(predicted, confidence, outcomes, objects)


def average_precision(counts: FrameCounts) -> np.ndarray:
    """Return the AP (C, T), 0..1, by class (ascending label id) and overlap; NaN for a class without an object."""
    labels = _label_ids()[0]
    result = np.full((len(labels), len(OVERLAPS)), math.nan)
    for row, label in enumerate(labels):
        mine = counts.label_ids == label
        if counts.objects[label]:
            for column in range(len(OVERLAPS)):
                outcomes = counts.outcomes[mine, column]
                kept = outcomes != IGNORED
                found = outcomes[kept] == FOUND
                result[row, column] = _area_under_curve(counts.scores[mine][kept], found, counts.objects[label])
    return result


def instance_record(counts: FrameCounts) -> dict[str, Any]:
    """Return the official averages, 0..1: ``allAp``, ``allAp50%``, ``classes`` (name -> ``ap``, ``ap50%``).

    Also ``apMatrix`` (C, T) and ``overlaps`` (T,) as lists. NaN where there is no object.
    """
    matrix = average_precision(counts)
    some = matrix[~np.isnan(matrix[:, 0])]
    means = (float(some.mean()), float(some[:, 0].mean())) if len(some) else (math.nan, math.nan)
    names = instance_names().values()
    return {
        "allAp": means[0],
        "allAp50%": means[1],
        "classes": {
            name: {"ap": float(row.mean()), "ap50%": float(row[0])} for name, row in zip(names, matrix, strict=True)
        },
        "apMatrix": matrix.tolist(),
        "overlaps": OVERLAPS.tolist(),
    }


def instance_names() -> dict[int, str]:
    """Return the names of the eight classes with instances by label id."""
    from cityscapesscripts.helpers.labels import labels

    return {label.id: label.name for label in labels if label.hasInstances and not label.ignoreInEval}


def evaluate_folders(gt_dir: str | Path, pred_dir: str | Path, boundary_ratio: float | None = None) -> dict[str, Any]:
    """Score predictions in the official format.

    Args:
        gt_dir: Folder with ``*_gtFine_instanceIds.png`` at any depth.
        pred_dir: Folder with one text file ``<city>_<sequence>_<frame>*.txt`` a frame at any depth; its lines are
            ``mask.png label_id score``, the path relative to the text file.
        boundary_ratio: Boundary AP instead of AP, see `frame_counts`.

    Returns:
        See `instance_record`.

    Raises:
        FileNotFoundError: A folder, text file or mask is missing.
        ValueError: A file is broken, or two text files claim one frame.
    """
    truths = sorted(Path(gt_dir).rglob(f"*{TRUTH_SUFFIX}"))
    if not truths:
        raise FileNotFoundError(f"{gt_dir}: no *{TRUTH_SUFFIX} in it; give gtFine/val or the folder above")
    texts = sorted(Path(pred_dir).rglob("*.txt"))
    frames = [(truth, _text_of(truth.name.removesuffix(TRUTH_SUFFIX), texts, pred_dir)) for truth in truths]
    counts = []
    for truth, text in frames:
        try:
            predictions = _read_predictions(text, Path(pred_dir))
            counts.append(frame_counts(read_instance_ids(truth), predictions, boundary_ratio))
        except ValueError as error:
            raise ValueError(f"{text} (truth {truth}): {error}") from error
    return instance_record(_join(counts))


def evaluate_and_print(gt_dir: str, pred_dir: str, boundary_ratio: float | None = None, out: str | None = None) -> None:
    """Print the table of `evaluate_folders` and write its figures as JSON to ``out`` (NaN becomes null)."""
    record = evaluate_folders(gt_dir, pred_dir, boundary_ratio)
    print(instance_table(record))
    if out is not None:
        write_record(out, record)


def instance_table(record: Mapping[str, Any]) -> str:
    """Return the table of a record of `instance_record`, in percent."""
    rows: list[Sequence] = [
        [name, 100 * values["ap"], 100 * values["ap50%"]] for name, values in record["classes"].items()
    ]
    measured = sum(not math.isnan(values["ap"]) for values in record["classes"].values())
    rows += [[], [f"All ({measured} classes)", 100 * record["allAp"], 100 * record["allAp50%"]]]
    return text_table(["class", "AP", "AP50"], rows, title="Cityscapes instance AP")


def read_instance_ids(path: str | Path) -> np.ndarray:
    """Return the ids (H, W) of an instanceIds PNG.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no image of one integer channel.
    """
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path}: no such label file; unpack gtFine_trainvaltest.zip into the data root")
        raise ValueError(f"{path}: not a readable PNG (truncated, empty or another format)")
    if image.ndim != 2:
        raise ValueError(f"{path}: {image.shape[2]} channels; an instanceIds PNG has one of 16 bits")
    return image


class FolderWriter:
    """Writes predictions in the official format: ``DIR/<frame>.txt`` and ``DIR/masks/<frame>_<number>.png``.

    Args:
        out_dir: Output folder, created.
        mask_dir: Folder of the masks beside the text files; empty: none of their own.
    """

    def __init__(self, out_dir: str | Path, mask_dir: str = "masks") -> None:
        self.out_dir, self.mask_dir = Path(out_dir), mask_dir

    def write(self, frame: str, masks: Sequence[np.ndarray], label_ids: Sequence[int], scores: Sequence[float]) -> None:
        """Write one frame: masks (H, W) bool, their label ids and scores; its name may begin with a folder."""
        folder, stem = (self.out_dir / frame).parent, Path(frame).name
        (folder / self.mask_dir).mkdir(parents=True, exist_ok=True)
        names = [str(PurePosixPath(self.mask_dir, f"{stem}_{number:03d}.png")) for number in range(len(masks))]
        with ThreadPoolExecutor(4) as pool:  # zlib runs without the GIL
            list(pool.map(_write_mask, [folder / name for name in names], masks))
        lines = [f"{name} {label} {score!r}\n" for name, label, score in zip(names, label_ids, scores, strict=True)]
        (folder / f"{stem}.txt").write_text("".join(lines))


@METRICS.register_module()
class CityscapesInstance(BaseMetric):
    """Cityscapes' AP of `SegSample` with ``pred_instances``, in percent.

    The truth is read from the label files: ``gtFine/<split>/<city>/<frame>_gtFine_instanceIds.png``. Predictions of stuff
    classes are left out, so a model of 19 classes and one of 8 both work. Keeps a few bytes a prediction. `evaluate`
    returns ``AP`` and ``AP50`` and prints a table per class.

    Args:
        data_root: Folder with ``gtFine/``, see `densepred.data.dataset.resolve_data_root`.
        split: ``train`` or ``val``.
        out_dir: Folder for the predictions in the official format, the nearest first where their ``depths`` are known.
        score_factor: Scores are multiplied by it and end at 1, where they are counted and where they are written; CenterPoly
            v2 publishes 1.2. Detections that reach 1 are then equally sure.

    Attributes:
        per_class: Name -> ``ap``, ``ap50%`` (0..1) of the last evaluation.

    Raises:
        FileNotFoundError: There are no labels of the split.
    """

    def __init__(
        self, data_root: str, split: str = "val", out_dir: str | None = None, score_factor: float = 1.0
    ) -> None:
        super().__init__(prefix="instance")  # without one MMEngine warns; `evaluate` does without
        self.gt_dir = Path(resolve_data_root(data_root)) / "gtFine" / split
        if not self.gt_dir.is_dir():
            raise FileNotFoundError(f"CityscapesInstance: {self.gt_dir} does not exist; see datasets/README.md")
        self.score_factor = score_factor
        self.per_class: dict[str, dict] = {}
        self._record: dict[str, Any] | None = None
        self._writer = None if out_dir is None else FolderWriter(out_dir)
        self._counts: list[FrameCounts] = []

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Count a batch of samples (as dictionaries, see MMEngine's ``Evaluator``)."""
        for sample in data_samples:
            (prediction,) = require_fields(sample, "pred_instances")
            if "masks" not in prediction:
                raise ValueError(
                    f"{sample['img_path']}: pred_instances has no masks; set model.head.compose='cityscapes'"
                )
            frame = Path(sample["img_path"]).stem.removesuffix("_leftImg8bit")
            masks = prediction["masks"].cpu().numpy()
            scores = prediction["scores"].cpu().double()
            if self.score_factor != 1:
                scores = (self.score_factor * scores).clamp(max=1)
            scores = scores.tolist()
            truth = read_instance_ids(self.gt_dir / frame.split("_")[0] / f"{frame}{TRUTH_SUFFIX}")
            try:
                label_ids = self._category_ids(prediction["labels"].tolist())
                self._counts.append(frame_counts(truth, zip(masks, label_ids, scores, strict=True)))
            except ValueError as error:
                raise ValueError(f"{sample['img_path']}: {error}") from error
            if self._writer is not None:
                order = depth_order(prediction) if "depths" in prediction else range(len(label_ids))
                kept = [n for n in order if label_ids[n] in instance_names()]
                self._writer.write(
                    frame, [masks[n] for n in kept], [label_ids[n] for n in kept], [scores[n] for n in kept]
                )

    def evaluate(self, size: int) -> dict[str, float]:
        """Join the processes' counts, print the table, begin anew, and return the metrics on every rank.

        Args:
            size: Images in the data set.

        Raises:
            ValueError: The processes together did not count each image once.
        """
        mine, self._counts = self._counts, []
        gathered = dist.all_gather_object((len(mine), _join(mine)))
        images = sum(count for count, _ in gathered)
        check_counted("CityscapesInstance", images, size)
        metrics = self.compute_metrics([counts for _, counts in gathered])
        if dist.is_main_process():
            MMLogger.get_current_instance().info("\n" + instance_table(self.metrics_record()))
        return metrics

    def compute_metrics(self, results: list[FrameCounts]) -> dict[str, float]:
        """Return the metrics in percent of a list of counts, and keep the record."""
        self._record = instance_record(_join(results))
        self.per_class = self._record["classes"]
        return {"AP": 100 * self._record["allAp"], "AP50": 100 * self._record["allAp50%"]}

    def metrics_record(self) -> dict[str, Any]:
        """Return the last evaluation in full, see `instance_record`."""
        if self._record is None:
            raise ValueError("CityscapesInstance has no record yet: call `evaluate` first")
        return self._record

    def _category_ids(self, labels: list[int]) -> list[int]:
        """Return the label ids of contiguous classes."""
        numbers = self.dataset_meta["category_ids"]
        wrong = [label for label in labels if not 0 <= label < len(numbers)]
        if wrong:
            raise ValueError(f"an instance has label {wrong[0]}, outside 0..{len(numbers) - 1}")
        return [int(numbers[label]) for label in labels]


@cache
def _label_ids() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the label ids that are evaluated and those that are ignored."""
    from cityscapesscripts.helpers.labels import labels

    return tuple(instance_names()), tuple(label.id for label in labels if label.ignoreInEval)


def _compact(instance_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids that occur (K,), ascending, and the map (H, W) of their positions."""
    used = np.bincount(instance_ids.ravel()) > 0
    lookup = np.cumsum(used, dtype=np.uint16) - 1
    return np.flatnonzero(used), lookup.astype(np.uint16)[instance_ids]


def _outcomes(
    overlap: np.ndarray,
    iou: np.ndarray,
    area: np.ndarray,
    pixels: np.ndarray,
    on_void: np.ndarray,
    countable: np.ndarray,
    group: np.ndarray,
    scores: np.ndarray,
) -> np.ndarray:
    """Decide every prediction at every overlap.

    Args:
        overlap: (P, K) pixels shared with each true id of the prediction's class, 0 for other classes.
        iou: (P, K) overlap with each true id, for matching.
        area: (K,) pixels of each true id.
        pixels: (P,) those of each prediction.
        on_void: (P,) those on ignored classes.
        countable: (K,) whether a true id is an object to be found.
        group: (K,) whether it is a group (or stuff).
        scores: (P,).

    Returns:
        (P, T) int8.
    """
    outcomes = np.full((len(pixels), len(OVERLAPS)), IGNORED, np.int8)
    if not overlap.size:
        return outcomes
    target = iou.argmax(axis=1)  # above 0.5 there is at most one
    best = iou[np.arange(len(iou)), target]  # (P,)
    small = area < MIN_PIXELS
    forgiving = overlap @ group + overlap @ small  # a small group counts twice, as in the official tool
    share = (on_void + forgiving) / pixels  # (P,)
    fits = best[:, None] > OVERLAPS  # (P, T)
    outcomes[~fits & (share[:, None] <= OVERLAPS)] = SPURIOUS
    fits &= countable[target][:, None]
    outcomes[fits] = SPURIOUS  # until it proves to be its object's best
    order = np.argsort(-scores, kind="stable")
    for t in range(len(OVERLAPS)):
        candidates = order[fits[order, t]]
        _, first = np.unique(target[candidates], return_index=True)
        outcomes[candidates[first], t] = FOUND
    return outcomes


def _area_under_curve(scores: np.ndarray, found: np.ndarray, objects: int) -> float:
    """Integrate precision over recall with half steps to both sides, as the official tool does."""
    order = np.argsort(scores)
    _, first = np.unique(scores[order], return_index=True)  # (U,) ascending thresholds
    at_least = np.append(np.cumsum(found[order][::-1])[::-1], 0)[first] if len(scores) else np.zeros(0)
    precision = np.append(at_least / (len(scores) - first), 1.0)
    recall = np.append(at_least / objects, 0.0)
    padded = np.concatenate([recall[:1], recall, [0.0]])
    return float(precision @ (0.5 * (padded[:-2] - padded[2:])))


def _join(counts: Sequence[FrameCounts]) -> FrameCounts:
    """Return the counts of many frames as one."""
    none = FrameCounts(np.empty(0, int), np.empty(0), np.empty((0, len(OVERLAPS)), np.int8), np.zeros(NUM_LABELS, int))
    label_ids, scores, outcomes, objects = zip(none, *counts, strict=True)
    return FrameCounts(*(np.concatenate(column) for column in (label_ids, scores, outcomes)), sum(objects))


def _text_of(frame: str, texts: Sequence[Path], pred_dir: str | Path) -> Path:
    """Return the text file of a frame: its name begins with city, sequence and number of the frame."""
    match = re.match(r"[^_]+_\d+_\d+", frame)
    if match is None:
        raise ValueError(f"{frame}{TRUTH_SUFFIX}: names of label files begin with <city>_<sequence>_<frame>")
    found = [text for text in texts if text.name.startswith(match.group())]
    if len(found) != 1:
        kind, count = (FileNotFoundError, "no text file") if not found else (ValueError, f"{len(found)} text files")
        raise kind(f"{pred_dir}: {count} {match.group()}*.txt; there must be one a frame, empty if nothing was found")
    return found[0]


def _read_predictions(text: Path, root: Path) -> Iterator[tuple[np.ndarray, int, float]]:
    """Yield mask, label id and score of every line; of two lines with one mask the last counts."""
    entries: dict[str, tuple[int, float]] = {}
    for number, line in enumerate(text.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name, label_id, score = line.split()
            entries[name] = int(float(label_id)), float(score)
        except ValueError:
            raise ValueError(f"line {number}: {line!r} is not `mask.png label_id score`") from None
        if not (text.parent / name).resolve().is_relative_to(root.resolve()):
            raise ValueError(f"line {number}: the mask {name} lies outside {root}")
    for name, (label_id, score) in entries.items():
        yield _read_mask(text.parent / name), label_id, score


def _read_mask(path: Path) -> np.ndarray:
    """Return the mask (H, W) bool of an image of any kind: what is not black in grey values."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such mask; paths are relative to the text file")
        raise ValueError(f"{path}: not a readable PNG (truncated, empty or another format)")
    if image.ndim == 2 and image.dtype == np.uint8:
        return image != 0
    return np.asarray(Image.open(path).convert("L")) != 0  # palettes, colours, 16 bits: the official conversion


def _write_mask(path: Path, mask: np.ndarray) -> None:
    Image.fromarray(mask).save(path, compress_level=1)  # one bit a pixel; half the time of OpenCV's
