"""Stacked hourglass of CornerNet and CenterNet ("Objects as Points", arXiv:1904.07850), with the official parameter names.

Official code: xingyizhou/CenterNet (``large_hourglass``), which CenterPoly (KatiaJDL/CenterPoly-v2) takes over with one
stack instead of two. What differs from the hourglass of the pose paper (arXiv:1603.06937) is published so: no max pool (the
first residual block of a way down has stride 2), nearest upsampling, and sums instead of concatenations.

The official network takes sides only that are multiples of 128 (32 with the input at stride 4). Here any side works: on the way
down n pixels become ceil(n / 2), on the way up the doubled map is cut to the size of the one that it is added to. Where the
official network is defined nothing is cut, and the numbers are the same.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.registry import MODELS, SCOPE


def conv_unit(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with BatchNorm and ReLU; keys ``conv.*``, ``bn.*``."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True)))


def conv1x1(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Return a 1x1 convolution with BatchNorm; keys ``0.*``, ``1.*``."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class Residual(nn.Module):
    """Two 3x3 convolutions beside a skip: (B, C, H, W) -> (B, D, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        changes = stride != 1 or in_channels != channels
        self.skip = conv1x1(in_channels, channels, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(y + self.skip(x), inplace=True)


def residuals(*widths: int, stride: int = 1) -> nn.Sequential:
    """Return residual blocks between successive ``widths``, the first one with the stride."""
    strides = (stride, *[1] * (len(widths) - 2))
    return nn.Sequential(*(Residual(*args) for args in zip(widths[:-1], widths[1:], strides, strict=True)))


class Level(nn.Module):
    """One level of an hourglass and, inside, all that are coarser; keeps the size and the width of its map.

    Args:
        widths: channels of this level's maps and of each coarser level's.
        blocks: residual blocks of each of them; the last number is for the innermost maps.
    """

    def __init__(self, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        (width, inner, *coarser), count = widths, blocks[0]
        self.up1 = residuals(*[width] * (count + 1))
        self.low1 = residuals(width, *[inner] * count, stride=2)
        self.low2 = Level(widths[1:], blocks[1:]) if coarser else residuals(*[inner] * (blocks[1] + 1))
        self.low3 = residuals(*[inner] * count, width)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low3(self.low2(self.low1(x)))  # (B, C, ceil(H / 2), ceil(W / 2))
        height, width = x.shape[-2:]
        return self.up1(x) + F.interpolate(low, scale_factor=2, mode="nearest")[..., :height, :width]


@MODELS.register_module()
class Hourglass(BaseModule):
    """One or more hourglasses, each of which refines the map of the one before it, all at stride 4.

    ``forward(images (B, 3, H, W))`` returns a map (B, widths[0], ceil(H / 4), ceil(W / 4)) for each stack, the first stack's
    first. `StackedMaps` makes them a head's input.

    Args:
        num_stacks: 1 (CenterPoly, "small hourglass") or 2 (CenterNet).
        widths: channels at strides 4, 8, 16, .., the published ones by default. The stem has half of the first.
        blocks: residual blocks on each piece of the way at these strides.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads CenterPoly's and CenterNet's hourglasses; stacks that are
            in the file alone are left out.

    Attributes:
        channels, strides: of the returned maps.
        out_features: their names, ``stack0`` ...

    Raises:
        ValueError: no stack, fewer than two ``widths``, or not as many ``blocks``.
    """

    def __init__(
        self,
        num_stacks: int = 1,
        widths: Sequence[int] = (256, 256, 384, 384, 384, 512),
        blocks: Sequence[int] = (2, 2, 2, 2, 2, 4),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if num_stacks < 1:
            raise ValueError(f"num_stacks={num_stacks}: Hourglass needs at least 1")
        if len(widths) < 2 or len(blocks) != len(widths):
            raise ValueError(
                f"widths={tuple(widths)}, blocks={tuple(blocks)}: Hourglass needs two or more levels, and a number of each "
                "for every level"
            )
        width, between = widths[0], range(num_stacks - 1)
        self.channels, self.strides = [width] * num_stacks, [4] * num_stacks
        self.out_features = tuple(f"stack{i}" for i in range(num_stacks))
        self.pre = nn.Sequential(conv_unit(3, width // 2, 7, stride=2), Residual(width // 2, width, stride=2))
        self.kps = nn.ModuleList(Level(widths, blocks) for _ in range(num_stacks))
        self.cnvs = nn.ModuleList(conv_unit(width, width, 3) for _ in range(num_stacks))
        self.inters = nn.ModuleList(Residual(width, width) for _ in between)
        self.inters_ = nn.ModuleList(conv1x1(width, width) for _ in between)
        self.cnvs_ = nn.ModuleList(conv1x1(width, width) for _ in between)

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the maps of the first ``num_maps`` stacks (all without it); the others are not computed."""
        x, maps = self.pre(images), []  # (B, widths[0], H / 4, W / 4)
        for i in range(len(self.out_features[:num_maps])):
            if i > 0:
                merged = F.relu(self.inters_[i - 1](x) + self.cnvs_[i - 1](maps[-1]), inplace=True)
                x = self.inters[i - 1](merged)
            maps.append(self.cnvs[i](self.kps[i](x)))
        return maps
