"""Decoders: the encoder's pyramid -> `densepred.structures.Features`."""

from densepred.decoders.kmax import KMaXPixelDecoder

__all__ = ["KMaXPixelDecoder"]
