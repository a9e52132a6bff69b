"""Shapes, the generated set (datasets/prepare_shapes.py), panoptic, in Mask2Former's pipeline: 10 classes, things 0..5."""

num_classes = 10
thing_classes = list(range(6))
tasks = ["panoptic"]  # also of semantic, instance
image_size = (96, 128)  # (height, width) of a training image
data_root = "datasets/shapes"
load_labels = dict(type="LoadPanoptic")

train_pipeline = [
    dict(type="LoadImage"),
    "${load_labels}",
    dict(type="ScaleJitter", size="${image_size}", ratio_range=(0.8, 1.5)),
    dict(type="SSDColorJitter"),
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    dict(type="PadTo", size="${image_size}", fill=128),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="ResizeToFit", size="${image_size}"),
    "${load_labels}",
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
