"""MiT, the Mix Transformer of SegFormer (arXiv:2105.15203), with mmsegmentation's parameter names.

Official code: NVlabs/SegFormer; mmsegmentation's port ``mit.py``. Per stage: an overlapping patch embedding, blocks of
attention whose keys and values come from a map that a strided convolution made smaller, and a feed-forward net with a 3x3
depthwise convolution in place of any position embedding. The normed map of a stage is handed on and feeds the next stage.

The two codes differ in the eps of two norms, see ``reduction_norm_eps``. Both break on a map smaller than the kernel of its
convolution; here zeros fill the kernel there.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.encoders.convnext import drop_path
from densepred.errors import nearest
from densepred.registry import MODELS, SCOPE

ARCHS = {
    "b0": (32, (2, 2, 2, 2)),
    "b1": (64, (2, 2, 2, 2)),
    "b2": (64, (3, 4, 6, 3)),
    "b3": (64, (3, 4, 18, 3)),
    "b4": (64, (3, 8, 27, 3)),
    "b5": (64, (3, 6, 40, 3)),
}
"""Channels of an attention head, and blocks of the four stages."""

HEADS = (1, 2, 5, 8)
"""Attention heads of the four stages."""

REDUCTIONS = (8, 4, 2, 1)
"""Side, in tokens, of what becomes one key and value in each stage."""


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), channels last in memory."""
    return tokens.transpose(1, 2).unflatten(2, size)


class PatchEmbed(nn.Module):
    """Overlapping patches become tokens: (B, I, H, W) -> (B, h * w, C) and (h, w), each side ceil(side / stride)."""

    def __init__(self, in_channels: int, channels: int, kernel: int, stride: int, norm_eps: float) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(channels, norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        x = self.projection(x)
        return self.norm(to_tokens(x)), x.shape[-2:]


class Attention(nn.Module):
    """Multi-head attention of queries (B, N, C) on a context (B, M, C), under PyTorch's names."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))  # query, key, value
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.trunc_normal_(self.in_proj_weight, std=0.02)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        channels = x.shape[-1]
        q = F.linear(x, self.in_proj_weight[:channels], self.in_proj_bias[:channels])
        k, v = F.linear(context, self.in_proj_weight[channels:], self.in_proj_bias[channels:]).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, N or M, D)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, N, C)


class EfficientAttention(nn.Module):
    """Attention of all tokens on those of a map ``reduction`` times smaller; what is left over at its edges is dropped."""

    def __init__(self, channels: int, heads: int, reduction: int, norm_eps: float) -> None:
        super().__init__()
        self.reduction = reduction
        self.attn = Attention(channels, heads)
        if reduction > 1:
            self.sr = nn.Conv2d(channels, channels, reduction, reduction)
            self.norm = nn.LayerNorm(channels, norm_eps)

    def forward(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        if self.reduction == 1:
            return self.attn(tokens, tokens)
        x = to_map(tokens, size)
        if min(size) < self.reduction:  # a map smaller than the kernel: zeros fill it
            x = F.pad(x, (0, max(self.reduction - size[1], 0), 0, max(self.reduction - size[0], 0)))
        return self.attn(tokens, self.norm(to_tokens(self.sr(x))))


class MixFFN(nn.Module):
    """1x1 convolution x4, depthwise 3x3, exact GELU, 1x1 convolution: (B, H * W, C) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
            nn.GELU(),
            nn.Identity(),  # where the published configs have a dropout of 0; keeps the names
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        return to_tokens(self.layers(to_map(tokens, size)))


class Block(nn.Module):
    """Attention and feed-forward net, each after a LayerNorm and with a residual: (B, H * W, C) -> the same."""

    def __init__(
        self, channels: int, heads: int, reduction: int, drop_path_rate: float, reduction_norm_eps: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, 1e-6)
        self.attn = EfficientAttention(channels, heads, reduction, reduction_norm_eps)
        self.norm2 = nn.LayerNorm(channels, 1e-6)
        self.ffn = MixFFN(channels)
        self.drop_path_rate = drop_path_rate

    def forward(self, tokens: Tensor, size: Sequence[int]) -> Tensor:
        rate = self.drop_path_rate if self.training else 0
        tokens = tokens + drop_path(self.attn(self.norm1(tokens), size), rate)
        return tokens + drop_path(self.ffn(self.norm2(tokens), size), rate)


@MODELS.register_module()
class MixVisionTransformer(BaseModule):
    """MiT encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in that order.

    A side of n pixels becomes ceil(n / stride) map pixels, for any n. Maps lie in memory channels last.

    Args:
        arch: "b0" to "b5".
        out_features: of "res2" (stride 4), "res3" (8), "res4" (16), "res5" (32).
        drop_path_rate: of the last block; it grows linearly from 0 over all blocks.
        reduction_norm_eps: of the norms after patch embeddings and after the reduction of keys and values:
            1e-6 in mmsegmentation, 1e-5 in NVIDIA's code; all other norms have 1e-6 in both.
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads NVIDIA's and mmsegmentation's files.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: unknown ``arch`` or feature name.
    """

    def __init__(
        self,
        arch: str = "b0",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        drop_path_rate: float = 0.1,
        reduction_norm_eps: float = 1e-6,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if arch not in ARCHS:
            raise ValueError(f"arch={arch!r}: MixVisionTransformer knows {', '.join(ARCHS)}")
        head_dim, depths = ARCHS[arch]
        rates = [drop_path_rate * i / (sum(depths) - 1) for i in range(sum(depths))]
        self.layers, dims = nn.ModuleList(), [head_dim * heads for heads in HEADS]
        before = 3
        for i, (dim, heads, reduction, depth) in enumerate(zip(dims, HEADS, REDUCTIONS, depths, strict=True)):
            embed = PatchEmbed(before, dim, *((3, 2) if i else (7, 4)), reduction_norm_eps)
            blocks = [Block(dim, heads, reduction, rates.pop(0), reduction_norm_eps) for _ in range(depth)]
            self.layers.append(nn.ModuleList([embed, nn.ModuleList(blocks), nn.LayerNorm(dim, 1e-6)]))
            before = dim
        for module in self.modules():
            _initialise(module)
        self._state_outputs(out_features, dims)

    def _state_outputs(self, out_features: Sequence[str], dims: Sequence[int]) -> None:
        names = [f"res{i + 2}" for i in range(4)]
        for name in out_features:
            if name not in names:
                raise ValueError(f"out_features: MixVisionTransformer has no map {name!r}{nearest(name, names)}")
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
        for i, stage in enumerate(self.layers):
            if maps.keys() >= set(names):
                break
            embed, blocks, norm = stage
            tokens, size = embed(x)  # (B, h * w, C)
            for block in blocks:
                tokens = block(tokens, size)
            x = maps[f"res{i + 2}"] = to_map(norm(tokens), size)  # (B, C, h, w)
        return [maps[name] for name in names]


def _initialise(module: nn.Module) -> None:
    """Start a layer as the official code does: linear layers at 0.02, convolutions by their fan-out, biases at 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.out_channels * math.prod(module.kernel_size) // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
    else:
        return
    nn.init.zeros_(module.bias)
