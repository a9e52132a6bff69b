"""CCNet: recurrent criss-cross attention (ICCV 2019 and TPAMI 2020, arXiv:1811.11721).

Two applications of criss-cross attention let every pixel see every other one, at a cost of H + W keys a pixel instead of
H W. Numbers are those of github.com/speedinghzl/CCNet (commit 1fae6c6, negative_slope=0.01) and of mmsegmentation's
``CCHead`` (negative_slope=0.0), parameter names the latter's. Differences: any R works (the official training script
forgets to pass one and trains without attention), each application may have its own weights, and the embedding for the
category consistent loss is the paper's (section 3.4), for which the repository has no code.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from densepred.ops import criss_cross_attention
from densepred.registry import MODELS
from densepred.structures import Features


@MODELS.register_module()
class CrissCrossAttention(nn.Module):
    """A residual block in which every pixel attends to its row and its column; (B, C, H, W) -> (B, C, H, W).

    Fits into any encoder or decoder: its ``gamma`` starts at 0, so that a new block is the identity. One block applied R
    times is the paper's recurrent module.

    Args:
        in_channels: C. Queries and keys have an eighth of them, as published.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        compared = max(1, in_channels // 8)
        self.query_conv = nn.Conv2d(in_channels, compared, 1)
        self.key_conv = nn.Conv2d(in_channels, compared, 1)
        self.value_conv = nn.Conv2d(in_channels, in_channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        attended = criss_cross_attention(self.query_conv(x), self.key_conv(x), self.value_conv(x))
        return self.gamma.to(attended.dtype) * attended + x


@MODELS.register_module()
class CCNetDecoder(nn.Module):
    """Reduce the encoder's last map, let its pixels attend R times, and mix the result with the map.

    The published networks run it on an encoder dilated to stride 8.

    Args:
        in_channels: channels of the encoder's maps, finest first; only the last map is read.
        in_strides: their strides.
        channels: of the attention and of the result.
        recurrence: R, how often the attention is applied; 2 reaches every pixel.
        shared: one block for all applications (published) or one for each.
        negative_slope: of the leaky ReLU after each norm; 0.01 is the authors', 0.0 (a ReLU) mmsegmentation's.
        embedding_channels: of ``Features.embedding``, a 1x1 convolution of the attention's result, there in training
            mode only; 16 in the paper. None: no such convolution.

    Attributes:
        channels: of ``Features.pixels``, at the size of the last map.
        level_channels: empty.

    Raises:
        ValueError: ``recurrence`` below 1.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: int = 512,
        recurrence: int = 2,
        shared: bool = True,
        negative_slope: float = 0.01,
        embedding_channels: int | None = None,
    ) -> None:
        super().__init__()
        if recurrence < 1:
            raise ValueError(
                f"CCNetDecoder: recurrence={recurrence}; attention is applied at least once (FCNDecoder has none)"
            )
        self.channels, self.level_channels = channels, []
        self.recurrence, self.shared = recurrence, shared
        activation = dict(type="LeakyReLU", negative_slope=negative_slope) if negative_slope else dict(type="ReLU")

        def conv3x3(width: int) -> ConvModule:
            return ConvModule(width, channels, 3, padding=1, norm_cfg=dict(type="BN"), act_cfg=activation)

        self.convs = nn.ModuleList([conv3x3(in_channels[-1]), conv3x3(channels)])
        self.cca = (
            CrissCrossAttention(channels)
            if shared
            else nn.ModuleList(CrissCrossAttention(channels) for _ in range(recurrence))
        )
        self.conv_cat = conv3x3(in_channels[-1] + channels)
        self.embedding = nn.Conv2d(channels, embedding_channels, 1) if embedding_channels else None

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first."""
        pixels = self.convs[0](maps[-1])  # (B, channels, h, w)
        for block in [self.cca] * self.recurrence if self.shared else self.cca:
            pixels = block(pixels)
        embedding = self.embedding(pixels) if self.training and self.embedding is not None else None
        pixels = self.conv_cat(torch.cat([maps[-1], self.convs[1](pixels)], dim=1))
        return Features(pixels=pixels, levels=[], encoder=maps, embedding=embedding)
