"""Polygon data: masks, outlines and ready polygons become one form; the window is CenterNet's."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from cityscapesscripts.helpers.annotation import Annotation
from cityscapesscripts.preparation.json2instanceImg import createInstanceImage

from densepred.data import (
    CenterNetColorJitter,
    CityscapesInstances,
    CityscapesPolygons,
    CocoInstances,
    LoadInstances,
    LoadPolygons,
    PackSegInputs,
    PolygonWindow,
)
from densepred.data.errors import DamagedImageError
from densepred.data.polygon_json import read_outlines
from densepred.data.polygon_window import GREY, LIGHTING_VALUES, LIGHTING_VECTORS, jitter_matrix, map_points
from tests import parity

CASE = Path(__file__).parent / "data" / "parity" / "centerpoly_targets"
LOAD = [dict(type="LoadImage"), dict(type="LoadPolygons")]
NAMES = CityscapesInstances.METAINFO["classes"]
SQUARE = [[10, 10], [40, 10], [40, 40], [10, 40]]


class Drawn:
    """A generator that draws what it is told, within the limits it is asked for."""

    def __init__(self, scale, cx, cy, flip):
        self.numbers, self.scale, self.flip, self.limits = [cx, cy], scale, flip, []

    def choice(self, scales):
        assert any(np.isclose(scale, self.scale) for scale in scales)
        return self.scale

    def integers(self, low, high):
        self.limits.append((low, high))
        return self.numbers.pop(0)

    def random(self):
        return 0.0 if self.flip else 1.0


def loaded(objects, shape=(64, 96), num_vertices=4):
    """Return results with an image of this (H, W) and ready polygons: lists of points."""
    records = [dict(vertices=np.array(points, np.float32), label=i, depth=i) for i, points in enumerate(objects)]
    results = dict(img=np.zeros((*shape, 3), np.uint8), img_path="x.png", img_id=1, ori_shape=shape, img_shape=shape)
    return LoadPolygons(num_vertices)(results | dict(objects=records, rng=np.random.default_rng(0)))


def drawn(points, shape):
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 1)
    return mask.astype(bool)


def write_json(path, objects, size=(64, 96)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(imgHeight=size[0], imgWidth=size[1], objects=objects)))


def write_image(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((64, 96, 3), np.uint8) if image is None else image)


# --- the window ---


@pytest.mark.parametrize("run", ["val_cartesian", "train_flip", "train_flip_noreorder", "train_noflip_polar"])
def test_windows_move_polygons_as_the_official_sampler(run):
    meta, expected = parity.case(CASE)
    config = meta["config"]["runs"][run]
    records = [
        dict(
            vertices=np.array(a["poly"]).reshape(-1, 2),
            label=a["category_id"] - 1,
            depth=a["pseudo_depth"],
            box=np.add(a["bbox"], [0, 0, *a["bbox"][:2]]),
        )
        for a in meta["input"]["annotations"]
    ]
    image = np.zeros((1024, 2048, 3), np.uint8)
    results = LoadPolygons()(dict(objects=records, img=image, img_path="x"))
    rng = config["drawn"] and Drawn(**config["drawn"])
    window = PolygonWindow((512, 1024), random=rng is not None, reorder_flip="noreorder" not in run)
    results = window(results | dict(rng=rng))
    assert rng is None or rng.limits == [(128, 2048 - 128), (128, 1024 - 128)]
    vertices = np.clip(results["polygons"].astype(float) / 4, 0, [255, 127])  # the map's own clipping
    used = expected[f"{run}/reg_mask"] == 1
    kept = (vertices.max(1) > vertices.min(1)).all(1)
    if run.endswith("polar"):  # this coordinate system leaves out the car that runs counter-clockwise
        kept &= results["pseudo_depths"] != 31
    vertices, centres = vertices[kept], vertices[kept].mean(1)
    boxes = np.clip(results["polygon_boxes"].astype(float) / 4, 0, [255, 127] * 2)[kept]
    np.testing.assert_allclose(centres, expected[f"{run}/peak"][used], atol=1e-3)
    np.testing.assert_allclose(boxes[:, 2:] - boxes[:, :2], expected[f"{run}/wh"][used], atol=1e-3)
    np.testing.assert_array_equal(results["pseudo_depths"][kept], expected[f"{run}/pseudo_depth"][used, 0])
    if not run.endswith("polar"):
        official = expected[f"{run}/poly"][used].reshape(-1, 16, 2)
        np.testing.assert_allclose(vertices - centres[:, None], official, atol=1e-3)


def test_the_image_moves_with_its_polygons():
    mirrored = 0
    for seed in range(12):
        results = loaded([SQUARE])
        results["img"][10:41, 10:41] = 255
        results["rng"] = np.random.default_rng(seed)
        out = PolygonWindow((128, 192), border=8)(results)
        assert out["img"].shape == (128, 192, 3) and out["img_shape"] == (128, 192)
        mirrored += out["affine"][0, 0] < 0
        if len(out["polygons"]):
            both = drawn(out["polygons"][0], (128, 192)), out["img"][..., 0] > 127
            assert (both[0] & both[1]).sum() / (both[0] | both[1]).sum() > 0.9
            corner, x = out["polygons"][0][0], np.roll(out["polygons"][0], -1, axis=0) - out["polygons"][0]
            assert (corner == out["polygons"][0].min(0)).all() and np.cross(x[0], x[1]) > 0  # top left, clockwise
        else:
            assert not (out["img"][:, 1:-1] > 127).any() or not (out["img"][1:-1] > 127).any()
    assert 2 <= mirrored <= 10


def test_the_same_seed_shows_the_same_window(shapes):
    window = [*LOAD, dict(type="PolygonWindow", size=(64, 80), border=16), dict(type="PackSegInputs")]
    sets = [
        CocoInstances(str(shapes), "annotations/instances_train2017.json", "train2017", True, window, seed=seed)
        for seed in (3, 3, 4)
    ]
    same, again, other = (data[7]["data_samples"].affine for data in sets)
    assert (same == again).all() and not (same == other).all()
    assert not (same == sets[0][1]["data_samples"].affine).all()  # another visit of that image


@pytest.mark.parametrize("shape", [(64, 96), (30, 200), (200, 30), (1, 1)])
def test_the_test_form_letter_boxes_any_image(shape):
    out = PolygonWindow((64, 128), random=False)(loaded([], shape))
    corners = map_points(np.array([[0, 0], [shape[1], shape[0]]], float), out["affine"])
    assert (corners >= -1e-9).all() and (corners <= np.array([128, 64]) + 1e-9).all()
    np.testing.assert_allclose(corners.mean(0), [64, 32])
    assert np.isclose(np.ptp(corners, axis=0) / (128, 64), 1).any()  # as large as fits
    assert out["affine"].dtype == np.float64


def test_the_published_form_cuts_tall_images():
    out = PolygonWindow((512, 1024), random=False, whole=False)(loaded([], (1080, 1920)))
    np.testing.assert_allclose(map_points(np.array([0.0, 0.0]), out["affine"]), [0, -32])


def test_objects_are_clipped_at_the_window_and_leave_with_it():
    inside, across, outside = SQUARE, [[80, 5], [95, 5], [95, 20], [80, 20]], [[1, 50], [6, 50], [6, 60], [1, 60]]
    results = loaded([inside, across, outside])
    window = PolygonWindow((64, 64), scales=(2 / 3,), flip=0.0)
    out = window(results | dict(rng=Drawn(2 / 3, 58, 32, flip=False)))
    assert out["polygon_labels"].tolist() == [0, 1] and out["pseudo_depths"].tolist() == [0.0, 1.0]
    assert out["polygons"].min() >= 0 and out["polygons"].max() <= 63
    assert len(out["mirrored_first"]) == 2 and (out["polygons"][1][:, 0] == 63).sum() == 2


def test_the_border_is_halved_until_a_centre_fits():
    for side in (1, 2, 3, 100, 255, 256, 257, 1000):
        results = loaded([], (side, side)) | dict(rng=np.random.default_rng(side))
        out = PolygonWindow((64, 64), scales=(1.0,), flip=0.0)(results)
        centre = (np.array([32, 32]) - out["affine"][:, 2]) / out["affine"][0, 0]
        margin = next(128 // 2**i for i in range(9) if side - 128 // 2**i > 128 // 2**i)
        assert (centre > margin - 0.5).all() and (centre < side - margin - 0.5).all()


def test_label_maps_have_to_be_loaded_after_the_window():
    with pytest.raises(ValueError, match="PolygonWindow moves polygons alone: load masks after it"):
        PolygonWindow((64, 64), random=False)(loaded([]) | dict(masks=np.zeros((0, 64, 96), bool)))


def test_colour_jitter_is_the_steps_one_by_one():
    rng = np.random.default_rng(0)
    image = rng.integers(60, 190, (8, 9, 3)).astype(np.uint8)
    steps, factors, weights = ["saturation", "brightness", "contrast"], [1.1, 0.9, 1.2], rng.normal(scale=0.1, size=3)
    mean = float((image @ GREY).mean())
    slow, grey = image / 255.0, image @ GREY / 255.0
    slow = (slow * 1.1 + grey[..., None] * (1 - 1.1)) * 0.9
    slow = slow * 1.2 + mean / 255 * (1 - 1.2) + (LIGHTING_VECTORS @ (LIGHTING_VALUES * weights))[::-1]
    fast = cv2.transform(image, jitter_matrix(steps, factors, weights, mean))
    assert fast.dtype == np.uint8 and np.abs(fast - slow * 255).max() <= 1  # in fixed point

    same = CenterNetColorJitter(0, 0, 0, 0)(dict(img=image, rng=rng))["img"]
    np.testing.assert_array_equal(same, image)
    others = [CenterNetColorJitter()(dict(img=image, rng=np.random.default_rng(i)))["img"].mean() for i in range(20)]
    assert np.std(others) > 5 and abs(np.mean(others) / image.mean() - 1) < 0.2


# --- loading ---


def test_masks_of_every_layout_become_polygons_around_them(make_shapes):
    sets = [
        CocoInstances(str(make_shapes("coco")), "annotations/instances_train2017.json", "train2017", True, LOAD),
        CityscapesInstances(str(make_shapes("cityscapes")), "train", LOAD),
    ]
    for data in sets:
        overlaps = []
        for sample in data:
            masks = LoadInstances()({**sample})
            boxes = sample["polygon_boxes"].reshape(-1, 2, 2)
            assert (sample["polygons"] >= boxes[:, :1]).all() and (sample["polygons"] <= boxes[:, 1:]).all()
            assert sample["polygons"].dtype == np.float32 and sample["polygons"].shape[1:] == (16, 2)
            assert (np.diff(boxes[:, 1, 1]) <= 0).all() and (
                np.diff(sample["pseudo_depths"]) > 0
            ).all()  # lower is nearer
            for polygon, label in zip(sample["polygons"], sample["polygon_labels"], strict=True):
                shape = drawn(polygon, masks["ori_shape"])
                same = masks["masks"][masks["mask_labels"] == label]
                overlaps.append(max((shape & mask).sum() / (shape | mask).sum() for mask in same))
        assert len(overlaps) > 10 and np.mean(overlaps) > 0.8


def test_cityscapes_outlines_are_whole_and_front_to_back(make_shapes):
    root = make_shapes("cityscapes")
    data = CityscapesPolygons(str(root), "train", LOAD)
    by_id = CityscapesInstances(str(root), "train", LOAD)
    assert data.metainfo["classes"] == NAMES and len(data) == len(by_id) == 6
    for sample, other in zip(data, by_id, strict=True):
        assert sample["img_id"] == other["img_id"]
        objects = json.loads(Path(sample["polygon_path"]).read_text())["objects"]
        names = [record["label"] for record in reversed(objects) if record["label"] in NAMES]  # no cargroup
        places = sample["pseudo_depths"].astype(int)
        assert [NAMES[label] for label in sample["polygon_labels"]] == [names[i] for i in places]
        assert (np.diff(places) > 0).all() and len(places) >= len(other["polygons"]) - 1


def test_masks_drawn_of_outlines_are_the_official_tools(make_shapes):
    data = CityscapesPolygons(
        str(make_shapes("cityscapes")), "val", [dict(type="LoadImage"), dict(type="LoadInstances")]
    )
    for sample in data:
        annotation = Annotation()
        annotation.fromJsonFile(sample["polygon_path"])
        ids = np.asarray(createInstanceImage(annotation, "ids"))
        numbers = [number for number in np.unique(ids) if number // 1000 in data.metainfo["category_ids"]]
        labels = [data.metainfo["category_ids"].index(number // 1000) for number in numbers]
        official = {(label, (ids == number).tobytes()) for label, number in zip(labels, numbers, strict=True)}
        found = {(x, mask.tobytes()) for x, mask in zip(sample["mask_labels"], sample["masks"], strict=True)}
        assert found == official and len(found) > 0


@pytest.mark.parametrize("selection", ["regular_interval", "grid_based", "real_points"])
def test_objects_without_area_are_left_out_and_keep_their_place(tmp_path, selection):
    thin = [[5, 5], [60, 6], [60, 6], [5, 5]]
    points = [[], [[1, 2]], [[1, 2], [30, 40]], [[7, 7], [7, 20], [7, 30]], thin, SQUARE]
    objects = [dict(label="car", polygon=p) for p in points]  # back to front, so the square is the nearest
    write_json(
        tmp_path / "a.json", [dict(label="car", polygon=SQUARE), *objects, dict(label="cargroup", polygon=SQUARE)]
    )
    base = dict(img_path="a", ori_shape=(64, 96), polygon_path=str(tmp_path / "a.json"), polygon_table={"car": 2})
    results = LoadPolygons(16, selection)(base)
    assert results["polygon_labels"].tolist() == [2, 2] and results["pseudo_depths"].tolist() == [0.0, 6.0]


def test_an_image_without_objects_goes_all_the_way(tmp_path):
    write_image(tmp_path / "leftImg8bit/train/a/a_0_0_leftImg8bit.png")
    write_json(tmp_path / "gtFine/train/a/a_0_0_gtFine_polygons.json", [])
    pipeline = [
        *LOAD,
        dict(type="PolygonWindow", size=(32, 64)),
        dict(type="LoadInstances"),
        dict(type="PackSegInputs"),
    ]
    sample = CityscapesPolygons(str(tmp_path), "train", pipeline)[0]["data_samples"]
    assert sample.gt_polygons.polygons.shape == (0, 16, 2) and sample.gt_polygons.bboxes.shape == (0, 4)
    assert sample.gt_instances.masks.shape == (0, 64, 96)


def test_packed_polygons_and_their_window():
    packed = PackSegInputs()(PolygonWindow((128, 192), random=False)(loaded([SQUARE])))
    sample = packed["data_samples"]
    assert packed["inputs"].shape == (3, 128, 192) and sample.img_shape == (128, 192) and sample.ori_shape == (64, 96)
    torch.testing.assert_close(sample.gt_polygons.polygons[0], torch.tensor(SQUARE).float() * 2)
    assert sample.gt_polygons.bboxes.tolist() == [[20, 20, 80, 80]]
    assert sample.gt_polygons.labels.dtype == torch.int64 and sample.gt_polygons.depths.dtype == torch.float32
    np.testing.assert_allclose(sample.affine, [[2, 0, 0], [0, 2, 0]])
    bare = dict(img=np.zeros((64, 96, 3), np.uint8), img_path=None, img_id=0, ori_shape=(64, 96), img_shape=(64, 96))
    assert "gt_polygons" not in PackSegInputs()(PolygonWindow((128, 192), random=False)(bare))["data_samples"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(selection="corners"), "selection='corners' is none of regular_interval"),
        (dict(num_vertices=18), "num_vertices=18 does not do for regular_interval: at least 4, a multiple of 4"),
        (dict(num_vertices=9, selection="grid_based"), "a multiple of 2"),
        (dict(num_vertices=3, selection="real_points"), "at least 4"),
    ],
)
def test_wrong_selections(arguments, message):
    with pytest.raises(ValueError, match=message):
        LoadPolygons(**arguments)


def test_data_without_objects_or_with_other_vertices():
    with pytest.raises(ValueError, match=r"x.png has a polygon of 4 vertices.*num_vertices=16"):
        loaded([SQUARE], num_vertices=16)
    with pytest.raises(ValueError, match="no annotated objects"):
        LoadPolygons()(dict(img_path="x.png", ori_shape=(4, 4)))


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"imgHeight": 64, "imgWidth": 96}',
        '{"imgHeight": 64, "imgWidth": 96, "objects": [{"label": "car"}]}',
        '{"imgHeight": 64, "imgWidth": 96, "objects": [{"label": "car", "polygon": [[1, 2, 3], [4, 5, 6]]}]}',
        '{"imgHeight": 64, "imgWidth": 96, "objects": [{"label": "car", "polygon": [["a", 2]]}]}',
        '{"imgHeight": 64, "imgWidth": 96, "objects": [{"label": "car", "polygon": [[NaN, 2], [1, 2], [5, 6]]}]}',
    ],
)
def test_damaged_outline_files_are_named(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DamagedImageError, match=r"polygon file .*a.json"):
        read_outlines(str(tmp_path / "a.json"), {"car": 0})


def test_outlines_of_another_image_or_none(tmp_path):
    write_image(tmp_path / "a.png")
    write_json(tmp_path / "a.json", [], size=(32, 96))
    base = dict(img_path=str(tmp_path / "a.png"), ori_shape=(64, 96), polygon_table={"car": 0})
    for step in (LoadPolygons(), LoadInstances()):
        with pytest.raises(DamagedImageError, match=r"a.json is 32 x 96 .* is 64 x 96"):
            step(base | dict(polygon_path=str(tmp_path / "a.json")))
        with pytest.raises(FileNotFoundError, match=r"polygon file .*b.json does not exist"):
            step(base | dict(polygon_path=str(tmp_path / "b.json")))
