"""Mask2Former, Swin-B (ImageNet-22k), COCO panoptic. Published: PQ 56.4, AP 46.3, mIoU 67.1 (COCO val)."""

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
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        window_size=12,
        drop_path_rate=0.3,
        init_cfg=None,
    ),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        no_decay=["query_feat", "query_embed", "head.level_embed", "relative_position_bias_table"],
    ),
)
