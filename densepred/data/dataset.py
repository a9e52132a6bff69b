"""The base of all data sets: where the data lies, which images, and what makes every sample repeatable."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

from densepred.data.errors import DamagedImageError
from densepred.registry import TRANSFORMS

ROOT_VARIABLE = "DENSEPRED_DATASETS"


class SegDataset(BaseDataset):
    """Images with segmentations, read by a pipeline; subclasses say in ``load_data_list`` what lies where.

    An index beyond the length is a later visit of the same image: ``dataset[visit * len(dataset) + i]``. The pipeline
    gets ``results["rng"]``, a generator seeded by (seed, visit, i), and ``results["dataset"]``, this data set, from
    which copy-paste draws its partner with ``get_data_info``. Annotations are kept serialised in one array, which
    worker processes share.

    Args:
        data_root: folder of the data, see `resolve_data_root`.
        split: which part of it, one of ``SPLITS``, where the data set has any.
        pipeline: transforms, built or as configs.
        seed: of all randomness in the pipeline.
        indices: use only the first (n > 0) or last (n < 0) images, or those at the given positions.
        filter_empty: in training, leave out images without any object that is no crowd.
        skip_damaged: in training, take the next image when one cannot be read, and report the file once; else stop.
        test_mode: evaluation: nothing is filtered or skipped.
        lazy_init: load the annotations at the first use.

    Raises:
        ValueError: a split that the data set does not have.
    """

    METAINFO = {"classes": (), "palette": (), "isthing": (), "category_ids": ()}
    PREPARE = ""
    """The command that prepares or verifies the data, for messages."""
    OBJECTS = "segments_info"
    """Under which key a record lists its annotated objects (dicts with ``iscrowd``)."""
    SPLITS: tuple[str, ...] = ()
    """The names that ``split`` takes; empty: other arguments say which images."""
    COMMON: dict = {}
    """What the results of every image have beside its own record."""

    def __init__(
        self,
        data_root: str,
        split: str | None = None,
        pipeline: Sequence[dict | Callable] = (),
        seed: int = 0,
        indices: int | Sequence[int] | None = None,
        filter_empty: bool = False,
        skip_damaged: bool = False,
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        if self.SPLITS and split not in self.SPLITS:
            raise ValueError(f"{type(self).__name__}: split={split!r}; choose one of {', '.join(self.SPLITS)}")
        self.split = split
        built = [TRANSFORMS.build(step) if isinstance(step, dict) else step for step in pipeline]
        super().__init__(data_root=data_root, pipeline=built, test_mode=test_mode, lazy_init=True)
        self.seed = seed
        self.indices = indices
        self.filter_empty = filter_empty
        self.skip_damaged = skip_damaged
        self.damaged: Counter[str] = Counter()
        if not lazy_init:
            self.full_init()

    def full_init(self) -> None:
        """Find the root, load and check the annotations.

        Raises:
            FileNotFoundError: the root or a file is missing.
            ValueError: the annotation is unusable or leaves no image.
        """
        if self._fully_initialized:
            return
        self.data_root = resolve_data_root(self.data_root, self.PREPARE)
        super().full_init()

    def filter_data(self) -> list[dict]:
        """Return the records that ``filter_empty`` and ``indices`` leave; at least one."""
        records = self.data_list
        if not records:
            raise ValueError(f"{self.source} has no annotated image; choose another annotation file or split")
        if self.filter_empty and not self.test_mode:
            if self.OBJECTS not in records[0]:
                raise ValueError(
                    f"filter_empty=True: {type(self).__name__} knows the objects of an image only once its files are read; "
                    "leave it out"
                )
            records = [record for record in records if not all(o["iscrowd"] for o in record[self.OBJECTS])]
        records = _subset(records, self.indices)
        if not records:
            raise ValueError(
                f"no image of {self.source} is left after filter_empty={self.filter_empty} and indices={self.indices}; "
                "change these keys of the data set"
            )
        return records

    def get_data_info(self, index: int) -> dict:
        """Return the record of an image, with what all have in common."""
        return {**self.COMMON, **super().get_data_info(index)}

    @property
    def source(self) -> str:
        """The annotation file or folder, for messages."""
        return self.ann_file or self.data_root

    def __getitem__(self, index: int) -> dict:
        """Return one sample; ``index // len(self)`` is the visit, ``index % len(self)`` the image.

        Raises:
            DamagedImageError: the image or its label cannot be used, and ``skip_damaged`` is off.
        """
        if index < 0:
            raise IndexError(f"index {index} is negative: indices count visits upwards from 0")
        visit, i = divmod(index, len(self))
        if self.test_mode or not self.skip_damaged:
            return self._sample(visit, i)
        for j in range(i, i + len(self)):
            try:
                return self._sample(visit, j % len(self))
            except DamagedImageError as error:
                self._report(error)
        raise DamagedImageError(f"none of the {len(self)} images of {self.source} can be read")

    def __iter__(self) -> Iterator[dict]:
        """Iterate once over all images (by index alone there would be no end)."""
        return (self[i] for i in range(len(self)))

    def _sample(self, visit: int, i: int) -> dict:
        results = self.get_data_info(i)
        results["rng"] = np.random.default_rng((self.seed, visit, i))
        results["dataset"] = self
        return self.pipeline(results)

    def _report(self, error: DamagedImageError) -> None:
        self.damaged[str(error)] += 1
        if self.damaged[str(error)] == 1:
            count = f"damaged files so far in this process: {len(self.damaged)}"
            print_log(f"skipped: {error} ({count})", logger="current", level=logging.WARNING)


def resolve_data_root(root: str, prepare: str = "") -> str:
    """Return the folder meant by a config's ``data_root``.

    That is ``root`` itself, or, if ``root`` is relative and absent, its last component inside the folder that the
    environment variable ``DENSEPRED_DATASETS`` names.

    Args:
        root: path, absolute or relative to the working directory.
        prepare: the command that prepares this data, for the message.

    Raises:
        FileNotFoundError: neither exists; the message says how to get the data.
    """
    tried = [os.path.abspath(root)]
    shared = os.environ.get(ROOT_VARIABLE)
    if shared and not os.path.isabs(root):
        tried.append(os.path.join(os.path.abspath(shared), os.path.basename(os.path.normpath(root))))
    for folder in tried:
        if os.path.isdir(folder):
            return folder
    raise FileNotFoundError(
        f"data root {root!r} not found (tried {', '.join(tried)}). datasets/README.md says how to get the data"
        f"{f', `{prepare}` prepares it' if prepare else ''}. Set data_root in the config, or {ROOT_VARIABLE} to the "
        "folder that holds all sets. `make demo` needs no data: it writes its own."
    )


def _subset(records: list[dict], indices: int | Sequence[int] | None) -> list[dict]:
    if indices is None:
        return records
    if isinstance(indices, int):
        return records[:indices] if indices >= 0 else records[indices:]
    outside = [i for i in indices if not 0 <= i < len(records)]
    if outside:
        raise ValueError(f"indices holds {outside[0]}, but there are {len(records)} images (0..{len(records) - 1})")
    return [records[i] for i in indices]
