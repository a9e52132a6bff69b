"""The encoder of the original UNet++ networks (arXiv:1807.10165, arXiv:1912.05074): plain blocks from stride 1.

Official code: MrGiovanni/UNetPlusPlus, which holds two networks of other blocks and another way down:

======  =================================================================  =========================
style   convolution (3x3, two a block)                                     from level to level
======  =================================================================  =========================
keras   bias, ReLU, dropout 0.5 (no switch there; the decoder has it too)  2x2 max pool
nnunet  bias, instance norm with weight and bias, LeakyReLU 0.01           stride 2 in the first one
======  =================================================================  =========================

`ConvBlock` is the decoder's too, and knows the block of segmentation_models_pytorch's decoder ("smp": no bias, BatchNorm,
ReLU) besides. Both ways down give ceil(n / 2) map pixels of n, where the official networks take sides only that divide by
the coarsest stride.
"""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.errors import nearest
from densepred.registry import MODELS, SCOPE

WIDTHS = {"keras": (32, 64, 128, 256, 512), "nnunet": (32, 64, 128, 256, 480, 480)}
"""Published widths of the levels; nnU-Net's double from 32 and stop at 480."""


class InstanceNorm(nn.InstanceNorm2d):
    """Instance norm with weight and bias that takes a map of one pixel: by the formula that pixel becomes the bias.

    PyTorch's own refuses such a map. A coarsest map of one pixel tells the rest of the network nothing about the image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        cudnn = torch.backends.cudnn.enabled
        return torch.instance_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, cudnn)


class ConvUnit(nn.Module):
    """A 3x3 convolution and what follows it in ``style``: (B, C, H, W) -> (B, D, ceil(H / stride), ceil(W / stride))."""

    def __init__(self, style: str, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=style != "smp")
        if style == "keras":
            self.norm, self.act, self.dropout = nn.Identity(), nn.ReLU(inplace=True), nn.Dropout(0.5)
        elif style == "nnunet":
            self.norm, self.act, self.dropout = InstanceNorm(out_channels), nn.LeakyReLU(0.01, True), nn.Identity()
        else:
            self.norm, self.act, self.dropout = nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True), nn.Identity()
        init_conv(self.conv, style)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.act(self.norm(self.conv(x))))


class ConvBlock(nn.Module):
    """The H of the papers: two convolutions, the first with the stride."""

    def __init__(self, style: str, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvUnit(style, in_channels, out_channels, stride)
        self.conv2 = ConvUnit(style, out_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


def init_conv(conv: nn.Conv2d | nn.ConvTranspose2d, style: str) -> None:
    """Fill a convolution as the code base of ``style`` does: He's distributions, but Glorot's for Keras's transposed ones."""
    if style == "smp":
        nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
    elif style == "nnunet":
        nn.init.kaiming_normal_(conv.weight, a=0.01)
    elif isinstance(conv, nn.ConvTranspose2d):
        nn.init.xavier_uniform_(conv.weight)
    else:  # Keras cuts its normal at two of the standard deviations that it is drawn with
        std = (2 / (conv.in_channels * 9)) ** 0.5
        nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


@MODELS.register_module()
class UNetEncoder(BaseModule):
    """Levels X^{0,0} .. X^{d,0} at strides 1, 2, 4, ..: ``forward(images (B, C, H, W))`` returns (B, widths[i], H/2^i, W/2^i).

    Any side works: n pixels become ceil(n / 2) a level.

    Args:
        style: "keras" (the networks of the papers) or "nnunet" (the official PyTorch one), see the module.
        widths: channels of the levels; by default those published, `WIDTHS`.
        image_channels: channels of the images.
        init_cfg: MMEngine weight initialisation.

    Attributes:
        channels, strides: of the maps.
        out_features: their names, ``level0`` ..; all levels are handed on.

    Raises:
        ValueError: unknown style, or no width.
    """

    def __init__(
        self,
        style: str = "keras",
        widths: Sequence[int] | None = None,
        image_channels: int = 3,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if style not in WIDTHS:
            raise ValueError(f"style={style!r}: UNetEncoder has no such style{nearest(style, WIDTHS)}")
        self.channels = list(WIDTHS[style] if widths is None else widths)
        if not self.channels:
            raise ValueError("widths=(): UNetEncoder needs a width a level, e.g. (32, 64, 128)")
        self.strides = [2**i for i in range(len(self.channels))]
        self.out_features = tuple(f"level{i}" for i in range(len(self.channels)))
        pooled = style == "keras"
        # Rounded up, as strided convolutions are: a last odd row counts, and a map never vanishes.
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if pooled else nn.Identity()
        for i, (before, width) in enumerate(zip([image_channels, *self.channels], self.channels, strict=False)):
            self.add_module(f"level{i}", ConvBlock(style, before, width, 1 if pooled or i == 0 else 2))

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the first ``num_maps`` levels (all without it); the others are not computed."""
        maps = [self.level0(images)]
        for name in self.out_features[1:num_maps]:
            maps.append(getattr(self, name)(self.pool(maps[-1])))  # (B, C, ceil(h / 2), ceil(w / 2))
        return maps
