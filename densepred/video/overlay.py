"""Drawing a scene on a frame within a few milliseconds: OpenCV's whole-image operations on one map of numbers.

`densepred.visualization` draws the same more carefully, in ten times the time.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from densepred.ops.polygon_fill import SHIFT, fixed_point
from densepred.video.scene import Item, Scene
from densepred.video.tracker import Tracker
from densepred.visualization import FONT, Color, lighter, shade

CROSS = np.ones((3, 3), np.uint8)
LINE_HEIGHT = 1.7
"""Of text, in heights of its letters."""


class Painter:
    """Draws scenes; an object keeps its colour over the frames.

    Args:
        classes: name of every class.
        palette: RGB of every class, 0..255.
    """

    def __init__(self, classes: Sequence[str], palette: Sequence[Color]) -> None:
        self._classes, self._palette = classes, palette
        self._tracker = Tracker()

    def colors(self, items: Sequence[Item]) -> list[Color]:
        """Return a colour for each item of the next frame: its class's, for objects in the shade of their number."""
        things = [k for k, item in enumerate(items) if item.thing and middle_of(item) is not None]
        boxes = np.array([items[k].box for k in things]).reshape(-1, 4)
        numbers = self._tracker.update(boxes, np.array([items[k].label for k in things], np.int64))
        ranks = dict(zip(things, numbers, strict=True))
        return [shade(tuple(self._palette[item.label]), ranks.get(k, 0)) for k, item in enumerate(items)]

    def draw(self, rgb: np.ndarray, scene: Scene, colors: Sequence[Color], switches: dict) -> np.ndarray:
        """Draw a scene on a frame.

        Args:
            rgb: (H, W, 3) uint8 RGB.
            scene: of the same size.
            colors: of its items.
            switches: see `densepred.video.state.OverlayState`.

        Returns:
            (H, W, 3) uint8 RGB, a new array.
        """
        out = rgb.copy()
        if switches["masks"]:
            painted = cv2.applyColorMap(scene.index, color_table(colors))
            mixed = cv2.addWeighted(rgb, 1 - switches["opacity"], painted, switches["opacity"], 0)
            out = cv2.copyTo(mixed, scene.index, out)
        if switches["polygons"]:
            out = draw_outlines(out, scene, [lighter(color) for color in colors])
        if switches["classes"] or switches["scores"]:
            self._write_names(out, scene, switches)
        return out

    def _write_names(self, canvas: np.ndarray, scene: Scene, switches: dict) -> None:
        scale, height = font_of(canvas)
        occupied: list[tuple[int, int, int]] = []
        for k, item in enumerate(scene.items):
            words = [self._classes[item.label]] if switches["classes"] else []
            words += [f"{item.score:.2f}"] if switches["scores"] and item.score is not None else []
            place = middle_of(item) if item.thing else widest_place(scene.index == k + 1, 2 * height)
            if words and place is not None:
                text = " ".join(words)
                width = cv2.getTextSize(text, FONT, scale, 1)[0][0]
                left, base = place[0] - width // 2, place[1] + height // 2
                if all(abs(base - y) >= height or left >= end or left + width <= x for x, end, y in occupied):
                    write(canvas, text, left, base, scale)
                    occupied.append((left, left + width, base))


def color_table(colors: Sequence[Color]) -> np.ndarray:
    """Return the colour (256, 1, 3) uint8 of every number of a scene's map; 0 is black."""
    table = np.zeros((256, 1, 3), np.uint8)
    table[1 : len(colors) + 1, 0] = np.array(colors, np.uint8).reshape(-1, 3)
    return table


def draw_outlines(canvas: np.ndarray, scene: Scene, colors: Sequence[Color]) -> np.ndarray:
    """Draw polygons as the model gives them, hidden parts too; of masks and areas the seen borders."""
    if any(item.polygon is not None for item in scene.items):
        for item, color in zip(scene.items, colors, strict=True):
            cv2.polylines(canvas, [fixed_point(item.polygon)], True, color, 1, cv2.LINE_AA, SHIFT)
        return canvas
    borders = cv2.morphologyEx(scene.index, cv2.MORPH_GRADIENT, CROSS)
    lines = cv2.applyColorMap(cv2.dilate(scene.index, CROSS), color_table(colors))
    return cv2.copyTo(lines, borders, canvas)


def draw_timings(canvas: np.ndarray, record: dict) -> None:
    """Write the stages' figures, see `densepred.video.state.FrameHub.publish`, in a corner of a frame."""
    scale, height = font_of(canvas)
    step = round(LINE_HEIGHT * height)
    lines = timing_lines(record)
    width = max(cv2.getTextSize(line, FONT, scale, 1)[0][0] for line in lines)
    corner = canvas[: step * len(lines) + step // 2, : width + step]
    corner[:] = corner // 3
    for k, line in enumerate(lines):
        cv2.putText(canvas, line, (step // 2, (k + 1) * step), FONT, scale, (255, 255, 255), 1, cv2.LINE_AA)


def timing_lines(record: dict) -> list[str]:
    """Return the stages' figures as text."""
    stages = [f"{name} {figures.get('mean_ms', 0):.1f}" for name, figures in record["stages"].items()]
    latency = record["latency"]
    return [
        f"{'  '.join(stages)} ms",
        f"{record['fps']:.1f} fps, {record['frames']} frames, {record['drops']} drops",
        f"latency p50 {latency.get('p50_ms', 0):.0f}  p95 {latency.get('p95_ms', 0):.0f} ms",
    ]


def font_of(canvas: np.ndarray) -> tuple[float, int]:
    """Return the font's scale that suits a picture's size, and the height in pixels of its letters."""
    wanted = min(28.0, max(10.0, min(canvas.shape[:2]) / 40))
    unit = cv2.getTextSize("Ag", FONT, 1, 1)[0][1]
    return wanted / unit, round(wanted)


def write(canvas: np.ndarray, text: str, x: int, y: int, scale: float) -> None:
    """Write white letters on a dark shadow, from the left end (x, y) of their base line, inside the canvas."""
    (width, height), _ = cv2.getTextSize(text, FONT, scale, 1)
    x = min(max(1, x), max(1, canvas.shape[1] - width - 1))
    y = min(max(height + 1, y), canvas.shape[0] - 2)
    for dx, dy in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
        cv2.putText(canvas, text, (x + dx, y + dy), FONT, scale, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(canvas, text, (x, y), FONT, scale, (255, 255, 255), 1, cv2.LINE_AA)


def middle_of(item: Item) -> tuple[int, int] | None:
    """Return the middle (x, y) of an object's box; ``None`` if it is seen nowhere."""
    left, top, right, bottom = item.box
    if right <= left or bottom <= top:
        return None
    return round((left + right) / 2), round((top + bottom) / 2)


def widest_place(mask: np.ndarray, least: int) -> tuple[int, int] | None:
    """Return the centre (x, y) of the largest circle in a mask (H, W) bool; ``None`` below ``least`` pixels across."""
    coarse = np.ascontiguousarray(mask[::4, ::4]).view(np.uint8)
    inside = cv2.copyMakeBorder(coarse, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
    _, radius, _, (x, y) = cv2.minMaxLoc(distance)
    return (4 * (x - 1), 4 * (y - 1)) if 8 * radius >= least else None
