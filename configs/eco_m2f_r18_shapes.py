"""ECO-M2F in small, ResNet-18, on the generated Shapes, step 1: the parent, from scratch, in minutes on a CPU.

Step 2: tools/eco_derive.py; step 3: eco_m2f_r18_shapes_gate.py.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/shapes_lsj.py",
    "_base_/models/eco_m2f.py",
    "_base_/schedules/mask2former_poly.py",
]

model = dict(
    encoder=dict(_delete_=True, type="ResNet", depth=18, init_cfg=None),
    decoder=dict(decoder=dict(embed_dim=128, mask_dim=128, ffn_dim=512)),
    head=dict(
        num_queries=32,
        embed_dim=128,
        ffn_dim=512,
        num_layers=3,
        object_mask_threshold=0.4,
        criterion=dict(num_points=1024),
    ),
)
optim_wrapper = dict(optimizer=dict(lr=5e-4), paramwise_cfg=dict(lr_mult=dict(encoder=1.0)))
train_cfg = dict(max_iters=900, val_interval=300)
auto_scale_lr = dict(base_batch_size=8)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=300))
val_evaluator = dict(panoptic=[dict(type="PanopticQuality"), dict(type="EncoderDepth")])
find_unused_parameters = True  # layers beyond a step's depth get no gradient
train_dataloader = dict(batch_size=8, num_workers=1)
val_dataloader = dict(batch_size=8, num_workers=1)
