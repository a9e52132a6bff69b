"""kMaX-DeepLab, ResNet-50, COCO panoptic. Published: PQ 53.3, things 58.8, stuff 45.0 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_panoptic.py",
    "_base_/models/kmax_r50.py",
    "_base_/schedules/kmax.py",
]
