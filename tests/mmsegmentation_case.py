"""Whole models of the recipes on mmsegmentation's parity cases, their weights through the real converter."""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densepred
from densepred.engine.build import build_model
from densepred.engine.conversion import to_official
from tests import parity
from tests.small import CONFIGS


def converted(config: str, meta: dict) -> nn.Module:
    """Return the recipe's model in evaluation and float64 with the case's weights; they survive the way back."""
    model = build_model(CONFIGS / f"{config}.py").double().eval()
    official = {key: torch.from_numpy(value) for key, value in parity.filled_state(meta).items()}
    weights = densepred.convert_state_dict(official, source="mmsegmentation", model=model)
    model.load_state_dict(weights)
    back = to_official(weights, source="mmsegmentation")
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], value) for key, value in official.items())
    return model


@torch.no_grad()
def outputs_of(model: nn.Module, meta: dict) -> dict[str, Tensor]:
    """Return what the case names, of its image."""
    images = torch.from_numpy(parity.image_batch(meta))
    features = model.features(images, None)
    raw = model.head(features)
    found = {f"feat_{i}": x for i, x in enumerate(features.encoder)}
    full = F.interpolate(
        raw["sem_logits"], size=images.shape[-2:], mode="bilinear", align_corners=model.head.align_corners
    )
    return found | dict(
        head_feat=features.pixels, logits=raw["sem_logits"], aux_logits=raw["aux_logits"], full_logits=full
    )


@torch.no_grad()
def moved_logits(model: nn.Module, outputs: dict[str, Tensor], change: Callable[[nn.Module], None]) -> float:
    """Return how far the logits move when ``change`` is done to the decoder; in float32, for speed."""
    decoder, head = (deepcopy(part).float() for part in (model.decoder, model.head))
    change(decoder)
    pyramid = [outputs[f"feat_{i}"].float() for i in range(len(model.encoder.channels))]
    logits = head(decoder(pyramid), deep_supervision=False)["sem_logits"]
    return float((logits - outputs["logits"]).abs().max())


def check(value: Tensor, meta: dict, expected: dict, name: str) -> None:
    """Compare an output with the case's at 1e-11 of its largest value."""
    array = parity.thin(value.numpy(), meta["outputs"][name])
    np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-11 * np.abs(expected[name]).max(), err_msg=name)
