"""UNet++ of the papers on ISBI 2012, cell membranes in electron microscopy: 24 slices to train, 6 to validate."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/microscopy.py",
    "_base_/models/unetpp_original.py",
    "_base_/schedules/small_sets.py",
]

optim_wrapper = dict(optimizer=dict(lr=3e-4), paramwise_cfg=dict(lr_mult=dict(encoder=1.0)))
train_dataloader = dict(batch_size=8)
