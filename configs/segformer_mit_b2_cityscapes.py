"""SegFormer-B2 with mmsegmentation's head, Cityscapes, 1024 x 1024 crops. Published: mIoU 81.08 (val, sliding windows)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/segformer.py",
    "_base_/schedules/adamw_poly.py",
]

image_size = (1024, 1024)
model = dict(encoder=dict(arch="b2"), sliding=dict(size=(1024, 1024), stride=(768, 768)))
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(norm=dict(decay_mult=0.0), decoder=dict(lr_mult=10.0), head=dict(lr_mult=10.0)),
    ),
)
auto_scale_lr = dict(base_batch_size=8)
