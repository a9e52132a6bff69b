"""Normalisation and padding of batches."""

import pytest
import torch

from densepred.data.preprocessor import SegPreprocessor
from densepred.structures import InstanceData, PanopticMap, SegSample


def sample(height: int, width: int) -> SegSample:
    made = SegSample(metainfo={"img_path": "x.jpg"})
    made.gt_panoptic = PanopticMap(torch.ones(height, width, dtype=torch.int64), [{"id": 1}])
    made.gt_semantic = torch.zeros(height, width, dtype=torch.int64)
    made.gt_instances = InstanceData(labels=torch.zeros(2), masks=torch.ones(2, height, width, dtype=torch.bool))
    return made


def batch(*sizes: tuple[int, int]) -> dict:
    images = [torch.full((3, h, w), 255, dtype=torch.uint8) for h, w in sizes]
    return {"inputs": images, "data_samples": [sample(h, w) for h, w in sizes]}


def preprocessor(**size) -> SegPreprocessor:
    return SegPreprocessor(mean=[127.5] * 3, std=[127.5] * 3, **size)


def test_images_are_normalised_then_padded_with_zeros():
    out = preprocessor(size=(9, 7))(batch((5, 6), (8, 3)), training=True)
    assert out["inputs"].shape == (2, 3, 9, 7)
    assert out["inputs"][0, :, :5, :6].eq(1).all()
    assert out["inputs"][0].sum() == 3 * 5 * 6
    first = out["data_samples"][0]
    assert first.gt_panoptic.ids.shape == (9, 7)
    assert first.gt_panoptic.ids.sum() == 5 * 6
    assert (first.gt_semantic == 255).sum() == 9 * 7 - 5 * 6
    assert first.gt_instances.masks.shape == (2, 9, 7) and first.gt_instances.masks.dtype == torch.bool
    assert first.gt_instances.masks.sum() == 2 * 5 * 6
    assert first.img_shape == (5, 6)
    assert first.pad_shape == (9, 7)


def test_targets_keep_their_size_in_evaluation():
    out = preprocessor(size_divisor=4)(batch((5, 6)))
    assert out["inputs"].shape == (1, 3, 8, 8)
    assert out["data_samples"][0].gt_panoptic.ids.shape == (5, 6)


def test_no_instances_are_padded_too():
    data = batch((5, 6))
    data["data_samples"][0].gt_instances = InstanceData(labels=torch.zeros(0), masks=torch.zeros(0, 5, 6).bool())
    assert preprocessor(size=(9, 7))(data, training=True)["data_samples"][0].gt_instances.masks.shape == (0, 9, 7)


def test_padding_inside_the_image_is_zeroed():
    data = batch((4, 4))
    data["data_samples"][0].padding = torch.eye(4, dtype=torch.bool)
    out = preprocessor(size=(4, 4))(data, training=True)
    assert out["inputs"][0, 0].diag().abs().sum() == 0
    assert out["inputs"][0, 0].sum() == 12


def test_an_image_larger_than_the_batch_is_named():
    with pytest.raises(ValueError, match=r"size is 4x4, but the pipeline delivered 5x3 .*x.jpg"):
        preprocessor(size=(4, 4))(batch((5, 3)))


def test_size_in_training_and_divisor_in_evaluation():
    both = preprocessor(size=(9, 7), size_divisor=1)
    assert both(batch((5, 6), (8, 3)), training=True)["inputs"].shape == (2, 3, 9, 7)
    out = both(batch((11, 6), (8, 13)), training=False)  # larger than the training size, and not padded to it
    assert out["inputs"].shape == (2, 3, 11, 13)
    assert [s.img_shape for s in out["data_samples"]] == [(11, 6), (8, 13)]
    with pytest.raises(ValueError, match="size is 9x7, but the pipeline delivered 11x6"):
        both(batch((11, 6)), training=True)


def test_bgr_turns_the_channels_before_it_normalises():
    red = torch.tensor([200, 100, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 2, 2)
    out = SegPreprocessor(mean=[1, 2, 3], std=[1, 1, 2], size_divisor=1, bgr=True)({"inputs": [red]})
    assert out["inputs"][0, :, 0, 0].tolist() == [29, 98, 98.5]


def test_a_size_is_needed():
    with pytest.raises(ValueError, match=r"give size=\(H, W\) of the batches, or size_divisor, or both"):
        preprocessor()
