"""Instance and semantic data sets: masks and classes are those of the official tools, wrong files are one clear error."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.labels import id2label, labels
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from densepred.data import (
    ADE20KPanoptic,
    ADE20KSemantic,
    CityscapesInstances,
    CityscapesPanoptic,
    CityscapesSemantic,
    CocoInstances,
    CocoPanoptic,
)
from densepred.data.errors import DamagedImageError
from densepred.data.instances import decode_masks, split_instance_ids
from densepred.data.loading import label_table, look_up, read_label_map
from tests.test_datasets import REAL, real, run

ANN_FILE = "annotations/instances_train2017.json"
LOAD = [dict(type="LoadImage"), dict(type="LoadInstances")]
SEMANTIC = [dict(type="LoadImage"), dict(type="LoadSemantic")]
PANOPTIC = [dict(type="LoadImage"), dict(type="LoadPanoptic")]
JITTER = [
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    dict(type="ScaleJitter", size=(96, 96), ratio_range=(0.1, 2.0)),
    dict(type="PadTo", size=(96, 96)),
    dict(type="PackSegInputs"),
]


@pytest.fixture
def coco(shapes, tmp_path):
    """Root of a copy that a test may spoil."""
    return shutil.copytree(shapes, tmp_path / "coco")


@pytest.fixture
def cityscapes(make_shapes, tmp_path):
    return shutil.copytree(make_shapes("cityscapes"), tmp_path / "cityscapes")


def load(root, **options):
    return CocoInstances(str(root), ANN_FILE, "train2017", **{"classes_from_file": True, "pipeline": LOAD, **options})


def edit(root, change):
    """Apply a change to the training JSON."""
    path = Path(root) / ANN_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def segmentation(value, position=0):
    return lambda content: content["annotations"][position].update(segmentation=value)


def objects(sample, label_of=lambda label: label):
    return {(label_of(int(c)), m.tobytes()) for m, c in zip(sample["masks"], sample["mask_labels"], strict=True)}


def things(sample, label_of=lambda label: label):
    return {
        (label_of(s["label"]), (sample["panoptic"] == s["id"]).tobytes())
        for s in sample["segments"]
        if s["isthing"] and not s["iscrowd"]
    }


# COCO.


def test_classes():
    assert len(CocoInstances.METAINFO["classes"]) == 80
    assert CocoInstances.METAINFO["classes"] == CocoPanoptic.METAINFO["classes"][:80]
    assert CityscapesInstances.METAINFO["category_ids"] == (24, 25, 26, 27, 28, 31, 32, 33)
    assert CityscapesSemantic.METAINFO == CityscapesPanoptic.METAINFO
    assert ADE20KSemantic.METAINFO == ADE20KPanoptic.METAINFO
    assert all(CocoInstances.METAINFO["isthing"] + CityscapesInstances.METAINFO["isthing"])


def test_coco_objects_are_those_of_the_panoptic_maps(shapes):
    dataset = load(shapes)
    panoptic = CocoPanoptic(
        str(shapes), ANN_FILE.replace("instances", "panoptic"), "train2017", classes_from_file=True, pipeline=PANOPTIC
    )
    assert dataset.metainfo["classes"] == panoptic.metainfo["classes"][:6]
    assert dataset.metainfo["palette"] == panoptic.metainfo["palette"][:6]
    assert any(s["iscrowd"] for i in range(6) for s in dataset.get_data_info(i)["instances"])
    for sample, other in zip(dataset, panoptic, strict=True):
        assert sample["masks"].dtype == bool and sample["mask_labels"].dtype == np.int64
        assert len(sample["masks"]) == len(things(other)) and objects(sample) == things(other)


def test_colours_where_the_file_has_none(coco):
    edit(coco, lambda c: [category.pop("color") for category in c["categories"]])
    metainfo = load(coco).metainfo
    assert metainfo["palette"] == CocoPanoptic.METAINFO["palette"][:6] and metainfo["isthing"] == (True,) * 6


def test_images_without_objects(coco):
    def change(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = int(annotation["iscrowd"] or annotation["image_id"] == 3)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]

    edit(coco, change)
    names = [record["img_id"] for record in load(coco, filter_empty=True)]
    assert names == [1, 4, 5, 6]
    assert len(load(coco, filter_empty=True, test_mode=True)) == len(load(coco)) == 6
    sample = load(coco)[1]
    assert sample["masks"].shape == (0, *sample["ori_shape"]) and sample["mask_labels"].shape == (0,)
    packed = load(coco, pipeline=LOAD + JITTER)
    for i in (1, 2):
        found = packed[i]["data_samples"].gt_instances
        assert found.masks.shape == (0, 96, 96) and found.labels.dtype == torch.int64


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("images"), "has no list 'images': it is not an annotation in the COCO instance format"),
        (lambda c: c["images"][1].pop("height"), r"images\[1\] lacks the key 'height'"),
        (lambda c: c["annotations"][2].pop("segmentation"), r"annotations\[2\] lacks the key 'segmentation'"),
        (lambda c: c["categories"].clear(), "the list 'categories' is empty"),
        (lambda c: c["images"].append(c["images"][0]), "image id 1 occurs twice"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "annotation id 1 occurs twice"),
        (
            lambda c: c["annotations"][3].update(image_id=99),
            r"annotations\[3\] \(id 4\) is of image 99, which is not in",
        ),
        (lambda c: c["annotations"][1].update(category_id=9), r"annotations\[1\] \(id 2\) has category id 9, .* 6 ids"),
        (
            lambda c: c["images"][0].update(file_name="gone.png"),
            r"1 of 6 image files .* first is \S+train2017/gone\.png",
        ),
        (segmentation([[1, 2, 3, 4]], 4), r"annotations\[4\] \(id 5\): its polygons have \[4\] numbers; .* mend this"),
        (segmentation([]), r"its polygons have \[\] numbers"),
        (segmentation([[1, 2, 3, 4, 5, 6, 7]]), r"segmentation\[0\] is no polygon, a flat list .* even length"),
        (segmentation([1, 2, 3, 4, 5, 6]), r"segmentation\[0\] is no polygon"),
        (segmentation(None), "neither a list of polygons nor an RLE"),
        (segmentation({"size": [64, 80]}), "neither a list of polygons nor an RLE"),
        (segmentation({"size": [80, 64], "counts": "x"}), r"RLE has the size \[80, 64\], but the image is \[64, 80\]"),
        (segmentation({"size": [64, 80], "counts": [64]}), "add up to 64, but the image has 5120 pixels"),
        (segmentation({"size": [64, 80], "counts": [6000, -880]}), "add up to no number, but"),
    ],
)
def test_bad_annotations(coco, change, message):
    edit(coco, change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load(coco)
    assert str(coco / ANN_FILE) in str(caught.value)


def test_own_classes_need_the_switch(coco):
    edit(coco, lambda c: c["annotations"][0].update(category_id=12))
    with pytest.raises(ValueError, match=r"category id 12, which is none of the 80 ids .*classes_from_file=True"):
        load(coco, classes_from_file=False)


def draw(rng, count):
    """Polygons in and around an image of 40 x 50 pixels, and RLE of both forms, as COCO annotations."""
    found = [
        [rng.uniform(-5, 55, 2 * rng.integers(3, 8)).round(2).tolist() for _ in range(rng.integers(1, 4))]
        for _ in range(count)
    ]
    for form in (found[0], found[1]):
        packed = rle.merge(rle.frPyObjects(form, 40, 50))
        found.append({"size": [40, 50], "counts": packed["counts"].decode()})
    flat = rle.decode(packed).ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    found.append({"size": [40, 50], "counts": np.diff(edges, prepend=0).tolist()})
    return found


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_those_of_pycocotools(seed):
    drawn = draw(np.random.default_rng(seed), 6)
    official = COCO()
    official.imgs = {1: dict(height=40, width=50)}
    expected = np.stack([official.annToMask(dict(image_id=1, segmentation=s)) for s in drawn])
    masks = decode_masks(drawn, 40, 50)
    assert masks.dtype == bool and np.array_equal(masks, expected)
    assert masks.any(axis=(1, 2)).all()


def test_a_polygon_of_two_points_adds_no_pixel(coco):
    edit(coco, segmentation([[1, 1, 9, 9], [10, 10, 20, 10, 20, 20, 10, 20]]))
    image = json.loads((coco / ANN_FILE).read_text())["annotations"][0]["image_id"]
    mask = load(coco)[image - 1]["masks"][0]
    assert mask.sum() == 100 and mask[10:20, 10:20].all()


@pytest.mark.parametrize(
    "value, message",
    [
        ([[1, 2, float("nan"), 4, 5, 6]], "a polygon has a coordinate that is no finite number"),
        ([["a", 2, 3, 4, 5, 6]], "cannot be decoded: "),
        ({"size": [64, 80], "counts": "c26>000"}, "an RLE covers -?[0-9]+ pixels, but the image has 5120"),
        ({"size": [64, 80], "counts": ""}, "an RLE covers 0 pixels"),
    ],
)
def test_masks_that_cannot_be_drawn(coco, value, message):
    edit(coco, segmentation(value))
    with pytest.raises(DamagedImageError, match=rf"annotation of image id 1 .*000001\.png.*{message}"):
        load(coco)[0]
    assert load(coco, skip_damaged=True)[0]["img_id"] == 2
    with pytest.raises(ValueError, match="1 of 6 images cannot be used"):
        run("prepare_coco", coco, "--classes-from-file", "--split", "train")


def test_annotations_of_another_size(coco):
    def turn(content):
        content["images"][0].update(height=80, width=64)
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]

    edit(coco, turn)
    with pytest.raises(DamagedImageError, match=r"is 80 x 64 .* image .*000001\.png is 64 x 80; the two do not belong"):
        load(coco)[0]


def test_prepare_coco_verifies_what_is_there(coco, capsys):
    shutil.rmtree(coco / "annotations" / "panoptic_train2017")
    (coco / ANN_FILE.replace("instances", "panoptic")).unlink()
    run("prepare_coco", coco, "--classes-from-file", "--split", "train")
    out = capsys.readouterr().out
    assert "panoptic" not in out and "6 annotated images, " in out and "train: 6 of 6 images read" in out
    with pytest.raises(
        FileNotFoundError, match=r"neither annotations/panoptic_x2017\.json nor annotations/instances_x"
    ):
        run("prepare_coco", coco, "--split", "x")


# Cityscapes and ADE20K.


def test_cityscapes_objects_are_those_of_the_panoptic_maps(make_shapes):
    root = str(make_shapes("cityscapes"))
    dataset, other = CityscapesInstances(root, "train", LOAD), CityscapesPanoptic(root, "train", pipeline=PANOPTIC)
    assert len(dataset) == 6
    for sample, panoptic in zip(dataset, other, strict=True):
        assert (sample["img_id"], sample["img_path"]) == (panoptic["img_id"], panoptic["img_path"])
        found = objects(sample, lambda label: dataset.metainfo["classes"][label])
        assert len(found) == len(sample["masks"])
        assert found == things(panoptic, lambda label: other.metainfo["classes"][label])


def test_groups_and_uncounted_classes_are_no_objects():
    ids = np.array([[26, 26001, 29000], [24000, 26000, 26001], [7, 0, 33]], np.uint16)
    masks, classes = split_instance_ids(ids, CityscapesInstances.COMMON["instance_table"], "a.png")
    assert classes == [0, 2, 2]
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [[3], [4], [1, 5]]
    for wrong, named in ((34, 34), (34001, 34), (999, 999)):
        with pytest.raises(DamagedImageError, match=rf"a\.png holds the labels {named} \(1 instance ids\), which"):
            split_instance_ids(np.full((2, 2), wrong, np.uint16), CityscapesInstances.COMMON["instance_table"], "a.png")


def test_cityscapes_classes_are_the_official_train_ids(make_shapes):
    table = CityscapesSemantic.COMMON["semantic_table"]
    stored = [label.id for label in labels if label.id >= 0]
    assert table[stored].tolist() == [id2label[i].trainId for i in stored]
    assert (np.delete(table, stored) == -1).all()
    root = str(make_shapes("cityscapes"))
    for sample in CityscapesSemantic(root, "val", SEMANTIC):
        raw = cv2.imread(sample["semantic_path"], cv2.IMREAD_UNCHANGED)
        assert sample["semantic"].dtype == np.uint8 and np.array_equal(sample["semantic"], table[raw])


def test_ade20k_classes(make_shapes):
    root = str(make_shapes("ade20k"))
    dataset, panoptic = ADE20KSemantic(root, "val", SEMANTIC), ADE20KPanoptic(root, "val", pipeline=PANOPTIC)
    for sample, other in zip(dataset, panoptic, strict=True):
        assert sample["img_id"] == other["img_id"]
        assert np.array_equal(sample["semantic"], cv2.imread(sample["semantic_path"], -1) - np.uint8(1))
        classes = np.array([255, *(s["label"] for s in other["segments"])])[other["panoptic"]]
        assert (sample["semantic"] == classes)[other["panoptic"] > 0].all()
    with pytest.raises(ValueError, match="split='test'; choose one of train, val"):
        ADE20KSemantic(root, "test")


def test_panoptic_maps_give_semantic_ones(make_shapes):
    root = str(make_shapes("cityscapes"))
    steps = [*PANOPTIC, dict(type="LoadSemanticFromPanoptic")]
    panoptic = CityscapesPanoptic(root, "train", pipeline=steps)
    for one, two in zip(CityscapesSemantic(root, "train", SEMANTIC), panoptic, strict=True):
        assert np.array_equal(one["semantic"], two["semantic"])


@pytest.mark.parametrize(
    "kind, layout, steps", [(CityscapesInstances, "cityscapes", LOAD), (ADE20KSemantic, "ade20k", SEMANTIC)]
)
def test_training_pipelines(make_shapes, kind, layout, steps):
    dataset = kind(str(make_shapes(layout)), "train", steps + JITTER)
    for i in range(12):
        sample = dataset[i]["data_samples"]
        assert Path(sample.label_path).exists() and sample.img_shape == (96, 96)
        if "gt_semantic" in sample:
            assert sample.gt_semantic.shape == (96, 96) and sample.gt_semantic.max() <= 255
            continue
        found = sample.gt_instances
        assert found.masks.flatten(1).any(1).all() and found.masks.sum(0).max() <= 1
        for mask, box in zip(found.masks, found.bboxes.int().tolist(), strict=True):
            y, x = mask.nonzero().T
            assert box == [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]


def test_test_pipelines_keep_the_size_of_the_file(make_shapes):
    short = dict(type="ResizeShortEdge", short_edge=32, max_size=100)
    for kind, (image, labels_) in ((CityscapesInstances, LOAD), (CityscapesSemantic, SEMANTIC)):
        sample = kind(str(make_shapes("cityscapes")), "val", [image, short, labels_], test_mode=True)[0]
        assert sample["img_shape"] == (32, 40)
        assert sample.get("semantic", sample.get("masks")).shape[-2:] == (64, 80)


def test_files_without_partner(cityscapes):
    label = next((cityscapes / "gtFine" / "train").rglob("*_labelIds.png"))
    label.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 6 images lack their label, the first missing file is {label};"):
        CityscapesSemantic(str(cityscapes), "train")
    assert len(CityscapesInstances(str(cityscapes), "train")) == 6
    image = next((cityscapes / "leftImg8bit" / "val").rglob("*.png"))
    image.unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 3 labels lack their image, the first missing file is {image};"):
        CityscapesInstances(str(cityscapes), "val")
    with pytest.raises(FileNotFoundError, match=r"no images .*leftImg8bit/test/\*\*/\*_leftImg8bit\.png; see datasets"):
        CityscapesSemantic(str(cityscapes), "test")
    with pytest.raises(FileNotFoundError, match=r"no images .*images/training/\*\*/\*\.jpg; see datasets/README\.md"):
        ADE20KSemantic(str(cityscapes), "train")


def test_wrong_label_files(cityscapes):
    dataset = CityscapesSemantic(str(cityscapes), "train", SEMANTIC)
    path = Path(dataset.get_data_info(0)["semantic_path"])
    for pixels, message in (
        (
            np.full((64, 80), 255, np.uint8),
            r"labels 255 \(5120 pixels\), which the data set does not have \(it has 34 from 0 to 33\)",
        ),
        (np.full((64, 80), 300, np.uint16), r"labels 300 \(5120 pixels\), which"),
        (np.zeros((64, 80, 3), np.uint8), "has mode RGB; it should hold one label a pixel"),
        (np.zeros((80, 64), np.uint8), r"is 80 x 64 .* is 64 x 80; the two do not belong together"),
    ):
        cv2.imwrite(str(path), pixels)
        with pytest.raises(DamagedImageError, match=rf"{path.name}.*{message}"):
            dataset[0]
    path.write_bytes(b"")
    assert CityscapesSemantic(str(cityscapes), "train", SEMANTIC, skip_damaged=True)[0]["img_id"].endswith("2")


def test_label_maps_of_any_mode(tmp_path):
    stored = np.random.default_rng(0).integers(0, 5, (6, 7), dtype=np.uint8)
    palette = Image.fromarray(stored)
    palette.putpalette([200, 0, 0] * 5)  # one colour for all: only the indices tell the labels apart
    palette.save(tmp_path / "palette.png")
    Image.fromarray(stored > 2).save(tmp_path / "bits.png")
    cv2.imwrite(str(tmp_path / "wide.png"), stored.astype(np.uint16) * 1000)
    assert np.array_equal(read_label_map(tmp_path / "palette.png"), stored)
    assert np.array_equal(read_label_map(tmp_path / "bits.png"), stored > 2)
    assert np.array_equal(read_label_map(tmp_path / "wide.png"), stored.astype(int) * 1000)


def test_look_up_with_holes():
    table = label_table({0: 255, 3: 0, 255: 1})
    assert look_up(np.array([[0, 3], [255, 3]], np.uint8), table, "a").tolist() == [[255, 0], [1, 0]]
    with pytest.raises(
        DamagedImageError, match=r"a holds the labels 1 \(1 pixels\), 2 .*, 6 \(1 pixels\), \.\.\., which"
    ):
        look_up(np.arange(9, dtype=np.uint8)[None], table, "a")
    with pytest.raises(DamagedImageError, match=r"a holds the labels 259 \(1 pixels\), which"):
        look_up(np.array([[259, 3]], np.uint16), table, "a")


# Real samples.


@pytest.mark.parametrize(
    "folder, ann_file, image_dir, counts",
    [
        pytest.param("coco128", ANN_FILE, "train2017", (128, 126, 929), marks=real("coco128")),
        pytest.param(
            "coco128",
            "annotations/instances_val2017_from_panoptic.json",
            "val2017",
            (100, 100, 707),
            marks=real("coco128"),
        ),
        pytest.param("coco_tiny", ANN_FILE, "train2017", (80, 80, 699), marks=real("coco_tiny")),
        pytest.param("coco_tiny", ANN_FILE.replace("train", "val"), "val2017", (80, 80, 804), marks=real("coco_tiny")),
    ],
)
def test_real_coco(folder, ann_file, image_dir, counts):
    dataset = CocoInstances(str(REAL / folder), ann_file, image_dir, pipeline=LOAD)
    official = COCO(str(REAL / folder / ann_file))
    found = 0
    for sample in dataset:
        expected = [a for a in official.imgToAnns[sample["img_id"]] if not a["iscrowd"]]
        assert len(sample["masks"]) == len(expected)
        for mask, annotation in zip(sample["masks"], expected, strict=True):
            assert np.array_equal(mask, official.annToMask(annotation))
        assert [dataset.metainfo["category_ids"][c] for c in sample["mask_labels"]] == [
            a["category_id"] for a in expected
        ]
        found += len(expected)
    filtered = CocoInstances(str(REAL / folder), ann_file, image_dir, filter_empty=True)
    assert (len(dataset), len(filtered), found) == counts


@real("cityscapes_sample")
def test_real_cityscapes():
    root = str(REAL / "cityscapes_sample")
    assert sum(len(sample["masks"]) for sample in CityscapesInstances(root, "train", LOAD)) == 124
    for sample in CityscapesSemantic(root, "train", SEMANTIC):
        raw = cv2.imread(sample["semantic_path"], cv2.IMREAD_UNCHANGED)
        assert np.array_equal(sample["semantic"], np.array([id2label[i].trainId for i in range(34)])[raw])
    with pytest.raises(FileNotFoundError, match="no images"):
        CityscapesInstances(root, "val")


@real("ade20k_sample")
def test_real_ade20k(tmp_path):
    source = REAL / "ade20k_sample" / "challenge150"
    for folder in ("images", "annotations"):
        shutil.copytree(source / folder, tmp_path / folder / "validation")
    samples = list(ADE20KSemantic(str(tmp_path), "val", SEMANTIC))
    assert len(samples) == 3
    for sample in samples:
        raw = cv2.imread(sample["semantic_path"], cv2.IMREAD_UNCHANGED)
        assert np.array_equal(sample["semantic"], raw - np.uint8(1)) and sample["semantic"].shape == sample["ori_shape"]
