"""Pictures: what they show, what they refuse, and when a run writes them."""

import json
import math
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from densepred.data.loading import read_image
from densepred.engine.curves import CurvesHook, plot_curves, read_scalars, running_mean, sum_over_layers
from densepred.engine.pictures import PictureGridHook, draw_row
from densepred.structures import InstanceData, PanopticMap, SegSample
from densepred.visualization import (
    draw_instances,
    draw_panoptic,
    draw_polygons,
    draw_sample,
    draw_semantic,
    fit,
    picture_grid,
    resize_sample,
    write_png,
)

CLASSES = ("cross", "sky")
PALETTE = ((220, 20, 60), (0, 100, 250))
META = dict(classes=CLASSES, palette=PALETTE, isthing=(True, False))


def grey(height: int = 120, width: int = 160) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def segment(number: int, label: int) -> dict:
    return dict(id=number, label=label, isthing=label == 0, iscrowd=False)


def two_crosses_under_sky() -> PanopticMap:
    ids = torch.zeros(120, 160, dtype=torch.int32)  # the lowest 20 rows stay void
    ids[:40] = 70000  # as large as COCO's ids
    ids[40:100, :80] = 1
    ids[40:100, 80:] = 2
    return PanopticMap(ids, [segment(70000, 1), segment(1, 0), segment(2, 0)])


def test_stuff_has_its_colour_things_a_shade_each_and_void_is_dark():
    image = grey()
    out = draw_panoptic(image, two_crosses_under_sky(), CLASSES, PALETTE)
    assert (image == 128).all()
    assert out[5, 5].tolist() == pytest.approx([64, 114, 189], abs=1)  # half grey, half sky
    left, right = out[45, 5].astype(int), out[45, 155].astype(int)
    assert left.tolist() == pytest.approx([174, 74, 94], abs=1)
    assert np.abs(left - right).sum() > 15
    assert right.argmax() == 0  # still a red
    assert out[105:, :].max() < 64
    assert len(np.unique(out[105:].reshape(-1, 3), axis=0)) == 2  # hatched


def test_instances_keep_their_shades_apart_and_repeat():
    ids = torch.arange(1, 13, dtype=torch.int32).repeat_interleave(10)[None].expand(30, -1)
    panoptic = PanopticMap(ids, [segment(i, 0) for i in range(1, 13)])
    out = draw_panoptic(grey(30, 120), panoptic, CLASSES, PALETTE, opacity=1.0)
    shades = out[2, 4::10].astype(int)
    distance = np.abs(shades[:, None] - shades).sum(-1) + 1000 * np.eye(12, dtype=int)
    assert distance.min() >= 8
    assert np.array_equal(out, draw_panoptic(grey(30, 120), panoptic, CLASSES, PALETTE, opacity=1.0))


def test_borders_and_names_are_drawn_and_small_segments_have_none():
    out = draw_panoptic(grey(), two_crosses_under_sky(), CLASSES, PALETTE)
    assert out[39, 20].min() > 130  # between sky and cross
    assert out[70, 79].min() > 130  # between the crosses
    white = out.min(-1) > 225
    assert white[:38].any()
    assert white[42:98, 5:75].any()
    assert white[42:98, 85:155].any()
    tiny = PanopticMap(torch.ones(8, 8, dtype=torch.int32), [segment(1, 1)])
    assert len(np.unique(draw_panoptic(grey(8, 8), tiny, CLASSES, PALETTE).reshape(-1, 3), axis=0)) == 1


def test_semantic_labels_and_ignore():
    labels = np.zeros((60, 80), np.int64)
    labels[30:] = 1
    labels[:, 70:] = 255
    out = draw_semantic(grey(60, 80), labels, CLASSES, PALETTE)
    assert out[5, 5].tolist() == pytest.approx([174, 74, 94], abs=1)
    assert out[55, 5].tolist() == pytest.approx([64, 114, 189], abs=1)
    assert out[:, 72:].max() < 64


def test_instances_surest_on_top_and_unsure_left_out():
    masks = torch.zeros(3, 60, 80, dtype=torch.bool)
    masks[0, 10:50, 10:50] = True
    masks[1, 10:50, 30:70] = True
    masks[2, :5] = True
    instances = InstanceData(labels=torch.tensor([0, 1, 0]), masks=masks, scores=torch.tensor([0.9, 0.6, 0.3]))
    out = draw_instances(grey(60, 80), instances, CLASSES, PALETTE)
    assert out[45, 35].argmax() == 0  # both are here, the red one is surer
    assert out[45, 65].argmax() == 2
    assert (out[:5] == 128).all()
    nothing = InstanceData(labels=torch.zeros(0, dtype=torch.int64), masks=torch.zeros(0, 60, 80, dtype=torch.bool))
    assert np.array_equal(draw_instances(grey(60, 80), nothing, CLASSES, PALETTE), grey(60, 80))


def two_polygons(**fields) -> InstanceData:
    """Return a large square and a small one inside it, the small one surer."""
    square = torch.tensor([[0.0, 0.0], [80.0, 0.0], [80.0, 80.0], [0.0, 80.0]])
    known = dict(labels=torch.tensor([0, 1]), scores=torch.tensor([0.6, 0.9]))
    return InstanceData(**known | dict(polygons=torch.stack([square + 20, square / 2 + 30])) | fields)


def test_polygons_the_nearest_on_top_else_the_surest():
    photo, middle, between = grey(), (35, 60), (90, 30)
    colors = {}
    for name, fields in dict(sure=dict(), near=dict(depths=torch.tensor([0.0, 1.0]))).items():
        drawn = draw_polygons(photo, two_polygons(**fields), CLASSES, PALETTE)
        colors[name] = [drawn[place].astype(int) for place in (middle, between)]
        assert np.array_equal(drawn[10, 10], photo[10, 10])
    red, blue = (0, 2)
    assert colors["sure"][0].argmax() == blue and colors["sure"][1].argmax() == red
    assert colors["near"][0].argmax() == colors["near"][1].argmax() == red
    unsure = draw_polygons(photo, two_polygons(), CLASSES, PALETTE, score_threshold=0.95)
    assert np.array_equal(unsure, photo)


def test_polygons_that_cannot_be_seen_are_left_out():
    outside = torch.tensor([[-90.0, -90.0], [-20.0, -90.0], [-20.0, -20.0], [-90.0, -20.0]])
    polygons = torch.stack([outside, outside.where(outside != -20, torch.nan)])
    assert np.array_equal(draw_polygons(grey(), two_polygons(polygons=polygons), CLASSES, PALETTE), grey())
    huge = draw_polygons(grey(), two_polygons(polygons=polygons.nan_to_num(1e9) * -1e6), CLASSES, PALETTE)
    assert not np.array_equal(huge, grey())
    none = InstanceData(labels=torch.zeros(0, dtype=torch.int64), polygons=torch.zeros(0, 16, 2))
    assert np.array_equal(draw_polygons(grey(), none, CLASSES, PALETTE), grey())
    with pytest.raises(ValueError, match="label 2 is outside the 2 classes"):
        draw_polygons(grey(), two_polygons(labels=torch.tensor([2, 2])), CLASSES, PALETTE)


def test_polygons_stay_in_place_at_another_size():
    sample = SegSample(
        pred_instances=two_polygons(depths=torch.tensor([1.0, 0.0])), metainfo=dict(ori_shape=(120, 160))
    )
    small = resize_sample(sample, (60, 80))
    corners = small.pred_instances.polygons[0, [0, 2]].tolist()
    assert corners == [[9.75, 9.75], [49.75, 49.75]]  # the middles of four pixels each
    assert small.pred_instances.depths.tolist() == [1, 0]
    drawn = draw_sample(grey(60, 80), small, "pred", META)
    assert np.array_equal(drawn, draw_polygons(grey(60, 80), small.pred_instances, CLASSES, PALETTE))
    whole = draw_sample(grey(), sample, "pred", META)
    changed = (np.abs(whole.astype(int) - grey()).sum(-1) > 0)[::2, ::2]
    assert (changed != (np.abs(drawn.astype(int) - grey(60, 80)).sum(-1) > 0)).mean() < 0.05


def test_masks_come_before_polygons_and_empty_ones_have_no_name():
    masks = torch.zeros(2, 120, 160, dtype=torch.bool)
    masks[0, 40:60, 40:60] = True
    sample = SegSample(pred_instances=two_polygons(masks=masks))
    drawn = draw_sample(grey(), sample, "pred", META)
    assert not np.array_equal(drawn[50, 50], grey()[50, 50])
    assert np.array_equal(drawn[90, 30], grey()[90, 30])


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        (torch.zeros(4, 5), [], "segmentation is 4x5, its image 120x160"),
        (torch.full((120, 160), 7), [segment(1, 0)], r"segments \[7\] that its records lack"),
        (torch.ones(120, 160), [segment(1, 2)], r"label 2 is outside the 2 classes \(0..1\)"),
    ],
)
def test_maps_that_do_not_fit_are_refused(ids, segments, message):
    with pytest.raises(ValueError, match=message):
        draw_panoptic(grey(), PanopticMap(ids.int(), segments), CLASSES, PALETTE)


def test_empty_map_is_all_void():
    out = draw_panoptic(grey(), PanopticMap(torch.zeros(120, 160, dtype=torch.int32), []), CLASSES, PALETTE)
    assert out.max() < 64


def test_sample_is_drawn_by_what_it_has_at_any_size():
    sample = SegSample(gt_panoptic=two_crosses_under_sky(), pred_semantic=torch.ones(120, 160, dtype=torch.int64))
    masks = torch.ones(1, 120, 160, dtype=torch.bool)
    sample.gt_instances = InstanceData(labels=torch.tensor([0]), masks=masks, bboxes=torch.zeros(1, 4))
    double = resize_sample(sample, (240, 320))
    assert torch.equal(double.gt_panoptic.ids[::2, ::2], sample.gt_panoptic.ids)
    assert double.gt_instances.masks.shape == (1, 240, 320)
    image = grey(240, 320)
    truth = draw_panoptic(image, double.gt_panoptic, CLASSES, PALETTE)
    assert np.array_equal(draw_sample(image, double, "gt", META), truth)
    assert draw_sample(image, double, "pred", META)[5, 5].argmax() == 2
    assert draw_sample(image, SegSample(), "pred", META) is None


def test_grid_places_every_picture_under_its_title():
    red, blue = np.full((40, 100, 3), (250, 0, 0), np.uint8), np.full((60, 50, 3), (0, 0, 250), np.uint8)
    grid = picture_grid([[red, blue], [blue, red]], ["truth", "prediction"], gap=8)
    height, width = grid.shape[:2]
    assert width == 3 * 8 + 2 * 100
    bar = height - 3 * 8 - 2 * 60
    assert (grid[:bar].min(-1) < 128).any()  # the titles
    for row, (left, right) in enumerate([(red, blue), (blue, red)]):
        y = bar + 8 + row * 68 + 30
        assert grid[y, 8 + 50].tolist() == left[0, 0].tolist()
        assert grid[y, 116 + 50].tolist() == right[0, 0].tolist()
    assert (grid[bar + 8, 8:108] == 255).all()  # the lower picture is centred
    with pytest.raises(ValueError, match=r"2 titles cannot hold rows of \[1\]"):
        picture_grid([[red]], ["a", "b"])


def test_fit_changes_only_what_lies_outside():
    assert fit(grey(30, 60), 120, 200).shape == (60, 120, 3)
    assert fit(grey(300, 600), 120, 200).shape == (100, 200, 3)
    kept = grey(100, 150)
    assert fit(kept, 120, 200) is kept


def test_png_is_written_whole_in_rgb(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    path = write_png(tmp_path / "new" / "folder" / "a.png", image)
    assert np.array_equal(read_image(path), image)
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    with pytest.raises(ValueError, match=r"not \(9, 7\) uint8"):
        write_png(path, image[..., 0])


def write_scalars(work_dir, run: str, lines: list[dict], tail: str = "") -> None:
    folder = work_dir / run / "vis_data"
    folder.mkdir(parents=True)
    (folder / "scalars.json").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def step(number: int, loss: float) -> dict:
    return dict(lr=1e-3, loss=loss, loss_ce=loss / 8, loss_ce_0=loss / 8, loss_mask=loss / 2, iter=number, step=number)


def test_resumed_run_continues_the_curve(tmp_path):
    metrics = dict(PQ=1.0, time=0.1, data_time=0.1)
    killed = [step(10, 4.0), step(20, 3.0), dict(metrics, step=20), step(30, 2.5), step(40, 9.0)]
    write_scalars(tmp_path, "20260101_000000", killed, tail='{"loss": 3')
    write_scalars(tmp_path, "20260102_000000", [step(30, 2.0), dict(metrics, PQ=2.0, step=40)])
    write_scalars(tmp_path, "20260103_000000", [dict(metrics, PQ=3.0, step=0)])  # an evaluation
    training, validation = read_scalars(tmp_path)
    assert [(line["step"], line["loss"]) for line in training] == [(10, 4.0), (20, 3.0), (30, 2.0)]
    assert [(line["step"], line["PQ"]) for line in validation] == [(20, 1.0), (40, 2.0)]
    write_scalars(tmp_path, "20260104_000000", [step(10, 5.0)])  # begun anew
    assert [line["loss"] for line in read_scalars(tmp_path)[0]] == [5.0]
    assert read_scalars(tmp_path)[1] == []


def test_terms_are_summed_over_the_layers():
    scalars = dict(loss=9.0, loss_ce=1.0, loss_ce_0=2.0, loss_ce_12=3.0, loss_mask_id=4.0, lr=0.1, grad_norm=7.0)
    scalars |= {"d1.loss_ce": 5.0, "aux_loss_seg": 6.0}
    assert sum_over_layers(scalars) == dict(ce=11.0, mask_id=4.0, aux_seg=6.0)


def test_running_mean_steps_over_nan():
    values = np.ones(400)
    values[[0, 7]] = np.nan
    mean = running_mean(values)
    assert np.isnan(mean[[0, 7]]).all()
    assert np.allclose(np.delete(mean, [0, 7]), 1)
    noise = np.random.default_rng(0).normal(size=400)
    assert running_mean(noise)[100:].std() < 0.5 * noise.std()


def test_curves_with_nan_are_plotted_and_a_run_without_logs_has_none(tmp_path):
    assert plot_curves(tmp_path, tmp_path) == []
    lines = [step(n, math.nan if n == 30 else 100 / n) for n in range(10, 100, 10)]
    lines += [dict(PQ=math.nan, PQ_th=1.0, mIoU=3.0, step=50, time=0.1), dict(PQ=2.0, PQ_th=1.5, mIoU=4.0, step=90)]
    write_scalars(tmp_path, "20260101_000000", lines)
    CurvesHook().after_train(SimpleNamespace(work_dir=str(tmp_path)))
    loss, metric = (read_image(tmp_path / name) for name in ("loss_curve.png", "metric_curve.png"))
    for picture in (loss, metric):
        assert picture.shape[1] > 700
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    with_term = (np.abs(loss.astype(int) - (31, 119, 180)).sum(-1) < 30).sum()  # matplotlib's first colour: "ce"
    assert with_term > 300


class FakeRunner:
    """What the hook needs of MMEngine's runner."""

    def __init__(self, work_dir) -> None:
        self.work_dir, self.iter, self.shown = str(work_dir), 350, []
        loader = SimpleNamespace(dataset=SimpleNamespace(metainfo=META))
        self.val_dataloader = self.test_dataloader = loader
        self.visualizer = SimpleNamespace(add_image=lambda *args: self.shown.append(args))


@pytest.fixture
def samples(tmp_path) -> list[SegSample]:
    found = []
    for folder, name in (("a", "one"), ("a", "two"), ("b", "one")):
        path = write_png(tmp_path / folder / f"{name}.png", grey())
        sample = SegSample(gt_panoptic=two_crosses_under_sky(), pred_panoptic=two_crosses_under_sky())
        sample.set_metainfo(dict(img_path=str(path)))
        found.append(sample)
    return found


def test_row_has_input_truth_and_prediction_large_enough_to_read(samples):
    row = draw_row(samples[0], META)
    assert list(row) == ["input", "truth", "prediction"]
    assert {picture.shape for picture in row.values()} == {(360, 480, 3)}
    assert np.array_equal(row["truth"], row["prediction"])
    assert not np.array_equal(row["input"], row["truth"])


def test_validation_writes_one_grid_of_the_first_images(samples, tmp_path):
    runner, hook = FakeRunner(tmp_path), PictureGridHook(num_images=2)
    for _ in range(2):  # two validations: the second begins a new grid
        hook.before_val_epoch(runner)
        hook.after_val_iter(runner, 0, None, samples[:1])
        hook.after_val_iter(runner, 1, None, samples[1:])
        hook.after_val_epoch(runner)
    grid = read_image(tmp_path / "pictures" / "iter_350.png")
    assert 2 * 360 < grid.shape[0] < 3 * 360
    assert 3 * 480 < grid.shape[1] < 4 * 480
    (name, shown, at), _ = runner.shown
    assert (name, at) == ("pictures", 350)
    assert np.array_equal(shown, grid)


def test_test_writes_a_picture_for_every_image(samples, tmp_path):
    PictureGridHook().after_test_iter(FakeRunner(tmp_path), 0, None, samples)
    assert not (tmp_path / "show").exists()
    hook = PictureGridHook(show_dir=str(tmp_path / "show"))
    hook.after_test_iter(FakeRunner(tmp_path), 0, None, samples)
    assert sorted(p.name for p in (tmp_path / "show").iterdir()) == ["b_one.png", "one.png", "two.png"]
    assert cv2.imread(str(tmp_path / "show" / "one.png")).shape[1] > 3 * 480
