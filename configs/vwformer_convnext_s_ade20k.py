"""VWFormer, ConvNeXt-S, ADE20K, 512 x 512 crops. Published: mIoU 48.8 (val).

The published file of this name inherits the Cityscapes recipe; this one is what the others of its family say.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/ade20k_semantic.py",
    "_base_/models/vwformer.py",
    "_base_/schedules/vwformer.py",
]

test_multiple = 64
model = dict(encoder=dict(arch="small"))
