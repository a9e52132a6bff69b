"""kMaX-DeepLab, ConvNeXt-B, COCO panoptic. Published: PQ 57.2, things 63.4, stuff 47.9 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_panoptic.py",
    "_base_/models/kmax_r50.py",
    "_base_/schedules/kmax.py",
]

model = dict(
    encoder=dict(_delete_=True, type="ConvNeXt", arch="base", drop_path_rate=0.5, kmax_padding=True, init_cfg=None)
)
