"""A small Mask2Former on the instances of five COCO images until it knows them by heart; AP should pass 90."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_lsj.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

num_classes = 80
thing_classes = list(range(80))
tasks = ["instance"]
image_size = (320, 320)
indices = [3, 10, 11, 45, 69]
dataset_type = "CocoInstances"
load_labels = dict(type="LoadInstances")
train_annotations = "annotations/instances_train2017.json"
val_annotations = "annotations/instances_train2017.json"
train_pipeline = [
    dict(type="LoadImage"),
    "${load_labels}",
    dict(type="ResizeToFit", size="${image_size}"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="ResizeToFit", size="${image_size}"),
    "${load_labels}",
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=5, num_workers=1)
train_dataset = dict(indices="${indices}", filter_empty=False)
val_dataloader = dict(num_workers=1)
val_dataset = dict(image_dir="train2017", indices="${indices}")
val_evaluator = dict(instance=dict(ann_file="annotations/instances_train2017.json"))
model = dict(
    encoder=dict(depth=18, frozen_norm=False),
    decoder=dict(embed_dim=128, mask_dim=128, num_layers=3, ffn_dim=512),
    head=dict(embed_dim=128, ffn_dim=512, num_layers=6, num_queries=20, criterion=dict(num_points=4096)),
)
optim_wrapper = dict(
    optimizer=dict(lr=5e-4, weight_decay=0.0),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(lr_mult=dict(encoder=1.0)),
)
param_scheduler = [dict(type="WarmupPolyLR", warmup_iters=20, end="${train_cfg.max_iters}")]
train_cfg = dict(max_iters=400, val_interval=100)
auto_scale_lr = dict(base_batch_size=5)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=100),
    norm_momentum=dict(type="BatchNormMomentumHook", momentum=0.2),
)
