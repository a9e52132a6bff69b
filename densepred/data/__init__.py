"""Data sets, transforms and the preprocessor."""

from densepred.data.ade20k import ADE20KPanoptic
from densepred.data.cityscapes import CityscapesPanoptic
from densepred.data.coco import CocoPanoptic
from densepred.data.copy_paste import CopyPaste
from densepred.data.loading import LoadImage, LoadPanoptic
from densepred.data.preprocessor import SegPreprocessor
from densepred.data.sampler import SeekableSampler
from densepred.data.transforms import Albumentations, PackSegInputs, Redraw, ResizeToFit, ScaleJitter, SSDColorJitter

__all__ = [
    "ADE20KPanoptic",
    "Albumentations",
    "CityscapesPanoptic",
    "CocoPanoptic",
    "CopyPaste",
    "LoadImage",
    "LoadPanoptic",
    "PackSegInputs",
    "Redraw",
    "ResizeToFit",
    "SSDColorJitter",
    "ScaleJitter",
    "SeekableSampler",
    "SegPreprocessor",
]
