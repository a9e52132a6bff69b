"""Mask2Former with ResNet-50 (CVPR 2022, arXiv:2112.01527).

Frozen norms are COCO's and ADE20K's; Cityscapes' models train theirs. The published training starts the encoder from
ImageNet weights (encoder.init_cfg).
"""

model = dict(
    type="Segmentor",
    data_preprocessor=dict(
        type="SegPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], size_divisor=32
    ),
    encoder=dict(type="ResNet", depth=50, frozen_norm=True, init_cfg=None),
    decoder=dict(type="DeformablePixelDecoder", embed_dim=256, mask_dim=256, num_layers=6),
    head=dict(
        type="Mask2FormerHead",
        num_classes="${num_classes}",
        thing_classes="${thing_classes}",
        num_queries=100,
        embed_dim=256,
        num_layers=9,
        object_mask_threshold=0.8,
        overlap_threshold=0.8,
        max_instances=100,
        tasks="${tasks}",
        criterion=dict(
            type="Mask2FormerCriterion",
            num_classes="${num_classes}",
            class_weight=2.0,
            mask_weight=5.0,
            dice_weight=5.0,
            no_object_weight=0.1,
            num_points=12544,
        ),
    ),
)
