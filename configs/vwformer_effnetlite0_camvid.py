"""VWFormer on EfficientNet-Lite0, CamVid; the ImageNet weights come with densepred[pretrained]."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/camvid.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/small_sets.py",
]

model = dict(
    encoder=dict(
        _delete_=True,
        type="EfficientNetLite",
        arch="lite0",
        init_cfg=dict(type="Pretrained", checkpoint="package:efficientnet-lite0"),
    ),
    decoder=dict(channels=128),
    head=dict(losses=[dict(type="CrossEntropyLoss", class_weight="${class_weight}")]),
)
train_dataloader = dict(batch_size=8)
