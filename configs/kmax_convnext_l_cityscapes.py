"""kMaX-DeepLab, ConvNeXt-L, Cityscapes panoptic. Published (val): PQ 68.4, AP 45.1, mIoU 83.0."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_panoptic.py",
    "_base_/models/kmax_r50_cityscapes.py",
    "_base_/schedules/kmax.py",
]

model = dict(
    encoder=dict(
        _delete_=True,
        type="ConvNeXt",
        arch="large",
        out_features=("stem", "res2", "res3", "res4", "res5"),
        drop_path_rate=0.6,
        kmax_padding=True,
        init_cfg=None,
    )
)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
train_cfg = dict(max_iters=60_000)
auto_scale_lr = dict(base_batch_size=32)
