"""CCNet, ResNet-50, CamVid, for ImageNet weights (model.encoder.init_cfg). Its paper's CamVid figures are a video model's."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/camvid.py",
    "_base_/models/dilated_resnet.py",
    "_base_/schedules/small_sets.py",
]

model = dict(
    decoder=dict(type="CCNetDecoder", channels=512, recurrence=2, negative_slope=0.0, embedding_channels=16),
    head=dict(
        losses=[dict(type="CrossEntropyLoss", class_weight="${class_weight}")],
        auxiliary=dict(losses=[dict(type="CrossEntropyLoss")]),
        embedding_loss=dict(type="CategoryConsistentLoss"),
    ),
)
train_dataloader = dict(batch_size=8)
