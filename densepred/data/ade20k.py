"""ADE20K: panoptic and semantic segmentation, and the conversion of its label files."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from glob import glob

import numpy as np

from densepred.data.class_tables import ADE20K, metainfo
from densepred.data.dataset import SegDataset
from densepred.data.files import paired_files, require_files
from densepred.data.loading import label_table
from densepred.data.panoptic_json import panoptic_records
from densepred.data.prepare import categories_json, convert, read_labels, segments_info, write_json, write_panoptic_png
from densepred.registry import DATASETS
from densepred.structures import IGNORE_INDEX

FOLDERS = {"train": "training", "val": "validation"}
THINGS = tuple(category for category, _, isthing, _ in ADE20K if isthing)
"""Category ids of the instance challenge's classes 1..100."""


@DATASETS.register_module()
class ADE20KPanoptic(SegDataset):
    """ADE20K's 150-class benchmark as panoptic segmentation, things (100) and stuff (50) interleaved.

    Source: Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017; layout of Mask2Former's preparation.

    Args:
        data_root: folder ``ADEChallengeData2016``, see `densepred.data.dataset.resolve_data_root`.
        split: ``train`` or ``val``.
        ann_file: the converted JSON beside the folder of its PNG files, relative to the root;
            ``None``: ``ade20k_panoptic_<split>.json``.
        pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(ADE20K)
    PREPARE = "python datasets/prepare_ade20k.py"
    SPLITS = tuple(FOLDERS)

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
        self.panoptic_json = ann_file or f"ade20k_panoptic_{split}.json"
        super().__init__(data_root, split, pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init)

    def load_data_list(self) -> list[dict]:
        """Return the records of `panoptic_records`, all files found."""
        self.ann_file = os.path.join(self.data_root, self.panoptic_json)
        if not os.path.isfile(self.ann_file):
            raise FileNotFoundError(
                f"{self.ann_file} does not exist: ADE20K comes without panoptic maps; make them once with "
                f"`{self.PREPARE} {self.data_root} --split {self.split}`"
            )
        images = os.path.join(self.data_root, "images", FOLDERS[self.split])
        panoptic_dir = os.path.splitext(self.ann_file)[0]
        records = panoptic_records(
            self.ann_file, panoptic_dir, lambda image: os.path.join(images, image["file_name"]), self._metainfo
        )
        require_files((record["img_path"] for record in records), "image", self.ann_file)
        require_files((record["panoptic_path"] for record in records), "panoptic PNG", self.ann_file)
        return records


@DATASETS.register_module()
class ADE20KSemantic(SegDataset):
    """ADE20K's 150-class scene parsing benchmark, read from its files as they come: 0 is ignored, k is class k - 1.

    Args:
        data_root: folder ``ADEChallengeData2016``, see `densepred.data.dataset.resolve_data_root`.
        split: ``train`` or ``val``.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(ADE20K)
    COMMON = {"semantic_table": label_table({0: IGNORE_INDEX} | {label + 1: label for label in range(len(ADE20K))})}

    SPLITS = tuple(FOLDERS)

    def load_data_list(self) -> list[dict]:
        """Return records with ``semantic_path``, all files found."""
        images, labels = (os.path.join(self.data_root, part, FOLDERS[self.split]) for part in ("images", "annotations"))
        files = paired_files(images, ".jpg", labels, ".png")
        return [{"img_path": image, "img_id": name, "semantic_path": label} for name, image, label in files]


def panoptic_from_labels(semantic: np.ndarray, instances: np.ndarray | None) -> tuple[np.ndarray, list[dict]]:
    """Join ADE20K's semantic and instance maps: stuff first, then the objects over it.

    Args:
        semantic: (H, W), 0 = other, else class 1..150.
        instances: (H, W, 3) RGB, R = class 1..100 of the instance challenge, G = number of the object, 0 = none.
            ``None``: no instances are known; every class is one segment, and those of things are crowds.

    Returns:
        ``ids`` (H, W), 0 = void (which thing pixels outside every object are), and the records of its segments.

    Raises:
        ValueError: a class outside 0..150, or an object with no or several classes.
    """
    if semantic.ndim != 2 or semantic.max(initial=0) > len(ADE20K):
        raise ValueError(
            f"semantic map of shape {semantic.shape} with values up to {semantic.max()}; wants (H, W) of 0..150"
        )
    isthing = np.array([False, *(row[2] for row in ADE20K)])
    categories = {number: (number - 1, bool(isthing[number])) for number in range(1, len(ADE20K) + 1)}
    ids = semantic.astype(np.uint16)
    if instances is None:
        return ids, segments_info(ids, categories)
    ids[isthing[ids]] = 0
    for number in np.unique(instances[..., 1][instances[..., 1] > 0]).tolist():
        mask = instances[..., 1] == number
        kinds = np.unique(instances[..., 0][mask]).tolist()
        if len(kinds) != 1 or not 1 <= kinds[0] <= len(THINGS):
            raise ValueError(
                f"object {number} of the instance map has the classes {kinds}; wants exactly one of 1..100"
            )
        ids[mask] = len(ADE20K) + number
        categories[len(ADE20K) + number] = (THINGS[kinds[0] - 1], False)
    return ids, segments_info(ids, categories)


def convert_label_file(path: str, folder: str, instance_dir: str | None) -> tuple[dict, dict]:
    """Write the panoptic PNG of one semantic map into ``folder``; return its records of images and annotations.

    Args:
        path: the semantic map.
        folder: for the PNG file.
        instance_dir: folder of the instance maps, or ``None`` for `panoptic_from_labels` without instances.
    """
    name = os.path.basename(path)
    stem = os.path.splitext(name)[0]
    instances = None if instance_dir is None else read_labels(os.path.join(instance_dir, name))
    try:
        ids, segments = panoptic_from_labels(read_labels(path), instances)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    write_panoptic_png(os.path.join(folder, name), ids)
    image = {"id": stem, "file_name": f"{stem}.jpg", "height": ids.shape[0], "width": ids.shape[1]}
    return image, {"image_id": stem, "file_name": name, "segments_info": segments}


def convert_split(root: str, split: str, out: str, stuff_only: bool = False, workers: int = 1) -> str:
    """Convert all labels of a split; the JSON is written last, so where it exists the conversion is complete.

    Args:
        root: folder with ``annotations/`` and ``annotations_instance/``.
        split: ``train`` or ``val``.
        out: folder for ``ade20k_panoptic_<split>`` (PNG files) and the JSON beside it.
        stuff_only: use the semantic maps alone, see `panoptic_from_labels`.
        workers: processes.

    Returns:
        The path of the JSON.
    """
    pattern = os.path.join(root, "annotations", FOLDERS[split], "*.png")
    files = sorted(glob(pattern))
    if not files:
        raise FileNotFoundError(f"no label files {pattern}; unpack ADEChallengeData2016.zip so that {root} holds them")
    instance_dir = None if stuff_only else os.path.join(root, "annotations_instance", FOLDERS[split])
    if instance_dir is not None and not os.path.isdir(instance_dir):
        raise FileNotFoundError(
            f"{instance_dir} does not exist: the instance maps are a second download (annotations_instance.tar, see "
            "datasets/README.md); --stuff-only makes panoptic maps without objects from the semantic maps alone"
        )
    folder = os.path.join(out, f"ade20k_panoptic_{split}")
    job = partial(convert_label_file, folder=folder, instance_dir=instance_dir)
    images, annotations = zip(*convert(job, files, f"converting {split}", workers), strict=True)
    content = {"images": images, "annotations": annotations, "categories": categories_json(ADE20K)}
    write_json(f"{folder}.json", content)
    return f"{folder}.json"
