"""VWFormer, MiT-B2, ADE20K. Its paper reports mIoU 48.1 (val).

Composed: the authors published no config with MiT. Their ADE20K head on SegFormer's encoder, with SegFormer's schedule.
Nor does the published head account for the paper's parameters of this size.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/adamw_poly.py",
]

test_multiple = 64
model = dict(
    encoder=dict(
        _delete_=True,
        type="MixVisionTransformer",
        arch="b2",
        drop_path_rate=0.1,
        reduction_norm_eps=1e-5,
        init_cfg=None,
    ),
    decoder=dict(channels=512),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys=dict(norm=dict(decay_mult=0.0), decoder=dict(lr_mult=10.0), head=dict(lr_mult=10.0)),
    ),
)
