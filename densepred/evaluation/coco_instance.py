"""COCO's box and mask AP: scoring of files, and the streaming metric.

Lin et al., "Microsoft COCO" (ECCV 2014); format and numbers: https://cocodataset.org/#detection-eval. pycocotools does the
matching and averaging, so its rules hold: the limit of 100 detections is per image and class, equal scores keep the order
of the results (across images that of the image ids), a crowd forgives any number of detections. Two of its traps are
closed here: an object with annotation id 0 would never count as found, so objects are renumbered; and a ``bbox`` beside a
mask would replace the mask's area, so it is left out.
"""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine import dist
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from torch import Tensor

from densepred.data.dataset import resolve_data_root
from densepred.evaluation.boundary import mask_contour
from densepred.evaluation.coco_results import (
    GEOMETRY,
    LineWriter,
    image_record,
    read_lines,
    read_results,
    read_truth,
    write_results,
)
from densepred.evaluation.record import write_record
from densepred.evaluation.table import text_table
from densepred.registry import METRICS
from densepred.structures import PanopticMap, require_fields

if TYPE_CHECKING:
    from pycocotools.cocoeval import COCOeval

SUMMARY = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The twelve numbers of the official summary, in its order."""
PER_CLASS = SUMMARY[:9]


def instance_ap(
    truth: dict,
    results: list[dict],
    iou_type: str,
    image_ids: Iterable[int | str] | None = None,
    boundary_ratio: float | None = None,
) -> dict[str, dict]:
    """Score detections by pycocotools.

    Args:
        truth: ``images``, ``annotations``, ``categories`` as `read_truth` returns them; changed by pycocotools.
        results: Records ``image_id``, ``category_id``, ``score`` and ``segmentation`` (compressed RLE) or ``bbox`` (xywh
            pixels); may be empty; changed by pycocotools.
        iou_type: ``segm`` or ``bbox``.
        image_ids: Images to look at; ``None``: all of the truth. Those without detections count.
        boundary_ratio: Of masks, take the smaller of IoU and boundary IoU (Boundary AP), crowds excepted; contours as wide
            as `densepred.evaluation.boundary.contour_width` says.

    Returns:
        ``stats``: the numbers of `SUMMARY`, 0..1, NaN where there is nothing to measure; ``per_category``: category id ->
        the numbers of `PER_CLASS`.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        if results:
            detections = gt.loadRes(results)
        else:  # loadRes looks at the first result
            detections = COCO()
        evaluation = COCOeval(gt, detections, iou_type)
        if image_ids is not None:
            evaluation.params.imgIds = sorted(image_ids)
        if boundary_ratio is not None:
            evaluation.computeIoU = partial(_boundary_ious, evaluation, evaluation.computeIoU, boundary_ratio)
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # (T, R, K, A, M), (T, K, A, M)
    categories = [int(number) for number in evaluation.params.catIds]
    return {
        "stats": _summary(precision, recall),
        "per_category": {
            number: {
                name: value
                for name, value in _summary(precision[:, :, [k]], recall[:, [k]]).items()
                if name in PER_CLASS
            }
            for k, number in enumerate(categories)
        },
    }


def evaluate_files(
    gt: str | Path, pred: str | Path, iou_type: str = "segm", boundary_ratio: float | None = None
) -> dict[str, dict]:
    """Score a result file; see `instance_ap`, `read_truth` and `read_results`."""
    return _score_files(gt, pred, iou_type, boundary_ratio)[0]


def evaluate_and_print(
    gt: str, pred: str, iou_type: str = "segm", boundary_ratio: float | None = None, out: str | None = None
) -> None:
    """Print the table of `evaluate_files` and write its figures as JSON to ``out`` (NaN becomes null)."""
    record, names = _score_files(gt, pred, iou_type, boundary_ratio)
    print(instance_table(record, names, iou_type))
    if out is not None:
        write_record(out, record)


def instance_table(record: Mapping[str, dict], names: Mapping[int, str], iou_type: str) -> str:
    """Return the table of a record of `instance_ap`, in percent."""
    rows: list[Sequence] = [
        [names[number], *(100 * values[column] for column in PER_CLASS)]
        for number, values in record["per_category"].items()
    ]
    measured = sum(not math.isnan(values["AP"]) for values in record["per_category"].values())
    rows += [[], [f"All ({measured} classes)", *(100 * record["stats"][column] for column in PER_CLASS)]]
    return text_table(["class", *PER_CLASS], rows, title={"segm": "Mask AP", "bbox": "Box AP"}[iou_type])


@METRICS.register_module()
class CocoInstance(BaseMetric):
    """Mask and box AP of `SegSample` with ``pred_instances``, in percent, by pycocotools.

    Detections go as RLE into a JSON-lines file a process; rank 0 scores them all. `evaluate` returns the numbers of
    `SUMMARY` (those of boxes as ``bbox_AP`` ...), NaN where there is nothing to measure, and prints a table per class.

    Args:
        data_root: Folder that ``ann_file`` is relative to, see `densepred.data.dataset.resolve_data_root`.
        ann_file: Ground truth in COCO's instance format. Without it the truth is the samples' ``gt_instances`` (its
            optional ``iscrowd`` (N,) marks crowds) or else the things of ``gt_panoptic``.
        iou_types: ``segm``, ``bbox`` or both.
        out_dir: Folder for the detections in COCO's format: ``instances_segm.json``, ``instances_bbox.json``.

    Attributes:
        per_class: Name -> the numbers of `PER_CLASS` (0..1), named as in the metrics, of the last evaluation.

    Raises:
        FileNotFoundError: ``data_root`` or ``ann_file`` is missing.
        ValueError: A type of IoU is unknown.
    """

    def __init__(
        self,
        data_root: str | None = None,
        ann_file: str | None = None,
        iou_types: Sequence[str] = ("segm",),
        out_dir: str | None = None,
    ) -> None:
        super().__init__(prefix="instance")  # without one MMEngine warns; `evaluate` does without
        unknown = [iou_type for iou_type in iou_types if iou_type not in GEOMETRY]
        if unknown or not iou_types:
            raise ValueError(f"CocoInstance: iou_types={list(iou_types)}; choose among {', '.join(GEOMETRY)}")
        self.iou_types = tuple(iou_types)
        self.ann_path = None if ann_file is None else _truth_path(data_root, ann_file)
        self.out_dir = out_dir
        self.per_class: dict[str, dict] = {}
        self._record: dict[str, Any] | None = None
        self._sizes: dict | None = None
        self._writer: LineWriter | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Queue a batch of samples (as dictionaries, see MMEngine's ``Evaluator``) for encoding."""
        if self._sizes is None and self.ann_path is not None:
            truth = read_truth(self.ann_path, self.iou_types)
            _check_classes(truth, self.dataset_meta, self.ann_path)
            self._sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
        if self._writer is None:
            self._writer = LineWriter(self.out_dir, dist.get_rank())
        for sample in data_samples:
            (prediction,) = require_fields(sample, "pred_instances")
            try:
                detections = self._detections(prediction)
                objects = None if self.ann_path is not None else self._objects(sample)
                self._check_fit(sample["img_id"], detections, objects)
            except ValueError as error:
                raise ValueError(f"{sample.get('img_path', 'a sample')}: {error}") from error
            held = sum(array.nbytes for arrays in (detections, objects or {}) for array in arrays.values())
            self._writer.add(partial(image_record, sample["img_id"], detections, objects), held)

    def evaluate(self, size: int) -> dict[str, float]:
        """Score the detections of all processes, print the table, begin anew, and return the metrics on every rank.

        Args:
            size: Images in the data set.

        Raises:
            ValueError: The processes together did not see each image once, or their files are not shared.
        """
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        paths = [path for path in dist.all_gather_object(None if writer is None else str(writer.path)) if path]
        outcome: list[Any] = [None]
        if dist.is_main_process():
            try:  # an error on rank 0 alone would leave the others waiting
                images = list(read_lines(paths))
                _check_images(images, size)
                outcome = [(self.compute_metrics(images), self._record, self.per_class)]
            except ValueError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if writer is not None:
            writer.remove()
        if isinstance(outcome[0], ValueError):
            raise outcome[0]
        metrics, self._record, self.per_class = outcome[0]
        return metrics

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """Return the metrics in percent of the images' records, log the table and keep the record."""
        categories = dict(zip(self.dataset_meta["category_ids"], self.dataset_meta["classes"], strict=True))
        truth = self._truth(results)
        image_ids = [image["image_id"] for image in results]
        metrics: dict[str, float] = {}
        record, self.per_class = {}, {}
        for iou_type in self.iou_types:
            detections = list(_flat_results(results, iou_type))
            if self.out_dir is not None:
                write_results(Path(self.out_dir) / f"instances_{iou_type}.json", detections)
            record[iou_type] = instance_ap(truth, detections, iou_type, image_ids)
            prefix = "" if iou_type == "segm" else f"{iou_type}_"
            metrics |= {f"{prefix}{name}": 100 * value for name, value in record[iou_type]["stats"].items()}
            for number, values in record[iou_type]["per_category"].items():
                figures = self.per_class.setdefault(categories[number], {})
                figures |= {f"{prefix}{name}": value for name, value in values.items()}
            MMLogger.get_current_instance().info("\n" + instance_table(record[iou_type], categories, iou_type))
        self._record = record
        return metrics

    def metrics_record(self) -> dict[str, Any]:
        """Return the last evaluation in full: what `instance_ap` says, by type of IoU."""
        if self._record is None:
            raise ValueError("CocoInstance has no record yet: call `evaluate` first")
        return self._record

    def _detections(self, prediction: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Return what the encoding thread needs of a prediction; arrays on the CPU."""
        needed = ["labels", "scores", *({"segm": "masks", "bbox": "bboxes"}[iou_type] for iou_type in self.iou_types)]
        missing = [name for name in needed if name not in prediction]
        if missing:
            remedy = "; set model.head.compose='each'" if "polygons" in prediction else ""
            raise ValueError(
                f"pred_instances lacks {', '.join(missing)}, which iou_types={list(self.iou_types)} needs{remedy}"
            )
        tensors = {name: prediction[name].cpu() for name in needed}
        arrays = {name: (t.double() if t.is_floating_point() else t).numpy() for name, t in tensors.items()}
        arrays["category_ids"] = _category_ids(arrays.pop("labels"), self.dataset_meta)
        return arrays

    def _objects(self, sample: Mapping) -> dict[str, np.ndarray]:
        """Return the true objects of a sample: masks (N, H, W) bool, category_ids and iscrowd (N,)."""
        if (truth := sample.get("gt_instances")) is not None:
            masks, labels = truth["masks"].cpu().numpy(), truth["labels"].cpu().numpy()
            crowd = np.asarray(truth["iscrowd"], bool) if "iscrowd" in truth else np.zeros(len(labels), bool)
        elif (panoptic := sample.get("gt_panoptic")) is not None:
            masks, labels, crowd = _things(panoptic, _thing_flags(self.dataset_meta))
        else:
            raise ValueError("the sample has neither gt_instances nor gt_panoptic; load annotations or give ann_file")
        return {"masks": masks, "category_ids": _category_ids(labels, self.dataset_meta), "iscrowd": crowd}

    def _check_fit(self, image_id: int | str, detections: dict, objects: dict | None) -> None:
        """Compare a prediction with the truth: pycocotools would call masks of another size misses."""
        if self._sizes is not None and image_id not in self._sizes:
            raise ValueError(f"image id {image_id!r} is not in {self.ann_path}; take the ann_file of this data set")
        size = self._sizes[image_id] if objects is None else objects["masks"].shape[1:]
        if "masks" in detections and detections["masks"].shape[1:] != size:
            sides = ["x".join(map(str, shape)) for shape in (detections["masks"].shape[1:], size)]
            raise ValueError(f"the predicted masks are {sides[0]} pixels and the ground truth {sides[1]}")

    def _truth(self, images: list[dict]) -> dict[str, list[dict]]:
        if self.ann_path is not None:
            return read_truth(self.ann_path, self.iou_types)
        objects = [{"image_id": image["image_id"], **found} for image in images for found in image["objects"]]
        flags, meta = _thing_flags(self.dataset_meta), self.dataset_meta
        numbers = [number for number, thing in zip(meta["category_ids"], flags, strict=True) if thing]
        return {
            "images": [{"id": i["image_id"], "height": i["size"][0], "width": i["size"][1]} for i in images],
            "annotations": [{"id": number, **found} for number, found in enumerate(objects, start=1)],
            "categories": [{"id": number} for number in numbers],
        }


def _score_files(
    gt: str | Path, pred: str | Path, iou_type: str, boundary_ratio: float | None
) -> tuple[dict[str, dict], dict[int, str]]:
    """Return the record of `instance_ap` and the class names by category id."""
    if iou_type not in GEOMETRY:
        raise ValueError(f"iou_type {iou_type!r}: choose one of {', '.join(GEOMETRY)}")
    if boundary_ratio is not None and iou_type != "segm":
        raise ValueError(
            f"iou_type {iou_type!r} has no boundary IoU; leave out the boundary ratio, or score masks (segm)"
        )
    truth = read_truth(gt, (iou_type,))
    names = {category["id"]: str(category.get("name", category["id"])) for category in truth["categories"]}
    results = read_results(pred, truth, iou_type)
    return instance_ap(truth, results, iou_type, boundary_ratio=boundary_ratio), names


def _boundary_ious(
    evaluation: "COCOeval", mask_ious: Callable, ratio: float, image_id: int | str, category_id: int
) -> np.ndarray:
    """Return what pycocotools' ``computeIoU`` does, (D, G), for the smaller of IoU and boundary IoU."""
    from pycocotools import mask as mask_api

    ious = mask_ious(image_id, category_id)
    if not len(ious):
        return ious
    truth, found = evaluation._gts[image_id, category_id], evaluation._dts[image_id, category_id]
    best = np.argsort([-detection["score"] for detection in found], kind="stable")[: len(ious)]
    crowd = np.array([bool(record["iscrowd"]) for record in truth])  # a contour of a crowd means nothing

    def edges(records: Iterable[Mapping]) -> list[dict]:
        masks = (mask_api.decode(record["segmentation"]).astype(bool) for record in records)
        return [mask_api.encode(np.asfortranarray(mask_contour(mask, ratio), np.uint8)) for mask in masks]

    edge_ious = mask_api.iou(edges(found[n] for n in best), edges(truth), crowd)
    return np.where(crowd, ious, np.minimum(ious, edge_ious))


def _things(panoptic: PanopticMap, things: Sequence[bool]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return masks (N, H, W), labels (N,) and crowd flags (N,) of a panoptic map's things, crowds included."""
    segments = [segment for segment in panoptic.segments if things[segment["label"]]]
    numbers = np.array([segment["id"] for segment in segments], np.int64)
    labels = np.array([segment["label"] for segment in segments], np.int64)
    crowd = np.array([bool(segment.get("iscrowd", False)) for segment in segments], bool)
    return panoptic.numpy()[None] == numbers[:, None, None], labels, crowd


def _thing_flags(meta: Mapping) -> Sequence[bool]:
    return meta.get("isthing") or [True] * len(meta["classes"])


def _category_ids(labels: np.ndarray, meta: Mapping) -> np.ndarray:
    """Return the file's category ids (N,) of contiguous labels."""
    numbers = np.asarray(meta["category_ids"], np.int64)
    if labels.size and not 0 <= labels.min() <= labels.max() < len(numbers):
        wrong = next(int(label) for label in labels if not 0 <= label < len(numbers))
        raise ValueError(f"an instance has label {wrong}, outside 0..{len(numbers) - 1}")
    return numbers[labels]


def _flat_results(images: Iterable[dict], iou_type: str) -> Iterator[dict]:
    """Yield result records with the one shape that counts: pycocotools would take a mask's area from its box."""
    for image in images:
        for found in image["detections"]:
            yield {
                "image_id": image["image_id"],
                **{key: found[key] for key in ("category_id", "score", GEOMETRY[iou_type])},
            }


def _check_images(images: list[dict], size: int) -> None:
    if not len({image["image_id"] for image in images}) == len(images) == size:
        raise ValueError(
            f"CocoInstance saw {len(images)} images of a data set of {size}: a sampler that pads counts some twice; "
            "set sampler=dict(type='DefaultSampler', shuffle=False, round_up=False) in the data loader"
        )


def _check_classes(truth: Mapping[str, list[dict]], meta: Mapping, path: str) -> None:
    """Raise for categories of the truth that are no things of the data set; a subset of the things is fine."""
    in_file = {category["id"] for category in truth["categories"]}
    flags = _thing_flags(meta)
    table = {number for number, thing in zip(meta["category_ids"], flags, strict=True) if thing}
    if in_file - table:
        raise ValueError(
            f"{path}: the data set has no things of its categories {sorted(in_file - table)}; take the ann_file of this "
            "data set"
        )


def _truth_path(data_root: str | None, ann_file: str) -> str:
    path = ann_file if data_root is None else os.path.join(resolve_data_root(data_root), ann_file)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"CocoInstance: ann_file {path} does not exist; see datasets/README.md for the layout")
    return path


def _summary(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
    """Return the twelve numbers of arrays (T, R, K, A, M) and (T, K, A, M); -1 in them is "nothing to measure"."""
    # IoU 0.5, 0.55 ... 0.95; areas all, small, medium, large; 1, 10, 100 detections
    values = [
        precision[..., 0, 2],
        precision[0, ..., 0, 2],
        precision[5, ..., 0, 2],
        *(precision[..., area, 2] for area in (1, 2, 3)),
        *(recall[..., 0, limit] for limit in (0, 1, 2)),
        *(recall[..., area, 2] for area in (1, 2, 3)),
    ]
    means = [float(v[v > -1].mean()) if (v > -1).any() else math.nan for v in values]
    return dict(zip(SUMMARY, means, strict=True))
