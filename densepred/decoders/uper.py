"""UPerNet: pyramid pooling on the coarsest map and a feature pyramid down to the finest (arXiv:1807.10221).

Parameter names and arithmetic of mmsegmentation's ``UPerHead``, which Swin and ConvNeXt use too. Only its part for one
task; the paper's further heads (parts, materials, textures, scenes) are not here.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from densepred.decoders.fcn import conv3x3
from densepred.decoders.psp import PyramidPooling
from densepred.registry import MODELS
from densepred.structures import Features

NUM_MAPS = 4
"""Maps that are read, counted from the coarsest: of an encoder with a map at stride 2 that one stays outside."""


@MODELS.register_module()
class UPerDecoder(nn.Module):
    """Pyramid pooling, lateral sums from coarse to fine, and a 3x3 convolution over all of them at the finest size.

    Args:
        in_channels: channels of the encoder's maps, finest first; of more than four, the last four are read.
        in_strides: their strides.
        channels: of every part and of the result.
        pool_scales: bins along each axis of the pyramid pooling, one a branch.
        align_corners: of all resizes.

    Attributes:
        channels: of ``Features.pixels``, at the size of the finest map read.
        level_channels: of ``Features.levels``: the pyramid's maps without the finest, coarse to fine (strides 32, 16 and
            8 of a plain encoder).
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
        *finer, coarsest = in_channels[-NUM_MAPS:]
        self.channels, self.level_channels = channels, [channels] * len(finer)
        self.align_corners = align_corners
        self.psp_modules = PyramidPooling(coarsest, channels, pool_scales, align_corners)
        self.bottleneck = conv3x3(self.psp_modules.channels, channels)
        self.lateral_convs = nn.ModuleList(ConvModule(c, channels, 1, norm_cfg=dict(type="BN")) for c in finer)
        self.fpn_convs = nn.ModuleList(conv3x3(channels, channels) for _ in finer)
        self.fpn_bottleneck = conv3x3((len(finer) + 1) * channels, channels)

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first.

        Raises:
            ValueError: training with one image and a scale of 1, see `densepred.decoders.pooling.require_batch`.
        """
        *finer, coarsest = maps[-NUM_MAPS:]
        top = self.bottleneck(self.psp_modules(coarsest))  # (B, channels, h, w) of the coarsest map
        pyramid = [top]  # coarse to fine
        for lateral, fpn, x in zip(
            reversed(self.lateral_convs), reversed(self.fpn_convs), reversed(finer), strict=True
        ):
            top = lateral(x) + self._resize(top, x)  # (B, channels, h, w), the sums stay without their 3x3 convolution
            pyramid.append(fpn(top))
        finest = pyramid[-1]
        joined = torch.cat([self._resize(x, finest) for x in reversed(pyramid)], dim=1)  # (B, 4 channels, h, w)
        return Features(pixels=self.fpn_bottleneck(joined), levels=pyramid[:-1], encoder=maps)

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=self.align_corners)
