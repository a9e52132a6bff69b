"""CenterPoly v2, small hourglass, IDD, nine classes. Published: AP 17.40, AP50 45.10 (test).

The published training starts from the Cityscapes model (load_from) and cuts 32 rows above and below.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/centerpoly.py",
    "_base_/datasets/cityscapes_polygons.py",
    "_base_/schedules/centerpoly.py",
]

num_classes = 9
data_root = "datasets/idd"
dataset_type = "IDDPolygons"
compose = "idd"
whole_image = False
val_evaluator = dict(instance=[dict(type="CocoInstance"), dict(type="PolygonFiles", layout="idd")])
train_cfg = dict(max_iters=419_600, val_interval=41_960)
param_scheduler = [dict(type="MultiStepLR", milestones=[157_350, 209_800], gamma=0.1, by_epoch=False)]
train_dataloader = dict(batch_size=4)
