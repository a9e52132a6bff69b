"""Cityscapes semantic, as mmsegmentation's and VWFormer's recipes cut it: label ids become the 19 classes while loading."""

num_classes = 19
tasks = ["semantic"]
image_size = (512, 1024)  # (height, width) of a training crop
base_size = (2048, 1024)  # (long, short) sides that ratios multiply
ratio_range = (0.5, 2.0)
data_root = "datasets/cityscapes"

train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadSemantic"),
    dict(
        type="ScaleAndCrop",
        crop_size="${image_size}",
        base_size="${base_size}",
        ratio_range="${ratio_range}",
        max_class_share=0.75,
    ),
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    dict(type="SSDColorJitter"),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImage"), dict(type="LoadSemantic"), dict(type="PackSegInputs")]

train_dataset = dict(
    type="CityscapesSemantic",
    data_root="${data_root}",
    split="train",
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="CityscapesSemantic",
    data_root="${data_root}",
    split="val",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(semantic=[dict(type="SemanticIoU"), dict(type="CityscapesIoU", data_root="${data_root}")])
