"""Small data sets from ImageNet weights (CamVid) or from none (microscopy, Shapes): AdamW, short warm-up, polynomial decay.

Our own; the encoder learns at three tenths of the rate where it starts from ImageNet (paramwise_cfg.lr_mult).
"""

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="DecayGroupsConstructor",
    optimizer=dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=dict(lr_mult=dict(encoder=0.3)),
)
param_scheduler = [dict(type="WarmupPolyLR", warmup_iters=100, power=0.9, end="${train_cfg.max_iters}")]
train_cfg = dict(type="SeekableTrainLoop", max_iters=10_000, val_interval=500)
auto_scale_lr = dict(enable=False, base_batch_size=8)
sync_bn = "torch"
