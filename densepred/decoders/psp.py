"""PSPNet's pyramid pooling on the coarsest map (arXiv:1612.01105), as mmsegmentation's ``PSPHead``.

What differs from the paper: every pooled branch has ``channels`` channels, not a quarter of the encoder's; for ResNet-50
and larger that is the same 512.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from densepred.decoders.fcn import conv3x3
from densepred.decoders.pooling import PooledConv
from densepred.registry import MODELS
from densepred.structures import Features


class PyramidPooling(nn.ModuleList):
    """One `PooledConv` a scale; their maps follow the input along the channels.

    Args:
        in_channels: of the map.
        channels: of every pooled branch.
        pool_scales: bins along each axis, one a branch.
        align_corners: of the resizes.

    Attributes:
        channels: of the result.
    """

    def __init__(self, in_channels: int, channels: int, pool_scales: Sequence[int], align_corners: bool) -> None:
        super().__init__(PooledConv(in_channels, channels, scale, align_corners) for scale in pool_scales)
        self.channels = in_channels + len(pool_scales) * channels

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, channels, H, W) of a map (B, in_channels, H, W)."""
        return torch.cat([x, *(branch(x) for branch in self)], dim=1)


@MODELS.register_module()
class PSPDecoder(nn.Module):
    """Pyramid pooling of the encoder's last map, mixed by a 3x3 convolution.

    Args:
        in_channels: channels of the encoder's maps, finest first; only the last map is read.
        in_strides: their strides.
        channels: of every pooled branch and of the result.
        pool_scales: bins along each axis, one a branch.
        align_corners: of the resizes; True in the published 769 x 769 recipes, whose head has it too.

    Attributes:
        channels: of ``Features.pixels``, at the size of the last map.
        level_channels: empty.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: int = 512,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.channels, self.level_channels = channels, []
        self.psp_modules = PyramidPooling(in_channels[-1], channels, pool_scales, align_corners)
        self.bottleneck = conv3x3(self.psp_modules.channels, channels)

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first.

        Raises:
            ValueError: training with one image and a scale of 1, see `densepred.decoders.pooling.require_batch`.
        """
        pixels = self.bottleneck(self.psp_modules(maps[-1]))  # (B, channels, h, w)
        return Features(pixels=pixels, levels=[], encoder=maps)
