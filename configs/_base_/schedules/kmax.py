"""kMaX-DeepLab's schedule with COCO's numbers: AdamW, linear warm-up, polynomial decay, no gradient clipping.

The published training used mixed precision: add --amp. BatchNorm statistics are those of all processes.
(The TensorFlow original: AdamW with eps 1e-7.)
"""

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="DecayGroupsConstructor",  # no weight decay for norms, biases and layer scales, in the encoder too
    optimizer=dict(type="AdamW", lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    paramwise_cfg=dict(
        lr_mult=dict(encoder=0.1),
        no_decay=["cluster_centers", "query_positions", "key_positions", "value_positions"],
    ),
)
param_scheduler = [
    dict(
        type="WarmupPolyLR",
        warmup_iters=5000,
        warmup_factor=0.001,
        power=0.9,
        end="${train_cfg.max_iters}",
    )
]
train_cfg = dict(type="SeekableTrainLoop", max_iters=150_000, val_interval=5000)
auto_scale_lr = dict(enable=False, base_batch_size=64)
sync_bn = "torch"
