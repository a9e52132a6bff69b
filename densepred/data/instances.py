"""Instance segmentation: COCO's instance files, and loading the objects of any data set as masks."""

import os
from collections.abc import Callable, Sequence

import numpy as np
from mmcv.transforms import BaseTransform
from pycocotools import mask as rle
from scipy import ndimage

from densepred.data.class_tables import COCO_PANOPTIC, Category, metainfo
from densepred.data.dataset import SegDataset
from densepred.data.errors import DamagedImageError
from densepred.data.files import require_files
from densepred.data.loading import look_up, read_label_map, require_size
from densepred.data.panoptic_json import label_of, read_lists, require_unique
from densepred.data.polygon_json import draw_masks
from densepred.registry import DATASETS, TRANSFORMS

RECORDS = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "segmentation"),
}
CATEGORIES = {"categories": ("id", "name")}
OBJECT_DIVISOR = 1000
"""In an instance id map an object has the id ``class * 1000 + number``; smaller ids are classes without objects."""
NO_OBJECT = 255
"""In an ``instance_table``: a class whose objects are not counted."""


@DATASETS.register_module()
class CocoInstances(SegDataset):
    """COCO's instance segmentation: a JSON with polygons or RLE, and images; 80 classes.

    Images without annotation are kept, unless ``filter_empty`` leaves them out of training.

    Source: Lin et al., Microsoft COCO, ECCV 2014.

    Args:
        data_root: folder, see `densepred.data.dataset.resolve_data_root`; the paths below are relative to it.
        ann_file: the JSON, e.g. ``annotations/instances_train2017.json``.
        image_dir: folder of the images, e.g. ``train2017``.
        classes_from_file: take the class table from the file's ``categories``, by ascending id, instead of COCO's 80.
        pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(tuple(row for row in COCO_PANOPTIC if row[2]))
    PREPARE = "python datasets/prepare_coco.py"
    OBJECTS = "instances"

    def __init__(
        self,
        data_root: str,
        ann_file: str,
        image_dir: str,
        classes_from_file: bool = False,
        pipeline: Sequence[dict | Callable] = (),
        seed: int = 0,
        indices: int | Sequence[int] | None = None,
        filter_empty: bool = False,
        skip_damaged: bool = False,
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        self.layout = (ann_file, image_dir)
        self.classes_from_file = classes_from_file
        super().__init__(data_root, None, pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init)

    def load_data_list(self) -> list[dict]:
        """Return the records of `instance_records`, all images found."""
        self.ann_file, image_dir = (os.path.join(self.data_root, part) for part in self.layout)
        if self.classes_from_file:
            self._metainfo = metainfo(instance_categories(self.ann_file))
        records = instance_records(
            self.ann_file, lambda image: os.path.join(image_dir, image["file_name"]), self._metainfo
        )
        require_files((record["img_path"] for record in records), "image", self.ann_file)
        return records


def instance_categories(path: str) -> tuple[Category, ...]:
    """Return the class table that an instance file carries, by ascending id; all are things.

    COCO's instance files have no colours: where one lacks them, those of COCO's classes are taken in turn.
    """
    records = read_lists(path, CATEGORIES, "instance")["categories"]
    require_unique([record["id"] for record in records], path, "category id")
    if not records:
        raise ValueError(f"{path}: the list 'categories' is empty, so there are no classes to learn")
    palette = [color for *_, color in COCO_PANOPTIC]
    records = sorted(records, key=lambda record: record["id"])
    return tuple(
        (r["id"], r["name"], True, tuple(r.get("color", palette[i % len(palette)]))) for i, r in enumerate(records)
    )


def instance_records(path: str, image_path: Callable[[dict], str], metainfo: dict) -> list[dict]:
    """Return one record an image, in the order of the file's ``images``.

    Args:
        path: the JSON file.
        image_path: maps a record of ``images`` to the image's path.
        metainfo: class table, see `densepred.data.class_tables.metainfo`.

    Returns:
        Dicts with ``img_path``, ``img_id``, ``height``, ``width`` and ``instances``: dicts with the contiguous ``label``,
        ``iscrowd`` and ``segmentation``, which is a list of polygons ``[x, y, x, y, ...]`` in pixels or an RLE.

    Raises:
        ValueError: ids that occur twice, a category outside the class table, an annotation of an unlisted image, a
            segmentation that encloses nothing or does not fit the image.
    """
    content = read_lists(path, RECORDS, "instance")
    require_unique([image["id"] for image in content["images"]], path, "image id")
    require_unique([annotation["id"] for annotation in content["annotations"]], path, "annotation id")
    records = {
        image["id"]: {
            "img_path": image_path(image),
            "img_id": image["id"],
            "height": image["height"],
            "width": image["width"],
            "instances": [],
        }
        for image in content["images"]
    }
    labels = {category: label for label, category in enumerate(metainfo["category_ids"])}
    for position, annotation in enumerate(content["annotations"]):
        where = f"{path}: annotations[{position}] (id {annotation['id']})"
        record = records.get(annotation["image_id"])
        if record is None:
            raise ValueError(f"{where} is of image {annotation['image_id']!r}, which is not in 'images'")
        try:
            segmentation = checked_segmentation(annotation["segmentation"], record["height"], record["width"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}; mend this annotation or remove it") from None
        label = label_of(annotation["category_id"], labels, where)
        iscrowd = bool(annotation.get("iscrowd", 0))
        record["instances"].append({"label": label, "iscrowd": iscrowd, "segmentation": segmentation})
    return list(records.values())


def checked_segmentation(segmentation: object, height: int, width: int) -> list | dict:
    """Return the segmentation of a COCO annotation without its polygons of one or two points, which enclose no pixel.

    Raises:
        ValueError: it is neither a list of polygons nor an RLE of this size, or no polygon has three points.
    """
    if isinstance(segmentation, list):
        for i, polygon in enumerate(segmentation):
            if not isinstance(polygon, list) or len(polygon) % 2:
                raise ValueError(f"segmentation[{i}] is no polygon, a flat list [x, y, x, y, ...] of an even length")
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        if not polygons:
            lengths = [len(polygon) for polygon in segmentation]
            raise ValueError(f"its polygons have {lengths} numbers; a polygon needs three points, which are 6 numbers")
        return polygons
    counts = segmentation.get("counts") if isinstance(segmentation, dict) else None
    if not isinstance(counts, list | str):
        raise ValueError("its segmentation is neither a list of polygons nor an RLE with 'size' and 'counts'")
    if list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(f"its RLE has the size {segmentation.get('size')}, but the image is [{height}, {width}]")
    if isinstance(counts, list):
        covered = sum(counts) if all(isinstance(run, int) and run >= 0 for run in counts) else "no number"
        if covered != height * width:
            raise ValueError(f"the counts of its RLE add up to {covered}, but the image has {height * width} pixels")
    return segmentation


@TRANSFORMS.register_module()
class LoadInstances(BaseTransform):
    """Make the objects of an image ``masks`` (N, H, W) bool and ``mask_labels`` (N,) int64; crowds are left out.

    They come from ``instances``, records as of `instance_records`; or from ``polygon_path`` and ``polygon_table``, see
    `densepred.data.polygon_json.draw_masks`; or else from ``instance_path``, an id map that ``instance_table``, a
    `label_table` of its classes, translates (with ``instance_divisor``, see `object_positions`). The masks have the size of
    the file, also after a resize of the image: training pipelines load them before, and they are then resized by the
    nearest pixel (the reference mapper resizes polygons and draws them after that).

    Raises:
        DamagedImageError: a mask or id map that cannot be decoded or is not of the photo's size.
        ValueError: an image whose data set has none of the above.
    """

    def transform(self, results: dict) -> dict:
        if "instances" in results:
            masks, labels = self._from_records(results)
        elif "polygon_path" in results:
            masks, labels = draw_masks(results["polygon_path"], results["polygon_table"])
            require_size(masks.shape[1:], results["polygon_path"], results)
        elif "instance_path" in results:
            path = results["instance_path"]
            ids = read_label_map(path)
            require_size(ids.shape, path, results)
            divisor = results.get("instance_divisor", OBJECT_DIVISOR)
            masks, labels = split_instance_ids(ids, results["instance_table"], path, divisor)
        else:
            raise ValueError(
                f"LoadInstances: the data set of {results['img_path']} has no masks (CenterPolyFile has polygons alone): "
                "leave LoadInstances out of its pipeline, and validate on a data set with masks"
            )
        results["masks"] = masks  # (N, H, W)
        results["mask_labels"] = np.array(labels, np.int64)  # (N,)
        return results

    def _from_records(self, results: dict) -> tuple[np.ndarray, list[int]]:
        shape, source = (results["height"], results["width"]), f"of the annotation of image id {results['img_id']}"
        require_size(shape, source, results)
        kept = [instance for instance in results["instances"] if not instance["iscrowd"]]
        try:
            masks = decode_masks([instance["segmentation"] for instance in kept], *shape)
        except (ValueError, OverflowError, TypeError) as error:
            raise DamagedImageError(
                f"the annotation of image id {results['img_id']} ({results['img_path']}) cannot be decoded: {error}; mend "
                "it in the annotation file"
            ) from None
        return masks, [instance["label"] for instance in kept]


def decode_masks(segmentations: list[list | dict], height: int, width: int) -> np.ndarray:
    """Return the masks (N, H, W) bool of polygons or RLE, as pycocotools' ``annToMask`` draws them.

    Raises:
        ValueError: coordinates that are no finite numbers, or run lengths that do not add up to the image.
    """
    masks = np.zeros((len(segmentations), height, width), bool)  # pages that no object touches are never allocated
    for i, segmentation in enumerate(segmentations):
        packed = _packed(segmentation, height, width)
        x, y, w, h = rle.toBbox(packed).astype(int)
        masks[i, y : y + h, x : x + w] = rle.decode(packed)[y : y + h, x : x + w]
    return masks


def split_instance_ids(
    ids: np.ndarray, table: np.ndarray, path: str, divisor: int = OBJECT_DIVISOR
) -> tuple[np.ndarray, list[int]]:
    """Return the masks (N, H, W) bool and the classes of the objects in an id map, see `object_positions`."""
    positions, labels = object_positions(ids, table, path, divisor)
    masks = np.zeros((len(labels), *ids.shape), bool)
    for i, box in enumerate(ndimage.find_objects(positions, len(labels))):
        masks[i][box] = positions[box] == i + 1
    return masks, labels


def object_positions(
    ids: np.ndarray, table: np.ndarray, path: str, divisor: int = OBJECT_DIVISOR
) -> tuple[np.ndarray, list[int]]:
    """Return (H, W) int32, 1..N where an object is and 0 elsewhere, and the N classes, by ascending id.

    Args:
        ids: (H, W), for an object ``class * divisor + number``. With Cityscapes' divisor of 1000 the numbers count from 0
            and an id below 1000 is a bare class: no object, or a group of them. With any other (KITTI: 256) every id is
            of that form, and number 0 means no object.
        table: `label_table` of the classes; those mapped to 255 have no objects that count.
        path: of the file, for messages.
        divisor: what the class is multiplied by.

    Raises:
        DamagedImageError: a class that the table does not know.
    """
    numbers = np.flatnonzero(np.bincount(ids.ravel()))
    if divisor == OBJECT_DIVISOR:
        isobject = numbers >= divisor
        classes = np.where(isobject, numbers // divisor, numbers)
    else:
        isobject, classes = numbers % divisor > 0, numbers // divisor
    labels = look_up(classes, table, path, unit="instance ids")
    kept = isobject & (labels != NO_OBJECT)
    position = np.zeros(65536, np.int32)
    position[numbers[kept]] = np.arange(1, kept.sum() + 1)
    return position[ids], labels[kept].tolist()


def _packed(segmentation: list | dict, height: int, width: int) -> dict:
    """Return a segmentation as a compressed RLE."""
    if isinstance(segmentation, list):
        if not np.isfinite(np.concatenate(segmentation)).all():
            raise ValueError("a polygon has a coordinate that is no finite number")
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    # pycocotools returns uninitialised memory for a string that ends too early.
    length = _rle_length(segmentation["counts"].encode())
    if length != height * width:
        raise ValueError(f"an RLE covers {length} pixels, but the image has {height * width}")
    return segmentation


def _rle_length(counts: bytes) -> int:
    """Return how many pixels COCO's compressed counts cover.

    Each count is written in groups of 5 bits, least first, bit 5 = more follows, the last group's bit 4 = sign; from the
    fourth on, the difference to the last but one is stored.
    """
    runs, value, shift = [], 0, 0
    for char in counts:
        group = char - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (group & 16) << (shift - 4)
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    return sum(runs)
