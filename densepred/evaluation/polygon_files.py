"""Detected polygons in files: coordinates as JSON, COCO's results, and the submission folders of street scenes.

Depth order, circles and minimal sizes are decided where masks are composed (`densepred.heads.polygon_masks`); here only names,
places and scores are. Source of the folders: the writers of https://github.com/KatiaJDL/CenterPoly-v2.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine import dist
from mmengine.evaluator import BaseMetric

from densepred.evaluation.cityscapes_instance import FolderWriter
from densepred.evaluation.coco_results import LineWriter, read_lines, write_results
from densepred.evaluation.record import check_counted
from densepred.heads.polygon_masks import compose_masks, depth_order, round_coordinates
from densepred.ops.polygon_fill import COCO_SHIFT, coco_polygon
from densepred.registry import METRICS
from densepred.structures import require_fields

POLYGONS, RESULTS = "polygons.json", "instances_polygons.json"


class Layout(NamedTuple):
    """A submission folder: text files of ``mask label_id score`` lines and one PNG a mask.

    Attributes:
        mask_dir: folder of the masks beside the text files; empty: none of their own.
        by_sequence: whether files lie in a folder named like that of the image.
        suffix: end of the image's name that the text file's lacks.
        score_factor: of written scores, which end at 1.
    """

    mask_dir: str = ""
    by_sequence: bool = False
    suffix: str = ""
    score_factor: float = 1.0


LAYOUTS = {
    "cityscapes": Layout(mask_dir="masks", suffix="_leftImg8bit", score_factor=1.2),
    "kitti": Layout(),
    "idd": Layout(by_sequence=True),
}
"""By the name of the rule whose masks they hold, see `densepred.heads.polygon_masks.RULES`."""


def polygon_record(sample: Mapping, meta: Mapping) -> dict[str, Any]:
    """Return an image's detections: ``id``, ``file_name``, ``height``, ``width``, ``detections``.

    A detection has ``category_id``, ``category``, ``score``, ``depth`` (lower = nearer), ``bbox`` (x, y, width, height) and
    ``polygon`` ([[x, y], ...]) in pixels of the image, not clipped to it. Polygons with a vertex that is not finite are left
    out.

    Args:
        sample: in MMEngine's dict form, with ``pred_instances``, ``img_id``, ``img_path`` and ``ori_shape``.
        meta: ``classes`` and ``category_ids`` of the data set.

    Raises:
        ValueError: the prediction has no polygons, or a label outside the classes.
    """
    (found,) = require_fields(sample, "pred_instances")
    where = sample.get("img_path", "a sample")
    if "polygons" not in found:
        raise ValueError(f"{where}: pred_instances has no polygons; only the PolygonHead predicts them")
    vertices = round_coordinates(found["polygons"].detach().cpu().double().numpy())  # (N, V, 2)
    labels = found["labels"].tolist()
    scores, depths = found["scores"].tolist(), found["depths"].tolist()
    detections = []
    for n in np.flatnonzero(np.isfinite(vertices).all(axis=(1, 2))).tolist():
        label, low, high = labels[n], vertices[n].min(axis=0), vertices[n].max(axis=0)
        if not 0 <= label < len(meta["classes"]):
            raise ValueError(f"{where}: an instance has label {label}, outside 0..{len(meta['classes']) - 1}")
        detections.append(
            {
                "category_id": int(meta["category_ids"][label]),
                "category": meta["classes"][label],
                "score": scores[n],
                "depth": depths[n],
                "bbox": round_coordinates(np.concatenate([low, high - low])).tolist(),
                "polygon": vertices[n].tolist(),
            }
        )
    height, width = sample["ori_shape"]
    record = {"id": sample["img_id"], "file_name": Path(where).name, "height": height, "width": width}
    return {**record, "detections": detections}


def coco_results(records: Iterable[Mapping]) -> Iterator[dict[str, Any]]:
    """Yield COCO's result records, the segmentation as a list of polygons, of images of `polygon_record`.

    Coordinates are COCO's, half a pixel more. pycocotools fills without the outlines, so that masks are half a pixel narrower
    on every side than those of the rule ``each`` and small objects score less: for AP send ``instances_segm.json``.

    pycocotools 2.0 loads such a file, since every record has a ``bbox``; it then takes areas from the boxes, so that AP of
    small, medium and large differs a little from that of `densepred.evaluation.coco_instance`, which fills the polygons.
    """
    for image in records:
        for found in image["detections"]:
            kept = {name: found[name] for name in ("category_id", "score")}
            x, y, width, height = found["bbox"]
            box = [x + COCO_SHIFT, y + COCO_SHIFT, width, height]
            outline = coco_polygon(np.array(found["polygon"]))
            yield {"image_id": image["id"], **kept, "bbox": box, "segmentation": [outline]}


def write_polygons(path: str | Path, records: Iterable[Mapping], meta: Mapping) -> int:
    """Write images of `polygon_record` as one JSON, ``categories`` and ``images``, a line an image; return their number."""
    categories = [
        {"id": int(number), "name": name} for number, name in zip(meta["category_ids"], meta["classes"], strict=True)
    ]
    count = 0
    with Path(path).open("w", encoding="utf-8") as out:
        out.write('{"categories": ' + json.dumps(categories) + ',\n"images": [')
        for record in records:
            out.write((",\n" if count else "\n") + json.dumps(record))
            count += 1
        out.write("\n]}\n")
    return count


def write_folder(writer: FolderWriter, layout: Layout, sample: Mapping, rule: str, meta: Mapping) -> None:
    """Write an image's masks and its text file, the nearest detection first.

    Args:
        writer: of the submission folder, with the layout's ``mask_dir``.
        layout: one of `LAYOUTS`.
        sample: as of `polygon_record`; masks of the prediction are written as they are, without any the polygons are composed
            by ``rule``.
        rule: a key of `densepred.heads.polygon_masks.RULES`.
        meta: ``category_ids`` of the data set.
    """
    found = sample["pred_instances"]
    labels, scores = found["labels"].cpu(), found["scores"].cpu().double()
    if "masks" in found:
        masks, kept = found["masks"].cpu(), torch.ones(len(labels), dtype=torch.bool)
    else:
        parts = (found[name].cpu() for name in ("polygons", "scores", "depths", "labels"))
        masks, kept = compose_masks(*parts, sample["ori_shape"], rule)
    order = [n for n in depth_order(found) if kept[n]]
    path = Path(sample["img_path"])
    frame = path.stem.removesuffix(layout.suffix)
    writer.write(
        f"{path.parent.name}/{frame}" if layout.by_sequence else frame,
        [masks[n].numpy() for n in order],
        [int(meta["category_ids"][labels[n]]) for n in order],
        [min(1.0, layout.score_factor * float(scores[n])) for n in order],
    )


@METRICS.register_module()
class PolygonFiles(BaseMetric):
    """Writes the polygons of `SegSample` with ``pred_instances`` to files and measures nothing; idle without ``out_dir``.

    Written are ``polygons.json`` (see `polygon_record`), ``instances_polygons.json`` (see `coco_results`), and with a layout
    the folder ``submission/``.

    Args:
        layout: a key of `LAYOUTS`: whose submission folder to write; ids are the data set's.
        out_dir: where to write.

    Raises:
        ValueError: the layout is unknown.
    """

    def __init__(self, layout: str | None = None, out_dir: str | None = None) -> None:
        super().__init__(prefix="polygons")  # without one MMEngine warns; `evaluate` does without
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(f"PolygonFiles: layout={layout!r}; choose among {', '.join(LAYOUTS)}")
        self.layout = layout
        self.out_dir = None if out_dir is None else Path(out_dir)
        self._writer: LineWriter | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Write a batch of samples (as dictionaries, see MMEngine's ``Evaluator``)."""
        if self.out_dir is None:
            return
        if self._writer is None:
            self._writer = LineWriter(self.out_dir, dist.get_rank())
        for sample in data_samples:
            record = polygon_record(sample, self.dataset_meta)
            self._writer.add(partial(dict, record))
            if self.layout is not None:
                layout = LAYOUTS[self.layout]
                folder = FolderWriter(self.out_dir / "submission", layout.mask_dir)
                write_folder(folder, layout, sample, self.layout, self.dataset_meta)

    def evaluate(self, size: int) -> dict[str, float]:
        """Join the processes' lines into the JSON files; the same on every rank, no figures.

        Args:
            size: Images in the data set.

        Raises:
            ValueError: The processes together did not see each image once, or their files are not shared.
        """
        if self.out_dir is None:
            return {}
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        paths = [path for path in dist.all_gather_object(None if writer is None else str(writer.path)) if path]
        outcome: list[ValueError | None] = [None]
        if dist.is_main_process():
            try:  # an error on rank 0 alone would leave the others waiting
                images = write_polygons(self.out_dir / POLYGONS, read_lines(paths), self.dataset_meta)
                check_counted("PolygonFiles", images, size)
                write_results(self.out_dir / RESULTS, coco_results(read_lines(paths)))
            except ValueError as error:
                outcome = [error]
        dist.broadcast_object_list(outcome)
        if writer is not None:
            writer.remove()
        if outcome[0] is not None:
            raise outcome[0]
        return {}

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Return no figures."""
        return {}
