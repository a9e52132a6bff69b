"""COCO's box and mask AP: files against pycocotools' numbers, the metric alone and in two processes, bad input."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.structures import InstanceData
from pycocotools import mask as mask_api

from densepred.evaluation.coco_instance import PER_CLASS, SUMMARY, CocoInstance, evaluate_and_print, evaluate_files
from densepred.evaluation.coco_results import BACKLOG, LineWriter, encode_masks
from densepred.structures import PanopticMap, SegSample

SYNTHETIC = Path(__file__).parent / "data" / "metrics" / "coco_instances_synthetic"
SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real sample data")
REAL = SHARED / "metrics" / "coco_instances_coco_tiny_val"
REAL_GT = SHARED / "data" / "coco_tiny" / "annotations" / "instances_val2017.json"
ANY_AREA = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")
"""Numbers that the stated areas of the objects do not enter."""


def assert_numbers_equal(found: dict, expected: dict) -> None:
    """Hold numbers against the official ones; null is NaN."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = float("nan") if value is None else value
        assert found[name] == pytest.approx(wanted, rel=0, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("iou_type", ["segm", "bbox"])
@pytest.mark.parametrize(
    ("folder", "gt"), [(SYNTHETIC, SYNTHETIC / "gt.json"), pytest.param(REAL, REAL_GT, marks=needs_shared)]
)
def test_files_score_as_pycocotools_says(folder, gt, iou_type):
    expected = json.loads((folder / "expected.json").read_text())[iou_type]
    record = evaluate_files(gt, folder / f"detections_{iou_type}.json", iou_type)
    assert_numbers_equal(record["stats"], expected["stats"])
    assert {str(number) for number in record["per_category"]} == expected["per_category"].keys()
    for number, values in record["per_category"].items():
        assert_numbers_equal(values, expected["per_category"][str(number)])


def decode(annotation: dict, image: dict) -> np.ndarray:
    """Return an object's mask (H, W) bool from polygons or RLE of either kind."""
    shape = annotation["segmentation"]
    if isinstance(shape, list) or isinstance(shape["counts"], list):
        shape = mask_api.frPyObjects(shape, image["height"], image["width"])
    return mask_api.decode(mask_api.merge(shape) if isinstance(shape, list) else shape).astype(bool)


def instances(records: list[dict], image: dict, meta: dict, **extra) -> InstanceData:
    masks = [decode(record, image) for record in records]
    masks = np.array(masks, bool).reshape(len(masks), image["height"], image["width"])
    labels = [meta["category_ids"].index(record["category_id"]) for record in records]
    return InstanceData(masks=torch.from_numpy(masks), labels=torch.tensor(labels, dtype=torch.int64), **extra)


def synthetic_samples() -> tuple[list[SegSample], dict]:
    """Return the synthetic fixture as samples with truth and predictions, and its data set's meta."""
    truth = json.loads((SYNTHETIC / "gt.json").read_text())
    masks, boxes = (json.loads((SYNTHETIC / f"detections_{name}.json").read_text()) for name in ("segm", "bbox"))
    categories = truth["categories"]
    meta = {
        "classes": tuple(category["name"] for category in categories),
        "isthing": (True,) * len(categories),
        "category_ids": tuple(category["id"] for category in categories),
    }
    samples = []
    for image in truth["images"]:
        objects = [record for record in truth["annotations"] if record["image_id"] == image["id"]]
        found = [number for number, record in enumerate(masks) if record["image_id"] == image["id"]]
        xywh = torch.tensor([boxes[n]["bbox"] for n in found], dtype=torch.float64).reshape(-1, 4)
        scores = torch.tensor([masks[n]["score"] for n in found], dtype=torch.float64)
        bboxes = torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1)
        sample = SegSample(metainfo={"img_path": image["file_name"], "img_id": image["id"]})
        sample.pred_instances = instances([masks[n] for n in found], image, meta, scores=scores, bboxes=bboxes)
        crowd = torch.tensor([bool(record["iscrowd"]) for record in objects])
        sample.gt_instances = instances(objects, image, meta, iscrowd=crowd)
        samples.append(sample)
    return samples, meta


@pytest.fixture(scope="module")
def synthetic() -> tuple[list[SegSample], dict]:
    return synthetic_samples()


def metric_for(meta: dict, **settings) -> CocoInstance:
    metric = CocoInstance(**settings)
    metric.dataset_meta = meta
    return metric


def from_file(**settings) -> dict:
    return {"data_root": str(SYNTHETIC), "ann_file": "gt.json", **settings}


def official(iou_type: str) -> dict[str, float]:
    """Return the summary in percent under the metric's names."""
    stats = json.loads((SYNTHETIC / "expected.json").read_text())[iou_type]["stats"]
    return {("" if iou_type == "segm" else "bbox_") + name: 100 * value for name, value in stats.items()}


def test_metric_gives_the_official_numbers(synthetic, tmp_path, capsys):
    samples, meta = synthetic
    settings = from_file(iou_types=["segm", "bbox"], out_dir=str(tmp_path))
    evaluator = Evaluator([dict(type="densepred.CocoInstance", **settings)])
    evaluator.dataset_meta = meta
    for start in range(0, len(samples), 4):
        evaluator.process(samples[start : start + 4])
    metrics = evaluator.evaluate(len(samples))
    assert_numbers_equal(metrics, official("segm") | official("bbox"))
    metric = evaluator.metrics[0]
    expected = json.loads((SYNTHETIC / "expected.json").read_text())
    assert set(metric.per_class) == set(meta["classes"])
    assert_numbers_equal(
        metric.per_class["c17"],
        expected["segm"]["per_category"]["17"]
        | {f"bbox_{name}": value for name, value in expected["bbox"]["per_category"]["17"].items()},
    )
    for iou_type in ("segm", "bbox"):  # the files are in the official format and say the same
        record = evaluate_files(SYNTHETIC / "gt.json", tmp_path / f"instances_{iou_type}.json", iou_type)
        assert_numbers_equal(record["stats"], expected[iou_type]["stats"])
        assert_numbers_equal(metric.metrics_record()[iou_type]["stats"], expected[iou_type]["stats"])
    assert "bbox" not in json.loads((tmp_path / "instances_segm.json").read_text())[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["instances_bbox.json", "instances_segm.json"]
    assert "Running per image evaluation" not in capsys.readouterr().out


def test_truth_of_the_samples(synthetic):
    samples, meta = synthetic
    metric = metric_for(meta, iou_types=("segm",))
    for _ in range(2):  # nothing of the first evaluation is left in the second
        metric.process(None, [sample.to_dict() for sample in samples])
        assert metric._writer is not None and len(metric._writer._pending) <= BACKLOG
        folder = metric._writer.path.parent
        metrics = metric.evaluate(len(samples))
        assert {name: metrics[name] for name in ANY_AREA} == pytest.approx(
            {name: official("segm")[name] for name in ANY_AREA}, abs=1e-9
        )
        assert not folder.exists()


def panoptic_sample(image_id: int | str = "a") -> tuple[SegSample, dict]:
    """Return a sample: an object, a crowd and stuff as truth; found are the object and a piece of the crowd."""
    meta = {"classes": ("cat", "dog", "sky"), "isthing": (True, True, False), "category_ids": (3, 7, 9)}
    ids = torch.zeros(20, 30, dtype=torch.int64)
    ids[:8], ids[8:14, :10], ids[14:, 10:] = 1, 2, 5
    segments = [
        {"id": 1, "label": 2, "isthing": False, "iscrowd": False},
        {"id": 2, "label": 1, "isthing": True, "iscrowd": False},
        {"id": 5, "label": 1, "isthing": True, "iscrowd": True},
    ]
    sample = SegSample(metainfo={"img_path": f"{image_id}.png", "img_id": image_id})
    sample.gt_panoptic = PanopticMap(ids, segments)
    masks = torch.stack([ids == 2, ids == 5])
    masks[1, :, 20:] = False
    sample.pred_instances = InstanceData(masks=masks, labels=torch.tensor([1, 1]), scores=torch.tensor([0.5, 0.9]))
    return sample, meta


def test_truth_of_a_panoptic_map():
    sample, meta = panoptic_sample()
    metric = metric_for(meta)
    metric.process(None, [sample.to_dict()])
    metrics = metric.evaluate(1)
    assert metrics["AP"] == pytest.approx(100)  # as a plain object the crowd would be missed and its piece be wrong
    assert metrics["AR1"] == 0  # the piece of the crowd uses the one detection up
    assert set(metric.per_class) == {"cat", "dog"}
    assert np.isnan(metric.per_class["cat"]["AP"]) and metric.per_class["dog"]["AP"] == pytest.approx(1)


def test_no_detection_at_all_gives_zero(synthetic, tmp_path):
    samples, meta = synthetic
    metric = metric_for(meta, **from_file(iou_types=("segm", "bbox")))
    for sample in samples:
        empty = sample.new(pred_instances=sample.pred_instances[:0])
        metric.process(None, [empty.to_dict()])
    metrics = metric.evaluate(len(samples))
    assert set(metrics) == {*SUMMARY, *(f"bbox_{name}" for name in SUMMARY)} and set(metrics.values()) == {0.0}
    (tmp_path / "none.json").write_text("[]")
    assert evaluate_files(SYNTHETIC / "gt.json", tmp_path / "none.json")["stats"]["AP"] == 0


def test_images_without_detections_count_and_absent_ones_do_not(synthetic, tmp_path):
    samples, meta = synthetic
    part = [sample for sample in samples if len(sample.pred_instances) and len(sample.gt_instances)][:4]
    emptied = part[0].new(pred_instances=part[0].pred_instances[:0])
    metric = metric_for(meta, **from_file())
    metric.process(None, [sample.to_dict() for sample in [emptied, *part[1:]]])
    metrics = metric.evaluate(len(part))

    truth, found = (json.loads((SYNTHETIC / f"{name}.json").read_text()) for name in ("gt", "detections_segm"))
    kept = {sample.img_id for sample in part}
    truth["images"] = [image for image in truth["images"] if image["id"] in kept]
    truth["annotations"] = [record for record in truth["annotations"] if record["image_id"] in kept]
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    found = [record for record in found if record["image_id"] in kept - {part[0].img_id}]
    (tmp_path / "pred.json").write_text(json.dumps(found))
    expected = evaluate_files(tmp_path / "gt.json", tmp_path / "pred.json")["stats"]
    assert_numbers_equal(metrics, {name: 100 * value for name, value in expected.items()})
    assert 0 < metrics["AP"] < 100


def one_image(tmp_path: Path, **changes) -> tuple[Path, Path]:
    """Write a truth of one object with annotation id 0 and a result that is exactly it."""
    mask = np.zeros((40, 50), bool)
    mask[5:25, 10:30] = True
    (rle,) = encode_masks(mask[None])
    crowded = {"id": 0, "image_id": 1, "category_id": 4, "area": 400, "bbox": [10, 5, 20, 20], "segmentation": rle}
    images, categories = [{"id": 1, "height": 40, "width": 50}], [{"id": 4, "name": "thing"}, {"id": 5, "name": "x"}]
    truth = {"images": images, "annotations": [crowded], "categories": categories} | changes.pop("truth", {})
    result = {"image_id": 1, "category_id": 4, "score": 0.5, "segmentation": rle, **changes}
    paths = tmp_path / "gt.json", tmp_path / "pred.json"
    paths[0].write_text(json.dumps(truth))
    paths[1].write_text(json.dumps([{key: value for key, value in result.items() if value is not None}]))
    return paths


def test_traps_of_pycocotools_are_closed(tmp_path):
    gt, pred = one_image(tmp_path, bbox=[0, 0, 50, 40])  # the box is of medium size, the mask small
    stats = evaluate_files(gt, pred)["stats"]
    assert stats["AP"] == stats["APs"] == pytest.approx(1)
    assert np.isnan(stats["APm"])


def test_command_prints_a_table_and_writes_null(tmp_path, capsys):
    gt, pred = one_image(tmp_path)
    evaluate_and_print(str(gt), str(pred), out=str(tmp_path / "new" / "ap.json"))
    assert "thing" in (printed := capsys.readouterr().out) and "100.00" in printed and "Mask AP" in printed
    written = json.loads((tmp_path / "new" / "ap.json").read_text())
    assert written["stats"]["APl"] is None and written["per_category"]["4"]["AP"] == pytest.approx(1)
    assert list(written["per_category"]["5"].values()) == [None] * len(PER_CLASS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": None}, r"pred\.json\[0\]: lacks `score`"),
        ({"segmentation": None}, r"pred\.json\[0\]: lacks `segmentation`"),
        ({"score": "high"}, "score 'high' is no number"),
        ({"image_id": 7}, r"pred\.json\[0\]: image_id 7, which the ground truth lacks"),
        ({"category_id": 1}, "category_id 1, which the ground truth lacks"),
        ({"segmentation": "1 1 9 1 9 9"}, "no compressed RLE"),
        (
            {"segmentation": [[1, 1, 9, 1]]},
            r"holds \[1, 1, 9, 1\]; a polygon is \[x, y, \.\.\.\] of three points at least",
        ),
        ({"segmentation": [[1, 1, 9, 1, 9, math.nan]]}, "a polygon is"),
        ({"segmentation": []}, "a polygon is"),
        ({"segmentation": {"size": [50, 40], "counts": "0"}}, r"mask of \[50, 40\] in an image of \[40, 50\]"),
        ({"truth": {"images": []}}, r"gt\.json: annotations\[0\]: image_id 1, which the file lacks"),
        ({"truth": {"categories": {}}}, r"gt\.json: lacks the list `categories`"),
        ({"truth": {"annotations": [{"image_id": 1, "category_id": 4, "area": 1}]}}, "lacks `segmentation`"),
        ({"truth": {"categories": [{"id": 4}, {"id": 4}]}}, "ids must be unique"),
    ],
)
def test_wrong_files_are_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_files(*one_image(tmp_path, **changes))


def test_files_of_another_kind_are_named(tmp_path):
    gt, pred = one_image(tmp_path)
    with pytest.raises(ValueError, match=r"\[0\]: lacks `bbox`"):
        evaluate_files(gt, pred, "bbox")
    with pytest.raises(ValueError, match="choose one of segm, bbox"):
        evaluate_files(gt, pred, "keypoints")
    with pytest.raises(ValueError, match="dict at the top"):
        evaluate_files(gt, gt)
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        evaluate_files(gt, tmp_path / "none.json")
    pred.write_text("[{")
    with pytest.raises(ValueError, match="not JSON"):
        evaluate_files(gt, pred)


def test_metric_rejects_what_does_not_fit(synthetic, tmp_path):
    samples, meta = synthetic
    with pytest.raises(FileNotFoundError, match=r"ann_file .*absent\.json does not exist"):
        CocoInstance(str(SYNTHETIC), "absent.json")
    with pytest.raises(ValueError, match="choose among segm, bbox"):
        CocoInstance(iou_types=("mask",))
    other = {"classes": ("c1", "c3"), "isthing": (True, True), "category_ids": (1, 3)}
    with pytest.raises(ValueError, match=r"no things of its categories \[2, 5, 17, 44, 90\]"):
        metric_for(other, **from_file()).process(None, [samples[0].to_dict()])
    unknown = samples[0].new(metainfo={"img_path": "x.jpg", "img_id": 5})
    with pytest.raises(ValueError, match=r"x\.jpg: image id 5 is not in"):
        metric_for(meta, **from_file()).process(None, [unknown.to_dict()])
    resized = samples[0].new(pred_instances=InstanceData(**one_prediction((3, 4))))
    with pytest.raises(ValueError, match="the predicted masks are 3x4 pixels and the ground truth 241x342"):
        metric_for(meta, **from_file()).process(None, [resized.to_dict()])
    with pytest.raises(ValueError, match=r"label 9, outside 0\.\.5"):
        wrong = samples[0].new(pred_instances=InstanceData(**one_prediction((241, 342), label=9)))
        metric_for(meta, **from_file()).process(None, [wrong.to_dict()])
    with pytest.raises(ValueError, match="pred_instances lacks bboxes"):
        metric_for(meta, **from_file(iou_types=("bbox",))).process(None, [resized.to_dict()])
    outlines = InstanceData(polygons=torch.zeros(1, 4, 2), labels=torch.tensor([0]), scores=torch.ones(1))
    with pytest.raises(ValueError, match=r"lacks masks, .*set model\.head\.compose='each'"):
        metric_for(meta, **from_file()).process(None, [samples[0].new(pred_instances=outlines).to_dict()])
    with pytest.raises(ValueError, match="neither gt_instances nor gt_panoptic"):
        metric_for(meta).process(None, [resized.new(pred_instances=resized.pred_instances).to_dict()])


def one_prediction(size: tuple[int, int], label: int = 0) -> dict[str, torch.Tensor]:
    return {"masks": torch.ones(1, *size, dtype=torch.bool), "labels": torch.tensor([label]), "scores": torch.ones(1)}


def test_a_failure_in_the_encoding_thread_arrives(tmp_path):
    def fail() -> dict:
        raise RuntimeError("no such mask")

    writer = LineWriter(tmp_path)
    writer.add(dict)
    writer.add(fail)
    with pytest.raises(RuntimeError, match="no such mask"):
        writer.close()


def run_rank(rank: int, folder: str) -> None:
    """Run one of two processes: an uneven split without padding, then one with an image too many."""
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    samples, meta = synthetic_samples()
    metric = metric_for(meta, **from_file(out_dir=f"{folder}/out"))
    metric.process(None, [sample.to_dict() for sample in samples[rank::3]])
    metric.process(None, [sample.to_dict() for sample in samples[2::3]] if rank else [])
    metrics = metric.evaluate(len(samples))
    padded = metric_for(meta, **from_file())
    padded.process(None, [sample.to_dict() for sample in [*samples[rank::2], samples[0]]])
    try:
        error = str(padded.evaluate(len(samples)))
    except ValueError as raised:
        error = str(raised)
    record = {"metrics": metrics, "error": error, "classes": sorted(metric.per_class)}
    Path(folder, f"rank{rank}.json").write_text(json.dumps(record))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_numbers_and_detect_padding(tmp_path):
    code = "import sys; from tests.test_coco_instance import run_rank; run_rank(int(sys.argv[1]), sys.argv[2])"
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for rank in (0, 1):
        record = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert_numbers_equal(record["metrics"], official("segm"))
        assert "32 images of a data set of 30" in record["error"] and len(record["classes"]) == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["instances_segm.json"]
