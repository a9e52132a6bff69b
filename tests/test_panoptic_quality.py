"""Panoptic quality: counts against the official tool's numbers, the metric alone and in two processes."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator

from densepred.evaluation.coco_format import read_id_map
from densepred.evaluation.panoptic import PanopticQuality, evaluate_files, panoptic_counts, panoptic_quality
from densepred.evaluation.table import panoptic_table
from densepred.structures import PanopticMap, SegSample

METRICS = Path(__file__).parent / "data" / "metrics"
SYNTHETIC = METRICS / "panoptic_synthetic"
SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real sample data")
COLUMNS = ("iou_sum", "tp", "fp", "fn")


def assert_record_equal(record: dict, expected: dict) -> None:
    """Hold every number of a record against the official tool's, to 1e-12 of it."""
    assert record.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_record_equal(record[key], value)
        else:
            assert record[key] == pytest.approx(value, rel=1e-12, abs=1e-12), key


def coco_case(name: str, gt: str) -> tuple[tuple[Path, ...], dict]:
    folder, truth = SHARED / "metrics" / name, SHARED / "data" / gt
    expected = json.loads((folder / "expected.json").read_text())
    return (truth.with_suffix(".json"), truth, folder / "pred.json", folder / "pred"), expected


def fixture_case(name: str, gt: str, pred: str) -> tuple[tuple[Path, ...], dict]:
    folder = METRICS / name
    expected = json.loads((folder / "expected.json").read_text())
    expected.pop("edge_cases", None)
    return (folder / f"{gt}.json", folder / gt, folder / f"{pred}.json", folder / pred), expected


@pytest.mark.parametrize(
    "case",
    [
        lambda: fixture_case("panoptic_synthetic", "gt", "pred"),
        lambda: fixture_case("cityscapes_panoptic", "gt_panoptic", "pred_panoptic"),
        pytest.param(
            lambda: coco_case("panoptic_coco_sample", "coco_panoptic_sample/panoptic_examples"), marks=needs_shared
        ),
        pytest.param(
            lambda: coco_case("panoptic_coco128_val", "coco128/annotations/panoptic_val2017"), marks=needs_shared
        ),
    ],
)
def test_files_score_as_the_official_tool_says(case):
    paths, expected = case()
    assert_record_equal(evaluate_files(*paths), expected)


def synthetic_samples() -> tuple[list[SegSample], dict]:
    """Return the synthetic fixture as samples, and its data set's meta."""
    truth, prediction = (json.loads((SYNTHETIC / f"{name}.json").read_text()) for name in ("gt", "pred"))
    categories = truth["categories"]
    meta = {
        "classes": tuple(c["name"] for c in categories),
        "isthing": tuple(bool(c["isthing"]) for c in categories),
        "category_ids": tuple(c["id"] for c in categories),
    }

    def panoptic_map(folder: str, record: dict) -> PanopticMap:
        ids = torch.from_numpy(read_id_map(SYNTHETIC / folder / record["file_name"]).astype(np.int64))
        label = meta["category_ids"].index
        segments = [
            {"id": s["id"], "label": label(s["category_id"]), "iscrowd": bool(s.get("iscrowd"))}
            for s in record["segments_info"]
        ]
        return PanopticMap(ids, segments)

    samples = []
    for true, pred in zip(truth["annotations"], prediction["annotations"], strict=True):
        stem = Path(true["file_name"]).stem
        sample = SegSample(metainfo={"img_path": f"images/{stem}.jpg", "img_id": true["image_id"]})
        sample.gt_panoptic, sample.pred_panoptic = panoptic_map("gt", true), panoptic_map("pred", pred)
        samples.append(sample)
    return samples, meta


def test_edge_cases_one_by_one():
    expected = json.loads((SYNTHETIC / "expected.json").read_text())["edge_cases"]
    samples, meta = synthetic_samples()
    by_id = {sample.img_id: sample for sample in samples}
    assert len(expected) == 7
    for case in expected:
        gt, pred = by_id[case["image_id"]].gt_panoptic, by_id[case["image_id"]].pred_panoptic
        counts = panoptic_counts(gt.numpy(), gt.segments, pred.numpy(), pred.segments, len(meta["classes"]))
        wanted = np.zeros_like(counts)
        for category, values in case["per_class"].items():
            wanted[meta["category_ids"].index(int(category))] = [values[column] for column in COLUMNS]
        np.testing.assert_allclose(counts, wanted, rtol=0, atol=1e-12, err_msg=case["what"])


@needs_shared
def test_real_cityscapes_maps_with_a_rule_as_prediction():
    import cv2
    from cityscapesscripts.helpers.labels import id2label

    classes = [number for number, label in id2label.items() if number >= 0 and not label.ignoreInEval]

    def segments(ids: np.ndarray) -> list[dict]:
        numbers = [int(number) for number in np.unique(ids) if number]
        return [
            {"id": n, "label": classes.index(c), "iscrowd": n < 1000 and id2label[c].hasInstances}
            for n in numbers
            for c in [n // 1000 if n >= 1000 else n]
        ]

    counts = np.zeros((len(classes), 4))
    for path in sorted((SHARED / "data/cityscapes_sample/gtFine/val/frankfurt").glob("*_instanceIds.png")):
        truth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED).astype(np.int32)
        semantic = np.where(truth >= 1000, truth // 1000, truth)
        truth[~np.isin(semantic, classes)] = 0
        rows, columns = (np.minimum(np.arange(n) // 8 * 8 + 4, n - 1) for n in truth.shape)
        prediction = truth[rows][:, columns]
        groups = [s["id"] for s in segments(prediction) if s["iscrowd"]]
        prediction[np.isin(prediction, groups)] = 0
        counts += panoptic_counts(truth, segments(truth), prediction, segments(prediction), len(classes))

    expected = json.loads((SHARED / "metrics/cityscapes_real_rule/expected.json").read_text())["panoptic"]
    quality = panoptic_quality(counts, [id2label[c].hasInstances for c in classes])
    per_class = {str(c): values for c, values in zip(classes, quality["per_class"], strict=True)}
    assert_record_equal({key: ({**quality, "per_class": per_class})[key] for key in expected}, expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_maps_without_any_run_agree_with_counting_masks(dtype):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, (7, 9)).astype(dtype)
    kept = rng.random((7, 9)) < np.array([0.9, 0.9, 0.8, 0.2])[truth]
    prediction = np.where(kept, truth, rng.integers(0, 4, (7, 9))).astype(dtype)
    segments = [{"id": number, "label": number - 1, "iscrowd": False} for number in (1, 2, 3)]
    expected = np.zeros((3, 4))
    for number in (1, 2, 3):
        true, pred = truth == number, prediction == number
        iou = (true & pred).sum() / ((true | pred) & ~(pred & (truth == 0))).sum()
        forgiven = (pred & (truth == 0)).sum() / pred.sum() > 0.5
        expected[number - 1] = [iou, 1, 0, 0] if iou > 0.5 else [0, 0, not forgiven, 1]
    assert 0 < expected[:, 1].sum() < 3  # matches and misses both occur
    np.testing.assert_allclose(panoptic_counts(truth, segments, prediction, segments, 3), expected, atol=1e-12)


def test_no_class_with_a_count_is_nan_and_raises_nothing():
    void = np.zeros((4, 4), np.int64)
    predicted = np.ones((4, 4), np.int64)
    counts = panoptic_counts(void, [], predicted, [{"id": 1, "label": 1}], 2)
    quality = panoptic_quality(counts, [True, False])
    assert np.isnan(quality["All"]["pq"]) and quality["All"]["n"] == 0
    assert [c["pq"] for c in quality["per_class"]] == [0, 0]


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        (np.ones((2, 3)), [{"id": 1, "label": 0}], r"prediction is 2x3 pixels and the ground truth 2x2"),
        (np.array([[1, 9], [9, 1]]), [{"id": 1, "label": 0}], r"segments \[9\] that its records lack"),
        (np.ones((2, 2)), [{"id": 1, "label": 0}, {"id": 5, "label": 0}], r"segments \[5\] without a pixel"),
        (np.ones((2, 2)), [{"id": 1, "label": 2}], r"predicted segment 1 has label 2, outside 0..1"),
    ],
)
def test_a_prediction_that_does_not_fit_is_an_error(ids, segments, message):
    with pytest.raises(ValueError, match=message):
        panoptic_counts(np.zeros((2, 2), int), [], ids.astype(int), segments, 2)


def metric_for(meta: dict, **kwargs) -> PanopticQuality:
    metric = PanopticQuality(**kwargs)
    metric.dataset_meta = meta
    return metric


def test_metric_under_the_evaluator_gives_percent_and_a_record():
    samples, meta = synthetic_samples()
    evaluator = Evaluator([metric_for(meta)])
    evaluator.dataset_meta = meta
    for start in range(0, len(samples), 8):
        evaluator.process(samples[start : start + 8])
    metrics = evaluator.evaluate(len(samples))
    _, expected = fixture_case("panoptic_synthetic", "gt", "pred")
    for suffix, group in (("", "All"), ("_th", "Things"), ("_st", "Stuff")):
        for score in ("PQ", "SQ", "RQ"):
            assert metrics[score + suffix] == pytest.approx(100 * expected[group][score.lower()], abs=1e-10)
    assert len(metrics) == 9
    metric = evaluator.metrics[0]
    names = dict(zip(map(str, meta["category_ids"]), meta["classes"], strict=True))
    by_name = {names[number]: values for number, values in expected["per_class"].items()}
    assert_record_equal(metric.metrics_record(), {**expected, "per_class": by_name})
    assert metric.per_class == metric.metrics_record()["per_class"]


def test_metric_begins_anew_after_each_evaluation():
    samples, meta = synthetic_samples()
    metric = metric_for(meta)
    first, second = ([sample.to_dict() for sample in part] for part in (samples[:20], samples[20:30]))
    metric.process(None, second)
    alone = metric.evaluate(10)
    metric.process(None, first)
    metric.evaluate(20)
    metric.process(None, second)
    assert metric.evaluate(10) == alone
    assert "PQ" in alone


def test_memory_does_not_grow_with_the_images():
    samples, meta = synthetic_samples()
    metric, sizes = metric_for(meta), []
    for sample in samples:
        metric.process(None, [sample.to_dict()])
        sizes.append(len(pickle.dumps(vars(metric))))
    assert max(sizes) == min(sizes)


def test_an_image_counted_twice_is_an_error_that_names_the_remedy():
    samples, meta = synthetic_samples()
    metric = metric_for(meta)
    metric.process(None, [samples[0].to_dict(), samples[0].to_dict()])
    with pytest.raises(ValueError, match=r"counted 2 images of a data set of 1.*round_up=False"):
        metric.evaluate(1)


def test_written_predictions_score_the_same(tmp_path):
    samples, meta = synthetic_samples()
    metric = metric_for(meta, out_dir=str(tmp_path))
    metric.process(None, [sample.to_dict() for sample in samples])
    metric.evaluate(len(samples))
    paths, expected = fixture_case("panoptic_synthetic", "gt", "pred")
    record = evaluate_files(*paths[:2], tmp_path / "predictions.json", tmp_path / "predictions")
    assert_record_equal(record, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["predictions", "predictions.json"]


def test_two_images_of_one_name_are_an_error(tmp_path):
    samples, meta = synthetic_samples()
    metric = metric_for(meta, out_dir=str(tmp_path))
    metric.process(None, [samples[0].to_dict(), samples[0].to_dict()])
    with pytest.raises(ValueError, match=r"2 images have 1 file names"):
        metric.evaluate(2)


def evaluate_a_share(rank: int, folder: str) -> None:
    """Run one of two processes: an uneven split without padding, then one with an image too many."""
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    samples, meta = synthetic_samples()
    metric = metric_for(meta, out_dir=f"{folder}/out")
    metric.process(None, [sample.to_dict() for sample in samples[rank::2]])
    metrics = metric.evaluate(len(samples))
    padded = metric_for(meta)
    padded.process(None, [sample.to_dict() for sample in [*samples[rank::2], samples[0]][:29]])
    try:
        error = str(padded.evaluate(len(samples)))
    except ValueError as raised:
        error = str(raised)
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"metrics": metrics, "error": error}))
    torch.distributed.destroy_process_group()


def test_two_processes_sum_up_and_detect_padding(tmp_path):
    torch.multiprocessing.spawn(evaluate_a_share, (str(tmp_path),), nprocs=2)
    paths, expected = fixture_case("panoptic_synthetic", "gt", "pred")
    for rank in (0, 1):
        result = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert result["metrics"]["PQ"] == pytest.approx(100 * expected["All"]["pq"], abs=1e-10)
        assert "counted 58 images of a data set of 57" in result["error"]
        assert "round_up=False" in result["error"]
    written = tmp_path / "out"
    assert_record_equal(evaluate_files(*paths[:2], written / "predictions.json", written / "predictions"), expected)


def test_table_is_the_same_in_any_terminal(monkeypatch):
    samples, meta = synthetic_samples()
    metric = metric_for(meta)
    metric.process(None, [sample.to_dict() for sample in samples])
    metric.evaluate(len(samples))
    tables = []
    for width in ("30", "250"):
        monkeypatch.setenv("COLUMNS", width)
        tables.append(panoptic_table(metric.metrics_record()))
    assert tables[0] == tables[1]
    rows = {cells[0]: cells[1:] for line in tables[0].splitlines() if (cells := line.replace("|", " ").split())}
    assert rows["thing1"] == ["38.50", "82.87", "46.46", "23", "39", "14"]
    assert rows["never_seen"] == ["-", "-", "-", "0", "0", "0"]
    assert rows["All"][2:] == ["44.95", "81.40", "55.05"]
