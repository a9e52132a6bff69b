"""CenterPoly, ResNet-101 with deformable convolutions, Cityscapes: a network of its first version.

The published training starts the encoder from ImageNet weights (encoder.init_cfg).
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/centerpoly.py",
    "_base_/datasets/cityscapes_polygons.py",
    "_base_/schedules/centerpoly.py",
]

model = dict(
    encoder=dict(_delete_=True, type="ResNet", depth=101, init_cfg=None),
    decoder=dict(type="DeconvDecoder", widths=(256, 128, 64)),
    head=dict(head_channels=64),
)
train_dataloader = dict(batch_size=4)
