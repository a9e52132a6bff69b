"""Shapes, the generated set (datasets/prepare_shapes.py), semantic: the 10 classes of its panoptic maps."""

num_classes = 10
tasks = ["semantic"]
image_size = (96, 128)  # (height, width) of a training crop
data_root = "datasets/shapes"

train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPanoptic"),
    dict(type="LoadSemanticFromPanoptic"),
    dict(type="ScaleAndCrop", crop_size="${image_size}", ratio_range=(0.8, 1.5)),
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    dict(type="SSDColorJitter"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPanoptic"),
    dict(type="LoadSemanticFromPanoptic"),
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
val_evaluator = dict(semantic=dict(type="SemanticIoU"))
