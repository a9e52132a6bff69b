"""VWFormer's decoder: varying window attention at stride 8, low-level features at stride 4 (arXiv:2404.16573).

Official code: yan-hao-tian/VW, which holds five forms of it; `VARIANTS` lists what sets them apart. The three coarser maps
are fused at stride 8; every *ratio* R adds a branch in which each of 8 x 8 windows attends to a context R times as wide;
the branches, a short path and the mean of the map are mixed, resized to stride 4 and joined by 48 channels of the finest map.

What differs: a 1x1 convolution over concatenated maps is a sum of one convolution a map, and a convolution commutes with a
resize, so that nothing is concatenated and every convolution runs at the smaller size. Where 8 windows do not fit, the map
grows to the next multiple of 8 below and to the right by its last row and column, for contexts only: officially other sizes
are an error (and images are resized to multiples of 64). A side of 8 gives windows of one pixel, officially an error too.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from densepred.decoders.deformable import GROUPS, DeformablePixelDecoder, pointwise
from densepred.decoders.pooling import require_batch
from densepred.decoders.segformer import LinearProjection
from densepred.errors import nearest
from densepred.ops.varying_window_attention import varying_window_attention
from densepred.registry import MODELS
from densepred.structures import Features

NUM_MAPS = 4
"""Maps that are read, counted from the coarsest: of an encoder with a map at stride 2 that one stays outside."""
WINDOWS = 8
"""Windows along each axis, whatever the size of the map."""


@dataclass(frozen=True)
class Variant:
    """What sets the published decoders apart.

    Attributes:
        num_heads: of the attention.
        shortcut: every branch adds the fused map to its attention.
        image_pool: a branch with the mean of the fused map.
        nonlocal_form: the attention is four 1x1 convolutions, the last with a BatchNorm whose weight starts at 0; otherwise
            PyTorch's multi-head attention.
        linear: the encoder's maps pass a linear layer each; otherwise a 1x1 convolution, norm and ReLU.
        upsampling: of the two coarsest maps.
        mask_features: for a head with queries: GroupNorm, of which ONE object serves all layers with C channels, PyTorch's
            initialisation, and `mask_dim` channels at the end. Otherwise BatchNorm, and C channels at the end.
        levels: what a head with queries looks at: "none" (the encoder's last map), "projected" (a 1x1 convolution of the
            three coarser maps each), or "deformable" (these maps after six deformable layers, which the decoder reads too).
    """

    num_heads: int
    shortcut: bool
    image_pool: bool
    nonlocal_form: bool = False
    linear: bool = False
    upsampling: str = "nearest"
    mask_features: bool = False
    levels: str = "none"


VARIANTS = {
    "ade20k": Variant(1, shortcut=True, image_pool=True, nonlocal_form=True, linear=True, upsampling="bilinear"),
    "cityscapes": Variant(16, shortcut=False, image_pool=False),
    "maskformer": Variant(16, shortcut=True, image_pool=True, mask_features=True),
    "mask2former": Variant(16, shortcut=False, image_pool=True, mask_features=True, levels="projected"),
    "mask2former_deform": Variant(16, shortcut=False, image_pool=False, mask_features=True, levels="deformable"),
}
"""The official ``VWHead``, ``VWCityHead``, ``VWTransformerPixelDecoder`` (as for Swin-T), ``BasePixelDecoder`` and
``VWDeformAttnPixelDecoder``."""


def pad_to_windows(x: Tensor) -> Tensor:
    """Repeat the last row and column of (B, C, h, w) until both sides are multiples of `WINDOWS`."""
    below, right = (-length % WINDOWS for length in x.shape[-2:])
    return F.pad(x, (0, right, 0, below), mode="replicate") if below or right else x


def embed_patches(layer: ConvModule, x: Tensor) -> Tensor:
    """Convolve (B, C, h, w) by the R x R kernel of ``layer`` at every position, and apply its norm and activation.

    Zeros around the map, for even R one more below and right than above and left, keep its size.
    """
    (ratio, _), conv = layer.kernel_size, layer.conv
    y = F.conv2d(x, conv.weight, conv.bias, padding=ratio // 2)
    if ratio % 2 == 0:
        y = y[..., 1:, 1:]
    return layer.activate(layer.norm(y))


def fuse(layer: ConvModule, maps: Sequence[Tensor], size: torch.Size, upsampling: str = "bilinear") -> Tensor:
    """Return what a 1x1 convolution, norm and activation make of maps resized to ``size`` and concatenated.

    Args:
        layer: the three of them.
        maps: (B, C_i, h_i, w_i) each; one of a single pixel is spread.
        size: (h, w) of the result.
        upsampling: "bilinear" (corners not aligned) or "nearest".
    """
    options = dict(mode="bilinear", align_corners=False) if upsampling == "bilinear" else dict(mode="nearest")
    columns = layer.conv.weight.split([x.shape[1] for x in maps], dim=1)
    total = None
    for x, weight in zip(maps, columns, strict=True):
        part = pointwise(x, weight)
        if part.shape[-2:] not in (size, (1, 1)):
            part = F.interpolate(part, size=size, **options)
        total = part if total is None else total + part
    return layer.activate(layer.norm(total))


class NonLocalAttention(nn.Module):
    """Varying window attention between 1x1 convolutions: ``theta`` of the queries, ``phi`` keys, ``g`` values.

    ``conv_out`` has a BatchNorm, whose weight starts at 0, and no activation.

    Args:
        channels: C.
        num_heads: heads.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.theta, self.phi, self.g = (ConvModule(channels, channels, 1, act_cfg=None) for _ in range(3))
        self.conv_out = ConvModule(channels, channels, 1, norm_cfg=dict(type="BN"), act_cfg=None)
        nn.init.normal_(self.theta.conv.weight, std=0.01)
        nn.init.zeros_(self.conv_out.norm.weight)

    def forward(self, x: Tensor, context: Tensor, ratio: int) -> Tensor:
        """Return (B, C, h, w) for the map (B, C, h, w) and the padded context (B, C / R^2, H, W)."""
        query = pointwise(x, self.theta.conv.weight, self.theta.conv.bias)
        weight, bias = (torch.cat([getattr(p.conv, kind) for p in (self.phi, self.g)]) for kind in ("weight", "bias"))
        y = _attend(query, context, weight.flatten(1), bias, self.num_heads, ratio)
        return self.conv_out.norm(pointwise(y, self.conv_out.conv.weight))


class MultiheadAttention(nn.Module):
    """Varying window attention with the parameters of PyTorch's ``nn.MultiheadAttention``.

    Args:
        channels: C.
        num_heads: heads.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, context: Tensor, ratio: int) -> Tensor:
        """Return (B, C, h, w) for the map (B, C, h, w) and the padded context (B, C / R^2, H, W)."""
        channels = x.shape[1]
        sizes = [channels, 2 * channels]
        (q_weight, weight), (q_bias, bias) = (w.split(sizes) for w in (self.in_proj_weight, self.in_proj_bias))
        y = _attend(pointwise(x, q_weight[..., None, None], q_bias), context, weight, bias, self.num_heads, ratio)
        return pointwise(y, self.out_proj.weight[..., None, None], self.out_proj.bias)


def _attend(query: Tensor, context: Tensor, weight: Tensor, bias: Tensor, num_heads: int, ratio: int) -> Tensor:
    (height, width), (below, right) = query.shape[-2:], context.shape[-2:]
    if (height, width) == (below, right):
        return varying_window_attention(query, context, weight, bias, num_heads, (ratio, ratio))
    query = F.pad(query, (0, right - width, 0, below - height))
    y = varying_window_attention(query, context, weight, bias, num_heads, (ratio, ratio))
    return y[..., :height, :width]


@MODELS.register_module()
class VWFormerDecoder(nn.Module):
    """Fuse the coarser maps, attend at several scales, add the finest map.

    Args:
        in_channels: channels of the encoder's maps, finest first; of more than four, the last four are read.
        in_strides: their strides; ``mask2former_deform`` wants them to grow from map to map.
        variant: one of `VARIANTS`.
        channels: C, a multiple of 64 (of every ratio squared), of ``num_heads`` and with GroupNorm of 32.
        num_heads: of the attention; default: as the variant was published (MaskFormer with Swin-B: 8).
        shortcut: every branch adds the fused map; default: as published ("ade20k" with Swin-L: False, "maskformer" with
            Swin-S, B and L: False).
        ratios: one branch each.
        low_level_channels: that the finest map contributes.
        mask_dim: channels of the mask features, and of the levels, of the variants for heads with queries.

    Attributes:
        channels: of ``Features.pixels``, at the size of the finest map read.
        level_channels: of ``Features.levels``: three maps, coarse to fine, of the variants for Mask2Former, otherwise none.

    Raises:
        ValueError: an unknown variant, fewer than four maps, or channels that do not divide.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        variant: str = "ade20k",
        channels: int = 512,
        num_heads: int | None = None,
        shortcut: bool | None = None,
        ratios: Sequence[int] = (2, 4, 8),
        low_level_channels: int = 48,
        mask_dim: int = 256,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r}: unknown form of VWFormer's decoder{nearest(variant, VARIANTS)}")
        chosen = {"num_heads": num_heads, "shortcut": shortcut}
        self.variant = replace(VARIANTS[variant], **{k: v for k, v in chosen.items() if v is not None})
        self.ratios = tuple(ratios)
        _check(in_channels, channels, mask_dim, self.ratios, self.variant)
        queries = self.variant.levels != "none"
        self.channels = mask_dim if self.variant.mask_features else channels
        self.level_channels = [mask_dim] * 3 if queries else []
        finest, *coarser = in_channels[-NUM_MAPS:]
        if self.variant.levels == "deformable":
            self.deformable = DeformablePixelDecoder(
                in_channels[-NUM_MAPS:], in_strides[-NUM_MAPS:], embed_dim=mask_dim, mask_dim=None
            )
            coarser = [mask_dim] * 3
        elif self.variant.levels == "projected":
            self.proj = nn.ModuleList(self._layer(width, mask_dim) for width in coarser)
        for i, width in enumerate(coarser, start=2):
            self.add_module(f"linear_c{i}", self._projection(width, channels))
        self.linear_fuse = self._layer(3 * channels, channels)
        attention = NonLocalAttention if self.variant.nonlocal_form else MultiheadAttention
        self.attn = nn.ModuleList(attention(channels, self.variant.num_heads) for _ in self.ratios)
        self.ds = nn.ModuleList(
            self._layer(channels, channels // ratio**2, ratio, norm="BN", bias=self.variant.mask_features)
            for ratio in self.ratios
        )
        self.short_path = self._layer(channels, channels)
        if self.variant.image_pool:
            self.image_pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), self._layer(channels, channels))
        self.cat = self._layer((1 + self.variant.image_pool + len(self.ratios)) * channels, channels)
        self.linear_c1 = self._projection(finest, low_level_channels, norm="BN")
        self.low_level_fuse = self._layer(channels + low_level_channels, self.channels)
        if self.variant.mask_features:
            self._share_norm()

    def _layer(
        self, before: int, after: int, kernel: int = 1, norm: str | None = None, bias: bool = False
    ) -> ConvModule:
        norm = norm or ("GN" if self.variant.mask_features else "BN")
        norm_cfg = dict(type=norm, num_groups=GROUPS) if norm == "GN" else dict(type=norm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MMCV finds a bias before a norm unnecessary; published weights have it
            layer = ConvModule(before, after, kernel, bias=bias, norm_cfg=norm_cfg)
        if self.variant.mask_features:
            layer.conv.reset_parameters()
        return layer

    def _projection(self, before: int, after: int, norm: str | None = None) -> nn.Module:
        return LinearProjection(before, after) if self.variant.linear else self._layer(before, after, norm=norm)

    def _share_norm(self) -> None:
        layers = [self.linear_c4, self.linear_c3, self.linear_c2, self.linear_fuse, self.cat, self.short_path]
        for layer in [*layers, *([self.image_pool[1]] if self.variant.image_pool else [])]:
            layer.gn = self.linear_c4.gn

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first.

        Raises:
            ValueError: training with one image where its mean meets a BatchNorm, see
                `densepred.decoders.pooling.require_batch`.
        """
        finest, *coarser = maps[-NUM_MAPS:]
        levels = []
        if self.variant.levels == "projected":
            levels = [project(x) for project, x in zip(reversed(self.proj), reversed(coarser), strict=True)]
        elif self.variant.levels == "deformable":
            levels = self._deformed(maps[-NUM_MAPS:])
            coarser = levels[::-1]
        c2, c3, c4 = coarser
        projected = [self.linear_c4(c4), self.linear_c3(c3), self.linear_c2(c2)]
        x = fuse(self.linear_fuse, projected, c2.shape[-2:], self.variant.upsampling)  # (B, C, h, w)
        x = fuse(self.cat, self._branches(x), x.shape[-2:])
        pixels = fuse(self.low_level_fuse, [x, self.linear_c1(finest)], finest.shape[-2:])  # (B, channels, H, W)
        return Features(pixels=pixels, levels=levels, encoder=maps)

    def _deformed(self, maps: list[Tensor]) -> list[Tensor]:
        memory, context = self.deformable.start(maps)
        for i in range(self.deformable.num_layers):
            memory = self.deformable.step(i, memory, context)
        return context.split(memory)

    def _branches(self, x: Tensor) -> list[Tensor]:
        """Return the maps that ``cat`` mixes, (B, C, h, w) each, the pooled one (B, C, 1, 1)."""
        size = x.shape[-2:]
        branches = [fuse(self.short_path, [x], size)]
        if self.variant.image_pool:
            pool, conv = self.image_pool
            pooled = pool(x)  # (B, C, 1, 1)
            require_batch(pooled, conv.norm)
            branches.append(fuse(conv, [pooled], pooled.shape[-2:]))
        padded = pad_to_windows(x)
        for ratio, embed, attention in zip(self.ratios, self.ds, self.attn, strict=True):
            y = attention(x, embed_patches(embed, padded), ratio)
            branches.append(y + x if self.variant.shortcut else y)
        return branches


def _check(in_channels: Sequence[int], channels: int, mask_dim: int, ratios: tuple[int, ...], variant: Variant) -> None:
    if len(in_channels) < NUM_MAPS:
        raise ValueError(f"VWFormerDecoder needs four encoder maps, not {len(in_channels)}: check out_features")
    divisor = math.lcm(*(ratio**2 for ratio in ratios), variant.num_heads, GROUPS if variant.mask_features else 1)
    for name, value, factor in (
        ("channels", channels, divisor),
        ("mask_dim", mask_dim, GROUPS if variant.mask_features else 1),
    ):
        if value % factor:
            raise ValueError(
                f"VWFormerDecoder: {name}={value} must be a multiple of {factor}: of the ratios {ratios} squared, of "
                f"num_heads={variant.num_heads} and of a GroupNorm's groups"
            )


__all__ = ["VARIANTS", "MultiheadAttention", "NonLocalAttention", "VWFormerDecoder", "Variant"]
