"""Semantic FPN: a feature pyramid, every map of which is brought to the finest size and added (arXiv:1901.02446).

Parameter names and arithmetic of mmsegmentation's ``FPN`` neck and ``FPNHead``; with few channels it is the light decoder of
real-time models.
"""

import math
from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from densepred.decoders.fcn import conv3x3
from densepred.registry import MODELS
from densepred.structures import Features

FINEST_STRIDE = 4
"""Maps finer than this are not read."""


@MODELS.register_module()
class FPNDecoder(nn.Module):
    """Lateral sums from coarse to fine, then 3x3 convolutions that double each map's size until all can be added.

    Args:
        in_channels: channels of the encoder's maps, finest first; those of a stride below 4 are not read.
        in_strides: their strides.
        pyramid_channels: of the feature pyramid.
        channels: of the result.

    Attributes:
        channels: of ``Features.pixels``, at the size of the finest map read.
        level_channels: of ``Features.levels``: the pyramid's maps without the finest, coarse to fine.

    Raises:
        ValueError: the encoder has no map of stride 4 or more.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        pyramid_channels: int = 256,
        channels: int = 128,
    ) -> None:
        super().__init__()
        self.first = next((i for i, stride in enumerate(in_strides) if stride >= FINEST_STRIDE), None)
        if self.first is None:
            raise ValueError(
                f"FPNDecoder reads maps of stride {FINEST_STRIDE} or more; the encoder's strides are {list(in_strides)}: "
                "let it hand on coarser maps"
            )
        widths, strides = in_channels[self.first :], in_strides[self.first :]
        self.channels, self.level_channels = channels, [pyramid_channels] * (len(widths) - 1)
        self.lateral_convs = nn.ModuleList(ConvModule(c, pyramid_channels, 1, act_cfg=None) for c in widths)
        self.fpn_convs = nn.ModuleList(
            ConvModule(pyramid_channels, pyramid_channels, 3, padding=1, act_cfg=None) for _ in widths
        )
        self.scale_heads = nn.ModuleList(
            _doublings(pyramid_channels, channels, round(math.log2(stride / strides[0]))) for stride in strides
        )

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first."""
        tops = [lateral(x) for lateral, x in zip(self.lateral_convs, maps[self.first :], strict=True)]
        for i in range(len(tops) - 1, 0, -1):
            tops[i - 1] = tops[i - 1] + F.interpolate(tops[i], size=tops[i - 1].shape[-2:], mode="nearest")
        pyramid = [fpn(top) for fpn, top in zip(self.fpn_convs, tops, strict=True)]  # (B, pyramid_channels, h_i, w_i)
        size = pyramid[0].shape[-2:]
        pixels = self.scale_heads[0](pyramid[0])  # (B, channels, h, w)
        for head, x in zip(self.scale_heads[1:], pyramid[1:], strict=True):
            pixels = pixels + _enlarged(head, x, size)
        return Features(pixels=pixels, levels=pyramid[:0:-1], encoder=maps)


def _doublings(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
    """Return the convolutions of one map, at the odd places left out by mmsegmentation's names its upsampling layers."""
    layers: list[nn.Module] = []
    for i in range(max(1, doublings)):
        layers.append(conv3x3(channels if i else in_channels, channels))
        if doublings:
            layers.append(nn.Identity())  # holds the place of a resize, whose size only the input tells
    return nn.Sequential(*layers)


def _enlarged(head: nn.Sequential, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply the convolutions of a map, each followed by a bilinear resize to twice the size, the last to ``size``."""
    steps = len(head) // 2
    for left, convolution in zip(range(steps - 1, -1, -1), head[::2], strict=False):
        target = [-(-side // 2**left) for side in size]  # what a stride of 2**left makes of the finest size
        x = F.interpolate(convolution(x), size=target, mode="bilinear", align_corners=False)
    return x if steps else head(x)
