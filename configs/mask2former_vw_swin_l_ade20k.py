"""Mask2Former with VWFormer's pixel decoder, Swin-L (ImageNet-22k), ADE20K semantic. Published: mIoU 56.5 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

image_size = (640, 640)
train_short_edges = [64 * i for i in range(5, 21)]
train_max_size = 2560
test_short_edge = 640
test_max_size = 2560
model = dict(
    data_preprocessor=dict(size_divisor=64),
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
    decoder=dict(_delete_=True, type="VWFormerDecoder", variant="mask2former", channels=512, mask_dim=256),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        no_decay=["query_feat", "query_embed", "head.level_embed", "relative_position_bias_table"],
    ),
)
