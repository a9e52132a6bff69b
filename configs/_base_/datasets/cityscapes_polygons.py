"""Polygons of street scenes in full frames at half size, with CenterPoly's augmentation; Cityscapes as written."""

num_classes = 8
num_vertices = 16
depth_weight = 0.1
compose = "cityscapes"  # how overlaps are cut, see densepred.heads.polygon_masks
vertex_selection = "regular_interval"
tasks = ["instance"]
whole_image = True  # in tests: letter-boxed; False: as wide as the input, as published
image_size = (512, 1024)  # (height, width) of the network's input
data_root = "datasets/cityscapes"
dataset_type = "CityscapesPolygons"
val_split = "val"

train_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPolygons", num_vertices="${num_vertices}", selection="${vertex_selection}"),
    dict(type="PolygonWindow", size="${image_size}"),
    dict(type="CenterNetColorJitter"),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImage"),
    dict(type="LoadPolygons", num_vertices="${num_vertices}", selection="${vertex_selection}"),
    dict(type="PolygonWindow", size="${image_size}", random=False, whole="${whole_image}"),
    dict(type="LoadInstances"),
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
    split="${val_split}",
    test_mode=True,
    pipeline="${test_pipeline}",
)
val_evaluator = dict(
    instance=[
        dict(type="CityscapesInstance", data_root="${data_root}", split="${val_split}", score_factor=1.2),
        dict(type="PolygonFiles"),
    ]
)
