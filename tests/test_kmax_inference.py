"""Post-processing of kMaX-DeepLab against the official code's results, and at the borders of its inputs."""

import numpy as np
import pytest
import torch

from densepred.heads.kmax_inference import (
    instance_inference,
    mask_boxes,
    panoptic_inference,
    resize_mask_logits,
    semantic_inference,
)
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "kmax_r50_coco_panoptic")
THINGS = set(range(80))


@pytest.fixture(scope="module")
def synthetic():
    """Class logits (Q, C + 1) and resized mask logits (Q, H, W) of the two images."""
    logits = 2 * parity.normal_input(21, (2, 128, 134))
    logits[..., [0, 1, 60, 90, 100, 132]] += 6
    masks = torch.from_numpy(10 * parity.normal_input(22, (2, 128, 13, 13)))
    pad_shape, images = tuple(META["config"]["image_size_here"]), META["input"]["inference_images"]
    return [
        (l, resize_mask_logits(m, pad_shape, (image["height"], image["width"]), tuple(image["shape"][1:])))
        for l, m, image in zip(torch.from_numpy(logits), masks, images, strict=True)
    ]


@pytest.mark.parametrize("i", [0, 1])
def test_panoptic_of_the_case(synthetic, i):
    found = panoptic_inference(*synthetic[i], THINGS)
    np.testing.assert_array_equal(found.numpy(), EXPECTED[f"synth{i}.panoptic"])
    records = [dict(id=s["id"], isthing=s["isthing"], category_id=s["label"]) for s in found.segments]
    assert records == META["segments_info"]["synth"][i]
    assert all(0 < s["score"] < 1 and not s["iscrowd"] for s in found.segments)


@pytest.mark.parametrize("i", [0, 1])
def test_semantic_of_the_case(synthetic, i):
    name = f"synth{i}.sem_seg"
    found, output = semantic_inference(*synthetic[i]).numpy(), META["outputs"][name]
    assert list(found.shape) == output["shape"]
    error = np.abs(parity.thin(found, output) - EXPECTED[name]).max()
    assert error < META["tolerance"]["relative_to_absmax"] * output["absmax"]


@pytest.mark.parametrize("i", [0, 1])
def test_instances_of_the_case(synthetic, i):
    found = instance_inference(*synthetic[i], torch.arange(133) < 80)
    order = found.scores.argsort(descending=True)
    found = found[order[found.scores[order] > 1e-6]]
    np.testing.assert_allclose(found.scores, EXPECTED[f"synth{i}.instance_scores"], rtol=1e-8)
    np.testing.assert_array_equal(found.labels, EXPECTED[f"synth{i}.instance_classes"])
    np.testing.assert_array_equal(found.masks.sum((1, 2)), EXPECTED[f"synth{i}.instance_areas"])


# Borders --------------------------------------------------------------------------------------------------------------


def queries(*rows, classes=3, dtype=torch.float32):
    """Sure queries from (class, mask logits of a 2 x 4 map); class -1 = void."""
    logits = torch.zeros(len(rows), classes + 1)
    for q, (label, _) in enumerate(rows):
        logits[q, label] = 9
    masks = torch.tensor([mask for _, mask in rows], dtype=torch.float32).reshape(-1, 2, 4)
    return logits.to(dtype), masks.to(dtype)


LEFT, RIGHT = [9, 9, 0, 0, 9, 9, 0, 0], [0, 0, 9, 9, 0, 0, 9, 9]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_stuff_joins_and_things_do_not(dtype):
    rows = queries((2, LEFT), (2, RIGHT), dtype=dtype)
    joined, apart = panoptic_inference(*rows, {0}), panoptic_inference(*rows, {2})
    assert joined.ids.tolist() == [[1, 1, 1, 1]] * 2 and [s["label"] for s in joined.segments] == [2]
    assert apart.ids.tolist() == [[1, 1, 2, 2]] * 2 and [s["id"] for s in apart.segments] == [1, 2]
    assert joined.ids.dtype == torch.int32


def test_overlap_below_the_pixel_threshold():
    """With masks that share pixels (threshold < 0.5) the second query has half of its pixels left."""
    shared = queries((0, [9, 9, 9, 0, 9, 9, 9, 0]), (1, [0, 9, 9, 9, 0, 9, 9, 9]), (-1, [0] * 8))
    kept = panoptic_inference(*shared, {0, 1}, overlap_threshold=0.2)
    assert kept.ids.tolist() == [[1, 1, 1, 2]] * 2
    dropped = panoptic_inference(*shared, {0, 1}, overlap_threshold=0.5)
    assert dropped.ids.tolist() == [[1, 1, 1, 0]] * 2 and len(dropped.segments) == 1


@pytest.mark.parametrize("thing, expected", [({0}, 0), (set(), 1)])
def test_class_thresholds_by_kind(thing, expected):
    logits = torch.tensor([[0.6, 0.2, 0.2]]).log()
    found = panoptic_inference(logits, torch.zeros(1, 2, 2), thing, thing_threshold=0.7, stuff_threshold=0.5)
    assert len(found.segments) == expected and int(found.ids.max()) == expected


def test_order_of_pasting_follows_the_powers():
    """Query 0 has the better class, query 1 the better mask; they share the middle pixel."""
    logits = torch.tensor([[0.95, 0.05], [0.75, 0.25]]).log()
    masks = torch.tensor([[0.0, 0.0, 0.0], [-9.0, 0.0, 9.0]])[:, None]
    by_class = panoptic_inference(logits, masks, {0}, overlap_threshold=0.4, mask_power=0.0)
    by_mask = panoptic_inference(logits, masks, {0}, overlap_threshold=0.4, class_power=0.0)
    assert by_class.ids.tolist() == [[1, 1, 2]] and by_mask.ids.tolist() == [[2, 1, 1]]


def test_nothing_found():
    logits, masks = queries((-1, LEFT), (-1, RIGHT))
    found = panoptic_inference(logits, masks, {0})
    assert found.segments == [] and not found.ids.any()
    empty = instance_inference(logits, masks, set())
    assert empty.masks.shape == (0, 2, 4) and empty.bboxes.shape == (0, 4) and empty.scores.shape == (0,)


def test_boxes_enclose_their_masks():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 1:4, 2:7] = True
    masks[1, 5, 0] = masks[1, 0, 7] = True
    assert mask_boxes(masks).tolist() == [[2, 1, 7, 4], [0, 0, 8, 6], [0, 0, 0, 0]]
    found = instance_inference(*queries((0, LEFT), (1, RIGHT)), {0, 1})
    boxes = dict(zip(found.labels.tolist()[:2], found.bboxes.tolist()[:2], strict=True))
    assert boxes == {0: [0, 0, 2, 2], 1: [2, 0, 4, 2]}


@pytest.mark.parametrize(
    "pad, ori, img, valid",
    [
        ((1025, 2049), (1024, 2048), (1025, 2049), (1024, 2049)),  # Cityscapes: 1024.5 rows, half to even
        ((97, 97), (150, 200), (73, 97), (73, 97)),
        ((96, 128), (50, 60), (50, 60), (50, 60)),  # not scaled to the padded side: no formula
    ],
)
def test_valid_part_of_the_padded_map(pad, ori, img, valid):
    """A ramp over the padded pixels, down and across, ends where the valid part does."""
    rows, columns = torch.arange(pad[0]), torch.arange(pad[1])
    ramps = torch.stack([rows[:, None].expand(pad), columns.expand(pad)]).double()
    found = resize_mask_logits(ramps, pad, ori, img)
    assert found.shape == (2, *ori)
    assert [round(r.max().item()) + 1 for r in found] == list(valid)


@pytest.mark.parametrize("size, aligned", [((6, 5), True), ((5, 6), False)])
def test_parity_of_the_padded_width_aligns_the_corners(size, aligned):
    ramp = torch.arange(3.0).expand(1, 3, 3)
    found = resize_mask_logits(ramp, size, size, size)[0, 0]
    assert torch.allclose(found, torch.linspace(0, 2, size[1])) == aligned
