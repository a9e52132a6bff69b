"""The gate of ECO-M2F by itself: AdamW at a constant rate; the published checkpoints are those that evaluated best."""

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=0.01, norm_type=2),
)
param_scheduler = []
train_cfg = dict(type="SeekableTrainLoop", max_iters=300_000, val_interval=5000)
auto_scale_lr = dict(enable=False, base_batch_size=8)
