"""The registries, scope ``densepred``: children of MMEngine's, so that ``mmengine`` parts stay reachable by bare name."""

from mmengine import registry as root
from mmengine.registry import Registry

SCOPE = "densepred"


def _child(name: str, parent: Registry) -> Registry:
    return Registry(name, parent=parent, scope=SCOPE)


MODELS = _child("model", root.MODELS)
"""Segmentors, encoders, decoders, heads and data preprocessors."""
MODEL_WRAPPERS = _child("model wrapper", root.MODEL_WRAPPERS)
WEIGHT_INITIALIZERS = _child("weight initializer", root.WEIGHT_INITIALIZERS)
DATASETS = _child("dataset", root.DATASETS)
DATA_SAMPLERS = _child("data sampler", root.DATA_SAMPLERS)
TRANSFORMS = _child("transform", root.TRANSFORMS)
METRICS = _child("metric", root.METRICS)
HOOKS = _child("hook", root.HOOKS)
LOOPS = _child("loop", root.LOOPS)
OPTIM_WRAPPERS = _child("optim_wrapper", root.OPTIM_WRAPPERS)
VISUALIZERS = _child("visualizer", root.VISUALIZERS)
LOG_PROCESSORS = _child("log processor", root.LOG_PROCESSORS)
