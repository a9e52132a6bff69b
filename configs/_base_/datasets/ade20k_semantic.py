"""ADE20K semantic, 150 classes, as mmsegmentation's and VWFormer's recipes cut it: 0 in the files is void, k is class k - 1."""

num_classes = 150
tasks = ["semantic"]
image_size = (512, 512)  # (height, width) of a training crop
base_size = (2048, 512)  # (long, short) sides that ratios multiply
ratio_range = (0.5, 2.0)
test_short_edge = 512
test_max_size = 2048
test_multiple = 1  # of which both sides are
data_root = "datasets/ADEChallengeData2016"

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
test_pipeline = [
    dict(type="LoadImage"),
    dict(
        type="ResizeShortEdge",
        short_edge="${test_short_edge}",
        max_size="${test_max_size}",
        multiple="${test_multiple}",
    ),
    dict(type="LoadSemantic"),
    dict(type="PackSegInputs"),
]

train_dataset = dict(
    type="ADE20KSemantic",
    data_root="${data_root}",
    split="train",
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="ADE20KSemantic",
    data_root="${data_root}",
    split="val",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(semantic=dict(type="SemanticIoU"))
