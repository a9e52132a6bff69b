"""FCN's head as the semantic baselines have it: 3x3 convolutions on the coarsest map (arXiv:1411.4038).

Parameter names and arithmetic of mmsegmentation's ``FCNHead``. The published recipes run it on a dilated encoder, whose
coarsest map has stride 8.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from densepred.registry import MODELS
from densepred.structures import Features


def conv3x3(in_channels: int, channels: int) -> ConvModule:
    """Return a 3x3 convolution with BatchNorm and ReLU that keeps the map's size; keys ``conv.*``, ``bn.*``."""
    return ConvModule(in_channels, channels, 3, padding=1, norm_cfg=dict(type="BN"))


@MODELS.register_module()
class FCNDecoder(nn.Module):
    """3x3 convolutions on the encoder's last map, and one more that also sees that map again.

    Args:
        in_channels: channels of the encoder's maps, finest first; only the last map is read.
        in_strides: their strides.
        channels: of every convolution; 512 for ResNet-50 and larger, 128 for ResNet-18.
        num_convs: convolutions before the concatenation, at least 1.
        concat_input: concatenate the map and the convolutions' result, and mix them with ``conv_cat``.

    Attributes:
        channels: of ``Features.pixels``, at the size of the last map.
        level_channels: empty.

    Raises:
        ValueError: ``num_convs`` below 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: int = 512,
        num_convs: int = 2,
        concat_input: bool = True,
    ) -> None:
        super().__init__()
        if num_convs < 1:
            raise ValueError(f"FCNDecoder: num_convs={num_convs}; it needs at least 1")
        self.channels, self.level_channels = channels, []
        widths = [in_channels[-1]] + [channels] * num_convs
        self.convs = nn.Sequential(*(conv3x3(width, channels) for width in widths[:-1]))
        self.conv_cat = conv3x3(in_channels[-1] + channels, channels) if concat_input else None

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first."""
        pixels = self.convs(maps[-1])  # (B, channels, h, w)
        if self.conv_cat is not None:
            pixels = self.conv_cat(torch.cat([maps[-1], pixels], dim=1))
        return Features(pixels=pixels, levels=[], encoder=maps)
