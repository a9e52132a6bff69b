"""The light polygon model on the first eight training frames of Cityscapes until it knows them by heart; AP50 should pass 80.

Polygons come from the instance maps here, so that no file of polygons is needed.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/polygons.py",
    "_base_/datasets/cityscapes_polygons.py",
    "_base_/schedules/small_sets.py",
]

image_size = (256, 512)
dataset_type = "CityscapesInstances"
indices = 8
val_split = "train"
train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPolygons", num_vertices="${num_vertices}"),
    dict(type="PolygonWindow", size="${image_size}", random=False),
    dict(type="PackSegInputs"),
]
train_dataset = dict(indices="${indices}")
val_dataset = dict(indices="${indices}")
model = dict(
    encoder=dict(
        type="EfficientNetLite", arch="lite0", init_cfg=dict(type="Pretrained", checkpoint="package:efficientnet-lite0")
    ),
    decoder=dict(type="FPNDecoder", pyramid_channels=64, channels=64),
    head=dict(head_channels=64),
)
optim_wrapper = dict(paramwise_cfg=dict(lr_mult=dict(encoder=1.0)))
train_cfg = dict(max_iters=400, val_interval=100)
train_dataloader = dict(batch_size=4, num_workers=1)
val_dataloader = dict(num_workers=1)
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=100),
    norm_momentum=dict(type="BatchNormMomentumHook", momentum=0.2),
)
