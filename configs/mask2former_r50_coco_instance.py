"""Mask2Former, ResNet-50, COCO instances. Published: AP 43.7 (COCO val)."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/datasets/coco_lsj.py",
    "_base_/models/mask2former.py",
    "_base_/schedules/mask2former_coco.py",
]

num_classes = 80
thing_classes = list(range(80))
tasks = ["instance"]
dataset_type = "CocoInstances"
load_labels = dict(type="LoadInstances")
train_annotations = "annotations/instances_train2017.json"
val_annotations = "annotations/instances_val2017.json"
