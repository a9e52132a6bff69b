"""Parameter names of the authors' CCNet: ours and theirs, and the scales of its norms.

Their norms (in-place activated batch norm) multiply by ``|weight| + 1e-5``. Ours multiply by the weight, which therefore
is stored that way: ignoring the sign breaks the model, ignoring the 1e-5 alone moves logits by up to 0.09.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from densepred.engine.mapping_mask2former import renamer

SCALE_EPS = 1e-5
"""What in-place activated batch norm adds to the absolute value of its weight."""

_PAIRS = (
    *(
        pair
        for stage in range(1, 5)
        for pair in (
            (f"layer{stage}.{{}}.bn{{}}.", f"encoder.res{stage + 1}.{{}}.conv{{}}.norm."),
            (f"layer{stage}.{{}}.conv{{}}.weight", f"encoder.res{stage + 1}.{{}}.conv{{}}.weight"),
            (f"layer{stage}.{{}}.downsample.1.", f"encoder.res{stage + 1}.{{}}.shortcut.norm."),
            (f"layer{stage}.{{}}.downsample.0.", f"encoder.res{stage + 1}.{{}}.shortcut."),
        )
    ),
    ("bn{}.", "encoder.stem.conv{}.norm."),
    ("conv{}.", "encoder.stem.conv{}."),
    *(
        (f"head.{theirs}.{i}.", f"decoder.{ours}.{part}.")
        for theirs, ours in (("conva", "convs.0"), ("convb", "convs.1"), ("bottleneck", "conv_cat"))
        for i, part in enumerate(("conv", "bn"))
    ),
    ("head.bottleneck.3.", "head.classifier."),
    ("head.cca.", "decoder.cca."),
    ("dsn.0.", "head.auxiliary.conv.conv."),
    ("dsn.1.", "head.auxiliary.conv.bn."),
    ("dsn.3.", "head.auxiliary.classifier."),
)

FINGERPRINT = (r"head\.conva\.0\.weight", r"head\.cca\.query_conv\.weight", r"dsn\.0\.weight")
KEPT = r"decoder\.embedding\..*"
"""The convolution of the category consistent loss, which no published file has and no prediction uses."""

ccnet_to_ours, ours_to_ccnet = renamer(_PAIRS), renamer(_PAIRS, backwards=True)
"""Of one key; values: `scales_to_ours`, `scales_to_theirs`."""


def _is_scale(key: str, weights: Mapping[str, Tensor]) -> bool:
    norm, _, kind = key.rpartition(".")
    return kind == "weight" and f"{norm}.running_var" in weights


def scales_to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Store every norm's scale as what it multiplies by; under their names."""
    return {
        key: torch.as_tensor(value).abs() + SCALE_EPS if _is_scale(key, weights) else value
        for key, value in weights.items()
    }


def scales_to_theirs(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `scales_to_ours` but for signs, and leave out what their files never hold; under their names.

    Raises:
        ValueError: a norm multiplies by less than 1e-5, which their norms cannot.
    """
    kept = {
        key: value
        for key, value in weights.items()
        if not key.endswith("num_batches_tracked") and not key.startswith("decoder.embedding.")
    }
    for key, value in kept.items():
        if _is_scale(key, weights) and bool((value < SCALE_EPS).any()):
            raise ValueError(
                f"{key} has scales down to {float(value.min()):.3g}, but CCNet's norms multiply by |weight| + "
                f"{SCALE_EPS:g}: this model has no form in its format"
            )
    return {key: value - SCALE_EPS if _is_scale(key, weights) else value for key, value in kept.items()}
