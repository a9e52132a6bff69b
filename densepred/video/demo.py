"""A model on a video: what ``densepred video`` does."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from densepred.structures import SegSample
from densepred.video.overlay import Painter, draw_timings
from densepred.video.scene import Scene, make_scene
from densepred.video.sink import FileSink, check_out
from densepred.video.source import VideoSource, without_password
from densepred.video.stages import Packet, Pipeline
from densepred.video.state import FrameHub, OverlayState

WINDOW = "densepred"
PAUSE_TICK = 0.05
"""Seconds between two looks at the switches while the video is paused."""
DAY = 86_400.0
"""Seconds."""


@dataclass
class VideoOptions:
    """What to do with a source.

    Attributes:
        source: see `densepred.video.source.VideoSource`.
        out: file to write, ``*.webm`` or ``*.mp4``; the figures go to a JSON of its name.
        show: open a window.
        serve: address of the web page, ``PORT`` or ``HOST:PORT``.
        max_frames: stop after so many frames.
        score_threshold: instances below it, 0..1, are left out.
        timeout: seconds without a frame after which a live source has ended.
        overlay: the switches at the start, see `OverlayState`.

    Raises:
        ValueError: a number out of its range, or a video that would be written over itself.
    """

    source: str
    out: str | os.PathLike | None = None
    show: bool = False
    serve: str | None = None
    max_frames: int | None = None
    score_threshold: float = 0.5
    timeout: float = 10.0
    overlay: dict[str, bool | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_frames is not None and self.max_frames < 1:
            raise ValueError(f"--max-frames {self.max_frames}: at least 1; leave it out for all frames")
        if not 0 < self.timeout <= DAY:
            raise ValueError(f"--timeout {self.timeout}: more than 0 seconds, at most a day ({DAY:g})")
        if not 0 <= self.score_threshold <= 1:
            raise ValueError(f"--score-threshold {self.score_threshold}: scores are in 0..1")
        if self.out is not None and is_same_file(self.out, self.source):
            raise ValueError(f"--out {self.out}: this is the source, and would be overwritten; choose another name")


class Demo:
    """The model's and the drawing stage.

    Args:
        predict: (H, W, 3) uint8 RGB -> sample, as `densepred.inference.predict_image` with its model.
        meta: ``classes`` and ``palette``.
        score_threshold: instances below it, 0..1, are left out.
        state: the switches.
        hub: gets every picture.
        sink: gets every picture, too.
    """

    def __init__(
        self,
        predict: Callable[[np.ndarray], SegSample],
        meta: dict,
        score_threshold: float,
        state: OverlayState,
        hub: FrameHub,
        sink: FileSink | None = None,
    ) -> None:
        self._predict, self._score_threshold = predict, score_threshold
        self._painter = Painter(meta["classes"], meta["palette"])
        self._state, self._hub, self._sink = state, hub, sink
        self._redraw: Callable[[], np.ndarray] | None = None
        self._record: dict = {}
        self.picture: np.ndarray | None = None

    def model(self, rgb: np.ndarray) -> Scene:
        """Predict on a frame (H, W, 3) uint8 RGB."""
        return make_scene(self._predict(rgb), rgb.shape[:2], self._score_threshold)

    def draw(self, packet: Packet, record: dict) -> None:
        """Draw a frame, write it to the file, show it."""
        colors = self._painter.colors(packet.result.items)
        self._redraw = partial(self._paint, packet.frame, packet.result, colors, record)
        self._record = record
        picture = self._redraw()
        if self._sink is not None:
            self._sink.write(picture, packet.arrived)
        self._publish(picture)

    def gate(self, stopped: Callable[[], bool]) -> None:
        """Wait while the video is paused, the same frame redrawn when a switch changes."""
        drawn = None
        while (switches := self._state.snapshot())["paused"] and not stopped():
            if self._redraw is not None and drawn not in (None, switches):
                self._publish(self._redraw())
            drawn = switches
            time.sleep(PAUSE_TICK)

    def _paint(self, rgb: np.ndarray, scene: Scene, colors: list, record: dict) -> np.ndarray:
        switches = self._state.snapshot()
        picture = self._painter.draw(rgb, scene, colors, switches)
        if switches["timings"]:
            draw_timings(picture, record)
        return picture

    def _publish(self, picture: np.ndarray) -> None:
        self.picture = picture
        self._hub.publish(picture, self._record)


def load_predictor(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike | None,
    device: str = "cpu",
    cfg_options: dict[str, Any] | None = None,
) -> tuple[Callable[[np.ndarray], SegSample], dict]:
    """Return what `Demo` takes first: a model's prediction on a frame, and its ``classes`` and ``palette``.

    Args:
        config, checkpoint, device, cfg_options: see `densepred.inference.load_model`.
    """
    from densepred.heads.polygon import PolygonHead
    from densepred.inference import load_model, predict_image

    model = load_model(config, checkpoint, device, cfg_options)
    if isinstance(model.head, PolygonHead):
        model.head.compose = None  # polygons are what is drawn; masks of a large frame take longer than the model
    return partial(predict_image, model), model.dataset_meta


def run_video(
    predict: Callable[[np.ndarray], SegSample],
    meta: dict,
    source: VideoSource,
    options: VideoOptions,
    state: OverlayState,
    hub: FrameHub,
) -> dict:
    """Run a model on an open source to its end, Ctrl-C or SIGTERM, ``max_frames`` or a closed window.

    Args:
        predict, meta: see `Demo`.
        source: is closed in the end.
        options: of these, what concerns the file, the window, the frames and the scores.
        state: the switches.
        hub: gets every picture.

    Returns:
        The figures of `Pipeline.run`, with ``input`` of the source and, where one is written, ``output`` of the file.

    Raises:
        StageError: a stage failed; the file is closed first and holds the frames until then.
        ValueError: the source brought no frame.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(source.close)
        sink = FileSink(options.out, source.fps, source.live) if options.out is not None else None
        demo = Demo(predict, meta, options.score_threshold, state, hub, sink)
        pipeline = Pipeline(source, demo.model, demo.draw, source.live, options.max_frames)
        pipeline.gate = partial(demo.gate, lambda: pipeline.stopped)
        stack.enter_context(interruptible(pipeline))
        tick = stack.enter_context(window(demo, pipeline, state)) if options.show else None
        if sink is not None:
            stack.callback(sink.close)
        record = pipeline.run(tick)
    if not record["frames"] and record["end"] == "the source ended":
        raise ValueError(f"{without_password(source.name)}: not one frame could be read")
    return record | {"input": source.record()} | ({"output": sink.record()} if sink is not None else {})


def run_demo(
    config: str | os.PathLike,
    checkpoint: str | os.PathLike | None,
    options: VideoOptions,
    device: str = "cpu",
    cfg_options: dict[str, Any] | None = None,
) -> None:
    """Run a model on a video, print the figures as JSON and write them beside the video.

    Args:
        config, checkpoint, device, cfg_options: see `densepred.inference.load_model`.
        options: the source, and what to do with it.

    Raises:
        ValueError, OSError: the source, the output, the port or the checkpoint cannot be used; or a stage failed.
    """
    state, hub = OverlayState(), FrameHub()
    state.update(**options.overlay)
    if options.out is not None:
        check_out(options.out)
    if options.show:
        check_display()
    source = VideoSource(options.source, options.timeout)
    with serving(options.serve, hub, state):  # before the model: a port in use should not take its time to say so
        predict, meta = load_predictor(config, checkpoint, device, cfg_options)
        record = run_video(predict, meta, source, options, state, hub)
        text = json.dumps(dict(config=os.fspath(config), device=device, **record), indent=1)
        print(text, flush=True)  # before the server waits for its pages
        if options.out is not None:
            Path(options.out).with_suffix(".json").write_text(text + "\n")


@contextlib.contextmanager
def serving(address: str | None, hub: FrameHub, state: OverlayState) -> Iterator[None]:
    """Serve the web page meanwhile; nothing without an address. In the end the hub is closed."""
    if address is None:
        yield
        return
    from densepred.video.server import VideoServer

    server = VideoServer(address, hub, state)
    server.start()
    print(f"live view: {server.url}", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        hub.close()
        server.stop()


@contextlib.contextmanager
def interruptible(pipeline: Pipeline) -> Iterator[None]:
    """Let Ctrl-C, even pressed twice, or a polite kill end the pipeline and nothing else: files are closed in peace.

    Only the main thread hears of signals; in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda *_: setattr(pipeline, "interrupted", True))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def window(demo: Demo, pipeline: Pipeline, state: OverlayState) -> Iterator[Callable[[], None]]:
    """Open a window; the function, called again and again, shows the newest picture and heeds q, Esc and space."""
    cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
    shown = None

    def tick() -> None:
        nonlocal shown
        if demo.picture is not None and demo.picture is not shown:
            shown = demo.picture
            cv2.imshow(WINDOW, cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
        key = cv2.waitKey(1) & 0xFF
        if key in (ord("q"), 27) or cv2.getWindowProperty(WINDOW, cv2.WND_PROP_VISIBLE) < 1:
            pipeline.stop("the window was closed")
        elif key == ord(" "):
            state.update(paused=not state.snapshot()["paused"])

    try:
        yield tick
    finally:
        cv2.destroyWindow(WINDOW)


def is_same_file(path: str | os.PathLike, other: str | os.PathLike) -> bool:
    """Whether two names lead to the same file, which is there."""
    return os.path.exists(path) and os.path.exists(other) and os.path.samefile(path, other)


def check_display() -> None:
    """Refuse to open a window where none can be; Qt would end the whole program.

    Raises:
        ValueError: there is no display.
    """
    if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError("--show needs a display, and DISPLAY is not set; use --serve PORT and a browser instead")
