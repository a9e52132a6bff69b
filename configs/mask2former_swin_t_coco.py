"""Mask2Former, Swin-T, COCO panoptic. Published: PQ 53.2, AP 43.3, mIoU 63.2 (COCO val)."""

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
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.3,
        init_cfg=None,
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        no_decay=["query_feat", "query_embed", "head.level_embed", "relative_position_bias_table"],
    ),
)
