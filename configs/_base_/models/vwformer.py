"""VWFormer (ICLR 2024, arXiv:2404.16573) on ConvNeXt-T; variant="ade20k" as published there, "cityscapes" for its other head.

The published training starts the encoder from ImageNet weights (encoder.init_cfg) and uses mixed precision: add --amp.
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
        type="ConvNeXt",
        arch="tiny",
        output_norm=True,
        layer_scale_init=1.0,
        downsample_norm_eps=1e-5,
        drop_path_rate=0.4,
        init_cfg=None,
    ),
    decoder=dict(type="VWFormerDecoder", variant="ade20k", channels=512),
    head=dict(
        type="SemanticHead",
        num_classes="${num_classes}",
        losses=[dict(type="CrossEntropyLoss", average="all")],
        dropout=0.1,
        align_corners=False,
    ),
    sliding=None,
)
