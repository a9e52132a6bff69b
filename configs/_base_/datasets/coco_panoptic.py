"""COCO 2017 panoptic, 133 classes: things 0..79, stuff 80..132.

The pipelines are those of kMaX-DeepLab's data mapper: scale jitter, SSD colours, crop, flip, and copy-paste on every
sample from a second image at half the scale. (The TensorFlow original: jitter 0.3 to 1.7, and AutoAugment.)
"""

num_classes = 133
thing_classes = list(range(80))
image_size = (1281, 1281)  # (height, width) of every batch; for another size keep the sides 32 k + 1
tasks = ["panoptic"]  # also of semantic, instance
data_root = "datasets/coco"

train_pipeline = [
    dict(
        type="Redraw",
        transforms=[
            dict(type="LoadImage"),
            dict(type="LoadPanoptic"),
            dict(type="ScaleJitter", size="${image_size}", ratio_range=(0.2, 2.0)),
            dict(type="SSDColorJitter"),
            dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
            dict(
                type="CopyPaste",
                size="${image_size}",
                transforms=[
                    dict(type="LoadImage"),
                    dict(type="LoadPanoptic"),
                    dict(type="ScaleJitter", size="${image_size}", ratio_range=(0.1, 1.0)),
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
    type="CocoPanoptic",
    data_root="${data_root}",
    ann_file="annotations/panoptic_train2017.json",
    image_dir="train2017",
    filter_empty=True,
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="CocoPanoptic",
    data_root="${data_root}",
    ann_file="annotations/panoptic_val2017.json",
    image_dir="val2017",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(  # by task
    panoptic=dict(type="PanopticQuality"),
    semantic=dict(type="SemanticIoU"),
    instance=dict(type="CocoInstance", data_root="${data_root}", ann_file="annotations/instances_val2017.json"),
)
