"""People's own semantic data: a folder of images, a folder of masks, class names in the config."""

import os
from collections.abc import Callable, Sequence
from colorsys import hsv_to_rgb

import numpy as np

from densepred.data.dataset import SegDataset
from densepred.data.files import paired_files
from densepred.data.loading import ColorTable, label_table
from densepred.registry import DATASETS
from densepred.structures import IGNORE_INDEX

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
REMEDY = (
    "classes lists the names of all, label_values what the masks store for each (the default: 0, 1, 2, ...), ignore the "
    "values that no loss and no metric should look at"
)
Color = Sequence[int]


@DATASETS.register_module()
class ImageFolderSegmentation(SegDataset):
    """Images and masks of one's own, matched by name: ``x.jpg`` and ``x.png``, also in subfolders of the same names.

    A mask holds one value a pixel (grey or palette PNG, whose indices count), or, with ``palette``, a colour.

    Args:
        data_root: folder, see `densepred.data.dataset.resolve_data_root`; the paths below are relative to it.
        image_dir: folder of the images.
        label_dir: folder of the masks, each of its image's size.
        classes: names of the classes, in the order of the labels that the model learns.
        palette: RGB colour of each class where the masks are coloured; ``None``: they hold numbers.
        label_values: what the masks hold for each class (0..255); ``None``: 0, 1, 2, ... Not with ``palette``.
        ignore: what else the masks may hold, ignored by losses and metrics: numbers, or colours with ``palette``.
            Anything that stands neither here nor for a class is an error.
        image_suffix, label_suffix: what follows the name that an image and its mask share, e.g. ``_mask.png``.
        split_file: text file of the names to use, one a line without suffix, relative to ``image_dir``; ``None``: all.
        pipeline, seed, indices, skip_damaged, test_mode, lazy_init: see `SegDataset`.

    Raises:
        ValueError: classes, palette, label_values and ignore do not fit together.
        FileNotFoundError: there are no images, or one has no mask.
    """

    def __init__(
        self,
        data_root: str,
        image_dir: str,
        label_dir: str,
        classes: Sequence[str],
        palette: Sequence[Color] | None = None,
        label_values: Sequence[int] | None = None,
        ignore: Sequence[int | Color] = (),
        image_suffix: str | Sequence[str] = IMAGE_SUFFIXES,
        label_suffix: str | Sequence[str] = ".png",
        split_file: str | None = None,
        pipeline: Sequence[dict | Callable] = (),
        seed: int = 0,
        indices: int | Sequence[int] | None = None,
        skip_damaged: bool = False,
        test_mode: bool = False,
        lazy_init: bool = False,
    ) -> None:
        self.folders, self.suffixes = (image_dir, label_dir), (image_suffix, label_suffix)
        self.split_file = split_file
        check_classes(classes)
        _require_list("ignore", ignore)
        if palette is None:
            self.COMMON = {"semantic_table": value_table(classes, label_values, ignore), "semantic_remedy": REMEDY}
        elif label_values is not None:
            raise ValueError("give palette (masks hold colours) or label_values (masks hold numbers), not both")
        else:
            self.COMMON = {"semantic_table": color_table(classes, palette, ignore)}
        super().__init__(data_root, None, pipeline, seed, indices, False, skip_damaged, test_mode, lazy_init=True)
        self._metainfo = folder_metainfo(classes, palette)
        if not lazy_init:
            self.full_init()

    def load_data_list(self) -> list[dict]:
        """Return records with ``semantic_path``, all files found."""
        images, labels = (os.path.join(self.data_root, folder) for folder in self.folders)
        names = None if self.split_file is None else os.path.join(self.data_root, self.split_file)
        files = paired_files(images, self.suffixes[0], labels, self.suffixes[1], names)
        return [{"img_path": image, "img_id": name, "semantic_path": label} for name, image, label in files]


def folder_metainfo(classes: Sequence[str], palette: Sequence[Color] | None) -> dict[str, tuple]:
    """Return the ``metainfo`` of own classes: all stuff; without a palette they are shown in colours far apart."""
    shown = [distinct_color(i) for i in range(len(classes))] if palette is None else palette
    return {
        "classes": tuple(classes),
        "palette": tuple(tuple(color) for color in shown),
        "isthing": (False,) * len(classes),
        "category_ids": tuple(range(len(classes))),
    }


def distinct_color(number: int) -> tuple[int, int, int]:
    """Return an RGB colour unlike those of the numbers before: hues by the golden ratio, five levels of light."""
    parts = hsv_to_rgb(number * 0.618034 % 1, 0.75, (0.95, 0.6, 0.8, 0.4, 0.7)[number % 5])
    return tuple(round(255 * part) for part in parts)


def check_classes(classes: Sequence[str]) -> None:
    """Raise ``ValueError`` unless these are 1 to 255 different names."""
    _require_list("classes", classes)
    wrong = [name for name in classes if not isinstance(name, str) or not name]
    twice = [name for i, name in enumerate(classes) if name in classes[:i]]
    if wrong:
        raise ValueError(f"classes holds {wrong[0]!r}, which is no name")
    if twice:
        raise ValueError(f"classes holds {twice[0]!r} twice; every class needs its own name")
    if not 1 <= len(classes) <= IGNORE_INDEX:
        raise ValueError(f"classes holds {len(classes)} names; there may be 1 to {IGNORE_INDEX}")


def value_table(
    classes: Sequence[str], label_values: Sequence[int] | None, ignore: Sequence[int | Color]
) -> np.ndarray:
    """Return the `label_table` of masks that hold numbers.

    Raises:
        ValueError: not as many values as classes, a value that stands twice or is none of 0..255.
    """
    values = list(range(len(classes))) if label_values is None else list(label_values)
    _require_one_each("label_values", values, classes)
    wrong = [value for value in (*values, *ignore) if value not in range(256)]
    if wrong:
        raise ValueError(
            f"label_values or ignore holds {wrong[0]!r}, but masks hold numbers 0..255 (with a palette, colours)"
        )
    return label_table(_classes_of(values, ignore, classes))


def color_table(classes: Sequence[str], palette: Sequence[Color], ignore: Sequence[int | Color]) -> ColorTable:
    """Return the `ColorTable` of masks that hold colours.

    Raises:
        ValueError: not as many colours as classes, a colour that stands twice or is no RGB triple of 0..255.
    """
    _require_one_each("palette", palette, classes)
    for color in (*palette, *ignore):
        if isinstance(color, int) or len(color) != 3 or not all(part in range(256) for part in color):
            raise ValueError(
                f"palette or ignore holds {color!r}, but with a palette both hold RGB colours, [red, green, blue] of 0..255"
            )
    colors = [tuple(color) for color in palette]
    return ColorTable(_classes_of(colors, [tuple(color) for color in ignore], classes), tuple(classes))


def _require_list(key: str, value: object) -> None:
    if isinstance(value, (str, int)):
        raise ValueError(f"{key} is {value!r}, but it should be a list: [{value!r}]")


def _require_one_each(key: str, values: Sequence, classes: Sequence[str]) -> None:
    if len(values) != len(classes):
        raise ValueError(
            f"{key} has {len(values)} entries and classes {len(classes)}; there should be one for each class"
        )


def _classes_of(values: Sequence, ignore: Sequence, classes: Sequence[str]) -> dict:
    """Return stored value -> class; raise where a value stands for two things."""
    stored: dict = {}
    for label, value in enumerate(values):
        if value in stored:
            raise ValueError(f"{value} stands for two classes, {classes[stored[value]]!r} and {classes[label]!r}")
        stored[value] = label
    both = [value for value in ignore if value in stored]
    if both:
        raise ValueError(f"ignore holds {both[0]}, which is also the class {classes[stored[both[0]]]!r}; choose one")
    return stored | dict.fromkeys(ignore, IGNORE_INDEX)
