"""DLA-34 ("Deep Layer Aggregation", CVPR 2018, arXiv:1707.06484) with the official parameter names.

Official code: ucbdrive/dla, taken over by xingyizhou/CenterNet (``pose_dla_dcn``). A stage is a binary tree of residual
blocks. The root of each smallest subtree, a 1x1 convolution, merges the outputs of its two blocks with whatever finished
before it on the way down.

The official network pools with ``floor`` and convolves with ``ceil``, and so takes sides only that are multiples of 32. Here
both round up: any side works, n pixels become ceil(n / stride), and multiples of 32 give the official numbers. Left out are
the projections ``level3.project`` and ``level4.project``, which the official code holds and computes but never reads.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.errors import nearest
from densepred.registry import MODELS, SCOPE

WIDTHS = (16, 32, 64, 128, 256, 512)
"""Channels of the six levels, whose strides are 1, 2, 4, .., 32."""

DEPTHS = (1, 1, 1, 2, 2, 1)
"""Convolutions of the first two levels, depths of the trees of the others."""


def conv_norm(in_channels: int, channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its BatchNorm."""
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(channels)]


def conv_level(in_channels: int, channels: int, kernel: int, stride: int) -> nn.Sequential:
    """Return a convolution with BatchNorm and ReLU; keys ``0.*``, ``1.*``."""
    return nn.Sequential(*conv_norm(in_channels, channels, kernel, stride), nn.ReLU(inplace=True))


class Block(nn.Module):
    """Two 3x3 convolutions and a sum with ``residual``, which the caller has brought to the same shape."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_channels, channels, 3, stride)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(y + residual, inplace=True)


class Root(nn.Module):
    """A 1x1 convolution over the maps of a finished subtree."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv, self.bn = conv_norm(in_channels, channels, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return F.relu(self.bn(self.conv(torch.cat(list(maps), dim=1))), inplace=True)


class Tree(nn.Module):
    """A binary tree of `Block`: (B, C, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride)).

    Args:
        depth: of the tree; it has ``2 ** depth`` blocks.
        in_channels, channels: of the map that comes in and of all others.
        stride: of its first block, 1 or 2.
        extra: channels of the maps that `forward` gets as ``finished``.
        level_root: the map that comes in, pooled, is merged by the last root too.
    """

    def __init__(
        self, depth: int, in_channels: int, channels: int, stride: int, extra: int = 0, level_root: bool = False
    ) -> None:
        super().__init__()
        self.level_root = level_root
        extra += in_channels if level_root else 0
        self.pool = nn.MaxPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
        if depth == 1:
            self.tree1 = Block(in_channels, channels, stride)
            self.tree2 = Block(channels, channels, 1)
            self.root = Root(2 * channels + extra, channels)
            changes = in_channels != channels
            self.project = nn.Sequential(*conv_norm(in_channels, channels, 1)) if changes else nn.Identity()
        else:
            self.tree1 = Tree(depth - 1, in_channels, channels, stride)
            self.tree2 = Tree(depth - 1, channels, channels, 1, extra + channels)
            self.root = None

    def forward(self, x: Tensor, finished: Sequence[Tensor] = ()) -> Tensor:
        pooled = self.pool(x)  # (B, C, ceil(H / stride), ceil(W / stride))
        finished = (*finished, pooled) if self.level_root else finished
        if self.root is None:
            left = self.tree1(x)
            return self.tree2(left, (*finished, left))
        left = self.tree1(x, self.project(pooled))
        return self.root((self.tree2(left, left), left, *finished))


@MODELS.register_module()
class DLA34(BaseModule):
    """DLA-34 encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in that order.

    A side of n pixels becomes ceil(n / stride) map pixels, for any n.

    Args:
        out_features: of "level0" (stride 1), "level1" (2), .., "level5" (32).
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads the official ImageNet file and timm's, and CenterNet's and
            CenterPoly's ``dla_34``.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: unknown feature name.
    """

    def __init__(
        self,
        out_features: Sequence[str] = ("level2", "level3", "level4", "level5"),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        names = {f"level{i}": i for i in range(len(WIDTHS))}
        for name in out_features:
            if name not in names:
                raise ValueError(f"out_features: DLA34 has no map {name!r}{nearest(name, names)}")
        self.out_features = tuple(out_features)
        self.channels = [WIDTHS[names[name]] for name in out_features]
        self.strides = [2 ** names[name] for name in out_features]
        self.base_layer = conv_level(3, WIDTHS[0], 7, 1)
        self.level0 = conv_level(WIDTHS[0], WIDTHS[0], 3, 1)
        self.level1 = conv_level(WIDTHS[0], WIDTHS[1], 3, 2)
        for i in range(2, len(WIDTHS)):
            tree = Tree(DEPTHS[i], WIDTHS[i - 1], WIDTHS[i], stride=2, level_root=i > 2)
            self.add_module(f"level{i}", tree)

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the first ``num_maps`` maps of ``out_features`` (all without it); what lies behind them is not computed."""
        x, maps, names = self.base_layer(images), {}, self.out_features[:num_maps]
        for i in range(len(WIDTHS)):
            if maps.keys() >= set(names):
                break
            x = maps[f"level{i}"] = getattr(self, f"level{i}")(x)
        return [maps[name] for name in names]
