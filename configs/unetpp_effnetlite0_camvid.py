"""UNet++ on EfficientNet-Lite0, CamVid, deeply supervised; the ImageNet weights come with densepred[pretrained]."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/camvid.py",
    "_base_/models/unetpp.py",
    "_base_/schedules/small_sets.py",
]

model = dict(
    encoder=dict(
        _delete_=True,
        type="EfficientNetLite",
        arch="lite0",
        out_features=("res1", "res2", "res3", "res4", "res5"),
        init_cfg=dict(type="Pretrained", checkpoint="package:efficientnet-lite0"),
    ),
    head=dict(losses=[dict(type="CrossEntropyLoss", class_weight="${class_weight}")]),
)
train_dataloader = dict(batch_size=8)
