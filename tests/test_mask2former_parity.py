"""Mask2Former R50 (COCO panoptic) against the published code's numbers, in float64: all that a forward pass makes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import densepred
from densepred.decoders import DeformablePixelDecoder
from densepred.encoders import ResNet
from densepred.heads import Mask2FormerHead
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "mask2former_r50_coco_panoptic")
FORWARD = [name for name in META["outputs"] if name.startswith(("res", "memory", "mask_features", "pred", "aux"))]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNet(50, frozen_norm=True)
        self.decoder = DeformablePixelDecoder(self.encoder.channels, self.encoder.strides)
        self.head = Mask2FormerHead(256, [256] * 3, self.encoder.channels, 133, thing_classes=range(80))


@pytest.fixture(scope="module")
def outputs() -> dict[str, Tensor]:
    with torch.device("meta"):
        model = Net()
    model.to_empty(device="cpu").double().eval()
    weights = {key: torch.from_numpy(value) for key, value in parity.filled_state(META).items()}
    model.load_state_dict(densepred.convert_state_dict(weights, source="mask2former", model=model))
    with torch.no_grad():
        features = model.decoder(model.encoder(torch.from_numpy(parity.image_batch(META))))
        found = model.head(features)
        plain = model.head(features, deep_supervision=False)
    for i, aux in enumerate(found.pop("aux_outputs")):
        found |= {f"aux{i}_{name}": value for name, value in aux.items()}
    found |= {f"res{i + 2}": x for i, x in enumerate(features.encoder)}
    found |= {f"memory_{i}": x for i, x in enumerate(features.levels)}
    return found | {"mask_features": features.pixels, "plain": plain}


def check(value: Tensor, name: str) -> None:
    expected = EXPECTED[name]
    array = parity.thin(value.numpy(), META["outputs"][name])
    np.testing.assert_allclose(array, expected, rtol=0, atol=1e-11 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("name", FORWARD)
def test_forward(outputs, name):
    check(outputs[name], name)


@pytest.mark.parametrize("name", ["pred_logits", "pred_masks"])
def test_forward_without_deep_supervision(outputs, name):
    check(outputs["plain"][name], name)
