"""Mask2Former, ResNet-50, ADE20K panoptic. Published: PQ 39.7, AP 26.5, mIoU 46.1 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

thing_classes = [
    7, 8, 10, 12, 14, 15, 18, 19, 20, 22, 23, 24, 27, 30, 31, 32, 33, 35, 36, 37,
    38, 39, 41, 42, 43, 44, 45, 47, 49, 50, 53, 55, 56, 57, 58, 62, 64, 65, 66, 67,
    69, 70, 71, 72, 73, 74, 75, 76, 78, 80, 81, 82, 83, 85, 86, 87, 88, 89, 90, 92,
    93, 95, 97, 98, 102, 103, 104, 107, 108, 110, 111, 112, 115, 116, 118, 119, 120, 121, 123, 124,
    125, 126, 127, 129, 130, 132, 133, 134, 135, 136, 137, 138, 139, 142, 143, 144, 146, 147, 148, 149,
]  # fmt: skip
tasks = ["panoptic"]  # also of semantic, instance
dataset_type = "ADE20KPanoptic"
load_labels = dict(type="LoadPanoptic")
image_size = (640, 640)
train_short_edges = [64 * i for i in range(5, 21)]
train_max_size = 2560
test_short_edge = 640
test_max_size = 2560
