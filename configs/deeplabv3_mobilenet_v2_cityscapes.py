"""DeepLabv3 on MobileNetV2 at output stride 8, as mmsegmentation builds it, Cityscapes. Published: mIoU 73.84 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/dilated_resnet.py",
    "_base_/schedules/sgd_poly.py",
]

model = dict(
    encoder=dict(
        _delete_=True,
        type="MobileNetV2",
        strides=(1, 2, 2, 1, 1, 1, 1),
        dilations=(1, 1, 1, 2, 2, 4, 4),
        init_cfg=None,
    ),
    decoder=dict(type="ASPPDecoder", channels=512, dilations=(1, 12, 24, 36), align_corners=False),
)
