"""kMaX-DeepLab with ResNet-50 (arXiv:2207.04044), the form for Cityscapes.

A fifth decoder stage reads the stem, and the auxiliary semantic head is small. The decoder goes through the encoder's
maps from the last to the first; PyTorch's ResNet-50 calls its stem stride 4, so its stage comes before that of res2.
(The TensorFlow original has a stem at stride 2, and weighs hard pixels and small instances in the semantic loss.)
"""

model = dict(
    type="Segmentor",
    data_preprocessor=dict(
        type="SegPreprocessor", mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5], size="${image_size}"
    ),
    encoder=dict(
        type="ResNet",
        depth=50,
        norm_eps=1e-3,
        norm_momentum=0.01,
        out_features=("res2", "stem", "res3", "res4", "res5"),
        init_cfg=None,
    ),
    decoder=dict(
        type="KMaXPixelDecoder",
        num_blocks=(1, 5, 1, 1, 1),
        block_types=("axial", "axial", "bottleneck", "bottleneck", "bottleneck"),
        base_channels=(512, 256, 128, 64, 32),
    ),
    head=dict(
        type="KMaXHead",
        num_classes="${num_classes}",
        thing_classes="${thing_classes}",
        num_queries=256,
        drop_path=0.2,
        aux_semantic="stride32",
        class_threshold_thing=0.5,
        class_threshold_stuff=0.3,
        overlap_threshold=0.9,
        reorder_class_weight=1.0,
        reorder_mask_weight=0.0,
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
            insdis_temperature=0.6,
            insdis_sample_k=4096,
            aux_semantic_sample_k=0,  # every pixel of the stride-32 map
        ),
    ),
)
