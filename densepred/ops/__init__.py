"""Operators behind ``torch.library``: no registry, no MMEngine here."""

from densepred.ops.criss_cross_attention import criss_cross_attention, criss_cross_attention_3d
from densepred.ops.kmeans_attention import kmeans_attention
from densepred.ops.ms_deform_attn import ms_deform_attn
from densepred.ops.varying_window_attention import varying_window_attention

__all__ = [
    "criss_cross_attention",
    "criss_cross_attention_3d",
    "kmeans_attention",
    "ms_deform_attn",
    "varying_window_attention",
]
