"""CCNet in small, ResNet-18 at stride 8, on the generated Shapes, from scratch, in minutes on a CPU."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/shapes_semantic.py",
    "_base_/models/dilated_resnet.py",
    "_base_/schedules/small_sets.py",
]

model = dict(
    encoder=dict(depth=18),
    decoder=dict(type="CCNetDecoder", channels=128, recurrence=2, negative_slope=0.0),
    head=dict(
        losses=[dict(type="CrossEntropyLoss")],
        auxiliary=dict(channels=64, losses=[dict(type="CrossEntropyLoss")]),
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(lr_mult=dict(encoder=1.0)))
train_cfg = dict(max_iters=900, val_interval=300)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=300))
train_dataloader = dict(batch_size=8, num_workers=1)
val_dataloader = dict(batch_size=8, num_workers=1)
