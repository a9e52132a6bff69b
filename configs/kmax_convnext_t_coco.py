"""kMaX-DeepLab, ConvNeXt-T, COCO panoptic. Published: PQ 55.5, things 61.4, stuff 46.7 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_panoptic.py",
    "_base_/models/kmax_r50.py",
    "_base_/schedules/kmax.py",
]

model = dict(
    encoder=dict(_delete_=True, type="ConvNeXt", arch="tiny", drop_path_rate=0.3, kmax_padding=True, init_cfg=None)
)
