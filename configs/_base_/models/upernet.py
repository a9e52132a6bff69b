"""UPerNet (ECCV 2018, arXiv:1807.10221) with an auxiliary head on res4, as mmsegmentation builds it; no encoder yet.

The published training starts the encoder from ImageNet weights (encoder.init_cfg).
"""

model = dict(
    type="Segmentor",
    data_preprocessor=dict(
        type="SegPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        size="${image_size}",
        size_divisor=1,
    ),
    decoder=dict(type="UPerDecoder", channels=512, pool_scales=(1, 2, 3, 6), align_corners=False),
    head=dict(
        type="SemanticHead",
        num_classes="${num_classes}",
        losses=[dict(type="CrossEntropyLoss", average="all")],
        auxiliary=dict(index=2, channels=256, weight=0.4, losses=[dict(type="CrossEntropyLoss", average="all")]),
        dropout=0.1,
        align_corners=False,
    ),
    sliding=None,
)
