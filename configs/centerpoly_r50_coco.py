"""CenterPoly on ResNet-50 and a feature pyramid, COCO instances as polygons of 32 vertices, ours.

The encoder starts from ImageNet weights (encoder.init_cfg); an epoch has 7,330 steps of 16 images.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/polygons.py",
    "_base_/datasets/coco_polygons.py",
    "_base_/schedules/centerpoly.py",
]

model = dict(
    encoder=dict(type="ResNet", depth=50, init_cfg=None),
    decoder=dict(type="FPNDecoder", pyramid_channels=256, channels=128),
    head=dict(head_channels=128),
)
train_cfg = dict(max_iters=175_920, val_interval=14_660)
param_scheduler = [dict(type="MultiStepLR", milestones=[117_280, 161_260], gamma=0.1, by_epoch=False)]
train_dataloader = dict(batch_size=16)
auto_scale_lr = dict(base_batch_size=16)
