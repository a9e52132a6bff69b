"""The polygon head: published detections and losses, learning, prediction in the file's pixels, the oracle."""

import math

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from densepred.engine import benchmark_polygons as benchmark
from densepred.engine.benchmark_polygons import benchmark_polygons, decode_by_loops, decode_inputs, largest_difference
from densepred.heads.polygon import PolygonHead
from densepred.heads.polygon_inference import best_peaks, decode, to_file
from densepred.heads.polygon_targets import PolygonTargets
from densepred.ops.polygons import polar_to_cartesian
from densepred.structures import Features, SegSample
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "centerpoly_v2_hourglass_cityscapes")
_, LOSSES = parity.case(parity.CASES / "centerpoly_losses")
SHAPES = dict(pad_shape=(64, 96), img_shape=(64, 96), ori_shape=(128, 192))
SCALES = {"sigmoid(normal_input)": 1, "6 * normal_input": 6, "10 * normal_input": 10, "normal_input": 1}


def made_up_maps() -> dict[str, Tensor]:
    maps = {}
    for name, record in META["input"]["decode_maps"].items():
        if name != "K":
            values = parity.normal_input(record["seed"], record["shape"]) * SCALES[record["recipe"]]
            maps[name] = torch.from_numpy(values)
    return maps | dict(hm=maps["hm"].sigmoid())


def rows(found) -> np.ndarray:
    """Detections in the order of the official columns."""
    polygons = found.polygons  # (B, K, V, 2)
    parts = [polygons.amin(2), polygons.amax(2), found.scores[..., None], found.labels[..., None], polygons.flatten(2)]
    return torch.cat([*parts, found.depths[..., None]], 2).numpy()


def published_radii_to_vertices(polygon: Tensor) -> Tensor:
    """The repository's reading of ``polar_fixed``: every second channel, the other way round, with 3.14 for pi."""
    radii = polygon[:, ::2]
    angles = 6.28 - 6.28 * torch.arange(radii.shape[1], dtype=radii.dtype) / radii.shape[1]
    code = torch.stack([radii, angles[:, None, None].expand_as(radii)], -1)  # (B, V, h, w, 2)
    return polar_to_cartesian(code).movedim(-1, 2).flatten(1, 2)


@pytest.mark.parametrize("name", ["cartesian", "cartesian_noreg", "polar", "polar_fixed"])
def test_published_detections(name):
    maps = made_up_maps()
    if name == "cartesian_noreg":
        maps["reg"] = torch.full_like(maps["reg"], 0.5)
    if name == "polar_fixed":
        maps["poly"] = published_radii_to_vertices(maps["poly"])
    coordinates = "polar" if name == "polar" else "cartesian"
    found = decode(maps["hm"], maps["reg"], maps["poly"], maps["pseudo_depth"], 40, coordinates)
    expected = EXPECTED[f"random_dets_{name}"]
    np.testing.assert_allclose(rows(found), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_published_detections_of_the_network():
    maps = {name: torch.from_numpy(EXPECTED[name]) for name in ("hm", "reg", "pseudo_depth")}
    nothing = torch.zeros(1, 2, 32, 64, dtype=torch.float64)
    found = rows(decode(maps["hm"].sigmoid(), maps["reg"], nothing, maps["pseudo_depth"], 128, "cartesian"))
    expected = EXPECTED["dets_cartesian"]
    np.testing.assert_allclose(found[..., [4, 5, -1]], expected[..., [4, 5, -1]], rtol=0, atol=1e-12)


def test_published_detections_in_the_original_image():
    (found,), post = EXPECTED["dets_cartesian"], EXPECTED["post_cartesian"]
    affine = np.array([[256 / 2048, 0, 0], [0, 256 / 2048, 0]])
    order = np.argsort(found[:, 5], kind="stable")  # by class, then as they were
    polygons = to_file(torch.from_numpy(found[order, 6:-1]).unflatten(1, (-1, 2)), dict(affine=affine), (4.0, 4.0))
    np.testing.assert_allclose(polygons.flatten(1).numpy(), post[:, 6:-1], rtol=0, atol=5e-3)
    np.testing.assert_array_equal(found[order, 5] + 1, post[:, 0])


def test_peaks():
    heatmap = torch.zeros(2, 2, 5, 6)
    heatmap[0, 0, 0, 0], heatmap[0, 0, 1, 1], heatmap[0, 1, 1, 1] = 0.9, 0.8, 0.7  # a neighbour, another class
    heatmap[1, 1, 4, 4:] = 0.5  # equal neighbours
    scores, places = best_peaks(heatmap, 3)
    torch.testing.assert_close(scores, torch.tensor([[0.9, 0.7, 0], [0.5, 0.5, 0]]))
    assert places[0, :2].tolist() == [0, 37] and sorted(places[1, :2].tolist()) == [58, 59]
    assert best_peaks(heatmap, 1000)[0].shape == (2, 60)


def test_decoding_is_the_published_loops():
    """On a frame's maps with a window that is no plain halving, and on channels-last memory."""
    outputs, meta = decode_inputs(torch.Generator().manual_seed(1), classes=3, vertices=5)
    meta["affine"] = np.array([[0.45, 0, 3], [0, 0.45, 11]])
    loops = decode_by_loops(outputs, meta, 60)
    for layout in (torch.contiguous_format, torch.channels_last):
        maps = {name: x.contiguous(memory_format=layout) for name, x in outputs.items()}
        found = head(num_vertices=5, top_k=60, score_threshold=0).predict(maps, [meta])[0]["pred_instances"]
        assert len(found) == 60 and (found.scores.diff() <= 0).all()
        assert largest_difference(found, loops) < 2e-3  # pixels of 2048, in float32
    assert largest_difference(found[1:], loops) == math.inf


def test_benchmark(monkeypatch):
    assert "decode 8x128x256" in benchmark_polygons(repeats=1, objects=2)
    monkeypatch.setattr(benchmark, "decode_rows", lambda: [("x", int, int, lambda *_: math.nan)])
    with pytest.raises(ValueError, match="x: ours and the published way are nan apart"):
        benchmark_polygons(repeats=1, objects=2)


def test_affine_of_any_window():
    affine = np.array([[0.5, 0.1, 30], [-0.2, 0.4, 7]])
    points = torch.rand(3, 5, 2, dtype=torch.float64) * 100
    in_window = points @ torch.from_numpy(affine[:, :2]).T + torch.from_numpy(affine[:, 2])
    cells = in_window / torch.tensor([4.0, 8.0])
    torch.testing.assert_close(to_file(cells, dict(affine=affine), (8.0, 4.0)), points)
    resized = to_file(torch.ones(2), dict(img_shape=(50, 100), ori_shape=(200, 300)), (4.0, 4.0))
    assert resized.tolist() == [12, 16]


# The head -------------------------------------------------------------------------------------------------------------


def head(**options) -> PolygonHead:
    torch.manual_seed(0)
    return PolygonHead(
        **(dict(in_channels=8, level_channels=[], encoder_channels=[], num_classes=3, head_channels=16) | options)
    )


def ellipse(x: float, y: float, vertices: int = 16) -> Tensor:
    """An ellipse of half axes 20 and 10 that starts at the top left, clockwise."""
    angles = torch.arange(vertices) * (2 * math.pi / vertices) - 0.75 * math.pi
    return torch.stack([x + 20 * angles.cos(), y + 10 * angles.sin()], -1)


def samples() -> list[SegSample]:
    """Two objects, then none."""
    two = InstanceData(
        polygons=torch.stack([ellipse(40.3, 29), ellipse(61, 47)]),
        labels=torch.tensor([0, 2]),
        depths=torch.tensor([0.0, 1]),
    )
    none = InstanceData(polygons=torch.zeros(0, 16, 2), labels=torch.zeros(0, dtype=torch.int64), depths=torch.zeros(0))
    return [SegSample(gt_polygons=truth, metainfo=SHAPES) for truth in (two, none)]


def features(dtype: torch.dtype = torch.float32, deep: int = 0) -> Features:
    random = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 8, 16, 24, generator=random).to(dtype) for _ in range(deep + 1)]
    return Features(pixels=maps[-1], levels=[], encoder=[], deep=maps[:-1])


METAS = [SHAPES, SHAPES]


@pytest.mark.parametrize(
    ("name", "options", "weights"),
    [
        ("total_cartesian_l1", dict(region=None), {}),
        ("total_kitti_cartesian_l1", dict(region=None), dict(depth=0)),
        ("total_polar_l1_iou_order", dict(coordinates="polar", region="published"), dict(order=1)),
    ],
)
def test_published_totals(name, options, weights):
    coordinates = options.get("coordinates", "cartesian")
    given = {key.removeprefix("in_"): torch.from_numpy(value) for key, value in LOSSES.items() if key.startswith("in_")}
    images, slots = given["reg_mask"].nonzero().unbind(1)
    code = given[f"target_{coordinates}"][images, slots].unflatten(1, (-1, 2))
    targets = PolygonTargets(
        given["hm_gt"],
        images,
        given["ind"][images, slots].long(),
        given["reg_gt"][images, slots],
        polar_to_cartesian(code) if coordinates == "polar" else code,
        given["depth_gt"][images, slots, 0],
    )
    outputs = dict(heatmap_logits=given["hm_logits"], polygon=given[f"poly_{coordinates}"])
    outputs |= dict(offset=given["reg_map"], pseudo_depth=given["depth_map"])
    model = head(num_classes=8, weights=weights, **options)
    model._targets = lambda *_: targets
    losses = model.loss(outputs, [])
    assert ("loss_depth" in losses) == ("kitti" not in name)
    np.testing.assert_allclose(float(sum(losses.values())), LOSSES[name], rtol=1e-9)


@pytest.mark.parametrize("coordinates", ["cartesian", "polar", "fixed_angles"])
def test_learns_two_ellipses(coordinates):
    model = head(coordinates=coordinates, compose="each")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(70):
        losses = model.loss(model(features()), samples())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    model.score_threshold = 0.5
    with torch.no_grad():
        found, none = (result["pred_instances"] for result in model.predict(model(features(), False), METAS))
    assert len(none) == 0 and none.masks.shape == (0, 128, 192)
    assert sorted(found.labels.tolist()) == [0, 2]
    found = found[found.labels.argsort()]
    expected = torch.tensor([[40.6, 38, 120.6, 78], [82, 74, 162, 114]])  # in the file, twice as large
    torch.testing.assert_close(found.bboxes, expected, rtol=0, atol=3)
    torch.testing.assert_close(found.depths, torch.tensor([0.0, 1]), rtol=0, atol=0.1)
    areas = found.masks.sum((1, 2))
    assert ((areas - math.pi * 40 * 20).abs() < 0.1 * math.pi * 40 * 20).all()


def test_deep_maps_are_trained_with_the_mean():
    model = head(deep_channels=[8, 8])
    outputs = model(features(deep=2))
    assert len(outputs["aux_outputs"]) == 2 and "aux_outputs" not in model(features(deep=2), False)
    losses = model.loss(outputs, samples())
    singles = [model.loss(maps, samples()) for maps in [{**outputs, "aux_outputs": []}, *outputs["aux_outputs"]]]
    for name, value in losses.items():
        torch.testing.assert_close(value, sum(one[name] for one in singles) / 3)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    names = set(model.state_dict())
    assert {"heatmap.0.weight", "pseudo_depth.2.bias", "deep.1.polygon.2.weight"} <= names and len(names) == 48
    assert (model.heatmap[2].bias == -2.19).all()


def test_batch_without_objects():
    model = head()
    losses = model.loss(model(features()), [samples()[1]] * 2)
    assert losses["loss_heatmap"] > 0
    assert not any(losses[f"loss_{name}"] for name in ("offset", "polygon", "region", "depth"))
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(region=None), {"heatmap", "offset", "polygon", "depth"}),
        (dict(polygon_loss=None, weights=dict(depth=0)), {"heatmap", "offset", "region"}),
        (
            dict(coordinates="polar", weights=dict(order=1, offset=0)),
            {"heatmap", "polygon", "region", "depth", "order"},
        ),
    ],
)
def test_losses_that_are_asked_for(options, names):
    model = head(**options)
    assert set(model.loss(model(features()), samples())) == {f"loss_{name}" for name in names}


def test_fixed_angles_are_held_against_the_outline():
    """The true radii fill most of the outline, and growing or shrinking them only makes it worse."""
    model = head(coordinates="fixed_angles", weights=dict(heatmap=0, offset=0, depth=0))
    model.oracle = ("polygon",)
    outputs = model.apply_oracle(model(features()), samples())
    assert outputs["polygon"].shape == (2, 16, 16, 24)
    truth = model.loss(outputs, samples())
    assert truth["loss_polygon"] < 1e-6 and truth["loss_region"] < 0.1
    for factor in (0.8, 1.25):
        other = model.loss(outputs | dict(polygon=outputs["polygon"] * factor), samples())
        assert other["loss_region"] > truth["loss_region"] + 0.1


def test_half_precision_and_float64():
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = head().to(dtype)
        outputs = model(features(dtype))
        assert outputs["polygon"].dtype == dtype
        assert all(value.dtype == kept for value in model.loss(outputs, samples()).values())
        assert model.predict(outputs, METAS)[0]["pred_instances"].polygons.dtype == kept


def test_threshold_and_top_k():
    model = head(score_threshold=0.0, top_k=5)
    outputs = model(features(), False)
    assert [len(result["pred_instances"]) for result in model.predict(outputs, METAS)] == [5, 5]
    outputs["heatmap_logits"] = torch.full_like(outputs["heatmap_logits"], -torch.inf)
    outputs["heatmap_logits"][0, 1, 3, 4] = 0
    found, none = (result["pred_instances"] for result in model.predict(outputs, METAS))
    assert found.scores.tolist() == [0.5] and found.labels.tolist() == [1] and len(none) == 0


def test_composed_detections_are_those_that_are_written():
    model = head(compose="cityscapes", oracle=("heatmap", "offset", "polygon", "depth"))
    truth = samples()
    polygons = truth[0].gt_polygons.polygons
    truth[0].gt_polygons.polygons = torch.stack([polygons[0], 0.2 * (polygons[0] - 40) + 40])  # hidden by the first
    truth[0].gt_polygons.depths = torch.tensor([3.0, 5.0])
    found = model.predict(model.apply_oracle(model(features(), False), truth), METAS)[0]["pred_instances"]
    assert found.depths.tolist() == [3] and found.masks.shape == (1, 128, 192)


@pytest.mark.parametrize("coordinates", ["cartesian", "polar"])
def test_oracle_gives_back_the_truth(coordinates):
    model = head(coordinates=coordinates, oracle=("heatmap", "offset", "polygon", "depth")).double()
    truth = samples()
    truth[0].gt_polygons.polygons = truth[0].gt_polygons.polygons.double()
    raw = model(features(torch.float64), False)
    found, none = (r["pred_instances"] for r in model.predict(model.apply_oracle(raw, truth), METAS))
    assert len(none) == 0 and found.scores.tolist() == [1, 1]
    found = found[found.labels.argsort()]
    torch.testing.assert_close(found.polygons, 2 * truth[0].gt_polygons.polygons)
    assert found.depths.tolist() == [0, 1]


def test_oracle_replaces_only_what_it_names():
    model = head(oracle=("offset", "depth"))
    raw = model(features(), False)
    outputs = model.apply_oracle(raw, samples())
    assert outputs["polygon"] is raw["polygon"] and outputs["heatmap_logits"] is raw["heatmap_logits"]
    assert not outputs["offset"][1].any() and outputs["pseudo_depth"][0].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_vertices=2), "num_vertices=2"),
        (dict(coordinates="cartesan"), "cartesan"),
        (dict(weights=dict(heatmaps=1)), "weights names 'heatmaps'; did you mean 'heatmap'"),
        (dict(polygon_loss="l2"), "polygon_loss names 'l2'"),
        (dict(region="exactly"), "region names 'exactly'"),
        (dict(compose="city"), "compose names 'city'"),
        (dict(oracle=["hm"]), "oracle names 'hm'"),
        (dict(weights=dict(order=1)), "needs coordinates='polar'"),
        (dict(coordinates="fixed_angles", region="published"), "take 'exact'"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        head(**options)


class OnPixels(nn.Module):
    def __init__(self, model: PolygonHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        return self.model(Features(pixels, [], []), deep_supervision=False)


def test_exports_for_any_size():
    model = OnPixels(head(deep_channels=[8])).eval()
    size = {2: torch.export.Dim("h", min=4, max=64), 3: torch.export.Dim("w", min=4, max=64)}
    program = torch.export.export(model, (torch.randn(1, 8, 16, 24),), dynamic_shapes=dict(pixels=size))
    pixels = torch.randn(1, 8, 20, 12)
    for name, value in program.module()(pixels).items():
        torch.testing.assert_close(value, model(pixels)[name])
