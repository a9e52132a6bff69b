"""Mask2Former, Swin-L (ImageNet-22k), COCO panoptic. Published: PQ 57.8, AP 48.6, mIoU 67.4 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_lsj.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_coco.py",
]

model = dict(
    encoder=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dim=192,
        depths=(2, 2, 18, 2),
        num_heads=(6, 12, 24, 48),
        window_size=12,
        drop_path_rate=0.3,
        init_cfg=None,
    ),
    head=dict(num_queries=200),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        no_decay=["query_feat", "query_embed", "head.level_embed", "relative_position_bias_table"],
    ),
)
param_scheduler = [dict(type="MultiStepLR", milestones=[655_556, 710_184], gamma=0.1, by_epoch=False)]
train_cfg = dict(max_iters=737_500)
