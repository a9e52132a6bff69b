"""Heads: features -> predictions, their loss, their post-processing."""

from densepred.heads.kmax import KMaXHead
from densepred.heads.mask2former import Mask2FormerHead
from densepred.heads.polygon import PolygonHead
from densepred.heads.semantic import SemanticHead

__all__ = ["KMaXHead", "Mask2FormerHead", "PolygonHead", "SemanticHead"]
