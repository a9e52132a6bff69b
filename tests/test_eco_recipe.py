"""ECO-M2F's three steps at toy size on Shapes: parent, derived data set, gates, trade-off, and what can go wrong between."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from densepred import eco
from densepred.adaptive import AdaptiveSegmentor, check_dataset, check_exits, parent_checkpoint
from densepred.data.derived import GateDataset, LoadIdealDepth, read_derived
from densepred.eco import Source, derive
from densepred.eco_tradeoff import parse_gates, trade_off
from densepred.engine import runner
from densepred.engine.build import build_model
from densepred.engine.checkpoint import read_checkpoint, write_checkpoint
from densepred.evaluation.panoptic import panoptic_counts, panoptic_quality
from densepred.inference import load_model, predict_image
from densepred.registry import DATASETS
from densepred.structures import SegSample
from tests.conftest import ROOT
from tests.small import CONFIGS

PARENT, GATE = (str(CONFIGS / f"eco_m2f_r18_shapes{step}.py") for step in ("", "_gate"))
BETAS = [0.0, 0.01, 1.0]
STEPS = 25
MODEL = {
    "image_size": (64, 80),
    "val_dataloader.num_workers": 0,
    "val_dataloader.persistent_workers": False,
    "default_hooks.checkpoint.save_best": None,
    "default_hooks.logger.interval": 1,
    "model.head.num_layers": 1,
    "model.head.num_queries": 16,
    "model.head.num_heads": 4,
    "model.head.object_mask_threshold": 0.1,
    "model.head.criterion.num_points": 256,
    "model.decoder.decoder.num_heads": 4,
} | {
    f"model.{part}.{name}": size
    for part in ("decoder.decoder", "head")
    for name, size in (("embed_dim", 64), ("ffn_dim", 64))
}
MODEL |= {"model.decoder.decoder.mask_dim": 64}
PLAIN = [dict(type="LoadImage"), dict(type="LoadPanoptic"), dict(type="PackSegInputs")]
TRAINING = {
    "train_pipeline": PLAIN,
    "train_dataloader.num_workers": 0,
    "train_dataloader.persistent_workers": False,
    "train_dataloader.batch_size": 6,
    "train_cfg.max_iters": STEPS,
    "train_cfg.val_interval": STEPS,
    "default_hooks.checkpoint.interval": STEPS,
    "optim_wrapper.optimizer.lr": 2e-3,
    "optim_wrapper.clip_grad.max_norm": 1.0,
}
GATING = {
    "train_dataloader.batch_size": 6,
    "train_cfg.max_iters": 60,
    "train_cfg.val_interval": 60,
    "default_hooks.checkpoint.interval": 60,
    "optim_wrapper.optimizer.lr": 0.05,
    "optim_wrapper.clip_grad.max_norm": 10.0,
    "val_dataset.ann_file": "annotations/panoptic_train2017.json",
    "val_dataset.image_dir": "train2017",
}
"""The gate is validated on the images whose targets it learns by heart."""


def options(shapes: Path, **more) -> dict:
    return MODEL | {"data_root": str(shapes)} | {key.replace("__", "."): value for key, value in more.items()}


def metrics(work_dir: Path) -> dict:
    return json.loads((work_dir / "metrics.json").read_text())["metrics"]


def scalars(work_dir: Path) -> list[dict]:
    lines = [json.loads(line) for path in work_dir.glob("*/vis_data/scalars.json") for line in path.open()]
    return [line for line in lines if "loss" in line]


def test(config: str, checkpoint: Path, work_dir: Path, shapes: Path, **more) -> dict:
    runner.test(config, str(checkpoint), options(shapes, **more), str(work_dir), "none", None, None)
    return metrics(work_dir)


test.__test__ = False


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tensors of a toy gain nothing from a second thread, and lose much where others want the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("eco")


@pytest.fixture(scope="module")
def parent(shapes, work) -> Path:
    """Step 1: the parent's checkpoint."""
    runner.train(PARENT, options(shapes) | TRAINING, str(work / "parent"), None, "none", False)
    return work / "parent" / f"iter_{STEPS}.pth"


@pytest.fixture(scope="module")
def derived(shapes, work, parent) -> Path:
    """Step 2: the derived data set's file."""
    derive(Source(PARENT, str(parent), cfg_options=options(shapes)), work / "derived.json", BETAS)
    return work / "derived.json"


def train_gate(shapes: Path, work_dir: Path, derived: Path, beta: float, resume: str | None = None, **more) -> Path:
    chosen = options(shapes, **more) | GATING | {"derived": str(derived), "beta": beta}
    runner.train(GATE, chosen, str(work_dir), resume, "none", False)
    return work_dir / "iter_60.pth"


@pytest.fixture(scope="module")
def gates(shapes, work, derived) -> dict[float, Path]:
    """Step 3: the checkpoint of a gate for each of two betas."""
    return {beta: train_gate(shapes, work / f"gate_{beta}", derived, beta) for beta in (0.0, 1.0)}


def test_parent_visits_every_depth(parent, work):
    lines = scalars(work / "parent")
    assert {line["encoder_layers"] for line in lines} == {2, 3, 4, 5, 6}
    assert len(lines) == STEPS
    assert not read_checkpoint(parent)["state_dict"]["decoder.gate.bias"].any()


def test_derived_qualities_are_those_of_each_image_alone(shapes, parent, derived):
    record = read_derived(derived)
    assert record.quality.shape == (6, 5)
    assert (record.quality > 0).any() and np.ptp(record.quality, axis=1).max() > 0, (
        "the toy is too small to show anything"
    )
    for depth in (2, 5):
        model = load_model(PARENT, parent, cfg_options=options(shapes, model__exit=depth))
        images = dict(type="CocoPanoptic", ann_file="annotations/panoptic_train2017.json", image_dir="train2017")
        dataset = DATASETS.build(dict(images, data_root=str(shapes), classes_from_file=True, pipeline=PLAIN))
        for i in (0, 4):
            truth = dataset[i]["data_samples"].gt_panoptic
            found = predict_image(model, dataset.get_data_info(i)["img_path"]).pred_panoptic
            counts = panoptic_counts(truth.numpy(), truth.segments, found.numpy(), found.segments, 10)
            expected = panoptic_quality(counts, dataset.metainfo["isthing"])["All"]["pq"]
            assert record.quality[i, record.depths.index(depth)] == pytest.approx(expected, abs=1e-9)


def test_derived_vectors_are_what_the_gate_reads(shapes, parent, derived):
    model = load_model(PARENT, parent, cfg_options=options(shapes))
    seen = []
    model.decoder.gate_logits = lambda summary: seen.append(summary) or torch.zeros(1, 5)
    record = read_derived(derived)
    predict_image(model, shapes / "train2017" / record.record["images"][3]["file"])
    torch.testing.assert_close(record.vectors()[3], seen[0][0], atol=1e-6, rtol=1e-6)


def test_ideal_depth_falls_as_beta_grows(derived):
    record = read_derived(derived)
    means = [entry["mean_depth"] for entry in record.record["betas"]]
    assert [entry["beta"] for entry in record.record["betas"]] == BETAS
    assert means == sorted(means, reverse=True) and means[0] > means[-1]
    for entry in record.record["betas"]:
        assert sum(entry["counts"]) == len(entry["depths"]) == 6


def test_a_further_beta_needs_no_forward_pass(shapes, parent, derived, work, monkeypatch):
    for path in (derived, derived.with_suffix(".safetensors")):
        shutil.copy(path, path.with_name(f"more{path.suffix}"))
    copy = derived.with_name("more.json")
    record = json.loads(copy.read_text())
    record["vectors"]["file"] = "more.safetensors"
    copy.write_text(json.dumps(record))
    monkeypatch.setattr(eco.Measurement, "__call__", lambda self, index: pytest.fail("a forward pass"))
    source = Source(PARENT, str(parent), cfg_options=options(shapes))
    more = derive(source, copy, [0.02])
    assert [entry["beta"] for entry in more.record["betas"]] == sorted([*BETAS, 0.02])
    assert (more.quality == read_derived(derived).quality).all()


def test_killed_derivation_goes_on(shapes, parent, derived, work):
    """kill -9 in the middle of two worker processes; the finished images are not measured again."""
    slow = options(shapes, image_size=(192, 240))  # its own settings, so its own qualities
    source = f"Source({PARENT!r}, {str(parent)!r}, cfg_options={slow!r})"
    out = work / "killed" / "derived.json"
    code = f"from densepred.eco import Source, derive\nif __name__ == '__main__':\n    derive({source}, {str(out)!r}, [0.0], 2)"
    script = work / "derive.py"
    script.write_text(code)
    started = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    records = out.with_suffix(".records.jsonl")
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and started.poll() is None:
        if records.is_file() and records.read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not out.exists()
    with records.open("a") as file:
        file.write('{"i": 5, "quality": [0.1')  # what a kill in the middle of a line leaves
    done = records.read_bytes().count(b"\n") - 1
    assert 2 <= done < 6
    measured = []
    whole = Source(PARENT, str(parent), cfg_options=slow)
    original = eco.Measurement.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eco.Measurement, "__call__", lambda self, i: measured.append(i) or original(self, i))
        resumed = derive(whole, out, [0.0])
        assert len(measured) == 6 - done
        straight = derive(whole, work / "straight" / "derived.json", [0.0])
    np.testing.assert_allclose(resumed.quality, straight.quality, atol=1e-6)
    torch.testing.assert_close(resumed.vectors(), straight.vectors(), atol=1e-4, rtol=1e-4)
    assert not records.exists()


def test_gates_learn_to_go_less_deep_as_beta_grows(gates, derived, parent, work):
    found = {beta: metrics(path.parent) for beta, path in gates.items()}
    wanted = {entry["beta"]: entry["mean_depth"] for entry in read_derived(derived).record["betas"]}
    assert {beta: figures["EncoderDepth"] for beta, figures in found.items()} == {b: wanted[b] for b in found}
    assert found[0.0]["EncoderDepth"] > found[1.0]["EncoderDepth"] == 2.0
    assert found[0.0]["EncoderGFLOPs"] > found[1.0]["EncoderGFLOPs"] > 0
    first, *_, last = scalars(work / "gate_1.0")
    assert last["loss_gate"] < 0.2 < first["loss_gate"]
    assert last["gate_accuracy"] == 1.0
    before = read_checkpoint(parent)["state_dict"]
    after = read_checkpoint(gates[1.0])["state_dict"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder.gate.weight", "decoder.gate.bias"}


def test_trade_off_equals_the_test_command_for_every_kind_of_policy(shapes, parent, gates, work):
    source = Source(PARENT, str(parent), "val", cfg_options=options(shapes))
    named = {beta: str(path) for beta, path in gates.items()}
    points = trade_off(source, work / "trade", named, BETAS)
    assert json.loads((work / "trade" / "tradeoff.json").read_text())["points"] == points
    assert (work / "trade" / "tradeoff.png").stat().st_size > 5000
    val = derive(source, work / "val.json", BETAS)

    def same(measured: dict, **policy) -> None:
        (found,) = (p for p in points if policy.items() <= p.items())
        assert found["PQ"] == pytest.approx(measured["PQ"], abs=1e-9)
        assert found["mean_depth"] == measured["EncoderDepth"]
        assert found["encoder_gflops"] == pytest.approx(measured["EncoderGFLOPs"])

    same(test(PARENT, parent, work / "fixed", shapes, model__exit=3), policy="fixed", depth=3)
    for beta, path in gates.items():
        same(test(GATE, path, work / f"test_{beta}", shapes), policy="gate", beta=beta)
    oracle = [
        *[dict(type="LoadImage"), dict(type="ResizeToFit", size=(64, 80)), dict(type="LoadPanoptic")],
        *[dict(type="PackSegInputs"), dict(type="LoadIdealDepth", derived=str(val.path), beta=0.0)],
    ]
    chosen = dict(model__exit="oracle", test_pipeline=oracle)
    same(test(PARENT, parent, work / "oracle", shapes, **chosen), policy="oracle", beta=0.0)
    depths = [p["encoder_gflops"] for p in points if p["policy"] == "fixed"]
    assert depths == sorted(depths) and depths[0] / depths[-1] == pytest.approx(2 / 6)


def test_gate_resumes_without_the_parent_and_wants_its_own(shapes, gates, derived, parent, work):
    resumed = train_gate(shapes, work / "resumed", derived, 1.0, resume=str(gates[1.0]))
    assert not resumed.exists(), "there was nothing left to train"
    weights = read_checkpoint(parent)["state_dict"]
    write_checkpoint({"state_dict": weights | {"head.query_feat": weights["head.query_feat"] + 1}}, work / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: these are not the weights that .*derived.json was derived with"):
        train_gate(shapes, work / "refused", derived, 1.0, load_from=str(work / "other.pth"))
    with pytest.raises(ValueError, match=r"other.pth: this gate belongs to other weights than .*iter_25.pth"):
        source = Source(PARENT, str(parent), "val", cfg_options=options(shapes))
        trade_off(source, work / "trade2", {1.0: str(work / "other.pth")}, [])


def changed(derived: Path, path: Path, change) -> Path:
    """Write a copy of a derived data set with one thing changed."""
    record = json.loads(derived.read_text())
    change(record)
    path.write_text(json.dumps(record))
    shutil.copy(derived.with_suffix(".safetensors"), path.parent)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["metainfo"]["classes"].__setitem__(0, "cat"), r"10 classes \(cat, disc, .*has 10 \(cross, disc"),
        (
            lambda r: r["dataset"].update(type="CityscapesPanoptic"),
            "from CityscapesPanoptic .* is CocoPanoptic: derive",
        ),
        (lambda r: r["model"].update(depths=[3, 4, 5, 6]), r"a model of depths=\[3, 4, 5, 6\], this one has \[2, 3"),
        (lambda r: r["model"].update(embed_dim=32), "a model of embed_dim=32, this one has 64"),
        (lambda r: r["made_with"].update(checkpoint="gone.pth"), r"gone.pth, with which .* load_from=PATH"),
        (lambda r: r["vectors"].update(digest="0"), "was not written together with"),
        (lambda r: r.update(format="?"), "is no derived data set"),
    ],
    ids=["classes", "data set", "depths", "width", "checkpoint", "vectors", "format"],
)
def test_gate_refuses_a_derived_data_set_of_something_else(gate_model, val_set, derived, tmp_path, change, message):
    path = changed(derived, tmp_path / "changed.json", change)
    with pytest.raises(ValueError, match=message):
        content = GateDataset(str(path), 0.0).derived
        check_dataset(content, val_set)
        check_exits(content, gate_model.decoder)
        parent_checkpoint(content)


@pytest.fixture(scope="module")
def gate_model(shapes) -> AdaptiveSegmentor:
    return build_model(GATE, options(shapes))


@pytest.fixture(scope="module")
def val_set(shapes):
    files = dict(ann_file="annotations/panoptic_val2017.json", image_dir="val2017", classes_from_file=True)
    return DATASETS.build(dict(type="CocoPanoptic", data_root=str(shapes), **files))


def test_unknown_beta_names_the_known_ones_and_the_command(derived):
    message = r"no ideal depths for beta=0.3 \(it has 0.0, 0.01, 1.0\).*eco_derive.py .*--betas 0.3"
    with pytest.raises(ValueError, match=message):
        GateDataset(str(derived), 0.3)


def test_derivation_refuses_an_existing_file_of_something_else(shapes, parent, derived, work, tmp_path):
    cases = {
        "another data set or split": dict(split="val"),
        "other test settings": dict(cfg_options=options(shapes, image_size=(32, 40))),
        "another model": dict(checkpoint=str(work / "shifted.pth")),
    }
    weights = read_checkpoint(parent)["state_dict"]
    write_checkpoint(
        {"state_dict": weights | {"head.query_feat": weights["head.query_feat"] + 1}}, work / "shifted.pth"
    )
    for message, what in cases.items():
        source = Source(**dict(dict(config=PARENT, checkpoint=str(parent), cfg_options=options(shapes)), **what))
        with pytest.raises(ValueError, match=f"derived.json is of {message}.*: choose another --out"):
            derive(source, derived, [0.0])
    with pytest.raises(ValueError, match="names no training images: give the parent's config"):
        derive(Source(GATE, str(parent), cfg_options=options(shapes)), tmp_path / "a.json")
    kmax = {"data_root": str(shapes)}
    with pytest.raises(ValueError, match=r"model is a Segmentor for panoptic; .* take a config eco_"):
        derive(Source(str(CONFIGS / "kmax_r18_shapes.py"), None, cfg_options=kmax), tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"--out .*a.txt: .* name it .*a.json"):
        derive(Source(PARENT, str(parent)), tmp_path / "a.txt")


def test_oracle_needs_every_image(shapes, parent, derived, work):
    model = load_model(PARENT, parent, cfg_options=options(shapes, model__exit="oracle"))
    with pytest.raises(ValueError, match=r"000001.png has no ideal_depth; end the test pipeline with"):
        predict_image(model, shapes / "val2017" / "000001.png")
    sample = SegSample(metainfo=dict(img_id=77, img_path="x.png"))
    with pytest.raises(ValueError, match=r"split train\) does not hold the image 77 \(x.png\): derive the split"):
        LoadIdealDepth(str(derived), 0.0)(dict(data_samples=sample))


def test_gates_are_named_by_their_beta():
    assert parse_gates(["0.0005=a=b.pth", "1=c.pth"]) == {0.0005: "a=b.pth", 1.0: "c.pth"}
    for word in ("0.1", "x=a.pth", "0.1="):
        with pytest.raises(ValueError, match=f"--gate {word}: write BETA=CHECKPOINT"):
            parse_gates([word])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent.json does not exist; tools/eco_derive.py CONFIG CHECKPOINT"):
        read_derived(tmp_path / "absent.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json is not JSON"):
        read_derived(tmp_path / "broken.json")
