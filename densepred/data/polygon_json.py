"""The ``*_gtFine_polygons.json`` files of Cityscapes and IDD: outlines of objects, and the masks drawn of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from densepred.data.errors import DamagedImageError

Objects = list[tuple[str, np.ndarray]]
UNDRAWN = "license plate"
"""A label that the official tools do not draw: its vehicle is what one sees there."""


def read_outlines(path: str, labels: Mapping[str, int]) -> tuple[tuple[int, int], list[tuple[int, np.ndarray]]]:
    """Return the (H, W) of a file's image and the label and outline (P, 2) float64 of its objects, front to back.

    Objects of other names are left out, groups (``cargroup``) among them.

    Args:
        path: see `read_objects`.
        labels: name of a class -> label.
    """
    size, objects = read_objects(path)
    return size, [(labels[name], outline) for name, outline in reversed(objects) if name in labels]


def draw_masks(path: str, labels: Mapping[str, int]) -> tuple[np.ndarray, list[int]]:
    """Return what one sees of each object: masks (N, H, W) bool and labels, front to back, as cityscapesscripts draws them.

    Everything in the file hides what is behind it, objects of other names too. Objects of which nothing is seen are left
    out, as are those of fewer than two points. Arguments as of `read_outlines`.
    """
    (height, width), objects = read_objects(path)
    picture = Image.new("I", (width, height), 0)
    drawing = ImageDraw.Draw(picture)
    for number, (name, outline) in enumerate(objects, 1):
        if name != UNDRAWN and len(outline) > 1:
            drawing.polygon([tuple(point) for point in outline.tolist()], fill=number if name in labels else 0)
    numbers = np.asarray(picture)
    parts = ndimage.find_objects(numbers, len(objects))
    seen = [number for number in range(len(objects), 0, -1) if parts[number - 1] is not None]
    masks = np.zeros((len(seen), height, width), bool)
    for mask, number in zip(masks, seen, strict=True):
        part = parts[number - 1]
        mask[part] = numbers[part] == number
    return masks, [labels[objects[number - 1][0]] for number in seen]


def read_objects(path: str) -> tuple[tuple[int, int], Objects]:
    """Return the (H, W) of a file's image and the name and outline (P, 2) float64 of its objects, back to front.

    Objects marked as ``deleted`` are left out.

    Args:
        path: JSON with ``imgHeight``, ``imgWidth`` and ``objects``, each with ``label`` and ``polygon``, points [x, y] in
            pixels.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedImageError: it is no such JSON, or a coordinate is no finite number.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        size = int(content["imgHeight"]), int(content["imgWidth"])
        kept = [(record["label"], record["polygon"]) for record in content["objects"] if not record.get("deleted")]
        objects = [(name, np.array(points, np.float64).reshape(len(points), 2)) for name, points in kept]
    except FileNotFoundError:
        raise FileNotFoundError(f"polygon file {path} does not exist; see datasets/README.md for the layout") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedImageError(
            f"polygon file {path} is no JSON with imgHeight, imgWidth and objects of label and polygon, points [x, y] "
            f"({type(error).__name__}: {error}); fetch it again, or mend it"
        ) from None
    for number, (name, outline) in enumerate(objects):
        if not np.isfinite(outline).all():
            raise DamagedImageError(
                f"polygon file {path}: objects[{number}] ({name}) has a coordinate that is no number"
            )
    return size, objects
