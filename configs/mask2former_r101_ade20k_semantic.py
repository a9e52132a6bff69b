"""Mask2Former, ResNet-101, ADE20K semantic. Published: mIoU 47.8 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

model = dict(encoder=dict(depth=101, frozen_norm=False))
