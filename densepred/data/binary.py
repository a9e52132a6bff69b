"""Microscope images with two classes, background and foreground in this order: ISBI 2012's cells and DSB 2018's nuclei."""

import os

import numpy as np

from densepred.data.class_tables import metainfo
from densepred.data.dataset import SegDataset
from densepred.data.files import paired_files, require_files
from densepred.data.loading import label_table
from densepred.registry import DATASETS

SLICES = {"train": range(24), "val": range(24, 30)}
"""Our split of ISBI 2012's public slices; the challenge's own test labels were never published."""


@DATASETS.register_module()
class ISBI2012(SegDataset):
    """Cells and their membranes in 30 consecutive slices by electron microscopy, 512 x 512, grey.

    The masks are black (0) on membranes and white (255) inside cells; class 0 is membrane and class 1, the foreground
    whose IoU U-Net's and UNet++'s papers mean, is cell. (The challenge itself scores the thinned membranes.) Neighbouring
    slices look alike: slices 0..23 train, 24..29 validate, which is easier than another volume.

    Source: Arganda-Carreras et al., Crowdsourcing the creation of image segmentation algorithms for connectomics, 2015;
    data of Cardona et al., 2010.

    Args:
        data_root: folder with ``images/00.png`` to ``29.png`` and ``labels/`` likewise, see
            `densepred.data.dataset.resolve_data_root`.
        split: ``train`` or ``val``.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(((0, "membrane", False, (150, 40, 60)), (255, "cell", False, (120, 190, 220))))
    COMMON = {"semantic_table": label_table({0: 0, 255: 1})}

    SPLITS = tuple(SLICES)

    def load_data_list(self) -> list[dict]:
        """Return records with ``semantic_path``, all files found."""
        names = [f"{number:02d}" for number in SLICES[self.split]]
        images, labels = (
            [os.path.join(self.data_root, part, f"{n}.png") for n in names] for part in ("images", "labels")
        )
        require_files(images + labels, "image and label", f"the {self.split} split of ISBI 2012")
        files = zip(names, images, labels, strict=True)
        return [{"img_path": image, "img_id": name, "semantic_path": label} for name, image, label in files]


@DATASETS.register_module()
class DSB2018Nuclei(SegDataset):
    """Nuclei of the 2018 Data Science Bowl as a semantic set: class 0 is background, class 1, the foreground, nucleus.

    Nuclei that touch are one region here. Images are of many sizes and stains.

    Source: Caicedo et al., Nucleus segmentation across imaging experiments, Nature Methods 2019.

    Args:
        data_root: folder with ``images/<split>/`` (WebP or PNG), ``instances/<split>/*.png`` (0 = background, 1..n =
            nuclei) and the lists ``<split>.txt``, see `densepred.data.dataset.resolve_data_root`.
        split: the name of a list, ``train`` or ``val``.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.
    """

    METAINFO = metainfo(((0, "background", False, (40, 40, 40)), (1, "nucleus", False, (90, 200, 90))))
    COMMON = {"semantic_table": (np.arange(1 << 16) > 0).astype(np.int16)}

    SPLITS = ("train", "val", "test")

    def load_data_list(self) -> list[dict]:
        """Return records with ``semantic_path``, all files found."""
        images, labels = (os.path.join(self.data_root, part, self.split) for part in ("images", "instances"))
        names = os.path.join(self.data_root, f"{self.split}.txt")
        files = paired_files(images, (".webp", ".png"), labels, ".png", names)
        return [{"img_path": image, "img_id": name, "semantic_path": label} for name, image, label in files]
