"""UNet++ on ResNet-50, CamVid, deeply supervised, for ImageNet weights (model.encoder.init_cfg)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/camvid.py",
    "_base_/models/unetpp.py",
    "_base_/schedules/small_sets.py",
]

model = dict(
    encoder=dict(depth=50),
    head=dict(losses=[dict(type="CrossEntropyLoss", class_weight="${class_weight}")]),
)
train_dataloader = dict(batch_size=8)
