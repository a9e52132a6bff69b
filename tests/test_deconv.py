"""The decoder of transposed convolutions: its names, its start, its sizes."""

import pytest
import torch
import torch.nn.functional as F

from densepred.decoders.deconv import DeconvDecoder, bilinear_upsampling
from densepred.ops.modulated_deform_conv2d import ModulatedDeformConv2d
from tests.plain_decoders import filled, maps

CHANNELS, STRIDES = [6, 8, 10, 12], [4, 8, 16, 32]


def test_names_and_shapes_of_the_published_decoder():
    """The keys of ResNet-DCN's ``deconv_layers``; two of six layers have no parameters."""
    decoder = DeconvDecoder([64, 128, 256, 512], STRIDES)
    shapes = {key: tuple(value.shape) for key, value in decoder.state_dict().items()}
    for i, (before, width) in enumerate([(512, 256), (256, 128), (128, 64)]):
        expected = {
            f"layers.{6 * i}.weight": (width, before, 3, 3),
            f"layers.{6 * i}.bias": (width,),
            f"layers.{6 * i}.conv_offset_mask.weight": (27, before, 3, 3),
            f"layers.{6 * i}.conv_offset_mask.bias": (27,),
            f"layers.{6 * i + 3}.weight": (width, width, 4, 4),
        }
        for norm in (6 * i + 1, 6 * i + 4):
            expected |= {f"layers.{norm}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")}
            expected[f"layers.{norm}.num_batches_tracked"] = ()
        assert {key: shapes.pop(key) for key in expected} == expected
    assert not shapes


@pytest.mark.parametrize("deformable", [True, False])
def test_equals_the_plain_form(deformable):
    decoder = filled(DeconvDecoder(CHANNELS, STRIDES, widths=(7, 5), deformable=deformable))
    pyramid = maps(CHANNELS, [(12, 20), (6, 10), (3, 5), (2, 3)])
    features = decoder(pyramid)
    state, y = decoder.state_dict(), pyramid[-1]
    for i in (0, 6):
        if deformable:
            conv = ModulatedDeformConv2d(y.shape[1], len(state[f"layers.{i}.weight"])).double()
            conv.load_state_dict({k: state[f"layers.{i}.{k}"] for k in conv.state_dict()})
            y = conv(y)
        else:
            y = F.conv2d(y, state[f"layers.{i}.weight"], padding=1)
        for norm in (i + 1, i + 4):
            if norm == i + 4:
                y = F.conv_transpose2d(y, state[f"layers.{i + 3}.weight"], stride=2, padding=1)
            y = F.relu(
                F.batch_norm(
                    y, *(state[f"layers.{norm}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
                )
            )
    torch.testing.assert_close(features.pixels, y, rtol=0, atol=1e-12)
    assert features.pixels.shape == (len(y), decoder.channels, 8, 12)
    assert features.levels == decoder.level_channels == []
    assert features.encoder is pyramid


def test_transposed_convolutions_start_bilinear():
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = bilinear_upsampling(3)(x)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear")
    inner = (..., slice(1, -1), slice(1, -1))  # at the border the missing neighbours count as zero
    assert found.shape == expected.shape
    torch.testing.assert_close(found[inner], expected[inner], rtol=0, atol=1e-6)


@pytest.mark.parametrize("widths", [(), (8, 8, 8)])
def test_refuses_what_it_cannot_double(widths):
    with pytest.raises(ValueError, match=rf"widths={widths}.*stride 20".replace("(", r"\(").replace(")", r"\)")):
        DeconvDecoder([6], [20], widths=widths)
