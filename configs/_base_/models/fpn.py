"""Semantic FPN (arXiv:1901.02446) as mmsegmentation builds it; no encoder yet.

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
    decoder=dict(type="FPNDecoder", pyramid_channels=256, channels=128),
    head=dict(
        type="SemanticHead",
        num_classes="${num_classes}",
        losses=[dict(type="CrossEntropyLoss", average="all")],
        dropout=0.1,
        align_corners=False,
    ),
    sliding=None,
)
