"""ADE20K with Mask2Former's crops; semantic as written, panoptic with other data set and labels."""

num_classes = 150
thing_classes = None
tasks = ["semantic"]
image_size = (512, 512)  # (height, width) of a training image
train_short_edges = [int(51.2 * i) for i in range(5, 21)]
train_max_size = 2048
test_short_edge = 512
test_max_size = 2048
data_root = "datasets/ADEChallengeData2016"
dataset_type = "ADE20KSemantic"
load_labels = dict(type="LoadSemantic")

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
    instance=dict(type="CocoInstance"),
)
