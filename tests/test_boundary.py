"""Boundary IoU: contours against erosion mask by mask, counts against their definition, Boundary PQ and AP as published."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from densepred.evaluation import cityscapes_instance, coco_instance, panoptic
from densepred.evaluation.boundary import boundary_counts, boundary_iou, contour_width, contours, mask_contour
from tests.test_panoptic_quality import METRICS, SHARED, assert_record_equal, coco_case, fixture_case, needs_shared

EXPECTED = json.loads((METRICS / "boundary" / "expected.json").read_text())


def eroded_contour(mask, ratio):
    """The definition, by hand: pixels of the mask with a pixel outside it, or outside the image, in their square."""
    width = contour_width(mask.shape, ratio)
    padded = np.pad(mask, width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * width + 1, 2 * width + 1))
    return mask & ~windows.all(axis=(2, 3))


def blocks(rng, size, num_labels):
    coarse = rng.integers(0, num_labels, (-(-size[0] // 7), -(-size[1] // 7)))
    return np.kron(coarse, np.ones((7, 7), int))[: size[0], : size[1]]


@pytest.mark.parametrize("dtype, offset", [(np.uint8, 0), (np.uint16, 300), (np.int32, -2), (np.uint32, 1 << 24)])
@pytest.mark.parametrize("size, ratio", [((40, 33), 0.02), ((31, 50), 0.06), ((1, 9), 0.1), ((5, 6), 0.4)])
def test_contours_of_all_regions_are_those_of_each(size, ratio, dtype, offset):
    labels = blocks(np.random.default_rng(0), size, 4) + offset
    single = sum(eroded_contour(labels == value, ratio) for value in np.unique(labels))
    np.testing.assert_array_equal(contours(labels.astype(dtype), ratio), single.astype(bool))


@pytest.mark.parametrize("size, ratio", [((40, 33), 0.02), ((31, 50), 0.06), ((5, 6), 0.4)])
def test_contour_of_one_mask(size, ratio):
    labels = blocks(np.random.default_rng(3), size, 3)
    for mask in (labels == 0, labels < 2, labels < 3, labels == 7):  # parts, most, all, nothing
        for order in (np.ascontiguousarray, np.asfortranarray):
            np.testing.assert_array_equal(mask_contour(order(mask), ratio), eroded_contour(mask, ratio))


def test_width_follows_the_diagonal():
    assert contour_width((480, 640), 0.02) == 16 and contour_width((1024, 2048), 0.005) == 11
    assert contour_width((10, 10), 0.005) == 1
    for ratio in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"boundary ratio of .* outside \(0, 1\)"):
            contours(np.zeros((4, 4), np.uint8), ratio)


@pytest.mark.parametrize("num_classes, ignore_index, ratio", [(4, 255, 0.02), (4, 9, 0.08), (300, 1000, 0.05)])
def test_counts_equal_the_definition_class_by_class(num_classes, ignore_index, ratio):
    rng = np.random.default_rng(1)
    gt, pred = blocks(rng, (40, 50), 4), np.roll(blocks(rng, (40, 50), 4), 3, 1)
    pred[:20] = np.roll(gt[:20], 1, 0)
    pred[30:34, 7:30] = num_classes  # none of the classes
    gt[8:17, 20:33] = ignore_index
    known = gt != ignore_index
    expected = []
    for label in range(num_classes):
        true, found = (eroded_contour((labels == label) & known, ratio) for labels in (gt, pred))
        expected.append([np.sum(true & found), np.sum(true), np.sum(found)])
    counts = boundary_counts(gt, pred, num_classes, ratio, ignore_index)
    np.testing.assert_array_equal(counts, expected)
    assert counts[:4, 0].min() > 0 and (counts[:4, 0] < counts[:4, 1]).all()


def test_what_is_ignored_costs_nothing_and_absent_classes_are_nan():
    gt = blocks(np.random.default_rng(2), (30, 30), 3).astype(np.uint8)
    gt[5:12, 4:20] = 255
    pred = np.where(gt == 255, 2, gt)
    np.testing.assert_array_equal(boundary_iou(boundary_counts(gt, pred, 5, 0.05)), [1, 1, 1, np.nan, np.nan])
    void = np.full_like(gt, 255)
    assert not boundary_counts(void, pred, 5, 0.05).any()
    assert boundary_iou(boundary_counts(np.full_like(gt, 4), np.full_like(gt, 3), 5, 0.05))[3:].tolist() == [0, 0]


def test_a_shift_by_one_pixel():
    """A square of 20 x 20 in 200 x 200, contours 3 wide: 204 pixels each."""
    masks = np.zeros((2, 200, 200), np.uint8)
    masks[0, 50:70, 50:70] = masks[1, 50:70, 51:71] = 1
    (_, counts) = boundary_counts(*masks, 2, 0.01)
    shared = 204 - 20 - 14  # all but the first column, and the innermost of the right band between the horizontal ones
    assert counts.tolist() == [shared, 204, 204]


# The official numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, gt, pred, ratio",
    [("panoptic_synthetic", "gt", "pred", 0.02), ("cityscapes_panoptic", "gt_panoptic", "pred_panoptic", 0.005)],
)
def test_boundary_pq(name, gt, pred, ratio):
    assert_record_equal(panoptic.evaluate_files(*fixture_case(name, gt, pred)[0], boundary_ratio=ratio), EXPECTED[name])


@needs_shared
def test_boundary_pq_of_real_maps():
    paths, _ = coco_case("panoptic_coco_sample", "coco_panoptic_sample/panoptic_examples")
    expected = json.loads((SHARED / "metrics" / "panoptic_coco_sample" / "expected_boundary.json").read_text())
    assert_record_equal(panoptic.evaluate_files(*paths, boundary_ratio=0.02), expected)


def test_boundary_ap_of_cityscapes():
    folder, expected = METRICS / "cityscapes_instance", EXPECTED["cityscapes_instance"]
    record = cityscapes_instance.evaluate_folders(folder / "gtFine", folder / "pred_instance", 0.005)
    np.testing.assert_allclose(record.pop("apMatrix"), expected["apMatrix"], rtol=1e-12)
    assert {key: record[key] for key in ("allAp", "allAp50%")} == pytest.approx(
        {key: expected[key] for key in ("allAp", "allAp50%")}, rel=1e-12
    )


def test_boundary_ap_of_coco():
    folder = METRICS / "coco_instances_synthetic"
    files = folder / "gt.json", folder / "detections_segm.json"
    found = coco_instance.evaluate_files(*files, boundary_ratio=0.02)["stats"]
    assert found == pytest.approx(EXPECTED["coco_instances_synthetic"], rel=1e-12)
    with pytest.raises(ValueError, match="'bbox' has no boundary IoU"):
        coco_instance.evaluate_files(*files, "bbox", 0.02)


@needs_shared
def test_boundary_ap_of_real_objects():
    folder = SHARED / "metrics" / "coco_instances_coco_tiny_val"
    gt = SHARED / "data" / "coco_tiny" / "annotations" / "instances_val2017.json"
    found = coco_instance.evaluate_files(gt, folder / "detections_segm.json", boundary_ratio=0.02)["stats"]
    assert found == pytest.approx(json.loads((folder / "expected.json").read_text())["boundary"]["stats"], rel=1e-12)


@needs_shared
def test_boundary_pq_of_a_real_street():
    """The road of a 2048 x 1024 frame, predicted three pixels to the right."""
    path = next(iter(sorted(Path(SHARED / "data" / "cityscapes_sample" / "gtFine").rglob("*_instanceIds.png"))))
    truth = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    road, shifted = (truth == 7), (np.roll(truth, 3, 1) == 7)
    segments = [dict(id=1, label=0)]
    counts = panoptic.panoptic_counts(
        road.astype(np.uint16) + 2 * ~road,
        [*segments, dict(id=2, label=1)],
        shifted.astype(int),
        segments,
        2,
        None,
        0.005,
    )
    edges = [mask_contour(mask, 0.005) for mask in (road, shifted)]
    assert counts[0, 0] == pytest.approx(np.sum(edges[0] & edges[1]) / np.sum(edges[0] | edges[1]), rel=1e-12)
