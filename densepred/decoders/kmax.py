"""kMaX-DeepLab's pixel decoder (ECCV 2022, arXiv:2207.04044; axial attention: arXiv:2003.07853).

Official code: bytedance/kmax-deeplab. Coarse to fine, every stage refines the fusion of the previous stage with one
encoder map: axial-attention blocks at strides 32 and 16, bottleneck blocks below. The official model fixes its input
size when it is built; here relative positions are indexed on the fly: any side works up to 255 map pixels per axis.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.ops.precision import upcast
from densepred.registry import MODELS
from densepred.structures import Features

MAX_SPAN = 255
"""Longest sequence that the published position tables (2 * 255 - 1 = 509 rows) reach."""
NUM_HEADS = 8


def truncated_normal_(weight: Tensor, std: float) -> None:
    """Fill with a normal cut at two standard deviations and not rescaled, as TensorFlow's initialisers do."""
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


def batch_norm(channels: int, dims: int) -> nn.Module:
    """Return a BatchNorm over ``dims`` axes with kMaX's constants; distributed training makes it synchronised."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[dims]
    return kind(channels, eps=1e-3, momentum=0.01)


class ConvBN(nn.Module):
    """Convolution of stride 1 that keeps the map's size, BatchNorm and, if asked, the exact GELU.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: odd side of the kernel.
        dims: 2 for maps, 1 for sequences of queries.
        dilation: spacing of the kernel's taps.
        groups: as in the convolution; depthwise kernels start from Xavier's uniform distribution.
        bias: whether the convolution has one.
        activate: whether GELU follows.
        norm_init: first value of the norm's weight; 0 for the last norm of a residual branch.
        std: of the weight's truncated normal; by default He's sqrt(2 / in_channels), which ignores the kernel's area.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        dims: int = 2,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
        activate: bool = False,
        norm_init: float = 1.0,
        std: float | None = None,
    ) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
        padding = kernel_size // 2 * dilation
        self.conv = kind(
            in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, groups=groups, bias=bias
        )
        self.norm = batch_norm(out_channels, dims)
        self.activate = activate
        if groups > 1:
            nn.init.xavier_uniform_(self.conv.weight)
        else:
            truncated_normal_(self.conv.weight, std or math.sqrt(2.0 / in_channels))
        if bias:
            nn.init.zeros_(self.conv.bias)
        nn.init.constant_(self.norm.weight, norm_init)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return F.gelu(x) if self.activate else x


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of (B, C, H, W), in float32 at least."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = upcast(x)
        x = x - x.mean(1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
        return x.to(self.weight.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class AxialAttention(nn.Module):
    """Self-attention along one axis with learned relative positions in query, key and value.

    BatchNorm on the logits stands in for the usual 1 / sqrt(depth). The position tables are shared by the heads.

    Args:
        in_channels: channels of the input.
        key_depth: channels of all heads' queries, and of their keys.
        value_depth: channels of all heads' values, and of the output.
    """

    def __init__(self, in_channels: int, key_depth: int, value_depth: int) -> None:
        super().__init__()
        self.depths = (key_depth, key_depth, value_depth)
        self.qkv = nn.Conv1d(in_channels, sum(self.depths), 1, bias=False)
        self.qkv_norm = batch_norm(sum(self.depths), 1)
        self.query_positions = nn.Parameter(torch.empty(2 * MAX_SPAN - 1, key_depth // NUM_HEADS))
        self.key_positions = nn.Parameter(torch.empty(2 * MAX_SPAN - 1, key_depth // NUM_HEADS))
        self.value_positions = nn.Parameter(torch.empty(2 * MAX_SPAN - 1, value_depth // NUM_HEADS))
        self.similarity_norm = batch_norm(3 * NUM_HEADS, 2)
        self.output_norm = batch_norm(2 * value_depth, 1)
        truncated_normal_(self.qkv.weight, in_channels**-0.5)
        for table in (self.query_positions, self.key_positions, self.value_positions):
            truncated_normal_(table, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within every sequence of (N, C, L), L <= 255; returns (N, value_depth, L)."""
        qkv = self.qkv_norm(self.qkv(x)).split(self.depths, dim=1)
        q, k, v = (part.unflatten(1, (NUM_HEADS, -1)) for part in qkv)  # (N, heads, D, L)
        position = torch.arange(x.shape[-1], device=x.device)
        row = position[None, :] - position[:, None] + MAX_SPAN - 1  # (L, L), key minus query
        similarity = torch.cat(
            [
                torch.einsum("nhdl,nhdm->nhlm", q, k),
                torch.einsum("nhdl,lmd->nhlm", q, self.query_positions[row]),
                torch.einsum("nhdm,lmd->nhlm", k, self.key_positions[row]),
            ],
            dim=1,
        )  # (N, 3 heads, L, L)
        similarity = self.similarity_norm(similarity).unflatten(1, (3, NUM_HEADS)).sum(1)  # (N, heads, L, L)
        weights = upcast(similarity).softmax(-1).to(v.dtype)
        content = torch.einsum("nhlm,nhdm->nhdl", weights, v)
        places = torch.einsum("nhlm,lmd->nhdl", weights, self.value_positions[row])
        output = self.output_norm(torch.cat([content, places], dim=1).flatten(1, 2))  # (N, 2 value_depth, L)
        return output.unflatten(1, (2, -1)).sum(1)


class AxialAttention2d(nn.Module):
    """Attention along the height, then along the width, of (B, C, H, W)."""

    def __init__(self, in_channels: int, key_depth: int, value_depth: int) -> None:
        super().__init__()
        self.height_axis = AxialAttention(in_channels, key_depth, value_depth)
        self.width_axis = AxialAttention(value_depth, key_depth, value_depth)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = self.height_axis(x.permute(0, 3, 1, 2).flatten(0, 1))  # (B W, C, H)
        x = x.unflatten(0, (batch, width)).permute(0, 3, 2, 1).flatten(0, 1)  # (B H, C, W)
        return self.width_axis(x).unflatten(0, (batch, height)).permute(0, 2, 1, 3)  # (B, C, H, W)


class Block(nn.Module):
    """A pre-activated residual block around axial attention or a 3x3 convolution; its output is not activated.

    Args:
        in_channels: channels of the input.
        base_channels: width of the middle; the output has four times as many channels.
        block_type: ``axial`` or ``bottleneck``.
    """

    def __init__(self, in_channels: int, base_channels: int, block_type: str) -> None:
        super().__init__()
        if block_type == "axial":
            middle = 2 * base_channels
            self.conv_in = ConvBN(in_channels, middle, activate=True)
            self.attention = AxialAttention2d(middle, key_depth=base_channels, value_depth=middle)
        else:
            middle = base_channels
            self.conv_in = ConvBN(in_channels, middle, activate=True)
            self.conv_mid = ConvBN(middle, middle, 3, activate=True)
        self.block_type = block_type
        self.conv_out = ConvBN(middle, 4 * base_channels, norm_init=0.0)
        self.shortcut = ConvBN(in_channels, 4 * base_channels) if in_channels != 4 * base_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(x)
        y = self.conv_in(x)
        y = F.gelu(self.attention(y)) if self.block_type == "axial" else self.conv_mid(y)
        return self.shortcut(x) + self.conv_out(y)


class Stage(nn.Module):
    """Blocks in a row at one resolution."""

    def __init__(self, in_channels: int, base_channels: int, num_blocks: int, block_type: str) -> None:
        super().__init__()
        widths = [in_channels] + [4 * base_channels] * (num_blocks - 1)
        self.blocks = nn.Sequential(*(Block(width, base_channels, block_type) for width in widths))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Fusion(nn.Module):
    """Add a coarse map, projected and enlarged, to a finer one, projected.

    The finer map is taken as it is when its channels already match (the 64-channel stem of Cityscapes' ResNet-50).
    """

    def __init__(self, low_channels: int, high_channels: int, out_channels: int) -> None:
        super().__init__()
        self.low = ConvBN(low_channels, out_channels)
        self.high = ConvBN(high_channels, out_channels) if high_channels != out_channels else None

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        # Published rule: corners are aligned when the *coarse* map's *width* is odd.
        low = F.interpolate(
            self.low(F.gelu(low)), size=high.shape[-2:], mode="bilinear", align_corners=bool(low.shape[-1] % 2)
        )
        return low + (high if self.high is None else self.high(F.gelu(high)))


@MODELS.register_module()
class KMaXPixelDecoder(nn.Module):
    """The pixel decoder: one stage per encoder map, coarse to fine.

    Args:
        in_channels: channels of the encoder's maps, finest first.
        in_strides: their strides; from the last to the first they are the strides of the stages.
        num_blocks: blocks per stage, coarse to fine.
        block_types: ``axial`` or ``bottleneck`` per stage.
        base_channels: width per stage; a stage's output has four times as many channels. A multiple of 8 where axial.

    Attributes:
        channels: of ``Features.pixels``, the last stage's output.
        level_channels: of ``Features.levels``, the outputs of the first three stages.

    Raises:
        ValueError: the lists disagree in length, a block type is unknown, or the strides are not finest first.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        num_blocks: Sequence[int] = (1, 5, 1, 1),
        block_types: Sequence[str] = ("axial", "axial", "bottleneck", "bottleneck"),
        base_channels: Sequence[int] = (512, 256, 128, 64),
    ) -> None:
        super().__init__()
        _check_stages(in_channels, in_strides, num_blocks, block_types, base_channels)
        channels = list(in_channels)[::-1]
        self.strides = list(in_strides)[::-1]
        self.block_types = list(block_types)
        widths = [channels[0], *base_channels[1:]]  # what enters each stage
        outputs = [4 * width for width in base_channels]
        self.in_norms = nn.ModuleList(ChannelNorm(width) for width in channels)
        self.stages = nn.ModuleList(map(Stage, widths, base_channels, num_blocks, block_types))
        self.fusions = nn.ModuleList(map(Fusion, outputs[:-1], channels[1:], base_channels[1:]))
        self.channels = outputs[-1]
        self.level_channels = outputs[:3]

    def forward(self, features: list[Tensor]) -> Features:
        """Decode the encoder's maps.

        Args:
            features: (B, C_i, H / s_i, W / s_i), finest first.

        Returns:
            The last stage's map, the first three stages' maps (coarse to fine; none is activated) and ``features``.

        Raises:
            ValueError: an axial stage's map is longer than 255 pixels.
        """
        maps = features[::-1]
        for stride, kind, x in zip(self.strides, self.block_types, maps, strict=True):
            if kind == "axial":
                _check_span(x.shape[-2:], stride)
        maps = [norm(x) for norm, x in zip(self.in_norms, maps, strict=True)]
        outputs = [self.stages[0](maps[0])]
        for stage, fusion, high in zip(self.stages[1:], self.fusions, maps[1:], strict=True):
            outputs.append(stage(fusion(outputs[-1], high)))
        return Features(pixels=outputs[-1], levels=outputs[:3], encoder=features)


def _check_stages(
    in_channels: Sequence[int],
    in_strides: Sequence[int],
    num_blocks: Sequence[int],
    block_types: Sequence[str],
    base_channels: Sequence[int],
) -> None:
    lengths = {
        "in_channels": len(in_channels),
        "in_strides": len(in_strides),
        "num_blocks": len(num_blocks),
        "block_types": len(block_types),
        "base_channels": len(base_channels),
    }
    if len(set(lengths.values())) > 1 or len(in_channels) < 3:
        raise ValueError(f"KMaXPixelDecoder needs one entry per encoder map, three or more, in each of {lengths}")
    if list(in_strides) != sorted(in_strides):
        raise ValueError(
            f"KMaXPixelDecoder: in_strides={list(in_strides)} must run from the finest map to the coarsest"
        )
    for kind, width in zip(block_types, base_channels, strict=True):
        if kind not in ("axial", "bottleneck"):
            raise ValueError(f"KMaXPixelDecoder: block_types names {kind!r}; it knows 'axial' and 'bottleneck'")
        if kind == "axial" and width % NUM_HEADS:
            raise ValueError(f"KMaXPixelDecoder: base_channels={width} of an axial stage is no multiple of {NUM_HEADS}")


def _check_span(size: Sequence[int], stride: int) -> None:
    if max(size) > MAX_SPAN:
        raise ValueError(
            f"axial attention at stride {stride} got a {size[0]}x{size[1]} map, its position tables reach {MAX_SPAN} "
            f"pixels: the input's sides may be {MAX_SPAN * stride} at most; make the image smaller or crop it"
        )
