"""CamVid at 360x480, 11 classes: whole images, scaled by half to double and cut back to their size."""

num_classes = 11
tasks = ["semantic"]
image_size = (360, 480)  # (height, width) of a training crop
ratio_range = (0.5, 2.0)
class_weight = [0.51, 0.43, 2.14, 0.38, 0.95, 0.62, 3.11, 1.36, 0.83, 2.50, 2.71]  # roots of SegNet's
data_root = "datasets/camvid"

train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadSemantic"),
    dict(type="ScaleAndCrop", crop_size="${image_size}", ratio_range="${ratio_range}"),
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    dict(type="SSDColorJitter"),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImage"), dict(type="LoadSemantic"), dict(type="PackSegInputs")]

train_dataset = dict(
    type="CamVid",
    data_root="${data_root}",
    split="train",
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="CamVid",
    data_root="${data_root}",
    split="val",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(semantic=dict(type="SemanticIoU"))
