"""Transforms: labels stay on their pixels, numbers come from the sample's generator alone, options are checked."""

import pickle

import cv2
import mmcv
import numpy as np
import pytest
import torch
from PIL import Image

from densepred.data.augmentations import Albumentations
from densepred.data.loading import LoadImage, LoadPanoptic
from densepred.data.transforms import (
    LoadSemanticFromPanoptic,
    PackSegInputs,
    PadTo,
    Redraw,
    ResizeShortEdge,
    ResizeToFit,
    ScaleAndCrop,
    ScaleJitter,
    ShortEdgeJitter,
    SSDColorJitter,
    largest_share,
    nearest_index,
    resize,
)
from densepred.registry import TRANSFORMS

GREY = np.array([0, 40, 90, 140, 190, 240], np.uint8)
"""Grey value painted where the panoptic map holds 0..5; 0 is void and whatever comes in from outside."""
GEOMETRY = [
    dict(type="Affine", rotate=(-40, 40), scale=(0.7, 1.3), translate_percent=(-0.2, 0.2), p=1),
    dict(type="OneOf", transforms=[dict(type="HorizontalFlip", p=1), dict(type="Transpose", p=1)], p=0.9),
    dict(type="RandomCrop", height=50, width=60, pad_if_needed=True, p=0.7),
    dict(type="PadIfNeeded", min_height=70, min_width=80, position="top_left", p=1),
]


class Folder:
    """A data set of painted scenes on disk, with the two methods that transforms call."""

    def __init__(self, folder, count, void=()):
        self.infos = [self._write(folder, i, i in void) for i in range(count)]

    def _write(self, folder, i, void):
        scene = paint(np.random.default_rng(i))
        ids = scene["panoptic"] * (0 if void else 1)
        Image.fromarray(scene["img"]).save(folder / f"{i}.png")
        Image.fromarray(np.dstack([ids * 20, ids, ids * 0]).astype(np.uint8)).save(folder / f"{i}_ids.png")
        infos = [{**s, "id": s["id"] * (20 + 256), "area": 1} for s in scene["segments"]]
        paths = dict(img_path=str(folder / f"{i}.png"), panoptic_path=str(folder / f"{i}_ids.png"))
        return dict(img_id=i, segments_info=infos, **paths)

    def __len__(self):
        return len(self.infos)

    def get_data_info(self, i):
        return dict(self.infos[i])

    def start(self, i, seed=0):
        return {**self.get_data_info(i), "rng": np.random.default_rng(seed), "dataset": self}


def paint(rng, shape=(96, 120)):
    """Rectangles of five segments over void, the image grey by segment; no sliver is thinner than 12 pixels."""
    panoptic = np.zeros(shape, np.uint16)
    for number in range(1, 6):
        y, x = 12 * rng.integers(0, shape[0] // 12 - 3), 12 * rng.integers(0, shape[1] // 12 - 4)
        panoptic[y : y + 48, x : x + 60] = number
    segments = [dict(id=n, label=n % 3, isthing=n > 2, iscrowd=n == 5) for n in range(1, 6)]
    return dict(img=np.repeat(GREY[panoptic][..., None], 3, 2), panoptic=panoptic, segments=segments)


def scene(seed=0):
    results = paint(np.random.default_rng(seed))
    panoptic = results["panoptic"]
    return dict(
        **results,
        semantic=np.where(panoptic == 0, 255, panoptic).astype(np.uint8),
        padding=panoptic == 0,
        masks=panoptic == np.arange(1, 6)[:, None, None],
        mask_labels=np.arange(1, 6),
        rng=np.random.default_rng(seed),
        ori_shape=panoptic.shape,
        img_shape=panoptic.shape,
        img_path="a.png",
        img_id=7,
    )


def assert_consistent(results):
    """Every label map tells the same story as the image, away from the borders that interpolation blends."""
    panoptic, img = results["panoptic"], results["img"][..., 0]
    assert results["img_shape"] == img.shape == panoptic.shape
    kernel, framed = np.ones((7, 7), np.uint8), np.pad(panoptic[1:-1, 1:-1], 1, constant_values=99)
    inside = (cv2.dilate(framed, kernel) == panoptic) & (cv2.erode(framed, kernel) == panoptic)
    assert inside.sum() > 500
    assert np.abs(GREY[panoptic].astype(int) - img)[inside].max() < 20  # half of the smallest step between greys
    assert np.array_equal(results["semantic"], np.where(panoptic == 0, 255, panoptic))
    assert np.array_equal(results["padding"], panoptic == 0)
    assert np.array_equal(results["masks"], panoptic == results["mask_labels"][:, None, None])
    visible = set(np.unique(panoptic)) - {0}
    assert {s["id"] for s in results["segments"]} == set(results["mask_labels"].tolist()) == visible


@pytest.mark.parametrize("seed", range(8))
def test_labels_move_with_the_image(seed):
    jitters = [
        ScaleJitter((64, 72), (0.6, 1.6)),
        ShortEdgeJitter((50, 70, 120), 150, (60, 64)),
        ScaleAndCrop((60, 64), ratio_range=(0.7, 1.6), max_class_share=0.6),
    ]
    pipeline = [Albumentations(GEOMETRY), jitters[seed % 3], PadTo((64, 72), fill=0), ResizeToFit((90, 90))]
    results = scene(seed)
    for transform in pipeline:
        results = transform(results)
        if isinstance(transform, PadTo):  # which leaves the padding of its own out of ``padding``
            results["padding"] |= results["panoptic"] == 0
        assert_consistent(results)


def test_albumentations_numbers():
    transform = Albumentations(GEOMETRY)
    first, again, other = (transform(scene(0) | dict(rng=np.random.default_rng(s)))["img"] for s in (3, 3, 4))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_albumentations_transforms_draw_apart():
    flips = Albumentations([dict(type="HorizontalFlip", p=0.5), dict(type="VerticalFlip", p=0.5)])
    flips = pickle.loads(pickle.dumps(flips))
    corner = np.arange(4, dtype=np.uint8).reshape(2, 2, 1).repeat(3, 2)
    seen = {flips(dict(img=corner, rng=np.random.default_rng(s)))["img"][0, 0, 0] for s in range(40)}
    assert seen == {0, 1, 2, 3}


def test_albumentations_without_instances_or_labels():
    none = dict(masks=np.zeros((0, 8, 9), bool), mask_labels=np.zeros(0, np.int64))
    results = dict(img=np.zeros((8, 9, 3), np.uint8), rng=np.random.default_rng(0), **none)
    results = Albumentations([dict(type="RandomCrop", height=4, width=5)])(results)
    assert results["img_shape"] == (4, 5) and results["masks"].shape == (0, 4, 5)
    results = PadTo((20, 20))(ScaleJitter((6, 7))(results))
    assert results["img_shape"] == (20, 20) and results["masks"].shape == (0, 20, 20)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(type="HorizontalFlp"), r"no transform 'HorizontalFlp'; did you mean 'HorizontalFlip'\?"),
        (dict(type="uint8"), "no transform 'uint8'"),
        (dict(p=1), "no transform None"),
        (dict(type="Affine", rotat=3), r"Affine has no argument 'rotat'; did you mean 'rotate'\?"),
        (dict(type="OneOf", transforms=[dict(type="Blur", size=3)]), "Blur has no argument 'size'"),
        (dict(type="HorizontalFlip", p=2), r"HorizontalFlip refuses \{'p': 2\}: .*less than or equal to 1"),
        (dict(type="RandomCrop", height=3), "RandomCrop refuses .*width"),
        (dict(type="Rotate", mask_interpolation=1), "mask_interpolation=1 would damage labels"),
        (dict(type="PadIfNeeded", fill_mask=9), "fill_mask=9 would damage labels"),
    ],
)
def test_albumentations_refuses(config, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Albumentations([config])


def test_albumentations_must_leave_the_normalising_to_the_preprocessor():
    with pytest.raises(ValueError, match=r"image of float32 .* remove Normalize"):
        Albumentations([dict(type="Normalize")])(scene())


@pytest.mark.parametrize("shape, expected", [((480, 640), (48, 64)), ((640, 427), (64, 43)), ((20, 31), (41, 64))])
def test_resize_to_fit(shape, expected):
    img = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    results = ResizeToFit((64, 64))(dict(img=img))
    assert results["img_shape"] == expected
    assert np.array_equal(results["img"], Image.fromarray(img).resize(expected[::-1], Image.Resampling.BILINEAR))


@pytest.mark.parametrize("old, new", [(640, 427), (31, 64), (96, 48), (7, 1), (1, 5)])
def test_nearest_index_is_that_of_an_rgb_image(old, new):
    ids = np.arange(old)
    rgb = np.stack([ids % 256, ids // 256, ids * 0], -1)[None].astype(np.uint8)  # as the reference resizes the PNG
    line = np.asarray(Image.fromarray(rgb).resize((new, 1), Image.Resampling.NEAREST))[0].astype(int)
    assert np.array_equal(nearest_index(old, new), line[:, 0] + 256 * line[:, 1])


@pytest.mark.parametrize("shape", [(61, 77), (301, 383)])
def test_a_window_equals_the_crop_of_the_whole(shape):
    img = np.random.default_rng(0).integers(0, 256, (96, 120, 3), dtype=np.uint8)
    panoptic = paint(np.random.default_rng(0))["panoptic"]
    masks = dict(masks=panoptic == np.arange(1, 6)[:, None, None], mask_labels=np.arange(1, 6))
    whole, part = (dict(img=img, panoptic=panoptic, segments=[], **masks) for _ in range(2))
    whole, part = resize(whole, shape), resize(part, shape, offset=(17, 5), window=(30, 50))
    difference = np.abs(whole["img"][17:47, 5:55].astype(int) - part["img"])
    assert difference.max() <= 2 and (difference > 0).mean() < 0.1
    assert np.array_equal(whole["panoptic"][17:47, 5:55], part["panoptic"])
    assert np.array_equal(part["masks"], part["panoptic"] == part["mask_labels"][:, None, None])
    assert set(part["mask_labels"].tolist()) == set(np.unique(part["panoptic"])) - {0}


def test_scale_jitter_sizes():
    jitter, shapes = ScaleJitter((64, 80), (0.2, 2.0)), []
    for seed in range(60):
        shapes.append(jitter(dict(img=np.zeros((96, 120, 3), np.uint8), rng=np.random.default_rng(seed)))["img_shape"])
    heights, widths = np.array(shapes).T
    assert heights.max() == 64 and widths.max() == 80
    assert heights.min() <= 16 and widths.min() <= 20  # ratio 0.25 and less
    assert 0.3 < np.mean(heights < 64) < 0.6  # 0.8 / 1.8 of the ratios shrink


@pytest.mark.parametrize(
    "shape, short_edge, max_size, expected",
    [
        ((480, 640), 800, 1333, (800, 1067)),  # 1066.67
        ((427, 640), 800, 1333, (800, 1199)),
        ((640, 427), 800, 1333, (1199, 800)),
        ((333, 640), 800, 1333, (694, 1333)),  # the long side decides: 693.58
        ((1024, 2048), 1024, 2048, (1024, 2048)),
        ((1, 500), 8, 64, (1, 64)),  # 0.128 of a pixel
        ((300, 300), 101, 300, (101, 101)),
    ],
)
def test_resize_short_edge(shape, short_edge, max_size, expected):
    img = np.zeros((*shape, 3), np.uint8)
    assert ResizeShortEdge(short_edge, max_size)(dict(img=img))["img_shape"] == expected


def test_resize_short_edge_to_multiples():
    for shape, expected in (((64, 86), (64, 128)), ((86, 64), (128, 64)), ((64, 128), (64, 128))):
        assert ResizeShortEdge(64, 256, multiple=64)(dict(img=np.zeros((*shape, 3), np.uint8)))["img_shape"] == expected


def test_short_edge_jitter_draws_all_lengths_and_places():
    img = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (60, 1, 3))  # 60 x 120, brighter to the right
    jitter = ShortEdgeJitter((30, 60, 90), 160, (40, 50))
    shapes, starts = set(), []
    for seed in range(60):
        results = jitter(dict(img=img, rng=np.random.default_rng(seed)))
        shapes.add(results["img_shape"])
        starts.append(int(results["img"][0, 0, 0]))
    assert shapes == {(30, 50), (40, 50)}
    assert min(starts) < 10 and max(starts) > 130


@pytest.mark.parametrize("shape", [(512, 683), (683, 512), (1024, 2048), (33, 500)])
@pytest.mark.parametrize("base_size", [(2048, 512), (512, 2048), None])
@pytest.mark.parametrize("ratio", [0.5, 0.731, 2.0])
def test_scale_and_crop_sizes_are_mmcvs(shape, base_size, ratio):
    crop = ScaleAndCrop((10**4, 10**4), base_size, ratios=[ratio])
    scale = ratio if base_size is None else tuple(int(side * ratio) for side in base_size)
    results = crop(dict(img=np.zeros((*shape, 3), np.uint8), rng=np.random.default_rng(0)))
    assert results["img_shape"] == mmcv.rescale_size(shape[::-1], scale)[::-1]


def test_scale_and_crop_draws_all_factors_and_places():
    img = np.tile(np.arange(0, 240, 2, dtype=np.uint8)[None, :, None], (60, 1, 3))  # 60 x 120, brighter to the right
    for options, sizes in ((dict(ratios=[0.5, 1, 1.5]), 3), (dict(ratio_range=(0.5, 1.5)), 20)):
        crops = [ScaleAndCrop((75, 50), **options)(dict(img=img, rng=np.random.default_rng(s))) for s in range(60)]
        heights, widths = np.array([crop["img_shape"] for crop in crops]).T
        starts = [crop["img"][0, 0, 0] for crop in crops]
        assert len(set(heights)) >= sizes and heights.min() <= 35 and heights.max() == 75 and set(widths) == {50}
        assert min(starts) < 10 and max(starts) > 130


def test_scale_and_crop_avoids_crops_of_one_class():
    semantic = np.full((100, 200), 3, np.uint8)
    semantic[:, 140:], semantic[:20] = 5, 255
    shares = []
    for share in (1.0, 0.75):
        crop = ScaleAndCrop((40, 40), ratios=[1.0], max_class_share=share)
        drawn = [
            crop(dict(img=np.zeros((100, 200, 3), np.uint8), semantic=semantic, rng=np.random.default_rng(seed)))
            for seed in range(200)
        ]
        assert {results["semantic"].shape for results in drawn} == {(40, 40)}
        shares.append(np.mean([largest_share(results["semantic"]) < 0.75 for results in drawn]))
    assert shares == pytest.approx([0.118, 0.715], abs=0.1)  # 19 of 161 places pass: 1 - (1 - 0.118)^10 = 0.715


def test_scale_and_crop_takes_the_last_of_ten_crops_where_everything_is_ignored():
    semantic = np.full((20, 20), 255, np.uint8)
    results = dict(img=np.zeros((20, 20, 3), np.uint8), semantic=semantic, rng=np.random.default_rng(0))
    assert (ScaleAndCrop((8, 8), ratios=[1.0], max_class_share=0.75)(results)["semantic"] == 255).all()
    reference = np.random.default_rng(0)
    reference.choice([1.0])
    reference.integers(13, size=20)
    assert results["rng"].integers(2**40) == reference.integers(2**40)


def test_scale_and_crop_refuses():
    with pytest.raises(ValueError, match=r"max_class_share=1\.5 is no share"):
        ScaleAndCrop((8, 8), max_class_share=1.5)
    with pytest.raises(ValueError, match="load the labels before it"):
        ScaleAndCrop((8, 8), max_class_share=0.75)(
            dict(img=np.zeros((9, 9, 3), np.uint8), rng=np.random.default_rng(0))
        )


def test_largest_share():
    assert largest_share(np.array([[0, 0, 7, 255]], np.uint8)) == 2 / 3
    assert largest_share(np.array([[254]], np.uint8)) == largest_share(np.array([[255]], np.uint8)) == 1


def test_pad_to():
    results = scene()
    before = dict(results)
    results = PadTo((100, 130))(results)
    assert results["img"].shape == (100, 130, 3) and results["img_shape"] == (100, 130)
    assert np.array_equal(results["img"][:96, :120], before["img"])
    for key, void in dict(img=128, panoptic=0, semantic=255, masks=False, padding=False).items():
        rest = results[key] if key == "img" else np.moveaxis(np.atleast_3d(results[key].T), 0, 1)  # (H, W, ...)
        assert (rest[96:] == void).all() and (rest[:, 120:] == void).all(), key
    assert np.array_equal(results["masks"][:, :96, :120], before["masks"])
    assert PadTo((100, 130), fill=7)(scene())["img"][-1, -1].tolist() == [7, 7, 7]
    with pytest.raises(ValueError, match=r"PadTo\(size=\(96, 100\)\) got an image of 96 x 120 \(a\.png\); crop"):
        PadTo((96, 100))(scene())


def test_semantic_from_panoptic():
    results = scene()
    results["segments"] = [dict(s, id=s["id"]) for s in results["segments"]]
    panoptic = results["panoptic"]
    expected = np.array([255, 1, 2, 0, 1, 2])[panoptic]  # label = number % 3, the crowd too
    results = LoadSemanticFromPanoptic()(results)
    assert np.array_equal(results["semantic"], expected) and results["semantic"].dtype == np.uint8
    assert "panoptic" not in results and "segments" not in results
    void = LoadSemanticFromPanoptic()(dict(panoptic=np.zeros((2, 3), np.uint16), segments=[]))
    assert (void["semantic"] == 255).all()


def reference_color_jitter(img, brightness, contrast, saturation, hue, contrast_first):
    """The same steps as plain float arithmetic on the image; None skips a step."""

    def affine(x, factor, shift):
        return np.clip(x.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

    def hsv_step(x, change):
        hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV)
        change(hsv)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)

    def saturate(hsv):
        hsv[..., 1] = affine(hsv[..., 1], saturation, 0)

    def turn(hsv):
        hsv[..., 0] = (hsv[..., 0].astype(int) + hue) % 180

    img = affine(img, 1, brightness)
    img = affine(img, contrast, 0) if contrast_first else img
    img = hsv_step(hsv_step(img, saturate), turn)
    return img if contrast_first else affine(img, contrast, 0)


class Scripted:
    """A generator that returns what it is told."""

    def __init__(self, coin, values):
        self.coins, self.values = iter([coin, 0, 0, 0, 0]), iter(values)

    def random(self):
        return next(self.coins)

    def uniform(self, low, high):
        value = next(self.values)
        assert low <= value <= high
        return value

    integers = uniform


@pytest.mark.parametrize("contrast_first", [True, False])
def test_ssd_color_jitter_order(contrast_first):
    img = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    values = [-31.5, 1.4, 0.6, -17] if contrast_first else [-31.5, 0.6, -17, 1.4]
    rng = Scripted(0.1 if contrast_first else 0.9, values)
    result = SSDColorJitter()(dict(img=img, rng=rng))["img"]
    assert np.array_equal(result, reference_color_jitter(img, -31.5, 1.4, 0.6, -17, contrast_first))


def test_ssd_color_jitter_steps_fire_half_of_the_time():
    img = np.random.default_rng(0).integers(60, 120, (4, 4, 3), dtype=np.uint8)
    jitter = SSDColorJitter(contrast=(1, 1), saturation=(1, 1), hue=0)
    changed = [not np.array_equal(jitter(dict(img=img, rng=np.random.default_rng(s)))["img"], img) for s in range(99)]
    plain = SSDColorJitter(brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0)
    hsv = [not np.array_equal(plain(dict(img=img, rng=np.random.default_rng(s)))["img"], img) for s in range(99)]
    assert np.mean(hsv) <= 0.8 and 0.35 < np.mean(np.array(changed) & ~np.array(hsv)) / np.mean(~np.array(hsv)) < 0.65


def test_redraw_takes_another_image_until_one_has_labels(tmp_path):
    folder = Folder(tmp_path, 4, void=(0, 1))
    load = [dict(type="LoadImage"), dict(type="LoadPanoptic")]
    redraw = TRANSFORMS.build(dict(type="Redraw", transforms=load, min_labelled=100, max_share=1.0))
    assert redraw(folder.start(2))["img_id"] == 2
    drawn = [redraw(folder.start(0, seed))["img_id"] for seed in range(20)]
    assert set(drawn) == {2, 3}
    assert drawn == [redraw(folder.start(0, seed))["img_id"] for seed in range(20)]


def test_redraw_counts_no_crowd_and_gives_up(tmp_path):
    folder = Folder(tmp_path, 1)
    results = LoadPanoptic()(LoadImage()(folder.start(0)))
    labelled = int(np.isin(results["panoptic"][::4, ::4], [1, 2, 3, 4]).sum())
    load = [LoadImage(), LoadPanoptic()]
    assert Redraw(load, min_labelled=labelled - 1, max_share=1.0)(folder.start(0))["img_id"] == 0
    with pytest.raises(
        ValueError, match=rf"0\.png and 2 more .* min_labelled={labelled} labelled .* lower min_labelled"
    ):
        Redraw(load, min_labelled=labelled, max_share=1.0, tries=3)(folder.start(0))


def test_pack():
    results = scene()
    packed = PackSegInputs()({**results, "panoptic_path": "a_ids.png", "dataset": object()})
    sample = packed["data_samples"]
    assert set(packed) == {"inputs", "data_samples"}
    assert packed["inputs"].dtype == torch.uint8 and packed["inputs"].is_contiguous()
    assert np.array_equal(packed["inputs"].permute(1, 2, 0), results["img"])
    assert sample.metainfo == dict(
        img_path="a.png", img_id=7, ori_shape=(96, 120), img_shape=(96, 120), label_path="a_ids.png"
    )
    assert sample.gt_panoptic.ids.dtype == torch.int32
    assert np.array_equal(sample.gt_panoptic.ids, results["panoptic"])
    assert sample.gt_panoptic.segments == results["segments"]
    assert np.array_equal(sample.gt_semantic, results["semantic"]) and sample.gt_semantic.dtype == torch.int64
    assert np.array_equal(sample.padding, results["padding"])


def test_pack_instances():
    masks = np.zeros((4, 96, 120), bool)
    masks[0, 3:5, 7:20] = masks[2, 90:, 110:] = masks[3, 0, 0] = True
    results = dict(scene(), masks=masks, mask_labels=np.array([5, 6, 7, 5]))
    found = PackSegInputs()(results)["data_samples"].gt_instances
    assert found.labels.tolist() == [5, 7, 5] and found.labels.dtype == torch.int64
    assert found.bboxes.tolist() == [[7, 3, 20, 5], [110, 90, 120, 96], [0, 0, 1, 1]]
    assert found.bboxes.dtype == torch.float32 and found.masks.dtype == torch.bool
    assert np.array_equal(found.masks, masks[[0, 2, 3]])
    for count in (0, 1):  # no instance, and none with a pixel
        results = dict(scene(), masks=masks[1 : 1 + count], mask_labels=np.array([6][:count]))
        found = PackSegInputs()(results)["data_samples"].gt_instances
        assert len(found) == 0 and found.masks.shape == (0, 96, 120) and found.bboxes.shape == (0, 4)


def test_pack_of_a_bare_image():
    keys = ("img", "img_path", "img_id", "ori_shape", "img_shape")
    sample = PackSegInputs()({key: scene()[key] for key in keys})["data_samples"]
    assert sample.keys() == [] and "label_path" not in sample.metainfo
