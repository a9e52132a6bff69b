"""Operators behind ``torch.library``: no registry, no MMEngine here."""

from densepred.ops.kmeans_attention import kmeans_attention

__all__ = ["kmeans_attention"]
