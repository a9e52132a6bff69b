"""BiFormer (CVPR 2023, arXiv:2303.08810) for dense prediction, with the official parameter names but for one.

Official code: rayleizhu/BiFormer. In the first three stages a map is cut into S x S regions, and the tokens of a region
attend to those of the few regions that its mean query fits best (`ops.bilevel_routing_attention`); the last stage is
ordinary attention. Position comes from depthwise convolutions alone.

Kept because the published weights are trained with it: in the routed stages logits are scaled by the width of all heads
together, the linear layers have biases and the 5x5 convolution sees the values; in the last stage the scale is that of a
head, there is no bias and the convolution sees the attention's input. Maps are padded with zeros before the projection, so
padding has the biases as its queries, keys and values, counts in the regions' means, can be routed to and is attended to.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.encoders.convnext import drop_path
from densepred.errors import nearest
from densepred.ops.bilevel_routing_attention import bilevel_routing_attention, route_regions
from densepred.ops.precision import sum_dtype
from densepred.registry import MODELS, SCOPE

TOPK = (1, 4, 16)
"""Regions that each region attends to in the first three stages."""

HEAD_CHANNELS = 32
"""Of the first three stages."""

LAST_HEADS = 8
"""Attention heads of the last stage, of any width."""

POOLS = {
    "ada_avgpool": F.adaptive_avg_pool2d,
    "ada_maxpool": F.adaptive_max_pool2d,
    "avgpool": F.avg_pool2d,
    "maxpool": F.max_pool2d,
}
"""What makes a region's keys and values fewer: to a side (ada) or by a ratio."""


def depthwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to a map (B, H, W, C) -> the same."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def fit(x: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W, C) -> (B, height, width, C): zeros right and below, or a cut there."""
    if not torch.compiler.is_compiling() and (height, width) == x.shape[1:3]:  # not asked of sizes that stay free
        return x
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))


def to_regions(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, rows * h, columns * w, C) -> (B, rows * columns, h * w, C): regions and their tokens, row by row."""
    x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # (B, rows, h, columns, w, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def to_map(regions: Tensor, columns: int, width: int) -> Tensor:
    """(B, rows * columns, h * width, C) -> (B, rows * h, columns * width, C): the inverse of `to_regions`."""
    x = regions.unflatten(2, (-1, width)).unflatten(1, (-1, columns))  # (B, rows, columns, h, width, C)
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def attend_weighted(
    q: Tensor, k: Tensor, v: Tensor, regions: Tensor, weights: Tensor, heads: int, scale: float
) -> Tensor:
    """`bilevel_routing_attention` with the keys and values of a region's choice times ``weights`` (B, R, K)."""
    image = torch.arange(len(q), device=q.device)[:, None, None]
    chosen = (weights[..., None, None].to(x.dtype) * x[image, regions] for x in (k, v))  # (B, R, K, S, C) each
    k, v = (x.flatten(2, 3).flatten(0, 1)[:, None] for x in chosen)  # (B * R, 1, K * S, C)
    only = regions.new_zeros(len(k), 1, 1)
    return bilevel_routing_attention(q.flatten(0, 1)[:, None], k, v, only, heads, scale).view(*q.shape[:3], -1)


class BiLevelRoutingAttention(nn.Module):
    """Attention of every region on the regions that it is routed to, plus a convolution: (B, H, W, C) -> the same.

    All published BiFormer-T, S and B leave the keyword arguments alone. Parameter names are the official ones, but for
    ``qkv`` (there ``qkv.qkv`` or ``qkv_linear``), ``wo`` (also ``output_linear``) and ``router`` (``router.emb``).

    Args:
        channels: C.
        heads: consecutive blocks of channels.
        regions_per_side: S; regions grow with the map.
        topk: regions that each region attends to.
        qk_channels: of queries and keys; None: C.
        kernel: side of the depthwise convolution of the values; 0 for none.
        project: a linear layer after the attention.
        floor_regions: the authors' later form (BiFormer-STL-nchw): regions of floor(H / S) x floor(W / S) tokens, more of
            them where that leaves a rest, and zeros in place of queries, keys and values that padding has none of.
        soft_routing: keys and values are weighted by the softmax of their regions' logits.
        diff_routing: those weights carry gradients.
        param_routing: a linear layer before the routing.
        kv_pool: None, or one of `POOLS` and its side or ratio, for the keys and values of each region.

    Raises:
        ValueError: options that exclude each other, in forward a map smaller than S x S with ``floor_regions``.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        regions_per_side: int,
        topk: int,
        *,
        qk_channels: int | None = None,
        kernel: int = 5,
        project: bool = True,
        floor_regions: bool = False,
        soft_routing: bool = False,
        diff_routing: bool = False,
        param_routing: bool = False,
        kv_pool: tuple[str, int] | None = None,
    ) -> None:
        super().__init__()
        if diff_routing > soft_routing or param_routing > diff_routing:
            raise ValueError(
                f"soft_routing={soft_routing}, diff_routing={diff_routing}, param_routing={param_routing}: gradients reach "
                "the routing through soft weights only; param_routing needs diff_routing, and that soft_routing"
            )
        if kv_pool is not None and kv_pool[0] not in POOLS:
            raise ValueError(f"kv_pool={tuple(kv_pool)}: unknown pooling{nearest(kv_pool[0], POOLS)}")
        self.qk_channels = qk_channels or channels
        self.heads, self.regions_per_side, self.topk = heads, regions_per_side, topk
        self.scale = self.qk_channels**-0.5  # of all heads together: what the published weights are trained with
        self.floor_regions, self.kv_pool = floor_regions, kv_pool
        self.soft_routing, self.diff_routing = soft_routing, diff_routing
        self.qkv = nn.Linear(channels, 2 * self.qk_channels + channels)
        self.wo = nn.Linear(channels, channels) if project else nn.Identity()
        self.lepe = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels) if kernel else None
        self.router = nn.Linear(self.qk_channels, self.qk_channels) if param_routing else None

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        counts, side = self.grid(height, width)
        padded = counts[0] * side[0], counts[1] * side[1]
        if self.floor_regions:
            parts = [fit(part, *padded) for part in self._project(x)]
            inside = to_regions(fit(x.new_ones(1, height, width, 1), *padded), *counts).sum(2)  # (1, R, 1)
        else:
            parts, inside = self._project(fit(x, *padded)), side[0] * side[1]
        q, k, v = (to_regions(part, *counts) for part in parts)  # (B, R, T, D or C)
        regions, weights = self.route(q, k, inside)
        k, v = (self._pooled(part, side) for part in (k, v))
        if weights is None:
            y = bilevel_routing_attention(q, k, v, regions, self.heads, self.scale)
        else:
            y = attend_weighted(q, k, v, regions, weights, self.heads, self.scale)
        y = to_map(y, counts[1], side[1])
        if self.lepe is not None:
            y = y + depthwise(self.lepe, parts[2])
        return self.wo(fit(y, height, width))

    def grid(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return how many regions a map has (rows, columns), and of how many tokens they are (height, width)."""
        count = self.regions_per_side
        if not self.floor_regions:
            return (count, count), (-(-height // count), -(-width // count))
        if min(height, width) < count:
            raise ValueError(
                f"a map of {height}x{width} tokens has no {count}x{count} regions: enlarge the image, or set "
                "floor_regions=False"
            )
        side = height // count, width // count
        return (-(-height // side[0]), -(-width // side[1])), side

    def route(self, q: Tensor, k: Tensor, inside: Tensor | int) -> tuple[Tensor, Tensor | None]:
        """Return the regions chosen (B, R, K) and, with ``soft_routing``, their weights (B, R, K).

        Args:
            q, k: (B, R, T, D).
            inside: over how many of its tokens a region's mean is taken.
        """
        if not self.diff_routing:
            q, k = q.detach(), k.detach()
        dtype = sum_dtype(q, k)
        means = [part.sum(2, dtype=dtype) / inside for part in (q, k)]  # (B, R, D)
        q, k = means if self.router is None else (self.router(mean.to(q.dtype)) for mean in means)
        regions = route_regions(q, k, self.topk)
        if not self.soft_routing:
            return regions, None
        return regions, (self.scale * q @ k.transpose(1, 2)).gather(2, regions).softmax(2)

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).split((self.qk_channels, self.qk_channels, x.shape[3]), dim=3)

    def _pooled(self, regions: Tensor, side: Sequence[int]) -> Tensor:
        if self.kv_pool is None:
            return regions
        name, size = self.kv_pool
        maps = regions.unflatten(2, side).flatten(0, 1).permute(0, 3, 1, 2)  # (B * R, C, h, w)
        return POOLS[name](maps, size).flatten(2).transpose(1, 2).unflatten(0, regions.shape[:2])


class Attention(nn.Module):
    """Attention of all tokens on all, plus a depthwise convolution of the input: (B, H, W, C) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)
        self.lepe = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, LAST_HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H * W, D)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.proj(y + depthwise(self.lepe, x))


class Block(nn.Module):
    """Depthwise 3x3, attention and MLP, each with a residual: (B, H, W, C) -> the same."""

    def __init__(self, channels: int, attn: nn.Module, drop_path_rate: float) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm1 = nn.LayerNorm(channels, 1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(channels, 1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 3 * channels),
            nn.Identity(),  # keeps the official names
            nn.GELU(),
            nn.Linear(3 * channels, channels),
        )
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        rate = self.drop_path_rate if self.training else 0
        x = x + depthwise(self.pos_embed, x)
        x = x + drop_path(self.attn(self.norm1(x)), rate)
        return x + drop_path(self.mlp(self.norm2(x)), rate)


def halving(in_channels: int, channels: int) -> list[nn.Module]:
    """Return a 3x3 convolution of stride 2, which makes ceil(n / 2) pixels of a side of n, and its norm."""
    return [nn.Conv2d(in_channels, channels, 3, stride=2, padding=1), nn.BatchNorm2d(channels)]


@MODELS.register_module()
class BiFormer(BaseModule):
    """BiFormer encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in that order.

    A side of n pixels becomes ceil(n / stride) map pixels, for any n. Maps lie in memory channels last.

    Published sizes (embed_dim, depths): T 64, 2-2-8-2; S 64, 4-4-18-4; B 96, 4-4-18-4.

    Routing is a hard choice, often by a margin of 1e-5; in half precision the choice is made in float32, of what was
    projected in half precision.

    Args:
        embed_dim: channels of the first stage, a multiple of 32; they double with each stage.
        depths: blocks of the four stages.
        regions_per_side: the first three stages cut their maps into this many regions a side, 4 or more; weights trained
            with another number fit: 7 (ImageNet, 224 pixels), 8 (ADE20K), 16 (COCO).
        drop_path_rate: of the last block; it grows linearly from 0 over all blocks.
        out_features: of "res2" (stride 4), "res3" (8), "res4" (16), "res5" (32); each has a LayerNorm of its own, and the
            next stage reads the map before it.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads official files.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: not four stages, channels that heads do not divide, too few regions, or an unknown feature name.
    """

    def __init__(
        self,
        embed_dim: int = 64,
        depths: Sequence[int] = (2, 2, 8, 2),
        regions_per_side: int = 8,
        drop_path_rate: float = 0.1,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        _check_sizes(embed_dim, depths, regions_per_side)
        dims = [embed_dim * 2**i for i in range(4)]
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        stem = [*halving(3, embed_dim // 2), nn.GELU(), *halving(embed_dim // 2, embed_dim)]
        self.downsample_layers, self.stages = nn.ModuleList([nn.Sequential(*stem)]), nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            if i:
                self.downsample_layers.append(nn.Sequential(*halving(dims[i - 1], dim)))
            blocks = []
            for _ in range(depth):
                routed = i < 3 and BiLevelRoutingAttention(dim, dim // HEAD_CHANNELS, regions_per_side, TOPK[i])
                blocks.append(Block(dim, routed or Attention(dim), rates.pop(0)))
            self.stages.append(nn.Sequential(*blocks))
        self._state_outputs(out_features, dims)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _state_outputs(self, out_features: Sequence[str], dims: Sequence[int]) -> None:
        names = [f"res{i + 2}" for i in range(4)]
        for name in out_features:
            if name not in names:
                raise ValueError(f"out_features: BiFormer has no map {name!r}{nearest(name, names)}")
        self.extra_norms = nn.ModuleDict(
            {str(i): nn.LayerNorm(dims[i], 1e-6) for i, name in enumerate(names) if name in out_features}
        )
        self.out_features = tuple(out_features)
        self.channels = [dims[names.index(name)] for name in out_features]
        self.strides = [4 * 2 ** names.index(name) for name in out_features]

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the first ``num_maps`` maps of ``out_features`` (all without it); what lies behind them is not computed."""
        maps, x, names = {}, images, self.out_features[:num_maps]
        for i, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            if maps.keys() >= set(names):
                break
            tokens = stage(downsample(x).permute(0, 2, 3, 1))  # (B, h, w, C)
            x = tokens.permute(0, 3, 1, 2)
            if f"res{i + 2}" in self.out_features:
                maps[f"res{i + 2}"] = self.extra_norms[str(i)](tokens).permute(0, 3, 1, 2)  # (B, C, h, w)
        return [maps[name] for name in names]


def _check_sizes(embed_dim: int, depths: Sequence[int], regions_per_side: int) -> None:
    if len(depths) != 4:
        raise ValueError(f"depths={tuple(depths)}: BiFormer has four stages")
    if embed_dim < 1 or embed_dim % HEAD_CHANNELS:
        raise ValueError(f"embed_dim={embed_dim}: a head has {HEAD_CHANNELS} channels, choose a multiple of that")
    if regions_per_side**2 < max(TOPK) or regions_per_side < 0:
        raise ValueError(
            f"regions_per_side={regions_per_side}: a region attends to {max(TOPK)} others, choose 4 or more a side"
        )


__all__ = ["BiFormer", "BiLevelRoutingAttention"]
