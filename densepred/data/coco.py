"""COCO panoptic, and everybody's own data in that format."""

import os
from collections.abc import Callable, Sequence

from densepred.data.class_tables import COCO_PANOPTIC, metainfo
from densepred.data.dataset import SegDataset
from densepred.data.files import require_files
from densepred.data.panoptic_json import categories_of, panoptic_records
from densepred.registry import DATASETS


@DATASETS.register_module()
class CocoPanoptic(SegDataset):
    """COCO panoptic segmentation: a JSON, a folder of PNG files (segment = R + 256 G + 65536 B, 0 = void), images.

    Source: Kirillov et al., Panoptic Segmentation, CVPR 2019.

    Args:
        data_root: folder, see `densepred.data.dataset.resolve_data_root`; the paths below are relative to it.
        ann_file: the JSON, e.g. ``annotations/panoptic_train2017.json``.
        image_dir: folder of the images, e.g. ``train2017``.
        panoptic_dir: folder of the PNG files; ``None``: named as ``ann_file`` without its ending.
        classes_from_file: take the class table from the file's ``categories`` instead of COCO's 133: for own data.
        pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(COCO_PANOPTIC)
    PREPARE = "python datasets/prepare_coco.py"

    def __init__(
        self,
        data_root: str,
        ann_file: str,
        image_dir: str,
        panoptic_dir: str | None = None,
        classes_from_file: bool = False,
        pipeline: Sequence[dict | Callable] = (),
        seed: int = 0,
        indices: int | Sequence[int] | None = None,
        filter_empty: bool = False,
        skip_damaged: bool = False,
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        self.layout = (ann_file, image_dir, panoptic_dir or os.path.splitext(ann_file)[0])
        self.classes_from_file = classes_from_file
        super().__init__(data_root, None, pipeline, seed, indices, filter_empty, skip_damaged, test_mode, lazy_init)

    def load_data_list(self) -> list[dict]:
        """Return the records of `panoptic_records`, all files found."""
        self.ann_file, image_dir, panoptic_dir = (os.path.join(self.data_root, part) for part in self.layout)
        if self.classes_from_file:
            self._metainfo = metainfo(categories_of(self.ann_file))
        records = panoptic_records(
            self.ann_file, panoptic_dir, lambda image: os.path.join(image_dir, image["file_name"]), self._metainfo
        )
        require_files((record["img_path"] for record in records), "image", self.ann_file)
        require_files((record["panoptic_path"] for record in records), "panoptic PNG", self.ann_file)
        return records
