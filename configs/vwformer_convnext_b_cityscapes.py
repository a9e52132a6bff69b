"""VWFormer, ConvNeXt-B (ImageNet-22k), Cityscapes. Published: mIoU 83.2 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/vwformer.py",
]

model = dict(encoder=dict(arch="base"), decoder=dict(variant="cityscapes"))
