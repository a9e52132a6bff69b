"""Mask2Former, ResNet-101, COCO panoptic. Published: PQ 52.6, AP 42.6, mIoU 62.4 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_lsj.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_coco.py",
]

model = dict(encoder=dict(depth=101))
