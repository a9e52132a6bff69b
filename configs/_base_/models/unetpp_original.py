"""UNet++ of the papers (DLMIA 2018, arXiv:1807.10165; TMI 2020, arXiv:1912.05074): its own encoder, four supervised heads.

Binary, with one output channel; model.decoder.prune=1, 2 or 3 cuts the network to L1, L2 or L3 at test time, and
model.head.average_deep=True averages all heads.
"""

model = dict(
    type="Segmentor",
    data_preprocessor=dict(
        type="SegPreprocessor", mean=[0.0] * 3, std=[255.0] * 3, size="${image_size}", size_divisor=1
    ),
    encoder=dict(type="UNetEncoder", style="keras", widths=(32, 64, 128, 256, 512), init_cfg=None),
    decoder=dict(type="UNetPlusPlusDecoder", style="keras", deep_supervision=True, prune=None),
    head=dict(
        type="SemanticHead",
        num_classes="${num_classes}",
        binary=True,
        losses=[
            dict(type="CrossEntropyLoss", loss_weight=0.5),
            dict(type="DiceLoss", smooth=1.0, include_background=False),
        ],
        dropout=0.0,
        average_deep=False,
    ),
    sliding=None,
)
