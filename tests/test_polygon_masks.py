"""Masks of polygons against the published writers (parity case) and slow oracles; polygons that are none."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from densepred.data.polygon_vertices import from_mask
from densepred.heads.polygon_masks import RULES, compose_masks, outline_pixels, whole_pixels
from tests import parity

SQUARE = [[10.0, 10.0], [30.0, 10.0], [30.0, 25.0], [10.0, 25.0]]


def official_detections() -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Return the published case: what was detected and what the authors' writer made of it."""
    meta, expected = parity.case(parity.CASES / "centerpoly_v2_compose")
    rows = [(int(number) - 1, *row) for number, rows in meta["input"]["detections"].items() for row in rows]
    table = torch.tensor(rows, dtype=torch.float64)
    polygons = table[:, 6:-1].unflatten(1, (-1, 2))
    return dict(polygons=polygons, scores=table[:, 5], depths=table[:, -1], labels=table[:, 0].long()), expected


def compose(polygons, scores=None, depths=None, labels=None, size=(40, 60), rule="each", **kwargs):
    count = len(polygons)
    return compose_masks(
        torch.as_tensor(polygons, dtype=torch.float64),
        torch.as_tensor([1.0] * count if scores is None else scores),
        torch.as_tensor([0.0] * count if depths is None else depths),
        torch.as_tensor([0] * count if labels is None else labels),
        size,
        rule,
        **kwargs,
    )


def test_published_case_is_repeated_to_the_pixel():
    detections, expected = official_detections()
    masks, kept = compose_masks(**detections, size=(1024, 2048), rule="cityscapes")
    order = [n for n in np.lexsort((detections["labels"], detections["depths"])) if kept[n]]
    assert len(order) == len(expected["lines"]) == 12
    for line, n in enumerate(order):
        np.testing.assert_array_equal(parity.sample(masks[n].numpy(), 48771), expected[f"mask_{line}"])
        rows, columns = np.nonzero(masks[n].numpy())
        box = (len(rows), columns.min(), rows.min(), columns.max(), rows.max())
        assert box == tuple(expected["lines"][line, 3:])
    assert not masks[~kept].any()


def slow_line(start: tuple[int, int], end: tuple[int, int]) -> list[tuple[int, int]]:
    """Walk from one pixel to another by the textbook's integer error term."""
    (x, y), dx, dy = start, abs(end[0] - start[0]), abs(end[1] - start[1])
    step = [1 if end[axis] > start[axis] else -1 for axis in (0, 1)]
    steep = dy >= dx
    longer, shorter = max(dx, dy), min(dx, dy)
    error, out = 2 * shorter - longer, []
    for _ in range(longer + 1):
        out.append((x, y))
        if error >= 0:
            x, y = (x + step[0], y) if steep else (x, y + step[1])
            error -= 2 * longer
        error += 2 * shorter
        x, y = (x, y + step[1]) if steep else (x + step[0], y)
    return out


def slow_masks(polygons, scores, depths, labels, size, rule) -> np.ndarray:
    """Do what the reference says, one whole frame a polygon and a circle a pixel."""
    thick = rule == "cityscapes"
    groups = np.zeros_like(labels) if thick else labels
    masks, claimed = np.zeros((len(polygons), *size), bool), {group: np.zeros(size, bool) for group in groups}
    for n in sorted(range(len(polygons)), key=lambda n: (depths[n], labels[n], n)):
        points = [tuple(int(float(f"{v:.2f}")) for v in point) for point in polygons[n]]
        shape, whole = (Image.new("L", (size[1], size[0]), 0) for _ in range(2))
        ImageDraw.Draw(whole).polygon(points, outline=1, fill=1)
        ImageDraw.Draw(shape).polygon(points, outline=int(thick), fill=1)
        if thick:
            for start, end in zip(points, points[1:] + points[:1], strict=True):
                for x, y in slow_line(start, end):
                    ImageDraw.Draw(shape).ellipse([(x - 2, y - 2), (x + 2, y + 2)], outline=1, fill=1)
            whole = shape
        masks[n] = np.asarray(shape).astype(bool) & ~claimed[groups[n]]
        if scores[n] >= 0.5:
            claimed[groups[n]] |= np.asarray(whole).astype(bool)
    return masks


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rule", ["cityscapes", "kitti", "idd"])
def test_random_polygons_as_the_slow_way_fills_them(rule, seed):
    rng = np.random.default_rng(seed)
    count, sides, size = 7, int(rng.choice([3, 4, 16])), (50, 90)
    middle = rng.uniform(-10, [100, 60], (count, 1, 2))
    polygons = middle + rng.uniform(0.5, 20, (count, 1, 1)) * rng.normal(
        size=(count, sides, 2)
    )  # they cross themselves
    polygons = polygons.round(seed % 4)
    if seed % 2:
        polygons[:, 1] = polygons[:, 0]
    scores = rng.uniform(0.1, 1, count)
    depths, labels = rng.integers(0, 3, count).astype(float), rng.integers(0, 2, count)
    masks, kept = compose(polygons, scores, depths, labels, size, rule)
    expected = slow_masks(polygons, scores, depths, labels, size, rule)
    assert kept.tolist() == [rule != "cityscapes" or mask.sum() > 100 for mask in expected]
    np.testing.assert_array_equal(masks[kept], expected[kept])


@pytest.mark.parametrize("seed", range(5))
def test_each_polygon_is_filled_with_its_outline(seed):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, (6, 8)))[..., None]
    radii = rng.uniform(5, 40, (6, 8, 1))
    polygons = rng.uniform(-20, 90, (6, 1, 2)) + radii * np.concatenate([np.cos(angles), np.sin(angles)], -1)
    masks, kept = compose(polygons, size=(61, 83))
    pixels = np.stack(np.meshgrid(np.arange(83), np.arange(61)), -1).reshape(-1, 2)
    for polygon, mask in zip(polygons, masks.flatten(1).numpy(), strict=True):
        step = np.roll(polygon, -1, axis=0) - polygon
        part = (((pixels[:, None] - polygon) * step).sum(-1) / (step**2).sum(-1)).clip(0, 1)
        away = np.linalg.norm(polygon + part[..., None] * step - pixels[:, None], axis=-1).min(1)
        inside = crossings(polygon, pixels) % 2 == 1
        np.testing.assert_array_equal(mask[away > 1.5], inside[away > 1.5])
        assert mask.sum() >= inside.sum()
    assert kept.tolist() == masks.flatten(1).any(1).tolist()


def crossings(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return how many edges of a polygon (V, 2) a ray to the right of each point (P, 2) meets."""
    (x0, y0), (x1, y1) = polygon.T, np.roll(polygon, -1, axis=0).T
    x, y = points.T[..., None]
    return (((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) / (y1 - y0) * (x1 - x0))).sum(1)


@pytest.mark.parametrize("width", [3, 8, 40])
def test_vertices_of_a_mask_give_it_back(width):
    """They are its outermost pixels, so the fill must have them too."""
    mask = np.ones((width, width + 2), bool)
    box = np.array([7, 4, 7 + width + 1, 4 + width - 1])
    (filled,), _ = compose(from_mask(mask, box, 16, "regular_interval")[None])
    whole = np.zeros((40, 60), bool)
    whole[4 : 4 + width, 7 : 9 + width] = True
    np.testing.assert_array_equal(filled, whole)


def test_nearer_ones_hide_only_what_their_rule_says():
    polygons, labels = [SQUARE, SQUARE, SQUARE], [0, 1, 0]
    areas = {}
    for rule in RULES:
        masks, kept = compose(polygons, [0.9, 0.8, 0.7], [2.0, 1.0, 1.0], labels, rule=rule)
        areas[rule] = [int(mask.sum()) for mask in masks]
        assert kept.tolist() == [area > 0 or rule in ("kitti", "idd") for area in areas[rule]]
    whole = areas["cityscapes"][2]  # of equal depths the lower class is in front
    assert whole > 21 * 16 and areas["cityscapes"] == [0, 0, whole]
    assert areas["kitti"] == areas["idd"] == [0, 19 * 14, 19 * 14]  # without their outline
    assert areas["each"][0] == areas["each"][1] == areas["each"][2] == 21 * 16
    unsure, _ = compose(polygons[:2], [0.9, 0.49], [2.0, 1.0], [0, 0], rule="cityscapes")
    assert unsure[0].sum() == unsure[1].sum() == whole  # a low score hides nothing


def test_score_equal_to_the_threshold_passes_only_the_rule_of_idd():
    kept = {rule: compose([SQUARE], [0.25], rule=rule, score_threshold=0.25)[1].item() for rule in RULES}
    assert kept == dict(cityscapes=False, kitti=False, idd=True, each=False)


@pytest.mark.parametrize("rule", list(RULES))
def test_polygons_that_are_none_have_a_defined_mask(rule):
    bad = dict(
        nan=[[10, 10], [30, 10], [30, float("nan")], [10, 25]],
        infinite=[[10, 10], [float("inf"), 10], [30, 25], [10, 25]],
        outside=[[-50, -50], [-30, -50], [-30, -35], [-50, -35]],
        dot=[[20, 20]] * 4,
        line=[[5, 20], [55, 20], [5, 20], [55, 20]],
        everything=[[-1e30, -1e30], [1e30, -1e30], [1e30, 1e30], [-1e30, 1e30]],
    )
    for name, polygon in bad.items():
        masks, kept = compose([polygon, SQUARE], [0.4, 0.9], rule=rule)
        assert kept[1] and masks[1].any(), name  # it does not harm the others
        pixels = int(masks[0].sum())
        # As published: a stroke of 51 pixels with round ends, and Pillow's outline does not take off a single dot.
        special = dict(
            everything=40 * 60,
            line=dict(cityscapes=3 * 55 + 2 * 53, each=51).get(rule, 0),
            dot=rule in ("kitti", "idd", "each"),
        )
        assert pixels == special.get(name, 0), name
        assert kept[0] == (pixels > 0 or (rule in ("kitti", "idd") and name not in ("nan", "infinite"))), name


def test_bow_tie_is_filled_even_odd():
    tie = [[10, 5], [50, 35], [50, 5], [10, 35]]
    for rule in RULES:
        mask = compose([tie], rule=rule)[0][0]
        assert mask[20, 12] and mask[20, 48] and not mask[8, 30] and not mask[32, 30], rule
    double = compose([[*SQUARE, *SQUARE]])[0][0]
    assert double.sum() == double[10].sum() + double[25].sum() + 2 * 14  # inside, twice around, is outside again


def test_no_polygons_and_wrong_questions():
    masks, kept = compose(torch.zeros(0, 5, 2), rule="cityscapes")
    assert masks.shape == (0, 40, 60) and kept.shape == (0,) and masks.dtype == kept.dtype == torch.bool
    with pytest.raises(ValueError, match="rule 'coco' is unknown; choose among cityscapes, kitti, idd, each"):
        compose([SQUARE], rule="coco")
    with pytest.raises(ValueError, match=r"polygons are \(N, V, 2\) vertices, V >= 3, not \(3, 8\)"):
        compose_masks(torch.zeros(3, 8), *torch.zeros(3, 3), size=(4, 4))


def test_coordinates_are_cut_as_their_decimal_text():
    values = np.array([12.9949, 12.995, 12.9951, -0.996, -0.4, -7.995, 3.0, 0.995, 0.996, 12345.9951])
    assert whole_pixels(values).tolist() == [int(float(f"{v:.2f}")) for v in values]


def test_walk_along_a_huge_outline_keeps_to_the_image():
    pixels, starts = outline_pixels(np.array([[[-30000, 5], [30000, 9], [100, 30000]]]), (20, 30))
    assert starts.tolist() == [0, len(pixels)] and len(pixels) < 3 * 40
    whole = {p for a, b in (((-30000, 5), (30000, 9)),) for p in slow_line(a, b) if -2 <= p[0] < 32}
    assert whole <= set(map(tuple, pixels.tolist()))
