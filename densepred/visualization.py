"""Pictures for people: segmentations over photos, and grids of them.

Everything here works on arrays and knows neither models nor runners. Images are (H, W, 3) uint8 RGB.
"""

import colorsys
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from densepred.ops.polygon_fill import SHIFT, fill_polygon, fixed_point
from densepred.structures import IGNORE_INDEX, InstanceData, PanopticMap, SegSample

Color = tuple[int, int, int]

FONT = cv2.FONT_HERSHEY_SIMPLEX
MIN_TEXT = 9
"""Height in pixels below which a class name is left out."""
STEPS = (0.618034, 0.414214)
"""Of hue and lightness from one instance to the next; irrational steps around a circle never come close to each other."""


class Area(NamedTuple):
    """A region to paint: its number in the map, its colour, its name."""

    number: int
    color: Color
    name: str


def draw_panoptic(
    image: np.ndarray,
    panoptic: PanopticMap,
    classes: Sequence[str],
    palette: Sequence[Color],
    opacity: float = 0.5,
) -> np.ndarray:
    """Draw a panoptic segmentation: class colours for stuff, a shade of it for each thing, void dark and hatched.

    Args:
        image: (H, W, 3) uint8 RGB.
        panoptic: its segmentation, of the same size.
        classes: name of every class.
        palette: RGB of every class, 0..255.
        opacity: of the colours, 0..1.

    Returns:
        (H, W, 3) uint8 RGB, a new array.

    Raises:
        ValueError: the sizes differ, a label is outside the classes, or the map shows a segment without a record.
    """
    areas, seen = [], dict.fromkeys(range(len(classes)), 0)
    for segment in panoptic.segments:
        label = _checked(segment["label"], classes)
        color = shade(palette[label], seen[label]) if segment["isthing"] else tuple(palette[label])
        seen[label] += 1
        areas.append(Area(segment["id"], color, classes[label]))
    return _paint(image, panoptic.numpy(), areas, opacity)


def draw_semantic(
    image: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[Color],
    opacity: float = 0.5,
) -> np.ndarray:
    """Draw a semantic segmentation, the ignored pixels dark and hatched; arguments as in `draw_panoptic`.

    Args:
        labels: (H, W) integer classes; 255 = ignore.
    """
    labels = np.asarray(labels).astype(np.int64)
    present = [_checked(int(label), classes) for label in np.unique(labels) if label != IGNORE_INDEX]
    areas = [Area(label + 1, tuple(palette[label]), classes[label]) for label in present]
    return _paint(image, np.where(labels == IGNORE_INDEX, 0, labels + 1), areas, opacity)


def draw_instances(
    image: np.ndarray,
    instances: InstanceData,
    classes: Sequence[str],
    palette: Sequence[Color],
    opacity: float = 0.5,
    score_threshold: float = 0.5,
) -> np.ndarray:
    """Draw instance masks, the surest on top; arguments as in `draw_panoptic`.

    Args:
        instances: ``labels`` (N,), ``masks`` (N, H, W) bool, optionally ``scores`` (N,).
        score_threshold: instances below it are left out.
    """
    labels = instances.labels.cpu().numpy()
    masks = instances.masks.cpu().numpy()
    _check_size(image, masks.shape[1:])
    scored = "scores" in instances
    scores = instances.scores.cpu().numpy() if scored else np.ones(len(labels))
    order = [i for i in np.argsort(scores, kind="stable") if scores[i] >= score_threshold]
    out, occupied, faded = image.copy(), [], _faded(image)
    colors = {i: shade(palette[_checked(int(labels[i]), classes)], rank) for rank, i in enumerate(order)}
    for i in order:
        tint = opacity * np.array(colors[i], np.float32)
        out[masks[i]] = np.round((1 - opacity) * faded[masks[i]] + tint).astype(np.uint8)
        outline, _ = cv2.findContours(masks[i].astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(out, outline, -1, lighter(colors[i]), _line(image), cv2.LINE_AA)
    for i in reversed(order):
        name = f"{classes[labels[i]]} {scores[i]:.2f}" if scored else classes[labels[i]]
        _write_name(out, masks[i].astype(np.uint8), name, occupied)
    return out


def draw_polygons(
    image: np.ndarray,
    instances: InstanceData,
    classes: Sequence[str],
    palette: Sequence[Color],
    opacity: float = 0.5,
    score_threshold: float = 0.5,
) -> np.ndarray:
    """Draw instances by their polygons, whole, the nearest on top (without depths the surest); as `draw_instances` else.

    Args:
        instances: ``labels`` (N,), ``polygons`` (N, V, 2) x, y in pixels of the image, optionally ``scores`` and ``depths``
            (N,), lower = nearer. A polygon with a vertex that is not finite, or none of whose area lies in the image, is
            left out; of one that crosses itself the even-odd area is filled.
    """
    count = len(instances.labels)
    columns = {name: instances[name].cpu().numpy() for name in ("labels", "scores", "depths") if name in instances}
    polygons = instances.polygons.detach().cpu().double().numpy()
    scores = columns.get("scores", np.ones(count))
    good = np.isfinite(polygons).all(axis=(1, 2)) & (scores >= score_threshold)
    order = [n for n in np.argsort(-columns["depths"] if "depths" in columns else scores, kind="stable") if good[n]]
    out, occupied, faded, regions = image.copy(), [], _faded(image), {}
    for rank, n in enumerate(order):
        label = _checked(int(columns["labels"][n]), classes)
        color = shade(palette[label], rank)
        region, inside = fill_polygon(polygons[n], image.shape[:2])
        if not inside.any():
            continue
        tint = opacity * np.array(color, np.float32)
        out[region][inside] = np.round((1 - opacity) * faded[region][inside] + tint).astype(np.uint8)
        cv2.polylines(out, [fixed_point(polygons[n])], True, lighter(color), _line(image), cv2.LINE_AA, SHIFT)
        regions[n] = region, inside, f"{classes[label]} {scores[n]:.2f}" if "scores" in columns else classes[label]
    for region, inside, name in reversed(regions.values()):
        mask = np.zeros(image.shape[:2], np.uint8)
        mask[region] = inside
        _write_name(out, mask, name, occupied)
    return out


def draw_sample(
    image: np.ndarray, sample: SegSample, side: str, meta: dict, score_threshold: float = 0.5
) -> np.ndarray | None:
    """Draw what a sample has on one side: panoptic before semantic before instances; ``None`` without any.

    Instances without masks are drawn by their polygons.

    Args:
        image: (H, W, 3) uint8 RGB, of the fields' size.
        side: ``gt`` or ``pred``.
        meta: ``classes`` and ``palette``.
        score_threshold: see `draw_instances`.
    """
    classes, palette = meta["classes"], meta["palette"]
    if f"{side}_panoptic" in sample:
        return draw_panoptic(image, sample.get(f"{side}_panoptic"), classes, palette)
    if f"{side}_semantic" in sample:
        return draw_semantic(image, sample.get(f"{side}_semantic").cpu().numpy(), classes, palette)
    if f"{side}_instances" in sample:
        instances = sample.get(f"{side}_instances")
        draw = draw_instances if "masks" in instances else draw_polygons
        return draw(image, instances, classes, palette, score_threshold=score_threshold)
    return None


def fit(image: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    """Resize a picture so that its longer side lies within [shortest, longest] pixels; others stay as they are."""
    height, width = image.shape[:2]
    factor = float(np.clip(max(height, width), shortest, longest)) / max(height, width)
    if factor == 1:
        return image
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, (max(1, round(width * factor)), max(1, round(height * factor))), interpolation=how)


def resize_sample(sample: SegSample, size: tuple[int, int]) -> SegSample:
    """Return a sample with the fields that `draw_sample` draws, at another size (H, W), every pixel its nearest one.

    Polygons are moved so that the image's corners stay its corners; they need ``ori_shape``, the size they are of.
    """
    small = SegSample()
    for name, value in sample.items():
        if name.endswith("_panoptic"):
            small.set_field(PanopticMap(_nearest(value.ids, size), value.segments), name)
        elif name.endswith("_semantic"):
            small.set_field(_nearest(value, size), name)
        elif name.endswith("_instances"):
            kept = {key: value[key] for key in ("labels", "scores", "depths") if key in value}
            if "masks" in value:
                kept["masks"] = _nearest(value.masks.to(torch.uint8), size).bool()
            elif "polygons" in value:
                height, width = sample.ori_shape
                scale = value.polygons.new_tensor([size[1] / width, size[0] / height])
                kept["polygons"] = (value.polygons + 0.5) * scale - 0.5
            small.set_field(InstanceData(**kept), name)
    return small


def picture_grid(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], gap: int = 8) -> np.ndarray:
    """Set pictures in a grid on white, under a line of titles; each is centred in its cell, none is resized.

    Args:
        rows: pictures (h, w, 3) of any sizes, as many in each row as there are titles.
        titles: one a column.
        gap: pixels between the cells and around them.

    Raises:
        ValueError: there is no picture, or a row has not one for each title.
    """
    if not rows or any(len(row) != len(titles) for row in rows):
        raise ValueError(f"a grid with {len(titles)} titles cannot hold rows of {[len(row) for row in rows]} pictures")
    width = max(picture.shape[1] for row in rows for picture in row)
    heights = [max(picture.shape[0] for picture in row) for row in rows]
    bar = int(np.clip(width // 11, 20, 48))
    grid = np.full((bar + sum(heights) + gap * (len(rows) + 1), gap + len(titles) * (width + gap), 3), 255, np.uint8)
    lefts = [gap + column * (width + gap) for column in range(len(titles))]
    for left, title in zip(lefts, titles, strict=True):
        scale = _scale_for(title, bar * 0.5, width)
        (text_width, text_height), _ = cv2.getTextSize(title, FONT, scale, 1)
        place = (left + (width - text_width) // 2, gap // 2 + (bar + text_height) // 2)
        cv2.putText(grid, title, place, FONT, scale, (40, 40, 40), 1, cv2.LINE_AA)
    top = bar + gap
    for row, height in zip(rows, heights, strict=True):
        for left, picture in zip(lefts, row, strict=True):
            h, w = picture.shape[:2]
            y, x = top + (height - h) // 2, left + (width - w) // 2
            grid[y : y + h, x : x + w] = picture
        top += height + gap
    return grid


def write_png(path: str | Path, rgb: np.ndarray) -> Path:
    """Write (H, W, 3) uint8 RGB as PNG, folders included; the file appears complete or not at all.

    Raises:
        ValueError: the array is not of that form.
    """
    path = Path(path)
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"{path}: a picture is (H, W, 3) uint8, not {rgb.shape} {rgb.dtype}")
    _, data = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))
    path.parent.mkdir(parents=True, exist_ok=True)
    number, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data.tobytes())
        Path(scratch).chmod(0o644)  # mkstemp's own mode lets nobody else read
        Path(scratch).replace(path)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return path


def shade(color: Color, rank: int) -> Color:
    """Return the class colour, turned and brightened or darkened by the rank of the instance; rank 0 keeps it."""
    hue, lightness, saturation = colorsys.rgb_to_hls(*(c / 255 for c in color))
    turn, lift = ((rank * step + 0.5) % 1 - 0.5 for step in STEPS)  # -0.5..0.5
    lightness = min(0.8, max(0.2, lightness + 0.35 * lift)) if rank else lightness
    rgb = colorsys.hls_to_rgb((hue + 0.15 * turn) % 1, lightness, saturation)
    return tuple(round(255 * c) for c in rgb)


def lighter(color: Color) -> Color:
    """Return the colour of outlines around areas of a colour."""
    return tuple(round(0.35 * c + 0.65 * 255) for c in color)


def _nearest(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize (..., H, W) whole numbers without mixing them."""
    height, width = values.shape[-2:]
    rows = (torch.arange(size[0]) * height // size[0]).to(values.device)
    columns = (torch.arange(size[1]) * width // size[1]).to(values.device)
    return values[..., rows[:, None], columns]


def _paint(image: np.ndarray, ids: np.ndarray, areas: Sequence[Area], opacity: float) -> np.ndarray:
    """Colour the areas of a map, draw the lines between them and write their names; number 0 is void."""
    _check_size(image, ids.shape)
    dense = _renumber(ids, areas)  # (H, W), 0 = void, k = areas[k - 1]
    colors = np.array([(0, 0, 0), *(area.color for area in areas)], np.uint8)
    out = cv2.addWeighted(_faded(image), 1 - opacity, colors[dense], opacity, 0)
    void = dense == 0
    out[void] = _hatched(image)[void]
    lines = np.array([(150, 150, 150), *(lighter(area.color) for area in areas)], np.uint8)
    border = _borders(dense, _line(image))
    out[border] = lines[dense[border]]
    sizes = np.bincount(dense.ravel(), minlength=len(areas) + 1)
    occupied: list[tuple[int, int, int, int]] = []
    for k in sorted(range(1, len(areas) + 1), key=lambda k: -sizes[k]):
        if sizes[k] > MIN_TEXT**2:
            _write_name(out, (dense == k).astype(np.uint8), areas[k - 1].name, occupied)
    return out


def _renumber(ids: np.ndarray, areas: Sequence[Area]) -> np.ndarray:
    table = np.zeros(max([int(ids.max(initial=0)), *(area.number for area in areas)]) + 1, np.int32)
    table[[area.number for area in areas]] = np.arange(1, len(areas) + 1)
    dense = table[ids]
    unknown = np.unique(ids[(dense == 0) & (ids != 0)])
    if unknown.size:
        raise ValueError(f"the map shows segments {unknown[:5].tolist()} that its records lack; list them")
    return dense


def _check_size(image: np.ndarray, size: tuple[int, ...]) -> None:
    if image.shape[:2] != tuple(size):
        raise ValueError(f"the segmentation is {size[0]}x{size[1]}, its image {image.shape[0]}x{image.shape[1]}")


def _checked(label: int, classes: Sequence[str]) -> int:
    if not 0 <= label < len(classes):
        raise ValueError(f"label {label} is outside the {len(classes)} classes (0..{len(classes) - 1})")
    return label


def _line(image: np.ndarray) -> int:
    """Return the width of outlines in pixels."""
    return max(1, round(min(image.shape[:2]) / 360))


def _faded(image: np.ndarray) -> np.ndarray:
    """Return the image nearly grey: over a coloured one, a class would have another colour everywhere."""
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, 0.25, grey, 0.75, 0)


def _hatched(image: np.ndarray) -> np.ndarray:
    height, width = image.shape[:2]
    period = max(6, min(height, width) // 40)
    stripe = (np.arange(height)[:, None] + np.arange(width)) % period < period / 3  # (H, W)
    return (image * np.where(stripe, 0.45, 0.25)[..., None]).astype(np.uint8)


def _borders(dense: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels (H, W) bool where the map changes, as lines of about ``width`` pixels."""
    border = np.zeros(dense.shape, np.uint8)
    border[:, :-1] |= dense[:, :-1] != dense[:, 1:]
    border[:-1] |= dense[:-1] != dense[1:]
    if width > 1:
        border = cv2.dilate(border, np.ones((width, width), np.uint8))
    return border.astype(bool)


def _write_name(canvas: np.ndarray, mask: np.ndarray, name: str, occupied: list[tuple[int, int, int, int]]) -> None:
    """Write a name, outlined, where the mask (H, W) uint8 is widest, if it fits there and hides no other name."""
    if not mask.any():
        return
    x, y, radius, room = _widest_place(mask)
    wanted = min(float(np.clip(min(canvas.shape[:2]) / 26, MIN_TEXT + 1, 30)), 1.1 * radius)
    scale = _scale_for(name, wanted, room)
    (width, height), below = cv2.getTextSize(name, FONT, scale, 1)
    left = int(np.clip(x - width // 2, 2, max(2, canvas.shape[1] - width - 2)))
    base = int(np.clip(y + height // 2, height + 2, max(height + 2, canvas.shape[0] - below - 2)))
    box = (left, base - height, left + width, base + below)
    if _height(scale) < MIN_TEXT or any(_overlap(box, other) for other in occupied):
        return
    occupied.append(box)
    reach = max(1, round(height / 14))
    for dx, dy in ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)):
        cv2.putText(canvas, name, (left + dx * reach, base + dy * reach), FONT, scale, (20, 20, 20), 1, cv2.LINE_AA)
    cv2.putText(canvas, name, (left, base), FONT, scale, (255, 255, 255), 1, cv2.LINE_AA)


def _widest_place(mask: np.ndarray) -> tuple[int, int, float, float]:
    """Return centre (x, y) and radius of the largest circle in a mask, and the width available for text there."""
    left, top, width, height = cv2.boundingRect(mask)
    inside = cv2.copyMakeBorder(mask[top : top + height, left : left + width], 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
    y, x = np.unravel_index(int(distance.argmax()), distance.shape)
    row = inside[y]
    stops = np.flatnonzero(row == 0)
    room = 2 * min(x - stops[stops < x].max(), stops[stops > x].min() - x)
    # Text may hang over the edge of its own segment a little, as long as it is clear whose it is.
    return left + int(x) - 1, top + int(y) - 1, float(distance[y, x]), 1.3 * float(room)


def _scale_for(text: str, height: float, width: float) -> float:
    """Return the font scale for capitals of ``height`` pixels, less if the text would be wider than ``width``."""
    scale = height / _height(1)
    return scale * min(1.0, 0.95 * width / max(1, cv2.getTextSize(text, FONT, scale, 1)[0][0]))


def _height(scale: float) -> float:
    """Return the height of a line of text; OpenCV 4 and 5 draw other letters under one name."""
    return scale * cv2.getTextSize("Ag", FONT, 1, 1)[0][1]


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
