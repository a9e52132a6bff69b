"""Data sets of polygons: street scenes and CenterPoly's own files, each wrong line or record named."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from densepred.data import CenterPolyFile, CityscapesInstances, IDDPolygons, KITTIPolygons, LoadInstances
from densepred.data.polygon_files import read_csv
from tests.test_datasets import REAL, real
from tests.test_polygon_data import LOAD, NAMES, SQUARE, drawn, write_image, write_json


def test_idd_knows_nine_classes_fractions_and_both_kinds_of_images(tmp_path):
    for sequence, ending in (("0", "png"), ("1", "jpg")):
        write_image(tmp_path / f"leftImg8bit/val/{sequence}/frame1_leftImg8bit.{ending}")
        objects = [
            dict(label="building", polygon=SQUARE),
            dict(label="autorickshaw", polygon=[[10.25, 10.75], [40.5, 10], [40, 41.5], [10, 40]]),
            dict(label="car", polygon=SQUARE, deleted=1),
            dict(label="vehicle fallback", polygon=[[60, 20], [80, 20], [80, 50], [60, 50]]),
        ]
        write_json(tmp_path / f"gtFine/val/{sequence}/frame1_gtFine_polygons.json", objects)
    data = IDDPolygons(str(tmp_path), "val", LOAD)
    assert [sample["img_id"] for sample in data] == ["0/frame1", "1/frame1"]
    names = [data.metainfo["classes"][label] for label in data[0]["polygon_labels"]]
    assert names == ["vehicle fallback", "autorickshaw"] and len(data.metainfo["classes"]) == 9
    Path(data[0]["polygon_path"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images lack their label.*frame1_gtFine_polygons.json"):
        IDDPolygons(str(tmp_path), "val", LOAD)


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    root = tmp_path_factory.mktemp("kitti")
    for number in range(40):
        write_image(root / f"training/image_2/{number:06d}_10.png")
        ids = np.full((64, 96), 11 * 256 + 3, np.uint16)  # a building, which has numbers too
        ids[10:30, 10:40] = 26 * 256 + 1
        ids[40:60, 50:90] = 24 * 256 + 2
        ids[:5] = 26 * 256  # cars without number
        ids[5] = 255 * 256
        write_image(root / f"training/instance/{number:06d}_10.png", ids)
    write_image(root / "training/image_2/000000_11.png")  # the second frame of the stereo benchmark
    return root


def test_kitti_reads_its_maps_and_validates_on_every_twentieth(kitti):
    splits = {split: KITTIPolygons(str(kitti), split, LOAD) for split in ("train", "val", "trainval")}
    assert [len(data) for data in splits.values()] == [38, 2, 40]
    assert [sample["img_id"] for sample in splits["val"]] == ["000019_10", "000039_10"]
    sample = splits["val"][0]
    assert [NAMES[label] for label in sample["polygon_labels"]] == ["person", "car"]  # the lower one first
    masks = LoadInstances()({**sample})
    assert sorted(mask.sum() for mask in masks["masks"]) == [20 * 30, 20 * 40] and len(masks["mask_labels"]) == 2
    with pytest.raises(ValueError, match="split='test'; choose one of train, val, trainval"):
        KITTIPolygons(str(kitti), "test")


LINES = [
    "/somewhere/a/one.png,9,10,41,41,car,1,10,10,40,10,40,40,10,40",
    "/somewhere/a/one.png,1,1,4,4,person,0,1,1,4,1,4,4,1,4",
    r"C:\elsewhere\two.png,-1,-1,-1,-1,no_object,0",
]


@pytest.fixture
def own(tmp_path):
    for name in ("deep/er/one.png", "two.png"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "own.csv").write_text("\n".join(LINES) + "\n")
    categories = [dict(id=3, name="car"), dict(id=1, name="person")]
    annotations = [
        dict(image_id=7, category_id=3, bbox=[9, 10, 32, 31], poly=np.ravel(SQUARE).tolist(), pseudo_depth=1),
        dict(image_id=7, category_id=1, bbox=[1, 1, 3, 3], poly=[1, 1, 4, 1, 4, 4, 1, 4], pseudo_depth=0),
    ]
    images = [dict(id=7, file_name="/x/one.png"), dict(id=8, file_name="two.png")]
    content = dict(images=images, categories=categories, annotations=annotations)
    (tmp_path / "own.json").write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("file", ["own.csv", "own.json"])
def test_own_polygons_from_csv_and_json(own, file):
    pipeline = [dict(type="LoadImage"), dict(type="LoadPolygons", num_vertices=4)]
    data = CenterPolyFile(str(own), file, "images", pipeline=pipeline)
    first, second = data[0], data[1]
    assert [data.metainfo["classes"][i] for i in first["polygon_labels"]] == ["person", "car"]  # front to back
    assert first["polygons"][1].tolist() == SQUARE and first["pseudo_depths"].tolist() == [0, 1]
    assert first["polygon_boxes"].tolist() == [[1, 1, 4, 4], [9, 10, 41, 41]]  # as annotated, not the vertices' own
    assert second["polygons"].shape == (0, 4, 2) and Path(second["img_path"]).name == "two.png"
    assert len(CenterPolyFile(str(own), file, "images", filter_empty=True)) == 1
    assert data.metainfo["category_ids"][data.metainfo["classes"].index("car")] == 26


def test_polygons_alone_have_no_masks_to_load(own):
    data = CenterPolyFile(str(own), "own.csv", "images", pipeline=[dict(type="LoadImage"), dict(type="LoadInstances")])
    with pytest.raises(
        ValueError, match=r"LoadInstances: the data set of .*one\.png has no masks \(CenterPolyFile has"
    ):
        data[0]


def test_own_classes_in_an_order_of_ones_own(own):
    data = CenterPolyFile(str(own), "own.json", "images", classes=["car", "cow", "person"])
    assert data.metainfo["classes"] == ("car", "cow", "person") and data.metainfo["category_ids"] == (1, 2, 3)
    assert [record["label"] for record in data.get_data_info(0)["objects"]] == [0, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("one.png,1,2,3", r"own.csv:4 has 4 fields"),
        ("one.png,1,1,4,4,cow,0,1,1,4,1,4,4,1,4", r"own.csv:4 has the class 'cow', .*set classes"),
        ("one.png,1,1,4,4,car,0,1,1,4,1,4,4,1", r"own.csv:4: depth, box and vertices must be numbers"),
        ("one.png,1,1,4,4,car,near,1,1,4,1,4,4,1,4", r"own.csv:4: depth, box and vertices must be numbers"),
        ("one.png,1,1,4,4,car,0,1,1,4,nan,4,4,1,4", r"own.csv:4: a polygon of 4 vertices; .*finite"),
        ("one.png,0,0,1,1,car,0", r"own.csv:4: a polygon of 0 vertices; it needs three"),
        ("one.png,1,1,4,4,car,0,1,1,4,1,4,4", r"own.csv has polygons of 4 vertices .* and of 3"),
    ],
)
def test_wrong_lines_are_named(own, line, message):
    (own / "own.csv").write_text("\n".join([*LINES, line]))
    with pytest.raises(ValueError, match=message):
        CenterPolyFile(str(own), "own.csv", "images")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("annotations"), "has no list 'annotations'"),
        (lambda c: c["annotations"][0].pop("poly"), r"annotations\[0\] lacks the key 'poly'"),
        (lambda c: c["annotations"][1].update(image_id=5), r"annotations\[1\] is of image 5"),
        (lambda c: c["annotations"][1].update(category_id=9), r"annotations\[1\] has the class 9"),
        (lambda c: c["annotations"][1].update(poly=None), r"annotations\[1\]: depth, box and vertices must be numbers"),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2]),
            r"annotations\[0\]: depth, box and vertices must be numbers",
        ),
        (lambda c: c["images"][1].update(file_name="y/one.png"), "file_name 'one.png'"),
        (lambda c: c["images"][1].update(id=7), "id in images 7"),
    ],
)
def test_wrong_records_are_named(own, change, message):
    content = json.loads((own / "own.json").read_text())
    change(content)
    (own / "own.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        CenterPolyFile(str(own), "own.json", "images")


def test_missing_and_ambiguous_images_and_other_files(own):
    shutil.copy(own / "images/two.png", own / "images/deep/two.png")
    with pytest.raises(ValueError, match=r"names two.png, but both .*two.png and .*two.png"):
        CenterPolyFile(str(own), "own.csv", "images")
    (own / "images/deep/two.png").unlink()
    (own / "images/two.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images that .*own.csv names are missing.*two.png.*image_dir"):
        CenterPolyFile(str(own), "own.csv", "images")
    with pytest.raises(FileNotFoundError, match=r"annotation file .*none.csv does not exist"):
        CenterPolyFile(str(own), "none.csv", "images")
    with pytest.raises(ValueError, match=r"own.txt: CenterPoly's annotations are"):
        CenterPolyFile(str(own), "own.txt", "images")


# --- real files ---


@real("centerpoly")
def test_the_published_annotations_read_as_they_are(tmp_path):
    folder = REAL / "centerpoly"
    images = read_csv(str(folder / "cityscapes_val16_regular_interval.csv"), NAMES)
    records = [record for objects in images.values() for record in objects]
    counts = np.bincount([record["label"] for record in records])
    assert len(images) == 500 and sum(not objects for objects in images.values()) == 8
    assert dict(zip(NAMES, counts.tolist(), strict=True)) == {
        "person": 3419, "rider": 556, "car": 4667, "truck": 93, "bus": 98, "train": 23, "motorcycle": 149, "bicycle": 1175,
    }  # fmt: skip
    content = json.loads((folder / "kitti_val16.json").read_text())
    for image in content["images"]:
        write_image(tmp_path / Path(image["file_name"]).name)
    shutil.copy(folder / "kitti_val16.json", tmp_path / "kitti.json")
    data = CenterPolyFile(str(tmp_path), "kitti.json", ".", pipeline=LOAD)
    assert (
        len(data) == 10 and sum(len(sample["polygons"]) for sample in data) == 105 and data.metainfo["classes"] == NAMES
    )


@real("cityscapes_sample")
def test_real_polygons_lie_on_their_masks():
    data = CityscapesInstances(str(REAL / "cityscapes_sample"), "train", LOAD, indices=2)
    overlaps, sizes = [], []
    for sample in data:
        masks = LoadInstances()({**sample})["masks"]
        for polygon in sample["polygons"]:
            shape = drawn(polygon, sample["ori_shape"])
            overlaps.append(max((shape & mask).sum() / (shape | mask).sum() for mask in masks))
            sizes.append(shape.sum())
    overlaps, sizes = np.array(overlaps), np.array(sizes)
    assert len(overlaps) > 20 and overlaps[sizes > 500].mean() > 0.8


def test_csv_lines_of_windows_and_blank_ones(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerow(LINES[0].split(","))
        file.write("\r\n")
    assert list(read_csv(str(tmp_path / "a.csv"), NAMES)) == ["one.png"]
