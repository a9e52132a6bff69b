"""ResNet 18-152 ("Deep Residual Learning for Image Recognition", arXiv:1512.03385) with detectron2's parameter names.

``stem.conv1.weight``, ``stem.conv1.norm.*``, ``res2.0.conv1.weight``, ``res2.0.shortcut.norm.*``: the keys of detectron2
and of everything built on it (kMaX-DeepLab, Mask2Former), which therefore load without renaming.

The published families differ in the stem and in the place of the stride:

* torchvision (arithmetic of v1.5) and kMaX-DeepLab's PyTorch code: ``stem="7x7"``, stride in the 3x3 convolution.
  kMaX-DeepLab only changes the BatchNorm: ``norm_eps=1e-3, norm_momentum=0.01``. Its TensorFlow original has no max pool
  and hands on maps before the ReLU; those weights do not fit here.
* detectron2: the same two; its models trained from MSRA's Caffe weights have ``stride_in_1x1=True``.
* deep stem (detectron2's DeepLab, CCNet): ``stem="deep"``, three 3x3 convolutions of 64, 64 and 128 channels.
* mmsegmentation's V1c: ``stem="v1c"``, three 3x3 convolutions of 32, 32 and 64 channels.

Dilated networks of output stride 8 have ``strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)``. The first block of a dilated
stage takes half the dilation in mmsegmentation (``contract_dilation=True``) and all of it in CCNet, whose max pool also
rounds up (``ceil_mode=True``). Weights of either load into the other and then only cost accuracy.
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

STEMS = {
    "7x7": ((3, 64, 7, 2),),
    "deep": ((3, 64, 3, 2), (64, 64, 3, 1), (64, 128, 3, 1)),
    "v1c": ((3, 32, 3, 2), (32, 32, 3, 1), (32, 64, 3, 1)),
}
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

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, norm: dict, dilation: int = 1
    ) -> None:
        padding = kernel // 2 * dilation
        super().__init__(in_channels, out_channels, kernel, stride, padding, dilation, bias=False)
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

    def __init__(self, kind: str, ceil_mode: bool, norm: dict) -> None:
        super().__init__()
        self.depth, self.ceil_mode = len(STEMS[kind]), ceil_mode
        for i, (in_channels, out_channels, kernel, stride) in enumerate(STEMS[kind], start=1):
            self.add_module(f"conv{i}", ConvNorm(in_channels, out_channels, kernel, stride, norm))

    def convolutions(self, x: Tensor) -> Tensor:
        """Return what the max pool takes: (B, C, H/2, W/2)."""
        for i in range(1, self.depth + 1):
            x = F.relu(getattr(self, f"conv{i}")(x), inplace=True)
        return x

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, kernel_size=3, stride=2, padding=1, ceil_mode=self.ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.convolutions(x))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, the first with the stride and the dilation (the second is never dilated)."""

    expansion = 1

    def __init__(
        self, in_channels: int, width: int, stride: int, dilation: int, stride_in_1x1: bool, norm: dict
    ) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, width, 3, stride, norm, dilation)
        self.conv2 = ConvNorm(width, width, 3, 1, norm)
        changes = stride != 1 or in_channels != width
        self.shortcut = ConvNorm(in_channels, width, 1, stride, norm) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(x), inplace=True))
        return F.relu(y + self.shortcut(x), inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the dilation and the stride, which the first 1x1 has on request."""

    expansion = 4

    def __init__(
        self, in_channels: int, width: int, stride: int, dilation: int, stride_in_1x1: bool, norm: dict
    ) -> None:
        super().__init__()
        stride_1x1, stride_3x3 = (stride, 1) if stride_in_1x1 else (1, stride)
        out_channels = width * self.expansion
        self.conv1 = ConvNorm(in_channels, width, 1, stride_1x1, norm)
        self.conv2 = ConvNorm(width, width, 3, stride_3x3, norm, dilation)
        self.conv3 = ConvNorm(width, out_channels, 1, 1, norm)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = ConvNorm(in_channels, out_channels, 1, stride, norm) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(F.relu(self.conv1(x), inplace=True)), inplace=True)
        return F.relu(self.conv3(y) + self.shortcut(x), inplace=True)


@MODELS.register_module()
class ResNet(BaseModule):
    """ResNet encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in that order.

    Maps are taken after the last ReLU of a stage; a side of n pixels becomes ceil(n / stride) map pixels, for any n
    (with ``ceil_mode``, k / 2 + 1 instead of k / 2 pixels come out of the max pool for an even k, and the later stages divide
    that).

    Args:
        depth: 18, 34, 50, 101 or 152.
        out_features: of "conv1" (the stem before its max pool, stride 2), "stem" (after it, 4), "res2" (4), "res3" (8),
            "res4" (16), "res5" (32); the strides of the last three follow from ``strides``.
        stem: "7x7", "deep" or "v1c", see the head of this file.
        strides: of the first block of each stage; (1, 2, 1, 1) gives maps of strides 4, 8, 8, 8.
        dilations: of the 3x3 convolutions of each stage.
        contract_dilation: the first block of a dilated stage takes half of its dilation.
        ceil_mode: the max pool rounds up.
        stride_in_1x1: bottlenecks stride in their first convolution (MSRA's Caffe weights).
        norm_eps, norm_momentum: of every BatchNorm; kMaX-DeepLab 1e-3 and 0.01, torchvision 1e-5 and 0.1.
        frozen_norm: no BatchNorm is ever trained or averages anything, as in Mask2Former on COCO: for pretrained weights.
        zero_init_residual: start the last BatchNorm of every block at 0, for training without pretrained weights.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads torchvision, timm and detectron2 files.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: unknown ``depth``, ``stem`` or feature name, ``strides`` or ``dilations`` of another number than four,
            or ``zero_init_residual`` with norms that stay frozen.
    """

    def __init__(
        self,
        depth: int = 50,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        stem: str = "7x7",
        strides: Sequence[int] = (1, 2, 2, 2),
        dilations: Sequence[int] = (1, 1, 1, 1),
        contract_dilation: bool = False,
        ceil_mode: bool = False,
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
        for name, values in (("strides", strides), ("dilations", dilations)):
            if len(values) != 4:
                raise ValueError(f"{name}={tuple(values)}: ResNet has four stages and takes a number for each")
        if frozen_norm and zero_init_residual:
            raise ValueError(
                "zero_init_residual=True with frozen_norm=True: blocks would stay zero; drop one of the two"
            )
        block = BasicBlock if depth < 50 else Bottleneck
        norm = dict(eps=norm_eps, momentum=norm_momentum, frozen=frozen_norm)
        self.stem = Stem(stem, ceil_mode, norm)
        in_channels, total_stride = STEMS[stem][-1][1], 4
        channels, total_strides = dict.fromkeys(("conv1", "stem"), in_channels), {"conv1": 2, "stem": 4}
        for i, (blocks, stride, dilation) in enumerate(zip(BLOCKS[depth], strides, dilations, strict=True)):
            name, width = f"res{i + 2}", 64 * 2**i
            first = (stride, max(dilation // 2, 1) if contract_dilation else dilation)
            stage = nn.Sequential()
            for options in (first, *[(1, dilation)] * (blocks - 1)):
                stage.append(block(in_channels, width, *options, stride_in_1x1, norm))
                in_channels = width * block.expansion
            self.add_module(name, stage)
            total_stride *= stride
            channels[name], total_strides[name] = in_channels, total_stride
        for name in out_features:
            if name not in channels:
                raise ValueError(f"out_features: ResNet has no map {name!r}{nearest(name, channels)}")
        self.out_features = tuple(out_features)
        self.channels = [channels[name] for name in out_features]
        self.strides = [total_strides[name] for name in out_features]
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
        steps = {"conv1": self.stem.convolutions, "stem": self.stem.pool}
        steps |= {name: getattr(self, name) for name in ("res2", "res3", "res4", "res5")}
        x, maps, names = images, {}, self.out_features[:num_maps]
        for name, step in steps.items():
            if maps.keys() >= set(names):
                break
            x = maps[name] = step(x)
        return [maps[name] for name in names]
