"""UNet++ (arXiv:1807.10165, arXiv:1912.05074): nested dense skips over any encoder.

X^{i,0} is the encoder's map i, finest first; X^{i,j} = H([X^{i,0}, .., X^{i,j-1}, U(X^{i+1,j-1})]) for i + j <= d. Official
code: MrGiovanni/UNetPlusPlus (a Keras and a PyTorch network, which differ); over other encoders people know it from
segmentation_models_pytorch. The three styles:

======  ===================================  ====================================  ===================  ======================
style   order of channels                    U                                     width of X^{i,j}     head of the code base
======  ===================================  ====================================  ===================  ======================
smp     U, X^{i,j-1}, .., X^{i,0}            nearest                               encoder's of row i,  3x3 with bias
                                                                                   last ones their own
keras   U, X^{i,0}, .., X^{i,j-1}            transposed convolution with bias      encoder's of row i   1x1 with bias, sigmoid
nnunet  X^{i,0}, .., X^{i,j-1}, U            transposed convolution, no bias       encoder's of row i   1x1 without bias
======  ===================================  ====================================  ===================  ======================

H is `densepred.encoders.unet.ConvBlock` of the style. None of the three takes sides that do not divide by the coarsest
stride; here U ends at the size of X^{i,0}: the nearest interpolation by that explicit size, a transposed convolution (of
kernel and stride s_{i+1} / s_i) cut at the bottom and right, or its last row or column repeated. Deep supervision and
pruning, which segmentation_models_pytorch lacks, work in every style.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.encoders.unet import ConvBlock, init_conv
from densepred.errors import nearest
from densepred.registry import MODELS
from densepred.structures import Features


class Style(NamedTuple):
    """What a node does in a code base, besides its block."""

    join: Callable[[list[Tensor], Tensor], list[Tensor]]
    """The maps to concatenate, of the row's earlier nodes (X^{i,0} first) and the map from below."""
    up_bias: bool | None
    """Bias of the transposed convolution; None: nearest interpolation."""


STYLES = {
    "smp": Style(lambda row, up: [up, *row[::-1]], None),
    "keras": Style(lambda row, up: [up, *row], True),
    "nnunet": Style(lambda row, up: [*row, up], False),
}


def fit(x: Tensor, size: Sequence[int]) -> Tensor:
    """Cut a map at the bottom and right to ``size`` (h, w), or repeat its last row or column."""
    x = x[..., : size[0], : size[1]]
    missing = (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2])
    return F.pad(x, missing, mode="replicate") if any(missing) else x


class Node(nn.Module):
    """X^{i,j} for j > 0.

    Args:
        style: one of `STYLES`.
        row_channels: of X^{i,0} .. X^{i,j-1}.
        below_channels: of X^{i+1,j-1}.
        width: channels of the node.
        ratio: stride of X^{i+1,j-1} over that of the node.
    """

    def __init__(self, style: str, row_channels: Sequence[int], below_channels: int, width: int, ratio: int) -> None:
        super().__init__()
        self.style = style
        self.up = None
        if (bias := STYLES[style].up_bias) is not None:
            self.up = nn.ConvTranspose2d(below_channels, row_channels[0], ratio, ratio, bias=bias)
            init_conv(self.up, style)
            below_channels = row_channels[0]
        self.block = ConvBlock(style, sum(row_channels) + below_channels, width)

    def forward(self, row: list[Tensor], below: Tensor) -> Tensor:
        size = row[0].shape[-2:]
        up = F.interpolate(below, size) if self.up is None else fit(self.up(below), size)  # (B, C, h, w)
        return self.block(torch.cat(STYLES[self.style].join(row, up), dim=1))  # (B, width, h, w)


@MODELS.register_module()
class UNetPlusPlusDecoder(nn.Module):
    """Nested U-Net of d + 1 encoder maps; ``forward(maps)`` returns `Features` whose ``pixels`` are X^{0,d}.

    In style "smp" with a first map at stride 2, ``pixels`` come from one more block (2x nearest, no skip) behind X^{0,d}.
    ``levels`` are the three coarsest nodes that end a row, X^{d,0}, X^{d-1,1} and X^{d-2,2}.

    Args:
        in_channels: of the maps, finest first; 2 to 6 of them.
        in_strides: of the maps, starting at 1, 2 or 4 and never falling; equal ones may follow each other.
        style: "smp", "keras" or "nnunet", see the module.
        decoder_channels: style "smp" only: widths of X^{i,d-i}, the last node of a row, at strides .., 16, 8, 4, 2, and
            of the block at stride 1 (of X^{0,d} if there is a map of stride 1). Widths of strides without such a node
            stay unused.
        deep_supervision: hand on X^{0,1} .. X^{0,d-1} as ``deep``.
        prune: compute only what X^{0,prune} needs: nodes with i + j <= prune, the first prune + 1 maps. ``pixels`` are
            X^{0,prune} then, and ``deep`` is what comes before it. The weights of the other nodes stay, so that a
            checkpoint fits however it is pruned; may be set at any time.

    Attributes:
        channels, deep_channels: of ``pixels`` and ``deep`` without pruning; a pruned X^{0,j} has ``deep_channels[j - 1]``.
        level_channels: of ``levels`` now.
        num_maps: how many of the encoder's maps are needed now; None: all.

    Raises:
        ValueError: unknown style; too many, too few or falling maps; too few ``decoder_channels``; ``prune`` out of
            range or without deep supervision, whose classifiers the pruned nodes need.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        style: str = "smp",
        decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
        deep_supervision: bool = False,
        prune: int | None = None,
    ) -> None:
        super().__init__()
        if style not in STYLES:
            raise ValueError(f"style={style!r}: UNetPlusPlusDecoder has no such style{nearest(style, STYLES)}")
        _check_pyramid(in_channels, in_strides)
        self.depth = len(in_channels) - 1
        self.deep_supervision = deep_supervision
        self.prune = prune
        self.widths = _node_widths(in_channels, in_strides, decoder_channels if style == "smp" else None)
        self.nodes = nn.ModuleDict()
        for i, j in self.widths:
            if j > 0:
                row = [self.widths[i, k] for k in range(j)]
                below, ratio = self.widths[i + 1, j - 1], in_strides[i + 1] // in_strides[i]
                self.nodes[f"x{i}_{j}"] = Node(style, row, below, self.widths[i, j], ratio)
        self.deep_channels = [self.widths[0, j] for j in range(1, self.depth)] if deep_supervision else []
        self.channels = self.widths[0, self.depth]
        self.final = None
        if style == "smp" and in_strides[0] == 2:
            self.final = ConvBlock(style, self.channels, decoder_channels[-1])
            self.channels = decoder_channels[-1]

    @property
    def prune(self) -> int | None:
        """The j of X^{0,j} that is computed; None: d."""
        return self._prune

    @prune.setter
    def prune(self, value: int | None) -> None:
        if value is not None and not self.deep_supervision:
            raise ValueError(f"prune={value}: X^(0,{value}) has a classifier with deep_supervision=True only; set both")
        if value is not None and not 1 <= value <= self.depth:
            raise ValueError(
                f"prune={value}: with {self.depth + 1} encoder maps it is 1 to {self.depth}; None prunes nothing"
            )
        self._prune = value

    @property
    def num_maps(self) -> int | None:
        """How many of the encoder's maps are needed; None: all."""
        return None if self.prune is None else self.prune + 1

    @property
    def _levels(self) -> list[tuple[int, int]]:
        last = self.prune or self.depth
        return [(last - j, j) for j in range(min(3, last + 1))]

    @property
    def level_channels(self) -> list[int]:
        """Channels of ``levels``, coarse to fine."""
        return [self.widths[node] for node in self._levels]

    def forward(self, maps: list[Tensor]) -> Features:
        last = self.prune or self.depth
        grid = {(i, 0): x for i, x in enumerate(maps[: last + 1])}
        for end in range(1, last + 1):
            for j in range(1, end + 1):
                i = end - j
                grid[i, j] = self.nodes[f"x{i}_{j}"]([grid[i, k] for k in range(j)], grid[i + 1, j - 1])
        pixels = grid[0, last]  # (B, C, h, w)
        if self.final is not None and last == self.depth:
            pixels = self.final(F.interpolate(pixels, scale_factor=2))  # (B, C, 2h, 2w)
        deep = [grid[0, j] for j in range(1, last)] if self.deep_supervision else []
        return Features(pixels, [grid[node] for node in self._levels], list(maps), deep)


def _check_pyramid(channels: Sequence[int], strides: Sequence[int]) -> None:
    if len(channels) != len(strides) or not 2 <= len(channels) <= 6:
        raise ValueError(
            f"{len(channels)} encoder maps with {len(strides)} strides: UNetPlusPlusDecoder takes 2 to 6 maps; choose "
            "them by the encoder's out_features"
        )
    if strides[0] not in (1, 2, 4) or any(after % before for before, after in pairwise(strides)):
        raise ValueError(
            f"encoder maps at strides {list(strides)}: UNetPlusPlusDecoder takes them finest first from stride 1, 2 or 4, "
            "each a multiple of the one before; choose them by the encoder's out_features"
        )


def _node_widths(
    channels: Sequence[int], strides: Sequence[int], decoder_channels: Sequence[int] | None
) -> dict[tuple[int, int], int]:
    """Return the channels of every node (i, j); the last of a row has its own if ``decoder_channels`` are given."""
    depth = len(channels) - 1
    widths = {(i, j): channels[i] for i in range(depth + 1) for j in range(depth + 1 - i)}
    if decoder_channels is not None:
        for i in range(depth):
            power = strides[i].bit_length()  # 1 at stride 1, 2 at stride 2, 3 at stride 4
            if power > len(decoder_channels):
                raise ValueError(
                    f"decoder_channels={tuple(decoder_channels)}: there is a node at stride {strides[i]}, and the widths are "
                    f"for strides {2 ** (len(decoder_channels) - 1)} to 1; give {power} of them"
                )
            widths[i, depth - i] = decoder_channels[-power]
    return widths
