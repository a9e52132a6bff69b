"""Semantic IoU: the official numbers, the borders of the counting, the metric, and folders of label maps."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator

from densepred.evaluation import cityscapes_semantic
from densepred.evaluation.semantic import SemanticIoU, confusion_matrix, semantic_quality
from densepred.evaluation.semantic_files import evaluate_and_print, evaluate_files
from densepred.evaluation.table import semantic_table
from densepred.structures import PanopticMap, SegSample

METRICS = Path(__file__).parent / "data" / "metrics"
SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real sample data")


def plain_matrix(gt, pred, num_classes, ignore_index=255):
    counts = np.zeros((num_classes, num_classes), np.int64)
    for true, found in zip(gt.ravel().tolist(), pred.ravel().tolist(), strict=True):
        if true != ignore_index:
            counts[true, found] += 1
    return counts


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
@pytest.mark.parametrize("num_classes, ignore_index", [(2, 255), (19, 255), (5, 0), (254, 255), (300, 1000)])
def test_counting_equals_a_loop(num_classes, ignore_index, dtype):
    dtype = np.int64 if num_classes > 256 else dtype
    rng = np.random.default_rng(0)
    gt, pred = rng.integers(0, num_classes, (2, 30, 41)).astype(dtype)
    gt[rng.random(gt.shape) < 0.2] = ignore_index
    gt[:10], pred[:10] = np.repeat(gt[:10, :1], 41, 1), np.repeat(pred[:10, :1], 41, 1)  # long runs
    found = confusion_matrix(gt, pred, num_classes, ignore_index)
    np.testing.assert_array_equal(found, plain_matrix(gt, pred, num_classes, ignore_index))
    assert found.dtype == np.int64


def test_nothing_counts():
    void = np.full((3, 4), 255, np.uint8)
    for gt, pred in ((void, np.zeros_like(void)), (void[:0], void[:0])):
        counts = confusion_matrix(gt, pred, 3)
        assert counts.shape == (3, 3) and not counts.any()
    quality = semantic_quality(counts)
    assert all(np.isnan(quality[name]) for name in ("mIoU", "mAcc", "aAcc", "fwIoU", "mDice", "mPrecision"))


@pytest.mark.parametrize("value, dtype", [(3, np.uint8), (254, np.uint8), (3, np.int64), (-1, np.int16)])
def test_labels_outside_the_classes_are_errors(value, dtype):
    good, bad = np.zeros((2, 2), dtype), np.array([[0, value], [0, 0]], dtype)
    with pytest.raises(ValueError, match=rf"predicted labels {value} \(1 pixels\) are outside 0..2"):
        confusion_matrix(good, bad, 3)
    with pytest.raises(ValueError, match=rf"true labels {value} \(1 pixels\) are outside 0..2, .*ignore_index=255"):
        confusion_matrix(bad, good, 3)


def test_sizes_must_agree():
    with pytest.raises(ValueError, match="prediction is 2x3 pixels and the ground truth 3x2"):
        confusion_matrix(np.zeros((3, 2), int), np.zeros((2, 3), int), 2)


def test_absent_classes_stay_out_of_the_means():
    """Class 1 is predicted but not there, class 2 neither."""
    quality = semantic_quality(np.array([[6, 2, 0], [0, 0, 0], [0, 0, 0]]))
    zero, one, two = quality["per_class"]
    assert zero == dict(iou=0.75, acc=0.75, dice=12 / 14, precision=1.0, pixels=8)
    assert (one["iou"], one["dice"], one["precision"]) == (0, 0, 0) and np.isnan(one["acc"])
    assert all(np.isnan(two[name]) for name in ("iou", "acc", "dice", "precision"))
    assert (quality["mIoU"], quality["mAcc"], quality["aAcc"], quality["fwIoU"]) == (0.375, 0.75, 0.75, 0.75)
    assert quality["mPrecision"] == 0.5 and quality["mDice"] == 6 / 14


# The official numbers -------------------------------------------------------------------------------------------------


def official_case(name):
    expected = json.loads((SHARED / "metrics" / name / "expected.json").read_text())
    return expected, SHARED / "data"


def assert_official(found, expected):
    per_class = {"IoU": "iou", "Acc": "acc", "Recall": "acc", "Dice": "dice", "Precision": "precision"}
    for name, ours in per_class.items():
        values = np.array([np.nan if v is None else v for v in expected[name]])
        np.testing.assert_allclose([c[ours] for c in found["per_class"]], values, rtol=1e-12, err_msg=name)
    for name in ("mIoU", "mAcc", "aAcc", "fwIoU", "mDice", "mPrecision"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12), name


def camvid_noisy(truth, i):
    y, x = np.indices(truth.shape)
    found = np.roll(truth, (3 * i % 11 - 5, 5 * i % 13 - 6), (0, 1)).astype(int)
    found = np.where((17 * x + 31 * y + 7 * i) % 97 < 6, (found + 1 + (x + y) % 10) % 11, found)
    return np.where(found == 11, (x // 8 + y // 8) % 11, found)


def camvid_plain(truth, i):
    found = np.roll(truth, (4, -6), (0, 1))
    return np.where(found == 11, 1, found)


@needs_shared
@pytest.mark.parametrize(
    "key, split, images, rule",
    [
        ("noisy", "val", range(101), camvid_noisy),
        ("train_image_278_plain", "train", [278], camvid_plain),
        ("train_image_278_noisy", "train", [278], camvid_noisy),
        ("train_images_0_to_2_plain", "train", range(3), camvid_plain),
    ],
)
def test_camvid(key, split, images, rule):
    expected, data = official_case("camvid_val_rule")
    names = (data / "camvid" / f"{split}.txt").read_text().split()
    total = np.zeros((11, 11), np.int64)
    for i in images:
        truth = cv2.imread(str(data / "camvid" / "labels" / split / f"{names[i]}.png"), cv2.IMREAD_UNCHANGED)
        total += confusion_matrix(truth, rule(truth, i), 11, ignore_index=11)
    np.testing.assert_array_equal(total, expected[key]["confusion"])
    assert_official(semantic_quality(total), expected[key])


@needs_shared
def test_binary_dice_of_the_foreground():
    """ "foreground" in the case: counted over all images, as here."""
    expected, data = official_case("binary_dice_rule")
    total = np.zeros((2, 2), np.int64)
    for path in sorted((data / "isbi2012_membrane" / "labels").rglob("*.png")):
        truth = (cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0).astype(np.uint8)
        total += confusion_matrix(truth, np.roll(truth, (1, 2), (0, 1)), 2)
    foreground = semantic_quality(total)["per_class"][1]
    assert total[1, 1] == expected["isbi2012"]["intersection"]
    assert foreground["dice"] == pytest.approx(expected["isbi2012"]["foreground"]["Dice"], rel=1e-12)
    assert foreground["iou"] == pytest.approx(expected["isbi2012"]["foreground"]["IoU"], rel=1e-12)


# The metric -----------------------------------------------------------------------------------------------------------


META = dict(classes=("road", "car", "sky"), isthing=(False, True, False), category_ids=(7, 26, 23))


def evaluate(samples, out_dir=None, meta=META):
    metric = SemanticIoU(out_dir=None if out_dir is None else str(out_dir))
    evaluator = Evaluator([metric])
    evaluator.dataset_meta = meta
    evaluator.process(samples)
    return metric, evaluator.evaluate(len(samples))


def sample(pred, name="a", **truth):
    metainfo = dict(img_path=f"images/{name}.jpg", img_id=name)
    return SegSample(metainfo=metainfo, pred_semantic=torch.tensor(pred), **truth)


def test_metric_of_both_kinds_of_truth():
    semantic = sample([[0, 0], [1, 2]], gt_semantic=torch.tensor([[0, 0], [1, 255]]))
    segments = [
        dict(id=9, label=1, isthing=True, iscrowd=True),
        dict(id=4, label=2, isthing=False, iscrowd=False),
    ]
    panoptic = PanopticMap(torch.tensor([[9, 9], [4, 0]], dtype=torch.int32), segments)
    metric, found = evaluate([semantic, sample([[1, 0], [2, 0]], "b", gt_panoptic=panoptic)])
    np.testing.assert_allclose([found["mIoU"], found["aAcc"]], [100 * (2 / 3 + 2 / 3 + 1) / 3, 100 * 5 / 6])
    assert found["mAcc"] == pytest.approx(100 * (1 + 2 / 3 + 1) / 3)
    assert metric.per_class["car"]["pixels"] == 3 and metric.metrics_record()["mIoU"] == found["mIoU"] / 100
    assert "car" in semantic_table(metric.metrics_record())


def test_metric_begins_anew_and_wants_every_image():
    one = sample([[0]], gt_semantic=torch.tensor([[0]]))
    metric, _ = evaluate([one])
    metric.process(None, [sample([[1]], gt_semantic=torch.tensor([[0]])).to_dict()])
    assert metric.evaluate(1)["aAcc"] == 0
    with pytest.raises(ValueError, match="counted 0 images of a data set of 1"):
        metric.evaluate(1)


def test_metric_names_the_file_of_a_wrong_label():
    with pytest.raises(ValueError, match=r"images/a.jpg: predicted labels 3 \(1 pixels\) are outside"):
        evaluate([sample([[3]], gt_semantic=torch.tensor([[0]]))])
    with pytest.raises(ValueError, match=r"images/a.jpg: .* neither gt_semantic nor gt_panoptic"):
        evaluate([sample([[0]])])


@pytest.mark.parametrize("ids, stored", [((7, 26, 23), [[7, 26, 23]]), ((0, 1, 2), [[0, 1, 2]])])
def test_predictions_as_files(tmp_path, ids, stored):
    """Label ids for Cityscapes, classes for all others."""
    one = sample([[0, 1, 2]], "frame", gt_semantic=torch.tensor([[0, 1, 2]]))
    evaluate([one], tmp_path, {**META, "category_ids": ids})
    assert cv2.imread(str(tmp_path / "frame.png"), cv2.IMREAD_UNCHANGED).tolist() == stored


def test_two_images_of_one_name(tmp_path):
    pair = [sample([[0]], gt_semantic=torch.tensor([[0]])) for _ in range(2)]
    pair[1].set_metainfo(dict(img_path="other/a.jpg"))
    with pytest.raises(ValueError, match=r"prediction of both images/a.jpg and other/a.jpg"):
        evaluate(pair, tmp_path)


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    """Two true label maps as ADE20K stores them (0 = other), one in a subfolder, and predictions of the classes."""
    gt, pred = tmp_path / "gt", tmp_path / "pred"
    maps = {"x.png": ([[0, 1], [2, 3]], [[2, 0], [1, 1]]), "sub/y.png": ([[1, 1]], [[0, 0]])}
    for name, pair in maps.items():
        for folder, labels in zip((gt, pred), pair, strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(folder / name), np.array(labels, np.uint8))
    return gt, pred


def test_folders_are_scored_together(folders, tmp_path, capsys):
    record = evaluate_files(*folders, num_classes=3, reduce_zero_label=True)
    assert [record["per_class"][str(c)]["iou"] for c in range(3)] == [1, 0.5, 0]
    assert record["aAcc"] == 0.8 and record["per_class"]["0"]["pixels"] == 3
    evaluate_and_print(*folders, 4, 255, True, out=str(tmp_path / "out" / "figures.json"))
    written = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert written["per_class"]["3"]["iou"] is None and written["mIoU"] == 0.5
    assert "80.00" in capsys.readouterr().out


def test_folders_that_do_not_fit(folders, tmp_path):
    gt, pred = folders
    with pytest.raises(ValueError, match=r"pred.x.png \(truth .*x.png\): true labels 3 \(1 pixels\) are outside 0..2"):
        evaluate_files(gt, pred, 3)
    (pred / "sub" / "y.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 predictions are missing, the first is .*y.png"):
        evaluate_files(gt, pred, 4)
    with pytest.raises(FileNotFoundError, match="no label map"):
        evaluate_files(tmp_path / "nowhere", pred, 4)


# Cityscapes' own files ------------------------------------------------------------------------------------------------

CITYSCAPES_TRUTH = METRICS / "cityscapes_instance" / "gtFine"
CITYSCAPES_PRED = METRICS / "cityscapes_semantic" / "pred_semantic"


def assert_cityscapes(found, expected):
    for group, name in (("classes", "class"), ("categories", "category")):
        for official, ours in ((f"{name}Scores", "iou"), (f"{name}InstScores", "iiou")):
            values = {key: values[ours] for key, values in found[group].items()}
            known = {key: value for key, value in expected[official].items() if value is not None}
            assert {key: value for key, value in values.items() if value == value} == pytest.approx(known, rel=1e-12)
    averages = [found[name] for name in ("mIoU", "miIoU", "mIoU_cat", "miIoU_cat")]
    keys = ("Classes", "InstClasses", "Categories", "InstCategories")
    assert averages == pytest.approx([expected[f"averageScore{key}"] for key in keys], rel=1e-12)


def test_cityscapes_files_score_as_the_official_script_says(tmp_path, capsys):
    expected = json.loads((METRICS / "cityscapes_semantic" / "expected.json").read_text())
    assert_cityscapes(cityscapes_semantic.evaluate_files(CITYSCAPES_TRUTH, CITYSCAPES_PRED), expected)
    cityscapes_semantic.evaluate_and_print(str(CITYSCAPES_TRUTH), str(CITYSCAPES_PRED), str(tmp_path / "out.json"))
    assert json.loads((tmp_path / "out.json").read_text())["classes"]["road"]["iiou"] is None
    assert f"{100 * expected['averageScoreInstClasses']:.2f}" in capsys.readouterr().out


@needs_shared
def test_cityscapes_on_real_frames():
    expected, data = official_case("cityscapes_real_rule")
    total = np.zeros((2, 34, 34))
    for path in sorted((data / "cityscapes_sample" / "gtFine" / "val" / "frankfurt").glob("*_instanceIds.png")):
        truth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        rows, columns = (np.minimum(np.arange(side) // 8 * 8 + 4, side - 1) for side in truth.shape)
        coarse = truth[np.ix_(rows, columns)]
        total += cityscapes_semantic.frame_counts(truth, np.where(coarse >= 1000, coarse // 1000, coarse))
    np.testing.assert_array_equal(total[0], expected["semantic"]["confMatrix"])
    assert_cityscapes(cityscapes_semantic.cityscapes_quality(total), expected["semantic"])


def test_cityscapes_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*_gtFine_instanceIds.png"):
        cityscapes_semantic.evaluate_files(tmp_path, CITYSCAPES_PRED)
    with pytest.raises(FileNotFoundError, match=r"no prediction zeroville_000000_000019\*.png"):
        cityscapes_semantic.evaluate_files(CITYSCAPES_TRUTH, tmp_path)
    with pytest.raises(ValueError, match="predicted id 255 is not below 34"):
        cityscapes_semantic.frame_counts(np.zeros((1, 2), int), np.array([[0, 255]]))
    with pytest.raises(ValueError, match="prediction is 2x1 pixels and the ground truth 1x2"):
        cityscapes_semantic.frame_counts(np.zeros((1, 2), int), np.zeros((2, 1), int))
