"""Metrics, equal to the official evaluators."""

from densepred.evaluation.cityscapes_instance import CityscapesInstance
from densepred.evaluation.coco_instance import CocoInstance
from densepred.evaluation.depth import EncoderDepth
from densepred.evaluation.panoptic import PanopticQuality
from densepred.evaluation.semantic import SemanticIoU

__all__ = ["CityscapesInstance", "CocoInstance", "EncoderDepth", "PanopticQuality", "SemanticIoU"]
