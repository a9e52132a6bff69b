"""CCNet, ResNet-101, Cityscapes, 769 x 769 crops, OHEM. Published: mIoU 80.0 (val, best of three, sliding windows)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_semantic.py",
    "_base_/models/ccnet.py",
    "_base_/schedules/sgd_poly.py",
]

image_size = (769, 769)
train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadSemantic"),
    dict(type="ScaleAndCrop", crop_size="${image_size}", ratios=[round(0.1 * i, 1) for i in range(7, 22)]),
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    dict(type="PackSegInputs"),
]
model = dict(sliding=dict(size=(769, 769), stride=(513, 513)))
optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end="${train_cfg.max_iters}", by_epoch=False)]
train_cfg = dict(max_iters=60_000, val_interval=6000)
