"""CCNet as mmsegmentation builds it, ResNet-50, Cityscapes. Published: mIoU 79.03 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/dilated_resnet.py",
    "_base_/schedules/sgd_poly.py",
]

model = dict(decoder=dict(type="CCNetDecoder", channels=512, recurrence=2, negative_slope=0.0))
