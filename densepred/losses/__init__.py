"""Losses and matching: pure functions on tensors, and the modules that hold their numbers."""

from densepred.losses.category_consistent import CategoryConsistentLoss
from densepred.losses.kmax import KMaXCriterion
from densepred.losses.mask2former import Mask2FormerCriterion
from densepred.losses.matcher import hungarian_match
from densepred.losses.semantic import CrossEntropyLoss

__all__ = ["CategoryConsistentLoss", "CrossEntropyLoss", "KMaXCriterion", "Mask2FormerCriterion", "hungarian_match"]
