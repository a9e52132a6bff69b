"""CenterPoly v2, small hourglass, KITTI. Published: AP 8.86, AP50 26.86 (test).

Depth ranks mean nothing there and are not learnt. The published training starts from the Cityscapes model (load_from); it
gives the ImageNet mean of RGB to images in BGR. Frames are letter-boxed.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/centerpoly.py",
    "_base_/datasets/cityscapes_polygons.py",
    "_base_/schedules/centerpoly.py",
]

data_root = "datasets/kitti"
dataset_type = "KITTIPolygons"
depth_weight = 0.0
compose = "kitti"
model = dict(data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]))
val_evaluator = dict(instance=[dict(type="CocoInstance"), dict(type="PolygonFiles", layout="kitti")])
train_cfg = dict(max_iters=11_400, val_interval=1140)
param_scheduler = [dict(type="MultiStepLR", milestones=[4275, 5700], gamma=0.1, by_epoch=False)]
train_dataloader = dict(batch_size=4)
