"""ECO-M2F, Swin-T, Cityscapes panoptic, step 3: the gate alone, for one beta (the PQ that a layer less is worth).

Before it, step 2: tools/eco_derive.py configs/eco_m2f_swin_t_cityscapes.py PARENT.pth --out derived.json
Published at beta 0.003: PQ 64.18, AP 39.64, mIoU 80.49; at 0.01, batch 4: PQ 62.09 (val).
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_crop.py",
    "_base_/models/eco_m2f.py",
    "_base_/schedules/eco_m2f_gate.py",
]

derived = "work_dirs/eco_m2f_swin_t_cityscapes/derived.json"
beta = 0.003
model = dict(train="gate")
train_dataset = dict(_delete_=True, type="GateDataset", derived="${derived}", beta="${beta}")
train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)  # a vector an image
param_scheduler = [dict(type="WarmupPolyLR", warmup_iters=0, power=0.9, end="${train_cfg.max_iters}")]
train_cfg = dict(max_iters=50_000, val_interval=2000)
val_evaluator = dict(panoptic=[dict(type="PanopticQuality"), dict(type="EncoderDepth")])
default_hooks = dict(parent=dict(type="GateParentHook"))
