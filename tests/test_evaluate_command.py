"""Scoring of files: the command, bad files; of COCO's panoptic format also the pool and the benchmark."""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import densepred_cli
from densepred.data.files import listed_names
from densepred.evaluation.benchmark import benchmark_eval, measure_eval, write_synthetic
from densepred.evaluation.coco_format import read_id_map, write_id_map
from densepred.evaluation.panoptic import evaluate_and_print, evaluate_files
from densepred.evaluation.semantic_files import DATA_SETS, evaluate_data_set
from tests.test_panoptic_quality import METRICS, assert_record_equal, fixture_case, needs_shared
from tests.test_semantic_metric import assert_official, camvid_noisy, official_case

ROOT = Path(__file__).parents[1]


def run_command(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/evaluate.py", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def case(tmp_path) -> dict[str, Path]:
    """Three small images whose files a test may spoil."""
    paths = write_synthetic(tmp_path, 3, size=(40, 50))
    return dict(zip(("gt_json", "gt_dir", "pred_json", "pred_dir"), paths, strict=True))


def test_command_writes_the_official_numbers(tmp_path):
    (gt_json, gt_dir, pred_json, pred_dir), expected = fixture_case("panoptic_synthetic", "gt", "pred")
    out = tmp_path / "new" / "metrics.json"
    files = ("--gt", gt_json, "--gt-dir", gt_dir, "--pred", pred_json, "--pred-dir", pred_dir)
    done = run_command("panoptic", *files, "--out", out)
    assert done.returncode == 0, done.stderr
    assert_record_equal(json.loads(out.read_text()), expected)
    assert "thing44" in done.stdout and "44.95" in done.stdout


def test_command_fails_with_one_message(case):
    (case["pred_dir"] / "1.png").unlink()
    files = ("--gt", case["gt_json"], "--gt-dir", case["gt_dir"], "--pred", case["pred_json"])
    done = run_command("panoptic", *files, "--pred-dir", case["pred_dir"])
    assert done.returncode != 0
    assert f"{case['pred_dir'] / '1.png'}: no such panoptic PNG" in done.stderr
    assert "Traceback (most recent call last)" not in done.stderr


def test_a_pool_of_processes_gives_the_same_numbers():
    paths, expected = fixture_case("cityscapes_panoptic", "gt_panoptic", "pred_panoptic")
    assert_record_equal(evaluate_files(*paths, num_workers=1), expected)


def test_a_group_without_classes_is_null_in_json(case, tmp_path):
    content = json.loads(case["gt_json"].read_text())
    for category in content["categories"]:
        category["isthing"] = 1
    case["gt_json"].write_text(json.dumps(content))
    evaluate_and_print(*case.values(), out=str(tmp_path / "metrics.json"))
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["Stuff"] == {"pq": None, "sq": None, "rq": None, "n": 0}
    assert record["Things"] == record["All"]


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def paint(path: Path, number: int) -> None:
    ids = read_id_map(path)
    ids[0, 0] = number
    write_id_map(path, ids)


SPOILS = {
    "pred not JSON": (lambda c: c["pred_json"].write_text("{"), r"pred\.json: not JSON"),
    "gt missing": (lambda c: c["gt_json"].unlink(), r"gt\.json: no such file"),
    "no categories": (lambda c: change_json(c["gt_json"], lambda j: j.pop("categories")), r"gt\.json: lacks .*categor"),
    "a list": (lambda c: c["pred_json"].write_text("[1]"), r"pred\.json: lacks the list `annotations`"),
    "no area": (
        lambda c: change_json(c["gt_json"], lambda j: j["annotations"][0]["segments_info"][2].pop("area")),
        r"image_id 0 .*gt/0\.png.*true segments_info\[2\]: lacks `area`",
    ),
    "no file name": (
        lambda c: change_json(c["pred_json"], lambda j: j["annotations"][1].pop("file_name")),
        r"pred\.json: annotations\[1\]: lacks `file_name`",
    ),
    "no prediction": (
        lambda c: change_json(c["pred_json"], lambda j: j["annotations"].pop(2)),
        r"pred\.json: no prediction for 1 images, the first with image_id 2",
    ),
    "unknown class": (
        lambda c: change_json(c["pred_json"], lambda j: j["annotations"][0]["segments_info"][0].update(category_id=77)),
        r"pred/0\.png.*category_id 77, which `categories` of the ground truth lacks",
    ),
    "segment not in JSON": (lambda c: paint(c["pred_dir"] / "1.png", 12), r"pred/1\.png.*\[12\] that its records lack"),
    "segment not in PNG": (
        lambda c: change_json(
            c["pred_json"], lambda j: j["annotations"][1]["segments_info"].append({"id": 3, "category_id": 1})
        ),
        r"pred/1\.png.*\[3\] without a pixel",
    ),
    "no PNG": (lambda c: (c["gt_dir"] / "2.png").unlink(), r"gt/2\.png: no such panoptic PNG"),
    "empty PNG": (lambda c: (c["gt_dir"] / "2.png").write_bytes(b""), r"gt/2\.png: not a readable PNG"),
    "truncated PNG": (
        lambda c: (c["pred_dir"] / "0.png").write_bytes((c["pred_dir"] / "0.png").read_bytes()[:-40]),
        r"pred/0\.png: not a readable PNG",
    ),
    "grey PNG": (
        lambda c: cv2.imwrite(str(c["pred_dir"] / "0.png"), np.zeros((40, 50), np.uint8)),
        r"pred/0\.png: 1 channel\(s\) of uint8",
    ),
    "other size": (
        lambda c: write_id_map(c["pred_dir"] / "0.png", np.zeros((40, 51))),
        r"pred/0\.png.*prediction is 40x51 pixels and the ground truth 40x50",
    ),
}


@pytest.mark.parametrize("name", SPOILS)
def test_bad_files_are_named(case, name):
    spoil, message = SPOILS[name]
    spoil(case)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_files(*case.values())


def test_true_areas_come_from_json(case):
    before = evaluate_files(*case.values())["All"]["pq"]
    change_json(
        case["gt_json"],
        lambda j: [s.update(area=10 * s["area"]) for a in j["annotations"] for s in a["segments_info"]],
    )
    assert before > 0.3
    assert evaluate_files(*case.values())["All"]["pq"] == 0


def test_segment_numbers_survive_the_png(tmp_path):
    ids = np.array([[0, 1, 255], [256, 65535, 65536], [2**24 - 1, 7, 0]])
    write_id_map(tmp_path / "a.png", ids)
    np.testing.assert_array_equal(read_id_map(tmp_path / "a.png"), ids)
    rgb = cv2.imread(str(tmp_path / "a.png"))[..., ::-1].astype(int)
    np.testing.assert_array_equal(rgb @ [1, 256, 65536], ids)
    shutil.copy(tmp_path / "a.png", tmp_path / "alpha.png")
    cv2.imwrite(str(tmp_path / "alpha.png"), cv2.cvtColor(cv2.imread(str(tmp_path / "a.png")), cv2.COLOR_BGR2BGRA))
    np.testing.assert_array_equal(read_id_map(tmp_path / "alpha.png"), ids)


def test_benchmark_measures_equal_numbers_and_a_lead():
    result = measure_eval(repeats=1, num_images=3)
    assert result["difference"] < 1e-12
    assert result["images"] == 3 and result["baseline"]
    assert result["memory"]["ratio"] > 1.5
    assert result["files"]["ratio"] > 1


def test_benchmark_prints_ratios_of_given_files():
    paths, _ = fixture_case("cityscapes_panoptic", "gt_panoptic", "pred_panoptic")
    lines = benchmark_eval(*paths, repeats=1).splitlines()
    assert lines[0].startswith("10 images, 1 alternating runs")
    assert lines[1].startswith("from files") and lines[2].startswith("from maps in memory")
    with pytest.raises(ValueError, match="give all of"):
        benchmark_eval(paths[0])


# Label maps -----------------------------------------------------------------------------------------------------------


def write_map(path: Path, labels: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.array(labels, np.uint8))


@pytest.fixture
def maps(tmp_path) -> tuple[Path, Path]:
    """CamVid's labels (11 = void) of two images, and predictions of its classes."""
    for name, true, found in (("a", [[0, 0], [11, 4]], [[0, 1], [2, 4]]), ("b", [[4, 4, 11]], [[4, 10, 0]])):
        write_map(tmp_path / "gt" / f"{name}.png", true)
        write_map(tmp_path / "pred" / f"{name}.png", found)
    return tmp_path / "gt", tmp_path / "pred"


def evaluate_semantic(*args: object) -> None:
    """Run the command without a process of its own."""
    parser = argparse.ArgumentParser()
    densepred_cli.add_evaluate(parser)
    densepred_cli.run_evaluate(parser.parse_args(["semantic", *map(str, args)]))


def test_command_scores_a_known_set_by_name(maps, tmp_path):
    out, table = tmp_path / "figures.json", tmp_path / "confusion.csv"
    files = ("--gt", maps[0], "--pred", maps[1], "--out", out, "--confusion", table)
    done = run_command("semantic", *files, "--dataset", "camvid", "--boundary-ratio", 0.02)
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert list(record["per_class"]) == list(DATA_SETS["camvid"].METAINFO["classes"])
    assert record["per_class"]["sky"]["iou"] == 0.5 and record["per_class"]["pavement"]["iou"] == pytest.approx(2 / 3)
    assert record["per_class"]["car"]["iou"] is None and record["aAcc"] == 0.6 and record["mBIoU"] > 0
    assert "pavement" in done.stdout and "Boundary IoU" in done.stdout and str(table) in done.stdout
    rows = list(csv.reader(table.open()))
    assert rows[1][:3] == ["sky", "1", "1"] and record["confusion"][0][:2] == [1, 1]


def test_a_set_by_its_number_of_classes_says_the_same(maps, capsys):
    evaluate_semantic("--gt", maps[0], "--pred", maps[1], "--num-classes", 11, "--ignore-index", 11)
    lines = capsys.readouterr().out
    evaluate_semantic("--gt", maps[0], "--pred", maps[1], "--dataset", "camvid")
    named = capsys.readouterr().out
    mean = [next(line for line in text.splitlines() if "mean" in line) for text in (lines, named)]
    assert mean[0].split() == mean[1].split() and "29.17" in mean[0]


def test_command_offers_the_sets_that_are_known():
    parser = argparse.ArgumentParser()
    densepred_cli.add_evaluate(parser)
    tasks = next(action for action in parser._actions if action.dest == "task")
    option = next(action for action in tasks.choices["semantic"]._actions if action.dest == "dataset")
    assert option.choices == tuple(DATA_SETS)


@pytest.mark.parametrize(
    "options, message",
    [
        ((), r"give --num-classes N, or --dataset, one of ade20k, camvid"),
        (("--dataset", "camvid", "--num-classes", 11), "leave out --num-classes"),
        (("--num-classes", 0), "0 classes"),
        (("--num-classes", 11), r"a.png \(truth .*gt/a.png\): true labels 11 \(1 pixels\) .*is ignore_index=255 right"),
        (("--dataset", "isbi2012"), r"gt/a.png holds the labels 4 \(1 pixels\), 11 \(1 pixels\)"),
        (("--dataset", "camvid", "--boundary-ratio", 2), "boundary ratio of 2.0"),
        (("--dataset", "camvid", "--confusion", "c.txt"), "c.txt: a confusion matrix is written as .csv or .png"),
    ],
)
def test_options_that_do_not_fit(maps, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate_semantic("--gt", maps[0], "--pred", maps[1], *options)


def test_a_place_that_cannot_be_written_is_one_message(maps, monkeypatch, tmp_path):
    file = tmp_path / "taken"
    file.touch()
    words = ["--gt", maps[0], "--pred", maps[1], "--dataset", "camvid", "--out", file / "figures.json"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "semantic", *map(str, words)])
    with pytest.raises(SystemExit, match=r"densepred evaluate: .*File exists: .*taken"):
        densepred_cli.main("evaluate")


WRONG_PREDICTIONS = {
    "missing": (None, FileNotFoundError, r"1 of 2 predictions are missing, the first is .*pred/b.png"),
    "another size": ([[4, 4], [0, 0]], ValueError, r"pred/b.png .*prediction is 2x2 pixels and the ground truth 1x3"),
    "void": ([[255, 255, 4]], ValueError, r"pred/b.png .*predicted labels 255 \(2 pixels\) are outside 0..10"),
    "colours": ([[[9, 8, 7]] * 3], ValueError, r"pred/b.png has mode RGB; .*write it again with one channel"),
    "grey as colours": ([[[4, 4, 4]] * 3], ValueError, r"pred/b.png has mode RGB; .*keep one of them"),
}


@pytest.mark.parametrize("name", WRONG_PREDICTIONS)
def test_wrong_predictions_are_named(maps, name):
    labels, kind, message = WRONG_PREDICTIONS[name]
    (maps[1] / "b.png").unlink()
    if labels is not None:
        write_map(maps[1] / "b.png", labels)
    with pytest.raises(kind, match=message):
        evaluate_semantic("--gt", maps[0], "--pred", maps[1], "--dataset", "camvid")


def test_all_pixels_ignored_is_said(tmp_path, capsys):
    write_map(tmp_path / "gt" / "a.png", [[11, 11]])
    write_map(tmp_path / "pred" / "a.png", [[0, 1]])
    out = tmp_path / "figures.json"
    evaluate_semantic("--gt", tmp_path / "gt", "--pred", tmp_path / "pred", "--dataset", "camvid", "--out", out)
    assert "every true pixel is ignored" in capsys.readouterr().out
    assert json.loads(out.read_text())["mIoU"] is None


def test_cityscapes_is_scored_in_label_ids(tmp_path):
    """Predicted ids that the benchmark ignores are misses: the official mIoU."""
    truth, found = METRICS / "cityscapes_instance" / "gtFine", METRICS / "cityscapes_semantic" / "pred_semantic"
    expected = json.loads((METRICS / "cityscapes_semantic" / "expected.json").read_text())
    record = evaluate_data_set(truth, found, "cityscapes", 0.005)
    assert record["mIoU"] == pytest.approx(expected["averageScoreClasses"], rel=1e-12)
    assert {name: values["iou"] for name, values in record["per_class"].items()} == pytest.approx(
        expected["classScores"], rel=1e-12
    )
    cells = np.array(record["confusion"])
    ids = list(DATA_SETS["cityscapes"].METAINFO["category_ids"])
    official = np.array(expected["confMatrix"])[ids]
    np.testing.assert_array_equal(cells[:, :19], official[:, ids])
    np.testing.assert_array_equal(cells[:, 19], official.sum(1) - official[:, ids].sum(1))
    assert 0 < record["mBIoU"] < record["mIoU"]
    for path in found.glob("*.png"):
        write_map(tmp_path / path.name, np.full((128, 256), 255))
    with pytest.raises(
        ValueError, match=r"holds the labels 255 \(32768 pixels\).*write label ids \(7..33\), no train ids"
    ):
        evaluate_data_set(truth, tmp_path, "cityscapes")
    with pytest.raises(ValueError, match="'cityscape' is not known; did you mean 'cityscapes'"):
        evaluate_data_set(truth, tmp_path, "cityscape")


@needs_shared
def test_camvid_from_files(tmp_path):
    expected, data = official_case("camvid_val_rule")
    truth = data / "camvid" / "labels" / "val"
    for i, name in enumerate(listed_names(str(data / "camvid" / "val.txt"))):
        labels = cv2.imread(str(truth / f"{name}.png"), cv2.IMREAD_UNCHANGED)
        write_map(tmp_path / f"{name}.png", camvid_noisy(labels, i))
    record = evaluate_data_set(truth, tmp_path, "camvid")
    assert record["confusion"] == expected["noisy"]["confusion"]
    assert_official({**record, "per_class": list(record["per_class"].values())}, expected["noisy"])


@needs_shared
def test_nuclei_from_files(tmp_path):
    expected, data = official_case("binary_dice_rule")
    truth = data / "dsb2018_nuclei" / "instances" / "val"
    for path in truth.glob("*.png"):
        write_map(tmp_path / path.name, np.roll(cv2.imread(str(path), cv2.IMREAD_UNCHANGED) > 0, (2, -1), (0, 1)))
    nucleus = evaluate_data_set(truth, tmp_path, "dsb2018")["per_class"]["nucleus"]
    assert nucleus["dice"] == pytest.approx(expected["dsb2018_val"]["foreground"]["Dice"], rel=1e-12)
    assert nucleus["iou"] == pytest.approx(expected["dsb2018_val"]["foreground"]["IoU"], rel=1e-12)
