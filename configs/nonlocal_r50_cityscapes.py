"""Non-local network as mmsegmentation builds it, ResNet-50, Cityscapes. Published: mIoU 78.01 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/dilated_resnet.py",
    "_base_/schedules/sgd_poly.py",
]

model = dict(decoder=dict(type="NonLocalDecoder", channels=512, reduction=2, use_scale=True, mode="embedded_gaussian"))
