"""Every transform of Albumentations, applied to images and labels together and drawn from the sample's generator."""

import inspect
import os
import random

import numpy as np
from mmcv.transforms import BaseTransform
from numpy.random import Generator

from densepred.data.transforms import drop_vanished
from densepred.errors import nearest
from densepred.registry import TRANSFORMS


@TRANSFORMS.register_module()
class Albumentations(BaseTransform):
    """Apply Albumentations transforms to the image and to every label map it has.

    Labels are moved with nearest interpolation; what comes in from outside is void (0, 255 in ``semantic``), padding, and
    no instance. Each transform draws its own numbers: ``A.Compose.set_random_seed`` would give all of them the same.

    Args:
        transforms: configs, ``dict(type="HorizontalFlip", p=0.5)``; composites such as ``OneOf`` hold a list of configs
            under ``transforms``.

    Raises:
        ValueError: unknown transform (names the nearest), unknown or wrong argument, or an option that would blend labels
            or fill them with something other than void.
    """

    def __init__(self, transforms: list[dict]) -> None:
        # Its import would ask the package index for a newer version.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        import albumentations

        targets = dict.fromkeys(_CODECS, "mask")
        self.compose = albumentations.Compose([_build(t) for t in transforms], additional_targets=targets)

    def transform(self, results: dict) -> dict:
        rng: Generator = results["rng"]
        self.compose.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        data = {key: encode(results[key]) for key, (encode, _) in _CODECS.items() if key in results}
        if len(results.get("masks", ())):
            data["masks"] = results["masks"].view(np.uint8)
        data = self.compose(image=results["img"], **data)
        if data["image"].dtype != np.uint8 or data["image"].shape[2:] != (3,):
            raise ValueError(
                f"Albumentations returned an image of {data['image'].dtype} {data['image'].shape}; the preprocessor "
                "expects (H, W, 3) uint8 and normalises itself: remove Normalize, ToFloat, ToTensorV2 and the like"
            )
        return _decode(results, data)


def _decode(results: dict, data: dict) -> dict:
    results["img"] = data["image"]
    results["img_shape"] = data["image"].shape[:2]
    for key, (_, decode) in _CODECS.items():
        if key in results:
            results[key] = decode(data[key])
    if "masks" in results:
        none = np.zeros((0, *results["img_shape"]), bool)
        results["masks"] = np.asarray(data["masks"], np.uint8).view(bool) if "masks" in data else none  # (N, H, W)
    return drop_vanished(results)


_CODECS = {
    "panoptic": (lambda labels: labels, lambda labels: labels),
    "semantic": (lambda labels: labels + np.uint8(1), lambda labels: labels - np.uint8(1)),
    "padding": (lambda padding: (~padding).astype(np.uint8), lambda valid: valid == 0),
}
"""How each label map is written while Albumentations has it, so that its default fill, 0, means void in all of them."""


def _build(config: dict) -> object:
    """Build one Albumentations transform and refuse what the library would only warn about."""
    import albumentations

    arguments = dict(config)
    name = arguments.pop("type", None)
    known = {key: value for key, value in vars(albumentations).items() if _is_transform(value)}
    if name not in known:
        raise ValueError(f"albumentations has no transform {name!r}{nearest(str(name), known)}")
    parameters = inspect.signature(known[name].__init__).parameters
    for key in arguments:
        if key not in parameters:
            names = parameters.keys() - {"self"}
            raise ValueError(f"albumentations transform {name} has no argument {key!r}{nearest(key, names)}")
    for key in ("fill_mask", "mask_drop_value", "mask_interpolation"):
        if arguments.get(key):
            raise ValueError(
                f"albumentations transform {name}: {key}={arguments[key]!r} would damage labels, which are moved by nearest "
                f"neighbour and filled with void; remove {key}"
            )
    if "transforms" in arguments:
        arguments["transforms"] = [_build(inner) for inner in arguments["transforms"]]
    try:
        return known[name](**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"albumentations transform {name} refuses {arguments}: {error}") from error


def _is_transform(value: object) -> bool:
    from albumentations import BaseCompose, BasicTransform

    return inspect.isclass(value) and issubclass(value, (BasicTransform, BaseCompose))
