"""ASPP's decoder against the plain form, and DeepLabv3 on MobileNetV2 against mmsegmentation's numbers."""

import pytest
import torch

from densepred.decoders import ASPPDecoder
from tests import parity
from tests.mmsegmentation_case import check, converted, moved_logits, outputs_of
from tests.plain_decoders import filled, keys_of_units, maps, pooled_branch, unit

CHANNELS, STRIDES = [6, 8, 10, 12], [4, 8, 8, 8]
META, EXPECTED = parity.case(parity.CASES / "mmseg_deeplabv3_mobilenet_v2_d8")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(41, 7), (5, 11), (1, 1)])
def test_decoder_equals_the_plain_form(size, align_corners):
    dilations = (1, 2, 36)
    decoder = filled(ASPPDecoder(CHANNELS, STRIDES, channels=5, dilations=dilations, align_corners=align_corners))
    state = decoder.state_dict()
    assert set(state) == keys_of_units(["image_pool.1", *(f"aspp_modules.{i}" for i in range(3)), "bottleneck"])
    pyramid = maps(CHANNELS, [(2, 2)] * 3 + [size])
    x = pyramid[-1]
    branches = [pooled_branch(state, "image_pool", x, 1, align_corners)]
    branches += [unit(state, f"aspp_modules.{i}", x, dilation) for i, dilation in enumerate(dilations)]
    features = decoder(pyramid)
    torch.testing.assert_close(features.pixels, unit(state, "bottleneck", torch.cat(branches, 1)), rtol=0, atol=1e-12)
    assert features.levels == decoder.level_channels == []


def test_dilation_1_is_a_1x1_convolution():
    decoder = ASPPDecoder(CHANNELS, STRIDES, channels=4)
    kernels = [branch.conv.weight.shape[-1] for branch in decoder.aspp_modules]
    assert kernels == [1, 3, 3, 3]


@pytest.fixture(scope="module")
def model():
    return converted("deeplabv3_mobilenet_v2_cityscapes", META)


@pytest.fixture(scope="module")
def outputs(model):
    return outputs_of(model, META)


@pytest.mark.parametrize("name", META["outputs"])
def test_parity(outputs, name):
    check(outputs[name], META, EXPECTED, name)


def test_parity_tells_dilation_30_from_36(model, outputs):
    def narrower(decoder: ASPPDecoder) -> None:
        decoder.aspp_modules[3].conv.dilation = decoder.aspp_modules[3].conv.padding = (30, 30)

    assert moved_logits(model, outputs, narrower) == pytest.approx(0.094, abs=5e-4)  # as the published network's move
