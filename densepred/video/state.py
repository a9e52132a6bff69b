"""What the stages and the web page share: the switches of the overlay and the newest frame. Both are thread-safe."""

import threading
from dataclasses import dataclass, field, fields

import cv2
import numpy as np

JPEG_QUALITY = 80
"""Of the pictures for the web page, 0..100."""


@dataclass
class OverlayState:
    """What is drawn on a frame.

    Attributes:
        masks: fill the objects or areas.
        polygons: draw outlines.
        classes: write the names of classes.
        scores: write the scores (0..1) of objects.
        timings: write the stages' times.
        opacity: of the fill, 0..1.
        paused: the picture stands still.
    """

    masks: bool = True
    polygons: bool = True
    classes: bool = True
    scores: bool = False
    timings: bool = True
    opacity: float = 0.5
    paused: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def snapshot(self) -> dict[str, bool | float]:
        """Return all switches by name, as they are at one moment."""
        with self._lock:
            return {name: getattr(self, name) for name in SWITCHES}

    def update(self, **switches: bool | float) -> None:
        """Set some switches; all of them or, if one is wrong, none.

        Raises:
            ValueError: an unknown name, an opacity outside 0..1, another switch that is no bool.
        """
        checked = {name: _checked_switch(name, value) for name, value in switches.items()}
        with self._lock:
            for name, value in checked.items():
                setattr(self, name, value)


SWITCHES = tuple(f.name for f in fields(OverlayState) if not f.name.startswith("_"))
"""The names `OverlayState.update` knows."""


class FrameHub:
    """The newest picture and the newest record of the stages, for any number of waiting clients.

    A picture becomes a JPEG when the first client asks for it, in that client's thread: `publish` costs nothing
    more when nobody watches, and several clients share one encoding.
    """

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._encoding = threading.Lock()
        self._number = 0
        self._rgb: np.ndarray | None = None
        self._jpeg: tuple[int, bytes] = (0, b"")
        self._record: dict = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called: no further frame will come."""
        return self._closed

    def publish(self, rgb: np.ndarray, record: dict) -> None:
        """Show a frame and the stages' figures; nobody may change either afterwards.

        Args:
            rgb: (H, W, 3) uint8 RGB.
            record: ``frames`` and ``drops`` so far, ``fps`` of late, ``live`` (bool), ``stages`` (``decode``, ``model``
                and ``draw``: ``ms`` of this frame, ``mean_ms``, ``p50_ms`` and ``p95_ms`` of late), ``latency``
                (``ms``, ``mean_ms``, ``p50_ms``, ``p95_ms``: from a frame's arrival to its picture).
        """
        with self._news:
            self._number += 1
            self._rgb, self._record = rgb, record
            self._news.notify_all()

    def wait(self, after: int, timeout: float) -> tuple[int, bytes] | None:
        """Return the newest frame's number (1, 2, ...) and JPEG, waiting until the number exceeds ``after``.

        Args:
            after: number of the last frame the client got; 0 for none.
            timeout: seconds.

        Returns:
            None if no newer frame came in time, or if the hub is closed and none will come.
        """
        after = max(0, after)
        with self._news:
            self._news.wait_for(lambda: self._number > after or self._closed, timeout)
            if self._number <= after:
                return None
        with self._encoding:
            number, rgb = self._newest()
            if self._jpeg[0] != number:
                _, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
                self._jpeg = (number, data.tobytes())
            return self._jpeg

    def record(self) -> dict:
        """Return the newest figures of the stages; empty before the first frame."""
        with self._news:
            return self._record

    def close(self) -> None:
        """Wake all waiting clients for good: the video has ended."""
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _newest(self) -> tuple[int, np.ndarray]:
        with self._news:
            return self._number, self._rgb


def _checked_switch(name: str, value: bool | float) -> bool | float:
    if name not in SWITCHES:
        raise ValueError(f"unknown switch {name!r}; there are {', '.join(SWITCHES)}")
    if name == "opacity":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"opacity is a number in 0..1, not {value!r}")
        return float(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is true or false, not {value!r}")
    return value
