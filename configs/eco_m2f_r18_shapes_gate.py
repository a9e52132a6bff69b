"""ECO-M2F in small on Shapes, step 3: the gate alone, for one beta (the PQ that a layer less is worth), in seconds.

Before it, step 2: tools/eco_derive.py configs/eco_m2f_r18_shapes.py PARENT.pth --out derived.json
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/shapes_lsj.py",
    "_base_/models/eco_m2f.py",
    "_base_/schedules/eco_m2f_gate.py",
]

derived = "work_dirs/eco_m2f_r18_shapes/derived.json"
beta = 0.005
model = dict(
    train="gate",
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
train_dataset = dict(_delete_=True, type="GateDataset", derived="${derived}", beta="${beta}")
train_dataloader = dict(batch_size=64, num_workers=0, persistent_workers=False)  # a vector an image
optim_wrapper = dict(optimizer=dict(lr=1e-3))
train_cfg = dict(max_iters=2000, val_interval=1000)
auto_scale_lr = dict(base_batch_size=64)
val_evaluator = dict(panoptic=[dict(type="PanopticQuality"), dict(type="EncoderDepth")])
default_hooks = dict(logger=dict(interval=200), checkpoint=dict(interval=1000), parent=dict(type="GateParentHook"))
val_dataloader = dict(batch_size=8, num_workers=1)
