"""Reading outlines of objects: the ``*_gtFine_polygons.json`` files of Cityscapes and IDD."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from densepred.data.errors import DamagedImageError


def read_outlines(path: str, labels: Mapping[str, int]) -> tuple[tuple[int, int], list[tuple[int, np.ndarray]]]:
    """Return the (H, W) of a file's image and the label and outline (P, 2) float64 of its objects, front to back.

    The file lists them from back to front. Objects of other names are left out, groups (``cargroup``) among them, and so
    are those marked as ``deleted``.

    Args:
        path: JSON with ``imgHeight``, ``imgWidth`` and ``objects``, each with ``label`` and ``polygon``, points [x, y] in
            pixels.
        labels: name of a class -> label.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedImageError: it is no such JSON, or a coordinate is no finite number.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        size = int(content["imgHeight"]), int(content["imgWidth"])
        objects = [record for record in reversed(content["objects"]) if not record.get("deleted")]
        found = [(labels[r["label"]], r["polygon"]) for r in objects if r["label"] in labels]
        outlines = [(label, np.array(points, np.float64).reshape(len(points), 2)) for label, points in found]
    except FileNotFoundError:
        raise FileNotFoundError(f"polygon file {path} does not exist; see datasets/README.md for the layout") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedImageError(
            f"polygon file {path} is no JSON with imgHeight, imgWidth and objects of label and polygon, points [x, y] "
            f"({type(error).__name__}: {error}); fetch it again, or mend it"
        ) from None
    if not all(np.isfinite(outline).all() for _, outline in outlines):
        raise DamagedImageError(f"polygon file {path} has a coordinate that is no finite number; mend it")
    return size, outlines
