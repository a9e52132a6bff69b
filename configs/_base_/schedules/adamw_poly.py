"""AdamW with 1,500 iterations of warm-up and linear decay to 0: SegFormer and UPerNet."""

warmup_iters = 1500
optim_wrapper = dict(
    type="OptimWrapper",
    constructor="DefaultOptimWrapperConstructor",  # MMEngine's: by substrings of names, as published
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end="${warmup_iters}", by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin="${warmup_iters}", end="${train_cfg.max_iters}", by_epoch=False),
]
train_cfg = dict(type="SeekableTrainLoop", max_iters=160_000, val_interval=16_000)
auto_scale_lr = dict(enable=False, base_batch_size=16)
sync_bn = "torch"
