"""CenterPoly in small, ResNet-18 and a feature pyramid, on the generated Shapes, from scratch, in minutes on a CPU."""

_base_ = [
    "_base_/default_runtime.py",
    "_base_/models/polygons.py",
    "_base_/datasets/coco_polygons.py",
    "_base_/schedules/small_sets.py",
]

num_classes = 6
num_vertices = 16
classes_from_file = True
image_size = (128, 160)
data_root = "datasets/shapes"
model = dict(
    encoder=dict(type="ResNet", depth=18),
    decoder=dict(type="FPNDecoder", pyramid_channels=64, channels=64),
    head=dict(head_channels=64),
)
optim_wrapper = dict(paramwise_cfg=dict(lr_mult=dict(encoder=1.0)))
train_cfg = dict(max_iters=900, val_interval=300)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=300))
train_dataloader = dict(batch_size=8, num_workers=1)
val_dataloader = dict(batch_size=8, num_workers=1)
