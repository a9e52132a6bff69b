"""ResNet at output stride 8 with an auxiliary head on res4, as mmsegmentation's convolutional models have it; no decoder yet.

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
    encoder=dict(
        type="ResNet",
        depth=50,
        stem="v1c",
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        contract_dilation=True,
        init_cfg=None,
    ),
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
