"""Hold every component of a resolved config against the signature of the class it names, before anything is built."""

import inspect
import types
import typing
from collections.abc import Sequence
from functools import cache
from typing import Any

from mmengine.registry import Registry

from densepred.errors import ConfigError, nearest
from densepred.registry import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    LOG_PROCESSORS,
    LOOPS,
    METRICS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPERS,
    OPTIMIZERS,
    PARAM_SCHEDULERS,
    TRANSFORMS,
    VISBACKENDS,
    VISUALIZERS,
    WEIGHT_INITIALIZERS,
)

REGISTRY_OF_KEY = {
    "model": MODELS,
    "data_preprocessor": MODELS,
    "init_cfg": WEIGHT_INITIALIZERS,
    "dataset": DATASETS,
    "pipeline": TRANSFORMS,
    "sampler": DATA_SAMPLERS,
    "batch_sampler": DATA_SAMPLERS,
    "collate_fn": FUNCTIONS,
    "val_evaluator": METRICS,
    "test_evaluator": METRICS,
    "default_hooks": HOOKS,
    "custom_hooks": HOOKS,
    "train_cfg": LOOPS,
    "val_cfg": LOOPS,
    "test_cfg": LOOPS,
    "optim_wrapper": OPTIM_WRAPPERS,
    "optimizer": OPTIMIZERS,
    "param_scheduler": PARAM_SCHEDULERS,
    "visualizer": VISUALIZERS,
    "vis_backends": VISBACKENDS,
    "log_processor": LOG_PROCESSORS,
    "model_wrapper_cfg": MODEL_WRAPPERS,
}
"""Which registry a ``type`` below a key belongs to; keys not listed keep the registry of the key above."""

SUPPLIED = {
    "self", "runner", "dataloader", "evaluator", "params", "optimizer", "seed", "module", "in_channels", "in_strides",
    "level_channels", "encoder_channels", "dataset", "name", "filename", "save_dir", "param_name",
}  # fmt: skip
"""Required arguments that the code fills in where the config does not."""

WRAPPER_KEYS = {
    "optim_wrapper": {"optimizer", "paramwise_cfg", "constructor"},
    "param_scheduler": {"convert_to_iter_based"},
}
"""Keys that MMEngine takes out of a dict before it calls the class."""

OPEN_KWARGS = {"EMAHook"}
"""Classes whose ``**kwargs`` reach another class that reads them."""


def check_components(values: dict) -> None:
    """Raise `ConfigError` for a registry name, an argument or an argument's type that does not fit, anywhere in a config."""
    for key, value in values.items():
        if key.endswith("_dataloader") and isinstance(value, dict):
            check_dataloader(value, key)
        if key in REGISTRY_OF_KEY or key.endswith("_dataloader"):
            _walk(value, key, REGISTRY_OF_KEY.get(key), key)


def check_dataloader(loader: dict, where: str) -> None:
    """Raise for a data loader key that neither torch's DataLoader nor MMEngine reads."""
    from torch.utils.data import DataLoader

    known = (set(inspect.signature(DataLoader.__init__).parameters) - {"self"}) | {"dataset", "num_batch_per_epoch"}
    for key in loader:
        if key not in known:
            raise ConfigError(f"{where}.{key}: a data loader has no such key{nearest(key, known)}")


def _walk(node: Any, where: str, current: Registry | None, key: str) -> None:
    if isinstance(node, list | tuple):
        for i, item in enumerate(node):
            _walk(item, f"{where}.{i}", current, key)
    if not isinstance(node, dict):
        return
    if "type" in node and current is not None:
        cls = check_type(node["type"], current, where)
        check_arguments(cls, node, where, WRAPPER_KEYS.get(key, set()))
        if cls.__name__ == "Albumentations":  # its transforms are not ours; the wrapper checks them when it is built
            return
    for name, value in node.items():
        inside_hooks = current is HOOKS  # their names are free: default_hooks.param_scheduler is a hook
        below = current if inside_hooks else REGISTRY_OF_KEY.get(name, current)
        _walk(value, f"{where}.{name}", below, name if name in REGISTRY_OF_KEY and not inside_hooks else key)


def check_type(name: Any, where_to_look: Registry, where: str) -> type:
    """Return the class or function registered under ``name``, or raise with the nearest registered name."""
    if not isinstance(name, str):
        return name
    found = where_to_look.get(name)
    if found is None:
        known: set[str] = set()
        level: Registry | None = where_to_look
        while level is not None:
            known |= level.module_dict.keys()
            level = level.parent
        raise ConfigError(
            f"{where}.type: no {where_to_look.name} is registered as {name!r}{nearest(name, known)} (a part of your own "
            f'is found once its module stands in custom_imports=dict(imports=["your.module"]))'
        )
    return found


def check_arguments(cls: Any, node: dict, where: str, extra: set[str]) -> None:
    """Raise for an argument that ``cls`` does not take, misses or takes in another type."""
    parameters, open_ended = signature_of(cls)
    for key, value in node.items():
        if key == "type" or key in extra:
            continue
        if key not in parameters:
            if open_ended:
                continue
            known = parameters.keys() - {"self", "args", "kwargs"}
            raise ConfigError(f"{where}.{key}: {cls.__name__} has no argument {key!r}{nearest(key, known)}")
        annotation = parameters[key].annotation
        if not fits(value, annotation):
            raise ConfigError(
                f"{where}.{key}: {value!r} is a {type(value).__name__}; {cls.__name__} takes {annotation}"
            )
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if required and name not in node and name not in SUPPLIED and "type" in node:
            raise ConfigError(f"{where}: {cls.__name__} needs the argument {name!r}")


@cache
def signature_of(cls: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the named parameters of a class (through ``**kwargs`` along its bases) or function, and whether it takes any."""
    if not inspect.isclass(cls):
        return dict(inspect.signature(cls).parameters), False
    merged: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__[:-1]:
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters
        hints = _hints(base.__init__)
        for name, parameter in parameters.items():
            merged.setdefault(name, parameter.replace(annotation=hints.get(name, parameter.empty)))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return merged, cls.__name__ in OPEN_KWARGS


def _hints(function: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations that only exist for a type checker
        return {}


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a config value can be what an annotation asks for; annotations beyond plain data fit anything."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, a) for a in typing.get_args(annotation))
    if origin is typing.Literal:
        return value in typing.get_args(annotation)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation in (bool, str, type(None)):
        return isinstance(value, annotation if annotation else type(None))
    if (origin or annotation) in (list, tuple, Sequence):
        return isinstance(value, list | tuple)
    if (origin or annotation) is dict:
        return isinstance(value, dict)
    return True
