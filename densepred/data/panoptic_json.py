"""Reading annotations in the COCO panoptic format (JSON + PNG), the one in which all our panoptic sets lie on disk.

Everything the JSON alone can tell is checked here, before any training starts.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from densepred.data.class_tables import Category

RECORDS = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "file_name", "segments_info"),
}
CATEGORIES = {"categories": ("id", "name", "isthing", "color")}
SEGMENT_KEYS = ("id", "category_id")


def read_lists(path: str, keys: dict[str, tuple[str, ...]], form: str) -> dict:
    """Return the parsed file after checking that the lists are there and that their records have their keys.

    Args:
        path: the JSON file.
        keys: name of each list and the keys of its records.
        form: name of the format, for messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or a key is missing; the message names the file and the key.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"annotation file {path} does not exist; see datasets/README.md for the layout")
    try:
        content = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); if its download broke off, fetch it again") from None
    for name in keys:
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise ValueError(f"{path} has no list {name!r}: it is not an annotation in the COCO {form} format")
        for position, record in enumerate(content[name]):
            require_keys(record, keys[name], f"{path}: {name}[{position}]")
    return content


def categories_of(path: str) -> tuple[Category, ...]:
    """Return the class table that the file itself carries: things first, then stuff, each by ascending id."""
    records = read_lists(path, CATEGORIES, "panoptic")["categories"]
    require_unique([record["id"] for record in records], path, "category id")
    if not records:
        raise ValueError(f"{path}: the list 'categories' is empty, so there are no classes to learn")
    records = sorted(records, key=lambda record: (not record["isthing"], record["id"]))
    return tuple((r["id"], r["name"], bool(r["isthing"]), tuple(r["color"])) for r in records)


def panoptic_records(path: str, panoptic_dir: str, image_path: Callable[[dict], str], metainfo: dict) -> list[dict]:
    """Return one record an annotated image, in the order of the annotations.

    Args:
        path: the JSON file.
        panoptic_dir: where its PNG files lie.
        image_path: maps a record of ``images`` to the image's path.
        metainfo: class table, see `densepred.data.class_tables.metainfo`.

    Returns:
        Dicts with ``img_path``, ``img_id``, ``panoptic_path``, ``segments_info`` (dicts with ``id`` as in the PNG,
        contiguous ``label``, ``isthing``, ``iscrowd`` and ``area`` in pixels, 0 where the file does not say) and, where
        the file says so, ``height`` and ``width``. Images without annotation are left out.

    Raises:
        ValueError: ids that occur twice, a category outside the class table, an annotation of an unlisted image.
    """
    content = read_lists(path, RECORDS, "panoptic")
    require_unique([image["id"] for image in content["images"]], path, "image id")
    require_unique([annotation["image_id"] for annotation in content["annotations"]], path, "annotated image id")
    images = {image["id"]: image for image in content["images"]}
    labels = {category: label for label, category in enumerate(metainfo["category_ids"])}
    records = []
    for annotation in content["annotations"]:
        if annotation["image_id"] not in images:
            raise ValueError(f"{path}: annotation of image {annotation['image_id']!r}, which is not in 'images'")
        image = images[annotation["image_id"]]
        record = {
            "img_path": image_path(image),
            "img_id": image["id"],
            "panoptic_path": os.path.join(panoptic_dir, annotation["file_name"]),
            "segments_info": _segments(annotation, path, labels, metainfo["isthing"]),
        }
        records.append(record | {key: image[key] for key in ("height", "width") if key in image})
    return records


def _segments(annotation: dict, path: str, labels: dict[int, int], isthing: tuple[bool, ...]) -> list[dict]:
    where = f"{path}: image {annotation['file_name']}"
    segments = []
    for position, segment in enumerate(annotation["segments_info"]):
        require_keys(segment, SEGMENT_KEYS, f"{where}: segments_info[{position}]")
        label = label_of(segment["category_id"], labels, f"{where}: segment {segment['id']}")
        segments.append(
            {
                "id": segment["id"],
                "label": label,
                "isthing": isthing[label],
                "iscrowd": bool(segment.get("iscrowd", 0)),
                "area": segment.get("area", 0),
            }
        )
    require_unique([segment["id"] for segment in segments], where, "segment id")
    if any(segment["id"] == 0 for segment in segments):
        raise ValueError(f"{where}: a segment has id 0, which is void in the panoptic format; number them from 1")
    return segments


def label_of(category: object, labels: dict[int, int], where: str) -> int:
    """Return the contiguous class of a category id; ValueError if the class table has none."""
    if category not in labels:
        raise ValueError(
            f"{where} has category id {category!r}, which is none of the {len(labels)} ids of the class table; take the "
            "data set class of this file, or classes_from_file=True"
        )
    return labels[category]


def require_keys(record: object, keys: tuple[str, ...], where: str) -> None:
    """Raise ValueError unless the record is a dict with these keys."""
    for key in keys:
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"{where} lacks the key {key!r}")


def require_unique(ids: list, where: str, what: str) -> None:
    """Raise ValueError naming the first value that occurs twice."""
    seen = set()
    for value in ids:
        if value in seen:
            raise ValueError(f"{where}: {what} {value!r} occurs twice")
        seen.add(value)
