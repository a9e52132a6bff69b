"""UPerNet's decoder against the plain form, and on Swin-T against mmsegmentation's numbers."""

import pytest
import torch
from torch import Tensor

from densepred.decoders import UPerDecoder
from tests import parity
from tests.mmsegmentation_case import check, converted, moved_logits, outputs_of
from tests.plain_decoders import State, filled, keys_of_units, maps, psp, resized, unit

META, EXPECTED = parity.case(parity.CASES / "mmseg_upernet_swin_t_ade20k")
PYRAMIDS = {
    "plain": [(13, 9), (7, 5), (4, 3), (2, 2)],
    "dilated": [(13, 9), (7, 5), (7, 5), (7, 5)],
    "one pixel": [(3, 1), (2, 1), (1, 1), (1, 1)],
    "five maps": [(25, 17), (13, 9), (7, 5), (4, 3), (2, 2)],
    "two maps": [(7, 5), (4, 3)],
}


def plain(state: State, pyramid: list[Tensor], align_corners: bool) -> tuple[Tensor, list[Tensor]]:
    """Return the pixels and the pyramid's maps, finest first."""
    last = len(pyramid) - 1
    tops = [unit(state, f"lateral_convs.{i}", pyramid[i]) for i in range(last)] + [
        psp(state, pyramid[-1], align_corners)
    ]
    for i in range(last, 0, -1):
        tops[i - 1] = tops[i - 1] + resized(tops[i], tops[i - 1].shape[-2:], align_corners)
    outs = [unit(state, f"fpn_convs.{i}", tops[i]) for i in range(last)] + [tops[-1]]
    joined = torch.cat([resized(x, outs[0].shape[-2:], align_corners) for x in outs], 1)
    return unit(state, "fpn_bottleneck", joined), outs


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("kind", PYRAMIDS)
def test_decoder_equals_the_plain_form(kind, align_corners):
    sizes = PYRAMIDS[kind]
    channels = [4, 6, 8, 10, 12][: len(sizes)]
    decoder = filled(UPerDecoder(channels, [2] * len(sizes), channels=5, align_corners=align_corners))
    state, pyramid = decoder.state_dict(), maps(channels, sizes)
    pixels, outs = plain(state, pyramid[-4:], align_corners)

    features = decoder(pyramid)
    torch.testing.assert_close(features.pixels, pixels, rtol=0, atol=1e-12)
    assert features.encoder is pyramid
    assert decoder.level_channels == [x.shape[1] for x in features.levels]
    for found, expected in zip(features.levels, reversed(outs[1:]), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

    names = [f"psp_modules.{i}.1" for i in range(4)] + ["bottleneck", "fpn_bottleneck"]
    names += [f"{kind}_convs.{i}" for kind in ("lateral", "fpn") for i in range(len(outs) - 1)]
    assert set(state) == keys_of_units(names)


def test_every_parameter_learns():
    decoder = UPerDecoder([4, 6, 8, 10], [4, 8, 16, 32], channels=8)
    decoder([x.float() for x in maps([4, 6, 8, 10], PYRAMIDS["plain"])]).pixels.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in decoder.parameters())


@pytest.fixture(scope="module")
def model():
    return converted("upernet_swin_t_ade20k", META)


@pytest.fixture(scope="module")
def outputs(model):
    return outputs_of(model, META)


@pytest.mark.parametrize("name", META["outputs"])
def test_parity(outputs, name):
    check(outputs[name], META, EXPECTED, name)


def test_parity_tells_align_corners(model, outputs):
    def aligned(decoder: UPerDecoder) -> None:
        decoder.align_corners = True

    assert moved_logits(model, outputs, aligned) > 0.05
