"""UPerNet on ConvNeXt-T as mmsegmentation builds it, ADE20K, sliding windows. Published: mIoU 46.11 (val).

The published training used mixed precision: add --amp.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/upernet.py",
    "_base_/schedules/adamw_poly.py",
]

model = dict(
    encoder=dict(
        type="ConvNeXt", arch="tiny", output_norm=True, layer_scale_init=1.0, drop_path_rate=0.4, init_cfg=None
    ),
    sliding=dict(size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    constructor="LayerDecayConstructor",
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.9, num_layers=6),
)
