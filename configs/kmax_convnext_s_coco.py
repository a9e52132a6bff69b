"""kMaX-DeepLab, ConvNeXt-S, COCO panoptic. Published: PQ 56.7, things 62.7, stuff 47.7 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_panoptic.py",
    "_base_/models/kmax_r50.py",
    "_base_/schedules/kmax.py",
]

model = dict(
    encoder=dict(_delete_=True, type="ConvNeXt", arch="small", drop_path_rate=0.4, kmax_padding=True, init_cfg=None)
)
