"""What all metrics share: writing figures as JSON, and seeing that every image was counted once."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_record(path: str | Path, record: Mapping) -> None:
    """Write a record of figures as JSON, NaN as null, its folder included, and say so."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(_without_nan(record), indent=1, allow_nan=False) + "\n")
    print(f"written to {path}")


def check_counted(metric: str, images: int, size: int) -> None:
    """Raise ``ValueError`` unless a metric's processes together counted each image of a data set once."""
    if images != size:
        raise ValueError(
            f"{metric} counted {images} images of a data set of {size}: a sampler that pads counts some twice; set "
            "sampler=dict(type='DefaultSampler', shuffle=False, round_up=False) in the data loader"
        )


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value
