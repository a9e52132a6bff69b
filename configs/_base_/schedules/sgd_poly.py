"""SGD with polynomial decay to 1e-4 and no warm-up, weight decay on everything: mmsegmentation's convolutional models."""

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=5e-4),
)
param_scheduler = [
    dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end="${train_cfg.max_iters}", by_epoch=False),
]
train_cfg = dict(type="SeekableTrainLoop", max_iters=80_000, val_interval=8000)
auto_scale_lr = dict(enable=False, base_batch_size=8)
sync_bn = "torch"
