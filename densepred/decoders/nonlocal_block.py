"""The non-local block in an FCN head (arXiv:1711.07971), as mmsegmentation's ``NLHead``.

Every pixel of the map gathers from all others. The four forms of the pairwise function are the paper's; the block is
mmcv's, with two computed otherwise (same numbers): see `NonLocalBlock`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn import NonLocal2d
from torch import Tensor, nn

from densepred.decoders.fcn import conv3x3
from densepred.registry import MODELS
from densepred.structures import Features


class NonLocalBlock(NonLocal2d):
    """mmcv's non-local block; (B, C, H, W) -> the same shape, the identity when new.

    * ``embedded_gaussian`` is attention with one head, so it runs as such and the map of (HW)^2 weights is never stored.
    * ``concatenation``: mmcv copies both halves for every pair (C (HW)^2 numbers) and divides a ReLU's output in place,
      whose backward pass torch refuses. A sum over the two halves' projections needs neither.

    ``dot_product`` (which ignores ``use_scale``) and ``gaussian`` are mmcv's. Arguments: those of mmcv's class.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.mode != "embedded_gaussian":
            return super().forward(x)
        # Contiguous: attention's memory-saving forms want a pixel's channels side by side.
        query, key, value = (
            part(x).flatten(2).transpose(1, 2).contiguous()[:, None] for part in (self.theta, self.phi, self.g)
        )  # (B, 1, HW, C / reduction)
        scale = None if self.use_scale else 1.0  # None: 1 / sqrt(channels)
        y = F.scaled_dot_product_attention(query, key, value, scale=scale)
        return x + self.conv_out(y[:, 0].transpose(1, 2).unflatten(2, x.shape[-2:]))

    def concatenation(self, theta_x: Tensor, phi_x: Tensor) -> Tensor:
        """Return the pairwise weights (B, N, M) of queries (B, C, N, 1) and keys (B, C, 1, M)."""
        of_theta, of_phi = self.concat_project.conv.weight.chunk(2, dim=1)  # (1, C, 1, 1) each
        pairs = F.conv2d(theta_x, of_theta) + F.conv2d(phi_x, of_phi)  # (B, 1, N, M)
        return pairs[:, 0].relu() / phi_x.shape[-1]


@MODELS.register_module()
class NonLocalDecoder(nn.Module):
    """3x3 convolution, non-local block, 3x3 convolution, and one more that also sees the encoder's map again.

    Args:
        in_channels: channels of the encoder's maps, finest first; only the last map is read.
        in_strides: their strides.
        channels: of every convolution and of the block's map.
        reduction: the block works on ``channels // reduction`` channels.
        use_scale: divide the similarities of ``embedded_gaussian`` by the root of the channels; no other mode does.
        mode: ``embedded_gaussian``, ``dot_product``, ``gaussian`` or ``concatenation``. The latter three store a weight
            for every pair of pixels.

    Attributes:
        channels: of ``Features.pixels``, at the size of the last map.
        level_channels: empty.

    Raises:
        ValueError: an unknown ``mode``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: int = 512,
        reduction: int = 2,
        use_scale: bool = True,
        mode: str = "embedded_gaussian",
    ) -> None:
        super().__init__()
        self.channels, self.level_channels = channels, []
        self.convs = nn.Sequential(conv3x3(in_channels[-1], channels), conv3x3(channels, channels))
        self.nl_block = NonLocalBlock(
            channels, reduction=reduction, use_scale=use_scale, norm_cfg=dict(type="BN"), mode=mode
        )
        self.conv_cat = conv3x3(in_channels[-1] + channels, channels)

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first."""
        pixels = self.convs[1](self.nl_block(self.convs[0](maps[-1])))  # (B, channels, h, w)
        pixels = self.conv_cat(torch.cat([maps[-1], pixels], dim=1))
        return Features(pixels=pixels, levels=[], encoder=maps)
