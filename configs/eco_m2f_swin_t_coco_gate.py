"""ECO-M2F, Swin-T, COCO panoptic, step 3: the gate alone, for one beta (the PQ that a layer less is worth).

Before it, step 2: tools/eco_derive.py configs/eco_m2f_swin_t_coco.py PARENT.pth --out derived.json
Published at beta 0.0005: PQ 52.06, AP 41.51, mIoU 62.76; at 0.02: PQ 50.79 (COCO val).
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_lsj.py",
    "_base_/models/eco_m2f.py",
    "_base_/schedules/eco_m2f_gate.py",
]

derived = "work_dirs/eco_m2f_swin_t_coco/derived.json"
beta = 0.0005
model = dict(train="gate")
train_dataset = dict(_delete_=True, type="GateDataset", derived="${derived}", beta="${beta}")
train_dataloader = dict(batch_size=8, num_workers=0, persistent_workers=False)  # a vector an image
val_evaluator = dict(panoptic=[dict(type="PanopticQuality"), dict(type="EncoderDepth")])
default_hooks = dict(parent=dict(type="GateParentHook"))
