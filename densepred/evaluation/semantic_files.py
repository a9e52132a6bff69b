"""Scoring of folders of label maps, of any set by its number of classes or of a known one by its name."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from densepred.data.ade20k import ADE20KSemantic
from densepred.data.binary import ISBI2012, DSB2018Nuclei
from densepred.data.camvid import CamVid
from densepred.data.cityscapes import CityscapesSemantic
from densepred.data.loading import look_up, read_label_map
from densepred.errors import nearest
from densepred.evaluation.boundary import boundary_counts, contour_width
from densepred.evaluation.cityscapes_instance import read_instance_ids
from densepred.evaluation.cityscapes_semantic import pair_frames
from densepred.evaluation.confusion import require_ending, write_confusion
from densepred.evaluation.record import write_record
from densepred.evaluation.semantic import confusion_matrix, semantic_quality
from densepred.evaluation.table import semantic_table
from densepred.structures import IGNORE_INDEX

DATA_SETS = {
    "ade20k": ADE20KSemantic,
    "camvid": CamVid,
    "cityscapes": CityscapesSemantic,
    "dsb2018": DSB2018Nuclei,
    "isbi2012": ISBI2012,
}
"""Sets whose number and names of classes, ignored labels and way of storing the truth are known."""
Pair = tuple[Path, Path]
"""The files of a true and a predicted label map."""
ReadMap = Callable[[Path], np.ndarray]


def evaluate_files(
    gt_dir: str | Path,
    pred_dir: str | Path,
    num_classes: int,
    ignore_index: int = IGNORE_INDEX,
    reduce_zero_label: bool = False,
    boundary_ratio: float | None = None,
) -> dict[str, Any]:
    """Score a folder of label maps against another; files belong together by their path below the folders.

    Args:
        gt_dir: True label maps, PNG of one channel, also in folders below; each needs a prediction.
        pred_dir: Predicted ones, classes 0..C-1.
        num_classes: C.
        ignore_index: True label of pixels that do not count.
        reduce_zero_label: In the truth 0 is ignored too and k means class k - 1, as ADE20K stores it.
        boundary_ratio: Also measure boundary IoU, see `densepred.evaluation.boundary`.

    Returns:
        As `semantic_quality`, with ``per_class`` a dictionary by class number (a string), and ``confusion``, its matrix.

    Raises:
        FileNotFoundError: There is no truth, or a truth has no prediction.
        ValueError: A file cannot be used, or prediction and truth do not fit together.
    """
    if num_classes < 1:
        raise ValueError(f"{num_classes} classes; there must be one at least")

    def read_truth(path: Path) -> np.ndarray:
        labels = read_label_map(path)
        return _reduced(labels, ignore_index) if reduce_zero_label else labels

    names = [str(label) for label in range(num_classes)]
    pairs = _same_names(Path(gt_dir), Path(pred_dir))
    return _score(pairs, read_truth, read_label_map, names, ignore_index, boundary_ratio)


def evaluate_data_set(
    gt_dir: str | Path, pred_dir: str | Path, data_set: str, boundary_ratio: float | None = None
) -> dict[str, Any]:
    """Score predictions for one of `DATA_SETS`, its truth as it comes.

    Args:
        gt_dir: Folder of the split's true label maps, or one above; of Cityscapes ``*_gtFine_instanceIds.png``, whose
            classes are those of labelIds.
        pred_dir: PNG of the same names, classes 0..C-1, as `densepred.evaluation.semantic.SemanticIoU` writes them. Of
            Cityscapes label ids, in files whose names begin as the truth's do; an id that its benchmark ignores is a miss.
        data_set: Its name.
        boundary_ratio: Also measure boundary IoU, see `densepred.evaluation.boundary`.

    Returns:
        As `evaluate_files`, with ``per_class`` by name.

    Raises:
        FileNotFoundError: There is no truth, or a truth has no prediction.
        ValueError: The set is unknown, a file cannot be used, or prediction and truth do not fit together.
    """
    if data_set not in DATA_SETS:
        raise ValueError(f"data set {data_set!r} is not known{nearest(data_set, DATA_SETS)}")
    kind = DATA_SETS[data_set]
    names, table = kind.METAINFO["classes"], kind.COMMON["semantic_table"]
    gt_dir, pred_dir = Path(gt_dir), Path(pred_dir)
    if data_set != "cityscapes":

        def read_truth(path: Path) -> np.ndarray:
            return look_up(read_label_map(path), table, str(path))

        return _score(_same_names(gt_dir, pred_dir), read_truth, read_label_map, names, IGNORE_INDEX, boundary_ratio)

    def read_objects(path: Path) -> np.ndarray:
        ids = read_instance_ids(path)
        return look_up(np.where(ids < 1000, ids, ids // 1000), table, str(path))

    def read_ids(path: Path) -> np.ndarray:
        classes = look_up(read_label_map(path), table, str(path), "write label ids (7..33), no train ids")
        return np.where(classes == IGNORE_INDEX, len(names), classes)

    return _score(pair_frames(gt_dir, pred_dir), read_objects, read_ids, names, IGNORE_INDEX, boundary_ratio, True)


def evaluate_and_print(
    gt_dir: str,
    pred_dir: str,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    reduce_zero_label: bool = False,
    data_set: str | None = None,
    boundary_ratio: float | None = None,
    confusion: str | None = None,
    out: str | None = None,
) -> None:
    """Print the table of `evaluate_data_set` or, without ``data_set``, of `evaluate_files`.

    Args:
        gt_dir, pred_dir, num_classes, ignore_index, reduce_zero_label, data_set, boundary_ratio: See there; a data set
            brings its own number of classes and ignored labels.
        confusion: Where the confusion matrix goes, ``.csv`` or ``.png``.
        out: Where the figures go as JSON (NaN becomes null).
    """
    if confusion is not None:
        require_ending(confusion)
    if data_set is not None:
        if num_classes is not None or ignore_index is not None or reduce_zero_label:
            raise ValueError(
                f"--dataset {data_set} says what its labels mean; leave out --num-classes, --ignore-index and "
                "--reduce-zero-label"
            )
        record = evaluate_data_set(gt_dir, pred_dir, data_set, boundary_ratio)
    elif num_classes is None:
        raise ValueError(f"give --num-classes N, or --dataset, one of {', '.join(DATA_SETS)}")
    else:
        ignore_index = IGNORE_INDEX if ignore_index is None else ignore_index
        record = evaluate_files(gt_dir, pred_dir, num_classes, ignore_index, reduce_zero_label, boundary_ratio)
    print(semantic_table(record))
    if confusion is not None:
        write_confusion(confusion, np.array(record["confusion"]), list(record["per_class"]))
        print(f"written to {confusion}")
    if out is not None:
        write_record(out, record)


def _score(
    pairs: Sequence[Pair],
    read_truth: ReadMap,
    read_prediction: ReadMap,
    names: Sequence[str],
    ignore_index: int,
    boundary_ratio: float | None,
    no_class: bool = False,
) -> dict[str, Any]:
    """Count all pairs of files; with ``no_class`` a prediction may be C, none of the classes."""
    num_classes = len(names)
    columns = num_classes + no_class
    if boundary_ratio is not None:
        contour_width((1, 1), boundary_ratio)  # refuses a bad one before the first file

    def count(some: Sequence[Pair]) -> np.ndarray:
        total = np.zeros((num_classes, columns + 3), np.int64)
        for gt_path, pred_path in some:
            truth, prediction = read_truth(gt_path), read_prediction(pred_path)
            try:
                total[:, :columns] += confusion_matrix(truth, prediction, columns, ignore_index)[:num_classes]
            except ValueError as error:
                raise ValueError(f"{pred_path} (truth {gt_path}): {error}") from error
            if boundary_ratio is not None:
                total[:, columns:] += boundary_counts(truth, prediction, num_classes, boundary_ratio, ignore_index)
        return total

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:  # decoding releases the interpreter; each thread keeps one matrix
        total = sum(pool.map(count, (pairs[i::workers] for i in range(workers))))
    confusion, boundary = total[:, :columns], None if boundary_ratio is None else total[:, columns:]
    quality = semantic_quality(confusion, boundary)
    per_class = dict(zip(names, quality["per_class"], strict=True))
    return {**quality, "per_class": per_class, "confusion": confusion.tolist()}


def _same_names(gt_dir: Path, pred_dir: Path) -> list[Pair]:
    """Return true and predicted files of the same path below their folders."""
    names = sorted(path.relative_to(gt_dir) for path in gt_dir.rglob("*.png"))
    if not names:
        raise FileNotFoundError(f"{gt_dir}: no label map **/*.png in it; give the folder of the true label maps")
    missing = [name for name in names if not (pred_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} predictions are missing, the first is {pred_dir / missing[0]}; predictions "
            "have the names and subfolders of the truth"
        )
    return [(gt_dir / name, pred_dir / name) for name in names]


def _reduced(labels: np.ndarray, ignore_index: int) -> np.ndarray:
    reduced = labels.astype(np.int32) - 1
    reduced[(labels == 0) | (labels == ignore_index)] = ignore_index
    return reduced
