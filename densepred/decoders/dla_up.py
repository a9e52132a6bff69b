"""Iterative deep aggregation with deformable convolutions: the way up of CenterNet's DLA-34 (arXiv:1904.07850, section 5).

Official code: xingyizhou/CenterNet (``pose_dla_dcn``), CenterPoly's ``dla_34``. Parameter names are its own: ``dla_up.ida_0``
merges the coarsest map into the next finer one, ``dla_up.ida_1`` both into the next, and so on; ``ida_up`` at last merges
what came out of each of these into the finest of them.

What comes out of an upsampling is cut to the finer map's size (or its last row repeated, under an encoder that rounds down);
of sides that divide by the coarsest stride nothing is cut, and the numbers are official.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from densepred.decoders.unetpp import fit
from densepred.ops.modulated_deform_conv2d import ModulatedDeformConv2d
from densepred.registry import MODELS
from densepred.structures import Features


def deform_unit(in_channels: int, channels: int) -> nn.Sequential:
    """Return a modulated deformable 3x3 convolution with BatchNorm and ReLU; keys ``conv.*``, ``actf.0.*``."""
    after = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    return nn.Sequential(OrderedDict(conv=ModulatedDeformConv2d(in_channels, channels), actf=after))


def upsampling(channels: int, factor: int) -> nn.Module:
    """Return a transposed convolution of each channel by itself, bilinear until it is trained; factor 1 changes nothing."""
    if factor == 1:
        return nn.Identity()
    up = nn.ConvTranspose2d(channels, channels, 2 * factor, factor, factor // 2, groups=channels, bias=False)
    line = 1 - (torch.arange(2 * factor) - factor + 0.5).abs() / factor
    with torch.no_grad():
        up.weight.copy_(line[:, None] * line)
    return up


class IterativeAggregation(nn.Module):
    """Merge maps from the finest on: each coarser one is projected, upsampled, added to the last result, and convolved.

    Args:
        channels: of every result.
        in_channels: of the maps, finest first; the finest must have ``channels`` already.
        factors: of their strides to the finest map's.
    """

    def __init__(self, channels: int, in_channels: Sequence[int], factors: Sequence[int]) -> None:
        super().__init__()
        for i, (width, factor) in enumerate(zip(in_channels[1:], factors[1:], strict=True), start=1):
            self.add_module(f"proj_{i}", deform_unit(width, channels))
            self.add_module(f"up_{i}", upsampling(channels, factor))
            self.add_module(f"node_{i}", deform_unit(channels, channels))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return all results, (B, channels, h, w) of the finest map; the first is the finest map itself."""
        merged = [maps[0]]
        for i, x in enumerate(maps[1:], start=1):
            up = getattr(self, f"up_{i}")(getattr(self, f"proj_{i}")(x))
            up = fit(up, merged[-1].shape[-2:])  # (B, channels, h, w)
            merged.append(getattr(self, f"node_{i}")(up + merged[-1]))
        return merged


class Pyramid(nn.Module):
    """An aggregation that ends at each map but the coarsest, from coarse to fine; every one reads all results of the last."""

    def __init__(self, in_channels: Sequence[int], in_strides: Sequence[int]) -> None:
        super().__init__()
        for i, at in enumerate(reversed(range(len(in_channels) - 1))):
            merged = [in_channels[at + 1]] * (len(in_channels) - at - 1)  # what the aggregation before this one gives
            factors = [1] + [in_strides[at + 1] // in_strides[at]] * len(merged)
            self.add_module(f"ida_{i}", IterativeAggregation(in_channels[at], [in_channels[at], *merged], factors))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the last result at the stride of every map, finest first; the coarsest map goes through unchanged."""
        *finer, coarsest = maps
        merged, ends = [coarsest], [coarsest]
        for i, x in enumerate(reversed(finer)):
            merged = getattr(self, f"ida_{i}")([x, *merged])
            ends.insert(0, merged[-1])
        return ends


@MODELS.register_module()
class DLAUp(nn.Module):
    """Merge a pyramid into a map at the stride of its finest level.

    Args:
        in_channels: channels of the encoder's maps, finest first, at least two.
        in_strides: their strides, each a multiple of the one before.

    Attributes:
        channels: of ``Features.pixels``: those of the finest map, at its size.
        level_channels: empty.

    Raises:
        ValueError: fewer than two maps, or strides that do not divide one another.
    """

    def __init__(self, in_channels: Sequence[int], in_strides: Sequence[int]) -> None:
        super().__init__()
        if len(in_channels) < 2 or any(b % a for a, b in pairwise(in_strides)):
            raise ValueError(
                f"DLAUp: the encoder's maps have the strides {list(in_strides)}; it needs two or more, each a multiple of the "
                "one before (encoder.out_features)"
            )
        self.channels, self.level_channels = in_channels[0], []
        self.dla_up = Pyramid(in_channels, in_strides)
        factors = [stride // in_strides[0] for stride in in_strides[:-1]]
        self.ida_up = IterativeAggregation(self.channels, in_channels[:-1], factors)

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first."""
        ends = self.dla_up(maps)
        return Features(pixels=self.ida_up(ends[:-1])[-1], levels=[], encoder=maps)
