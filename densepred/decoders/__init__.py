"""Decoders: the encoder's pyramid -> `densepred.structures.Features`."""

from densepred.decoders.adaptive import AdaptiveExit
from densepred.decoders.aspp import ASPPDecoder
from densepred.decoders.ccnet import CCNetDecoder, CrissCrossAttention
from densepred.decoders.deconv import DeconvDecoder
from densepred.decoders.deformable import DeformablePixelDecoder
from densepred.decoders.dla_up import DLAUp
from densepred.decoders.fcn import FCNDecoder
from densepred.decoders.fpn import FPNDecoder
from densepred.decoders.kmax import KMaXPixelDecoder
from densepred.decoders.nonlocal_block import NonLocalDecoder
from densepred.decoders.psp import PSPDecoder
from densepred.decoders.segformer import SegFormerDecoder
from densepred.decoders.stacked import StackedMaps
from densepred.decoders.unetpp import UNetPlusPlusDecoder
from densepred.decoders.uper import UPerDecoder
from densepred.decoders.vwformer import VWFormerDecoder

__all__ = [
    "ASPPDecoder",
    "AdaptiveExit",
    "CCNetDecoder",
    "CrissCrossAttention",
    "DLAUp",
    "DeconvDecoder",
    "DeformablePixelDecoder",
    "FCNDecoder",
    "FPNDecoder",
    "KMaXPixelDecoder",
    "NonLocalDecoder",
    "PSPDecoder",
    "SegFormerDecoder",
    "StackedMaps",
    "UNetPlusPlusDecoder",
    "UPerDecoder",
    "VWFormerDecoder",
]
