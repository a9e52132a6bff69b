"""Metrics, equal to the official evaluators."""

from densepred.evaluation.panoptic import PanopticQuality

__all__ = ["PanopticQuality"]
