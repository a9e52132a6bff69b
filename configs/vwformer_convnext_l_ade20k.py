"""VWFormer, ConvNeXt-L (ImageNet-22k), ADE20K, 640 x 640 crops. Published: mIoU 54.3 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/vwformer.py",
]

image_size = (640, 640)
base_size = (2560, 640)
test_short_edge = 640
test_max_size = 2560
test_multiple = 64
model = dict(encoder=dict(arch="large"))
