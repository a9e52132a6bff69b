"""Encoders: images -> a pyramid of maps."""

from densepred.encoders.biformer import BiFormer
from densepred.encoders.convnext import ConvNeXt
from densepred.encoders.dla import DLA34
from densepred.encoders.efficientnet_lite import EfficientNetLite
from densepred.encoders.hourglass import Hourglass
from densepred.encoders.mit import MixVisionTransformer
from densepred.encoders.mobilenet_v2 import MobileNetV2
from densepred.encoders.resnet import ResNet
from densepred.encoders.swin import SwinTransformer
from densepred.encoders.unet import UNetEncoder

__all__ = [
    "DLA34",
    "BiFormer",
    "ConvNeXt",
    "EfficientNetLite",
    "Hourglass",
    "MixVisionTransformer",
    "MobileNetV2",
    "ResNet",
    "SwinTransformer",
    "UNetEncoder",
]
