"""COCO's instance format: checked reading of truth and results, masks as run lengths, results written as they come.

Format: https://cocodataset.org/#format-data (1. Object Detection), #format-results (1. Object Detection).
"""

import json
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

from densepred.evaluation.coco_format import records_by_key

GEOMETRY = {"segm": "segmentation", "bbox": "bbox"}
"""The key that carries a detection's shape, by type of IoU."""
BACKLOG = 4
"""Images whose masks may wait for the encoding thread: N * H * W bytes each."""
BACKLOG_BYTES = 512 * 1024**2
"""All those masks together, unless one image alone has more."""


def read_truth(path: str | Path, iou_types: Iterable[str] = ("segm",)) -> dict[str, list[dict]]:
    """Return ``images``, ``annotations`` and ``categories`` of a JSON in COCO's instance format, checked.

    Objects are numbered anew from 1, ``iscrowd`` is 0 where the file does not say.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON, a key is missing, or ids do not fit; the message names file and record.
    """
    content = read_json_file(path, "a COCO instance annotation")
    needed = {
        "images": ("id", "height", "width"),
        "annotations": ("image_id", "category_id", "area", *(GEOMETRY[iou_type] for iou_type in iou_types)),
        "categories": ("id",),
    }
    truth = {}
    for name, keys in needed.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path}: lacks the list `{name}`; a COCO instance annotation is expected")
        records_by_key(content[name], keys[0], keys, f"{path}: {name}")
        truth[name] = content[name]
    images, categories = (_unique_ids(truth[name], f"{path}: {name}") for name in ("images", "categories"))
    for position, annotation in enumerate(truth["annotations"]):
        where = f"{path}: annotations[{position}]"
        _require_known(annotation, images, categories, where, "the file")
        if "segm" in iou_types and not annotation["segmentation"]:
            raise ValueError(f"{where}: an empty `segmentation`; remove the annotation or give it an outline")
        annotation["id"] = position + 1
        annotation.setdefault("iscrowd", 0)
    return truth


def read_results(path: str | Path, truth: Mapping[str, list[dict]], iou_type: str) -> list[dict]:
    """Return the detections of a JSON in COCO's result format, each with exactly the keys that count, polygons filled.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not JSON or no list, a record lacks a key or names an image or category that the truth lacks, a
            mask is no compressed RLE of the image's size and no list of polygons.
    """
    content = read_json_file(path, "a COCO result file")
    if not isinstance(content, list):
        raise ValueError(f"{path}: {type(content).__name__} at the top; a COCO result file is a list of detections")
    keys = ("image_id", "category_id", "score", GEOMETRY[iou_type])
    records_by_key(content, "image_id", keys, str(path))
    sizes = {image["id"]: [image["height"], image["width"]] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for position, record in enumerate(content):
        where = f"{path}[{position}]"
        _require_known(record, sizes, categories, where, "the ground truth")
        if not isinstance(record["score"], int | float) or math.isnan(record["score"]):
            raise ValueError(f"{where}: score {record['score']!r} is no number")
        shape, size = record[GEOMETRY[iou_type]], sizes[record["image_id"]]
        if iou_type == "segm" and isinstance(shape, list):
            record["segmentation"] = _fill_polygons(shape, size, where)
        else:
            check = _check_rle if iou_type == "segm" else _check_box
            check(shape, size, where)
    return [{key: record[key] for key in keys} for record in content]


def write_results(path: Path, results: Iterable[dict]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.write("[")
        for number, record in enumerate(results):
            out.write((",\n" if number else "\n") + json.dumps(record))
        out.write("\n]\n")


def read_lines(paths: Iterable[str]) -> Iterator[dict]:
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(f"{path}: written by another process and not seen here; set out_dir to a shared folder")
        with open(path, encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def read_json_file(path: str | Path, what: str) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; {what} is expected") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); {what} is expected") from None


class LineWriter:
    """Writes one JSON line an image; a background thread makes the records, so that encoding hides behind the model.

    One thread: pycocotools' encoder holds the GIL, so a second one gains nothing; a process costs more than the encoding,
    by copying the masks. Measured at 480 x 640 and 100 masks, beside a model of 25 ms: 12 ms an image more without a
    thread, 1.5 with one or two, 75 with a process.

    Args:
        out_dir: Folder for the file, created; ``None``: a temporary one, deleted by `remove`.
        rank: This process's number.
    """

    def __init__(self, out_dir: str | Path | None, rank: int = 0) -> None:
        self._temporary = out_dir is None
        self._folder = Path(tempfile.mkdtemp(prefix="densepred_")) if out_dir is None else Path(out_dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.path = self._folder / f"instances.rank{rank}.jsonl"
        self._file: TextIO = self.path.open("w", encoding="utf-8")
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="encode")
        self._pending: deque[tuple[Future, int]] = deque()

    def add(self, make_record: Callable[[], dict], num_bytes: int = 0) -> None:
        """Have a record made and written; waits while `BACKLOG` others, or `BACKLOG_BYTES` with this one, are under way.

        Args:
            make_record: Called in the thread.
            num_bytes: What it holds in memory.
        """
        while self._pending and (
            len(self._pending) >= BACKLOG or sum(held for _, held in self._pending) + num_bytes > BACKLOG_BYTES
        ):
            self._pending.popleft()[0].result()
        self._pending.append((self._pool.submit(self._write, make_record), num_bytes))

    def close(self) -> None:
        """Wait for all records and flush them."""
        try:
            for future, _ in self._pending:
                future.result()
        finally:
            self._pool.shutdown()
            self._file.close()

    def remove(self) -> None:
        """Delete the lines."""
        self.path.unlink(missing_ok=True)
        if self._temporary:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _write(self, make_record: Callable[[], dict]) -> None:
        self._file.write(json.dumps(make_record()) + "\n")


def image_record(image_id: int | str, detections: dict[str, np.ndarray], objects: dict[str, np.ndarray] | None) -> dict:
    """Return an image's record: ``image_id``, ``detections``; with objects also ``objects`` and ``size`` (H, W)."""
    columns: dict[str, list] = {"category_id": detections["category_ids"].tolist()}
    columns["score"] = detections["scores"].tolist()
    if "masks" in detections:
        columns["segmentation"] = encode_masks(detections["masks"])
    if "bboxes" in detections:
        boxes = detections["bboxes"]
        columns["bbox"] = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()  # xywh
    record = {"image_id": image_id, "detections": _records(columns)}
    if objects is not None:
        record["size"] = objects["masks"].shape[1:]
        record["objects"] = _objects_records(objects)
    return record


def encode_masks(masks: np.ndarray) -> list[dict]:
    """Return compressed RLE (``size``, ``counts`` as text) of masks (N, H, W) bool."""
    from pycocotools import mask as mask_api

    # RLE runs down the columns: with OpenCV's transpose it takes 12 ms, with np.asfortranarray 30 (100 of 480 x 640).
    encoded = [mask_api.encode(cv2.transpose(mask).T) for mask in np.ascontiguousarray(masks).view(np.uint8)]
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()} for rle in encoded]


def _objects_records(objects: dict[str, np.ndarray]) -> list[dict]:
    from pycocotools import mask as mask_api

    masks = encode_masks(objects["masks"])
    return _records(
        {
            "category_id": objects["category_ids"].tolist(),
            "iscrowd": objects["iscrowd"].astype(int).tolist(),
            "segmentation": masks,
            "area": [float(mask_api.area(mask)) for mask in masks],
            "bbox": [mask_api.toBbox(mask).tolist() for mask in masks],
        }
    )


def _records(columns: dict[str, list]) -> list[dict]:
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _unique_ids(records: Sequence[dict], where: str) -> set:
    ids = {record["id"] for record in records}
    if len(ids) != len(records):
        raise ValueError(f"{where}: {len(records)} records have {len(ids)} different ids; ids must be unique")
    return ids


def _require_known(record: Mapping, images: Iterable, categories: Iterable, where: str, whose: str) -> None:
    for key, known in (("image_id", images), ("category_id", categories)):
        if record[key] not in known:
            raise ValueError(f"{where}: {key} {record[key]!r}, which {whose} lacks")


def _fill_polygons(polygons: list, size: list[int], where: str) -> dict:
    """Return the compressed RLE of the union of polygons [x, y, ...]."""
    from pycocotools import mask as mask_api

    for polygon in polygons or [None]:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2 or not _finite(polygon):
            raise ValueError(
                f"{where}: `segmentation` holds {polygon!r}; a polygon is [x, y, ...] of three points at least"
            )
    rle = mask_api.merge(mask_api.frPyObjects(polygons, *size))
    return {"size": size, "counts": rle["counts"].decode()}


def _finite(values: list) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _check_rle(mask: Any, size: list[int], where: str) -> None:
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str) or "size" not in mask:
        raise ValueError(f"{where}: `segmentation` is no compressed RLE, {{'size': [H, W], 'counts': text}}")
    if list(mask["size"]) != size:
        raise ValueError(f"{where}: a mask of {mask['size']} in an image of {size} (height, width)")


def _check_box(box: Any, size: list[int], where: str) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
        raise ValueError(f"{where}: `bbox` {box!r} is not [x, y, width, height]")
