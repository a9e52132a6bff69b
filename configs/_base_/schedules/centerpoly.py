"""CenterPoly's schedule for Cityscapes on one GPU: Adam, batch 4, 240 epochs, a tenth of the rate from epochs 90 and 120 on."""

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="Adam", lr=2e-4))
train_cfg = dict(type="SeekableTrainLoop", max_iters=178_560, val_interval=17_856)
param_scheduler = [dict(type="MultiStepLR", milestones=[66_960, 89_280], gamma=0.1, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=4)
sync_bn = "torch"
