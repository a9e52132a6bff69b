"""kMaX-DeepLab with ResNet-50 (arXiv:2207.04044), the form for COCO and ADE20K, with COCO's thresholds.

BatchNorm everywhere has eps 1e-3 and momentum 0.01, nothing is frozen. The published training starts the encoder from
torchvision's ImageNet weights (encoder.init_cfg). The TensorFlow original has no max pool, hands on maps before the ReLU
and drops small segments after pasting.
"""

model = dict(
    type="Segmentor",
    data_preprocessor=dict(
        type="SegPreprocessor", mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], size="${image_size}"
    ),
    encoder=dict(type="ResNet", depth=50, norm_eps=1e-3, norm_momentum=0.01, init_cfg=None),
    decoder=dict(
        type="KMaXPixelDecoder",
        num_blocks=(1, 5, 1, 1),
        block_types=("axial", "axial", "bottleneck", "bottleneck"),
        base_channels=(512, 256, 128, 64),
    ),
    head=dict(
        type="KMaXHead",
        num_classes="${num_classes}",
        thing_classes="${thing_classes}",
        num_queries=128,
        drop_path=0.2,
        aux_semantic="deeplab",
        class_threshold_thing=0.7,
        class_threshold_stuff=0.5,
        overlap_threshold=0.8,
        reorder_class_weight=1.0,
        reorder_mask_weight=1.0,
        pixel_confidence_threshold=0.4,
        tasks="${tasks}",
        criterion=dict(
            type="KMaXCriterion",
            num_classes="${num_classes}",
            class_weight=3.0,
            dice_weight=3.0,
            mask_weight=0.3,
            insdis_weight=1.0,
            aux_semantic_weight=1.0,
            insdis_temperature=1.5,
            insdis_sample_k=4096,
            aux_semantic_temperature=2.0,
            aux_semantic_sample_k=4096,
        ),
    ),
)
