"""No layers of its own: hands on the maps of an encoder that ends in what a head reads, such as a stacked hourglass."""

from collections.abc import Sequence

from torch import Tensor, nn

from densepred.registry import MODELS
from densepred.structures import Features


@MODELS.register_module()
class StackedMaps(nn.Module):
    """The encoder's last map for the head, and the earlier ones for deep supervision; all have one stride.

    Args:
        in_channels: channels of the encoder's maps, the first stack's first.
        in_strides: their strides.

    Attributes:
        channels: of ``Features.pixels``, the last map.
        deep_channels: of ``Features.deep``, the maps before it.
        level_channels: empty.

    Raises:
        ValueError: the maps have several strides: they are a pyramid, not stacks.
    """

    def __init__(self, in_channels: Sequence[int], in_strides: Sequence[int]) -> None:
        super().__init__()
        if len(set(in_strides)) > 1:
            raise ValueError(
                f"StackedMaps: the encoder's maps have the strides {list(in_strides)}, but stacks have one; take a decoder "
                "that merges a pyramid, or one name in encoder.out_features"
            )
        *self.deep_channels, self.channels = in_channels
        self.level_channels = []

    def forward(self, maps: list[Tensor]) -> Features:
        """Hand on the encoder's maps (B, C_i, h, w)."""
        return Features(pixels=maps[-1], levels=[], encoder=maps, deep=list(maps[:-1]))
