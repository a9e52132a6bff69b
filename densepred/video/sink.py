"""Where drawn frames go: a file that a browser plays.

``.webm`` is VP9, ``.mp4`` is H.264. PyAV (``pip install densepred[video]``) writes both, with encoders set for speed;
without it OpenCV writes VP9, whose encoder it cannot set and which is many times slower.
"""

import importlib.util
import os
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

ENCODERS = {
    ".webm": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "row-mt": "1", "crf": "34", "b": "0"}),
    ".mp4": ("libx264", {"preset": "veryfast", "tune": "zerolatency", "crf": "23"}),
}
"""PyAV's, by the file's ending: of a constant quality, which a bit rate would not give at scene changes."""
TICKS = 90_000
"""Of PyAV's time stamps, a second."""


class OpenCVSink:
    """Writes VP9 in WebM at a fixed rate.

    Args:
        path: ``*.webm``.
        fps: frames a second.
        size: (H, W), even.
    """

    encoder = "VP9 by OpenCV"

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        with _Silence():  # FFmpeg says that WebM has no such tag, and takes the right one
            self._writer = cv2.VideoWriter(
                str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"VP90"), fps, (size[1], size[0])
            )
        if not self._writer.isOpened():
            raise ValueError(f"{path}: this OpenCV cannot write VP9; install PyAV: pip install 'densepred[video]'")

    def write(self, rgb: np.ndarray, seconds: float) -> None:
        """Append a frame (H, W, 3) uint8 RGB; its time is ignored, frames follow each other at the fixed rate."""
        self._writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        """Finish the file."""
        self._writer.release()


class PyAVSink:
    """Writes VP9 in WebM or H.264 in MP4, every frame at its own time; arguments as of `OpenCVSink`."""

    def __init__(self, path: Path, fps: float, size: tuple[int, int]) -> None:
        import av

        name, options = ENCODERS[path.suffix.lower()]
        self.encoder = f"{name} by PyAV"
        self._frame_of = av.VideoFrame.from_ndarray
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream(name, rate=Fraction(fps).limit_denominator(1001), options=options)
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, TICKS)
        self._newest = -1

    def write(self, rgb: np.ndarray, seconds: float) -> None:
        """Append a frame (H, W, 3) uint8 RGB to be shown ``seconds`` after the first one, after all before it."""
        frame = self._frame_of(rgb, format="rgb24")
        self._newest = max(self._newest + 1, round(seconds * TICKS))
        frame.pts, frame.time_base = self._newest, Fraction(1, TICKS)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file."""
        if self._newest >= 0:
            self._container.mux(self._stream.encode())
        self._container.close()


class FileSink:
    """A video file; opened by the first frame, whose size, made even, all frames get.

    Args:
        path: ``*.webm`` or ``*.mp4``.
        fps: frames a second, of a source that is not live.
        live: give each frame the time of its arrival (PyAV alone can).
    """

    def __init__(self, path: str | os.PathLike, fps: float, live: bool) -> None:
        self.path = Path(path)
        self._fps, self._live = fps, live
        self._sink: OpenCVSink | PyAVSink | None = None
        self._size = (0, 0)
        self._first = 0.0
        self.frames = 0

    def write(self, rgb: np.ndarray, arrived: float) -> None:
        """Append a frame (H, W, 3) uint8 RGB that arrived at a moment, in seconds of any clock."""
        if self._sink is None:
            self._size, self._first = (rgb.shape[0] + rgb.shape[0] % 2, rgb.shape[1] + rgb.shape[1] % 2), arrived
            self._sink = (PyAVSink if has_pyav() else OpenCVSink)(self.path, self._fps, self._size)
        seconds = arrived - self._first if self._live else self.frames / self._fps
        self._sink.write(letter_box(rgb, self._size), seconds)
        self.frames += 1

    def record(self) -> dict:
        """Return ``out``, ``frames`` and ``encoder``."""
        return dict(out=str(self.path), frames=self.frames, encoder=self._sink.encoder if self._sink else None)

    def close(self) -> None:
        """Finish the file; without a frame there is none."""
        if self._sink is not None:
            self._sink.close()


def has_pyav() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def check_out(path: str | os.PathLike) -> None:
    """Refuse a file that cannot be written, before any work; its folder is made.

    Raises:
        ValueError: an ending other than ``.webm`` and ``.mp4``, or ``.mp4`` without PyAV.
        OSError: the folder cannot be made, or the file not written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in ENCODERS:
        raise ValueError(f"{path}: videos are written as .webm (VP9) or .mp4 (H.264), not {ending or 'without ending'}")
    if ending == ".mp4" and not has_pyav():
        raise ValueError(f"{path}: H.264 needs PyAV: pip install 'densepred[video]'; or name it {path.stem}.webm")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("ab"):  # raises what a writer would, and leaves an older video as it is
        pass
    if new:
        path.unlink()


def letter_box(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Fit a picture into (H, W) with its proportions kept, centred on black; one that differs by a pixel is padded."""
    if rgb.shape[:2] == size:
        return rgb
    factor = min(size[0] / rgb.shape[0], size[1] / rgb.shape[1])
    if not 1 <= factor < 1 + 2 / max(size):
        height, width = (max(1, min(s, round(n * factor))) for s, n in zip(size, rgb.shape, strict=False))
        rgb = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    top, left = (size[0] - rgb.shape[0]) // 2, (size[1] - rgb.shape[1]) // 2
    bottom, right = size[0] - rgb.shape[0] - top, size[1] - rgb.shape[1] - left
    return cv2.copyMakeBorder(rgb, top, bottom, left, right, cv2.BORDER_CONSTANT)


class _Silence:
    """Swallows what C libraries write to the standard error meanwhile."""

    def __enter__(self) -> None:
        sys.stderr.flush()
        self._kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        os.close(null)

    def __exit__(self, *error: object) -> None:
        os.dup2(self._kept, 2)
        os.close(self._kept)
