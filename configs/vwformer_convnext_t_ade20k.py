"""VWFormer, ConvNeXt-T, ADE20K, 512 x 512 crops. Published: mIoU 47.3 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/vwformer.py",
]

test_multiple = 64
optim_wrapper = dict(paramwise_cfg=dict(num_layers=6))
