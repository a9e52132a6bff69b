"""FCN as mmsegmentation builds it, ResNet-18, Cityscapes. Published: mIoU 71.11 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/dilated_resnet.py",
    "_base_/schedules/sgd_poly.py",
]

model = dict(
    encoder=dict(depth=18),
    decoder=dict(type="FCNDecoder", channels=128, num_convs=2, concat_input=True),
    head=dict(auxiliary=dict(channels=64)),
)
