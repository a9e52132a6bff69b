"""What the prepare scripts share: progress on a terminal and off it, panoptic files written whole or not at all."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from scipy import ndimage

from densepred.data.class_tables import Category
from densepred.data.errors import DamagedImageError
from densepred.evaluation.coco_format import write_id_map

LINES = 10
"""Progress lines that a run off a terminal prints at most."""


def progress(items: Iterable, description: str, total: int) -> Iterator:
    """Yield the items behind a progress bar with ETA; plain lines where stdout is no terminal."""
    if sys.stdout.isatty():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            yield from bar.track(items, total=total, description=description)
        return
    start, printed = time.monotonic(), 0
    for done, item in enumerate(items, 1):
        yield item
        if done * LINES // max(total, 1) > printed:
            printed = done * LINES // total
            left = (time.monotonic() - start) * (total - done) / done
            print(f"{description}: {done}/{total}, {left:.0f} s left", flush=True)


def convert(function: Callable, jobs: list, description: str, workers: int) -> list:
    """Return ``[function(job) for job in jobs]``, computed by ``workers`` processes, with progress."""
    if workers <= 1:
        return list(progress(map(function, jobs), description, len(jobs)))
    # Spawned, not forked: OpenCV and torch hold threads that a fork would lose.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(progress(pool.map(function, jobs, chunksize=8), description, len(jobs)))


def read_labels(path: str) -> np.ndarray:
    """Return a PNG with labels as it is stored, (H, W) or (H, W, 3) in the order RGB, 8 or 16 bits.

    Raises:
        DamagedImageError: the file is absent or cannot be decoded.
    """
    image = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    if image is None:
        raise DamagedImageError(f"label file {path} is missing or damaged: fetch or unpack it again")
    return image if image.ndim == 2 else image[..., 2::-1]


def write_panoptic_png(path: str, ids: np.ndarray) -> None:
    """Write segment numbers (H, W) as `write_id_map` does, and the folder where needed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_id_map(path, ids)


def write_image(path: str, image: np.ndarray) -> None:
    """Write an image (BGR or one channel), and its folder where needed; OSError when the disk refuses."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not cv2.imwrite(path, image):
        raise OSError(f"{path} could not be written: is the disk full?")


def write_json(path: str, content: object) -> None:
    """Write a JSON file in one step: a file that exists is complete."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    partial = f"{path}.partial"
    Path(partial).write_text(json.dumps(content, separators=(",", ":")))
    os.replace(partial, path)


def segment_geometry(ids: np.ndarray) -> dict[int, tuple[int, list[int]]]:
    """Return ``{number: (area, [x, y, width, height])}`` of all numbers > 0 in ids (H, W), ascending."""
    counts = np.bincount(ids.ravel())
    numbers = np.flatnonzero(counts[1:]) + 1
    compact = np.zeros(len(counts), np.int32)
    compact[numbers] = np.arange(1, len(numbers) + 1)
    geometry = {}
    for number, (rows, columns) in zip(numbers.tolist(), ndimage.find_objects(compact[ids]), strict=True):
        box = [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
        geometry[number] = (int(counts[number]), box)
    return geometry


def segments_info(ids: np.ndarray, categories: dict[int, tuple[int, bool]]) -> list[dict]:
    """Return the records of a panoptic map in the COCO panoptic format.

    Args:
        ids: (H, W) segment numbers, 0 = void.
        categories: number -> (category id, is a crowd); every number > 0 of the map must be in it.
    """
    return [
        {"id": number, "category_id": categories[number][0], "iscrowd": int(categories[number][1]), "area": area}
        | {"bbox": box}
        for number, (area, box) in segment_geometry(ids).items()
    ]


def categories_json(table: tuple[Category, ...]) -> list[dict]:
    """Return a class table as the ``categories`` of a panoptic JSON."""
    return [{"id": i, "name": name, "isthing": int(thing), "color": list(rgb)} for i, name, thing, rgb in table]


def run_script(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], None]) -> None:
    """Run a prepare script: wrong data ends it with one line and exit status 1 instead of a traceback."""
    arguments = parser.parse_args()
    try:
        main(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
