"""Semantic FPN's decoder against the plain form."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.decoders import FPNDecoder
from tests.plain_decoders import State, filled, keys_of_units, maps, resized, unit

PYRAMIDS = {
    "plain": ([4, 8, 16, 32], [(16, 24), (8, 12), (4, 6), (2, 3)]),
    "odd": ([4, 8, 16, 32], [(13, 9), (7, 5), (4, 3), (2, 2)]),
    "dilated": ([4, 8, 8, 8], [(13, 9), (7, 5), (7, 5), (7, 5)]),
    "one pixel": ([4, 8, 16, 32], [(3, 1), (2, 1), (1, 1), (1, 1)]),
    "from stride 2": ([2, 4, 8], [(25, 17), (13, 9), (7, 5)]),
}


def biased(state: State, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.conv.weight"]
    return F.conv2d(x, weight, state[f"{name}.conv.bias"], padding=weight.shape[-1] // 2)


def nearest(x: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = (torch.arange(new) * old // new for old, new in zip(x.shape[-2:], size, strict=True))
    return x[..., rows[:, None], columns]


def plain(state: State, pyramid: list[Tensor], doublings: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Return the pixels and the pyramid's maps, finest first."""
    tops = [biased(state, f"lateral_convs.{i}", x) for i, x in enumerate(pyramid)]
    for i in reversed(range(1, len(tops))):
        tops[i - 1] = tops[i - 1] + nearest(tops[i], tops[i - 1].shape[-2:])
    outs = [biased(state, f"fpn_convs.{i}", x) for i, x in enumerate(tops)]
    total = unit(state, "scale_heads.0.0", outs[0])
    height, width = total.shape[-2:]
    for i in range(1, len(outs)):
        x = outs[i]
        for step in range(doublings[i]):
            scale = 2 ** (doublings[i] - 1 - step)
            x = unit(state, f"scale_heads.{i}.{2 * step}", x)
            x = resized(x, ((height + scale - 1) // scale, (width + scale - 1) // scale), False)
        total = total + x
    return total, outs


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_decoder_equals_the_plain_form(kind):
    strides, sizes = PYRAMIDS[kind]
    channels = [4, 6, 8, 10][: len(sizes)]
    decoder = filled(FPNDecoder(channels, strides, pyramid_channels=7, channels=5))
    state, pyramid = decoder.state_dict(), maps(channels, sizes)
    read = [i for i, stride in enumerate(strides) if stride >= 4]
    doublings = [(strides[i] // strides[read[0]]).bit_length() - 1 for i in read]
    pixels, outs = plain(state, [pyramid[i] for i in read], doublings)

    features = decoder(pyramid)
    torch.testing.assert_close(features.pixels, pixels, rtol=0, atol=1e-12)
    assert features.encoder is pyramid
    assert decoder.level_channels == [x.shape[1] for x in features.levels]
    for found, expected in zip(features.levels, reversed(outs[1:]), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    units = [f"scale_heads.{i}.{2 * step}" for i, n in enumerate(doublings) for step in range(max(1, n))]
    plain_convolutions = [f"{kind}_convs.{i}.conv" for kind in ("lateral", "fpn") for i in range(len(read))]
    assert set(state) == keys_of_units(units) | {
        f"{name}.{part}" for name in plain_convolutions for part in ("weight", "bias")
    }


def test_every_parameter_learns():
    decoder = FPNDecoder([4, 6, 8, 10], [4, 8, 16, 32], pyramid_channels=8, channels=8)
    decoder([x.float() for x in maps([4, 6, 8, 10], PYRAMIDS["plain"][1])]).pixels.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in decoder.parameters())


def test_an_encoder_of_fine_maps_alone_is_refused():
    with pytest.raises(ValueError, match=r"strides are \[1, 2\]"):
        FPNDecoder([4, 6], [1, 2])
