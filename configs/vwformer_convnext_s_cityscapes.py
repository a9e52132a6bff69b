"""VWFormer, ConvNeXt-S, Cityscapes. Published: mIoU 82.2 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/vwformer.py",
]

model = dict(encoder=dict(arch="small"), decoder=dict(variant="cityscapes"))
