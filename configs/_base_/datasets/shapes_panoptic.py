"""Shapes, the generated panoptic set (datasets/prepare_shapes.py), 10 classes: things 0..5, stuff 6..9.

The pipeline is COCO's with less scale jitter and no copy-paste; scenes of 128 x 160 pixels are fitted into 97 x 129.
"""

num_classes = 10
thing_classes = list(range(6))
image_size = (97, 129)  # (height, width) of every batch; for another size keep the sides 32 k + 1
tasks = ["panoptic"]  # also of semantic, instance
data_root = "datasets/shapes"

train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPanoptic"),
    dict(type="ScaleJitter", size="${image_size}", ratio_range=(0.8, 1.5)),
    dict(type="SSDColorJitter"),
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
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
    classes_from_file=True,
    filter_empty=True,
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="CocoPanoptic",
    data_root="${data_root}",
    ann_file="annotations/panoptic_val2017.json",
    image_dir="val2017",
    classes_from_file=True,
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(  # by task
    panoptic=dict(type="PanopticQuality"),
    semantic=dict(type="SemanticIoU"),
    instance=dict(type="CocoInstance"),
)
