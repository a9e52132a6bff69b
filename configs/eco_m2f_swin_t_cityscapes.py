"""ECO-M2F, Swin-T, Cityscapes panoptic, step 1: the parent, a Mask2Former whose encoder can stop after 2 to 6 layers.

Step 2: tools/eco_derive.py; step 3: eco_m2f_swin_t_cityscapes_gate.py. The parent's own schedule was not published:
Mask2Former's.
"""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/cityscapes_crop.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_poly.py",
]

model = dict(
    type="AdaptiveSegmentor",
    data_preprocessor=dict(),  # the base's, as it is
    encoder=dict(
        _delete_=True,
        type="SwinTransformer",
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        window_size=7,
        drop_path_rate=0.3,
        init_cfg=None,
    ),
    decoder=dict(
        _delete_=True,
        type="AdaptiveExit",
        min_layers=2,
        decoder=dict(type="DeformablePixelDecoder", embed_dim=256, mask_dim=256, num_layers=6),
    ),
    head=dict(),
)
optim_wrapper = dict(
    paramwise_cfg=dict(
        no_decay=["query_feat", "query_embed", "head.level_embed", "relative_position_bias_table"],
    ),
)
train_cfg = dict(max_iters=90_000)
val_evaluator = dict(panoptic=[dict(type="PanopticQuality"), dict(type="EncoderDepth")])
find_unused_parameters = True  # layers beyond a step's depth get no gradient
