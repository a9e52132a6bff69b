"""UNet++ over an encoder with ImageNet weights, in the form of segmentation_models_pytorch: nested skips from stride 2 on.

With deep supervision the maps X^{0,1}..X^{0,3} are classified too; model.decoder.prune=1, 2 or 3 then cuts the network to
L1, L2 or L3 at test time, and model.head.average_deep=True averages all heads.
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
    encoder=dict(type="ResNet", depth=34, out_features=("conv1", "res2", "res3", "res4", "res5"), init_cfg=None),
    decoder=dict(
        type="UNetPlusPlusDecoder",
        style="smp",
        decoder_channels=(256, 128, 64, 32, 16),
        deep_supervision=True,
        prune=None,
    ),
    head=dict(
        type="SemanticHead",
        num_classes="${num_classes}",
        losses=[dict(type="CrossEntropyLoss")],
        dropout=0.0,
        kernel_size=3,
        average_deep=False,
    ),
    sliding=None,
)
