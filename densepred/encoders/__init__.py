"""Encoders: images -> a pyramid of maps."""

from densepred.encoders.convnext import ConvNeXt
from densepred.encoders.resnet import ResNet

__all__ = ["ConvNeXt", "ResNet"]
