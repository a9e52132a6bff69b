"""The three stages together against the slowest of them alone, in one run."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from densepred.evaluation.table import text_table
from densepred.video.demo import Demo, load_predictor
from densepred.video.sink import FileSink
from densepred.video.source import VideoSource
from densepred.video.stages import STAGES, Packet, Pipeline
from densepred.video.state import FrameHub, OverlayState

SIZE = (540, 960)
"""(H, W) of generated frames."""


def benchmark_video(
    config: str | os.PathLike | None,
    checkpoint: str | os.PathLike | None,
    source: str | None,
    synthetic: list[float] | None,
    frames: int = 60,
    repeats: int = 3,
    device: str = "cpu",
) -> str:
    """Time the video demo's stages alone and together, and return a table.

    Args:
        config, checkpoint, device: see `densepred.inference.load_model`.
        source: a file.
        synthetic: instead of a model and a video: milliseconds that each stage waits.
        frames: of each pass, at most; 2 at least.
        repeats: passes, alone and together in turn; the medians count.

    Raises:
        ValueError: neither a model with a video nor synthetic stages, or not as many times as stages; a number out of
            its range; the source is live, or shorter than two frames.
    """
    if frames < 2 or repeats < 1:
        raise ValueError(f"--frames {frames} --repeats {repeats}: at least 2 frames and 1 repeat")
    if synthetic is not None:
        if len(synthetic) != len(STAGES) or min(synthetic) < 0:
            raise ValueError(f"--synthetic takes milliseconds for {', '.join(STAGES)}, not {synthetic}")
        stages = waiting_stages(*(ms / 1000 for ms in synthetic))
        return report([measure(partial(stages[0], frames), stages[1], stages[2]) for _ in range(repeats)])
    if config is None or source is None:
        raise ValueError("name a config, a checkpoint and --source FILE, or --synthetic DECODE MODEL DRAW")
    return _benchmark_model(config, checkpoint, source, frames, repeats, device)


def _benchmark_model(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike | None,
    source: str,
    frames: int,
    repeats: int,
    device: str,
) -> str:
    with ExitStack() as stack:
        video = stack.enter_context(closing(VideoSource(source)))
        if video.live:
            raise ValueError(f"{source}: a live source has its own pace; name a file")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        predict, meta = load_predictor(config, checkpoint, device)
        results = []
        for k in range(repeats):
            sink = stack.enter_context(closing(FileSink(folder / f"{k}.webm", video.fps, live=False)))
            demo = Demo(predict, meta, 0.5, OverlayState(), FrameHub(), sink)
            results.append(measure(partial(_frames_of, source, frames), demo.model, demo.draw))
        return report(results)


def measure(
    source: Callable[[], Iterable[Any]], model: Callable[[Any], Any], draw: Callable[[Packet, dict], None]
) -> dict[str, float]:
    """Return milliseconds a frame of each stage alone, in one thread, and of all ``together`` in three; and ``frames``."""
    start = time.perf_counter()
    frames = list(source())
    if len(frames) < 2:
        raise ValueError(f"a benchmark needs two frames at least, the source has {len(frames)}")
    alone = {"decode": time.perf_counter() - start}
    model(frames[0])  # the first call allocates
    start = time.perf_counter()
    packets = [Packet(k, 0.0, frame, model(frame)) for k, frame in enumerate(frames)]
    alone["model"] = time.perf_counter() - start
    pipeline = Pipeline(source(), model, draw, live=False)
    record = pipeline.record()
    start = time.perf_counter()
    for packet in packets:
        draw(packet, record)
    alone["draw"] = time.perf_counter() - start
    together = pipeline.run()
    times = {name: 1000 * seconds / len(frames) for name, seconds in alone.items()}
    return times | {"together": 1000 / together["fps"], "frames": len(frames)}


def report(results: list[dict[str, float]]) -> str:
    """Return a table of the medians, and the throughput of all stages over the slowest one's alone."""
    medians = {name: statistics.median(result[name] for result in results) for name in (*STAGES, "together")}
    slowest = max(STAGES, key=lambda name: medians[name])
    rows = [[name, f"{ms:.2f}", f"{1000 / ms:.1f}" if ms > 0 else "-"] for name, ms in medians.items()]
    ratio = statistics.median(max(result[name] for name in STAGES) / result["together"] for result in results)
    table = text_table(["stage", "ms a frame", "fps"], rows)
    frames, repeats = results[0]["frames"], len(results)
    return f"{table}\n{frames} frames, {repeats} repeats; together {ratio:.3f}x of the slowest alone ({slowest})"


def waiting_stages(decode: float, model: float, draw: float) -> tuple[Callable, Callable, Callable]:
    """Return stages that take so many seconds a frame and need no processor: (frames -> source), model, draw."""

    def source(frames: int) -> Iterable[np.ndarray]:
        for _ in range(frames):
            time.sleep(decode)
            yield np.zeros((*SIZE, 3), np.uint8)

    return source, lambda frame: time.sleep(model), lambda packet, record: time.sleep(draw)


def _frames_of(source: str, frames: int) -> Iterable[np.ndarray]:
    with closing(VideoSource(source)) as video:
        yield from islice(video, frames)
