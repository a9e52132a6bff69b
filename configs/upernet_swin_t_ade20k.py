"""UPerNet on Swin-T as mmsegmentation builds it, ADE20K. Published: mIoU 44.41 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/upernet.py",
    "_base_/schedules/adamw_poly.py",
]

model = dict(
    encoder=dict(
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
        custom_keys=dict(norm=dict(decay_mult=0.0), relative_position_bias_table=dict(decay_mult=0.0)),
    ),
)
