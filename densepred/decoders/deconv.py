"""CenterNet's decoder of ResNets (arXiv:1904.07850, section 5; with deformable convolutions its "ResNet-DCN").

Three times: 3x3 convolution, transposed 4x4 convolution of stride 2, BatchNorm and ReLU behind each. Parameters lie in the
official order, ``layers.i`` being the official ``deconv_layers.i``.

The official initialisation writes the bilinear kernel to output channel 0 of the transposed convolutions, for every input
channel, and leaves the others random: meant for one group a channel, which they do not have. Here a transposed convolution
starts as what was meant, each channel upsampled bilinearly and none mixed.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from densepred.ops.modulated_deform_conv2d import ModulatedDeformConv2d
from densepred.registry import MODELS
from densepred.structures import Features


@MODELS.register_module()
class DeconvDecoder(nn.Module):
    """Double the encoder's last map once per width.

    Args:
        in_channels: channels of the encoder's maps, finest first; only the last map is read.
        in_strides: their strides.
        widths: channels of the convolutions; stride 32 becomes 4 with three.
        deformable: modulated deformable 3x3 convolutions, else plain ones without bias.

    Attributes:
        channels: of ``Features.pixels``, at the last map's size times 2 ** len(widths).
        level_channels: empty.

    Raises:
        ValueError: no widths, or more doublings than the last map's stride has factors of two.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        widths: Sequence[int] = (256, 128, 64),
        deformable: bool = True,
    ) -> None:
        super().__init__()
        if not widths or in_strides[-1] % 2 ** len(widths):
            raise ValueError(
                f"DeconvDecoder: widths={tuple(widths)} double a map of stride {in_strides[-1]} {len(widths)} times; give at "
                "least one width, and no more than the stride has factors of two"
            )
        layers = []
        for before, width in pairwise([in_channels[-1], *widths]):
            conv = ModulatedDeformConv2d(before, width) if deformable else nn.Conv2d(before, width, 3, 1, 1, bias=False)
            layers += [
                conv,
                nn.BatchNorm2d(width),
                nn.ReLU(),
                bilinear_upsampling(width),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        self.channels, self.level_channels = widths[-1], []

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first."""
        return Features(pixels=self.layers(maps[-1]), levels=[], encoder=maps)  # (B, channels, h, w)


def bilinear_upsampling(channels: int) -> nn.ConvTranspose2d:
    """Return a transposed 4x4 convolution that doubles maps, bilinearly until it is trained, without bias."""
    conv = nn.ConvTranspose2d(channels, channels, 4, 2, 1, bias=False)
    line = torch.tensor([0.25, 0.75, 0.75, 0.25])
    with torch.no_grad():
        conv.weight.copy_(torch.eye(channels)[:, :, None, None] * line[:, None] * line)
    return conv
