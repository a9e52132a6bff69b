"""Heads: features -> predictions, their loss, their post-processing."""

from densepred.heads.kmax import KMaXHead

__all__ = ["KMaXHead"]
