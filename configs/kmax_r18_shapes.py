"""kMaX-DeepLab in small, ResNet-18, on the generated Shapes: what `make demo` trains, from scratch, in minutes on a CPU."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/shapes_panoptic.py",
    "_base_/models/kmax_r50.py",
    "_base_/schedules/kmax.py",
]

model = dict(
    encoder=dict(depth=18),
    decoder=dict(num_blocks=(1, 1, 1, 1), base_channels=(128, 64, 32, 32)),
    head=dict(
        num_queries=32,
        embed_dim=128,
        num_layers=(1, 1, 1),
        drop_path=0.0,
        mask_scale=2.0,
        aux_semantic=None,
        class_threshold_thing=0.4,
        class_threshold_stuff=0.4,
        criterion=dict(insdis_sample_k=512),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=2e-3), paramwise_cfg=dict(lr_mult=dict(encoder=1.0)))
param_scheduler = [dict(type="WarmupPolyLR", warmup_iters=50, end="${train_cfg.max_iters}")]
train_cfg = dict(max_iters=900, val_interval=300)
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(
    logger=dict(interval=25),
    checkpoint=dict(interval=300),
    norm_momentum=dict(type="BatchNormMomentumHook", momentum=0.1),
)
train_dataloader = dict(batch_size=8, num_workers=1)
val_dataloader = dict(batch_size=8, num_workers=1)
