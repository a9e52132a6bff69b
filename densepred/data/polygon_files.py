"""CenterPoly's own annotation files: ready polygons, a CSV or a JSON beside images that lie anywhere."""

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import PureWindowsPath

import numpy as np

from densepred.data.class_tables import CITYSCAPES, COCO_PANOPTIC, IDD_THINGS, Category, metainfo
from densepred.data.dataset import SegDataset
from densepred.data.panoptic_json import read_lists, require_unique
from densepred.registry import DATASETS

NO_OBJECT = "no_object"
"""In the CSV: the label of a line that only names an image."""
RECORDS = {
    "images": ("id", "file_name"),
    "annotations": ("image_id", "category_id", "bbox", "poly", "pseudo_depth"),
    "categories": ("id", "name"),
}
CITYSCAPES_THINGS = tuple(row for row in CITYSCAPES if row[2])


@DATASETS.register_module()
class CenterPolyFile(SegDataset):
    """Ready polygons in CenterPoly's form: CSV lines or a COCO-like JSON, all with the same number of vertices.

    CSV, no header, one object a line: ``image, x0, y0, x1, y1, label, depth, x, y, x, y, ...``; an image without objects
    has the label ``no_object``. JSON: ``images`` (id, file_name), ``categories`` (id, name) and ``annotations`` (image_id,
    category_id, bbox [x, y, w, h], poly [x, y, ...], pseudo_depth). Coordinates are pixels of the image, depth 0 is
    nearest. Of an image's name its last part counts; the file of that name is looked for in all of ``image_dir``.

    Source: KatiaJDL/CenterPoly-v2, ``BBoxes/``.

    Args:
        data_root: folder, see `densepred.data.dataset.resolve_data_root`; the paths below are relative to it.
        ann_file: ``*.csv`` or ``*.json``.
        image_dir: folder of the images and of folders of images.
        classes: names in the order of training; ``None``: those in the JSON by ascending id, Cityscapes' 8 for a CSV.
            Colours and ids are Cityscapes' or IDD's where one of them knows all the names, else COCO's in turn and 1..C.
        pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    OBJECTS = "objects"

    def __init__(
        self,
        data_root: str,
        ann_file: str,
        image_dir: str,
        classes: Sequence[str] | None = None,
        pipeline: Sequence[dict | Callable] = (),
        seed: int = 0,
        indices: int | Sequence[int] | None = None,
        filter_empty: bool = False,
        skip_damaged: bool = False,
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        self.layout = (ann_file, image_dir)
        self.classes = None if classes is None else tuple(classes)
        super().__init__(data_root, None, pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init)

    def load_data_list(self) -> list[dict]:
        """Return a record an image with ``objects``, in the order of the file, all images found.

        Raises:
            FileNotFoundError: the annotation or an image is missing.
            ValueError: a line or record that does not have that form (named), an unknown class, an image's name that
                several files have.
        """
        self.ann_file, image_dir = (os.path.join(self.data_root, part) for part in self.layout)
        if self.ann_file.lower().endswith(".json"):
            names, images = read_json(self.ann_file, self.classes)
        elif self.ann_file.lower().endswith(".csv"):
            names = self.classes or tuple(name for _, name, _, _ in CITYSCAPES_THINGS)
            images = read_csv(self.ann_file, names)
        else:
            raise ValueError(f"{self.ann_file}: CenterPoly's annotations are *.csv or *.json files")
        self._metainfo = metainfo(table_of(names))
        paths = find_images(image_dir, list(images), self.ann_file)
        return [
            {"img_path": path, "img_id": os.path.splitext(name)[0], "objects": images[name]}
            for name, path in zip(images, paths, strict=True)
        ]


def table_of(names: Sequence[str]) -> tuple[Category, ...]:
    """Return a class table of things with these names, see `CenterPolyFile`."""
    for table in (CITYSCAPES_THINGS, IDD_THINGS):
        known = {row[1]: row for row in table}
        if all(name in known for name in names):
            return tuple(known[name] for name in names)
    palette = [color for *_, color in COCO_PANOPTIC]
    return tuple((i + 1, name, True, palette[i % len(palette)]) for i, name in enumerate(names))


def read_csv(path: str, classes: Sequence[str]) -> dict[str, list[dict]]:
    """Return the objects of each image by the last part of its name, in the order of the file.

    Returns:
        Dicts with ``label``, ``depth``, ``vertices`` (V, 2) float32, ``box`` (4,) float32 xyxy and ``iscrowd`` False.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that does not have the form, or an unknown class; the message names the line.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"annotation file {path} does not exist; see docs/polygons.md for the format")
    images: dict[str, list[dict]] = {}
    labels = {name: label for label, name in enumerate(classes)}
    with open(path, newline="", encoding="utf-8-sig") as file:
        for number, fields in enumerate(csv.reader(file), 1):
            if not fields:
                continue
            where = f"{path}:{number}"
            if len(fields) < 7:
                raise ValueError(
                    f"{where} has {len(fields)} fields; a line is image,x0,y0,x1,y1,label,depth and then x,y of each vertex"
                )
            objects = images.setdefault(_last_part(fields[0]), [])
            if fields[5] != NO_OBJECT:
                label = _label(fields[5], labels, where)
                objects.append(_record(label, fields[6], fields[1:5], fields[7:], where))
    _require_one_count(images, path)
    return images


def read_json(path: str, classes: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, list[dict]]]:
    """Return the names of the classes, and objects as `read_csv` does; ``classes`` as of `CenterPolyFile`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON of that form, ids that occur twice, an unknown class or image.
    """
    content = read_lists(path, RECORDS, "polygon")
    for name in ("images", "categories"):
        require_unique([record["id"] for record in content[name]], path, f"id in {name}")
    categories = sorted(content["categories"], key=lambda record: record["id"])
    names = tuple(record["name"] for record in categories) if classes is None else tuple(classes)
    labels = {name: label for label, name in enumerate(names)}
    by_id = {record["id"]: record["name"] for record in categories}
    files = {record["id"]: _last_part(record["file_name"]) for record in content["images"]}
    require_unique(list(files.values()), path, "file_name")
    images: dict[str, list[dict]] = {name: [] for name in files.values()}
    for position, annotation in enumerate(content["annotations"]):
        where = f"{path}: annotations[{position}]"
        if annotation["image_id"] not in files:
            raise ValueError(f"{where} is of image {annotation['image_id']!r}, which is not in 'images'")
        category = annotation["category_id"]
        label = _label(by_id.get(category, category), labels, where)
        record = _record(label, annotation["pseudo_depth"], annotation["bbox"], annotation["poly"], where)
        record["box"][2:] += record["box"][:2]  # from x, y, width, height
        images[files[annotation["image_id"]]].append(record)
    _require_one_count(images, path)
    return names, images


def find_images(folder: str, names: Sequence[str], named_by: str) -> list[str]:
    """Return the path of each file of these names in a folder and the folders in it.

    Raises:
        FileNotFoundError: some are missing; the message counts them and names the first.
        ValueError: two files have a wanted name.
    """
    wanted, found = set(names), {}
    for place, _, files in os.walk(folder, followlinks=True):
        for name in wanted.intersection(files):
            path = os.path.join(place, name)
            if name in found:
                raise ValueError(f"{named_by} names {name}, but both {found[name]} and {path} have that name")
            found[name] = path
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images that {named_by} names are missing below {folder}, the first is "
            f"{missing[0]}; add them, or set image_dir to the folder that holds them"
        )
    return [found[name] for name in names]


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name  # knows both kinds of slashes


def _label(name: object, labels: dict[str, int], where: str) -> int:
    if name not in labels:
        raise ValueError(
            f"{where} has the class {name!r}, which is none of {', '.join(labels)}: set classes of the data set"
        )
    return labels[name]


def _record(label: int, depth: object, box: Sequence, coordinates: Sequence, where: str) -> dict:
    try:
        vertices = np.array(coordinates, np.float32).reshape(-1, 2)  # (V, 2)
        depth, box = float(depth), np.array(box, np.float32).reshape(4)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: depth, box and vertices must be numbers, x and y of each vertex ({error})"
        ) from None
    if not np.isfinite([depth, *box, *vertices.flat]).all() or len(vertices) < 3:
        raise ValueError(f"{where}: a polygon of {len(vertices)} vertices; it needs three, and finite numbers")
    return {"label": label, "depth": depth, "vertices": vertices, "box": box, "iscrowd": False}


def _require_one_count(images: dict[str, list[dict]], path: str) -> None:
    counts: dict[int, str] = {}
    for name, objects in images.items():
        for record in objects:
            counts.setdefault(len(record["vertices"]), name)
    if len(counts) > 1:
        (first, one), (second, other) = list(counts.items())[:2]
        raise ValueError(
            f"{path} has polygons of {first} vertices (of {one}) and of {second} (of {other}); all need the same number"
        )
