"""CenterPoly, DLA-34 with deformable convolutions, Cityscapes: in the official code, never published with results."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/centerpoly.py",
    "_base_/datasets/cityscapes_polygons.py",
    "_base_/schedules/centerpoly.py",
]

model = dict(encoder=dict(_delete_=True, type="DLA34", init_cfg=None), decoder=dict(type="DLAUp"))
train_dataloader = dict(batch_size=4)
