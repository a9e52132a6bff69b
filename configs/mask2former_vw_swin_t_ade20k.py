"""Mask2Former with VWFormer's pixel decoder, Swin-T, ADE20K semantic. Published: mIoU 48.2 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

model = dict(
    data_preprocessor=dict(size_divisor=64),
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
    decoder=dict(_delete_=True, type="VWFormerDecoder", variant="mask2former", channels=512, mask_dim=256),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        no_decay=["query_feat", "query_embed", "head.level_embed", "relative_position_bias_table"],
    ),
)
