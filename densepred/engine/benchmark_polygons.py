"""CenterPoly's vectorised parts against the published way of doing the same, in turn, in one process.

The published way is written here from its description: tensors where the repository uses them, loops over classes, vertices
and objects where it loops. Times are CPU seconds of one thread, which other work on the machine moves little.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Generator, Tensor

from densepred.engine.benchmark_region import region_rows
from densepred.evaluation.table import text_table
from densepred.heads.polygon import PolygonHead

TOLERANCE = 1e-2
"""Largest difference: in pixels, as the published decoding rounds centres and affines to float32, or of an IoU."""
LONGEST = 60
"""Seconds of wall time after which a part makes do with the runs it has."""
COLUMNS = ("part", "ours ms", "best", "published ms", "best", "ratio", "difference")
Row = tuple[str, Callable[[], Any], Callable[[], Any], Callable[[Any, Any], float]]
"""Name, ours, the published way, and how far two results are apart."""


def benchmark_polygons(repeats: int = 20, objects: int = 128) -> str:
    """Return the table to print: medians and bests of alternating runs, and the median ratio.

    Args:
        repeats: runs of each way, at most; a part ends after a minute.
        objects: of the region losses' batch.

    Raises:
        ValueError: the two ways disagree, so that times would mean nothing.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [_measured(row, repeats) for row in (*decode_rows(), *region_rows(objects))]
    finally:
        torch.set_num_threads(threads)
    title = f"CPU ms of one thread, torch {torch.__version__}, up to {repeats} alternating runs"
    return text_table(COLUMNS, rows, title)


def _measured(row: Row, repeats: int) -> list[str]:
    name, *ways, difference = row
    apart = difference(*(way() for way in ways))
    if not apart <= TOLERANCE:
        raise ValueError(f"{name}: ours and the published way are {apart:g} apart: nothing to compare")
    seconds, end = [], time.monotonic() + LONGEST
    while not seconds or (len(seconds) < repeats and time.monotonic() < end):
        seconds.append([_seconds(way) for way in ways])
    cells = [f"{1e3 * f(side):.2f}" for side in zip(*seconds, strict=True) for f in (statistics.median, min)]
    ratio = statistics.median(theirs / ours for ours, theirs in seconds)
    return [name, *cells, f"{ratio:.1f}x", f"{apart:.1g}"]


def _seconds(way: Callable[[], Any]) -> float:
    start = time.thread_time()
    way()
    return time.thread_time() - start


# Decoding -------------------------------------------------------------------------------------------------------------


def decode_rows() -> Iterator[Row]:
    """Yield the case of the issue: one frame's raw maps to its 128 best detections in the file's pixels."""
    outputs, meta = decode_inputs(torch.Generator().manual_seed(0))
    head = PolygonHead(1, [], [], outputs["heatmap_logits"].shape[1], head_channels=1, score_threshold=0.0)

    @torch.inference_mode()
    def ours() -> InstanceData:
        return head.predict(outputs, [meta])[0]["pred_instances"]

    @torch.inference_mode()
    def published() -> list[np.ndarray]:
        return decode_by_loops(outputs, meta)

    yield "decode 8x128x256, best 128, 16 vertices, to 2048x1024", ours, published, largest_difference


def decode_inputs(random: Generator, classes: int = 8, vertices: int = 16) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a head's raw maps and the metadata of a frame of 2048x1024 seen at 1024x512: some 200 objects above noise."""
    size = (128, 256)
    logits = torch.randn(1, classes, *size, generator=random) - 6
    logits.view(-1)[torch.randint(0, logits.numel(), (200,), generator=random)] += 8
    widths = dict(polygon=2 * vertices, offset=2, pseudo_depth=1)
    maps = {name: torch.rand(1, width, *size, generator=random) for name, width in widths.items()}
    affine = np.array([[0.5, 0, 0], [0, 0.5, 0]])
    meta = dict(pad_shape=(512, 1024), img_shape=(512, 1024), ori_shape=(1024, 2048), affine=affine)
    return dict(heatmap_logits=logits) | maps, meta


def decode_by_loops(outputs: dict[str, Tensor], meta: dict[str, Any], k: int = 128) -> list[np.ndarray]:
    """CenterNet's way, as CenterPoly has it: whole maps permuted, then loops over coordinates, objects and classes.

    Returns:
        By class (n, 4 + 1 + 2V + 1): box, score, vertices, depth in the file's pixels, best first.
    """
    heatmap = outputs["heatmap_logits"].sigmoid()
    classes, height, width = heatmap.shape[1:]
    heatmap = heatmap * (F.max_pool2d(heatmap, 3, 1, 1) == heatmap).float()
    of_class, places = heatmap.flatten(2).topk(k)  # (1, C, K)
    scores, best = of_class.flatten(1).topk(k)  # (1, K)
    cells = places.flatten(1).gather(1, best)
    offset, polygon, depth = (_permuted(outputs[name], cells) for name in ("offset", "polygon", "pseudo_depth"))
    x, y = cells % width + offset[..., 0], cells // width + offset[..., 1]
    for column in range(0, polygon.shape[2], 2):
        polygon[..., column] += x
        polygon[..., column + 1] += y
    box = [extreme(polygon[..., axis::2], 2).values for extreme in (torch.min, torch.max) for axis in (0, 1)]
    labels = (best // k)[..., None].float()
    rows = torch.cat([torch.stack(box, 2), scores[..., None], polygon, depth, labels], 2)[0]
    return _to_file_by_loops(
        rows.numpy(), classes, cv2.invertAffineTransform(meta["affine"] * height / meta["pad_shape"][0])
    )


def _permuted(maps: Tensor, cells: Tensor) -> Tensor:
    rows = maps.permute(0, 2, 3, 1).contiguous().flatten(1, 2)  # (1, h w, D)
    return rows.gather(1, cells[..., None].expand(-1, -1, rows.shape[2]))


def _to_file_by_loops(rows: np.ndarray, classes: int, affine: np.ndarray) -> list[np.ndarray]:
    for column in (0, 2, *range(5, rows.shape[1] - 2, 2)):
        for row in rows:
            row[column : column + 2] = affine @ np.array([row[column], row[column + 1], 1.0], np.float32)
    of_class = [rows[rows[:, -1] == label, :-1].tolist() for label in range(classes)]
    return [np.array(found, np.float32).reshape(-1, rows.shape[1] - 1) for found in of_class]


def largest_difference(found: InstanceData, published: list[np.ndarray]) -> float:
    """Return how far vertices are apart at most, in pixels; infinite if a class has another number of objects."""
    ours = [found.polygons[found.labels == label].flatten(1).numpy() for label in range(len(published))]
    theirs = [rows[:, 5:-1] for rows in published]
    if [len(a) for a in ours] != [len(b) for b in theirs]:
        return float("inf")
    return max(float(np.abs(a - b).max(initial=0)) for a, b in zip(ours, theirs, strict=True))
