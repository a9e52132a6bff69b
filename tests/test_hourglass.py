"""The stacked hourglass and the decoder that hands its maps on; published numbers: tests/test_centerpoly_parity.py."""

import pytest
import torch

from densepred.decoders import StackedMaps
from densepred.encoders import Hourglass
from densepred.encoders.hourglass import Level
from densepred.registry import MODELS

SMALL = dict(widths=(8, 8, 12), blocks=(1, 2, 1))
HEADS_OF_A_STACK = 4 * (256 * 256 * 9 + 256) + 257 * (8 + 32 + 1 + 2)
"""Parameters of the four published branches: 8 classes, 16 vertices, depth, offset."""


@pytest.mark.parametrize(("num_stacks", "expected"), [(1, 96_034_219), (2, 192_443_094)])
def test_published_number_of_parameters(num_stacks, expected):
    with torch.device("meta"):
        encoder = Hourglass(num_stacks)
    assert sum(p.numel() for p in encoder.parameters()) + num_stacks * HEADS_OF_A_STACK == expected


@pytest.mark.parametrize("size", [(128, 64), (75, 98), (5, 41)])
def test_any_side_gives_a_quarter_rounded_up(size):
    encoder = Hourglass(2, **SMALL).train()
    maps = encoder(torch.randn(2, 3, *size))
    assert encoder.channels == [8, 8] and encoder.strides == [4, 4] and encoder.out_features == ("stack0", "stack1")
    assert [x.shape for x in maps] == [(2, 8, *(-(-n // 4) for n in size))] * 2
    maps[1].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_a_level_adds_the_doubled_coarser_map():
    level = Level((4, 6), (1, 1)).eval()
    x = torch.randn(1, 4, 5, 6)
    low = level.low3(level.low2(level.low1(x)))
    assert low.shape == (1, 4, 3, 3)
    doubled = low.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :5]
    torch.testing.assert_close(level(x), level.up1(x) + doubled)


def test_later_stacks_refine_and_are_left_out_on_request():
    encoder = Hourglass(3, **SMALL).eval()
    images = torch.randn(1, 3, 32, 48)
    maps = encoder(images)
    assert len(maps) == 3 and not torch.equal(maps[0], maps[1])
    assert [torch.equal(a, b) for a, b in zip(encoder(images, num_maps=2), maps, strict=False)] == [True, True]
    encoder.kps[2] = encoder.cnvs[2] = None  # whatever calls them fails
    assert len(encoder(images, 2)) == 2
    with torch.no_grad():  # the second stack reads the stem's map and the first one's
        encoder.cnvs_[0][0].weight += 1
    assert torch.equal(encoder(images, 2)[0], maps[0]) and not torch.equal(encoder(images, 2)[1], maps[1])


def test_stacked_maps_hands_on_the_last_and_the_earlier_ones():
    decoder = MODELS.build(dict(type="StackedMaps", in_channels=[4, 5, 6], in_strides=[4, 4, 4]))
    assert (decoder.channels, decoder.deep_channels, decoder.level_channels) == (6, [4, 5], [])
    maps = [torch.zeros(1, c, 2, 2) for c in (4, 5, 6)]
    features = decoder(maps)
    assert features.pixels is maps[2] and features.deep[0] is maps[0] and features.deep[1] is maps[1]
    assert features.levels == [] and features.encoder is maps
    single = StackedMaps([7], [4])
    assert (single.channels, single.deep_channels) == (7, []) and single(maps[:1]).deep == []
    with pytest.raises(ValueError, match=r"strides \[4, 8\], but stacks have one"):
        StackedMaps([4, 5], [4, 8])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_stacks=0), "num_stacks=0"),
        (dict(widths=(8,), blocks=(1,)), r"widths=\(8,\)"),
        (dict(widths=(8, 8), blocks=(1, 1, 1)), r"blocks=\(1, 1, 1\)"),
    ],
)
def test_bad_numbers_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Hourglass(**options)
