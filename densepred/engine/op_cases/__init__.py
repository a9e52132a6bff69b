"""The measured cases of all operators, a module each: inputs and baselines, written from the published formulas."""

from densepred.engine.op_cases import (
    bilevel_routing_attention,
    criss_cross_attention,
    kmeans_attention,
    mask_argmax,
    modulated_deform_conv2d,
    ms_deform_attn,
    point_sample_mask_loss,
    varying_window_attention,
)
from densepred.engine.op_cases.case import OpCase

CASES: tuple[OpCase, ...] = (
    *bilevel_routing_attention.CASES,
    *criss_cross_attention.CASES,
    *kmeans_attention.CASES,
    *mask_argmax.CASES,
    *ms_deform_attn.CASES,
    *modulated_deform_conv2d.CASES,
    *point_sample_mask_loss.CASES,
    *varying_window_attention.CASES,
)
"""In the order of the table."""

__all__ = ["CASES", "OpCase"]
