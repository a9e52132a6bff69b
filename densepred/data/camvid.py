"""CamVid: street scenes with 11 classes, as SegNet published them."""

import os

from densepred.data.class_tables import CAMVID, metainfo
from densepred.data.dataset import SegDataset
from densepred.data.files import paired_files
from densepred.data.loading import label_table
from densepred.registry import DATASETS
from densepred.structures import IGNORE_INDEX

VOID = 11
"""Label of unlabelled pixels in the files."""


@DATASETS.register_module()
class CamVid(SegDataset):
    """CamVid, 480 x 360, 11 classes, read from SegNet's files as they come: 11 becomes the ignored 255.

    Source: Brostow et al., Semantic object classes in video, PRL 2009; labels and split of Badrinarayanan et al., SegNet,
    PAMI 2017.

    Args:
        data_root: folder with ``images/<split>/``, ``labels/<split>/`` and the lists ``<split>.txt``, see
            `densepred.data.dataset.resolve_data_root`.
        split: the name of a list, ``train`` or ``val``; its order is that of the film.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(CAMVID)
    COMMON = {"semantic_table": label_table({label: label for label in range(len(CAMVID))} | {VOID: IGNORE_INDEX})}

    SPLITS = ("train", "val", "test")

    def load_data_list(self) -> list[dict]:
        """Return records with ``semantic_path``, all files found."""
        images, labels = (os.path.join(self.data_root, part, self.split) for part in ("images", "labels"))
        names = os.path.join(self.data_root, f"{self.split}.txt")
        files = paired_files(images, (".jpg", ".png"), labels, ".png", names)
        return [{"img_path": image, "img_id": name, "semantic_path": label} for name, image, label in files]
