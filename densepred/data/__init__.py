"""Data sets, transforms and the preprocessor."""

from densepred.data.ade20k import ADE20KPanoptic, ADE20KSemantic
from densepred.data.augmentations import Albumentations
from densepred.data.binary import ISBI2012, DSB2018Nuclei
from densepred.data.camvid import CamVid
from densepred.data.cityscapes import CityscapesInstances, CityscapesPanoptic, CityscapesSemantic
from densepred.data.coco import CocoPanoptic
from densepred.data.copy_paste import CopyPaste
from densepred.data.derived import GateDataset, LoadIdealDepth
from densepred.data.image_folder import ImageFolderSegmentation
from densepred.data.instances import CocoInstances, LoadInstances
from densepred.data.loading import LoadImage, LoadPanoptic, LoadSemantic
from densepred.data.polygon_files import CenterPolyFile
from densepred.data.polygon_window import CenterNetColorJitter, PolygonWindow
from densepred.data.polygons import LoadPolygons
from densepred.data.preprocessor import SegPreprocessor
from densepred.data.sampler import SeekableSampler
from densepred.data.street_polygons import CityscapesPolygons, IDDPolygons, KITTIPolygons
from densepred.data.transforms import (
    LoadSemanticFromPanoptic,
    PackSegInputs,
    PadTo,
    Redraw,
    ResizeShortEdge,
    ResizeToFit,
    ScaleAndCrop,
    ScaleJitter,
    ShortEdgeJitter,
    SSDColorJitter,
)

__all__ = [
    "ISBI2012",
    "ADE20KPanoptic",
    "ADE20KSemantic",
    "Albumentations",
    "CamVid",
    "CenterNetColorJitter",
    "CenterPolyFile",
    "CityscapesInstances",
    "CityscapesPanoptic",
    "CityscapesPolygons",
    "CityscapesSemantic",
    "CocoInstances",
    "CocoPanoptic",
    "CopyPaste",
    "DSB2018Nuclei",
    "GateDataset",
    "IDDPolygons",
    "ImageFolderSegmentation",
    "KITTIPolygons",
    "LoadIdealDepth",
    "LoadImage",
    "LoadInstances",
    "LoadPanoptic",
    "LoadPolygons",
    "LoadSemantic",
    "LoadSemanticFromPanoptic",
    "PackSegInputs",
    "PadTo",
    "PolygonWindow",
    "Redraw",
    "ResizeShortEdge",
    "ResizeToFit",
    "SSDColorJitter",
    "ScaleAndCrop",
    "ScaleJitter",
    "SeekableSampler",
    "SegPreprocessor",
    "ShortEdgeJitter",
]
