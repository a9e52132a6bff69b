"""kMaX-DeepLab, ConvNeXt-L, ADE20K panoptic. Published: PQ 50.0 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_panoptic.py",
    "_base_/models/kmax_r50.py",
    "_base_/schedules/kmax.py",
]

model = dict(
    encoder=dict(
        _delete_=True,
        type="ConvNeXt",
        arch="large",
        drop_path_rate=0.7,
        kmax_padding=True,
        init_cfg=None,
    ),
    head=dict(drop_path=0.0, class_threshold_thing=0.4, class_threshold_stuff=0.4),
)
train_cfg = dict(max_iters=100_000)
