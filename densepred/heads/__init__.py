"""Heads: features -> predictions, their loss, their post-processing."""

from densepred.heads.kmax import KMaXHead
from densepred.heads.mask2former import Mask2FormerHead

__all__ = ["KMaXHead", "Mask2FormerHead"]
