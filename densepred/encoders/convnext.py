"""ConvNeXt ("A ConvNet for the 2020s", arXiv:2201.03545) with the official parameter names.

Official code: facebookresearch/ConvNeXt. ``kmax_padding`` is the change of kMaX-DeepLab (arXiv:2207.04044), which makes
a side of n pixels give ceil(n / stride) map pixels: zeros around the stem's input (1 left and top, 2 right and bottom)
and right and below each downsampling input, there before the LayerNorm, which turns them into its bias.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.errors import nearest
from densepred.registry import MODELS, SCOPE

ARCHS = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
    "xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048)),
}
"""Blocks and channels of the four stages."""


class LayerNorm(nn.LayerNorm):
    """LayerNorm of the axis ``axis``, never below float32: half precision is normalised in float32 and cast back."""

    def __init__(self, channels: int, axis: int = -1, eps: float = 1e-6) -> None:
        super().__init__(channels, eps)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        y, weight, bias = x.movedim(self.axis, -1), self.weight, self.bias  # (B, H, W, C)
        if x.dtype in (torch.float16, torch.bfloat16):
            y, weight, bias = y.float(), weight.float(), bias.float()
        y = F.layer_norm(y, self.normalized_shape, weight, bias, self.eps)
        return y.movedim(-1, self.axis).to(x.dtype)


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Zero whole samples of ``x`` (B, ...) with probability ``rate`` in [0, 1) and scale the others by 1 / (1 - rate)."""
    if rate == 0:
        return x
    kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - rate)  # (B, 1, ...)
    return x * kept / (1 - rate)


class Block(nn.Module):
    """Depthwise 7x7, LayerNorm, Linear x4, GELU, Linear, layer scale, residual: (B, C, H, W) -> the same."""

    def __init__(self, channels: int, drop_path_rate: float, layer_scale_init: float) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.norm = LayerNorm(channels)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale_init))
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))  # (B, H, W, C)
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        return x + drop_path(y.permute(0, 3, 1, 2), self.drop_path_rate if self.training else 0)  # (B, C, H, W)


@MODELS.register_module()
class ConvNeXt(BaseModule):
    """ConvNeXt encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in that order.

    Maps are raw stage outputs, without a norm of their own, unless ``output_norm`` asks for one.

    Args:
        arch: "tiny", "small", "base", "large" or "xlarge".
        out_features: of "stem" (before the first stage, stride 4), "res2" (4), "res3" (8), "res4" (16), "res5" (32).
        drop_path_rate: of the last block; it grows linearly from 0 over all blocks. kMaX-DeepLab on COCO: tiny 0.3,
            small 0.4, base 0.5, large 0.6.
        kmax_padding: pad as kMaX-DeepLab does, for sides of any size; without it sides are cut to a multiple of 32, those
            below 32 filled up with zeros.
        output_norm: a LayerNorm on each map handed on (``norm0`` to ``norm3``), as in mmsegmentation and in the authors'
            dense prediction; the next stage still takes the raw map. "stem" has none.
        layer_scale_init: start value of the layer scales; 1.0 in the recipes for semantic segmentation.
        downsample_norm_eps: of the LayerNorms before the three downsampling convolutions; 1e-5 in mmcls 0.25, which the
            published VWFormer weights come from, 1e-6 everywhere else.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads official, timm and mmpretrain files.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: unknown ``arch`` or feature name.
    """

    def __init__(
        self,
        arch: str = "tiny",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        drop_path_rate: float = 0.0,
        kmax_padding: bool = False,
        output_norm: bool = False,
        layer_scale_init: float = 1e-6,
        downsample_norm_eps: float = 1e-6,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if arch not in ARCHS:
            raise ValueError(f"arch={arch!r}: ConvNeXt knows {', '.join(ARCHS)}")
        blocks, dims = ARCHS[arch]
        rates = [drop_path_rate * i / (sum(blocks) - 1) for i in range(sum(blocks))]
        self.kmax_padding = kmax_padding
        self.downsample_layers = nn.ModuleList([nn.Sequential(nn.Conv2d(3, dims[0], 4, 4), LayerNorm(dims[0], axis=1))])
        for before, after in pairwise(dims):
            norm = LayerNorm(before, axis=1, eps=downsample_norm_eps)
            self.downsample_layers.append(nn.Sequential(norm, nn.Conv2d(before, after, 2, 2)))
        self.stages = nn.ModuleList()
        for count, dim in zip(blocks, dims, strict=True):
            self.stages.append(nn.Sequential(*[Block(dim, rates.pop(0), layer_scale_init) for _ in range(count)]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self._state_outputs(out_features, dims)
        self.output_norm = output_norm
        for i, dim in enumerate(dims):
            if output_norm and f"res{i + 2}" in out_features:
                self.add_module(f"norm{i}", LayerNorm(dim, axis=1))

    def _state_outputs(self, out_features: Sequence[str], dims: Sequence[int]) -> None:
        channels = {"stem": dims[0]} | {f"res{i + 2}": dim for i, dim in enumerate(dims)}
        strides = {"stem": 4, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
        for name in out_features:
            if name not in channels:
                raise ValueError(f"out_features: ConvNeXt has no map {name!r}{nearest(name, channels)}")
        self.out_features = tuple(out_features)
        self.channels = [channels[name] for name in out_features]
        self.strides = [strides[name] for name in out_features]

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the first ``num_maps`` maps of ``out_features`` (all without it); what lies behind them is not computed."""
        maps, names = {}, self.out_features[:num_maps]
        x = images if self.kmax_padding else _at_least(images, 32)
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            if maps.keys() >= set(names):
                break
            if self.kmax_padding:
                x = F.pad(x, (1, 2, 1, 2) if i == 0 else (0, 1, 0, 1))
            x = downsample(x)
            if i == 0:
                maps["stem"] = x
            x = stage(x)
            name = f"res{i + 2}"
            maps[name] = getattr(self, f"norm{i}")(x) if self.output_norm and name in names else x
        return [maps[name] for name in names]


def _at_least(images: Tensor, side: int) -> Tensor:
    """Fill images (B, C, H, W) up with zeros, right and below, where a side is shorter than ``side``."""
    height, width = images.shape[-2:]
    if min(height, width) >= side:
        return images
    return F.pad(images, (0, max(side - width, 0), 0, max(side - height, 0)))
