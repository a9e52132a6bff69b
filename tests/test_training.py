"""Whole runs, as a user starts them: what they leave behind, that they repeat, resume and stop as they should."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from densepred.engine import runner
from densepred.engine.checkpoint import read_checkpoint
from densepred.engine.conversion import to_official
from densepred.evaluation.panoptic import evaluate_files
from tests.conftest import ROOT
from tests.small import SHAPES_CONFIG, as_words, small_shapes


def train(root: Path, work_dir: Path, resume: str | None = None, amp: bool = False, **options):
    return runner.train(SHAPES_CONFIG, small_shapes(root, **options), str(work_dir), resume, "none", amp)


def command(tool: str, *words: str) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *words]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(path)["state_dict"]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def finished(shapes, tmp_path_factory) -> Path:
    work_dir = tmp_path_factory.mktemp("finished")
    train(shapes, work_dir)
    return work_dir


def test_run_leaves_checkpoint_metrics_curves_and_pictures(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["iteration"] == 4
    assert {"PQ", "SQ", "RQ", "PQ_th", "PQ_st"} <= metrics["metrics"].keys()
    assert len(metrics["per_class"]) == 10
    assert (finished / "iter_4.pth").is_file()
    assert list(finished.glob("best_PQ_*.pth"))
    assert list(finished.glob("**/*curve*.png"))
    assert list(finished.glob("pictures/*.png"))
    scalars = [json.loads(line) for path in finished.glob("*/vis_data/scalars.json") for line in path.open()]
    assert {line["step"] for line in scalars if "loss" in line} == {1, 2, 3, 4}


def test_checkpoint_is_safe_to_load_and_written_config_runs_again(finished, shapes):
    checkpoint = torch.load(finished / "iter_4.pth", weights_only=True)
    assert checkpoint["meta"]["iter"] == 4
    from densepred import build_model

    model = build_model(finished / "kmax_r18_shapes.py", {"num_classes": 10})
    model.load_state_dict(checkpoint["state_dict"])


def test_test_command_repeats_the_validation_and_writes_predictions(finished, shapes, tmp_path):
    words = as_words({k: v for k, v in small_shapes(shapes).items() if not k.startswith("default_hooks")})
    outputs = [
        "--work-dir",
        str(tmp_path / "test"),
        "--out",
        str(tmp_path / "out"),
        "--show-dir",
        str(tmp_path / "show"),
    ]
    done = subprocess.run(
        command("test", SHAPES_CONFIG, str(finished / "iter_4.pth"), *outputs, "--cfg-options", *words),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "test" / "metrics.json").read_text())["metrics"]
    validated = json.loads((finished / "metrics.json").read_text())["metrics"]
    assert measured["PQ"] == pytest.approx(validated["PQ"], abs=1e-9)
    assert "| cross " in done.stdout
    assert len(list((tmp_path / "show").glob("*.png"))) == 3
    truth = shapes / "annotations" / "panoptic_val2017.json"
    out = tmp_path / "out"
    record = evaluate_files(truth, truth.with_suffix(""), out / "predictions.json", out / "predictions")
    assert 100 * record["All"]["pq"] == pytest.approx(measured["PQ"], abs=1e-9)


def test_official_file_loads_without_a_conversion_step(finished, shapes, tmp_path):
    official = to_official(weights(finished / "iter_4.pth"), "kmax-deeplab")
    torch.save({"model": official, "iteration": 4}, tmp_path / "official.pth")
    tested = runner.test(
        SHAPES_CONFIG, str(tmp_path / "official.pth"), small_shapes(shapes), str(tmp_path), "none", None, None
    )
    assert equal(weights(finished / "iter_4.pth"), tested.model.state_dict())


def test_evaluation_refuses_an_encoder_by_itself(finished, shapes, tmp_path):
    torch.save(to_official(weights(finished / "iter_4.pth"), "torchvision-resnet"), tmp_path / "resnet18.pth")
    with pytest.raises(ValueError, match=r"(?s)resnet18.pth: .*missing from the file: decoder"):
        runner.test(
            SHAPES_CONFIG, str(tmp_path / "resnet18.pth"), small_shapes(shapes), str(tmp_path), "none", None, None
        )


def test_two_runs_are_equal_to_the_bit(finished, shapes, tmp_path):
    train(shapes, tmp_path)
    assert equal(weights(finished / "iter_4.pth"), weights(tmp_path / "iter_4.pth"))


def test_killed_run_resumes_to_equal_weights(shapes, tmp_path):
    """kill -9 in the middle; what is lost is only the steps since the last checkpoint, and they repeat exactly."""
    options = small_shapes(
        shapes, train_cfg__max_iters=12, train_cfg__val_interval=4, model__head__drop_path=0.2, ema=True
    ) | {"train_dataloader.num_workers": 1}
    start = command("train", SHAPES_CONFIG, "--cfg-options", *as_words(options))
    whole = subprocess.run([*start, "--work-dir", str(tmp_path / "whole")], capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr

    killed = subprocess.Popen(
        [*start, "--work-dir", str(tmp_path / "killed")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    pointer = tmp_path / "killed" / "last_checkpoint"
    deadline = time.monotonic() + 120
    while not pointer.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "iter_12.pth").exists()

    resumed = subprocess.run(
        [*start, "--work-dir", str(tmp_path / "killed"), "--resume"], capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    one, other = (read_checkpoint(tmp_path / name / "iter_12.pth") for name in ("whole", "killed"))
    assert equal(one["state_dict"], other["state_dict"])
    assert equal(one["ema_state_dict"], other["ema_state_dict"])
    for name, value in one["optimizer"]["state"][0].items():
        assert torch.equal(value, other["optimizer"]["state"][0][name])
    metrics = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "killed")]
    assert metrics[0] == metrics[1]


def test_resume_from_a_path_takes_that_checkpoint(finished, shapes, tmp_path):
    train(shapes, tmp_path, resume=str(finished / "iter_2.pth"))
    assert equal(weights(finished / "iter_4.pth"), weights(tmp_path / "iter_4.pth"))


def test_two_processes_train_and_validate_together(shapes, tmp_path):
    options = small_shapes(shapes, train_cfg__max_iters=2, train_cfg__val_interval=2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    tool = [str(ROOT / "tools" / "train.py"), SHAPES_CONFIG, "--launcher", "pytorch", "--work-dir", str(tmp_path)]
    done = subprocess.run(
        [*launcher, *tool, "--cfg-options", *as_words(options)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 images a step = 2 a process x 2 processes x 1 accumulated" in done.stdout
    assert json.loads((tmp_path / "metrics.json").read_text())["iteration"] == 2


def test_mixed_precision_trains_on_cpu(shapes, tmp_path):
    trained = train(shapes, tmp_path, amp=True, train_cfg__max_iters=2, train_cfg__val_interval=2)
    assert trained.optim_wrapper.__class__.__name__ == "AmpOptimWrapper"
    assert all(w.dtype != torch.bfloat16 for w in weights(tmp_path / "iter_2.pth").values())


def test_accumulated_steps_state_the_total_batch(shapes, tmp_path):
    done = train(
        shapes, tmp_path, train_cfg__max_iters=2, train_cfg__val_interval=2, optim_wrapper__accumulative_counts=2
    )
    assert done.optim_wrapper._accumulative_counts == 2
    log = next(tmp_path.glob("*/*.log")).read_text()
    assert (
        "4 images a step = 2 a process x 1 processes x 2 accumulated, but this recipe's learning rate is meant for 8"
        in log
    )


def test_exploding_run_stops_and_keeps_the_last_checkpoint(finished, shapes, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"iteration \d+: .*images of this batch: .*train2017.*last_checkpoint"
    ):
        train(shapes, tmp_path, optim_wrapper__optimizer__lr=1e30, train_cfg__max_iters=40, train_cfg__val_interval=40)
    kept = sorted(tmp_path.glob("iter_*.pth"))
    assert all(torch.isfinite(v).all() for path in kept[:1] for v in weights(path).values() if v.is_floating_point())


def test_class_count_clash_stops_before_the_first_step(shapes, tmp_path):
    message = r"train_dataloader.dataset has 10 classes \(cross, disc, triangle, ...\), model.head.num_classes is 11"
    with pytest.raises(ValueError, match=message):
        train(shapes, tmp_path, num_classes=11)
    assert not list(tmp_path.glob("*.pth"))


def test_thing_classes_clash_stops_before_the_first_step(shapes, tmp_path):
    with pytest.raises(
        ValueError, match=r"disagree whether 5 are things: set the top-level thing_classes=\[0, 1, 2, 3, 4, 5\]"
    ):
        train(shapes, tmp_path, thing_classes=[0, 1, 2, 3, 4])


def test_checkpoint_of_another_architecture_is_refused(finished, shapes, tmp_path):
    wider = {"model.decoder.base_channels": (16, 16, 8, 16)}
    with pytest.raises(ValueError, match=r"(?s)iter_4.pth: .*another shape: decoder"):
        runner.test(
            SHAPES_CONFIG, str(finished / "iter_4.pth"), small_shapes(shapes) | wider, str(tmp_path), "none", None, None
        )


def test_missing_data_root_is_one_message_without_a_trace(tmp_path):
    done = subprocess.run(
        command("train", SHAPES_CONFIG, "--work-dir", str(tmp_path), "--cfg-options", "data_root=nowhere/shapes"),
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "nowhere/shapes" in done.stderr
    assert "make demo" in done.stderr
