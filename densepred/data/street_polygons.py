"""Outlines and instances of street scenes, from their files as they come: Cityscapes, IDD and KITTI."""

import os

from densepred.data.cityscapes import CityscapesInstances
from densepred.data.class_tables import CITYSCAPES, IDD_THINGS, metainfo
from densepred.data.dataset import SegDataset
from densepred.data.files import paired_files
from densepred.data.instances import NO_OBJECT
from densepred.registry import DATASETS

LABEL_SUFFIX = "_gtFine_polygons.json"
KITTI_SUFFIX = "_10.png"
KITTI_VAL_STEP = 20
"""Every 20th training image validates."""


@DATASETS.register_module()
class CityscapesPolygons(SegDataset):
    """Cityscapes' objects as their annotators drew them, 8 classes, from the ``*_gtFine_polygons.json`` files alone.

    Unlike in the id maps an outline goes on behind nearer objects, and the order in depth is known. Where there are only
    ``*_instanceIds.png``, take `CityscapesInstances`: `LoadPolygons` makes polygons of its masks. Groups of objects are no
    objects; images without object are kept.

    Source: Cordts et al., The Cityscapes Dataset, CVPR 2016.

    Args:
        data_root: folder with ``leftImg8bit/`` and ``gtFine/``, see `densepred.data.dataset.resolve_data_root`.
        split: ``train``, ``val`` or ``test``.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(tuple(row for row in CITYSCAPES if row[2]))
    COMMON = {"polygon_table": {name: label for label, name in enumerate(METAINFO["classes"])}}

    SPLITS = ("train", "val", "test")

    def load_data_list(self) -> list[dict]:
        """Return records with ``polygon_path``, all files found."""
        images, labels = (os.path.join(self.data_root, part, self.split) for part in ("leftImg8bit", "gtFine"))
        files = paired_files(images, "_leftImg8bit.png", labels, LABEL_SUFFIX)
        return [{"img_path": image, "img_id": name, "polygon_path": label} for name, image, label in files]


@DATASETS.register_module()
class IDDPolygons(SegDataset):
    """The India Driving Dataset's objects as their annotators drew them, 9 classes, from the JSON files alone.

    Names of images repeat from sequence to sequence, so ``img_id`` is ``<sequence>/<name>``.

    Source: Varma et al., IDD, WACV 2019; layout of AutoNUE's public code.

    Args:
        data_root: folder with ``leftImg8bit/<split>/<sequence>/`` (PNG or JPEG) and ``gtFine/<split>/<sequence>/``, see
            `densepred.data.dataset.resolve_data_root`.
        split: ``train`` or ``val``.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(IDD_THINGS)
    COMMON = {"polygon_table": {name: label for label, name in enumerate(METAINFO["classes"])}}

    SPLITS = ("train", "val")

    def load_data_list(self) -> list[dict]:
        """Return records with ``polygon_path``, all files found."""
        images, labels = (os.path.join(self.data_root, part, self.split) for part in ("leftImg8bit", "gtFine"))
        files = paired_files(images, ("_leftImg8bit.png", "_leftImg8bit.jpg"), labels, LABEL_SUFFIX)
        return [
            {
                "img_path": image,
                "img_id": f"{os.path.basename(os.path.dirname(image))}/{name}",
                "polygon_path": label,
            }
            for name, image, label in files
        ]


@DATASETS.register_module()
class KITTIPolygons(SegDataset):
    """KITTI's instance benchmark, Cityscapes' 8 classes, read from its instance maps as they come.

    A pixel of a map holds ``class * 256 + number``, number 0 = no object. The maps tell no order in depth. The 200 images
    have no official split: every 20th of them, by name, validates, as in CenterPoly.

    Source: Alhaija et al., Augmented Reality Meets Computer Vision, IJCV 2018.

    Args:
        data_root: folder with ``training/image_2/*_10.png`` and ``training/instance/*_10.png``, see
            `densepred.data.dataset.resolve_data_root`.
        split: ``train``, ``val`` or ``trainval`` (all).
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.

    Raises:
        ValueError: another split.
    """

    METAINFO = CityscapesInstances.METAINFO
    COMMON = {"instance_table": CityscapesInstances.COMMON["instance_table"].copy(), "instance_divisor": 256}
    COMMON["instance_table"][255] = NO_OBJECT  # the class -1, of license plates, in 8 bits

    SPLITS = ("train", "val", "trainval")

    def load_data_list(self) -> list[dict]:
        """Return records with ``instance_path``, all files found."""
        images, labels = (os.path.join(self.data_root, "training", part) for part in ("image_2", "instance"))
        files = paired_files(images, KITTI_SUFFIX, labels, KITTI_SUFFIX)
        parts = {"train": (False,), "val": (True,), "trainval": (False, True)}[self.split]
        return [
            {"img_path": image, "img_id": f"{name}_10", "instance_path": label}
            for position, (name, image, label) in enumerate(files, 1)
            if (position % KITTI_VAL_STEP == 0) in parts
        ]
