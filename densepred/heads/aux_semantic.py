"""The auxiliary semantic heads that train kMaX-DeepLab's encoder; inference does without them.

Both read the encoder's raw maps. COCO and ADE20K use the DeepLabV3+ form (arXiv:1802.02611), Cityscapes the small one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.decoders.kmax import ConvBN, truncated_normal_

WIDTH = 256


def classifier(in_channels: int, out_channels: int, dims: int) -> nn.Module:
    """Return a 1x1 convolution with zero bias and weights of standard deviation 0.01."""
    conv = {1: nn.Conv1d, 2: nn.Conv2d}[dims](in_channels, out_channels, 1)
    truncated_normal_(conv.weight, 0.01)
    nn.init.zeros_(conv.bias)
    return conv


def depthwise_5x5(channels: int) -> ConvBN:
    """Return a 5x5 depthwise convolution with BatchNorm and GELU."""
    return ConvBN(channels, channels, 5, groups=channels, activate=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: 1x1, three dilated 3x3 and image pooling, joined by a 1x1."""

    def __init__(self, in_channels: int, rates: Sequence[int] = (6, 12, 18), dropout: float = 0.1) -> None:
        super().__init__()
        self.pointwise = ConvBN(in_channels, WIDTH, activate=True)
        self.dilated = nn.ModuleList(ConvBN(in_channels, WIDTH, 3, dilation=rate, activate=True) for rate in rates)
        self.pool = ConvBN(in_channels, WIDTH, activate=True)
        self.project = ConvBN((2 + len(rates)) * WIDTH, WIDTH, activate=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1 and not isinstance(self.pool.norm, nn.SyncBatchNorm):
            raise ValueError(
                "one image a process: BatchNorm behind the auxiliary head's image pooling has no batch to normalise; "
                "set train_dataloader.batch_size to 2 or more, or aux_semantic to 'stride32'"
            )
        pooled = self.pool(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[-2:])
        branches = [self.pointwise(x), *(conv(x) for conv in self.dilated), pooled]
        return self.dropout(self.project(torch.cat(branches, dim=1)))


class LowLevelFusion(nn.Module):
    """Enlarge a map to a finer one, concatenate that one's projection, and mix with 5x5 depthwise and 1x1."""

    def __init__(self, low_level_channels: int, projected_channels: int) -> None:
        super().__init__()
        self.project = ConvBN(low_level_channels, projected_channels, activate=True)
        self.depthwise = depthwise_5x5(WIDTH + projected_channels)
        self.pointwise = ConvBN(WIDTH + projected_channels, WIDTH, activate=True)

    def forward(self, x: Tensor, low_level: Tensor, align_corners: bool) -> Tensor:
        low_level = self.project(low_level)
        x = F.interpolate(x, size=low_level.shape[-2:], mode="bilinear", align_corners=align_corners)
        return self.pointwise(self.depthwise(torch.cat([x, low_level], dim=1)))


class DeepLabSemanticHead(nn.Module):
    """DeepLabV3+ on the maps at strides 32, 8 and 4, with C + 1 channels; the last one is never a target.

    Args:
        encoder_channels: of the encoder's maps, finest first; the fourth, third and first from the end are read.
        num_classes: C.
    """

    def __init__(self, encoder_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.aspp = ASPP(encoder_channels[-1])
        self.fuse_os8 = LowLevelFusion(encoder_channels[-3], 64)
        self.fuse_os4 = LowLevelFusion(encoder_channels[-4], 32)
        self.mix_depthwise = depthwise_5x5(WIDTH)
        self.mix_pointwise = ConvBN(WIDTH, WIDTH, activate=True)
        self.classifier = classifier(WIDTH, num_classes + 1, dims=2)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return logits (B, C + 1, H/4, W/4) from the encoder's maps, finest first."""
        # Both enlargements follow the parity of the stride-32 map's width.
        align_corners = bool(maps[-1].shape[-1] % 2)
        x = self.fuse_os8(self.aspp(maps[-1]), maps[-3], align_corners)
        x = self.fuse_os4(x, maps[-4], align_corners)
        return self.classifier(self.mix_pointwise(self.mix_depthwise(x)))


class CoarseSemanticHead(nn.Module):
    """5x5 depthwise and 1x1 on the stride-32 map, with C channels, at that map's size."""

    def __init__(self, encoder_channels: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels = encoder_channels[-1]
        self.layers = nn.Sequential(
            depthwise_5x5(channels),
            ConvBN(channels, WIDTH, activate=True),
            classifier(WIDTH, num_classes, dims=2),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return logits (B, C, H/32, W/32) from the encoder's maps, finest first."""
        return self.layers(maps[-1])


AUX_SEMANTIC_HEADS = {"deeplab": DeepLabSemanticHead, "stride32": CoarseSemanticHead}
"""By the name that a config's ``aux_semantic`` gives."""
