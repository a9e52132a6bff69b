"""The three data sets and their prepare scripts: bad roots and annotations are one clear error, real samples load."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

from densepred.data import (
    ADE20KPanoptic,
    ADE20KSemantic,
    CityscapesPanoptic,
    CityscapesSemantic,
    CocoPanoptic,
    LoadImage,
    LoadSemantic,
    SeekableSampler,
)
from densepred.data.ade20k import panoptic_from_labels
from densepred.data.cityscapes import panoptic_from_instance_ids
from densepred.data.dataset import resolve_data_root
from densepred.data.errors import DamagedImageError
from densepred.registry import DATASETS

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
PIPELINE = [dict(type="LoadImage"), dict(type="LoadPanoptic")]
ANN_FILE = "annotations/panoptic_train2017.json"


def real(name):
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason="the real sample is not there")


def run(script, *words):
    """Run a prepare script in this process."""
    spec = importlib.util.spec_from_file_location(script, ROOT / "datasets" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(module.make_parser().parse_args([str(word) for word in words]))


@pytest.fixture
def coco(shapes, tmp_path):
    """Root of a copy that a test may spoil."""
    return shutil.copytree(shapes, tmp_path / "coco")


def load(root, **options):
    return CocoPanoptic(
        str(root), ANN_FILE, "train2017", **{"classes_from_file": True, "pipeline": PIPELINE, **options}
    )


def edit(root, change):
    """Apply a change to the training JSON."""
    path = Path(root) / ANN_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_missing_root_says_how_to_get_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("DENSEPRED_DATASETS", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        load("datasets/coco")
    message = str(caught.value)
    assert "data root 'datasets/coco' not found" in message and str(tmp_path / "coco") in message
    for remedy in (
        "datasets/README.md",
        "prepare_coco.py",
        "data_root",
        "DENSEPRED_DATASETS",
        "`make demo` needs no data",
    ):
        assert remedy in message
    with pytest.raises(FileNotFoundError, match=r"prepare_cityscapes\.py"):
        CityscapesPanoptic("datasets/cityscapes", "train")
    with pytest.raises(FileNotFoundError, match=r"prepare_ade20k\.py"):
        ADE20KPanoptic("datasets/ADEChallengeData2016", "train")


def test_root_from_the_environment(coco, monkeypatch, tmp_path):
    monkeypatch.setenv("DENSEPRED_DATASETS", str(coco.parent))
    assert len(load("datasets/coco")) == 6
    assert resolve_data_root(str(coco)) == str(coco)
    (tmp_path / "here" / "coco").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert resolve_data_root("coco") == str(tmp_path / "here" / "coco")  # the path itself comes first


def test_missing_annotation_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"panoptic_train2017\.json does not exist; see datasets/README\.md"):
        load(tmp_path, classes_from_file=False)
    with pytest.raises(FileNotFoundError, match=r"`python datasets/prepare_cityscapes\.py \S+ --split val`"):
        CityscapesPanoptic(str(tmp_path), "val")
    with pytest.raises(FileNotFoundError, match=r"`python datasets/prepare_ade20k\.py \S+ --split val`"):
        ADE20KPanoptic(str(tmp_path), "val")
    with pytest.raises(ValueError, match="split='test'; choose one of train, val"):
        ADE20KPanoptic(str(tmp_path), "test")


@pytest.mark.parametrize("text", ["", "{", '{"images": [', "\x89PNG"])
def test_not_json(coco, text):
    (coco / ANN_FILE).write_text(text)
    with pytest.raises(ValueError, match=r"panoptic_train2017\.json is not JSON .* fetch it again"):
        load(coco)


def _drop(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (_drop("categories"), "has no list 'categories': it is not an annotation in the COCO panoptic format"),
        (_drop("images"), "has no list 'images'"),
        (_drop("annotations"), "has no list 'annotations'"),
        (_drop("categories", 3, "isthing"), r"categories\[3\] lacks the key 'isthing'"),
        (_drop("images", 2, "file_name"), r"images\[2\] lacks the key 'file_name'"),
        (_drop("annotations", 1, "segments_info"), r"annotations\[1\] lacks the key 'segments_info'"),
        (
            _drop("annotations", 1, "segments_info", 0, "category_id"),
            r"image 000002\.png: segments_info\[0\] lacks the key 'category_id'",
        ),
        (lambda c: c["categories"].clear(), "the list 'categories' is empty"),
        (lambda c: c["annotations"].clear(), "has no annotated image; choose another annotation file or split"),
        (lambda c: c["images"].append(c["images"][0]), "image id 1 occurs twice"),
        (lambda c: c["annotations"].append(c["annotations"][2]), "annotated image id 3 occurs twice"),
        (lambda c: c["categories"].append(c["categories"][0]), "category id 5 occurs twice"),
        (lambda c: c["images"].pop(0), "annotation of image 1, which is not in 'images'"),
        (
            lambda c: c["annotations"][0]["segments_info"].append(c["annotations"][0]["segments_info"][0]),
            r"image 000001\.png: segment id \d+ occurs twice",
        ),
        (lambda c: c["annotations"][0]["segments_info"][0].update(id=0), "a segment has id 0, which is void"),
        (
            lambda c: c["annotations"][4]["segments_info"][0].update(category_id=999),
            r"image 000005\.png: segment \d+ has category id 999, which is none of the 10 ids of the class table; take",
        ),
        (
            lambda c: c["images"][0].update(file_name="gone.jpg"),
            r"1 of 6 image files that \S+ names are missing, the first is \S+train2017/gone\.jpg; see datasets/README",
        ),
        (
            lambda c: c["annotations"][0].update(file_name="gone.png"),
            r"1 of 6 panoptic PNG files that \S+ names are missing, the first is \S+gone\.png",
        ),
    ],
)
def test_bad_annotations(coco, change, message):
    edit(coco, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(coco)
    assert str(coco / ANN_FILE) in str(caught.value)


def test_own_classes_need_the_switch(coco):
    edit(coco, lambda c: c["annotations"][0]["segments_info"][0].update(category_id=12))
    with pytest.raises(ValueError, match=r"category id 12, which is none of the 133 ids .*classes_from_file=True"):
        load(coco, classes_from_file=False)


def test_selections(coco):
    def make_crowds(content):
        for segment in content["annotations"][0]["segments_info"]:
            segment["iscrowd"] = 1

    edit(coco, make_crowds)
    names = [Path(record["img_path"]).stem[-1] for record in load(coco, filter_empty=True, indices=2)]
    assert names == ["2", "3"]
    assert len(load(coco, filter_empty=True, test_mode=True)) == 6
    assert [record["img_id"] for record in load(coco, indices=-2)] == [5, 6]
    assert [record["img_id"] for record in load(coco, indices=[4, 0])] == [5, 1]
    with pytest.raises(ValueError, match=r"indices holds 6, but there are 6 images \(0\.\.5\)"):
        load(coco, indices=[6])
    with pytest.raises(ValueError, match=r"no image of .* is left after filter_empty=False and indices=\[\]; change"):
        load(coco, indices=[])


def test_a_sample_is_set_by_seed_visit_and_image(coco):
    draw = [lambda results: results["rng"].integers(1 << 30)]
    dataset, same, other = (load(coco, pipeline=draw, seed=seed) for seed in (0, 0, 1))
    numbers = [dataset[i] for i in range(12)]  # two visits
    assert len(set(numbers)) == 12
    assert [same[i] for i in (11, 3)] == [numbers[11], numbers[3]]
    assert other[0] != numbers[0]
    with pytest.raises(IndexError, match="index -1 is negative"):
        dataset[-1]


def spoil(coco):
    path = coco / "train2017" / "000002.png"
    path.write_bytes(path.read_bytes()[:200])
    return path


def test_damaged_image_stops_by_default(coco):
    path = spoil(coco)
    with pytest.raises(DamagedImageError, match=rf"{path} cannot be decoded .* fetch it again"):
        load(coco)[1]
    with pytest.raises(DamagedImageError):
        load(coco, skip_damaged=True, test_mode=True)[1]


def test_damaged_image_is_skipped_counted_and_reported_once(coco, monkeypatch):
    reports = []
    monkeypatch.setattr("densepred.data.dataset.print_log", lambda message, **_: reports.append(message))
    path, dataset = spoil(coco), load(coco, skip_damaged=True)
    assert [dataset[i]["img_id"] for i in (0, 1, 7, 2)] == [1, 3, 3, 3]
    assert [count for message, count in dataset.damaged.items() if str(path) in message] == [2]
    assert len(reports) == 1 and reports[0].startswith(f"skipped: image {path} cannot be decoded")
    assert reports[0].endswith("(damaged files so far in this process: 1)")
    for name in path.parent.iterdir():
        name.write_bytes(b"")
    with pytest.raises(DamagedImageError, match=r"none of the 6 images of .* can be read"):
        dataset[0]


def test_png_and_json_that_do_not_fit(coco):
    edit(coco, lambda c: c["annotations"][1]["segments_info"].pop())
    with pytest.raises(DamagedImageError, match=r"000002\.png holds segment ids .* that its annotation does not list"):
        load(coco)[1]


def test_registered_names_build(coco):
    config = dict(type="CocoPanoptic", data_root=str(coco), ann_file=ANN_FILE, image_dir="train2017")
    dataset = DATASETS.build({**config, "classes_from_file": True})
    assert len(list(dataset)) == 6
    positions = iter(SeekableSampler(dataset, seed=0))
    assert sorted(next(positions) % 6 for _ in range(6)) == list(range(6))


# The prepare scripts.


def test_prepare_coco_reports(coco, capsys):
    run("prepare_coco", coco, "--classes-from-file")
    out = capsys.readouterr().out
    assert "6 annotated images, " in out and "10 of 10 classes seen" in out
    assert "train: 6 of 6 images read, all in order" in out and "val: 3 of 3 images read" in out


def test_prepare_coco_lists_every_bad_file(coco):
    path = spoil(coco)
    edit(coco, lambda c: c["annotations"][3]["segments_info"][0].update(area=1))
    edit(coco, lambda c: c["annotations"][4]["segments_info"].append({"id": 77, "category_id": 5}))
    with pytest.raises(ValueError, match="3 of 6 images cannot be used") as caught:
        run("prepare_coco", coco, "--classes-from-file", "--all")
    lines = str(caught.value).splitlines()[1:]
    assert str(path) in lines[0]
    assert "000004.png: segment" in lines[1] and "but the JSON states 1" in lines[1]
    assert "000005.png: segment 77 has 0 pixels, but the JSON lists it" in lines[2]


@pytest.mark.parametrize(
    "script", ["prepare_coco", "prepare_cityscapes", "prepare_ade20k", "prepare_shapes", "check_masks"]
)
def test_help_needs_no_slow_import(script):
    code = "import runpy, sys; path = sys.argv[1]; sys.argv = [path, '--help']\n"
    code += "try: runpy.run_path(path, run_name='__main__')\n"
    code += "except SystemExit as end: sys.exit(end.code or ('torch' in sys.modules and 'torch was imported'))"
    path = str(ROOT / "datasets" / f"{script}.py")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_wrong_root_is_one_line(tmp_path):
    command = [sys.executable, str(ROOT / "datasets" / "prepare_ade20k.py"), str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: data root ") and done.stderr.count("\n") == 1


def test_prepare_cityscapes(make_shapes, tmp_path, capsys):
    root = make_shapes("cityscapes")
    run("prepare_cityscapes", root, "--out", tmp_path, "--workers", "1")
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert len(made) == 2 + 9
    assert all((tmp_path / path).read_bytes() == (root / "gtFine" / path).read_bytes() for path in made)
    run("prepare_cityscapes", root, "--out", tmp_path, "--split", "val")
    assert "cityscapes_panoptic_val.json is there already; delete it to convert anew" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"no label files .*; unpack gtFine_trainvaltest\.zip into"):
        run("prepare_cityscapes", tmp_path, "--out", tmp_path / "new")


def test_cityscapes_conversion_is_the_official_one(make_shapes, tmp_path, capsys):
    root = make_shapes("cityscapes")
    convert2panoptic(str(root / "gtFine"), str(tmp_path), useTrainId=False, setNames=["val"])
    official, ours = (json.loads((f / "cityscapes_panoptic_val.json").read_text()) for f in (tmp_path, root / "gtFine"))
    assert {image["id"]: image for image in ours["images"]} == {image["id"]: image for image in official["images"]}
    found = {annotation["image_id"]: annotation for annotation in ours["annotations"]}
    assert len(found) == len(official["annotations"]) == 3
    for expected in official["annotations"]:
        annotation = found[expected["image_id"]]
        assert annotation["file_name"] == expected["file_name"]
        by_id = [{s["id"]: s for s in a["segments_info"]} for a in (annotation, expected)]
        assert by_id[0] == by_id[1]
        maps = [
            cv2.imread(str(f / "cityscapes_panoptic_val" / expected["file_name"])) for f in (tmp_path, root / "gtFine")
        ]
        assert np.array_equal(*maps)


def test_prepare_ade20k(make_shapes, tmp_path):
    root = shutil.copytree(make_shapes("ade20k"), tmp_path / "ade")
    shutil.rmtree(root / "annotations_instance")
    with pytest.raises(FileNotFoundError, match=r"annotations_instance/validation does not exist.*--stuff-only"):
        run("prepare_ade20k", root, "--out", tmp_path / "out", "--split", "val", "--workers", "1")
    run("prepare_ade20k", root, "--out", tmp_path / "out", "--split", "val", "--stuff-only", "--workers", "1")
    dataset = ADE20KPanoptic(str(root), "val", str(tmp_path / "out/ade20k_panoptic_val.json"), PIPELINE)
    assert len(dataset) == 3
    assert all(s["isthing"] == s["iscrowd"] for sample in dataset for s in sample["segments"])


def test_label_maps_of_unknown_classes():
    with pytest.raises(ValueError, match="instance id 34001 belongs to class 34, but label ids end at 33"):
        panoptic_from_instance_ids(np.full((2, 2), 34001, np.uint16))
    with pytest.raises(ValueError, match=r"values up to 151; wants \(H, W\) of 0\.\.150"):
        panoptic_from_labels(np.full((2, 2), 151, np.uint8), None)
    instances = np.zeros((2, 2, 3), np.uint8)
    instances[0] = [[3, 1, 0], [4, 1, 0]]
    with pytest.raises(ValueError, match=r"object 1 of the instance map has the classes \[3, 4\]; wants exactly one"):
        panoptic_from_labels(np.ones((2, 2), np.uint8), instances)


def test_ade20k_labels_are_reduced_once(make_shapes, tmp_path):
    root = shutil.copytree(make_shapes("ade20k"), tmp_path / "ade")
    dataset = ADE20KSemantic(str(root), "val", [LoadImage(), LoadSemantic()])
    path = dataset.get_data_info(0)["semantic_path"]
    stored = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    stored[:5], stored[5:9] = 0, 150
    cv2.imwrite(path, stored)
    first = dataset[0]
    assert np.array_equal(first["semantic"], stored - np.uint8(1)) and first["semantic"][0, 0] == 255
    again = LoadSemantic()(first)  # a second step in a pipeline reads the file again, it reduces nothing twice
    assert np.array_equal(again["semantic"], stored - np.uint8(1))
    # Files that somebody reduced before are told by their 255.
    cv2.imwrite(path, stored - np.uint8(1))
    with pytest.raises(
        DamagedImageError, match=r"labels 255 \(\d+ pixels\), .* from 0 to 150\); .* converted already\?"
    ):
        dataset[0]


def test_classes_that_never_occur_and_crops_without_labels(make_shapes, tmp_path):
    dataset = CityscapesSemantic(str(make_shapes("cityscapes")), "train", [LoadImage(), LoadSemantic()])
    seen = set(np.unique(np.concatenate([sample["semantic"].ravel() for sample in dataset])).tolist())
    assert len(dataset.metainfo["classes"]) == 19 and {16, 17} - seen  # train, motorcycle: the table stays whole
    root = shutil.copytree(make_shapes("cityscapes"), tmp_path / "cityscapes")
    for path in (root / "gtFine" / "train").rglob("*_labelIds.png"):
        cv2.imwrite(str(path), np.zeros((64, 80), np.uint8))
    crop = dict(type="ScaleAndCrop", crop_size=(48, 48), max_class_share=0.75)
    pipeline = [dict(type="LoadImage"), dict(type="LoadSemantic"), crop, dict(type="PackSegInputs")]
    sample = CityscapesSemantic(str(root), "train", pipeline)[0]["data_samples"]
    assert sample.gt_semantic.eq(255).all() and sample.gt_semantic.shape == sample.img_shape


# Real samples.


@real("coco128")
@pytest.mark.parametrize("split, segments, things, crowds", [("train", 1111, 746, 6), ("val", 1078, 712, 5)])
def test_real_coco(split, segments, things, crowds):
    dataset = CocoPanoptic(
        str(REAL / "coco128"), f"annotations/panoptic_{split}2017.json", f"{split}2017", pipeline=PIPELINE
    )
    infos = [info for i in range(100) for info in dataset.get_data_info(i)["segments_info"]]
    assert (len(dataset), len(infos)) == (100, segments)
    assert (sum(s["isthing"] for s in infos), sum(s["iscrowd"] for s in infos)) == (things, crowds)
    for i in range(0, 100, 20):
        sample = dataset[i]
        areas = np.bincount(sample["panoptic"].ravel(), minlength=len(sample["segments"]) + 1)[1:]
        assert areas.tolist() == [info["area"] for info in sample["segments_info"]]


@real("coco_panoptic_sample")
def test_real_panopticapi_samples():
    root = str(REAL / "coco_panoptic_sample")
    dataset = CocoPanoptic(root, "panoptic_examples.json", "input_images", pipeline=PIPELINE)
    assert [(len(s["segments"]), s["img"].shape) for s in dataset] == [(18, (427, 640, 3)), (32, (360, 640, 3))]


@real("cityscapes_sample")
def test_real_cityscapes(tmp_path):
    root = REAL / "cityscapes_sample"
    run("prepare_cityscapes", root, "--out", tmp_path, "--split", "train", "--workers", "1")
    dataset = CityscapesPanoptic(str(root), "train", str(tmp_path / "cityscapes_panoptic_train.json"), PIPELINE)
    infos = [info for i in range(len(dataset)) for info in dataset.get_data_info(i)["segments_info"]]
    assert (len(dataset), sum(s["isthing"] and not s["iscrowd"] for s in infos)) == (8, 124)
    sample = dataset[0]
    labels = sample["img_path"].replace("leftImg8bit", "gtFine").replace("gtFine.png", "gtFine_labelIds.png")
    classes = np.array([0, *(dataset.metainfo["category_ids"][s["label"]] for s in sample["segments"])])
    shown, stored = classes[sample["panoptic"]], cv2.imread(labels, cv2.IMREAD_UNCHANGED)
    counted = np.isin(stored, dataset.metainfo["category_ids"])
    assert np.array_equal(shown, np.where(counted, stored, 0))


@real("ade20k_sample")
def test_real_ade20k(tmp_path):
    sample = REAL / "ade20k_sample" / "challenge150"
    for folder in ("images", "annotations"):
        shutil.copytree(sample / folder, tmp_path / folder / "validation")
    run("prepare_ade20k", tmp_path, "--stuff-only", "--split", "val", "--workers", "1")
    dataset = ADE20KPanoptic(str(tmp_path), "val", pipeline=PIPELINE)
    for item, name in zip(dataset, sorted((sample / "annotations").iterdir()), strict=True):
        stored = cv2.imread(str(name), cv2.IMREAD_UNCHANGED)
        lookup = np.array([0, *(s["label"] + 1 for s in item["segments"])])
        assert np.array_equal(lookup[item["panoptic"]], stored)
