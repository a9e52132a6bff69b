"""Mask2Former, ResNet-50, Cityscapes semantic. Published: mIoU 79.4 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

thing_classes = None
tasks = ["semantic"]
dataset_type = "CityscapesSemantic"
load_labels = dict(type="LoadSemantic")
model = dict(encoder=dict(frozen_norm=False))
train_cfg = dict(max_iters=90_000)
