"""Three stages in three threads: decode, model, draw.

Short queues lie between them. A file's queues wait (every frame is kept); a live source's queues hold the newest frame
alone, and what it replaces counts as dropped. One failing stage ends all three.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

STAGES = ("decode", "model", "draw")
QUEUE_LENGTH = 2
"""Frames between two stages of a file; more would only add latency."""
IN_FLIGHT = 2 * QUEUE_LENGTH + len(STAGES)
"""Frames between the source and the picture at most."""
TICK = 0.03
"""Seconds between two looks of the main thread at keys and signals."""


class StageError(ValueError):
    """A stage failed; the message is one line."""


@dataclass
class Packet:
    """A frame on its way.

    Attributes:
        number: 1, 2, ... in the order of arrival, dropped ones included.
        arrived: when it came from the source, in seconds of ``time.perf_counter``.
        frame: (H, W, 3) uint8 RGB.
        result: what the model stage made of it.
        ms: duration of each stage in milliseconds.
    """

    number: int
    arrived: float
    frame: Any
    result: Any = None
    ms: dict[str, float] = field(default_factory=dict)


class Channel:
    """A bounded queue between two stages.

    Args:
        length: how many packets it holds.
        newest: a full one drops its oldest packet; otherwise `put` waits.
    """

    def __init__(self, length: int, newest: bool) -> None:
        self._packets: deque[Packet] = deque()
        self._length, self._newest = length, newest
        self._changed = threading.Condition()
        self._closed = self._stopped = False
        self.drops = 0

    def put(self, packet: Packet) -> bool:
        """Hand on a packet; false if the channel was stopped and nobody will take it."""
        with self._changed:
            if self._newest and len(self._packets) == self._length:
                self._packets.popleft()
                self.drops += 1
            self._changed.wait_for(lambda: self._stopped or len(self._packets) < self._length)
            if not self._stopped:
                self._packets.append(packet)
            self._changed.notify_all()
            return not self._stopped

    def get(self) -> Packet | None:
        """Wait for the next packet; ``None`` when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._packets or self._closed or self._stopped)
            if self._stopped or not self._packets:
                return None
            packet = self._packets.popleft()
            self._changed.notify_all()
            return packet

    def close(self) -> None:
        """Say that no packet will follow; those inside are still delivered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Throw away what is inside and wake both sides."""
        with self._changed:
            self._stopped = True
            self._packets.clear()
            self._changed.notify_all()


class Series:
    """Durations in milliseconds: the newest 100, and the newest 100,000 for the figures at the end."""

    def __init__(self) -> None:
        self._late: deque[float] = deque(maxlen=100)
        self._all: deque[float] = deque(maxlen=100_000)

    def add(self, ms: float) -> None:
        """Append one duration."""
        self._late.append(ms)
        self._all.append(ms)

    def figures(self, whole: bool) -> dict[str, float]:
        """Return ``ms`` (the newest), ``mean_ms``, ``p50_ms``, ``p95_ms`` of late or of the ``whole``; empty of none."""
        values = sorted(self._all if whole else self._late)
        if not values:
            return {}
        last = len(values) - 1
        figures = dict(ms=self._late[-1], mean_ms=sum(values) / len(values))
        figures |= dict(p50_ms=values[round(0.5 * last)], p95_ms=values[round(0.95 * last)])
        return {name: round(value, 3) for name, value in figures.items()}


class Meter:
    """The stages' times, latency, frame rate and drops."""

    def __init__(self, live: bool) -> None:
        self.live = live
        self.frames = 0
        self.stages = {name: Series() for name in STAGES}
        self.latency = Series()
        self._first = 0.0
        self._ends: deque[float] = deque(maxlen=100)  # as if nobody had paused
        self._pauses: deque[tuple[float, float]] = deque(maxlen=IN_FLIGHT)  # one before every picture
        self._paused = 0.0
        self._lock = threading.Lock()

    def add(self, packet: Packet, end: float) -> None:
        """Count a packet that was drawn at ``end``, in seconds of ``time.perf_counter``."""
        with self._lock:
            for name, ms in packet.ms.items():
                self.stages[name].add(ms)
            paused = sum(max(0.0, stop - max(start, packet.arrived)) for start, stop in self._pauses)
            self.latency.add(1000 * (end - packet.arrived - paused))
            self._ends.append(end - self._paused)
            self._first = self._first if self.frames else self._ends[0]
            self.frames += 1

    def skip(self, start: float, stop: float) -> None:
        """Leave a pause out of the frame rate and of the latency of those that waited."""
        with self._lock:
            self._pauses.append((start, stop))
            self._paused += stop - start

    def record(self, drops: int, whole: bool = False) -> dict:
        """Return the figures of late, or of the whole run, as `densepred.video.state.FrameHub.publish` lists them.

        ``fps`` counts from the first picture to the last, so that the start of the model is no part of it.
        """
        with self._lock:
            ends, frames = self._ends, self.frames if whole else len(self._ends)
            seconds = ends[-1] - (self._first if whole else ends[0]) if ends else 0.0
            return dict(
                frames=self.frames,
                drops=drops,
                fps=round((frames - 1) / seconds, 3) if seconds > 0 else 0.0,
                live=self.live,
                stages={name: series.figures(whole) for name, series in self.stages.items()},
                latency=self.latency.figures(whole),
            )


class Pipeline:
    """Runs the three stages until the source ends, somebody stops it, or a stage fails.

    Args:
        source: yields frames; the time of each ``next`` is the decode stage's.
        model: frame -> result.
        draw: (packet, record of the stages so far) -> nothing.
        live: keep the newest frame, not every frame.
        max_frames: stop after so many drawn frames.

    Attributes:
        gate: waits while the video is paused; called before every drawing.
        interrupted: true ends the stages; unlike `stop`, a signal's handler may set it.
    """

    def __init__(
        self,
        source: Iterable[Any],
        model: Callable[[Any], Any],
        draw: Callable[[Packet, dict], None],
        live: bool,
        max_frames: int | None = None,
    ) -> None:
        self._source, self._model, self._draw = source, model, draw
        self._max_frames = max_frames
        self.gate: Callable[[], None] | None = None
        self.interrupted = False
        length = 1 if live else QUEUE_LENGTH
        self._to_model, self._to_draw = Channel(length, newest=live), Channel(length, newest=live)
        self.meter = Meter(live)
        self.end = ""
        self._error: StageError | None = None
        self._stopped = threading.Event()

    @property
    def stopped(self) -> bool:
        """Whether the stages are to end now."""
        return self._stopped.is_set()

    def stop(self, reason: str) -> None:
        """End the stages; frames on their way are thrown away, the one being drawn is finished."""
        if not self._stopped.is_set():
            self.end = reason
        self._stopped.set()
        self._to_model.stop()
        self._to_draw.stop()

    def record(self, whole: bool = False) -> dict:
        """Return the figures so far, see `Meter.record`."""
        return self.meter.record(self._to_model.drops + self._to_draw.drops, whole)

    def run(self, tick: Callable[[], None] | None = None) -> dict:
        """Run the stages to the end and return the figures of the whole run, with ``end``: why it ended.

        A decoder that hangs in a dead source is left behind after a second; its thread ends when the source gives up.

        Args:
            tick: called in this thread several times a second.

        Raises:
            StageError: a stage failed.
        """
        works = dict(decode=self._decode, model=self._infer, draw=self._paint)
        # No daemons: one that comes back from OpenCV while Python ends would abort the program.
        threads = {
            name: threading.Thread(target=self._guard, args=(name, work), name=name) for name, work in works.items()
        }
        for thread in threads.values():
            thread.start()
        try:
            while threads["draw"].is_alive():
                threads["draw"].join(TICK)
                if self.interrupted:
                    self.stop("interrupted")
                if tick is not None and not self.stopped:
                    tick()
        finally:
            self.stop("the source ended")
            threads["draw"].join()
            threads["model"].join()
            threads["decode"].join(1.0)
        if self._error is not None:
            raise self._error
        return self.record(whole=True) | {"end": self.end}

    def _guard(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:
            said = " ".join(str(error).split()) or "no message"
            message = f"the {name} stage failed after {self.meter.frames} frames: {type(error).__name__}: {said}"
            if self._error is None and not self.stopped:
                self._error = StageError(message)
                self._error.__cause__ = error
            self.stop("failed")

    def _decode(self) -> None:
        frames = iter(self._source)
        for number in itertools.count(1):
            start = time.perf_counter()
            frame = next(frames, None)
            arrived = time.perf_counter()
            if frame is None or self.stopped:
                break
            packet = Packet(number, arrived, frame, ms={"decode": 1000 * (arrived - start)})
            if not self._to_model.put(packet):
                break
        self._to_model.close()

    def _infer(self) -> None:
        while (packet := self._to_model.get()) is not None:
            start = time.perf_counter()
            packet.result = self._model(packet.frame)
            packet.ms["model"] = 1000 * (time.perf_counter() - start)
            if not self._to_draw.put(packet):
                break
        self._to_draw.close()

    def _paint(self) -> None:
        while True:
            if self.gate is not None:
                start = time.perf_counter()
                self.gate()
                self.meter.skip(start, time.perf_counter())
            packet = self._to_draw.get()
            if packet is None:
                return
            start = time.perf_counter()
            self._draw(packet, self.record())
            end = time.perf_counter()
            packet.ms["draw"] = 1000 * (end - start)
            self.meter.add(packet, end)
            if self.meter.frames == self._max_frames:
                self.stop(f"drew {self._max_frames} frames")
                return
