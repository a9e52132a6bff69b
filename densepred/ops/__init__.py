"""Operators behind ``torch.library``: no registry, no MMEngine here."""

from densepred.ops.bilevel_routing_attention import bilevel_routing_attention, route_regions
from densepred.ops.criss_cross_attention import criss_cross_attention, criss_cross_attention_3d
from densepred.ops.kmeans_attention import kmeans_attention
from densepred.ops.linear_resize import Taps, linear_taps
from densepred.ops.mask_argmax import mask_argmax, mask_owner
from densepred.ops.modulated_deform_conv2d import ModulatedDeformConv2d, modulated_deform_conv2d
from densepred.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused
from densepred.ops.point_sample_mask_loss import (
    point_mask_losses,
    point_matching_costs,
    sample_points,
    uncertain_points,
)
from densepred.ops.polygon_iou import polygon_areas, polygon_iou
from densepred.ops.varying_window_attention import varying_window_attention

__all__ = [
    "ModulatedDeformConv2d",
    "Taps",
    "bilevel_routing_attention",
    "criss_cross_attention",
    "criss_cross_attention_3d",
    "kmeans_attention",
    "linear_taps",
    "mask_argmax",
    "mask_owner",
    "modulated_deform_conv2d",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "point_mask_losses",
    "point_matching_costs",
    "polygon_areas",
    "polygon_iou",
    "route_regions",
    "sample_points",
    "uncertain_points",
    "varying_window_attention",
]
