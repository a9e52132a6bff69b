"""DeepLabv3's atrous spatial pyramid pooling on the coarsest map (arXiv:1706.05587), as mmsegmentation's ``ASPPHead``.

The dilations are those for a map of stride 8; a map smaller than a dilation leaves only the centre tap of that branch.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from densepred.decoders.fcn import conv3x3
from densepred.decoders.pooling import PooledConv
from densepred.registry import MODELS
from densepred.structures import Features


def atrous(in_channels: int, channels: int, dilation: int) -> ConvModule:
    """Return a 3x3 convolution of that dilation with BatchNorm and ReLU; dilation 1 stands for a 1x1 convolution."""
    kernel, padding = (1, 0) if dilation == 1 else (3, dilation)
    return ConvModule(in_channels, channels, kernel, padding=padding, dilation=dilation, norm_cfg=dict(type="BN"))


@MODELS.register_module()
class ASPPDecoder(nn.Module):
    """Image pooling and dilated convolutions side by side on the encoder's last map, mixed by a 3x3 convolution.

    Args:
        in_channels: channels of the encoder's maps, finest first; only the last map is read.
        in_strides: their strides.
        channels: of every branch and of the result.
        dilations: one a branch; 1 is a 1x1 convolution.
        align_corners: of the image pooling's resize. Spreading one pixel is the same either way.

    Attributes:
        channels: of ``Features.pixels``, at the size of the last map.
        level_channels: empty.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: int = 512,
        dilations: Sequence[int] = (1, 12, 24, 36),
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.level_channels = channels, []
        self.image_pool = PooledConv(in_channels[-1], channels, 1, align_corners)
        self.aspp_modules = nn.ModuleList(atrous(in_channels[-1], channels, dilation) for dilation in dilations)
        self.bottleneck = conv3x3((1 + len(dilations)) * channels, channels)

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first.

        Raises:
            ValueError: training with one image, see `densepred.decoders.pooling.require_batch`.
        """
        branches = [self.image_pool(maps[-1]), *(branch(maps[-1]) for branch in self.aspp_modules)]
        pixels = self.bottleneck(torch.cat(branches, dim=1))  # (B, channels, h, w)
        return Features(pixels=pixels, levels=[], encoder=maps)
