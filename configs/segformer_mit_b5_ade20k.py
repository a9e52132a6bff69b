"""SegFormer-B5 with mmsegmentation's head, ADE20K. Published: mIoU 49.13 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/segformer.py",
    "_base_/schedules/adamw_poly.py",
]

model = dict(encoder=dict(arch="b5"))
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(norm=dict(decay_mult=0.0), decoder=dict(lr_mult=10.0), head=dict(lr_mult=10.0)),
    ),
)
