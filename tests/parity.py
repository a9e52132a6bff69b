"""Deterministic weights and inputs for the parity cases beside this file.

A case names every tensor of a model's state dict; `fill` turns such a name and
shape into the same values on every machine, so a case needs no weight file.
MT19937 through `RandomState` is used because NumPy keeps its stream frozen.
"""

import json
import math
import zlib
from pathlib import Path

import numpy as np


def fill(name: str, shape) -> np.ndarray:
    """Return the float64 tensor of `shape` that belongs to the state-dict key `name`.

    Counters (`num_batches_tracked`) are 0; running variances lie in [0.5, 1.5);
    other running statistics and biases are 0.1 N(0, 1); one-dimensional weights
    (norms, layer scales) lie in [0.75, 1.25); everything else is
    N(0, 1) * sqrt(1 / fan_in), fan_in being the product of all axes but the first.
    """
    shape = tuple(int(s) for s in shape)
    rng = np.random.RandomState(zlib.crc32(name.encode()) & 0xFFFFFFFF)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if name.endswith("running_var"):
        return 0.5 + rng.random_sample(shape)
    if len(shape) <= 1:
        if name.endswith(("weight", "gamma", "scale")):
            return 0.75 + 0.5 * rng.random_sample(shape)
        return 0.1 * rng.standard_normal(shape)
    fan_in = math.prod(shape[1:])
    return rng.standard_normal(shape) * math.sqrt(1.0 / fan_in)


def normal_input(seed: int, shape) -> np.ndarray:
    """Return a float64 N(0, 1) array: an already normalised image batch (N, 3, H, W)."""
    return np.random.RandomState(seed).standard_normal(tuple(shape))


def case(folder):
    """Return (meta, expected) of one case: the parsed meta.json and the arrays of expected.npz."""
    folder = Path(folder)
    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / "expected.npz") as arrays:
        return meta, {k: arrays[k] for k in arrays.files}


def sample(array: np.ndarray, limit: int = 50_000) -> np.ndarray:
    """Return the flattened array, thinned by a whole stride so that at most `limit` values stay."""
    flat = np.asarray(array).reshape(-1)
    stride = max(1, -(-flat.size // limit))
    return flat[::stride]


def filled_state(meta) -> dict:
    """Return the filled official state dict (name -> float64 array) that `meta` describes.

    Honours `tied` (a list of key groups that are one parameter and take the fill of their first key),
    `scale` (key -> factor on the fill) and `not_filled` (index buffers that keep their constructed values
    and are left out here).
    """
    first = {}
    tied = meta.get("tied") or []
    for group in tied.values() if isinstance(tied, dict) else tied:
        for key in group:
            first[key] = group[0]
    skip, scale = set(meta.get("not_filled") or []), meta.get("scale") or {}
    return {
        key: np.asarray(fill(first.get(key, key), shape) * scale.get(key, 1.0))
        for key, shape in meta["state_dict"]
        if key not in skip
    }


def image_batch(meta) -> np.ndarray:
    """Return the case's normalised image batch (N, 3, H, W).

    Images given one by one (shape (3, H, W)) are zero-padded right and bottom to a common multiple of 32.
    """
    image = meta["input"]["image"]
    if isinstance(image, dict) and len(image["shape"]) == 4:
        return normal_input(image["seed"], image["shape"])
    images = [
        normal_input(i["seed"], i["shape"]) * i.get("mul", 1.0) + i.get("add", 0.0)
        for i in (image if isinstance(image, list) else [image])
    ]
    height, width = (-(-max(i.shape[d] for i in images) // 32) * 32 for d in (1, 2))
    batch = np.zeros((len(images), 3, height, width))
    for slot, i in zip(batch, images, strict=True):
        slot[:, : i.shape[1], : i.shape[2]] = i
    return batch


def thin(array: np.ndarray, output: dict) -> np.ndarray:
    """Return what expected.npz holds of `array`: all, or the values at the stride in `output` (meta["outputs"][name])."""
    if not output.get("thinned"):
        return np.asarray(array)
    if output.get("stride"):
        return np.asarray(array).reshape(-1)[:: output["stride"]]
    return sample(array, output.get("limit") or 50_000)


CASES = Path(__file__).parent / "data" / "parity"
