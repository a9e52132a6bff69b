"""SegFormer's all-MLP decoder (arXiv:2105.15203, section 3.2): project every map, resize to the finest, fuse.

Two published forms, which do not convert into one another:

* ``form="mmsegmentation"``: a 1x1 convolution, BatchNorm and ReLU per map (``convs.I``), fused from fine to coarse
  (``fusion_conv``); 256 channels for all sizes of MiT;
* ``form="nvidia"``: a linear layer with bias per map (``linear_cK``, K from 1 at the finest), fused from coarse to fine
  (``linear_fuse``); 256 channels for MiT-B0 and B1, 768 for the others.

Bilinear resizing and a 1x1 convolution commute: each map goes through its own columns of the fusing weight before it is
resized, and the results are added. That is the published number at a third of its multiplications, and without the
concatenation at full size, the largest tensor of the model.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from densepred.registry import MODELS
from densepred.structures import Features

FORMS = ("mmsegmentation", "nvidia")
NUM_MAPS = 4
"""Maps that are read, counted from the coarsest: of an encoder with a map at stride 2 that one stays outside."""


class LinearProjection(nn.Module):
    """A linear layer on the channels of a map: (B, I, h, w) -> (B, C, h, w)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.movedim(1, -1)).movedim(-1, 1)


@MODELS.register_module()
class SegFormerDecoder(nn.Module):
    """Fuse the encoder's maps by 1x1 convolutions at the size of the finest.

    Args:
        in_channels: channels of the encoder's maps, finest first; of more than four, the last four are read.
        in_strides: their strides.
        channels: of every projection and of the result.
        form: "mmsegmentation" or "nvidia", see the head of this file.
        align_corners: of the resizes.

    Attributes:
        channels: of ``Features.pixels``, at the size of the finest map read.
        level_channels: empty.

    Raises:
        ValueError: unknown ``form``.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        in_strides: Sequence[int],
        channels: int = 256,
        form: str = "mmsegmentation",
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ValueError(f"form={form!r}: SegFormerDecoder knows {', '.join(FORMS)}")
        self.channels, self.level_channels, self.form, self.align_corners = channels, [], form, align_corners
        read = in_channels[-NUM_MAPS:]
        fuse = ConvModule(len(read) * channels, channels, 1, norm_cfg=dict(type="BN"))
        if form == "nvidia":
            for i, width in enumerate(read, start=1):
                self.add_module(f"linear_c{i}", LinearProjection(width, channels))
            self.linear_fuse = fuse
        else:
            self.convs = nn.ModuleList(ConvModule(width, channels, 1, norm_cfg=dict(type="BN")) for width in read)
            self.fusion_conv = fuse

    def forward(self, maps: list[Tensor]) -> Features:
        """Decode the encoder's maps (B, C_i, H / s_i, W / s_i), finest first."""
        read = maps[-NUM_MAPS:]
        if self.form == "nvidia":
            fuse, projections = self.linear_fuse, [getattr(self, f"linear_c{i + 1}") for i in range(len(read))]
            weights = reversed(fuse.conv.weight.chunk(len(read), dim=1))
        else:
            fuse, projections = self.fusion_conv, self.convs
            weights = fuse.conv.weight.chunk(len(read), dim=1)  # (C, C, 1, 1) each
        parts = [F.conv2d(project(x), w) for project, x, w in zip(projections, read, weights, strict=True)]
        pixels = parts[0]  # (B, C, h, w) of the finest map
        for x in parts[1:]:
            size = pixels.shape[-2:]
            pixels = pixels + F.interpolate(x, size=size, mode="bilinear", align_corners=self.align_corners)
        return Features(pixels=fuse.activate(fuse.norm(pixels)), levels=[], encoder=maps)
