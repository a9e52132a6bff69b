"""Loading the objects of any data set as polygons of a fixed number of vertices, with their order in depth."""

import numpy as np
from mmcv.transforms import BaseTransform
from scipy import ndimage

from densepred.data.instances import OBJECT_DIVISOR, LoadInstances, object_positions
from densepred.data.loading import read_label_map, require_size
from densepred.data.polygon_json import read_outlines
from densepred.data.polygon_vertices import SELECTIONS, box_of, from_mask, from_outline, mirrored_first, spans_area
from densepred.registry import TRANSFORMS


@TRANSFORMS.register_module()
class LoadPolygons(BaseTransform):
    """Make the objects of an image ``polygons`` (N, V, 2), front to back, with their labels and pseudo-depths.

    They come from the first of these that the results have: ``objects``, ready polygons (dicts with ``vertices`` (V, 2),
    ``label``, ``depth`` and, if known, ``box``); ``polygon_path``, a file of outlines, see
    `densepred.data.polygon_json.read_outlines`; ``instances`` or ``instance_path``, masks, as `LoadInstances` takes them.
    Sets

    * ``polygons`` (N, V, 2) float32, xy in pixels of the image, clockwise on the screen from the top left;
    * ``polygon_boxes`` (N, 4) float32 xyxy, of the outlines or the masks' first and last pixels that the vertices were chosen
      from, or else of the vertices;
    * ``polygon_labels`` (N,) int64 and ``pseudo_depths`` (N,) float32, 0 = nearest: of outlines the place in the file's
      order, of masks, whose files tell no order, that of their lowest pixels, the lowest one nearest;
    * ``mirrored_first`` (N,) int64, see `densepred.data.polygon_vertices.mirrored_first`.

    An object that encloses nothing is left out: fewer than three points, one row or column of pixels, all vertices on one
    line (as when every walk ends at the centre of a thin object). Its place in the order stays empty. Crowds are no
    objects. One that consists of several parts gets one polygon around all of them (``real_points``: around the largest).

    Args:
        num_vertices: V; a multiple of 4 for ``regular_interval``, even for ``grid_based``.
        selection: ``regular_interval`` (published), ``grid_based`` or ``real_points``.

    Raises:
        DamagedImageError: a file that cannot be read or does not fit its image.
        ValueError: ready polygons of another number of vertices; an image whose data set has none of the above.
    """

    def __init__(self, num_vertices: int = 16, selection: str = "regular_interval") -> None:
        if selection not in SELECTIONS:
            raise ValueError(f"LoadPolygons: selection={selection!r} is none of {', '.join(SELECTIONS)}")
        step = {"regular_interval": 4, "grid_based": 2, "real_points": 1}[selection]
        if num_vertices < 4 or num_vertices % step:
            raise ValueError(
                f"LoadPolygons: num_vertices={num_vertices} does not do for {selection}: at least 4, a multiple of {step}"
            )
        self.num_vertices, self.selection = num_vertices, selection

    def transform(self, results: dict) -> dict:
        if "objects" in results:
            polygons, boxes, labels, depths = self._ready(results)
        elif "polygon_path" in results:
            polygons, boxes, labels, depths = self._from_outlines(results)
        else:
            polygons, boxes, labels, depths = self._from_masks(results)
        found = [i for i in np.argsort(depths, kind="stable") if polygons[i] is not None]  # front to back
        array = np.array([polygons[i] for i in found]).reshape(-1, self.num_vertices, 2)  # (N, V, 2)
        spanning = spans_area(array)
        kept = np.array(found, np.int64)[spanning]
        results["polygons"] = array[spanning].astype(np.float32)
        results["polygon_boxes"] = np.array([boxes[i] for i in kept], np.float32).reshape(-1, 4)
        results["polygon_labels"] = np.array(labels, np.int64)[kept]
        results["pseudo_depths"] = np.array(depths, np.float32)[kept]
        results["mirrored_first"] = mirrored_first(results["polygons"], self.selection)
        return results

    def _ready(self, results: dict) -> tuple[list, ...]:
        objects = results["objects"]
        for record in objects:
            if len(record["vertices"]) != self.num_vertices:
                raise ValueError(
                    f"{results['img_path']} has a polygon of {len(record['vertices'])} vertices, but LoadPolygons wants "
                    f"num_vertices={self.num_vertices}: set that, or take the annotation file of that number"
                )
        boxes = [record["box"] if "box" in record else box_of(record["vertices"]) for record in objects]
        polygons, labels, depths = ([record[key] for record in objects] for key in ("vertices", "label", "depth"))
        return polygons, boxes, labels, depths

    def _from_outlines(self, results: dict) -> tuple[list, ...]:
        size, outlines = read_outlines(results["polygon_path"], results["polygon_table"])
        require_size(size, results["polygon_path"], results)
        polygons = [from_outline(outline, size, self.num_vertices, self.selection) for _, outline in outlines]
        boxes = [box_of(outline) if len(outline) else None for _, outline in outlines]
        return polygons, boxes, [label for label, _ in outlines], range(len(outlines))

    def _from_masks(self, results: dict) -> tuple[list, ...]:
        found, labels = _cut_masks(results)
        polygons = [from_mask(mask, box, self.num_vertices, self.selection) for mask, box in found]
        boxes = [box for _, box in found]
        lowest_first = np.argsort([-box[3] for box in boxes], kind="stable")
        return polygons, boxes, labels, np.argsort(lowest_first)


def _cut_masks(results: dict) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[int]]:
    """Return each object's mask inside its box with the box, and its label; objects without a pixel are left out."""
    if "instances" in results:
        loaded = LoadInstances()({**results})
        masks, labels = loaded["masks"], loaded["mask_labels"].tolist()
        slices = [_mask_slices(mask) for mask in masks]
        found = [(mask[part], _pixel_box(part)) for mask, part in zip(masks, slices, strict=True) if part]
        return found, [label for label, part in zip(labels, slices, strict=True) if part]
    if "instance_path" not in results:
        raise ValueError(
            f"{results.get('img_path', 'an image')} has no annotated objects (objects, polygon_path, instances or "
            "instance_path) to make polygons of: choose a data set with instances"
        )
    path = results["instance_path"]
    ids = read_label_map(path)
    require_size(ids.shape, path, results)
    divisor = results.get("instance_divisor", OBJECT_DIVISOR)
    positions, labels = object_positions(ids, results["instance_table"], path, divisor)
    slices = ndimage.find_objects(positions, len(labels))
    return [(positions[part] == i, _pixel_box(part)) for i, part in enumerate(slices, 1)], labels


def _mask_slices(mask: np.ndarray) -> tuple[slice, slice] | None:
    found = ndimage.find_objects(mask.view(np.uint8), 1)
    return found[0]


def _pixel_box(part: tuple[slice, slice]) -> np.ndarray:
    rows, columns = part
    return np.array([columns.start, rows.start, columns.stop - 1, rows.stop - 1], np.int64)
