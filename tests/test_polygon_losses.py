"""The losses of polygon models against the official numbers, and at the borders of their inputs."""

import time

import pytest
import torch

from densepred.engine.benchmark_region import iou_by_loops, region_inputs, region_rows
from densepred.losses import polygon as losses
from densepred.ops.published_polygon_iou import published_iou
from tests import parity

_, CASE = parity.case(parity.CASES / "centerpoly_losses")
ACTIVE = torch.from_numpy(CASE["in_reg_mask"]) > 0
CELLS = torch.from_numpy(CASE["in_ind"]).long()[..., None]


def at_centres(name, leaf=True):
    """The map's values at the active slots, (N, V, 2) or (N, C)."""
    maps = torch.from_numpy(CASE[name]).flatten(2).mT
    found = maps.gather(1, CELLS.expand(-1, -1, maps.shape[2]))[ACTIVE]
    found = found.unflatten(1, (-1, 2)) if found.shape[1] > 2 else found
    return found.requires_grad_(leaf)


def target(name):
    found = torch.from_numpy(CASE[name])[ACTIVE]
    return found.unflatten(1, (-1, 2)) if found.shape[1] > 2 else found


def polar_terms(pred, *kinds):
    """The official loss of polygons in polar coordinates, with the order term last if it is asked for."""
    goal = target("in_target_polar")
    shifted = torch.stack([pred[..., 0], losses.shift_angles(pred[..., 1])], -1) if "order" in kinds else pred
    terms = dict(
        l1=lambda: losses.polygon_l1_loss(shifted, goal, "polar"),
        iou=lambda: losses.region_loss(pred, goal, "polar", "published"),
        order=lambda: losses.order_loss(pred[..., 1]),
    )
    return [terms[kind]() for kind in kinds]


def cartesian_terms(pred, *kinds):
    goal = target("in_target_cartesian")
    regions = dict(iou_HEAD="published", iou_9913da9="published_9913da9")
    return [
        losses.polygon_l1_loss(pred, goal) if k == "l1" else losses.region_loss(pred, goal, formula=regions[k])
        for k in kinds
    ]


def assert_equals(value, expected):
    expected = torch.as_tensor(expected).reshape(value.shape)
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-9 * expected.abs().max().item())


POLYGONS = {
    "cartesian_l1": ("in_poly_cartesian", cartesian_terms, ("l1",)),
    "cartesian_l1_iou_HEAD": ("in_poly_cartesian", cartesian_terms, ("l1", "iou_HEAD")),
    "cartesian_l1_iou_9913da9": ("in_poly_cartesian", cartesian_terms, ("l1", "iou_9913da9")),
    "polar_l1": ("in_poly_polar", polar_terms, ("l1",)),
    "polar_iou": ("in_poly_polar", polar_terms, ("iou",)),
    "polar_l1_iou": ("in_poly_polar", polar_terms, ("l1", "iou")),
    "polar_l1_order": ("in_poly_polar", polar_terms, ("l1", "order")),
    "polar_l1_iou_order": ("in_poly_polar", polar_terms, ("l1", "iou", "order")),
}


@pytest.mark.parametrize("name", POLYGONS)
def test_polygon_losses_of_the_case(name):
    source, terms, kinds = POLYGONS[name]
    pred = at_centres(source)
    values = terms(pred, *kinds)
    if "order" in kinds:
        assert_equals(values[-1], CASE[f"{name}/order"])
    assert_equals(sum(v for v, k in zip(values, kinds, strict=True) if k != "order"), CASE[f"{name}/loss"])
    sum(values).backward()
    assert_equals(pred.grad, target(f"{name}/grad"))


def test_fixed_angles_of_the_case():
    pred = at_centres("in_poly_polar")
    loss = losses.polygon_l1_loss(pred[..., 0], target("in_target_polar")[..., 0], "fixed_angles")
    assert_equals(loss, CASE["polar_fixed_l1/loss"])
    loss.backward()
    assert_equals(pred.grad, target("polar_fixed_l1/grad"))


def test_every_polygon_loss_of_the_case_is_tested():
    others = {"polar_fixed_l1", "hm", "hm_no_object", "off", "off_sl1", "depth", "depth_sl1"}
    assert {name.split("/")[0] for name in CASE if name.endswith("/loss")} == set(POLYGONS) | others


def test_heatmap_loss_of_the_case():
    logits, targets = torch.from_numpy(CASE["in_hm_logits"]).requires_grad_(), torch.from_numpy(CASE["in_hm_gt"])
    loss = losses.heatmap_focal_loss(logits, targets)
    assert_equals(loss, CASE["hm/loss"])
    loss.backward()
    assert_equals(logits.grad, CASE["hm/grad"])
    without = torch.where(targets < 1, 0.3 * targets, 0.0)
    assert_equals(losses.heatmap_focal_loss(logits, without), CASE["hm_no_object/loss"])


@pytest.mark.parametrize(
    ("name", "maps", "goal"), [("off", "in_reg_map", "in_reg_gt"), ("depth", "in_depth_map", "in_depth_gt")]
)
def test_centre_losses_of_the_case(name, maps, goal):
    pred = at_centres(maps)
    loss = losses.centre_l1_loss(pred, target(goal))
    assert_equals(loss, CASE[f"{name}/loss"])
    loss.backward()
    assert_equals(pred.grad, target(f"{name}/grad"))
    assert_equals(losses.centre_smooth_l1_loss(pred, target(goal)), CASE[f"{name}_sl1/loss"])


def test_totals_of_the_case():
    heat = losses.heatmap_focal_loss(torch.from_numpy(CASE["in_hm_logits"]), torch.from_numpy(CASE["in_hm_gt"]))
    base = heat + losses.centre_l1_loss(at_centres("in_reg_map"), target("in_reg_gt"))
    depth = losses.centre_l1_loss(at_centres("in_depth_map"), target("in_depth_gt"))
    cartesian = base + sum(cartesian_terms(at_centres("in_poly_cartesian"), "l1"))
    assert_equals(cartesian + 0.1 * depth, CASE["total_cartesian_l1"])
    assert_equals(cartesian, CASE["total_kitti_cartesian_l1"])
    polar = base + sum(polar_terms(at_centres("in_poly_polar"), "l1", "iou", "order"))
    assert_equals(polar + 0.1 * depth, CASE["total_polar_l1_iou_order"])


# Ours -----------------------------------------------------------------------------------------------------------------


def test_exact_region_loss_of_the_case():
    pred, expected = at_centres("in_poly_cartesian"), torch.from_numpy(CASE["iou_exact_cartesian"])[ACTIVE]
    loss = losses.region_loss(pred, target("in_target_cartesian"))
    assert_equals(loss, 1 - expected.mean())
    loss.backward()
    exact = target("iou_exact_cartesian_grad")
    torch.testing.assert_close(pred.grad, -exact / len(exact), rtol=0, atol=1e-9)
    assert losses.region_loss(target("in_target_cartesian"), target("in_target_cartesian")) == 0


def test_region_loss_reads_every_coordinate_system():
    radii = 1 + torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(8, dtype=torch.float64) * torch.pi / 4
    polar = torch.stack([radii, angles.expand_as(radii)], -1)
    cartesian = radii[..., None] * torch.stack([angles.cos(), angles.sin()], -1)
    expected = losses.region_loss(cartesian[:2], cartesian[2:])
    assert 0.1 < expected < 0.9
    assert_equals(losses.region_loss(polar[:2], polar[2:], "polar"), expected)
    assert_equals(losses.region_loss(radii[:2], radii[2:], "fixed_angles"), expected)


def test_relu_and_smooth_l1_by_hand():
    pred, goal = torch.tensor([[[30.0, 0.5], [-20, 19]]]), torch.zeros(1, 2, 2)
    assert losses.polygon_relu_loss(pred, goal).item() == pytest.approx((30 + 20) / 4)
    assert losses.polygon_smooth_l1_loss(pred, goal).item() == pytest.approx((29.5 + 0.125 + 19.5 + 18.5) / 4)
    polar = torch.tensor([[[0.5, torch.pi], [3, 0]]])
    assert losses.polygon_smooth_l1_loss(polar, goal, "polar").item() == pytest.approx((0.125 + 2 + 2.5) / 4)
    assert losses.polygon_relu_loss(polar, goal, "polar").item() == pytest.approx((3.5 + 2) / 4)


def test_order_loss_by_hand():
    assert losses.order_loss(torch.tensor([[3.9, 5, 6, 7, 9]])) == 0
    assert losses.order_loss(torch.tensor([[-1, 2, -3.0]])).item() == pytest.approx(0)  # -3 + 6.28 > 2
    assert losses.order_loss(torch.tensor([[3.0, 1, 2]])).item() == pytest.approx((2 + 1) / 10, abs=1e-4)
    shifted = losses.shift_angles(torch.tensor([[-1, 2, -3.0, 0]]))
    torch.testing.assert_close(shifted, torch.tensor([[-1, 2, 3.28, 0]]))
    torch.testing.assert_close(losses.shift_angles(shifted), shifted, rtol=0, atol=0)


FORMULAS = {
    "l1": losses.polygon_l1_loss,
    "smooth_l1": losses.polygon_smooth_l1_loss,
    "relu": losses.polygon_relu_loss,
    "order": lambda pred, goal: losses.order_loss(pred[..., 1]),
    "centre": lambda pred, goal: losses.centre_l1_loss(pred[:, 0], goal[:, 0]),
    "centre_smooth": lambda pred, goal: losses.centre_smooth_l1_loss(pred[:, 0], goal[:, 0]),
    **{f: lambda pred, goal, f=f: losses.region_loss(pred, goal, formula=f) for f in losses.REGIONS},
}


@pytest.mark.parametrize("name", FORMULAS)
def test_no_objects_and_half_precision(name):
    empty = torch.zeros(0, 6, 2, requires_grad=True)
    loss = FORMULAS[name](empty, torch.zeros(0, 6, 2))
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == empty.shape
    pred, goal = (torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(s)).half() for s in (0, 1))
    half = FORMULAS[name](pred.requires_grad_(), goal.float())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, FORMULAS[name](pred.float(), goal.float()), rtol=0, atol=0)
    half.backward()
    assert pred.grad.isfinite().all()


def test_heatmap_loss_in_half_precision_at_certainty():
    logits = torch.tensor([[[[30.0, -30, 0]]]]).half().requires_grad_()
    loss = losses.heatmap_focal_loss(logits, torch.tensor([[[[0.0, 1, 1]]]]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_mistakes_are_named():
    pred = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match=r"'iou'.*'exact', 'published', 'published_9913da9'"):
        losses.region_loss(pred, pred, formula="iou")
    with pytest.raises(ValueError, match="'polar_fixed'"):
        losses.polygon_l1_loss(pred, pred, "polar_fixed")
    with pytest.raises(ValueError, match="use 'exact' with fixed_angles"):
        losses.region_loss(pred[..., 0], pred[..., 0], "fixed_angles", "published")


# Benchmark ------------------------------------------------------------------------------------------------------------


def test_published_loops_equal_the_published_formula_and_are_slower():
    exact, published = region_rows(objects=3, vertices=9)
    for _, ours, loops, difference in (exact, published):
        start = time.thread_time()
        ours()
        middle = time.thread_time()
        found = loops()
        assert difference(None, found) < 1e-4
        assert time.thread_time() - middle > middle - start
    pred, target = (p.double() for p in region_inputs(torch.Generator().manual_seed(1), 6, 8))
    expected = published_iou(pred.requires_grad_(), target)
    found = torch.stack([iou_by_loops(*pair) for pair in zip(pred, target, strict=True)])
    assert_equals(found, expected.detach())
    for mine, theirs in zip(*(torch.autograd.grad(iou.sum(), pred) for iou in (found, expected)), strict=True):
        assert_equals(mine, theirs)
