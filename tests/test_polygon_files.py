"""Files of detected polygons: the published submission line by line, COCO's results, scores through the metrics."""

import json
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine import dist
from pycocotools.coco import COCO

import densepred.evaluation  # noqa: F401, registers the metrics
from densepred.data.class_tables import CITYSCAPES, IDD_THINGS, metainfo
from densepred.evaluation import CityscapesInstance, PolygonFiles
from densepred.evaluation.cityscapes_instance import evaluate_folders
from densepred.evaluation.coco_instance import evaluate_files, instance_ap
from densepred.evaluation.coco_results import BACKLOG_BYTES, LineWriter
from densepred.heads.polygon_masks import compose_masks
from densepred.structures import InstanceData, SegSample
from tests.test_polygon_masks import official_detections

META = metainfo(tuple(row for row in CITYSCAPES if row[2]))
SIZE = (64, 96)


def sample(number: int, rule: str | None = None, folder: str = "bonn", **fields) -> SegSample:
    """Return a frame with six random polygons, and masks where a rule is given."""
    rng = np.random.default_rng(number)
    angles = np.sort(rng.uniform(0, 2 * np.pi, (6, 12)))
    circles = np.stack([np.cos(angles), np.sin(angles)], -1) * rng.uniform(8, 25, (6, 1, 1))
    found = dict(
        polygons=torch.from_numpy(rng.uniform(0, [96, 64], (6, 1, 2)) + circles),
        labels=torch.from_numpy(rng.integers(0, 8, 6)),
        scores=torch.linspace(1, 0.3, 6, dtype=torch.float64),
        depths=torch.from_numpy(rng.permutation(6).astype(float)),
    )
    found |= fields
    if rule is not None:
        masks, kept = compose_masks(*(found[k] for k in ("polygons", "scores", "depths", "labels")), SIZE, rule)
        found = {name: value[kept] for name, value in found.items()} | dict(masks=masks[kept])
    path = f"{folder}/bonn_{number:06d}_000019_leftImg8bit.png"
    return SegSample(pred_instances=InstanceData(**found), metainfo=dict(img_path=path, img_id=number, ori_shape=SIZE))


def write(samples: list[SegSample], meta: dict = META, **settings) -> dict:
    """Run the samples through the metric and return what `polygons.json` holds."""
    metric = PolygonFiles(**settings)
    metric.dataset_meta = meta
    for one in samples:
        metric.process(None, [one.to_dict()])
    assert metric.evaluate(len(samples)) == {}
    return json.loads(Path(settings["out_dir"], "polygons.json").read_text())


def test_published_submission_is_repeated_line_by_line(tmp_path):
    detections, expected = official_detections()
    meta = dict(img_path="x/frame_leftImg8bit.png", img_id=3, ori_shape=(1024, 2048))
    write(
        [SegSample(pred_instances=InstanceData(**detections), metainfo=meta)],
        layout="cityscapes",
        out_dir=str(tmp_path),
    )
    lines = [line.split() for line in (tmp_path / "submission" / "frame.txt").read_text().splitlines()]
    assert len(lines) == len(expected["lines"])
    for (name, label, score), line in zip(lines, expected["lines"], strict=True):
        rows, columns = np.nonzero(cv2.imread(str(tmp_path / "submission" / name), cv2.IMREAD_GRAYSCALE))
        box = columns.min(), rows.min(), columns.max(), rows.max()
        assert (int(label), len(rows), *box) == tuple(line[[1, 3, 4, 5, 6, 7]])
        assert float(score) == pytest.approx(line[2], abs=1e-12)


def test_submission_and_metric_give_one_figure(tmp_path):
    """Of masks that the head composed, through `CityscapesInstance`, and of polygons, through the folder."""
    truth = tmp_path / "gtFine" / "val" / "bonn"
    truth.mkdir(parents=True)
    composed = [sample(n, "cityscapes") for n in range(4)]
    for one in composed:
        ids = np.zeros(SIZE, np.uint16)
        noisy = sample(one.img_id, "cityscapes", polygons=sample(one.img_id).pred_instances.polygons + 1).pred_instances
        for number, (mask, label) in enumerate(zip(noisy.masks, noisy.labels, strict=True)):
            ids[mask.numpy()] = 1000 * META["category_ids"][label] + number
        cv2.imwrite(str(truth / f"bonn_{one.img_id:06d}_000019_gtFine_instanceIds.png"), ids)
    settings = dict(data_root=str(tmp_path), out_dir=str(tmp_path / "metric"), score_factor=1.2)
    metric = CityscapesInstance(**settings)
    metric.dataset_meta = META
    metric.process(None, [one.to_dict() for one in composed])
    figures = metric.evaluate(4)
    assert 5 < figures["AP"] < 95
    write([sample(n) for n in range(4)], layout="cityscapes", out_dir=str(tmp_path / "files"))
    for folder in (tmp_path / "metric", tmp_path / "files" / "submission"):
        assert 100 * evaluate_folders(tmp_path / "gtFine", folder)["allAp"] == pytest.approx(figures["AP"], abs=1e-10)
    texts = [folder / "bonn_000000_000019.txt" for folder in (tmp_path / "metric", tmp_path / "files" / "submission")]
    assert texts[0].read_text() == texts[1].read_text()  # the nearest first in both
    with pytest.raises(ValueError, match=r"leftImg8bit\.png: pred_instances has no masks; set model\.head\.compose="):
        metric.process(None, [sample(0).to_dict()])


@pytest.mark.parametrize(
    ("layout", "table", "text", "mask"),
    [
        ("kitti", META, "bonn_000001_000019_leftImg8bit.txt", "bonn_000001_000019_leftImg8bit_000.png"),
        (
            "idd",
            metainfo(IDD_THINGS),
            "bonn/bonn_000001_000019_leftImg8bit.txt",
            "bonn_000001_000019_leftImg8bit_000.png",
        ),
    ],
)
def test_other_submissions_have_their_places_ids_and_raw_scores(tmp_path, layout, table, text, mask):
    one = sample(1, folder="leftImg8bit/val/bonn")
    write([one], table, layout=layout, out_dir=str(tmp_path))
    lines = [line.split() for line in (tmp_path / "submission" / text).read_text().splitlines()]
    found = one.pred_instances
    order = found.depths.argsort().tolist()
    assert [int(line[1]) for line in lines] == [table["category_ids"][found.labels[n]] for n in order]
    assert [float(line[2]) for line in lines] == found.scores[order].tolist()
    assert lines[0][0] == mask and len(lines) == 6
    parts = found.polygons, found.scores, found.depths, found.labels
    masks, _ = compose_masks(*parts, SIZE, layout)
    folder = (tmp_path / "submission" / text).parent
    for line, n in zip(lines, order, strict=True):
        assert np.array_equal(cv2.imread(str(folder / line[0]), cv2.IMREAD_GRAYSCALE) > 0, masks[n])


def test_json_holds_what_was_predicted_and_nothing_that_is_no_number(tmp_path):
    polygons = sample(2).pred_instances.polygons
    polygons[1, 3, 0] = torch.nan
    empty = sample(5)
    empty.pred_instances = empty.pred_instances[:0]
    content = write([sample(2, polygons=polygons), empty], out_dir=str(tmp_path))
    assert content["categories"][2] == {"id": 26, "name": "car"}
    one, none = content["images"]
    assert (one["id"], one["file_name"]) == (2, "bonn_000002_000019_leftImg8bit.png")
    assert (one["height"], one["width"], none["detections"]) == (64, 96, [])
    found = sample(2).pred_instances
    assert [d["score"] for d in one["detections"]] == found.scores[[0, 2, 3, 4, 5]].tolist()
    first = one["detections"][0]
    np.testing.assert_allclose(first["polygon"], polygons[0], atol=0.00501)
    assert first["depth"] == found.depths[0] and first["category"] == META["classes"][found.labels[0]]
    low, high = np.min(first["polygon"], 0), np.max(first["polygon"], 0)
    assert first["bbox"] == pytest.approx([*low, *(high - low)], abs=1e-9)
    assert len(json.loads((tmp_path / "instances_polygons.json").read_text())) == 5
    assert not list(tmp_path.glob("*.jsonl"))


@pytest.mark.parametrize(("shift", "low", "high"), [(0.5, 99.999, 100), (2.0, 20, 99)])
def test_coco_results_hold_the_polygons_in_coco_s_coordinates(tmp_path, shift, low, high):
    """By our evaluator from the file and by pycocotools from the file: both find truth that is only half a pixel off."""
    samples = [sample(n) for n in range(3)]
    truth = {"images": [], "annotations": [], "categories": [{"id": n} for n in META["category_ids"]]}
    for one in samples:
        truth["images"].append({"id": one.img_id, "height": 64, "width": 96})
        found = one.pred_instances
        for polygon, label in zip((found.polygons + shift).tolist(), found.labels, strict=True):
            known = {"id": len(truth["annotations"]) + 1, "iscrowd": 0, "area": 500, "bbox": [0, 0, 9, 9]}
            outline = {"segmentation": [np.ravel(polygon).tolist()], "category_id": META["category_ids"][label]}
            truth["annotations"].append(known | outline | {"image_id": one.img_id})
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    write(samples, out_dir=str(tmp_path))
    results = tmp_path / "instances_polygons.json"
    figure = 100 * evaluate_files(tmp_path / "gt.json", results)["stats"]["AP"]
    assert low < figure <= high
    loaded = COCO(str(tmp_path / "gt.json")).loadRes(str(results))  # pycocotools takes the file as it is
    ap = instance_ap(truth, [{**r, "segmentation": loaded.annToRLE(r)} for r in loaded.anns.values()], "segm")
    assert 100 * ap["stats"]["AP"] == pytest.approx(figure)
    for record in loaded.anns.values():
        corners = np.reshape(record["segmentation"], (-1, 2))
        np.testing.assert_allclose(record["bbox"], [*corners.min(0), *np.ptp(corners, axis=0)], atol=1e-9)


def test_without_a_folder_nothing_happens_and_mistakes_are_named(tmp_path):
    metric = PolygonFiles()
    metric.process(None, [sample(0).to_dict()])
    assert metric.evaluate(7) == {}
    with pytest.raises(ValueError, match="layout='coco'; choose among cityscapes, kitti, idd"):
        PolygonFiles("coco")
    metric = PolygonFiles(out_dir=str(tmp_path))
    metric.dataset_meta = META
    masks_only = SegSample(pred_instances=InstanceData(masks=torch.zeros(0, 4, 4)), metainfo=dict(img_path="a.png"))
    with pytest.raises(ValueError, match=r"a\.png: pred_instances has no polygons; only the PolygonHead"):
        metric.process(None, [masks_only.to_dict()])
    with pytest.raises(ValueError, match=r"label 8, outside 0\.\.7"):
        metric.process(None, [sample(0, labels=torch.full((6,), 8)).to_dict()])
    metric.process(None, [sample(0).to_dict()])
    with pytest.raises(ValueError, match="PolygonFiles counted 1 images of a data set of 2"):
        metric.evaluate(2)


def test_masks_that_wait_are_bounded_in_bytes(tmp_path):
    writer, go = LineWriter(tmp_path), threading.Event()
    written = []
    writer.add(lambda: (go.wait(10) and written.append(1)) or {}, BACKLOG_BYTES)  # one alone may have them all
    threading.Timer(0.1, go.set).start()
    writer.add(lambda: {}, 1)  # waits for the first
    assert written
    writer.close()


def test_lines_of_all_processes_become_one_file(tmp_path, monkeypatch):
    metrics = []
    for rank, numbers in enumerate(((0, 1), (2,))):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        metrics.append(PolygonFiles(out_dir=str(tmp_path)))
        metrics[rank].dataset_meta = META
        metrics[rank].process(None, [sample(n).to_dict() for n in numbers])
    metrics[1]._writer.close()  # as its own evaluate does
    other = str(metrics[1]._writer.path)
    monkeypatch.setattr(dist, "all_gather_object", lambda mine: [mine, other])
    metrics[0].evaluate(3)
    content = json.loads((tmp_path / "polygons.json").read_text())
    assert [image["id"] for image in content["images"]] == [0, 1, 2]
