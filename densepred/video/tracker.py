"""A simple tracker: objects of one class whose boxes overlap enough in two frames are the same one.

It keeps colours with objects. It predicts no motion and knows no appearance: what moves by more than its own size
between two frames, or hides for long, comes back in another colour.
"""

from dataclasses import dataclass

import numpy as np

MIN_IOU = 0.3
"""Of the boxes of one object in two frames."""
PATIENCE = 10
"""Frames for which an object that is not seen keeps its number."""


@dataclass
class Track:
    """An object: its class, its number among those of its class (0, 1, ...), its last box, frames since it was seen."""

    label: int
    number: int
    box: np.ndarray
    missed: int = 0


class Tracker:
    """Numbers objects so that an object has the same number in all frames."""

    def __init__(self) -> None:
        self.tracks: list[Track] = []
        self._next: dict[int, int] = {}

    def update(self, boxes: np.ndarray, labels: np.ndarray) -> list[int]:
        """Return each object's number, unique within its class over all frames.

        Args:
            boxes: (N, 4) xyxy pixels, N may be 0.
            labels: (N,) classes.
        """
        old = np.array([track.box for track in self.tracks], np.float64).reshape(-1, 4)
        kinds = np.array([track.label for track in self.tracks], np.int64)
        iou = box_iou(boxes, old) * (np.asarray(labels, np.int64)[:, None] == kinds)  # (N, T)
        matches = greedy_matches(iou, MIN_IOU)
        for track in self.tracks:
            track.missed += 1
        numbers = []
        for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
            track = self.tracks[matches[i]] if i in matches else self._start(int(label))
            track.box, track.missed = np.asarray(box, np.float64), 0
            numbers.append(track.number)
        self.tracks = [track for track in self.tracks if track.missed <= PATIENCE]
        return numbers

    def _start(self, label: int) -> Track:
        track = Track(label, self._next.get(label, 0), np.zeros(4))
        self._next[label] = track.number + 1
        self.tracks.append(track)
        return track


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU (N, M) of boxes (N, 4) and (M, 4), xyxy; 0 where both are empty."""
    boxes, others = (np.asarray(b, np.float64).reshape(-1, 4) for b in (boxes, others))
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.prod(np.maximum(high - low, 0), axis=-1)  # (N, M)
    areas, other_areas = (np.prod(b[:, 2:] - b[:, :2], axis=-1) for b in (boxes, others))
    union = areas[:, None] + other_areas - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def greedy_matches(iou: np.ndarray, least: float) -> dict[int, int]:
    """Match rows to columns of ``iou`` (N, M), the best pair first, each once, none below ``least``: row -> column."""
    rows, columns = np.nonzero(iou >= least)
    matches: dict[int, int] = {}
    taken: set[int] = set()
    for k in np.argsort(-iou[rows, columns], kind="stable"):
        row, column = int(rows[k]), int(columns[k])
        if row not in matches and column not in taken:
            matches[row] = column
            taken.add(column)
    return matches
