"""Semantic FPN on BiFormer-S, ADE20K. Published: mIoU 48.9 (val).

BiFormer-B (49.9): encoder.embed_dim=96, encoder.drop_path_rate=0.3. No T is published for ADE20K:
encoder.depths=(2,2,8,2). The published training used mixed precision: add --amp.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/fpn.py",
    "_base_/schedules/adamw_poly.py",
]

test_multiple = 32
warmup_iters = 1000
model = dict(
    encoder=dict(
        type="BiFormer",
        embed_dim=64,
        depths=(4, 4, 18, 4),
        regions_per_side=8,
        drop_path_rate=0.15,
        init_cfg=None,
    ),
)
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=1e-4))
param_scheduler = [  # the warm-up multiplies a cosine that runs from the first step, as in the authors' MMCV
    dict(type="LinearLR", start_factor=0.1, begin=0, end="${warmup_iters}", by_epoch=False),
    dict(type="CosineAnnealingLR", eta_min_ratio=1e-8, begin=0, end="${train_cfg.max_iters}", by_epoch=False),
]
train_cfg = dict(max_iters=80_000, val_interval=8_000)
auto_scale_lr = dict(base_batch_size=32)
