"""UNet++ of the papers on nuclei of the 2018 Data Science Bowl. Published: IoU 92.52 (their split, 96 x 96 pixels)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/microscopy.py",
    "_base_/models/unetpp_original.py",
    "_base_/schedules/small_sets.py",
]

image_size = (96, 96)
dataset_type = "DSB2018Nuclei"
data_root = "datasets/dsb2018"
optim_wrapper = dict(optimizer=dict(lr=3e-4), paramwise_cfg=dict(lr_mult=dict(encoder=1.0)))
train_dataloader = dict(batch_size=16)
auto_scale_lr = dict(base_batch_size=16)
