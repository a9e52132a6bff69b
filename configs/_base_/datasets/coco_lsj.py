"""COCO 2017 with Mask2Former's large-scale jitter; panoptic as written, instances with other labels and annotations."""

num_classes = 133
thing_classes = list(range(80))
tasks = ["panoptic"]  # also of semantic, instance
image_size = (1024, 1024)  # (height, width) of a training image
test_short_edge = 800
test_max_size = 1333
data_root = "datasets/coco"
dataset_type = "CocoPanoptic"
load_labels = dict(type="LoadPanoptic")
train_annotations = "annotations/panoptic_train2017.json"
val_annotations = "annotations/panoptic_val2017.json"

train_pipeline = [
    dict(type="LoadImage"),
    "${load_labels}",
    dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    dict(type="ScaleJitter", size="${image_size}", ratio_range=(0.1, 2.0)),
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
    ann_file="${train_annotations}",
    image_dir="train2017",
    filter_empty=True,
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="${dataset_type}",
    data_root="${data_root}",
    ann_file="${val_annotations}",
    image_dir="val2017",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(  # by task
    panoptic=dict(type="PanopticQuality"),
    semantic=dict(type="SemanticIoU"),
    instance=dict(type="CocoInstance", data_root="${data_root}", ann_file="annotations/instances_val2017.json"),
)
