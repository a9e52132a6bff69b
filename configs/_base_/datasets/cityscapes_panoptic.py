"""Cityscapes panoptic, 19 classes: stuff 0..10, things 11..18.

The pipelines are those of kMaX-DeepLab's data mapper: scale jitter, SSD colours, crop, flip, and copy-paste on every
sample from a second image at half the scale. (The TensorFlow original adds AutoAugment.)
"""

num_classes = 19
thing_classes = list(range(11, 19))
image_size = (1025, 2049)  # (height, width) of every batch; for another size keep the sides 32 k + 1
tasks = ["panoptic"]  # also of semantic, instance
data_root = "datasets/cityscapes"

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
    type="CityscapesPanoptic",
    data_root="${data_root}",
    split="train",
    filter_empty=True,
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="CityscapesPanoptic",
    data_root="${data_root}",
    split="val",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(  # by task
    panoptic=dict(type="PanopticQuality"),
    semantic=dict(type="SemanticIoU"),
    instance=dict(type="CityscapesInstance", data_root="${data_root}"),
)
