"""CCNet as its authors trained it (TPAMI 2020, arXiv:1811.11721): ResNet-101 at stride 8, criss-cross attention twice.

Their repository: images in BGR with the mean taken off and no division, leaky ReLU in the heads, hard pixels only (OHEM).
Its run script forgets --recurrence and trains without attention; here R = 2 as published. The paper's category consistent
loss, which no official code has: decoder.embedding_channels=16 and head.embedding_loss=dict(type="CategoryConsistentLoss").
"""

model = dict(
    type="Segmentor",
    data_preprocessor=dict(
        type="SegPreprocessor",
        mean=[104.00698793, 116.66876762, 122.67891434],
        std=[1.0, 1.0, 1.0],
        bgr=True,
        size="${image_size}",
        size_divisor=1,
    ),
    encoder=dict(
        type="ResNet",
        depth=101,
        stem="deep",
        ceil_mode=True,
        strides=(1, 2, 1, 1),
        dilations=(1, 1, 2, 4),
        init_cfg=None,
    ),
    decoder=dict(
        type="CCNetDecoder", channels=512, recurrence=2, shared=True, negative_slope=0.01, embedding_channels=None
    ),
    head=dict(
        type="SemanticHead",
        num_classes="${num_classes}",
        losses=[dict(type="OHEMCrossEntropyLoss", thresh=0.7, min_kept=100_000)],
        auxiliary=dict(
            index=2,
            channels=512,
            weight=0.4,
            bias=True,
            negative_slope=0.01,
            losses=[dict(type="CrossEntropyLoss")],
        ),
        embedding_loss=None,
        dropout=0.1,
        align_corners=True,
    ),
    sliding=None,
)
