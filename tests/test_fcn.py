"""FCN's decoder against the plain form, its names, and the published sizes of whole models."""

import pytest
import torch

from densepred.decoders import FCNDecoder
from densepred.engine.build import build_model
from tests.plain_decoders import filled, keys_of_units, maps, unit
from tests.small import CONFIGS

CHANNELS, STRIDES = [6, 8, 10, 12], [4, 8, 8, 8]


@pytest.mark.parametrize("num_convs", [1, 2, 3])
@pytest.mark.parametrize("concat_input", [True, False])
def test_equals_the_plain_form(num_convs, concat_input):
    decoder = filled(FCNDecoder(CHANNELS, STRIDES, channels=5, num_convs=num_convs, concat_input=concat_input))
    state = decoder.state_dict()
    names = [f"convs.{i}" for i in range(num_convs)] + ["conv_cat"] * concat_input
    assert set(state) == keys_of_units(names)

    pyramid = maps(CHANNELS, [(9, 7), (5, 4), (5, 4), (5, 4)])
    features = decoder(pyramid)
    y = pyramid[-1]
    for i in range(num_convs):
        y = unit(state, f"convs.{i}", y)
    if concat_input:
        y = unit(state, "conv_cat", torch.cat([pyramid[-1], y], 1))
    torch.testing.assert_close(features.pixels, y, rtol=0, atol=1e-12)
    assert features.pixels.shape[1] == decoder.channels == 5
    assert features.levels == decoder.level_channels == []
    assert features.encoder is pyramid


def test_refuses_to_have_no_convolution():
    with pytest.raises(ValueError, match="num_convs=0"):
        FCNDecoder(CHANNELS, STRIDES, num_convs=0)


@pytest.mark.parametrize(
    ("config", "millions", "auxiliary"),
    [
        ("fcn_r18_cityscapes", 12.82, 148_819),
        ("pspnet_r50_cityscapes", 48.98, 2_364_691),
        ("ccnet_r50_cityscapes", 49.83, 2_364_691),
        ("deeplabv3_mobilenet_v2_cityscapes", 18.60, 226_579),
        ("upernet_swin_t_ade20k", 59.94, 923_798),
        ("upernet_convnext_t_ade20k", 60.24, 923_798),
        ("segformer_mit_b0_ade20k", 3.75, 0),
        ("segformer_mit_b2_cityscapes", 24.73, 0),
    ],
)
def test_models_have_the_published_size(config, millions, auxiliary):
    """The published counts include the auxiliary head."""
    with torch.device("meta"):
        model = build_model(CONFIGS / f"{config}.py")
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    assert round(sum(sizes.values()) / 1e6, 2) == millions
    assert sum(n for name, n in sizes.items() if name.startswith("head.auxiliary")) == auxiliary
