"""Mask2Former's schedule for COCO: 50 epochs of 118k images, the rate drops twice.

The published training used mixed precision with the pixel decoder in float32: add --amp.
"""

optim_wrapper = dict(
    type="OptimWrapper",
    constructor="DecayGroupsConstructor",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    clip_grad=dict(max_norm=0.01, norm_type=2),
    paramwise_cfg=dict(
        lr_mult=dict(encoder=0.1),
        no_decay=["query_feat", "query_embed", "head.level_embed"],
        decay_biases=True,  # all but those of norms
    ),
)
param_scheduler = [dict(type="MultiStepLR", milestones=[327_778, 355_092], gamma=0.1, by_epoch=False)]
train_cfg = dict(type="SeekableTrainLoop", max_iters=368_750, val_interval=5000)
auto_scale_lr = dict(enable=False, base_batch_size=16)
