"""SegFormer on MiT (NeurIPS 2021, arXiv:2105.15203) with mmsegmentation's head.

The authors' network: decoder.form="nvidia", decoder.channels=768 (256 for B0 and B1), encoder.reduction_norm_eps=1e-5.
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
    encoder=dict(type="MixVisionTransformer", arch="b0", drop_path_rate=0.1, init_cfg=None),
    decoder=dict(type="SegFormerDecoder", channels=256, form="mmsegmentation", align_corners=False),
    head=dict(
        type="SemanticHead",
        num_classes="${num_classes}",
        losses=[dict(type="CrossEntropyLoss", average="all")],
        dropout=0.1,
        align_corners=False,
    ),
    sliding=None,
)
