"""ResNet 18-152 ("Deep Residual Learning for Image Recognition", arXiv:1512.03385) with detectron2's parameter names.

``stem.conv1.weight``, ``stem.conv1.norm.*``, ``res2.0.conv1.weight``, ``res2.0.shortcut.norm.*``: the keys of detectron2
and of everything built on it (kMaX-DeepLab, Mask2Former), which therefore load without renaming.

The published families differ in the stem and in the place of the stride:

* torchvision (arithmetic of v1.5) and kMaX-DeepLab's PyTorch code: ``stem="7x7"``, stride in the 3x3 convolution.
  kMaX-DeepLab only changes the BatchNorm: ``norm_eps=1e-3, norm_momentum=0.01``. Its TensorFlow original has no max pool
  and hands on maps before the ReLU; those weights do not fit here.
* detectron2: the same two; its models trained from MSRA's Caffe weights have ``stride_in_1x1=True``.
* deep stem (detectron2's DeepLab, CCNet): ``stem="deep"``, three 3x3 convolutions of 64, 64 and 128 channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.errors import nearest
from densepred.registry import MODELS, SCOPE

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
"""Residual blocks of the four stages by depth; 18 and 34 are built of basic blocks, the others of bottlenecks."""

STEMS = {"7x7": ((3, 64, 7, 2),), "deep": ((3, 64, 3, 2), (64, 64, 3, 1), (64, 128, 3, 1))}
"""Convolutions of each stem: input channels, output channels, kernel, stride."""


FOLDED_WEIGHTS = 2**18
"""Up to this size a kernel takes a frozen norm into itself, which saves a pass over the map; a larger one is larger than the
maps it is for."""


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with fixed statistics, weight and bias: four buffers under BatchNorm's names, nothing to train."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return what a channel is multiplied by, and what is added then, both (C,)."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class ConvNorm(nn.Conv2d):
    """Convolution without bias that holds its BatchNorm as ``norm``, which gives the keys ``X.weight``, ``X.norm.*``."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, norm: dict) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        if norm["frozen"]:
            self.norm = FrozenBatchNorm2d(out_channels, norm["eps"])
        else:
            self.norm = nn.BatchNorm2d(out_channels, norm["eps"], norm["momentum"])
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.norm, FrozenBatchNorm2d) and self.weight.numel() <= FOLDED_WEIGHTS:
            scale, shift = self.norm.scale_and_shift()
            return self._conv_forward(x, self.weight * scale[:, None, None, None], shift)
        return self.norm(super().forward(x))


class Stem(nn.Module):
    """Convolutions, each with BatchNorm and ReLU, then a 3x3 max pool: (B, 3, H, W) -> (B, C, H/4, W/4)."""

    def __init__(self, kind: str, norm: dict) -> None:
        super().__init__()
        self.depth = len(STEMS[kind])
        for i, (in_channels, out_channels, kernel, stride) in enumerate(STEMS[kind], start=1):
            self.add_module(f"conv{i}", ConvNorm(in_channels, out_channels, kernel, stride, norm))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, self.depth + 1):
            x = F.relu(getattr(self, f"conv{i}")(x), inplace=True)
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, stride_in_1x1: bool, norm: dict) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, width, 3, stride, norm)
        self.conv2 = ConvNorm(width, width, 3, 1, norm)
        changes = stride != 1 or in_channels != width
        self.shortcut = ConvNorm(in_channels, width, 1, stride, norm) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x), inplace=True))
        return F.relu(y + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the stride sits in the 3x3, or in the first 1x1 on request."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, stride_in_1x1: bool, norm: dict) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        out_channels = width * self.expansion
        self.conv1 = ConvNorm(in_channels, width, 1, stride_1x1, norm)
        self.conv2 = ConvNorm(width, width, 3, stride_3x3, norm)
        self.conv3 = ConvNorm(width, out_channels, 1, 1, norm)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = ConvNorm(in_channels, out_channels, 1, stride, norm) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)), inplace=True)
        return F.relu(self.conv3(y) + self.shortcut(x), inplace=True)


@MODELS.register_module()
class ResNet(BaseModule):
    """ResNet encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in that order.

    Maps are taken after the last ReLU of a stage; a side of n pixels becomes ceil(n / stride) map pixels, for any n.

    Args:
        depth: 18, 34, 50, 101 or 152.
        out_features: of "stem" (after the max pool, stride 4), "res2" (4), "res3" (8), "res4" (16), "res5" (32).
        stem: "7x7" or "deep", see the head of this file.
        stride_in_1x1: bottlenecks stride in their first convolution (MSRA's Caffe weights).
        norm_eps, norm_momentum: of every BatchNorm; kMaX-DeepLab 1e-3 and 0.01, torchvision 1e-5 and 0.1.
        frozen_norm: no BatchNorm is ever trained or averages anything, as in Mask2Former on COCO: for pretrained weights.
        zero_init_residual: start the last BatchNorm of every block at 0, for training without pretrained weights.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads torchvision, timm and detectron2 files.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: unknown ``depth``, ``stem`` or feature name, or ``zero_init_residual`` with norms that stay frozen.
    """

    def __init__(
        self,
        depth: int = 50,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        stem: str = "7x7",
        stride_in_1x1: bool = False,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        frozen_norm: bool = False,
        zero_init_residual: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if depth not in BLOCKS:
            raise ValueError(f"depth={depth!r}: ResNet knows {', '.join(map(str, BLOCKS))}")
        if stem not in STEMS:
            raise ValueError(f"stem={stem!r}: ResNet knows {', '.join(STEMS)}")
        if frozen_norm and zero_init_residual:
            raise ValueError(
                "zero_init_residual=True with frozen_norm=True: blocks would stay zero; drop one of the two"
            )
        block = BasicBlock if depth < 50 else Bottleneck
        norm = dict(eps=norm_eps, momentum=norm_momentum, frozen=frozen_norm)
        self.stem = Stem(stem, norm)
        in_channels = STEMS[stem][-1][1]
        channels, strides = {"stem": in_channels}, {"stem": 4}
        for i, blocks in enumerate(BLOCKS[depth]):
            name, width = f"res{i + 2}", 64 * 2**i
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(block(in_channels, width, stride, stride_in_1x1, norm))
                in_channels = width * block.expansion
            self.add_module(name, stage)
            channels[name], strides[name] = in_channels, 4 * 2**i
        for name in out_features:
            if name not in channels:
                raise ValueError(f"out_features: ResNet has no map {name!r}{nearest(name, channels)}")
        self.out_features = tuple(out_features)
        self.channels = [channels[name] for name in out_features]
        self.strides = [strides[name] for name in out_features]
        if zero_init_residual:
            self._zero_last_norms()

    def _zero_last_norms(self) -> None:
        for module in self.modules():
            if isinstance(module, BasicBlock):
                nn.init.zeros_(module.conv2.norm.weight)
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.conv3.norm.weight)

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the first ``num_maps`` maps of ``out_features`` (all without it); what lies behind them is not computed."""
        if images.device.type == "cpu":  # where convolutions of this layout take a tenth less time
            images = images.contiguous(memory_format=torch.channels_last)
        maps = {"stem": self.stem(images)}  # (B, C, H/4, W/4)
        x, names = maps["stem"], self.out_features[:num_maps]
        for name in ("res2", "res3", "res4", "res5"):
            if maps.keys() >= set(names):
                break
            x = maps[name] = getattr(self, name)(x)
        return [maps[name] for name in names]
