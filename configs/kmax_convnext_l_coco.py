"""kMaX-DeepLab, ConvNeXt-L, COCO panoptic. Published: PQ 57.9, things 64.3, stuff 48.4 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_panoptic.py",
    "_base_/models/kmax_r50.py",
    "_base_/schedules/kmax.py",
]

model = dict(
    encoder=dict(_delete_=True, type="ConvNeXt", arch="large", drop_path_rate=0.6, kmax_padding=True, init_cfg=None)
)
