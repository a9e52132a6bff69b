"""CCNet, ResNet-101, ADE20K. Published: mIoU 45.76 (val, multi-scale and flip: --tta).

The authors published neither config nor code for ADE20K; batch 16 and 150,000 iterations are the paper's, the crops
mmsegmentation's.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/ccnet.py",
    "_base_/schedules/sgd_poly.py",
]

optim_wrapper = dict(optimizer=dict(weight_decay=1e-4))
param_scheduler = [dict(type="PolyLR", power=0.9, eta_min=0.0, begin=0, end="${train_cfg.max_iters}", by_epoch=False)]
train_cfg = dict(max_iters=150_000, val_interval=10_000)
auto_scale_lr = dict(base_batch_size=16)
