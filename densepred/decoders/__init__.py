"""Decoders: the encoder's pyramid -> `densepred.structures.Features`."""

from densepred.decoders.adaptive import AdaptiveExit
from densepred.decoders.deformable import DeformablePixelDecoder
from densepred.decoders.kmax import KMaXPixelDecoder

__all__ = ["AdaptiveExit", "DeformablePixelDecoder", "KMaXPixelDecoder"]
