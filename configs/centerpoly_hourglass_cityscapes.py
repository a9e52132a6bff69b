"""CenterPoly v2, small hourglass, Cityscapes. Published: AP 16.64, AP50 39.42 (test).

The published training starts from CenterNet's hourglass on COCO (encoder.init_cfg).
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/centerpoly.py",
    "_base_/datasets/cityscapes_polygons.py",
    "_base_/schedules/centerpoly.py",
]

train_dataloader = dict(batch_size=4)
