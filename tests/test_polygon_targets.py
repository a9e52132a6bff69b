"""Targets of polygon models: published numbers, and the objects that nobody draws on purpose."""

from collections import deque

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from torch import Tensor

from densepred.heads.polygon_targets import flood, polygon_targets, trained_objects
from densepred.ops.polygons import encode_polygons
from densepred.structures import SegSample
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "centerpoly_targets")
RUNS = META["config"]["runs"]
STRIDE = 4.0


def published_objects(drawn: dict | None, reorder: bool) -> tuple[Tensor, Tensor]:
    """The case's polygons (N, V, 2) and boxes (N, 4) in pixels of the 512x1024 input."""
    height, width = META["config"]["image_hw"]
    polygons = np.array([a["poly"] for a in META["input"]["annotations"]]).reshape(-1, 16, 2)
    boxes = np.array([a["bbox"] for a in META["input"]["annotations"]]).reshape(-1, 2, 2)
    boxes[:, 1] += boxes[:, 0]
    drawn = drawn or dict(scale=1.0, cx=width / 2, cy=height / 2, flip=False)
    centre = np.array([drawn["cx"], drawn["cy"]], float)
    if drawn["flip"]:
        polygons[..., 0] = width - polygons[..., 0] - 1
        boxes[..., 0] = width - boxes[:, ::-1, 0] - 1
        centre[0] = width - centre[0] - 1
        if reorder:  # vertex N/4, the old top right, becomes the first, and the order turns round
            polygons = np.roll(polygons[:, ::-1], 16 // 4 + 1, axis=1)
    polygons, boxes = (
        torch.from_numpy((x - centre) * 1024 / (width * drawn["scale"]) + np.array([512, 256]))
        for x in (polygons, boxes)
    )
    return polygons, boxes.flatten(1)


def sample(polygons: Tensor, labels: list[int] | None = None, depths: list[float] | None = None) -> SegSample:
    count = len(polygons)
    truth = InstanceData(
        polygons=polygons,
        labels=torch.zeros(count, dtype=torch.int64) if labels is None else torch.tensor(labels, dtype=torch.int64),
        depths=torch.arange(count, dtype=torch.float32) if depths is None else torch.tensor(depths),
    )
    return SegSample(gt_polygons=truth, metainfo=dict(img_path="x.png"))


def targets(samples: list[SegSample], **options):
    settings = dict(size=(16, 24), stride=(4.0, 4.0), num_classes=2, num_vertices=4, max_objects=128, elliptical=True)
    return polygon_targets(samples, **(settings | dict(dtype=torch.float32) | options))


def box(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


@pytest.mark.parametrize("name", RUNS)
def test_published_targets(name):
    run, expected = RUNS[name], lambda key: EXPECTED[f"{name}/{key}"]
    polygons, boxes = published_objects(run["drawn"], not run["overrides"].get("no_reorder_flip", False))
    labels = [a["category_id"] - 1 for a in META["input"]["annotations"]]
    depths = [float(a["pseudo_depth"]) for a in META["input"]["annotations"]]
    annotated = sample(polygons, labels, depths)
    annotated.gt_polygons.bboxes = boxes
    found = targets(
        [annotated],
        size=(128, 256),
        num_classes=8,
        num_vertices=16,
        dtype=torch.float64,
        elliptical=run["overrides"].get("elliptical_gt", True),
    )
    heatmap = np.zeros((8, 128, 256))
    heatmap[tuple(expected("hm_index").astype(int).T)] = expected("hm_value")
    np.testing.assert_allclose(found.heatmaps[0].numpy(), heatmap, rtol=0, atol=1e-5)
    assert (found.heatmaps[0].numpy() == 1).sum() == (heatmap == 1).sum()
    if f"{name}/ind" not in EXPECTED:
        return  # stored as the heat map alone
    drawn = expected("ind") > 0
    np.testing.assert_array_equal(found.cells.numpy(), expected("ind")[drawn])
    np.testing.assert_allclose(found.offsets.numpy(), expected("reg")[drawn], rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found.depths.numpy(), expected("pseudo_depth")[drawn, 0])
    if "polar" not in name:
        np.testing.assert_allclose(found.vertices.flatten(1).numpy(), expected("poly")[drawn], rtol=0, atol=1e-4)
    assert len(found.images) == (expected("wh")[:, 0] > 0).sum() < 13  # all but the boxes without width


def test_published_exclusion_in_polar():
    expected = EXPECTED["val_polar/reg_mask"]
    vertices = torch.from_numpy(EXPECTED["val_cartesian/poly"]).unflatten(1, (-1, 2))
    code = encode_polygons(vertices, "polar")
    drawn = EXPECTED["val_polar/ind"] > 0
    turns = (code[drawn] - torch.from_numpy(EXPECTED["val_polar/poly"][drawn]).unflatten(1, (-1, 2))).abs()
    assert turns.max() < 1e-4
    kept = trained_objects(code, "polar")[drawn]
    np.testing.assert_array_equal(kept.numpy(), expected[drawn] > 0)
    assert 0 < kept.sum() < len(kept)
    assert trained_objects(code, "cartesian").all() and trained_objects(code[..., 0], "fixed_angles").all()


def test_nothing_to_see():
    empty = sample(torch.zeros(0, 4, 2))
    outside = sample(torch.tensor([box(-30, 4, -6, 20), box(100, 2, 140, 20), box(8, 70, 20, 90), box(8, 8, 8, 20)]))
    found = targets([empty, outside])
    assert found.heatmaps.shape == (2, 2, 16, 24) and not found.heatmaps.any()
    assert len(found.images) == len(found.cells) == 0
    assert found.vertices.shape == (0, 4, 2) and found.offsets.shape == (0, 2)


def test_objects_cut_by_the_border_have_their_centre_inside():
    found = targets([sample(torch.tensor([box(-60, -20, 20, 28), box(84, 40, 400, 900)]))])
    torch.testing.assert_close(
        found.vertices[0] + 2.5, torch.tensor([[0, 0], [5, 0], [5, 7], [0, 7]]) - torch.tensor([0, 1.0])
    )
    assert found.cells.tolist() == [3 * 24 + 2, 12 * 24 + 22]
    assert ((found.offsets >= 0) & (found.offsets < 1)).all()


def test_the_first_objects_that_count_are_kept():
    boxes = [box(8, 8, 8, 20), *(box(4 + 8 * i, 8, 10 + 8 * i, 20) for i in range(8))]
    found = targets([sample(torch.tensor(boxes)), sample(torch.tensor(boxes[3:5]))], max_objects=3)
    assert found.depths.tolist() == [1, 2, 3, 0, 1]  # the first box has no width and takes no place
    assert found.images.tolist() == [0, 0, 0, 1, 1]
    assert (found.heatmaps[0] == 1).sum() == 3


def test_two_centres_in_one_cell():
    boxes = torch.tensor([box(8, 8, 40, 40), box(16, 16, 33, 33)])
    same, other = targets([sample(boxes)]), targets([sample(boxes, labels=[0, 1])])
    assert same.cells.tolist() == other.cells.tolist() == [6 * 24 + 6] * 2
    assert (same.heatmaps == 1).sum() == 1 and (other.heatmaps == 1).sum() == 2


def test_outline_boxes_rule_over_those_of_the_vertices():
    annotated = sample(torch.tensor([box(20, 20, 40, 40), box(20, 20, 40, 40)]))
    annotated.gt_polygons.bboxes = torch.tensor([[0.0, 20, 90, 40], [20, 20, 20, 40]])
    found, plain = targets([annotated]), targets([sample(torch.tensor([box(20, 20, 40, 40)]))])
    assert len(found.images) == 1
    assert found.heatmaps[0, 0, 7].count_nonzero() > plain.heatmaps[0, 0, 7].count_nonzero()


def test_stride_may_differ_by_axis():
    found = targets([sample(torch.tensor([box(16, 16, 32, 32)]))], stride=(8.0, 4.0))
    assert found.cells.tolist() == [3 * 24 + 6]
    torch.testing.assert_close(found.vertices[0, 2], torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (SegSample(metainfo=dict(img_path="x.png")), "x.png has no gt_polygons .*LoadPolygons"),
        (sample(torch.zeros(1, 5, 2)), "5 vertices for a head of 4"),
        (sample(torch.zeros(1, 4, 2), labels=[2]), "label is 2, but model.head.num_classes is 2"),
        (sample(torch.zeros(1, 4, 2), labels=[-1]), "label is -1"),
    ],
)
def test_truth_that_does_not_fit(truth, message):
    with pytest.raises(ValueError, match=message):
        targets([truth])


def flood_by_queue(values: Tensor, cells: Tensor, size: tuple[int, int]) -> Tensor:
    """The official protocol's way: cells hand their value on to unvisited neighbours, first come first served."""
    found, visited, queue = torch.zeros(values.shape[1], *size), set(), deque()
    for value, cell in zip(values, cells.tolist(), strict=True):
        place = divmod(cell, size[1])
        if place not in visited:
            visited.add(place)
            queue.append((place, value))
    while queue:
        (y, x), value = queue.popleft()
        found[:, y, x] = value
        for place in ((y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)):
            if 0 <= place[0] < size[0] and 0 <= place[1] < size[1] and place not in visited:
                visited.add(place)
                queue.append((place, value))
    return found


@pytest.mark.parametrize("count", [0, 1, 2, 12])
def test_flood_is_the_official_queue(count):
    random = torch.Generator().manual_seed(count)
    cells = torch.randint(0, 9 * 14, (count,), generator=random)
    cells[1::5] = cells[:1]  # some share a cell
    values = torch.arange(2.0 * count).view(-1, 2)
    assert torch.equal(flood(values, cells, (9, 14)), flood_by_queue(values, cells, (9, 14)))
