"""Cityscapes with Mask2Former's crops; panoptic as written, the other tasks with other data set and labels."""

num_classes = 19
thing_classes = list(range(11, 19))
tasks = ["panoptic"]  # also of semantic, instance
image_size = (512, 1024)  # (height, width) of a training image
train_short_edges = [int(102.4 * i) for i in range(5, 21)]
train_max_size = 4096
test_short_edge = 1024
test_max_size = 2048
data_root = "datasets/cityscapes"
dataset_type = "CityscapesPanoptic"
load_labels = dict(type="LoadPanoptic")

train_pipeline = [
    dict(type="LoadImage"),
    "${load_labels}",
    dict(
        type="ShortEdgeJitter",
        short_edges="${train_short_edges}",
        max_size="${train_max_size}",
        crop_size="${image_size}",
    ),
    dict(type="SSDColorJitter"),
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    dict(type="PadTo", size="${image_size}", fill=128),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="ResizeShortEdge", short_edge="${test_short_edge}", max_size="${test_max_size}"),
    "${load_labels}",
    dict(type="PackSegInputs"),
]

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
val_evaluator = dict(  # by task
    panoptic=dict(type="PanopticQuality"),
    semantic=dict(type="SemanticIoU"),
    instance=dict(type="CityscapesInstance", data_root="${data_root}"),
)
