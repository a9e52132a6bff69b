"""Semantic IoU: the official numbers, the borders of the counting, the metric, and folders of label maps."""

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator

from densepred.data.cityscapes import CityscapesSemantic
from densepred.evaluation import cityscapes_semantic
from densepred.evaluation.cityscapes_semantic import CityscapesIoU
from densepred.evaluation.confusion import row_shares, write_confusion
from densepred.evaluation.semantic import SemanticIoU, confusion_matrix, semantic_quality
from densepred.evaluation.semantic_files import evaluate_and_print, evaluate_data_set, evaluate_files
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


def nuclei(data):
    for name in (data / "dsb2018_nuclei" / "val.txt").read_text().split():
        yield cv2.imread(str(data / "dsb2018_nuclei" / "instances" / "val" / f"{name}.png"), cv2.IMREAD_UNCHANGED)


def membranes(data):
    for path in sorted((data / "isbi2012_membrane" / "labels").rglob("*.png")):
        yield cv2.imread(str(path), cv2.IMREAD_UNCHANGED)


@needs_shared
@pytest.mark.parametrize("key, images, shift", [("dsb2018_val", nuclei, (2, -1)), ("isbi2012", membranes, (1, 2))])
def test_binary_dice_of_the_foreground(key, images, shift):
    """ "foreground" in the case: counted over all images, as here; its mean over images is another number."""
    expected, data = official_case("binary_dice_rule")
    metric = new_metric({"classes": ("background", "foreground")})
    for stored in images(data):
        truth = torch.from_numpy((stored > 0).astype(np.int64))
        metric.process(None, [sample(np.roll(truth.numpy(), shift, (0, 1)), gt_semantic=truth).to_dict()])
    found = metric.evaluate(expected[key]["images"])
    foreground = metric.per_class["foreground"]
    assert foreground["pixels"] == expected[key]["ground_truth"]
    assert foreground["dice"] == pytest.approx(expected[key]["foreground"]["Dice"], rel=1e-12)
    assert foreground["iou"] == pytest.approx(expected[key]["foreground"]["IoU"], rel=1e-12)
    assert foreground["dice"] != pytest.approx(expected[key]["mean_over_images"]["Dice"], rel=1e-5)
    assert found["mDice"] == 50 * (foreground["dice"] + metric.per_class["background"]["dice"])


# The metric -----------------------------------------------------------------------------------------------------------


META = dict(classes=("road", "car", "sky"), isthing=(False, True, False), category_ids=(7, 26, 23))


def new_metric(meta=META, **options):
    metric = SemanticIoU(**options)
    metric.dataset_meta = meta
    return metric


def evaluate(samples, out_dir=None, meta=META):
    metric = SemanticIoU(out_dir=None if out_dir is None else str(out_dir))
    evaluator = Evaluator([metric])
    evaluator.dataset_meta = meta
    evaluator.process(samples)
    return metric, evaluator.evaluate(len(samples))


def sample(pred, name="a", **truth):
    metainfo = dict(img_path=f"images/{name}.jpg", img_id=name)
    return SegSample(metainfo=metainfo, pred_semantic=torch.as_tensor(pred), **truth)


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
    assert found.keys() == {"mIoU", "mAcc", "aAcc", "mDice"}


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


def random_samples(count=7):
    """Return images of several sizes with void, true and predicted classes in blocks."""
    rng, samples = np.random.default_rng(5), []
    for number in range(count):
        size = (24 + 5 * number, 31 + number)
        gt, pred = (np.kron(rng.integers(0, 3, (12, 12)), np.ones((6, 6), int))[: size[0], : size[1]] for _ in range(2))
        pred[: size[0] // 2] = np.roll(gt[: size[0] // 2], 1, 1)
        gt[4:9, :20] = 255
        samples.append(sample(pred, f"{number}", gt_semantic=torch.tensor(gt)))
    return samples


def brute_force(samples, ratio):
    """Count all pixels of all images at once, class by class, contours by erosion mask by mask."""
    cells = np.zeros((3, 3), np.int64)
    edges = np.zeros((3, 2), np.int64)  # shared, in either
    for one in samples:
        gt, pred = one.gt_semantic.numpy(), one.pred_semantic.numpy()
        cells += plain_matrix(gt, pred, 3)
        width, known = max(1, round(ratio * np.hypot(*gt.shape))), gt != 255
        for label in range(3):
            contour = []
            for mask in ((gt == label) & known, (pred == label) & known):
                padded = np.pad(mask.astype(np.uint8), 1)
                contour.append(mask & (cv2.erode(padded, np.ones((3, 3)), iterations=width)[1:-1, 1:-1] == 0))
            edges[label] += np.sum(contour[0] & contour[1]), np.sum(contour[0] | contour[1])
    iou = cells.diagonal() / (cells.sum(0) + cells.sum(1) - cells.diagonal())
    return cells, {"mIoU": 100 * iou.mean(), "mBIoU": 100 * (edges[:, 0] / edges[:, 1]).mean()}


def test_streaming_equals_brute_force(tmp_path):
    samples = random_samples()
    cells, expected = brute_force(samples, 0.05)
    metric = new_metric(boundary_ratio=0.05, confusion_dir=str(tmp_path))
    for begin in range(0, len(samples), 2):
        metric.process(None, [one.to_dict() for one in samples[begin : begin + 2]])
    found = metric.evaluate(len(samples))
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    assert found["mBIoU"] < found["mIoU"] and "Boundary IoU" in semantic_table(metric.metrics_record())
    rows = list(csv.reader((tmp_path / "confusion.csv").open()))
    assert rows[0][1:] == list(META["classes"]) == [row[0] for row in rows[1:]]
    np.testing.assert_array_equal([[int(cell) for cell in row[1:]] for row in rows[1:]], cells)
    assert cv2.imread(str(tmp_path / "confusion.png")).std() > 10
    with pytest.raises(ValueError, match="boundary ratio of 5"):
        SemanticIoU(boundary_ratio=5)


def evaluate_a_share(rank: int, folder: str) -> None:
    """Run one of two processes with an uneven split; in the second evaluation one of them has nothing."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    samples = [one.to_dict() for one in random_samples()]
    metric = new_metric(boundary_ratio=0.05, confusion_dir=f"{folder}/confusion")
    metric.process(None, samples[rank::2])
    metrics = [metric.evaluate(len(samples))]
    metric.process(None, samples if rank else [])
    metrics.append(metric.evaluate(len(samples)))
    cityscapes, frames = CityscapesIoU(str(CITYSCAPES_TRUTH.parent)), cityscapes_samples()
    cityscapes.dataset_meta = CITYSCAPES_META
    cityscapes.process(None, [one.to_dict() for one in (frames[3:] if rank else frames[:3])])
    metrics.append(cityscapes.evaluate(len(frames)))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(metrics))
    torch.distributed.destroy_process_group()


def test_two_processes_sum_up(tmp_path):
    torch.multiprocessing.spawn(evaluate_a_share, (str(tmp_path),), nprocs=2)
    metric, samples = new_metric(boundary_ratio=0.05), random_samples()
    metric.process(None, [one.to_dict() for one in samples])
    alone = metric.evaluate(len(samples))
    expected = json.loads((METRICS / "cityscapes_semantic" / "expected.json").read_text())
    for rank in (0, 1):
        first, second, cityscapes = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert first == second == alone  # to the last bit: only integers are summed
        assert cityscapes["miIoU"] == pytest.approx(100 * expected["averageScoreInstClasses"], rel=1e-12)
    assert len(list(csv.reader((tmp_path / "confusion" / "confusion.csv").open()))) == 4


def test_nothing_to_measure_is_nan_and_said():
    void = sample([[0, 1]], gt_semantic=torch.tensor([[255, 255]]))
    metric, found = evaluate([void])
    assert all(np.isnan(value) for value in found.values())
    assert "every true pixel is ignored" in semantic_table(metric.metrics_record())
    metric, found = evaluate([void, sample([[0, 0]], "b", gt_semantic=torch.tensor([[0, 0]]))])
    assert found["mIoU"] == found["aAcc"] == 100 and np.isnan(metric.per_class["sky"]["iou"])
    assert "2 classes are in neither truth nor prediction" in semantic_table(metric.metrics_record())


@pytest.mark.parametrize("columns", [2, 3])
def test_confusion_as_files(tmp_path, columns):
    cells = np.array([[3, 1, 2], [0, 0, 0]])[:, :columns]
    for name in ("new/a.csv", "b.PNG"):
        write_confusion(tmp_path / name, cells, ["one, two", "three"])
    rows = list(csv.reader((tmp_path / "new" / "a.csv").open()))
    assert rows[0][1:] == ["one, two", "three", "(no class)"][:columns] and rows[1][1:] == ["3", "1", "2"][:columns]
    assert cv2.imread(str(tmp_path / "b.PNG")) is not None
    np.testing.assert_array_equal(np.isnan(row_shares(cells)), [[False] * columns, [True] * columns])
    assert row_shares(cells)[0].sum() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"a.jpg: a confusion matrix is written as .csv or .png"):
        write_confusion(tmp_path / "a.jpg", cells, ["a", "b"])


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


CITYSCAPES_META = CityscapesSemantic.METAINFO


def cityscapes_samples():
    """Return the fixture's frames as samples of 19 classes; ids that the benchmark ignores become road."""
    table = np.zeros(256, np.int64)
    table[list(CITYSCAPES_META["category_ids"])] = range(19)
    paths = sorted(CITYSCAPES_PRED.glob("*.png"))
    return [sample(table[cv2.imread(str(path), cv2.IMREAD_UNCHANGED)], f"{path.stem}_leftImg8bit") for path in paths]


def test_cityscapes_metric(tmp_path):
    """Equal to the files it stands for; SemanticIoU writes them and says the same mIoU."""
    samples = cityscapes_samples()
    truth = {one.img_id.removesuffix("_leftImg8bit"): None for one in samples}
    table = CityscapesSemantic.COMMON["semantic_table"]
    for path in CITYSCAPES_TRUTH.rglob("*_instanceIds.png"):
        ids = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        truth[path.name.removesuffix("_gtFine_instanceIds.png")] = table[np.where(ids < 1000, ids, ids // 1000)]
    for one in samples:
        one.gt_semantic = torch.from_numpy(truth[one.img_id.removesuffix("_leftImg8bit")].astype(np.int64))
    evaluator = Evaluator([SemanticIoU(out_dir=str(tmp_path)), CityscapesIoU(str(CITYSCAPES_TRUTH.parent))])
    evaluator.dataset_meta = CITYSCAPES_META
    evaluator.process(samples)
    found = evaluator.evaluate(len(samples))
    record = cityscapes_semantic.evaluate_files(CITYSCAPES_TRUTH, tmp_path)
    assert {name: found[name] / 100 for name in ("mIoU", "miIoU", "mIoU_cat", "miIoU_cat")} == pytest.approx(
        {name: record[name] for name in ("mIoU", "miIoU", "mIoU_cat", "miIoU_cat")}, rel=1e-12
    )
    metric = evaluator.metrics[1]
    assert metric.per_class["car"] == record["classes"]["car"] and metric.metrics_record()["categories"]
    by_name = evaluate_data_set(CITYSCAPES_TRUTH, tmp_path, "cityscapes")
    assert by_name["mIoU"] == pytest.approx(record["mIoU"], rel=1e-12)


def test_cityscapes_metric_counts_frames_of_cityscapes():
    with pytest.raises(FileNotFoundError, match=r"CityscapesIoU: .*train does not exist"):
        CityscapesIoU(str(CITYSCAPES_TRUTH.parent), "train")
    metric, one = CityscapesIoU(str(CITYSCAPES_TRUTH.parent)), cityscapes_samples()[0]
    metric.dataset_meta = CITYSCAPES_META
    with pytest.raises(ValueError, match="counted 0 images of a data set of 1"):
        metric.evaluate(1)
    one.pred_semantic[0, 0] = 19
    with pytest.raises(ValueError, match=r"leftImg8bit.jpg: predicted classes outside 0..18"):
        metric.process(None, [one.to_dict()])
    metric.dataset_meta = {**CITYSCAPES_META, "category_ids": range(19)}
    with pytest.raises(ValueError, match=r"are not Cityscapes' 7..33"):
        metric.process(None, [one.to_dict()])


def test_cityscapes_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*_gtFine_instanceIds.png"):
        cityscapes_semantic.evaluate_files(tmp_path, CITYSCAPES_PRED)
    with pytest.raises(FileNotFoundError, match=r"no prediction zeroville_000000_000019\*.png"):
        cityscapes_semantic.evaluate_files(CITYSCAPES_TRUTH, tmp_path)
    with pytest.raises(ValueError, match="predicted id 255 is not below 34"):
        cityscapes_semantic.frame_counts(np.zeros((1, 2), int), np.array([[0, 255]]))
    with pytest.raises(ValueError, match="prediction is 2x1 pixels and the ground truth 1x2"):
        cityscapes_semantic.frame_counts(np.zeros((1, 2), int), np.zeros((2, 1), int))
