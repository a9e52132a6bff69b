"""Sliding windows and test-time augmentation against brute force, on a tiny model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densepred.registry import MODELS
from densepred.segmentor import Segmentor
from densepred.semantic_inference import augmented_probabilities, slide, window_starts
from densepred.structures import SegSample

CLASSES = 4


@pytest.fixture
def logits_of():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, CLASSES, 5, padding=2).double()  # sees its window's border: windows matter
    return lambda images: conv(images).detach()


def official_starts(length, window, stride):
    """As mmsegmentation writes it."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


@pytest.mark.parametrize("window,stride", [(8, 5), (8, 8), (769, 513), (16, 1), (1, 1)])
def test_windows_are_the_official_ones(window, stride):
    for length in (1, 7, 8, 9, 13, 16, 17, 1024, 2048):
        starts = window_starts(length, window, stride)
        assert starts == official_starts(length, window, stride)
        seen = np.zeros(length, int)
        for start in starts:
            seen[start : start + window] += 1
        assert seen.min() >= 1


def test_cityscapes_takes_two_by_four_tiles():
    assert len(window_starts(1024, 769, 513)) * len(window_starts(2048, 769, 513)) == 8


@pytest.mark.parametrize("shape", [(20, 31), (9, 9), (5, 40), (3, 4)])  # the last is smaller than a window
def test_sliding_is_the_mean_over_the_windows_of_each_pixel(logits_of, shape):
    images = torch.randn(2, 3, *shape, dtype=torch.float64)
    found = slide(logits_of, images, (9, 12), (6, 7))
    seen = [[[] for _ in range(shape[1])] for _ in range(shape[0])]
    for top in official_starts(shape[0], 9, 6):
        for left in official_starts(shape[1], 12, 7):
            window = logits_of(images[:, :, top : top + 9, left : left + 12])
            for y in range(window.shape[2]):
                for x in range(window.shape[3]):
                    seen[top + y][left + x].append(window[:, :, y, x])
    expected = torch.stack([torch.stack([torch.stack(p).mean(0) for p in row], -1) for row in seen], -2)
    assert torch.allclose(found, expected, atol=1e-13)


@pytest.mark.parametrize("flip,align_corners", [(False, False), (True, False), (True, True)])
def test_augmentation_is_the_mean_of_probabilities_at_the_files_size(logits_of, flip, align_corners):
    image = torch.randn(1, 3, 15, 22, dtype=torch.float64)
    found = augmented_probabilities(logits_of, image, (31, 45), (0.5, 1.0, 1.3), flip, align_corners)
    copies = []
    for size in ((8, 11), (15, 22), (20, 29)):  # 7.5 rounds up
        scaled = F.interpolate(image, size, mode="bilinear")
        pairs = [(scaled, False)] + ([(torch.flip(scaled, (3,)), True)] if flip else [])
        for copy, mirrored in pairs:
            logits = logits_of(copy)
            logits = torch.flip(logits, (3,)) if mirrored else logits
            copies.append(F.interpolate(logits, (31, 45), mode="bilinear", align_corners=align_corners).exp())
    expected = sum(copy / copy.sum(1, keepdim=True) for copy in copies) / len(copies)
    assert torch.allclose(found, expected, atol=1e-13)
    assert torch.allclose(found.sum(1), torch.ones(1, 31, 45, dtype=torch.float64))


def test_mirrored_copies_make_the_prediction_symmetric(logits_of):
    image = torch.randn(1, 3, 12, 17, dtype=torch.float64)
    of_image = augmented_probabilities(logits_of, image, (12, 17), (1.0, 1.5), True)
    of_mirror = augmented_probabilities(logits_of, image.flip(-1), (12, 17), (1.0, 1.5), True)
    assert torch.allclose(of_mirror.flip(-1), of_image, atol=1e-12)


def small_model(**options) -> Segmentor:
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type="Segmentor",
            encoder=dict(type="ResNet", depth=18),
            decoder=dict(type="FCNDecoder", channels=8),
            head=dict(type="SemanticHead", num_classes=CLASSES),
            **options,
        )
    )
    return model.eval()


def sample(img_shape, ori_shape) -> SegSample:
    return SegSample(metainfo=dict(img_shape=img_shape, ori_shape=ori_shape, pad_shape=(64, 96)))


SLIDING = dict(size=(33, 41), stride=(20, 30))


@pytest.mark.parametrize(
    "options",
    [
        dict(tta=dict(scales=(0.5, 1.0, 1.7), flip=True)),
        dict(tta=dict(scales=(0.5, 1.0), flip=True), sliding=SLIDING),
    ],
)
@torch.no_grad()
def test_augmentation_predicts_a_padded_image_of_a_batch_as_if_alone(options):
    model = small_model(**options)
    inputs = torch.randn(2, 3, 64, 96)
    inputs[1, :, 50:], inputs[1, :, :, 70:] = 0, 0
    samples = model(inputs, [sample((64, 96), (128, 192)), sample((50, 70), (75, 105))], mode="predict")
    assert [tuple(s.pred_semantic.shape) for s in samples] == [(128, 192), (75, 105)]
    crop = inputs[1:, :, :50, :70]
    alone = SegSample(metainfo=dict(img_shape=(50, 70), ori_shape=(75, 105), pad_shape=(50, 70)))
    (expected,) = model(crop, [alone], mode="predict")
    assert torch.equal(samples[1].pred_semantic, expected.pred_semantic)


@torch.no_grad()
def test_a_sliding_model_predicts_from_the_logits_of_its_windows():
    model, inputs = small_model(sliding=SLIDING), torch.randn(2, 3, 64, 96)
    samples = model(inputs, [sample((64, 96), (64, 96)), sample((50, 70), (50, 70))], mode="predict")
    total, visits = torch.zeros(2, CLASSES, 64, 96), torch.zeros(64, 96)
    for top in (0, 20, 31):
        for left in (0, 30, 55):
            window = slice(top, top + 33), slice(left, left + 41)
            logits = model(inputs[(..., *window)])["sem_logits"]
            total[(..., *window)] += F.interpolate(logits, (33, 41), mode="bilinear")
            visits[window] += 1
    expected = (total / visits).argmax(1)
    assert torch.equal(samples[0].pred_semantic, expected[0])
    assert torch.equal(samples[1].pred_semantic, expected[1, :50, :70])


@torch.no_grad()
def test_one_window_and_one_copy_are_the_plain_prediction():
    inputs, metas = torch.randn(1, 3, 64, 96), ((64, 96), (100, 150))
    (plain,) = small_model()(inputs, [sample(*metas)], mode="predict")
    (slid,) = small_model(sliding=dict(size=(64, 96), stride=(64, 96)))(inputs, [sample(*metas)], mode="predict")
    assert torch.equal(slid.pred_semantic, plain.pred_semantic)
    (augmented,) = small_model(tta=dict(scales=(1.0,), flip=False))(inputs, [sample(*metas)], mode="predict")
    assert (augmented.pred_semantic == plain.pred_semantic).double().mean() > 0.999  # softmax may round ties together


@pytest.mark.parametrize(
    "options,part",
    [
        (dict(sliding=dict(size=(8, 8))), "stride"),
        (dict(sliding=dict(size=(8, 8), stride=(8, 9))), "at most the window"),
        (dict(sliding=dict(size=(8, 8), stride=(0, 8))), "at least 1"),
        (dict(sliding=dict(size=40, stride=24)), "give size="),
        (dict(sliding=dict(size=(8, 8, 8), stride=(8, 8))), "give size="),
        (dict(sliding=dict(size=(8.0, 8.0), stride=(4, 4))), "give size="),
        (dict(tta=dict(scales=(), flip=True)), "scales"),
        (dict(tta=dict(scales=1.0, flip=True)), "scales"),
        (dict(tta=dict(scales=(1.0, -1), flip=True)), "above 0"),
    ],
)
def test_malformed_options_are_refused(options, part):
    with pytest.raises(ValueError, match=part):
        small_model(**options)


def test_a_head_without_scores_of_pixels_cannot_slide():
    with pytest.raises(ValueError, match="Mask2FormerHead does not give"):
        MODELS.build(
            dict(
                type="Segmentor",
                encoder=dict(type="ResNet", depth=18),
                decoder=dict(type="DeformablePixelDecoder", embed_dim=32, mask_dim=32, num_layers=1),
                head=dict(type="Mask2FormerHead", num_classes=3, embed_dim=32, num_layers=1, tasks=("semantic",)),
                tta=dict(scales=(1.0,), flip=True),
            )
        )
