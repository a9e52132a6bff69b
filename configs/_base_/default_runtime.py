"""What every recipe shares: seeds, data loaders, logs, checkpoints, the checks before the first step."""

seed = 0
randomness = dict(seed="${seed}")
env_cfg = dict(
    cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0), dist_cfg=dict(backend="nccl")
)
log_level = "INFO"
load_from = None
resume = False
ema = False
loggers = []

train_dataloader = dict(
    batch_size=2,  # of one process; auto_scale_lr.base_batch_size is the recipe's total over all processes
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="SeekableSampler"),
    dataset="${train_dataset}",
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="DefaultSampler", shuffle=False, round_up=False),
    dataset="${val_dataset}",
)
test_dataloader = "${val_dataloader}"
test_evaluator = "${val_evaluator}"

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="CheckpointHook", by_epoch=False, interval=5000, max_keep_ckpts=3, save_best="auto", rule="greater"
    ),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
custom_hooks = [
    dict(type="ClassCheckHook"),
    dict(type="TotalBatchHook"),
    dict(type="LoadWeightsHook"),
    dict(type="PlainMessageHubHook"),
    dict(type="IterationSeedHook"),
    dict(type="NonFiniteLossHook"),
    dict(type="MetricsFileHook"),
    dict(type="PictureGridHook"),
    dict(type="CurvesHook"),
    dict(type="ProgressHook"),
]
visualizer = dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")])
log_processor = dict(type="TableLogProcessor", by_epoch=False)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
