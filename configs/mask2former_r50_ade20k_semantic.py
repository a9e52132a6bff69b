"""Mask2Former, ResNet-50, ADE20K semantic. Published: mIoU 47.2 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]
