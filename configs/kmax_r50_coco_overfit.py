"""Can this set-up learn at all? kMaX-DeepLab R50 on five COCO images until it knows them by heart; PQ should pass 90.

Choose the images with indices; train and validation read the same ones. All five make every batch, nothing is augmented or
dropped, and batch norms average quickly, so that their statistics in evaluation are those of training.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_panoptic.py",
    "_base_/models/kmax_r50.py",
    "_base_/schedules/kmax.py",
]

image_size = (225, 225)
indices = [3, 10, 15, 69, 91]
train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPanoptic"),
    dict(type="ResizeToFit", size="${image_size}"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(batch_size=5, num_workers=1)
train_dataset = dict(indices="${indices}")
val_dataloader = dict(num_workers=1)
val_dataset = dict(ann_file="annotations/panoptic_train2017.json", image_dir="train2017", indices="${indices}")
model = dict(
    head=dict(drop_path=0.0, mask_scale=2.0, aux_semantic=None, criterion=dict(insdis_sample_k=512)),
)
optim_wrapper = dict(optimizer=dict(lr=1e-3, weight_decay=0.0), paramwise_cfg=dict(lr_mult=dict(encoder=1.0)))
param_scheduler = [dict(type="WarmupPolyLR", warmup_iters=20, end="${train_cfg.max_iters}")]
train_cfg = dict(max_iters=200, val_interval=50)
auto_scale_lr = dict(base_batch_size=5)
default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(interval=50),
    norm_momentum=dict(type="BatchNormMomentumHook", momentum=0.1),
)
