"""PSP's decoder and the pooled branches against the plain form, and BatchNorm behind a pooling to one pixel."""

import pytest
import torch
from torch import nn

from densepred.decoders import ASPPDecoder, PSPDecoder, UPerDecoder
from densepred.decoders.pooling import PooledConv, require_batch
from tests.plain_decoders import filled, keys_of_units, maps, pooled_branch, psp

CHANNELS, STRIDES = [6, 8, 10, 12], [4, 8, 16, 32]


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(7, 11), (13, 6), (4, 1), (1, 1), (12, 12)])
def test_branch_pools_uneven_bins(align_corners, bins, size):
    branch = filled(PooledConv(4, 5, bins, align_corners))
    (x,) = maps([4], [size])
    expected = pooled_branch(
        {f"b.{key}": value for key, value in branch.state_dict().items()}, "b", x, bins, align_corners
    )
    torch.testing.assert_close(branch(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(7, 11), (97, 5), (1, 1)])
def test_decoder_equals_the_plain_form(align_corners, size):
    decoder = filled(PSPDecoder(CHANNELS, STRIDES, channels=5, align_corners=align_corners))
    state = decoder.state_dict()
    assert set(state) == keys_of_units([*(f"psp_modules.{i}.1" for i in range(4)), "bottleneck"])
    pyramid = maps(CHANNELS, [(2, 2)] * 3 + [size])
    features = decoder(pyramid)
    torch.testing.assert_close(features.pixels, psp(state, pyramid[-1], align_corners), rtol=0, atol=1e-12)
    assert features.levels == decoder.level_channels == []


def test_align_corners_matters():
    pyramid = maps(CHANNELS, [(2, 2)] * 3 + [(7, 11)])
    with_corners, without = (
        filled(PSPDecoder(CHANNELS, STRIDES, channels=5, align_corners=flag))(pyramid).pixels for flag in (True, False)
    )
    assert (with_corners - without).abs().max() > 1e-2


@pytest.mark.parametrize("decoder", [PSPDecoder, ASPPDecoder, UPerDecoder])
def test_training_on_one_image_names_the_cure(decoder):
    decoder = decoder(CHANNELS, STRIDES, channels=4)
    pyramid = [x.float() for x in maps(CHANNELS, [(9, 7), (5, 4), (3, 2), (2, 2)], batch=1)]
    with pytest.raises(ValueError, match=r"one image.*batch_size to 2 or more.*sync_bn"):
        decoder(pyramid)
    assert decoder.eval()(pyramid).pixels.isfinite().all()
    two = [torch.cat([x, -x]) for x in pyramid]
    assert decoder.train()(two).pixels.isfinite().all()


def test_only_a_norm_of_one_value_in_training_is_refused():
    one = torch.zeros(1, 3, 1, 1)
    require_batch(one, nn.BatchNorm2d(3).eval())
    require_batch(one, nn.GroupNorm(1, 3))
    require_batch(torch.zeros(1, 3, 1, 2), nn.BatchNorm2d(3))
    for norm in (nn.BatchNorm2d(3), nn.SyncBatchNorm(3)):  # synchronised over one process only: the same
        with pytest.raises(ValueError, match="a batch of one image"):
            require_batch(one, norm)


def test_synchronised_norm_of_several_processes_is_let_through(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    require_batch(torch.zeros(1, 3, 1, 1), nn.SyncBatchNorm(3))
    with pytest.raises(ValueError, match="a batch of one image"):
        require_batch(torch.zeros(1, 3, 1, 1), nn.BatchNorm2d(3))
