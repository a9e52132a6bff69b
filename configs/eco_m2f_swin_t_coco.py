"""ECO-M2F, Swin-T, COCO panoptic, step 1: the parent, trained so that its encoder can stop after any depth.

Step 2: tools/eco_derive.py; step 3: eco_m2f_swin_t_coco_gate.py. The parent's schedule was not published; this is
Mask2Former's.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_lsj.py",
    "_base_/models/eco_m2f.py",
    "_base_/schedules/mask2former_coco.py",
]

optim_wrapper = dict(
    paramwise_cfg=dict(
        no_decay=["query_feat", "query_embed", "head.level_embed", "relative_position_bias_table"],
    ),
)
val_evaluator = dict(panoptic=[dict(type="PanopticQuality"), dict(type="EncoderDepth")])
find_unused_parameters = True  # layers beyond a step's depth get no gradient
