"""VWFormer, Swin-B (ImageNet-1k at 384; the published name says 22K), ADE20K, 640 x 640 crops. Published: mIoU 52.5 (val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/vwformer.py",
]

image_size = (640, 640)
base_size = (2560, 640)
test_short_edge = 640
test_max_size = 2560
test_multiple = 64
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
optim_wrapper = dict(paramwise_cfg=dict(decay_rate=0.85))
