"""The exact IoU of polygons against rational arithmetic, known figures and differences; the published formulas."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch

from densepred.ops.polygon_iou import polygon_areas, polygon_iou
from densepred.ops.polygons import polar_to_cartesian
from densepred.ops.published_polygon_iou import published_iou, published_iou_9913da9
from tests import parity

META, CASE = parity.case(parity.CASES / "centerpoly_losses")


# Oracle ---------------------------------------------------------------------------------------------------------------


def rational_edges(polygon):
    points = [(Fraction(float(x)), Fraction(float(y))) for x, y in polygon]
    return [tuple(sorted(ends)) for ends in zip(points, points[1:] + points[:1], strict=True)]


def height(edge, x):
    (x0, y0), (x1, y1) = edge
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def oracle(a, b):
    """Even-odd areas of a, of b and of their intersection, slab by slab between all vertices and crossings."""
    edges = [(e, k) for k, p in enumerate((a, b)) for e in rational_edges(p) if e[0][0] < e[1][0]]
    cuts = {x for e, _ in edges for x, _ in e}
    for i, (e, _) in enumerate(edges):
        for f, _ in edges[:i]:
            start, stop = max(e[0][0], f[0][0]), min(e[1][0], f[1][0])
            if start < stop:
                first, last = height(e, start) - height(f, start), height(e, stop) - height(f, stop)
                if first * last < 0:
                    cuts.add(start + (stop - start) * first / (first - last))
    cuts, areas = sorted(cuts), [Fraction(0)] * 3
    for start, stop in pairwise(cuts):
        middle, inside = (start + stop) / 2, [False, False]
        walls = sorted((height(e, middle), k) for e, k in edges if e[0][0] <= start and stop <= e[1][0])
        for (low, k), (high, _) in pairwise(walls):
            inside[k] = not inside[k]
            for n, counts in enumerate((*inside, all(inside))):
                areas[n] += counts * (high - low) * (stop - start)
    return [float(area) for area in areas]


DRAWS = {
    "general": lambda random, v: random.randn(v, 2),
    "far": lambda random, v: random.randn(v, 2) + 50,
    "grid": lambda random, v: random.randint(0, 4, (v, 2)),
    "thirds": lambda random, v: random.randint(0, 3, (v, 2)) / 3 + 0.1,
    "line": lambda random, v: random.randint(0, 5, (v, 1)) * np.array([[1, 2]]) + 3,
    "star": lambda random, v: star(random, v),
}
"""Nearly all of the first ones cross themselves; the next share vertices, edges and parts of edges, or have no area."""


def star(random, v):
    angles = np.arange(v) * 2 * np.pi / v
    return (1 + random.rand(v, 1)) * np.stack([np.cos(angles), np.sin(angles)], 1)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize(("v", "w", "count"), [(3, 3, 20), (4, 7, 20), (9, 5, 20), (16, 16, 2)])
def test_areas_equal_rational_arithmetic(kind, v, w, count):
    random = np.random.RandomState(v)
    pairs = [(DRAWS[kind](random, v), DRAWS[kind](random, w)) for _ in range(count)]
    sides = [torch.tensor(np.stack(side), dtype=torch.float64) for side in zip(*pairs, strict=True)]
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        a, b = (side.to(dtype) for side in sides)
        expected = torch.tensor([oracle(p, q) for p, q in zip(a.numpy(), b.numpy(), strict=True)], dtype=torch.float64)
        own_a, own_b, difference = polygon_areas(a, b).double().unbind(1)
        found = torch.stack([own_a, own_b, (own_a + own_b - difference) / 2], 1)
        reach = max(a.abs().max(), b.abs().max()).item() ** 2
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * reach)


# Parity ---------------------------------------------------------------------------------------------------------------


def at_centres(name):
    """What the case's map holds at the active slots, (N, C)."""
    maps, active = torch.from_numpy(CASE[name]).flatten(2).mT, torch.from_numpy(CASE["in_reg_mask"]) > 0
    cells = torch.from_numpy(CASE["in_ind"]).long()[..., None].expand(-1, -1, maps.shape[2])
    return maps.gather(1, cells)[active]


def active(name):
    return torch.from_numpy(CASE[name][CASE["in_reg_mask"] > 0])


def vertices(flat):
    return flat.unflatten(1, (-1, 2))


def test_exact_values_and_gradients_of_the_case():
    pred = vertices(at_centres("in_poly_cartesian")).requires_grad_()
    target = vertices(active("in_target_cartesian"))
    iou = polygon_iou(pred, target)
    torch.testing.assert_close(iou.detach(), active("iou_exact_cartesian"), rtol=0, atol=1e-12)
    iou.sum().backward()
    torch.testing.assert_close(pred.grad.flatten(1), active("iou_exact_cartesian_grad"), rtol=0, atol=1e-9)
    polar = polygon_iou(polar_to_cartesian(vertices(at_centres("in_poly_polar"))), target)
    simple = active("iou_exact_polar_valid") > 0
    assert simple.any()
    torch.testing.assert_close(polar[simple], active("iou_exact_polar")[simple], rtol=0, atol=1e-12)


def test_published_values_of_the_case():
    polar = vertices(at_centres("in_poly_polar")), vertices(active("in_target_polar"))
    torch.testing.assert_close(published_iou(*polar), active("iou_official_polar_HEAD"), rtol=0, atol=1e-12)
    cartesian = vertices(at_centres("in_poly_cartesian")), vertices(active("in_target_cartesian"))
    expected = active("iou_official_cartesian_9913da9")
    torch.testing.assert_close(published_iou_9913da9(*cartesian), expected, rtol=0, atol=1e-12)


# Figures --------------------------------------------------------------------------------------------------------------

SQUARE = [[0, 0], [2, 0], [2, 2], [0, 2]]
BOW = [[0, 0], [2, 2], [2, 0], [0, 2]]
FIGURES = {
    "equal": (SQUARE, SQUARE, 1),
    "reversed": (SQUARE, SQUARE[::-1], 1),
    "another start": (SQUARE, SQUARE[2:] + SQUARE[:2], 1),
    "vertices on the edges": (SQUARE, [[0, 0], [1, 0], [2, 0], [2, 0.5], [2, 2], [1.5, 2], [0, 2]], 1),
    "a vertex twice": (SQUARE, [[0, 0], [0, 0], [2, 0], [2, 2], [0, 2]], 1),
    "a spike without area": (SQUARE, [[0, 0], [2, 0], [4, 0], [2, 0], [2, 2], [0, 2]], 1),
    "contained": (SQUARE, [[0.5, 0.5], [1.5, 0.5], [1.5, 1.5], [0.5, 1.5]], 1 / 4),
    "contained at a corner": (SQUARE, [[0, 0], [1, 0], [1, 1], [0, 1]], 1 / 4),
    "half": (SQUARE, [[1, 0], [3, 0], [3, 2], [1, 2]], 1 / 3),
    "a common edge": (SQUARE, [[2, 0], [4, 0], [4, 2], [2, 2]], 0),
    "a part of an edge": (SQUARE, [[2, 1], [4, 1], [4, 5], [2, 5]], 0),
    "a common vertex": (SQUARE, [[2, 2], [4, 2], [4, 4], [2, 4]], 0),
    "a vertex on an edge": (SQUARE, [[2, 1], [4, 0], [4, 2]], 0),
    "disjoint": (SQUARE, [[5, 5], [6, 5], [6, 6]], 0),
    "a crossing one and itself": (BOW, BOW, 1),
    "a crossing one in its hull": (SQUARE, BOW, 1 / 2),
    "a hole": (SQUARE, [*SQUARE, [0, 0], [0, 1], [1, 1], [1, 0]], 3 / 4),
    "twice around": (SQUARE, SQUARE * 2, 0),
    "one without area": (SQUARE, [[0, 0], [1, 1], [2, 2]], 0),
    "two without area": ([[0, 0], [1, 1], [2, 2]], [[0, 1], [0.1, 0.7], [0.2, 0.4]], 0),
    "a point": (SQUARE, [[1, 1]] * 4, 0),
    "two points": ([[1, 1]], [[1, 1]] * 2, 0),
}
TURN = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=torch.float64)


@pytest.mark.parametrize("name", FIGURES)
def test_figures(name):
    figures = [torch.tensor(side, dtype=torch.float64)[None] for side in FIGURES[name][:2]]
    for a, b in (figures, figures[::-1], [f @ TURN - 1.3 for f in figures], [1e4 * f for f in figures]):
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        iou = polygon_iou(a, b)
        assert iou.item() == pytest.approx(FIGURES[name][2], abs=1e-12)
        gradients = torch.autograd.grad(iou.sum(), (a, b))
        assert all(g.isfinite().all() for g in gradients)
        if name in ("disjoint", "two without area", "two points"):
            assert not any(g.any() for g in gradients)


def test_equal_polygons_have_exactly_one():
    a = torch.from_numpy(np.random.RandomState(0).randn(50, 12, 2)).requires_grad_()
    assert (polygon_iou(a, a.detach().clone()) == 1).all()
    assert (polygon_iou(a.float(), a.detach().float()) == 1).all()


# Gradients ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["general", "far", "star"])
def test_gradients_by_differences(kind):
    random = np.random.RandomState(7)
    a, b = (torch.tensor(np.stack([DRAWS[kind](random, v) for _ in range(3)])).requires_grad_() for v in (6, 4))
    assert torch.autograd.gradcheck(polygon_areas, (a, b), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(polygon_iou, (a, b), eps=1e-6, atol=1e-6)


def test_descent_on_the_gradient_finds_the_target():
    """From a polygon that crosses itself: what the even-odd rule is worth to a training."""
    target = torch.tensor(star(np.random.RandomState(1), 8))[None]
    pred = (target[:, [0, 2, 1, 3, 4, 5, 7, 6]] * 0.6).requires_grad_()
    optimizer = torch.optim.Adam([pred], lr=0.02)
    before = polygon_iou(pred, target).item()
    for _ in range(150):
        optimizer.zero_grad()
        (1 - polygon_iou(pred, target)).sum().backward()
        optimizer.step()
    assert before < 0.4
    assert polygon_iou(pred, target).item() > 0.9


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_half_precision_is_computed_in_float32():
    a, b = (torch.tensor(star(np.random.RandomState(s), 9))[None].half().requires_grad_() for s in (1, 2))
    iou = polygon_iou(a, b)
    assert iou.dtype == torch.float32
    torch.testing.assert_close(iou, polygon_iou(a.float(), b.float()), rtol=0, atol=0)
    iou.sum().backward()
    assert a.grad.dtype == torch.float16
    assert polygon_iou(a, b.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(polygon_iou(a, b), iou, rtol=0, atol=0)


def test_no_pairs_and_broken_numbers():
    a, b = torch.zeros(0, 5, 2, requires_grad=True), torch.zeros(0, 3, 2)
    polygon_iou(a, b).sum().backward()
    assert a.grad.shape == a.shape
    for published in (published_iou, published_iou_9913da9):
        assert published(a, b).shape == (0,)
    broken = torch.tensor([SQUARE, SQUARE], dtype=torch.float32)
    broken[0, 1, 1] = torch.nan
    iou = polygon_iou(broken, torch.tensor([SQUARE] * 2, dtype=torch.float32))
    assert iou[0].isnan()
    assert iou[1] == 1


@pytest.mark.parametrize(
    "shapes", [((2, 4, 2), (3, 4, 2)), ((4, 2), (4, 2)), ((2, 4, 3), (2, 4, 3)), ((2, 0, 2), (2, 4, 2))]
)
def test_wrong_shapes_are_named(shapes):
    with pytest.raises(ValueError, match=r"want vertices \(N, V, 2\)"):
        polygon_iou(*map(torch.zeros, shapes))


def test_operator_contract():
    a, b = (torch.tensor(DRAWS["general"](np.random.RandomState(s), 6))[None].requires_grad_() for s in (1, 2))
    torch.library.opcheck(torch.ops.densepred.polygon_areas, (a, b))


# Published formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", [published_iou, published_iou_9913da9])
def test_published_formulas_end_on_anything(formula):
    random = np.random.RandomState(3)
    drawn = [np.stack([DRAWS[kind](random, 8) for _ in range(40)]) for kind in ("general", "grid")]
    for a, b in zip(drawn, drawn[::-1], strict=True):
        pred = torch.tensor(a, dtype=torch.float64).requires_grad_()
        formula(pred, torch.tensor(b, dtype=torch.float64)).nansum().backward()


def test_published_formulas_call_disjoint_polygons_contained():
    """With first edges in line with the centre, as those count twice."""
    small, large = torch.tensor([[SQUARE], [[[-9, 0], [-5, 0], [-5, 4], [-9, 4]]]], dtype=torch.float64)
    assert published_iou_9913da9(small, large).item() == pytest.approx(1 / 4, abs=1e-6)
    angles = torch.tensor([[0.0, 1, 2], [3.0, 4, 5]], dtype=torch.float64)
    polar = torch.stack([torch.ones_like(angles), angles], -1)  # two triangles beside each other
    assert published_iou(polar[:1], polar[1:]).item() == pytest.approx(1, abs=1e-5)
    assert polygon_iou(small, large).item() == polygon_iou(*polar_to_cartesian(polar)[:, None]).item() == 0
