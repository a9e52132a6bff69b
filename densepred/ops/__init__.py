"""Operators behind ``torch.library``: no registry, no MMEngine here."""

from densepred.ops.kmeans_attention import kmeans_attention
from densepred.ops.ms_deform_attn import ms_deform_attn

__all__ = ["kmeans_attention", "ms_deform_attn"]
