"""VWFormer, ConvNeXt-T, Cityscapes. Published: mIoU 81.3 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/vwformer.py",
]

model = dict(decoder=dict(variant="cityscapes"))
optim_wrapper = dict(paramwise_cfg=dict(num_layers=6))
