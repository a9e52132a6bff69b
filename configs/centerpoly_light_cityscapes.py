"""CenterPoly for real time, ours: EfficientNet-Lite0 and a pyramid of 64 channels, Cityscapes.

The ImageNet weights come with densepred[pretrained]. docs/results.md has the measurements that chose it.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/polygons.py",
    "_base_/datasets/cityscapes_polygons.py",
    "_base_/schedules/centerpoly.py",
]

model = dict(
    encoder=dict(
        type="EfficientNetLite", arch="lite0", init_cfg=dict(type="Pretrained", checkpoint="package:efficientnet-lite0")
    ),
    decoder=dict(type="FPNDecoder", pyramid_channels=64, channels=64),
    head=dict(head_channels=64),
)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
train_dataloader = dict(batch_size=8)
auto_scale_lr = dict(base_batch_size=8)
