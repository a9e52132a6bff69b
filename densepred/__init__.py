"""densepred: dense prediction and segmentation. Importing it registers every part."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # Albumentations asks the package index at every import

from densepred import adaptive, data, decoders, encoders, engine, evaluation, heads, losses, ops, segmentor
from densepred.engine.build import build_model
from densepred.engine.config import load_config
from densepred.engine.conversion import convert_state_dict

__all__ = [
    "adaptive",
    "build_model",
    "convert_state_dict",
    "data",
    "decoders",
    "encoders",
    "engine",
    "evaluation",
    "heads",
    "load_config",
    "losses",
    "ops",
    "segmentor",
]
