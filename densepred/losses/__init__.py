"""Losses and matching: pure functions on tensors, and the modules that hold their numbers."""

from densepred.losses.boundary import BoundaryLoss
from densepred.losses.category_consistent import CategoryConsistentLoss
from densepred.losses.kmax import KMaXCriterion
from densepred.losses.mask2former import Mask2FormerCriterion
from densepred.losses.matcher import hungarian_match
from densepred.losses.ohem import OHEMCrossEntropyLoss
from densepred.losses.semantic import CrossEntropyLoss, DiceLoss, FocalLoss, LovaszLoss

__all__ = [
    "BoundaryLoss",
    "CategoryConsistentLoss",
    "CrossEntropyLoss",
    "DiceLoss",
    "FocalLoss",
    "KMaXCriterion",
    "LovaszLoss",
    "Mask2FormerCriterion",
    "OHEMCrossEntropyLoss",
    "hungarian_match",
]
