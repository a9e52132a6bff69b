"""Our panoptic quality against the official algorithm on one core: time an image and the difference of the numbers.

The official tool, panopticapi, is not on PyPI; where it is not installed, the copy of its single-core function that
cityscapesScripts ships is the base. Both run alternately on the same images in one process. Times are the process's CPU
seconds: what else the machine does moves them little.
"""

import contextlib
import importlib
import io
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cv2
import numpy as np

from densepred.evaluation.coco_format import read_id_map, write_id_map
from densepred.evaluation.panoptic import evaluate_files, panoptic_counts, panoptic_quality

_BASELINES = (
    ("panopticapi", "panopticapi.evaluation"),
    ("cityscapesScripts' copy of panopticapi", "cityscapesscripts.evaluation.evalPanopticSemanticLabeling"),
)
_SPREAD = 2654435  # odd: turns small numbers into distinct ones that fill all three bytes, as COCO's do


def measure_eval(
    gt_json: str | Path | None = None,
    gt_dir: str | Path | None = None,
    pred_json: str | Path | None = None,
    pred_dir: str | Path | None = None,
    repeats: int = 5,
    num_images: int = 30,
) -> dict[str, Any]:
    """Measure both evaluators, from files and from maps in memory.

    Args:
        gt_json: Ground truth in COCO's panoptic format; without it (all four) synthetic maps of 480 x 640 are made.
        gt_dir: Folder of its PNGs.
        pred_json: Predictions.
        pred_dir: Folder of their PNGs.
        repeats: Alternating runs; the medians are reported.
        num_images: How many synthetic images to make.

    Returns:
        ``baseline`` (its name), ``images``, ``files`` and ``memory`` (each ``ours`` and ``official``,
        seconds an image, and ``ratio``, the median of the runs' ratios), ``difference`` (the largest of PQ, SQ, RQ).

    Raises:
        ModuleNotFoundError: Neither panopticapi nor cityscapesScripts is installed.
        ValueError: Some of the four paths are given and others are not.
    """
    given = [path is not None for path in (gt_json, gt_dir, pred_json, pred_dir)]
    if any(given) and not all(given):
        raise ValueError("benchmark eval: give all of gt_json, gt_dir, pred_json, pred_dir, or none for synthetic maps")
    name, module = _baseline()
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(p) for p in (gt_json, gt_dir, pred_json, pred_dir)] if all(given) else None
            return {"baseline": name, **_measure(module, *(paths or write_synthetic(folder, num_images)), repeats)}
    finally:
        cv2.setNumThreads(threads)


def benchmark_eval(
    gt_json: str | Path | None = None,
    gt_dir: str | Path | None = None,
    pred_json: str | Path | None = None,
    pred_dir: str | Path | None = None,
    repeats: int = 5,
) -> str:
    """Return the lines to print of `measure_eval`."""
    result = measure_eval(gt_json, gt_dir, pred_json, pred_dir, repeats)
    lines = [f"{result['images']} images, {repeats} alternating runs, one core; base: {result['baseline']}"]
    for where, text in (("files", "from files"), ("memory", "from maps in memory")):
        t = result[where]
        ours, official = 1e3 * t["ours"], 1e3 * t["official"]
        lines.append(f"{text:20s} ours {ours:7.2f} ms/image   official {official:7.2f} ms/image   {t['ratio']:5.1f} x")
    return "\n".join([*lines, f"largest difference of PQ, SQ, RQ: {result['difference']:.1e}"])


def write_synthetic(
    folder: str | Path, num_images: int, size: tuple[int, int] = (480, 640), seed: int = 0
) -> list[Path]:
    """Write random truth and predictions of about 20 segments in COCO's panoptic format.

    Returns:
        Paths: truth's JSON and folder, prediction's JSON and folder.
    """
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    gt_dir, pred_dir = folder / "gt", folder / "pred"
    categories = [{"id": 1 + c, "name": f"class{c}", "isthing": int(c < 8)} for c in range(12)]
    truth: dict[str, list] = {"categories": categories, "annotations": []}
    prediction: dict[str, list] = {"annotations": []}
    for directory in (gt_dir, pred_dir):
        directory.mkdir(parents=True)
    for image in range(num_images):
        ids, classes = _scene(rng, size)
        step = max(1, size[0] // 80)
        moved = np.roll(ids, rng.integers(-step, step + 1, 2), axis=(0, 1))
        for content, directory, labels in ((truth, gt_dir, ids), (prediction, pred_dir, moved)):
            numbers, areas = np.unique(labels[labels > 0], return_counts=True)
            write_id_map(directory / f"{image}.png", np.where(labels > 0, labels * _SPREAD % 2**24, 0))
            segments = [
                {"id": int(n) * _SPREAD % 2**24, "category_id": classes[n], "iscrowd": 0, "area": int(area)}
                for n, area in zip(numbers, areas, strict=True)
            ]
            content["annotations"].append({"image_id": image, "file_name": f"{image}.png", "segments_info": segments})
    paths = [folder / "gt.json", folder / "pred.json"]
    for path, content in zip(paths, (truth, prediction), strict=True):
        path.write_text(json.dumps(content))
    return [paths[0], gt_dir, paths[1], pred_dir]


def _scene(rng: np.random.Generator, size: tuple[int, int]) -> tuple[np.ndarray, dict[int, int]]:
    """Return a map (H, W) of 4 wavy stuff regions, 16 ellipses and some void, and the classes by number."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(np.float32)
    wave = y + 12 * np.sin(x / rng.uniform(8, 30)) + rng.normal(0, 1.5, size)
    ids = 1 + np.clip(wave * 4 / height, 0, 3).astype(np.int64)
    classes = {number: 9 + (number - 1) for number in range(1, 5)}
    for number in range(5, 21):
        cy, cx, ry, rx = rng.uniform((0, 0, height / 32, height / 32), (height, width, height / 6, height / 6))
        ids[((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1] = number
        classes[number] = int(rng.integers(1, 9))
    ids[: height // 20] = 0
    return ids, classes


def _baseline() -> tuple[str, ModuleType]:
    for name, module in _BASELINES:
        with contextlib.suppress(ModuleNotFoundError):
            return name, importlib.import_module(module)
    raise ModuleNotFoundError("benchmark eval needs a base: pip install cityscapesscripts, or panopticapi from GitHub")


def _measure(
    module: ModuleType, gt_json: Path, gt_dir: Path, pred_json: Path, pred_dir: Path, repeats: int
) -> dict[str, Any]:
    truth, predictions = json.loads(gt_json.read_text()), json.loads(pred_json.read_text())
    categories = {category["id"]: category for category in truth["categories"]}
    by_image = {record["image_id"]: record for record in predictions["annotations"]}
    pairs = [(record, by_image[record["image_id"]]) for record in truth["annotations"]]

    def official() -> dict:
        with contextlib.redirect_stdout(io.StringIO()):
            counts = module.pq_compute_single_core(0, pairs, str(gt_dir), str(pred_dir), categories)
        return _official_record(counts, categories)

    def ours() -> dict:
        return evaluate_files(gt_json, gt_dir, pred_json, pred_dir)

    files, difference = _compare(ours, official, repeats, len(pairs))
    maps = {
        str(folder / record["file_name"]): read_id_map(folder / record["file_name"])
        for folder, side in ((gt_dir, 0), (pred_dir, 1))
        for record in (pair[side] for pair in pairs)
    }
    with _maps_in_memory(module, maps):
        memory, other = _compare(_from_memory(pairs, categories, gt_dir, pred_dir, maps), official, repeats, len(pairs))
    both = {"files": files, "memory": memory, "difference": max(difference, other)}
    return {"images": len(pairs), **both}


def _from_memory(
    pairs: list, categories: dict[int, dict], gt_dir: Path, pred_dir: Path, maps: dict[str, np.ndarray]
) -> Callable[[], dict]:
    """Return our evaluation of maps and records in memory, as `PanopticQuality` does it."""
    label = {number: index for index, number in enumerate(categories)}
    isthing = [bool(category["isthing"]) for category in categories.values()]
    images = [
        [
            part
            for folder, record in ((gt_dir, truth), (pred_dir, prediction))
            for part in (
                maps[str(folder / record["file_name"])],
                [{**s, "label": label[s["category_id"]]} for s in record["segments_info"]],
            )
        ]
        for truth, prediction in pairs
    ]

    def evaluate() -> dict:
        counts = sum((panoptic_counts(*image, len(label)) for image in images), np.zeros((len(label), 4)))
        return panoptic_quality(counts, isthing)

    return evaluate


@contextlib.contextmanager
def _maps_in_memory(module: ModuleType, maps: dict[str, np.ndarray]) -> Iterator[None]:
    """Let the official function take decoded segment numbers (H, W) instead of opening files and joining channels."""
    saved = module.Image, module.rgb2id
    module.Image, module.rgb2id = SimpleNamespace(open=lambda path: maps[str(path)]), lambda ids: ids
    try:
        yield
    finally:
        module.Image, module.rgb2id = saved


def _official_record(counts: Any, categories: dict[int, dict]) -> dict[str, dict]:
    record = {}
    for group, isthing in (("All", None), ("Things", True), ("Stuff", False)):
        with contextlib.suppress(ZeroDivisionError):  # the official average of no class
            record[group] = counts.pq_average(categories, isthing=isthing)[0]
    return record


def _compare(
    ours: Callable[[], dict], official: Callable[[], dict], repeats: int, images: int
) -> tuple[dict[str, float], float]:
    """Run both in turn; return the medians an image and the largest difference of their numbers."""
    times: list[tuple[float, float]] = []
    difference = 0.0
    for _ in range(repeats):
        (mine, t_ours), (theirs, t_official) = _timed(ours), _timed(official)
        times.append((t_ours / images, t_official / images))
        for group, values in theirs.items():
            difference = max([difference, *(abs(values[key] - mine[group][key]) for key in ("pq", "sq", "rq"))])
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    ratio = statistics.median(b / a if a else math.inf for a, b in times)
    return {"ours": medians[0], "official": medians[1], "ratio": ratio}, difference


def _timed(function: Callable[[], dict]) -> tuple[dict, float]:
    start = time.process_time()
    result = function()
    return result, time.process_time() - start
