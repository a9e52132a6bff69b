"""Mask2Former, ResNet-50, Cityscapes instances. Published: AP 37.4 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

num_classes = 8
thing_classes = list(range(8))
tasks = ["instance"]
dataset_type = "CityscapesInstances"
load_labels = dict(type="LoadInstances")
model = dict(encoder=dict(frozen_norm=False))
train_cfg = dict(max_iters=90_000)
