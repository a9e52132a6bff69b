"""EfficientNet-Lite at a finer output stride: the same weights see the same pixels, on more positions."""

import pytest
import torch

from densepred.encoders.efficientnet_lite import EfficientNetLite


@pytest.mark.parametrize("output_stride,strides", [(8, [2, 4, 8, 8, 8]), (16, [2, 4, 8, 16, 16])])
@torch.no_grad()
def test_every_other_position_is_the_undilated_map(output_stride, strides):
    torch.manual_seed(0)
    features = [f"res{i}" for i in range(1, 6)]
    plain = EfficientNetLite(out_features=features).double().eval()
    dilated = EfficientNetLite(out_features=features, output_stride=output_stride).double().eval()
    dilated.load_state_dict(plain.state_dict())
    assert dilated.strides == strides
    images = torch.randn(1, 3, 97, 129, dtype=torch.float64)  # 32 n + 1: the grids of all strides share their corners
    for coarse, fine, stride, name in zip(plain(images), dilated(images), plain.strides, features, strict=True):
        step = stride // min(stride, output_stride)
        assert fine.shape[-1] == (coarse.shape[-1] - 1) * step + 1, name
        assert (fine[..., ::step, ::step] - coarse).abs().max() <= 1e-12 * coarse.abs().max()


def test_another_output_stride_is_refused():
    with pytest.raises(ValueError, match="output_stride=4"):
        EfficientNetLite(output_stride=4)
