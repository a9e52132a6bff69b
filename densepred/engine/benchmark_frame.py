"""Where the time of a frame goes: pipeline, encoder, decoder, head, post-processing, masks, drawing."""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from densepred.evaluation.table import text_table
from densepred.heads.polygon_masks import compose_masks
from densepred.inference import load_model
from densepred.visualization import draw_sample

COLUMNS = ("stage", "median ms", "best ms", "share")


def benchmark_frame(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike | None = None,
    frame: Sequence[int] = (1024, 2048),
    repeats: int = 10,
    device: str = "cpu",
) -> str:
    """Time the stages of single frames one after the other and return a table.

    A model of polygons has a stage more: ``predict`` delivers polygons, ``rasterise`` the masks that its data set's rule
    makes of them. Without a checkpoint a head at its start would find no object or hundreds; the times of its stages
    then mean little.

    Args:
        config, checkpoint, device: see `densepred.inference.load_model`.
        frame: (H, W) of generated frames, at the size of the file.
        repeats: frames, after one that does not count.

    Raises:
        ValueError: a frame without pixels, or fewer than one repeat.
    """
    if min(*frame, repeats) < 1:
        raise ValueError(f"a frame of {frame[0]}x{frame[1]} pixels, {repeats} times: nothing to time")
    model = load_model(config, checkpoint, device)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*frame, 3), np.uint8)
    passes = [_frame_times(model, pixels) for _ in range(repeats + 1)][1:]
    return _table(
        passes, f"{os.fspath(config)}, frames of {frame[0]}x{frame[1]}, {device}, {torch.get_num_threads()} threads"
    )


@torch.inference_mode()
def _frame_times(model: Any, pixels: np.ndarray) -> dict[str, float]:
    """Return the seconds of each stage for one frame."""
    times: dict[str, float] = {}
    size = pixels.shape[:2]
    with _timed(times, "pipeline"):
        packed = model.test_pipeline(
            dict(img=pixels, img_path=None, img_id=0, ori_shape=size, img_shape=size, rng=np.random.default_rng(0))
        )
        data = dict(inputs=[packed["inputs"]], data_samples=[packed["data_samples"]])
        data = model.data_preprocessor(data, False)
    sample = data["data_samples"][0]
    with _timed(times, "encoder"):
        maps = model.encoder(data["inputs"], getattr(model.decoder, "num_maps", None))
    with _timed(times, "decoder"):
        features = model.decoder(maps)
    with _timed(times, "head"):
        outputs = model.head(features, deep_supervision=False)
    for name, value in _predict(model.head, outputs, sample.metainfo, times).items():
        sample.set_field(value, name)
    with _timed(times, "draw"):
        draw_sample(pixels, sample.cpu(), "pred", model.dataset_meta)
    return times


def _predict(head: Any, outputs: dict, meta: dict, times: dict[str, float]) -> dict:
    """Return the prediction's fields, of polygon models without masks, and note the time of making both."""
    rule = getattr(head, "compose", None)
    if rule is not None:
        head.compose = None
    with _timed(times, "predict"):
        fields = head.predict(outputs, [meta])[0]
    if rule is not None:
        head.compose, found = rule, fields["pred_instances"]
        with _timed(times, "rasterise"):
            parts = (found.polygons, found.scores, found.depths, found.labels)
            compose_masks(*parts, tuple(meta["ori_shape"]), rule, head.score_threshold)
    return fields


@contextmanager
def _timed(times: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times[stage] = time.perf_counter() - start


def _table(passes: list[dict[str, float]], title: str) -> str:
    medians = {stage: statistics.median(times[stage] for times in passes) for stage in passes[0]}
    total = sum(medians.values())
    rows = [
        [
            stage,
            f"{1e3 * middle:.2f}",
            f"{1e3 * min(times[stage] for times in passes):.2f}",
            f"{100 * middle / total:.1f} %",
        ]
        for stage, middle in medians.items()
    ]
    return text_table(COLUMNS, [*rows, ["sum", f"{1e3 * total:.2f}", "", ""]], title)
