"""kMaX-DeepLab, ResNet-50, Cityscapes panoptic. Published (val): PQ 63.5, AP 38.6, mIoU 79.5."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_panoptic.py",
    "_base_/models/kmax_r50_cityscapes.py",
    "_base_/schedules/kmax.py",
]

optim_wrapper = dict(optimizer=dict(lr=3e-4))
train_cfg = dict(max_iters=60_000)
auto_scale_lr = dict(base_batch_size=32)
