"""The registries, scope ``densepred``: children of MMEngine's, so that ``mmengine`` parts stay reachable by bare name.

There is one for every kind of part that a runner builds, even where densepred registers nothing yet: MMEngine warns
about a scope without a registry.
"""

from mmengine import registry as root
from mmengine.registry import Registry

SCOPE = "densepred"


def _child(name: str, parent: Registry) -> Registry:
    return Registry(name, parent=parent, scope=SCOPE)


MODELS = _child("model", root.MODELS)
"""Segmentors, encoders, decoders, heads, criteria and data preprocessors."""
MODEL_WRAPPERS = _child("model wrapper", root.MODEL_WRAPPERS)
WEIGHT_INITIALIZERS = _child("weight initializer", root.WEIGHT_INITIALIZERS)
DATASETS = _child("dataset", root.DATASETS)
DATA_SAMPLERS = _child("data sampler", root.DATA_SAMPLERS)
TRANSFORMS = _child("transform", root.TRANSFORMS)
METRICS = _child("metric", root.METRICS)
EVALUATOR = _child("evaluator", root.EVALUATOR)
HOOKS = _child("hook", root.HOOKS)
LOOPS = _child("loop", root.LOOPS)
RUNNERS = _child("runner", root.RUNNERS)
RUNNER_CONSTRUCTORS = _child("runner constructor", root.RUNNER_CONSTRUCTORS)
OPTIMIZERS = _child("optimizer", root.OPTIMIZERS)
OPTIM_WRAPPERS = _child("optim_wrapper", root.OPTIM_WRAPPERS)
OPTIM_WRAPPER_CONSTRUCTORS = _child("optimizer wrapper constructor", root.OPTIM_WRAPPER_CONSTRUCTORS)
PARAM_SCHEDULERS = _child("parameter scheduler", root.PARAM_SCHEDULERS)
VISUALIZERS = _child("visualizer", root.VISUALIZERS)
VISBACKENDS = _child("vis_backend", root.VISBACKENDS)
LOG_PROCESSORS = _child("log processor", root.LOG_PROCESSORS)
FUNCTIONS = _child("function", root.FUNCTIONS)
