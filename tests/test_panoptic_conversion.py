"""The conversions to panoptic maps against the official tool and by hand, and the facts in the class tables."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from densepred.data import ADE20KPanoptic, CityscapesPanoptic, CocoPanoptic
from densepred.data.ade20k import THINGS, panoptic_from_labels
from densepred.data.cityscapes import convert_split
from densepred.data.prepare import segment_geometry

ROOT = Path(__file__).parents[1]


def test_cityscapes_conversion_equals_that_of_cityscapesscripts(tmp_path):
    from cityscapesscripts.preparation.createPanopticImgs import convert2panoptic

    folder = tmp_path / "gtFine" / "train" / "aachen"
    folder.mkdir(parents=True)
    instance_ids = np.random.default_rng(0).choice([0, 7, 11, 26, 24, 24_000, 24_001, 26_002, 33_010, 29, 9], (20, 30))
    cv2.imwrite(str(folder / "aachen_000000_000019_gtFine_instanceIds.png"), instance_ids.astype(np.uint16))
    ours = Path(convert_split(str(tmp_path), "train", str(tmp_path / "ours")))
    (tmp_path / "theirs").mkdir()
    convert2panoptic(str(tmp_path / "gtFine"), str(tmp_path / "theirs"), False, ["train"])
    theirs = tmp_path / "theirs" / ours.name
    mine, official = (json.loads(path.read_text()) for path in (ours, theirs))
    assert mine["images"] == official["images"] and mine["annotations"] == official["annotations"]
    pngs = [cv2.imread(str(next(path.with_suffix("").glob("*.png")))) for path in (ours, theirs)]
    np.testing.assert_array_equal(*pngs)
    with pytest.raises(
        FileNotFoundError, match=r"1 of 1 image files .*leftImg8bit/train/aachen/aachen_000000_000019_left"
    ):
        CityscapesPanoptic(str(tmp_path), "train", ann_file=str(ours))


def test_ade20k_pastes_objects_over_stuff():
    semantic = np.array([[1, 1, 13, 13], [3, 0, 13, 1]], np.uint8)
    instances = np.zeros((2, 4, 3), np.uint8)
    instances[0, 2] = instances[0, 1] = (4, 1, 0)  # person, also over wall
    instances[1, 1] = (9, 2, 0)  # car, where the semantic map has nothing
    ids, segments = panoptic_from_labels(semantic, instances)
    assert ids.tolist() == [[1, 151, 151, 0], [3, 152, 0, 1]]
    assert [(s["id"], s["category_id"], s["area"], s["iscrowd"]) for s in segments] == [
        (1, 0, 2, 0),
        (3, 2, 1, 0),
        (151, 12, 2, 0),
        (152, 20, 1, 0),
    ]
    instances[0, 1] = (5, 1, 0)
    with pytest.raises(ValueError, match=r"object 1 of the instance map has the classes \[4, 5\]"):
        panoptic_from_labels(semantic, instances)
    with pytest.raises(ValueError, match="up to 151"):
        panoptic_from_labels(np.full((2, 2), 151, np.uint8), None)


def test_segment_geometry_of_the_corners():
    ids = np.zeros((5, 7), np.int32)
    ids[0, 0] = 900
    ids[2:5, 4:7] = 2
    assert segment_geometry(ids) == {2: (9, [4, 2, 3, 3]), 900: (1, [0, 0, 1, 1])}
    assert segment_geometry(np.zeros((3, 3), np.int32)) == {}


def test_class_tables_against_known_facts():
    assert CocoPanoptic.METAINFO["isthing"] == (True,) * 80 + (False,) * 53
    assert CocoPanoptic.METAINFO["category_ids"][79:81] == (90, 92)
    assert CityscapesPanoptic.METAINFO["isthing"] == (False,) * 11 + (True,) * 8
    assert [ADE20KPanoptic.METAINFO["classes"][i] for i in (THINGS[0], THINGS[3], THINGS[99])] == [
        "bed",
        "person",
        "flag",
    ]


def test_the_datasets_folder_shadows_no_package(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets" / "__init__.py").write_text("there = True")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import datasets; assert datasets.there"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
