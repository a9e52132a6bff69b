"""From a config to a model without a runner."""

import os
from typing import Any

from mmengine.config import Config
from torch import nn

from densepred.engine.config import check_top_level, load_linked_config, merge_options, resolve_links
from densepred.engine.config_check import check_components
from densepred.errors import ConfigError, nearest
from densepred.registry import MODELS


def build_model(config: str | os.PathLike | Config | dict, cfg_options: dict[str, Any] | None = None) -> nn.Module:
    """Build the model of a config, with its initial weights; no checkpoint is read.

    Args:
        config: path of a config file, or a config.
        cfg_options: dotted key -> value, e.g. ``{"num_classes": 19, "model.head.num_queries": 64}``.

    Raises:
        ConfigError: an unknown key, a wrong type, a name that is not registered.
        FileNotFoundError: there is no such file.
    """
    if isinstance(config, str | os.PathLike):
        values, used = resolve_links(load_linked_config(config, cfg_options).to_dict())
        check_top_level(values, used)
    else:
        linked = merge_options(config if isinstance(config, Config) else Config(config), cfg_options)
        values, used = resolve_links(linked.to_dict())
        # A resolved config has lost its links: an option on a top-level key would change nothing.
        check_top_level(dict.fromkeys(k.split(".")[0] for k in cfg_options or {}), used)
    if "model" not in values:
        raise ConfigError(f"this config has no model{nearest('model', values)}")
    check_components({"model": values["model"]})
    return MODELS.build(values["model"])
