"""Cityscapes: panoptic, instance and semantic segmentation, and the conversion of its label files."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from glob import glob

import numpy as np

from densepred.data.class_tables import CITYSCAPES, metainfo
from densepred.data.dataset import SegDataset
from densepred.data.files import paired_files, require_files
from densepred.data.instances import NO_OBJECT
from densepred.data.loading import label_table
from densepred.data.panoptic_json import panoptic_records
from densepred.data.prepare import categories_json, convert, read_labels, segments_info, write_json, write_panoptic_png
from densepred.registry import DATASETS
from densepred.structures import IGNORE_INDEX

LABEL_SUFFIX = "_gtFine_instanceIds.png"
NUM_LABEL_IDS = 34
"""Ids in the label files: 0..33; those outside the class table are void."""


@DATASETS.register_module()
class CityscapesPanoptic(SegDataset):
    """Cityscapes with fine labels, 19 classes, things 11..18; groups of objects are crowds.

    Source: Cordts et al., The Cityscapes Dataset, CVPR 2016; layout of cityscapesscripts.

    Args:
        data_root: folder with ``leftImg8bit/`` and ``gtFine/``, see `densepred.data.dataset.resolve_data_root`.
        split: ``train``, ``val`` or ``test``.
        ann_file: the converted JSON beside the folder of its PNG files, relative to the root;
            ``None``: ``gtFine/cityscapes_panoptic_<split>.json``. The ids in it are those of the label files (7..33).
        pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(CITYSCAPES)
    PREPARE = "python datasets/prepare_cityscapes.py"
    SPLITS = ("train", "val", "test")

    def __init__(
        self,
        data_root: str,
        split: str,
        ann_file: str | None = None,
        pipeline: Sequence[dict | Callable] = (),
        seed: int = 0,
        indices: int | Sequence[int] | None = None,
        filter_empty: bool = False,
        skip_damaged: bool = False,
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        self.panoptic_json = ann_file or f"gtFine/cityscapes_panoptic_{split}.json"
        super().__init__(data_root, split, pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init)

    def load_data_list(self) -> list[dict]:
        """Return the records of `panoptic_records`, all files found."""
        self.ann_file = os.path.join(self.data_root, self.panoptic_json)
        if not os.path.isfile(self.ann_file):
            raise FileNotFoundError(
                f"{self.ann_file} does not exist: Cityscapes comes without panoptic maps; make them once with "
                f"`{self.PREPARE} {self.data_root} --split {self.split}`"
            )
        images = os.path.join(self.data_root, "leftImg8bit", self.split)
        records = panoptic_records(
            self.ann_file,
            os.path.splitext(self.ann_file)[0],
            # The file names in the JSON are not those on disk (cityscapesscripts writes *_gtFine_leftImg8bit.png).
            lambda image: os.path.join(images, image["id"].split("_")[0], f"{image['id']}_leftImg8bit.png"),
            self._metainfo,
        )
        require_files((record["img_path"] for record in records), "image", self.ann_file)
        require_files((record["panoptic_path"] for record in records), "panoptic PNG", self.ann_file)
        return records


@DATASETS.register_module()
class CityscapesInstances(SegDataset):
    """Cityscapes' instance segmentation with fine labels, 8 classes, read from its instanceIds files as they come.

    Groups of objects are no objects; images without object are kept (0.3 % of the training images).

    Args:
        data_root: folder with ``leftImg8bit/`` and ``gtFine/``, see `densepred.data.dataset.resolve_data_root`.
        split: ``train``, ``val`` or ``test``.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(tuple(row for row in CITYSCAPES if row[2]))
    COMMON = {
        "instance_table": label_table(
            dict.fromkeys(range(NUM_LABEL_IDS), NO_OBJECT)
            | {category: label for label, category in enumerate(METAINFO["category_ids"])}
        )
    }

    SPLITS = ("train", "val", "test")

    def load_data_list(self) -> list[dict]:
        """Return records with ``instance_path``, all files found."""
        return _label_records(self.data_root, self.split, LABEL_SUFFIX, "instance_path")


@DATASETS.register_module()
class CityscapesSemantic(SegDataset):
    """Cityscapes' semantic segmentation with fine labels, 19 classes, read from its labelIds files as they come.

    Args:
        data_root: folder with ``leftImg8bit/`` and ``gtFine/``, see `densepred.data.dataset.resolve_data_root`.
        split: ``train``, ``val`` or ``test``.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(CITYSCAPES)
    COMMON = {
        "semantic_table": label_table(
            dict.fromkeys(range(NUM_LABEL_IDS), IGNORE_INDEX)
            | {category: label for label, category in enumerate(METAINFO["category_ids"])}
        )
    }

    SPLITS = ("train", "val", "test")

    def load_data_list(self) -> list[dict]:
        """Return records with ``semantic_path``, all files found."""
        return _label_records(self.data_root, self.split, "_gtFine_labelIds.png", "semantic_path")


def _label_records(root: str, split: str, label_suffix: str, key: str) -> list[dict]:
    images, labels = (os.path.join(root, folder, split) for folder in ("leftImg8bit", "gtFine"))
    files = paired_files(images, "_leftImg8bit.png", labels, label_suffix)
    return [{"img_path": image, "img_id": name, key: label} for name, image, label in files]


def panoptic_from_instance_ids(instance_ids: np.ndarray) -> tuple[np.ndarray, list[dict]]:
    """Convert an instanceIds map as cityscapesscripts' ``createPanopticImgs`` does.

    Args:
        instance_ids: (H, W); ``id * 1000 + number`` for an object, the bare id for stuff and for a group of objects.

    Returns:
        ``ids`` (H, W) uint16, the same numbers with ignored classes set to 0, and their records; groups are crowds.

    Raises:
        ValueError: a class id beyond 33.
    """
    isthing = {category: thing for category, _, thing, _ in CITYSCAPES}
    lookup, categories = np.zeros(65536, np.uint16), {}
    for number in np.flatnonzero(np.bincount(instance_ids.ravel(), minlength=65536)).tolist():
        category = number // 1000 if number >= 1000 else number
        if category >= NUM_LABEL_IDS:
            raise ValueError(f"instance id {number} belongs to class {category}, but label ids end at 33")
        if category in isthing:
            lookup[number] = number
            categories[number] = (category, number < 1000 and isthing[category])
    ids = lookup[instance_ids]
    return ids, segments_info(ids, categories)


def convert_label_file(path: str, folder: str) -> tuple[dict, dict]:
    """Write the panoptic PNG of one instanceIds file into ``folder``; return its records of images and annotations."""
    name = os.path.basename(path).removesuffix(LABEL_SUFFIX)
    instance_ids = read_labels(path)
    try:
        ids, segments = panoptic_from_instance_ids(instance_ids)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_panoptic_png(os.path.join(folder, f"{name}_gtFine_panoptic.png"), ids)
    height, width = ids.shape
    image = {"id": name, "file_name": f"{name}_gtFine_leftImg8bit.png", "height": height, "width": width}
    return image, {"image_id": name, "file_name": f"{name}_gtFine_panoptic.png", "segments_info": segments}


def convert_split(root: str, split: str, out: str, workers: int = 1) -> str:
    """Convert all labels of a split; the JSON is written last, so where it exists the conversion is complete.

    Args:
        root: folder with ``gtFine/``.
        split: ``train`` or ``val``.
        out: folder for ``cityscapes_panoptic_<split>`` (PNG files) and the JSON beside it.
        workers: processes.

    Returns:
        The path of the JSON.
    """
    pattern = os.path.join(root, "gtFine", split, "*", f"*{LABEL_SUFFIX}")
    files = sorted(glob(pattern))
    if not files:
        raise FileNotFoundError(f"no label files {pattern}; unpack gtFine_trainvaltest.zip into {root}")
    folder = os.path.join(out, f"cityscapes_panoptic_{split}")
    pairs = convert(partial(convert_label_file, folder=folder), files, f"converting {split}", workers)
    images, annotations = zip(*pairs, strict=True)
    write_json(
        f"{folder}.json", {"images": images, "annotations": annotations, "categories": categories_json(CITYSCAPES)}
    )
    return f"{folder}.json"
