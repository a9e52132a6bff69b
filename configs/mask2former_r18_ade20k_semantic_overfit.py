"""A small Mask2Former on three ADE20K images until it knows them by heart; mIoU should pass 90."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

image_size = (320, 320)
indices = [0, 1, 2]
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
train_dataloader = dict(batch_size=3, num_workers=1)
train_dataset = dict(split="val", indices="${indices}")
val_dataloader = dict(num_workers=1)
val_dataset = dict(indices="${indices}")
model = dict(
    encoder=dict(depth=18, frozen_norm=False),
    decoder=dict(embed_dim=128, mask_dim=128, num_layers=3, ffn_dim=512),
    head=dict(embed_dim=128, ffn_dim=512, num_layers=6, num_queries=40, criterion=dict(num_points=4096)),
)
optim_wrapper = dict(
    optimizer=dict(lr=5e-4, weight_decay=0.0),
    clip_grad=dict(max_norm=1.0),
    paramwise_cfg=dict(lr_mult=dict(encoder=1.0)),
)
param_scheduler = [dict(type="WarmupPolyLR", warmup_iters=20, end="${train_cfg.max_iters}")]
train_cfg = dict(max_iters=300, val_interval=100)
auto_scale_lr = dict(base_batch_size=3)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=100),
    norm_momentum=dict(type="BatchNormMomentumHook", momentum=0.2),
)
