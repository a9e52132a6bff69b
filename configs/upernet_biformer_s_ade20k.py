"""UPerNet on BiFormer-S, ADE20K. Published: mIoU 49.8 (val), 50.8 with several scales and flip.

BiFormer-B (51.0, 51.7): encoder.embed_dim=96, encoder.drop_path_rate=0.4. No T is published for ADE20K:
encoder.depths=(2,2,8,2). The published training used mixed precision: add --amp.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/upernet.py",
    "_base_/schedules/adamw_poly.py",
]

model = dict(
    encoder=dict(
        type="BiFormer",
        embed_dim=64,
        depths=(4, 4, 18, 4),
        regions_per_side=8,
        drop_path_rate=0.3,
        init_cfg=None,
    ),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(norm=dict(decay_mult=0.0))))
