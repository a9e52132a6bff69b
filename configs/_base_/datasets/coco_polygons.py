"""Polygons of COCO-like instance files, the mask's outline around its centre; no depth order is known, so none is learnt."""

num_classes = 80
num_vertices = 32
depth_weight = 0.0
compose = "each"  # masks may overlap
tasks = ["instance"]
image_size = (512, 512)  # (height, width) of the network's input; images are letter-boxed into it
data_root = "datasets/coco"
train_annotations = "annotations/instances_train2017.json"
val_annotations = "annotations/instances_val2017.json"
classes_from_file = False

train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPolygons", num_vertices="${num_vertices}"),
    dict(type="PolygonWindow", size="${image_size}"),
    dict(type="CenterNetColorJitter"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPolygons", num_vertices="${num_vertices}"),
    dict(type="PolygonWindow", size="${image_size}", random=False),
    dict(type="LoadInstances"),
    dict(type="PackSegInputs"),
]

train_dataset = dict(
    type="CocoInstances",
    data_root="${data_root}",
    ann_file="${train_annotations}",
    image_dir="train2017",
    classes_from_file="${classes_from_file}",
    filter_empty=True,
    seed="${seed}",
    pipeline="${train_pipeline}",
)
val_dataset = dict(
    type="CocoInstances",
    data_root="${data_root}",
    ann_file="${val_annotations}",
    image_dir="val2017",
    classes_from_file="${classes_from_file}",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(
    instance=[
        dict(type="CocoInstance", data_root="${data_root}", ann_file="${val_annotations}"),
        dict(type="PolygonFiles"),
    ]
)
