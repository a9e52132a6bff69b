"""Shapes on disk: scenes written in the layouts of COCO, of street scenes, of ADE20K and of microscope images."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle

from densepred.data import ade20k, binary, camvid, cityscapes
from densepred.data.class_tables import CITYSCAPES
from densepred.data.instances import OBJECT_DIVISOR
from densepred.data.prepare import (
    categories_json,
    progress,
    segment_geometry,
    segments_info,
    write_image,
    write_json,
    write_panoptic_png,
)
from densepred.data.shapes import CATEGORIES, CLASSES, Scene, make_scene
from densepred.data.street_polygons import KITTI_VAL_STEP

SPLITS = ("train", "val")
BY_NAME = {c.name: c for c in CLASSES}
SPREAD = 5573917
"""Between the ids of consecutive segments in COCO's layout, whose ids use all three bytes."""
CITYSCAPES_NAMES = {category: name for category, name, _, _ in CITYSCAPES}


def write_split(
    root: str, layout: str, split: str, count: int, seed: int = 0, height: int = 128, width: int = 160
) -> None:
    """Draw and write a split with progress; a scene depends on its seed, split, position and size alone.

    Args:
        root: folder, made where needed.
        layout: a key of `LAYOUTS`.
        split: ``train`` or ``val``.
        count: scenes, at least 1.
        seed: of the set.
        height, width: pixels, at least 32 each.
    """
    rngs = (np.random.default_rng((seed, SPLITS.index(split), position)) for position in range(count))
    scenes = (make_scene(rng, height, width) for rng in rngs)
    LAYOUTS[layout](root, split, progress(scenes, f"writing {split}", count))


def write_coco(root: str, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``<split>2017/``, ``annotations/panoptic_<split>2017{/,.json}`` and ``annotations/instances_<split>2017.json``.

    The category ids are some of COCO's, the names in ``categories`` those of Shapes.
    """
    images, panoptic, instances = [], [], []
    for number, scene in enumerate(scenes, 1):
        name = f"{number:06d}.png"
        _write_rgb(os.path.join(root, f"{split}2017", name), scene.image)
        height, width = scene.ids.shape
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        write_panoptic_png(os.path.join(root, "annotations", f"panoptic_{split}2017", name), _spread(scene.ids))
        categories = {n: (BY_NAME[category].coco_id, crowd) for n, (category, crowd) in scene.segments.items()}
        segments = [info | {"id": _spread(info["id"])} for info in segments_info(scene.ids, categories)]
        panoptic.append({"image_id": number, "file_name": name, "segments_info": segments})
        instances += [{"image_id": number, **record} for record in coco_instances(scene)]
    table = categories_json(CATEGORIES)
    content = {"images": images, "annotations": panoptic, "categories": table}
    write_json(os.path.join(root, "annotations", f"panoptic_{split}2017.json"), content)
    numbered = [{"id": number, **record} for number, record in enumerate(instances, 1)]
    things = [category for category in table if category["isthing"]]
    content = {"images": images, "annotations": numbered, "categories": things}
    write_json(os.path.join(root, "annotations", f"instances_{split}2017.json"), content)


def coco_instances(scene: Scene) -> list[dict]:
    """Return the things of a scene as COCO annotations less their ids; like COCO's, crowds have plain counts."""
    records = []
    for number, (area, box) in segment_geometry(scene.ids).items():
        name, iscrowd = scene.segments[number]
        if not BY_NAME[name].isthing:
            continue
        mask = scene.ids == number
        record = {"category_id": BY_NAME[name].coco_id, "iscrowd": int(iscrowd), "area": area, "bbox": box}
        records.append(record | {"segmentation": _plain_rle(mask) if iscrowd else _packed_rle(mask)})
    return records


def write_cityscapes(root: str, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``leftImg8bit/<split>/shapes/`` and ``gtFine/<split>/shapes/`` and convert them to panoptic maps."""
    for number, scene in enumerate(scenes, 1):
        stem = f"shapes_000000_{number:06d}"
        _write_rgb(os.path.join(root, "leftImg8bit", split, "shapes", f"{stem}_leftImg8bit.png"), scene.image)
        labels = os.path.join(root, "gtFine", split, "shapes", f"{stem}_gtFine")
        label_ids, instance_ids = cityscapes_maps(scene)
        write_image(f"{labels}_labelIds.png", label_ids)
        write_image(f"{labels}_instanceIds.png", instance_ids)
        write_json(f"{labels}_polygons.json", cityscapes_polygons(scene))
    cityscapes.convert_split(root, split, os.path.join(root, "gtFine"))


def cityscapes_maps(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return labelIds (H, W) uint8 and instanceIds (H, W) uint16; void is 0, "unlabeled"."""
    label_ids, instance_ids = (np.zeros(max(scene.segments, default=0) + 1, kind) for kind in (np.uint8, np.uint16))
    seen: Counter[str] = Counter()
    for number, (name, iscrowd) in scene.segments.items():
        category = BY_NAME[name].cityscapes_id
        label_ids[number] = instance_ids[number] = category
        if BY_NAME[name].isthing and not iscrowd:
            instance_ids[number] = category * 1000 + seen[name]
            seen[name] += 1
    return label_ids[scene.ids], instance_ids[scene.ids]


def cityscapes_polygons(scene: Scene) -> dict:
    """Return the content of ``*_gtFine_polygons.json``: objects from back to front, members of crowds as groups."""
    objects = []
    for name, iscrowd, points in scene.polygons:
        label = "unlabeled" if name == "void" else CITYSCAPES_NAMES[BY_NAME[name].cityscapes_id]
        objects.append({"label": label + "group" * iscrowd, "polygon": np.rint(points).astype(int).tolist()})
    height, width = scene.ids.shape
    return {"imgHeight": height, "imgWidth": width, "objects": objects}


def write_idd(root: str, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``leftImg8bit/<split>/0/`` and the polygons in ``gtFine/<split>/0/``, under Cityscapes' names of classes."""
    for number, scene in enumerate(scenes, 1):
        _write_rgb(os.path.join(root, "leftImg8bit", split, "0", f"{number:06d}_leftImg8bit.png"), scene.image)
        labels = os.path.join(root, "gtFine", split, "0", f"{number:06d}_gtFine_polygons.json")
        write_json(labels, cityscapes_polygons(scene))


def write_kitti(root: str, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``training/image_2/`` and ``training/instance/``; the one image of ``val`` is the 20th by name."""
    for number, scene in enumerate(scenes, 1 if split == "train" else KITTI_VAL_STEP):
        name = f"{number:06d}_10.png"
        _write_rgb(os.path.join(root, "training", "image_2", name), scene.image)
        ids = cityscapes_maps(scene)[1].astype(np.int64)
        objects = ids >= OBJECT_DIVISOR
        categories, numbers = (
            np.where(objects, ids // OBJECT_DIVISOR, ids),
            np.where(objects, ids % OBJECT_DIVISOR + 1, 0),
        )
        write_image(os.path.join(root, "training", "instance", name), (categories * 256 + numbers).astype(np.uint16))


def write_ade20k(root: str, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``images/``, ``annotations/`` and ``annotations_instance/`` and convert them to panoptic maps.

    ADE20K knows no crowds: their pixels have a class but no object, so that they are void in the panoptic map.
    """
    folder = ade20k.FOLDERS[split]
    for number, scene in enumerate(scenes, 1):
        stem = f"ADE_{split}_{number:08d}"
        _write_rgb(os.path.join(root, "images", folder, f"{stem}.jpg"), scene.image)
        semantic, instances = ade20k_maps(scene)
        write_image(os.path.join(root, "annotations", folder, f"{stem}.png"), semantic)
        _write_rgb(os.path.join(root, "annotations_instance", folder, f"{stem}.png"), instances)
    ade20k.convert_split(root, split, root)


def ade20k_maps(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Return the class map (H, W) uint8, 0 = other, and the instance map (H, W, 3) uint8, see `panoptic_from_labels`."""
    size = max(scene.segments, default=0) + 1
    semantic, instances = np.zeros(size, np.uint8), np.zeros((size, 3), np.uint8)
    for number, (name, iscrowd) in scene.segments.items():
        category = BY_NAME[name].ade20k_id
        semantic[number] = category + 1
        if BY_NAME[name].isthing and not iscrowd:
            instances[number] = ade20k.THINGS.index(category) + 1, instances[:, 1].max() + 1, 0
    return semantic[scene.ids], instances[scene.ids]


def write_camvid(root: str, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``images/<split>/``, ``labels/<split>/`` and ``<split>.txt``; of CamVid's 11 classes fence never occurs."""
    names = []
    for number, scene in enumerate(scenes, 1):
        names.append(f"shapes_{number:06d}")
        _write_rgb(os.path.join(root, "images", split, f"{names[-1]}.png"), scene.image)
        labels = np.full(max(scene.segments, default=0) + 1, camvid.VOID, np.uint8)
        for segment, (name, _) in scene.segments.items():
            labels[segment] = BY_NAME[name].camvid_id
        write_image(os.path.join(root, "labels", split, f"{names[-1]}.png"), labels[scene.ids])
    _write_list(root, split, names)


def write_isbi2012(root: str, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``images/`` and ``labels/``, grey and 0 or 255: the segments are the cells, dark lines part them."""
    for number, scene in zip(binary.SLICES[split], scenes, strict=True):
        ids, square = scene.ids.astype(np.uint16), np.ones((3, 3), np.uint8)
        membrane = cv2.dilate(ids, square) != cv2.erode(ids, square)  # two pixels wide
        grey = cv2.cvtColor(scene.image, cv2.COLOR_RGB2GRAY)
        write_image(os.path.join(root, "images", f"{number:02d}.png"), np.where(membrane, grey // 3, grey))
        write_image(os.path.join(root, "labels", f"{number:02d}.png"), np.where(membrane, 0, 255).astype(np.uint8))


def write_dsb2018(root: str, split: str, scenes: Iterable[Scene]) -> None:
    """Write ``images/<split>/``, ``instances/<split>/`` (16 bits) and ``<split>.txt``: the things are the nuclei."""
    names = []
    for number, scene in enumerate(scenes, 1):
        names.append(f"{number:016x}")
        image = os.path.join(root, "images", split, f"{names[-1]}.webp")
        os.makedirs(os.path.dirname(image), exist_ok=True)
        Image.fromarray(scene.image).save(image, lossless=True)
        things = [segment for segment, (name, _) in scene.segments.items() if BY_NAME[name].isthing]
        instances = np.zeros(max(scene.segments, default=0) + 1, np.uint16)
        instances[things] = np.arange(1, len(things) + 1)
        write_image(os.path.join(root, "instances", split, f"{names[-1]}.png"), instances[scene.ids])
    _write_list(root, split, names)


LAYOUTS: dict[str, Callable[[str, str, Iterable[Scene]], None]] = {
    "coco": write_coco,
    "cityscapes": write_cityscapes,
    "idd": write_idd,
    "kitti": write_kitti,
    "ade20k": write_ade20k,
    "camvid": write_camvid,
    "isbi2012": write_isbi2012,
    "dsb2018": write_dsb2018,
}
FIXED_COUNTS = {
    "isbi2012": {split: len(numbers) for split, numbers in binary.SLICES.items()},
    "kitti": {"train": KITTI_VAL_STEP - 1, "val": 1},
}
"""Layouts that have just so many images."""


def _write_list(root: str, split: str, names: list[str]) -> None:
    Path(root, f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def _spread(numbers: int | np.ndarray) -> int | np.ndarray:
    """Return colour-like ids: one-to-one below 2^24, as the factor is odd."""
    return numbers * SPREAD & 0xFFFFFF


def _write_rgb(path: str, image: np.ndarray) -> None:
    write_image(path, image[..., ::-1])


def _packed_rle(mask: np.ndarray) -> dict:
    packed = rle.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": packed["counts"].decode()}


def _plain_rle(mask: np.ndarray) -> dict:
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [mask.size]]))
    # A mask that reaches the last pixel ends with a change there: no empty run after it.
    return {"size": list(mask.shape), "counts": [int(n) for n in counts[: len(counts) - (counts[-1] == 0)]]}
