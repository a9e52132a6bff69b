"""SegFormer-B3 with mmsegmentation's head, ADE20K. Published: mIoU 47.82 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/segformer.py",
    "_base_/schedules/adamw_poly.py",
]

model = dict(encoder=dict(arch="b3"))
optim_wrapper = dict(paramwise_cfg=dict(lr_mult=dict(decoder=10.0, head=10.0), decay_biases=True))
