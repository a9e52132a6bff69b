"""The generated set: same arguments, same bytes; one scene is the same in all three layouts; runs leave a clean root."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage
from pycocotools.coco import COCO

from densepred.data import ADE20KPanoptic, CityscapesPanoptic, CocoPanoptic
from densepred.data.class_tables import ADE20K, CITYSCAPES, COCO_PANOPTIC
from densepred.data.shapes import CATEGORIES, CLASSES, make_scene

SCRIPT = Path(__file__).parents[1] / "datasets" / "prepare_shapes.py"
PIPELINE = [dict(type="LoadImage"), dict(type="LoadPanoptic")]
SMALL = ["--train", "2", "--val", "1", "--height", "48", "--width", "56"]


def run(root, *words):
    """Run the script in this process."""
    spec = importlib.util.spec_from_file_location("prepare_shapes", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(script.make_parser().parse_args([str(root), *SMALL, *words]))


def content(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


def load(make_shapes, layout, split):
    root = str(make_shapes(layout))
    if layout == "coco":
        ann_file = f"annotations/panoptic_{split}2017.json"
        return CocoPanoptic(root, ann_file, f"{split}2017", classes_from_file=True, pipeline=PIPELINE, test_mode=True)
    kind = {"cityscapes": CityscapesPanoptic, "ade20k": ADE20KPanoptic}[layout]
    return kind(root, split, pipeline=PIPELINE, test_mode=True)


def segments_of(dataset, sample, layout):
    """Return {(name in Shapes, crowd, pixels)}: what the sample shows, whatever its numbers and labels."""
    names = {getattr(c, f"{layout}_id"): c.name for c in CLASSES}
    categories = dataset.metainfo["category_ids"]
    return {
        (names[categories[s["label"]]], s["iscrowd"], (sample["panoptic"] == s["id"]).tobytes())
        for s in sample["segments"]
    }


def test_scenes_are_repeatable_and_valid():
    scene, again, other = (make_scene(np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert np.array_equal(scene.image, again.image) and np.array_equal(scene.ids, again.ids)
    assert scene.segments == again.segments
    assert not np.array_equal(scene.image, other.image)
    assert scene.image.shape == (128, 160, 3) and scene.image.dtype == np.uint8
    assert set(np.unique(scene.ids)) - {0} == set(scene.segments)


def test_scenes_hold_what_makes_them_hard():
    scenes = [make_scene(np.random.default_rng(seed), 64, 80) for seed in range(40)]
    kinds = [[c for c in CLASSES for name, _ in scene.segments.values() if name == c.name] for scene in scenes]
    assert {c.name for scene in kinds for c in scene} == {c.name for c in CLASSES}
    assert sum(any(crowd for _, crowd in scene.segments.values()) for scene in scenes) >= 4
    assert sum(bool((scene.ids == 0).any()) for scene in scenes) >= 8
    assert np.mean([sum(not c.isthing for c in scene) >= 3 for scene in kinds]) > 0.5
    assert np.mean([sum(c.isthing for c in scene) for scene in kinds]) > 2
    with pytest.raises(ValueError, match="16 x 80 pixels is too small; height and width start at 32"):
        make_scene(np.random.default_rng(0), 16, 80)


def test_classes_keep_their_kind_in_every_table():
    for table, key in ((COCO_PANOPTIC, "coco_id"), (CITYSCAPES, "cityscapes_id"), (ADE20K, "ade20k_id")):
        isthing = {row[0]: row[2] for row in table}
        assert [isthing[getattr(c, key)] for c in CLASSES] == [c.isthing for c in CLASSES]
        assert len({getattr(c, key) for c in CLASSES}) == len(CLASSES)


@pytest.mark.parametrize("split, count", [("train", 6), ("val", 3)])
def test_three_layouts_show_the_same_scenes(make_shapes, split, count):
    coco, cityscapes, ade20k = (load(make_shapes, layout, split) for layout in ("coco", "cityscapes", "ade20k"))
    assert len(coco) == len(cityscapes) == len(ade20k) == count
    assert coco.metainfo["classes"] == tuple(name for _, name, _, _ in CATEGORIES)
    for a, b, c in zip(coco, cityscapes, ade20k, strict=True):
        expected = segments_of(coco, a, "coco")
        assert np.array_equal(a["img"], b["img"])
        assert np.abs(a["img"].astype(int) - c["img"]).mean() < 10  # JPEG; two scenes differ by 50 and more
        assert np.array_equal(a["panoptic"] == 0, b["panoptic"] == 0)
        assert segments_of(cityscapes, b, "cityscapes") == expected
        assert segments_of(ade20k, c, "ade20k") == {segment for segment in expected if not segment[1]}


def test_the_small_set_has_crowds_and_void(make_shapes):
    samples = list(load(make_shapes, "coco", "train"))
    assert any(s["iscrowd"] for sample in samples for s in sample["segments"])
    assert any((sample["panoptic"] == 0).any() for sample in samples)


def test_train_and_val_differ(make_shapes):
    images = [sample["img"].tobytes() for split in ("train", "val") for sample in load(make_shapes, "coco", split)]
    assert len(set(images)) == 9


def test_instances_json_has_the_masks_of_the_panoptic_map(make_shapes, capsys):
    instances = COCO(str(make_shapes("coco") / "annotations" / "instances_train2017.json"))
    dataset = load(make_shapes, "coco", "train")
    ids = dataset.metainfo["category_ids"]
    for sample in dataset:
        expected = {
            (ids[s["label"]], s["iscrowd"], (sample["panoptic"] == s["id"]).tobytes())
            for s in sample["segments"]
            if s["isthing"]
        }
        found = instances.imgToAnns[sample["img_id"]]
        masks = {(r["category_id"], bool(r["iscrowd"]), instances.annToMask(r).astype(bool).tobytes()) for r in found}
        assert masks == expected
    assert {type(r["segmentation"]["counts"]) for r in instances.anns.values() if r["iscrowd"]} == {list}


def test_the_official_tools_draw_our_polygons(make_shapes):
    for path in make_shapes("cityscapes").glob("gtFine/*/*/*_polygons.json"):
        annotation = Annotation()
        annotation.fromJsonFile(str(path))
        drawn = np.asarray(createInstanceImage(annotation, "ids"))
        stored = cv2.imread(str(path).replace("polygons.json", "instanceIds.png"), cv2.IMREAD_UNCHANGED)
        assert np.mean(drawn == stored) > 0.95  # borders differ by a pixel, the numbers of objects do not


@pytest.mark.parametrize("layout", ["coco", "cityscapes", "ade20k"])
def test_same_arguments_same_bytes(tmp_path, layout):
    run(tmp_path / "a", "--layout", layout)
    run(tmp_path / "b", "--layout", layout)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    run(tmp_path / "b", "--layout", layout, "--seed", "1")
    first, second = content(tmp_path / "a"), content(tmp_path / "b")
    assert first.keys() == second.keys()
    assert not any(first[name] == second[name] for name in first)


def test_scenes_do_not_depend_on_their_number(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", "--train", "3")
    assert (tmp_path / "a/train2017/000002.png").read_bytes() == (tmp_path / "b/train2017/000002.png").read_bytes()
    assert (tmp_path / "a/val2017/000001.png").read_bytes() == (tmp_path / "b/val2017/000001.png").read_bytes()


def test_a_finished_set_is_left_alone_without_slow_imports(make_shapes):
    root = str(make_shapes("coco"))
    before = {path: path.stat().st_mtime_ns for path in Path(root).rglob("*")}
    argv = [str(SCRIPT), root, "--train", "6", "--val", "3", "--height", "64", "--width", "80"]
    code = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
    code += "assert not {'torch', 'numpy', 'densepred'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{root} holds this set already\n"), done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in Path(root).rglob("*")}


def test_other_arguments_replace_the_set_and_nothing_else(tmp_path):
    run(tmp_path, "--layout", "cityscapes")
    mine = tmp_path / "gtFine" / "notes.txt"
    mine.write_text("mine")
    run(tmp_path, "--layout", "coco")
    run(tmp_path.parent / "fresh", "--layout", "coco")
    assert content(tmp_path) == {**content(tmp_path.parent / "fresh"), "gtFine/notes.txt": b"mine"}
    assert not (tmp_path / "leftImg8bit").exists()


def test_a_broken_run_is_repaired(tmp_path):
    run(tmp_path / "root")
    expected = content(tmp_path / "root")
    (tmp_path / "root/train2017/000001.png").unlink()  # found missing
    run(tmp_path / "root")
    assert content(tmp_path / "root") == expected
    manifest = json.loads(expected["manifest.json"])
    (tmp_path / "root/manifest.json").write_text(json.dumps({**manifest, "made_with": None}))  # killed in the exchange
    (tmp_path / "root/.partial/old").mkdir(parents=True)
    (tmp_path / "root/.partial/old/left.png").touch()
    run(tmp_path / "root")
    assert content(tmp_path / "root") == expected


def test_foreign_files_are_safe(tmp_path):
    path = tmp_path / "annotations" / "panoptic_val2017.json"
    path.parent.mkdir()
    path.write_text("real COCO")
    with pytest.raises(ValueError, match=r"panoptic_val2017\.json was not written by this script .* another root"):
        run(tmp_path)
    assert content(tmp_path) == {"annotations/panoptic_val2017.json": b"real COCO"}


@pytest.mark.parametrize("key, value, least", [("train", 0, 1), ("val", 0, 1), ("seed", -1, 0), ("height", 31, 32)])
def test_wrong_arguments_are_refused(tmp_path, key, value, least):
    with pytest.raises(ValueError, match=f"--{key} {value} is too small; the least is {least}"):
        run(tmp_path, f"--{key}", str(value))
    assert not content(tmp_path)


def test_a_foreign_manifest_is_one_line(tmp_path):
    (tmp_path / "manifest.json").write_text("[]")
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {tmp_path}/manifest.json was not written by this script; choose another")
