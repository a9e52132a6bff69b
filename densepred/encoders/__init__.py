"""Encoders: images -> a pyramid of maps."""

from densepred.encoders.convnext import ConvNeXt
from densepred.encoders.efficientnet_lite import EfficientNetLite
from densepred.encoders.resnet import ResNet
from densepred.encoders.swin import SwinTransformer

__all__ = ["ConvNeXt", "EfficientNetLite", "ResNet", "SwinTransformer"]
