"""Cityscapes' instance AP: folders against the official numbers, random frames against the official code, the metric."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.structures import InstanceData
from PIL import Image

from densepred.data.class_tables import CITYSCAPES, metainfo
from densepred.evaluation.cityscapes_instance import (
    CityscapesInstance,
    FolderWriter,
    average_precision,
    evaluate_and_print,
    evaluate_folders,
    frame_counts,
    instance_names,
    instance_record,
    read_instance_ids,
)
from densepred.evaluation.cityscapes_instance import _join as join
from densepred.structures import SegSample

SYNTHETIC = Path(__file__).parent / "data" / "metrics" / "cityscapes_instance"
GT, PRED = SYNTHETIC / "gtFine" / "val", SYNTHETIC / "pred_instance"
SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real sample data")
LABEL_IDS = (24, 25, 26, 27, 28, 31, 32, 33)
META_19 = metainfo(CITYSCAPES)
META_8 = {"classes": tuple(instance_names().values()), "isthing": (True,) * 8, "category_ids": LABEL_IDS}


def assert_record_equal(record: dict, expected: dict) -> None:
    """Hold every number against the official tool's to 1e-12; NaN equals NaN."""
    assert record.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_record_equal(record[key], value)
        else:
            np.testing.assert_allclose(record[key], value, rtol=0, atol=1e-12, err_msg=key)


def expected_record() -> dict:
    return json.loads((SYNTHETIC / "expected.json").read_text())


def test_folders_score_as_the_official_tool_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gtInstances.json").write_text("{}")  # the official tool's cache would be read
    assert_record_equal(evaluate_folders(GT, PRED), expected_record())
    assert [path.name for path in tmp_path.iterdir()] == ["gtInstances.json"]


@needs_shared
def test_real_label_maps_with_a_rule_as_prediction():
    folder = SHARED / "data" / "cityscapes_sample" / "gtFine" / "val" / "frankfurt"
    counts = []
    for path in sorted(folder.glob("*_instanceIds.png")):
        ids = read_instance_ids(path)
        rows, columns = (np.minimum(np.arange(side) // 8 * 8 + 4, side - 1) for side in ids.shape)
        counts.append(frame_counts(ids, rule(np.ascontiguousarray(ids[rows][:, columns]))))
    assert len(counts) == 15
    expected = json.loads((SHARED / "metrics" / "cityscapes_real_rule" / "expected.json").read_text())["instance"]
    wanted = {**expected["averages"], "apMatrix": expected["apMatrix"], "overlaps": expected["overlaps"]}
    assert_record_equal(instance_record(join(counts)), wanted)


def rule(ids: np.ndarray) -> list[tuple[np.ndarray, int, float]]:
    """Return the predictions that the case's README prescribes for a map of stride 8."""
    predictions: list[tuple[np.ndarray, int, float]] = []
    numbers = [int(v) for v in np.unique(ids) if v >= 1000 and v // 1000 in LABEL_IDS]
    for j, v in enumerate(numbers):
        label = v // 1000 if j % 5 != 4 else LABEL_IDS[(LABEL_IDS.index(v // 1000) + 1) % 8]
        mask, score = ids == v, ((v * 7919 + 104729) % 1000) / 1000
        predictions.append((mask, label, score))
        if j % 7 == 3:
            predictions.append((np.roll(mask, 12, axis=1), label, score / 2))
    return predictions


def random_frame(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[np.ndarray, int, float]]]:
    """Return ids (60, 90) with objects, groups, small, ignored and caravan ones, and moved copies as predictions."""
    ids = np.full((60, 90), 7, np.uint16)
    ids[:12] = 0
    for number in range(14):
        y, x, h, w = (int(v) for v in rng.integers((0, 0, 6, 6), (50, 80, 22, 26)))
        label = int(rng.choice([24, 26, 26, 29, 33]))
        ids[y : y + h, x : x + w] = label if rng.random() < 0.2 else label * 1000 + number
    predictions = []
    for number in np.unique(ids[ids >= 24]):
        for _ in range(int(rng.integers(0, 4))):
            mask = np.roll(ids == number, rng.integers(-2, 3, 2), axis=(0, 1))
            label = int(number) // 1000 or int(number)
            predictions.append((mask, label if rng.random() < 0.9 else 26, round(float(rng.random()), 1)))
    return ids, predictions


def official_matrix(truths: list[Path], texts: list[Path], root: Path) -> np.ndarray:
    """Return the official AP (C, T) without its cache files."""
    import cityscapesscripts.evaluation.evalInstanceLevelSemanticLabeling as tool
    from cityscapesscripts.evaluation.instances2dict import instances2dict

    args = SimpleNamespace(**vars(tool.args))
    args.quiet, args.predictionPath = True, str(root)
    tool.setInstanceLabels(args)
    paths = [str(path) for path in truths]
    matches = tool.matchGtWithPreds([str(text) for text in texts], paths, instances2dict(paths, False), args)
    return tool.evaluateMatches(matches, args)[0]


@pytest.mark.parametrize("seed", range(4))
def test_random_frames_score_as_the_official_code_says(tmp_path, seed):
    rng = np.random.default_rng(seed)
    frames = [random_frame(rng) for _ in range(4)]
    truths, texts, writer = [], [], FolderWriter(tmp_path / "pred")
    for number, (ids, predictions) in enumerate(frames):
        name = f"city_{number:06d}_000019"
        truths.append(tmp_path / f"{name}_gtFine_instanceIds.png")
        cv2.imwrite(str(truths[-1]), ids)
        masks, labels, scores = zip(*predictions, strict=True)
        writer.write(name, np.stack(masks), labels, scores)
        texts.append(tmp_path / "pred" / f"{name}.txt")
    ours = average_precision(join([frame_counts(*frame) for frame in frames]))
    np.testing.assert_allclose(ours, official_matrix(truths, texts, tmp_path / "pred"), rtol=0, atol=1e-12)
    assert 0 < np.nanmean(ours) < 1 and np.isnan(ours).any()
    record = evaluate_folders(tmp_path, tmp_path / "pred")
    np.testing.assert_array_equal(record["apMatrix"], ours)


def square(size: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (50, 60) of a road with one car, and the car's mask."""
    ids = np.full((50, 60), 7, np.uint16)
    ids[10 : 10 + size, 10 : 10 + size] = 26001
    return ids, ids == 26001


def test_no_prediction_is_zero_and_no_object_is_nan():
    ids, mask = square()
    record = instance_record(frame_counts(ids, []))
    assert record["allAp"] == 0 and record["classes"]["car"] == {"ap": 0, "ap50%": 0}
    assert np.isnan(record["classes"]["person"]["ap"])
    nothing = instance_record(frame_counts(np.full_like(ids, 7), [(mask, 26, 0.5)]))
    assert np.isnan(nothing["allAp"]) and np.isnan(nothing["allAp50%"])
    assert instance_record(frame_counts(ids, [(mask, 26, 0.5), (~mask, 24, 0.9), (~mask, 7, 1.0)]))["allAp"] == 1


def test_forgiven_predictions_alone_give_zero():
    ids, mask = square()
    ids[40:] = 1  # an ignored class
    assert instance_record(frame_counts(ids, [(ids == 1, 26, 0.5), (mask & False, 26, 0.9)]))["allAp"] == 0


def test_a_second_hit_and_a_small_object():
    ids, mask = square()
    twice = frame_counts(ids, [(mask, 26, 0.2), (mask, 26, 0.7)])
    assert twice.outcomes[:, 0].tolist() == [2, 1]  # the better score finds the car, the other one is spurious
    ids, mask = square(9)
    small = frame_counts(ids, [(mask, 26, 0.2)])
    assert small.objects.sum() == 0 and not small.outcomes.any()


def synthetic_samples(meta: dict) -> list[SegSample]:
    """Return the fixture's predictions as samples of a data set with these classes."""
    samples = []
    for text in sorted(PRED.glob("*.txt")):
        ids = read_instance_ids(GT / "zeroville" / f"{text.stem}_gtFine_instanceIds.png")
        lines = [line.split() for line in text.read_text().splitlines()]
        lines = [line for line in lines if int(line[1]) in meta["category_ids"]]
        masks = [np.asarray(Image.open(PRED / line[0]).convert("L")) > 0 for line in lines]
        sample = SegSample(metainfo={"img_path": f"zeroville/{text.stem}_leftImg8bit.png", "img_id": text.stem})
        sample.pred_instances = InstanceData(
            masks=torch.from_numpy(np.array(masks, bool).reshape(-1, *ids.shape)),
            labels=torch.tensor([meta["category_ids"].index(int(line[1])) for line in lines], dtype=torch.int64),
            scores=torch.tensor([float(line[2]) for line in lines], dtype=torch.float64),
        )
        samples.append(sample)
    return samples


@pytest.mark.parametrize("meta", [META_19, META_8])
def test_metric_gives_the_official_numbers(tmp_path, meta):
    samples, expected = synthetic_samples(meta), expected_record()
    evaluator = Evaluator(
        [dict(type="densepred.CityscapesInstance", data_root=str(SYNTHETIC), out_dir=str(tmp_path / "out"))]
    )
    evaluator.dataset_meta = meta
    for _ in range(2):  # nothing of the first evaluation is left in the second
        for sample in samples:
            evaluator.process([sample])
        metrics = evaluator.evaluate(len(samples))
        assert metrics == pytest.approx({"AP": 100 * expected["allAp"], "AP50": 100 * expected["allAp50%"]}, abs=1e-10)
    metric = evaluator.metrics[0]
    assert_record_equal(metric.metrics_record(), expected)
    assert_record_equal(metric.per_class, expected["classes"])
    assert_record_equal(evaluate_folders(GT, tmp_path / "out"), expected)  # the files are in the official format


def test_metric_rejects_what_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gtFine/test does not exist"):
        CityscapesInstance(str(SYNTHETIC), split="test")
    metric = CityscapesInstance(str(SYNTHETIC))
    metric.dataset_meta = META_8
    (sample,) = synthetic_samples(META_8)[:1]
    with pytest.raises(ValueError, match=r"label 8, outside 0\.\.7"):
        metric.process(None, [changed(sample, labels=sample.pred_instances.labels * 0 + 8)])
    with pytest.raises(ValueError, match=r"leftImg8bit\.png: a predicted mask is 64x256 pixels .* truth 128x256"):
        metric.process(None, [changed(sample, masks=sample.pred_instances.masks[:, ::2])])
    absent = sample.new(metainfo={"img_path": "zeroville_000099_000019_leftImg8bit.png"})
    with pytest.raises(FileNotFoundError, match=r"zeroville_000099_000019_gtFine_instanceIds\.png: no such label file"):
        metric.process(None, [absent.to_dict()])
    metric.process(None, [sample.to_dict()])
    with pytest.raises(ValueError, match="counted 1 images of a data set of 2"):
        metric.evaluate(2)


def changed(sample: SegSample, **fields) -> dict:
    """Return the sample's dictionary with other fields of its prediction."""
    return {**sample.to_dict(), "pred_instances": {**sample.pred_instances.to_dict(), **fields}}


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Two folders of one frame that a test may spoil."""
    name = "zeroville_000000_000019"
    (tmp_path / "gt").mkdir()
    shutil.copy(GT / "zeroville" / f"{name}_gtFine_instanceIds.png", tmp_path / "gt")
    shutil.copytree(PRED, tmp_path / "pred", ignore=shutil.ignore_patterns("*_00000[1-9]_*"))
    return tmp_path / "gt", tmp_path / "pred"


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("masks/none.png 24 0.5", FileNotFoundError, r"none\.png: no such mask"),
        ("masks/a.png 24", ValueError, r"line 1: 'masks/a\.png 24' is not `mask\.png label_id score`"),
        ("masks/a.png car 0.5", ValueError, "is not `mask.png label_id score`"),
        ("masks/zeroville_000000_000019_000.png 40 0.5", ValueError, "label id 40"),
        ("masks/zeroville_000000_000019_000.png 24 nan", ValueError, "score nan"),
        ("../gt/a.png 24 0.5", ValueError, "outside"),
        ("zeroville_000000_000019.txt 24 0.5", ValueError, "not a readable PNG"),
    ],
)
def test_wrong_lines_are_named(folders, line, error, message):
    (folders[1] / "zeroville_000000_000019.txt").write_text(line + "\n")
    with pytest.raises(error, match=message):
        evaluate_folders(*folders)


def test_wrong_folders_are_named(folders):
    gt, pred = folders
    with pytest.raises(FileNotFoundError, match=r"no \*_gtFine_instanceIds\.png in it"):
        evaluate_folders(pred, pred)
    text = pred / "zeroville_000000_000019.txt"
    shutil.copy(text, pred / "zeroville_000000_000019_again.txt")
    with pytest.raises(ValueError, match="2 text files zeroville_000000_000019"):
        evaluate_folders(gt, pred)
    for path in pred.glob("*.txt"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="no text file zeroville_000000_000019"):
        evaluate_folders(gt, pred)
    text.write_text("")
    cv2.imwrite(str(next(gt.iterdir())), np.full((4, 5), 40000, np.uint16))
    with pytest.raises(ValueError, match="the ground truth has id 40000, but label ids end at 33"):
        evaluate_folders(gt, pred)


def test_masks_of_any_kind_of_png(folders):
    """Palettes and 16 bits are read as the official tool does it."""
    gt, pred = folders
    wanted = evaluate_folders(gt, pred)
    for path, mode in zip(sorted((pred / "masks").glob("*.png")), ("P", "RGB", "I;16", "L", "LA"), strict=False):
        grey = Image.open(path).convert("L")
        wide = Image.fromarray(np.asarray(grey).astype(np.uint16)) if mode == "I;16" else grey.convert(mode)
        wide.save(path)
    assert_record_equal(evaluate_folders(gt, pred), wanted)


def test_command_prints_a_table_and_writes_null(folders, tmp_path, capsys):
    gt, pred = folders
    evaluate_and_print(str(gt), str(pred), out=str(tmp_path / "new" / "ap.json"))
    assert "motorcycle" in (printed := capsys.readouterr().out) and "Cityscapes instance AP" in printed
    record, written = evaluate_folders(gt, pred), json.loads((tmp_path / "new" / "ap.json").read_text())
    assert written["allAp"] == record["allAp"]
    absent = [name for name, values in record["classes"].items() if np.isnan(values["ap"])]
    assert absent and all(written["classes"][name] == {"ap": None, "ap50%": None} for name in absent)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    samples = synthetic_samples(META_8)
    metric = CityscapesInstance(str(SYNTHETIC), out_dir=f"{folder}/out")
    metric.dataset_meta = META_8
    metric.process(None, [sample.to_dict() for sample in (samples[3:] if rank else samples[:3])])
    Path(folder, f"rank{rank}.json").write_text(json.dumps(metric.evaluate(len(samples))))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_numbers(tmp_path):
    code = "import sys; from tests.test_cityscapes_instance import run_rank; run_rank(int(sys.argv[1]), sys.argv[2])"
    ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    for rank in (0, 1):
        metrics = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert metrics["AP"] == pytest.approx(100 * expected_record()["allAp"], abs=1e-10)
    assert_record_equal(evaluate_folders(GT, tmp_path / "out"), expected_record())
