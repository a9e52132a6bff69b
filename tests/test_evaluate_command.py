"""Scoring of COCO panoptic files: the command, bad files, the pool, the benchmark."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from densepred.evaluation.benchmark import benchmark_eval, measure_eval, write_synthetic
from densepred.evaluation.coco_format import read_id_map, write_id_map
from densepred.evaluation.panoptic import evaluate_and_print, evaluate_files
from tests.test_panoptic_quality import assert_record_equal, fixture_case

ROOT = Path(__file__).parents[1]


def run_command(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/evaluate.py", "panoptic", *map(str, args)]
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
    done = run_command("--gt", gt_json, "--gt-dir", gt_dir, "--pred", pred_json, "--pred-dir", pred_dir, "--out", out)
    assert done.returncode == 0, done.stderr
    assert_record_equal(json.loads(out.read_text()), expected)
    assert "thing44" in done.stdout and "44.95" in done.stdout


def test_command_fails_with_one_message(case):
    (case["pred_dir"] / "1.png").unlink()
    done = run_command(
        "--gt", case["gt_json"], "--gt-dir", case["gt_dir"], "--pred", case["pred_json"], "--pred-dir", case["pred_dir"]
    )
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
