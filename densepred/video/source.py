"""Where frames come from: files, cameras and network streams."""

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from densepred.video.mjpeg import MJPEGCapture, open_mjpeg

SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "udp://", "http://", "https://")
BAD_READS = 10
"""Frames in a row that cannot be decoded, after which a file has ended and a stream is opened anew."""
DEFAULT_FPS = 25.0
"""Of a source that does not tell its own."""


class VideoSource:
    """Yields the frames of a source, (H, W, 3) uint8 RGB each, in its own size.

    A file ends after its last frame that can be decoded; frames that cannot are left out and counted. A live source
    that ends or says nothing for half of ``timeout`` is opened anew, again and again until it has brought no frame for
    ``timeout``; then it has ended. A frame may have another size than the one before (OpenCV, which reads all but
    Motion JPEG over HTTP, squeezes frames into the size that a connection had at its start).

    Args:
        name: path of a file, number of a camera, or an address (rtsp, rtmp, udp, http).
        timeout: seconds without a frame after which a live source has ended.

    Attributes:
        live: a camera, or an address that announces no number of frames.
        fps: frames a second as announced, else 25.
        size: (H, W) of the newest frame; (0, 0) before the first.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the source cannot be opened.
    """

    def __init__(self, name: str | os.PathLike, timeout: float = 10.0) -> None:
        self.name = os.fspath(name)
        self._timeout = timeout
        self._capture = open_capture(self.name, timeout / 2)
        if not self._capture.isOpened():
            raise ValueError(_why_unreadable(without_password(self.name)))
        announced = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self._announced = int(announced) if 0 < announced < 2**40 else None
        self.live = is_camera(self.name) or (is_address(self.name) and self._announced is None)
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = float(fps) if 0 < fps <= 1000 else DEFAULT_FPS
        self.size = (0, 0)
        self._counts = dict(frames=0, unreadable=0, reconnects=0, size_changes=0)
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[np.ndarray]:
        self._newest = time.monotonic()  # while a model was loaded, nobody listened
        try:
            while not self._closed.is_set():
                frame = self._read()
                if frame is not None:
                    yield frame
                elif not (self.live and self._reconnect()):
                    return
        finally:
            self._capture.release()

    def record(self) -> dict:
        """Return what happened: ``frames``, ``unreadable``, ``reconnects``, ``size_changes``, ``announced`` (or None)."""
        return dict(
            source=without_password(self.name), **self._counts, announced=self._announced, last_size=list(self.size)
        )

    def close(self) -> None:
        """End the iteration; safe while another thread reads."""
        self._closed.set()

    def _read(self) -> np.ndarray | None:
        """Return the next frame that can be decoded; ``None`` at the end or when the connection broke."""
        for failures in range(BAD_READS + 1):
            start = time.monotonic()
            ok, bgr = self._capture.read()
            if ok:
                self._note(bgr.shape[:2], failures)
                return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
            silent = not is_path(self.name) and time.monotonic() - start > self._timeout / 4
            if silent or self._closed.is_set() or not self._capture.isOpened():
                return None
        return None

    def _note(self, size: tuple[int, int], failures: int) -> None:
        self._newest = time.monotonic()
        self._counts["frames"] += 1
        self._counts["unreadable"] += failures
        self._counts["size_changes"] += self.size not in (size, (0, 0))
        self.size = size

    def _reconnect(self) -> bool:
        """Open the source anew; false once it has been silent for too long."""
        self._capture.release()
        pause = 0.1
        while (left := self._newest + self._timeout - time.monotonic()) > 0:
            if self._closed.wait(min(pause, left)):
                return False
            capture = open_capture(self.name, min(left, self._timeout / 2))
            if capture.isOpened():
                self._capture = capture
                self._counts["reconnects"] += 1
                return True
            pause = min(2.0, 2 * pause)
        return False


def is_camera(name: str) -> bool:
    """Whether a source's name is the number of a camera."""
    return re.fullmatch("[0-9]{1,4}", name) is not None


def is_address(name: str) -> bool:
    """Whether a source's name is an address on the network."""
    return name.lower().startswith(SCHEMES)


def without_password(name: str) -> str:
    """Return a source's name fit to be shown: in an address, ``***`` stands for the password."""
    return re.sub(r"(?<=://)([^/@:]*):[^/@]*(?:@[^/@]*)*@", r"\1:***@", name) if is_address(name) else name


def is_path(name: str) -> bool:
    """Whether a source's name is the path of a file."""
    return not is_camera(name) and not is_address(name)


def check_source(name: str) -> None:
    """Refuse a source that cannot exist, without opening it.

    Raises:
        FileNotFoundError: a file that is not there.
    """
    if is_path(name) and not Path(name).is_file():
        raise FileNotFoundError(
            f"{name}: no such video; name a file, a camera's number, or an address (rtsp://, http://)"
        )


def open_capture(name: str, timeout: float) -> "cv2.VideoCapture | MJPEGCapture":
    """Open a source, quietly; whether it worked, ``isOpened()`` tells.

    Args:
        name: see `VideoSource`.
        timeout: seconds to wait for a connection, and for each frame of it; of addresses alone.
    """
    check_source(name)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    if is_camera(name):
        capture = cv2.VideoCapture(int(name))
        capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
        return capture
    if name.lower().startswith(("http://", "https://")):
        stream = open_mjpeg(name, timeout)
        if stream is not None:
            return stream
    limit = max(1, round(1000 * timeout))
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    return cv2.VideoCapture(name, cv2.CAP_FFMPEG, [] if is_path(name) else limits)


def _why_unreadable(name: str) -> str:
    if is_camera(name):
        return f"camera {name} cannot be opened: is it plugged in, and may you read /dev/video{name}?"
    if is_address(name):
        return f"{name} cannot be opened: no answer in time, or no video"
    return f"{name} cannot be read as a video: it is damaged, or its codec is unknown to OpenCV's FFmpeg"
