"""PSPNet as mmsegmentation builds it, ResNet-50, Cityscapes. Published: mIoU 78.55 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/dilated_resnet.py",
    "_base_/schedules/sgd_poly.py",
]

model = dict(decoder=dict(type="PSPDecoder", channels=512, pool_scales=(1, 2, 3, 6), align_corners=False))
