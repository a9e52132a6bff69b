"""Metrics, equal to the official evaluators."""

from densepred.evaluation.cityscapes_instance import CityscapesInstance
from densepred.evaluation.cityscapes_semantic import CityscapesIoU
from densepred.evaluation.coco_instance import CocoInstance
from densepred.evaluation.depth import EncoderDepth
from densepred.evaluation.panoptic import PanopticQuality
from densepred.evaluation.polygon_files import PolygonFiles
from densepred.evaluation.semantic import SemanticIoU

__all__ = [
    "CityscapesInstance",
    "CityscapesIoU",
    "CocoInstance",
    "EncoderDepth",
    "PanopticQuality",
    "PolygonFiles",
    "SemanticIoU",
]
