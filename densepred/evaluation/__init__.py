"""Metrics, equal to the official evaluators."""

from densepred.evaluation.depth import EncoderDepth
from densepred.evaluation.panoptic import PanopticQuality

__all__ = ["EncoderDepth", "PanopticQuality"]
