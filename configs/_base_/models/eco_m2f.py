"""ECO-M2F (arXiv:2404.15244): Mask2Former with Swin-T whose deformable encoder stops after 2 to 6 layers, image by image.

The numbers are Mask2Former's. The published training starts the encoder from ImageNet weights (encoder.init_cfg).
"""

model = dict(
    type="AdaptiveSegmentor",
    data_preprocessor=dict(
        type="SegPreprocessor", mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], size_divisor=32
    ),
    encoder=dict(
        type="SwinTransformer",
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.3,
        init_cfg=None,
    ),
    decoder=dict(
        type="AdaptiveExit",
        min_layers=2,
        decoder=dict(type="DeformablePixelDecoder", embed_dim=256, mask_dim=256, num_layers=6),
    ),
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
