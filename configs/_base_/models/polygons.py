"""Polygons with ImageNet's normalisation and the exact region loss, ours; encoder and decoder are the recipe's."""

model = dict(
    type="Segmentor",
    data_preprocessor=dict(
        type="SegPreprocessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        size="${image_size}",
        size_divisor=1,
    ),
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
