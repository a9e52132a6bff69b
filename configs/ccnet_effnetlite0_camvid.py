"""CCNet on EfficientNet-Lite0 at stride 8, CamVid; the ImageNet weights come with densepred[pretrained]."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/camvid.py",
    "_base_/models/dilated_resnet.py",
    "_base_/schedules/small_sets.py",
]

model = dict(
    encoder=dict(
        _delete_=True,
        type="EfficientNetLite",
        arch="lite0",
        output_stride=8,
        init_cfg=dict(type="Pretrained", checkpoint="package:efficientnet-lite0"),
    ),
    decoder=dict(type="CCNetDecoder", channels=128, recurrence=2, negative_slope=0.0, embedding_channels=16),
    head=dict(
        losses=[dict(type="CrossEntropyLoss", class_weight="${class_weight}")],
        auxiliary=dict(channels=64, losses=[dict(type="CrossEntropyLoss")]),
        embedding_loss=dict(type="CategoryConsistentLoss"),
    ),
)
train_dataloader = dict(batch_size=8)
