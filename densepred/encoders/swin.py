"""Swin ("Swin Transformer", arXiv:2103.14030) for dense prediction, with the official parameter names, at any image size.

Official code: the dense-prediction form that Swin's detection and segmentation releases, Mask2Former and OneFormer share.
It differs from the classification model: the map is zero-padded to whole windows after the first norm of a block, windows
stay shifted where a map is smaller than a window, and each map handed on has a LayerNorm of its own.

Same numbers, other work: padding tokens are not projected (a zero token's projection is the bias); padding, shift and
cutting into windows are one copy of rows; a shifted block needs four masks however large the map is, for its windows are
of four kinds: inner, right edge, bottom edge, corner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from densepred.encoders.convnext import drop_path
from densepred.errors import nearest
from densepred.registry import MODELS, SCOPE

ROWS = 1024
"""Tokens that go through attention or an MLP at a time on a CPU without gradients: what fits into the cache."""


@dataclass(frozen=True)
class Windows:
    """Where the T = B * H * W tokens of a map lie among the P = n * B * N places of its n windows of N tokens.

    Windows are the first axis, sorted by kind, images the second. P - T places lie outside the map.

    Attributes:
        gather: (P,) token at each place, from 1; 0 at a place outside.
        order: (P,) the places outside, then the place of each token.
        kinds: (n,) kind of each window: 0 inner, 1 right edge, 2 bottom edge, 3 corner; all 0 without a shift.
        counts: windows of each kind that there can be.
    """

    gather: Tensor
    order: Tensor
    kinds: Tensor
    counts: tuple[int, ...]


def cut_windows(batch: int, height: int, width: int, window: int, shift: int, device: torch.device) -> Windows:
    """Windows of ``window`` x ``window`` tokens over ``batch`` maps padded right and below, moved by ``shift``."""
    rows, columns = -(-height // window), -(-width // window)
    token = torch.arange(batch * height * width, device=device).view(batch, height, width) + 1
    token = F.pad(token, (0, columns * window - width, 0, rows * window - height))
    token = token.roll((-shift, -shift), dims=(1, 2)).view(batch, rows, window, columns, window)
    token = token.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1)  # (n, B * N)
    kinds, counts = token.new_zeros(rows * columns), (rows * columns,)
    if shift:
        bottom, right = (torch.arange(n, device=device) == n - 1 for n in (rows, columns))
        kinds, windows = (2 * bottom[:, None] + 1 * right).flatten().sort(stable=True)
        token, counts = token[windows], ((rows - 1) * (columns - 1), rows - 1, columns - 1, 1)
    token = token.flatten()
    return Windows(token, token.argsort(stable=True), kinds, counts)


@lru_cache(maxsize=32)
def _remembered_windows(*key) -> Windows:
    with torch.inference_mode(False):  # tensors made in inference mode could not serve training later
        return cut_windows(*key)


def windows_of(x: Tensor, window: int, shift: int) -> Windows:
    """``cut_windows`` for a map (B, H, W, C), remembered where tensors have values."""
    key = (*x.shape[:3], window, shift, x.device)
    remember = type(x) is Tensor and not torch.compiler.is_compiling()
    return _remembered_windows(*key) if remember else cut_windows(*key)


class ToWindows(torch.autograd.Function):
    """Tokens (1 + T, C), the first one for places outside the map -> places (P, C).

    A function of its own because the gradient of indexing adds rows up one by one; this one reads them in token order.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, gather: Tensor, order: Tensor) -> Tensor:
        ctx.order = order.tensor_split([order.shape[0] - tokens.shape[0] + 1])
        return tokens.index_select(0, gather)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        outside, inside = (grad.index_select(0, places) for places in ctx.order)
        return torch.cat([outside.sum(0, keepdim=True), inside]), None, None


class FromWindows(torch.autograd.Function):
    """Places (P, C) -> the ``count`` tokens (T, C) of the map: the transpose of ToWindows."""

    @staticmethod
    def forward(ctx, places: Tensor, count: int, gather: Tensor, order: Tensor) -> Tensor:
        ctx.gather = gather
        return places.index_select(0, order[order.shape[0] - count :])

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return F.pad(grad, (0, 0, 1, 0)).index_select(0, ctx.gather), None, None, None


def shift_masks(window: int, shift: int) -> Tensor:
    """What is added to the logits of each kind of windows (4, N, N): -100 between tokens of different regions.

    A shift rolls the map's near side into its last row and column of windows, as their last ``shift`` rows or columns.
    Without a shift there is one kind, and nothing is added.
    """
    rolled = torch.arange(window) >= window - shift
    bottom, right = rolled[:, None].expand(window, window).flatten(), rolled.expand(window, window).flatten()
    region = torch.stack([0 * right, 1 * right, 2 * bottom, 2 * bottom + right][: 4 if shift else 1])  # (kinds, N)
    return (region[:, :, None] != region[:, None, :]) * -100.0


def relative_positions(window: int) -> Tensor:
    """Row of the bias table for each (query, key) of a window (N * N,): (2 * window - 1) * dy + dx, both from 0."""
    y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    dy, dx = (n.reshape(-1, 1) - n.reshape(1, -1) + window - 1 for n in (y, x))
    return ((2 * window - 1) * dy + dx).flatten()


def attend(qkv: Tensor, bias: Tensor) -> Tensor:
    """Attention in windows: qkv (n, B, N, 3, heads, D), bias (n or 1, 1, heads, N, N) of the logits -> (n * B * N, C).

    This form is for gradients: PyTorch's fused kernel takes no bias that wants one on a CPU, and its stand-in is slower.
    """
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # (n, B, heads, N, D)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits += bias
    return (logits.softmax(dim=-1) @ v).transpose(2, 3).flatten(3).flatten(0, 2)


def attend_by_kind(tokens: Tensor, bias: Tensor, heads: int, windows: Windows) -> Tensor:
    """Attention in windows: tokens (1 + T, 3C), bias (kinds, heads, N, N) of the logits -> (P, C).

    Windows of one kind share a bias, which spares a copy of it for each window; on a CPU they come a few at a time, which
    spares memory and keeps them in the cache.
    """
    per_window, parts = len(windows.gather) // len(windows.kinds), []
    step = max(1, ROWS // per_window) if tokens.is_cpu else len(windows.kinds)
    gather = windows.gather.view(-1, per_window).split(windows.counts)
    for kind, added in zip(gather, bias, strict=True):
        for index in kind.split(step):
            qkv = tokens.index_select(0, index.flatten()).view(
                -1, bias.shape[-1], 3, heads, tokens.shape[1] // heads // 3
            )
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (n * B, heads, N, D)
            y = F.scaled_dot_product_attention(q, k, v, added[None]).transpose(1, 2)  # (n * B, N, heads, D)
            parts.append(y.reshape(-1, tokens.shape[1] // 3))
    return torch.cat(parts)


class WindowAttention(nn.Module):
    """Multi-head attention within windows, with a learned bias by relative position: (B, H, W, C) -> the same."""

    def __init__(self, channels: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.register_buffer("relative_position_index", relative_positions(window), persistent=False)
        self.register_buffer("masks", shift_masks(window, shift), persistent=False)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        windows, area, rows = windows_of(x, self.window, self.shift), self.window**2, x.flatten(0, 2)
        bias = self.relative_position_bias_table.index_select(0, self.relative_position_index)  # (N * N, heads)
        bias = bias.view(area, area, self.heads).permute(2, 0, 1)
        tokens = self.qkv(F.pad(rows, (0, 0, 1, 0)))  # (1 + T, 3C): what pads a map after its norm is zero
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            qkv = ToWindows.apply(tokens, windows.gather, windows.order)  # (P, 3C)
            qkv = qkv.view(windows.kinds.shape[0], x.shape[0], area, 3, self.heads, -1)
            y = attend(qkv, bias + self.masks[windows.kinds][:, None, None] if self.shift else bias)
        else:
            y = attend_by_kind(tokens, (bias + self.masks[:, None]).to(tokens.dtype), self.heads, windows)
        return self.proj(FromWindows.apply(y, rows.shape[0], windows.gather, windows.order)).view(x.shape)


class Mlp(nn.Module):
    """Linear x4, exact GELU, Linear."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 4 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.fc2(F.gelu(self.fc1(x)))
        rows = x.flatten(0, -2).split(ROWS)
        return torch.cat([self.fc2(F.gelu(self.fc1(r))) for r in rows]).view(x.shape)


class Block(nn.Module):
    """Window attention and MLP, each after a LayerNorm and with a residual: (B, H, W, C) -> the same."""

    def __init__(self, channels: int, heads: int, window: int, shift: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(channels, heads, window, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels)
        self.drop_path_rate = drop_path_rate

    def forward(self, x: Tensor) -> Tensor:
        rate = self.drop_path_rate if self.training else 0
        x = x + drop_path(self.attn(self.norm1(x)), rate)
        return x + drop_path(self.mlp(self.norm2(x)), rate)


class PatchMerging(nn.Module):
    """Each 2x2 tokens become one of twice the channels: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 2C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels)
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        rows, columns = -(-height // 2), -(-width // 2)
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        x = x.view(batch, rows, 2, columns, 2, channels)
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))  # rows run faster than columns


class PatchEmbed(nn.Module):
    """4x4 pixels become one token: (B, 3, H, W) -> (B, ceil(H/4), ceil(W/4), C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, channels, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        x = F.pad(x, (0, -(-width // 4) * 4 - width, 0, -(-height // 4) * 4 - height))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks, every second one with shifted windows, and what makes the next stage's input of their output."""

    def __init__(self, channels: int, heads: int, window: int, rates: Sequence[float], last: bool) -> None:
        super().__init__()
        shifts = [window // 2 * (i % 2) for i in range(len(rates))]
        blocks = [Block(channels, heads, window, *pair) for pair in zip(shifts, rates, strict=True)]
        self.blocks = nn.Sequential(*blocks)
        self.downsample = nn.Identity() if last else PatchMerging(channels)


@MODELS.register_module()
class SwinTransformer(BaseModule):
    """Swin encoder: ``forward(images (B, 3, H, W))`` returns one map per name of ``out_features``, in that order.

    A side of n pixels becomes ceil(n / stride) map pixels, for any n. Maps lie in memory channels last.

    Published sizes (all four stages; embed_dim, depths, num_heads, window_size):
    tiny 96, 2-2-6-2, 3-6-12-24, 7; small 96, 2-2-18-2, 3-6-12-24, 7; base 128, 2-2-18-2, 4-8-16-32, 12;
    large 192, 2-2-18-2, 6-12-24-48, 12. Base and large exist with window 7, too.

    Args:
        embed_dim: channels of the first stage; they double with each stage.
        depths, num_heads: blocks and attention heads of the four stages.
        window_size: side of a window in tokens; every second block shifts windows by half of it.
        drop_path_rate: of the last block; it grows linearly from 0 over all blocks.
        out_features: of "res2" (stride 4), "res3" (8), "res4" (16), "res5" (32).
        init_cfg: ``dict(type="Pretrained", checkpoint=PATH)`` reads official files.

    Attributes:
        channels, strides: of the returned maps, in the order of ``out_features``.

    Raises:
        ValueError: not four stages, channels that heads do not divide, or an unknown feature name.
    """

    def __init__(
        self,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        drop_path_rate: float = 0.3,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not len(depths) == len(num_heads) == 4:
            raise ValueError(f"depths={tuple(depths)}, num_heads={tuple(num_heads)}: Swin has four stages")
        dims = [embed_dim * 2**i for i in range(4)]
        if bad := [(dim, heads) for dim, heads in zip(dims, num_heads, strict=True) if dim % heads]:
            raise ValueError(
                f"num_heads={tuple(num_heads)}: {bad[0][0]} channels cannot be shared by {bad[0][1]} heads"
            )
        rates = [drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))]
        self.patch_embed = PatchEmbed(embed_dim)
        self.layers = nn.ModuleList()
        for dim, depth, heads in zip(dims, depths, num_heads, strict=True):
            self.layers.append(Stage(dim, heads, window_size, rates[:depth], last=dim == dims[-1]))
            rates = rates[depth:]
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
                raise ValueError(f"out_features: SwinTransformer has no map {name!r}{nearest(name, names)}")
        for i, (name, dim) in enumerate(zip(names, dims, strict=True)):
            if name in out_features:
                self.add_module(f"norm{i}", nn.LayerNorm(dim))
        self.out_features = tuple(out_features)
        self.channels = [dims[names.index(name)] for name in out_features]
        self.strides = [4 * 2 ** names.index(name) for name in out_features]

    def init_weights(self) -> None:
        """Apply ``init_cfg``, within the package's scope so that "Pretrained" is ours however the encoder was built."""
        with DefaultScope.overwrite_default_scope(SCOPE):
            super().init_weights()

    def forward(self, images: Tensor, num_maps: int | None = None) -> list[Tensor]:
        """Return the first ``num_maps`` maps of ``out_features`` (all without it); what lies behind them is not computed."""
        maps, names = {}, self.out_features[:num_maps]
        x = self.patch_embed(images)  # (B, H/4, W/4, C)
        for i, stage in enumerate(self.layers):
            if maps.keys() >= set(names):
                break
            x = stage.blocks(x)
            if f"res{i + 2}" in self.out_features:
                maps[f"res{i + 2}"] = getattr(self, f"norm{i}")(x).permute(0, 3, 1, 2)  # (B, C, h, w)
            x = stage.downsample(x)
        return [maps[name] for name in names]
