"""Mask2Former's pixel decoder: deformable attention over three levels, then one FPN step (arXiv:2112.01527).

Official code: facebookresearch/Mask2Former (its ``MSDeformAttnPixelDecoder``); the layer is Deformable DETR's
(arXiv:2010.04159). Every pixel of the strides 32, 16 and 8 is a token that looks at a few points of all three levels.
No padding mask, as published: padded regions of an image count.

What differs: the position encoding is computed in the model's dtype (officially always float32), and half precision
keeps only the locations and the softmax in float32 (officially the whole decoder).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.ops.ms_deform_attn import ms_deform_attn_fused
from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import Features

NUM_LEVELS = 3
GROUPS = 32
"""Groups of every GroupNorm."""


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Convolve (B, C, H, W) with a 1x1 kernel (O, C, 1, 1) as a matrix product; the result is channels-last in memory.

    On one thread and with a small batch `conv2d` takes a detour through im2col. Neither layout of the input is copied.
    """
    cells, matrix = x.flatten(2).transpose(1, 2), weight.flatten(1).t().expand(len(x), -1, -1)  # (B, HW, C), (B, C, O)
    y = torch.bmm(cells, matrix) if bias is None else torch.baddbmm(bias, cells, matrix)  # (B, HW, O)
    return y.unflatten(1, x.shape[-2:]).permute(0, 3, 1, 2)  # (B, O, H, W)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution with a bias, computed by `pointwise`."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(x, self.weight, self.bias)


class ConvNorm(nn.Conv2d):
    """Convolution without bias that holds its GroupNorm as ``norm``; it keeps the map's size."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.GroupNorm(GROUPS, out_channels)
        nn.init.kaiming_uniform_(self.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(pointwise(x, self.weight) if self.kernel_size == (1, 1) else super().forward(x))


def sine_positions(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Return the sine encoding (H * W, C) of the cells of a map, row by row.

    The first half of the channels tells the row, the second the column: sine and cosine in turn, of the one-based index
    as a share of 2 pi, by C / 4 falling frequencies.

    Args:
        height: of the map.
        width: of the map.
        channels: C, a multiple of 4.
        like: a tensor of the model; half precision is computed in float32.
    """
    rows, columns = (_axis_positions(length, channels // 2, upcast(like)) for length in (height, width))
    cells = (height, width, -1)
    positions = torch.cat([rows[:, None].expand(cells), columns[None].expand(cells)], dim=-1)  # (H, W, C)
    return positions.flatten(0, 1).to(like.dtype)


def _axis_positions(length: int, features: int, like: Tensor) -> Tensor:
    index = torch.arange(1, length + 1, dtype=like.dtype, device=like.device)
    powers = torch.arange(0, features, 2, dtype=like.dtype, device=like.device) / features
    phase = (index * (2 * math.pi) / (length + 1e-6))[:, None] / 10000**powers  # (n, features / 2)
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(1)  # (n, features)


def cell_centres(height: int, width: int, like: Tensor) -> Tensor:
    """Return the centres (H * W, 2) of a map's cells as (x, y) in [0, 1], row by row."""
    y, x = ((torch.arange(n, dtype=like.dtype, device=like.device) + 0.5) / n for n in (height, width))
    return torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=-1).flatten(0, 1)


@dataclass(frozen=True)
class LevelContext:
    """What all layers know about the tokens of one input size; S tokens of L levels. No tensor has a batch axis.

    Attributes:
        positions: (S, C), what a token adds to itself as a query: its sine encoding and its level's embedding.
        references: (1, S, L, 2), its cell's centre (x, y) in [0, 1], the same on every level, float32 at least.
        spatial_shapes: (L, 2) int64, height and width of the levels, coarse to fine.
        level_starts: (L,) int64, the first token of every level.
        sizes: the same heights and widths as plain numbers.
    """

    positions: Tensor
    references: Tensor
    spatial_shapes: Tensor
    level_starts: Tensor
    sizes: tuple[tuple[int, int], ...]

    def split(self, memory: Tensor) -> list[Tensor]:
        """Return the levels of (B, S, C) as maps (B, C, h, w), views of it."""
        lengths = [height * width for height, width in self.sizes]
        parts = memory.split(lengths, dim=1)
        return [part.unflatten(1, size).permute(0, 3, 1, 2) for part, size in zip(parts, self.sizes, strict=True)]


class DeformableAttention(nn.Module):
    """Attention of every token to ``num_points`` learned locations around it on every level.

    Args:
        embed_dim: channels of the tokens.
        num_heads: heads.
        num_points: locations per head and level.
    """

    def __init__(self, embed_dim: int, num_heads: int, num_points: int) -> None:
        super().__init__()
        samples = num_heads * NUM_LEVELS * num_points
        self.samples = (num_heads, NUM_LEVELS, num_points)
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        for linear in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(linear.weight)
        for linear in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
        for linear in (self.attention_weights, self.value_proj, self.output_proj):
            nn.init.zeros_(linear.bias)
        heads, _, points = self.samples
        angle = torch.arange(heads) * (2 * math.pi / heads)
        rays = torch.stack([angle.cos(), angle.sin()], dim=-1)  # (heads, 2)
        rays = rays / rays.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, points + 1)[:, None]  # the points of a head march along its ray, a pixel at a time
        with torch.no_grad():
            bias = self.sampling_offsets.bias.view(*self.samples, 2)
            bias.copy_((rays[:, None] * steps)[:, None].expand_as(bias))

    def forward(self, memory: Tensor, context: LevelContext) -> Tensor:
        """Let the tokens (B, S, C) attend to one another."""
        heads, levels, points = self.samples
        queries = memory + context.positions
        value = self.value_proj(memory).unflatten(-1, (heads, -1))  # (B, S, heads, D)
        offsets = self.sampling_offsets(queries).unflatten(-1, (heads, levels, points, 2))
        logits = self.attention_weights(queries).unflatten(-1, (heads, levels, points))
        sums = ms_deform_attn_fused(
            value, context.spatial_shapes, context.level_starts, context.references, offsets, logits
        )
        return self.output_proj(sums)  # (B, S, C)


class DeformableLayer(nn.Module):
    """Deformable attention and a feed-forward part, each followed by the LayerNorm of its sum with the input."""

    def __init__(self, embed_dim: int, num_heads: int, num_points: int, ffn_dim: int) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(embed_dim, num_heads, num_points)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, memory: Tensor, context: LevelContext) -> Tensor:
        memory = self.norm1(memory + self.self_attn(memory, context))
        return self.norm2(memory + self.linear2(self.linear1(memory).relu_()))

    def multiply_adds(self) -> int:
        """Return the multiply-adds for one token: linear maps, and five for every element of a LayerNorm."""
        linears = sum(part.weight.numel() for part in self.modules() if isinstance(part, nn.Linear))
        return linears + 5 * (self.norm1.weight.numel() + self.norm2.weight.numel())


@MODELS.register_module()
class DeformablePixelDecoder(nn.Module):
    """Mask2Former's pixel decoder, a *stack* of layers that may be left after any of them.

    `forward` is `start`, then `step` for every layer, then `finish`; whoever leaves early calls these.

    Args:
        in_channels: channels of the encoder's four maps, finest first.
        in_strides: their strides.
        embed_dim: C, channels of the tokens; a multiple of 32 and of ``num_heads``.
        mask_dim: channels of the mask features; None for a caller that ends with `step`: then `finish` has no weights.
        num_layers: deformable layers.
        num_heads: heads of the attention.
        num_points: sampled locations per head and level.
        ffn_dim: hidden channels of the feed-forward part.

    Attributes:
        channels: of ``Features.pixels``, the mask features.
        level_channels: of ``Features.levels``, strides 32, 16 and 8.

    Raises:
        ValueError: not four maps, strides that are not finest first, or an ``embed_dim`` that does not divide.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        embed_dim: int = 256,
        mask_dim: int | None = 256,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        ffn_dim: int = 1024,
    ) -> None:
        super().__init__()
        _check_maps(in_channels, in_strides)
        _check_width(embed_dim, num_heads)
        self.embed_dim, self.num_layers = embed_dim, num_layers
        self.channels = mask_dim
        self.level_channels = [embed_dim] * NUM_LEVELS
        self.input_proj = nn.ModuleList(
            nn.Sequential(PointwiseConv(channels, embed_dim), nn.GroupNorm(GROUPS, embed_dim))
            for channels in reversed(in_channels[1:])
        )
        self.level_embed = nn.Parameter(torch.randn(NUM_LEVELS, embed_dim))
        self.layers = nn.ModuleList(
            DeformableLayer(embed_dim, num_heads, num_points, ffn_dim) for _ in range(num_layers)
        )
        if mask_dim is not None:
            self.lateral = ConvNorm(in_channels[0], embed_dim, 1)
            self.output = ConvNorm(embed_dim, embed_dim, 3)
            self.mask_features = PointwiseConv(embed_dim, mask_dim)
            nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        for projection, _ in self.input_proj:
            nn.init.xavier_uniform_(projection.weight)

    def forward(self, features: list[Tensor]) -> Features:
        """Decode the encoder's four maps (B, C_i, H / s_i, W / s_i), finest first; see `finish`."""
        memory, context = self.start(features)
        for i in range(self.num_layers):
            memory = self.step(i, memory, context)
        return self.finish(memory, context, features)

    def start(self, features: list[Tensor]) -> tuple[Tensor, LevelContext]:
        """Return the tokens (B, S, C) of the three coarser maps, stride 32 first, and what the layers know of them."""
        maps = [project(x) for project, x in zip(self.input_proj, reversed(features[1:]), strict=True)]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)  # (B, S, C)
        return memory, self._context([tuple(x.shape[-2:]) for x in maps], memory)

    def _context(self, sizes: list[tuple[int, int]], memory: Tensor) -> LevelContext:
        positions = [
            sine_positions(*size, self.embed_dim, memory) + embedding
            for size, embedding in zip(sizes, self.level_embed, strict=True)
        ]
        centres = torch.cat([cell_centres(*size, upcast(memory)) for size in sizes])  # (S, 2)
        shapes = torch.tensor(sizes, device=memory.device)  # (L, 2)
        starts = [sum(h * w for h, w in sizes[:level]) for level in range(NUM_LEVELS)]
        return LevelContext(
            positions=torch.cat(positions),
            references=centres[None, :, None].expand(-1, -1, NUM_LEVELS, -1).contiguous(),
            spatial_shapes=shapes,
            level_starts=torch.tensor(starts, device=memory.device),
            sizes=tuple(sizes),
        )

    def step(self, i: int, memory: Tensor, context: LevelContext) -> Tensor:
        """Return the tokens (B, S, C) after layer ``i``, counted from 0."""
        return self.layers[i](memory, context)

    def finish(self, memory: Tensor, context: LevelContext, features: list[Tensor]) -> Features:
        """Return the mask features at the finest map's size, the tokens as three maps, coarse to fine, and the input."""
        levels = context.split(memory)
        finest = features[0]
        y = self.lateral(finest) + F.interpolate(levels[-1], size=finest.shape[-2:], mode="bilinear")
        return Features(pixels=self.mask_features(self.output(y).relu_()), levels=levels, encoder=features)

    def summary(self, memory: Tensor, context: LevelContext) -> Tensor:
        """Return the mean (B, C) of the coarsest level's tokens."""
        height, width = context.sizes[0]
        return memory[:, : height * width].mean(1)

    def layer_flops(self, context: LevelContext) -> int:
        """Return the multiply-adds of one layer for one image; the sampling itself is not counted, as published."""
        return context.references.shape[1] * self.layers[0].multiply_adds()


def _check_maps(in_channels: Sequence[int], in_strides: Sequence[int]) -> None:
    if len(in_channels) != NUM_LEVELS + 1 or len(in_strides) != NUM_LEVELS + 1:
        raise ValueError(
            f"DeformablePixelDecoder needs four encoder maps, not channels {list(in_channels)} at strides "
            f"{list(in_strides)}: set the encoder's out_features to ('res2', 'res3', 'res4', 'res5')"
        )
    if list(in_strides) != sorted(set(in_strides)):
        raise ValueError(
            f"DeformablePixelDecoder: in_strides={list(in_strides)} must run from the finest map to the coarsest"
        )


def _check_width(embed_dim: int, num_heads: int) -> None:
    for name, divisor in (("num_heads", num_heads), ("its GroupNorms' groups", GROUPS)):
        if embed_dim % divisor:
            raise ValueError(f"DeformablePixelDecoder: embed_dim={embed_dim} is no multiple of {name}, {divisor}")
