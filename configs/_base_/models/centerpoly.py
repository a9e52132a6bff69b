"""CenterPoly v2 as published: a small hourglass, heat maps of centres, and at each a polygon, an offset and a depth rank.

Its region term computes no intersection over union; ours (model.head.region="exact") does, "published" repeats theirs.
"""

model = dict(
    type="Segmentor",
    data_preprocessor=dict(
        type="SegPreprocessor",
        mean=[72.43275, 82.28085, 71.83095],  # 255 times the published numbers, which are of BGR in 0..1
        std=[10.7865, 10.4244, 10.88595],
        size="${image_size}",
        size_divisor=1,
        bgr=True,
    ),
    encoder=dict(type="Hourglass", init_cfg=None),
    decoder=dict(type="StackedMaps"),
    head=dict(
        type="PolygonHead",
        num_classes="${num_classes}",
        num_vertices="${num_vertices}",
        coordinates="cartesian",
        head_channels=256,
        polygon_loss="l1",
        region="exact",
        weights=dict(heatmap=1.0, offset=1.0, polygon=1.0, region=1.0, order=0.0, depth="${depth_weight}"),
        compose="${compose}",
    ),
)
