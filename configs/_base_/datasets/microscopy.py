"""Two classes in microscope images: crops, flipped, turned and bent, as the papers on U-Nets augment them."""

num_classes = 2
tasks = ["semantic"]
image_size = (256, 256)  # (height, width) of a training crop
ratio_range = (0.8, 1.25)
data_root = "datasets/isbi2012"
dataset_type = "ISBI2012"

train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadSemantic"),
    dict(type="ScaleAndCrop", crop_size="${image_size}", ratio_range="${ratio_range}"),
    dict(
        type="Albumentations",
        transforms=[
            dict(type="HorizontalFlip", p=0.5),
            dict(type="RandomRotate90", p=0.75),
            dict(type="ElasticTransform", alpha=30, sigma=6, p=0.3),
            dict(type="RandomBrightnessContrast", p=0.5),
        ],
    ),
    dict(type="PackSegInputs"),
]
test_pipeline = [dict(type="LoadImage"), dict(type="LoadSemantic"), dict(type="PackSegInputs")]

train_dataset = dict(
    type="${dataset_type}",
    data_root="${data_root}",
    split="train",
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="${dataset_type}",
    data_root="${data_root}",
    split="val",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(semantic=dict(type="SemanticIoU"))
