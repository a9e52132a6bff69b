"""ADE20K panoptic, 150 classes, things and stuff interleaved.

The pipelines are those of kMaX-DeepLab's data mapper: scale jitter, SSD colours, crop, flip, and copy-paste on every
sample from a second image at half the scale. (The TensorFlow original adds AutoAugment.)
"""

num_classes = 150
thing_classes = [
    7, 8, 10, 12, 14, 15, 18, 19, 20, 22, 23, 24, 27, 30, 31, 32, 33, 35, 36, 37,
    38, 39, 41, 42, 43, 44, 45, 47, 49, 50, 53, 55, 56, 57, 58, 62, 64, 65, 66, 67,
    69, 70, 71, 72, 73, 74, 75, 76, 78, 80, 81, 82, 83, 85, 86, 87, 88, 89, 90, 92,
    93, 95, 97, 98, 102, 103, 104, 107, 108, 110, 111, 112, 115, 116, 118, 119, 120, 121, 123, 124,
    125, 126, 127, 129, 130, 132, 133, 134, 135, 136, 137, 138, 139, 142, 143, 144, 146, 147, 148, 149,
]  # fmt: skip
image_size = (1281, 1281)  # (height, width) of every batch; for another size keep the sides 32 k + 1
tasks = ["panoptic"]  # also of semantic, instance
data_root = "datasets/ADEChallengeData2016"

train_pipeline = [
    dict(
        type="Redraw",
        transforms=[
            dict(type="LoadImage"),
            dict(type="LoadPanoptic"),
            dict(type="ScaleJitter", size="${image_size}", ratio_range=(0.5, 2.0)),
            dict(type="SSDColorJitter"),
            dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
            dict(
                type="CopyPaste",
                size="${image_size}",
                transforms=[
                    dict(type="LoadImage"),
                    dict(type="LoadPanoptic"),
                    dict(type="ScaleJitter", size="${image_size}", ratio_range=(0.25, 1.0)),
                    dict(type="SSDColorJitter"),
                    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
                ],
            ),
        ],
    ),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="ResizeToFit", size="${image_size}"),
    dict(type="LoadPanoptic"),
    dict(type="PackSegInputs"),
]

train_dataset = dict(
    type="ADE20KPanoptic",
    data_root="${data_root}",
    split="train",
    filter_empty=True,
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="ADE20KPanoptic",
    data_root="${data_root}",
    split="val",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(  # by task
    panoptic=dict(type="PanopticQuality"),
    semantic=dict(type="SemanticIoU"),
    instance=dict(type="CocoInstance"),
)
