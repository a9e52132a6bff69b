"""Pictures of a run: a grid at every validation, one picture for each tested image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook

from densepred.data.loading import read_image
from densepred.registry import HOOKS
from densepred.structures import SegSample
from densepred.visualization import draw_sample, fit, picture_grid, resize_sample, write_png

GRID_SIDE = 480
"""Longer side in pixels of a picture in a grid; smaller pictures of tested images are enlarged to it, too."""


@HOOKS.register_module()
class PictureGridHook(Hook):
    """Draw input, truth and prediction side by side.

    Every validation writes ``pictures/iter_<n>.png`` into the work dir, the first images of the set in one grid, and hands
    it to the visualizer. With ``show_dir`` a test writes one picture for each image, named like it. Pictures are drawn
    as the images come, so that no more than the grid is held in memory.

    Args:
        num_images: rows of the grid.
        show_dir: where the pictures of a test go.
    """

    priority = "LOW"

    def __init__(self, num_images: int = 4, show_dir: str | None = None) -> None:
        self.num_images = num_images
        self.show_dir = show_dir
        self._rows: list[dict[str, np.ndarray]] = []
        self._names: dict[str, str] = {}

    def before_val_epoch(self, runner: Any) -> None:
        """Begin a new grid."""
        self._rows = []

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[SegSample] | None = None
    ) -> None:
        """Draw the first images of the set."""
        if not is_main_process():
            return
        meta = runner.val_dataloader.dataset.metainfo
        for sample in (outputs or [])[: self.num_images - len(self._rows)]:
            self._rows.append(draw_row(sample, meta, GRID_SIDE))

    def after_val_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        """Write the grid."""
        if not self._rows:
            return
        grid = picture_grid([list(row.values()) for row in self._rows], list(self._rows[0]))
        self._rows = []
        write_png(Path(runner.work_dir, "pictures", f"iter_{runner.iter}.png"), grid)
        runner.visualizer.add_image("pictures", grid, runner.iter)

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[SegSample] | None = None
    ) -> None:
        """Write each image's picture, on every process those of its own images."""
        if self.show_dir is None:
            return
        meta = runner.test_dataloader.dataset.metainfo
        for sample in outputs or []:
            row = draw_row(sample, meta)
            write_png(Path(self.show_dir, self._name(sample.img_path)), picture_grid([list(row.values())], list(row)))

    def _name(self, img_path: str) -> str:
        """Return a file name: the image's own, after its folder's where another image has that name already."""
        path = Path(img_path)
        if self._names.setdefault(path.stem, str(path)) == str(path):
            return f"{path.stem}.png"
        return f"{path.parent.name}_{path.stem}.png"


def draw_row(sample: SegSample, meta: dict, longest: int | None = None) -> dict[str, np.ndarray]:
    """Draw a sample's image, truth and prediction, each under its title; what the sample lacks is left out.

    Args:
        sample: with ``img_path``; its fields have the file's size.
        meta: ``classes`` and ``palette`` of the data set.
        longest: longer side of the pictures; by default that of the image, but at least `GRID_SIDE`, so that names can be
            read.
    """
    image = read_image(sample.img_path)
    longest = longest or max(GRID_SIDE, *image.shape[:2])
    image = fit(image, longest, longest)
    sample = resize_sample(sample, image.shape[:2])
    row = {"input": image}
    for side, title in (("gt", "truth"), ("pred", "prediction")):
        if (picture := draw_sample(image, sample, side, meta)) is not None:
            row[title] = picture
    return row
