"""Mask2Former, ResNet-50, COCO panoptic. Published: PQ 51.9, AP 41.7, mIoU 61.7 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_lsj.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_coco.py",
]
