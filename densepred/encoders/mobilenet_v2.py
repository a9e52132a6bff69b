"""MobileNetV2 (Sandler et al., arXiv:1801.04381) with mmsegmentation's parameter names: ``conv1.conv.weight``,
``layer2.0.conv.1.bn.*``.

The classifier's 1x1 convolution to 1280 channels is left out. The dilated network of output stride 8
(``strides=(1, 2, 2, 1, 1, 1, 1), dilations=(1, 1, 1, 2, 2, 4, 4)``) dilates only the first block of each stage, as
mmsegmentation does.
"""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.errors import nearest
from densepred.registry import MODELS, SCOPE

STAGES = ((1, 16, 1), (6, 24, 2), (6, 32, 3), (6, 64, 4), (6, 96, 3), (6, 160, 3), (6, 320, 1))
"""Expansion, output channels and blocks of the stages (table 2 of the paper)."""

STEM_CHANNELS = 32
MAPS = ("conv1", *(f"layer{i}" for i in range(1, len(STAGES) + 1)))


def unit(in_channels: int, out_channels: int, kernel: int, linear: bool = False, **convolution: int) -> ConvModule:
    """Return a convolution without bias, its BatchNorm, and ReLU6 unless it is linear."""
    activation = None if linear else dict(type="ReLU6")
    norm = dict(type="BN")
    return ConvModule(in_channels, out_channels, kernel, norm_cfg=norm, act_cfg=activation, **convolution)


class InvertedResidual(nn.Module):
    """1x1 to ``expansion`` times the channels (none for 1), depthwise 3x3, linear 1x1; a shortcut where shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int, dilation: int) -> None:
        super().__init__()
        width = in_channels * expansion
        expand = [unit(in_channels, width, 1)] if expansion > 1 else []
        depthwise = unit(width, width, 3, stride=stride, padding=dilation, dilation=dilation, groups=width)
        self.conv = nn.Sequential(*expand, depthwise, unit(width, out_channels, 1, linear=True))
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


@MODELS.register_module()
class MobileNetV2(BaseModule):
    """MobileNetV2 encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in that order.

    A side of n pixels becomes ceil(n / stride) map pixels, for any n.

    Args:
        out_features: of "conv1" (stride 2) and "layer1" to "layer7" (2, 4, 8, 16, 16, 32, 32 by default); those of the
            default are mmsegmentation's.
        strides: of the first block of each of the seven stages.
        dilations: of the first depthwise convolution of each stage.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads torchvision and mmpretrain files.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: unknown feature name, or ``strides`` or ``dilations`` of another number than seven.
    """

    def __init__(
        self,
        out_features: Sequence[str] = ("layer2", "layer3", "layer5", "layer7"),
        strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
        dilations: Sequence[int] = (1, 1, 1, 1, 1, 1, 1),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        for name, values in (("strides", strides), ("dilations", dilations)):
            if len(values) != len(STAGES):
                raise ValueError(f"{name}={tuple(values)}: MobileNetV2 has seven stages and takes a number for each")
        for name in out_features:
            if name not in MAPS:
                raise ValueError(f"out_features: MobileNetV2 has no map {name!r}{nearest(name, MAPS)}")
        self.conv1 = unit(3, STEM_CHANNELS, 3, stride=2, padding=1)
        in_channels, total_stride = STEM_CHANNELS, 2
        channels, total_strides = {"conv1": in_channels}, {"conv1": total_stride}
        for i, (expansion, width, blocks) in enumerate(STAGES):
            stage = nn.Sequential()
            for stride, dilation in ((strides[i], dilations[i]), *[(1, 1)] * (blocks - 1)):
                stage.append(InvertedResidual(in_channels, width, stride, expansion, dilation))
                in_channels = width
            self.add_module(f"layer{i + 1}", stage)
            total_stride *= strides[i]
            channels[f"layer{i + 1}"], total_strides[f"layer{i + 1}"] = width, total_stride
        self.out_features = tuple(out_features)
        self.channels = [channels[name] for name in out_features]
        self.strides = [total_strides[name] for name in out_features]

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the first ``num_maps`` maps of ``out_features`` (all without it); what lies behind them is not computed."""
        if (
            images.device.type == "cpu" and images.dtype == torch.float32
        ):  # there a training step takes a fifth less time
            images = images.contiguous(memory_format=torch.channels_last)
        x, maps, names = images, {}, self.out_features[:num_maps]
        for name in MAPS:
            if maps.keys() >= set(names):
                break
            x = maps[name] = getattr(self, name)(x)
        return [maps[name] for name in names]
