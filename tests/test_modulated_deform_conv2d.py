"""The modulated deformable convolution: the published numbers, the definition by loops, precision, the compilers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.ops.modulated_deform_conv2d import ModulatedDeformConv2d, modulated_deform_conv2d
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "modulated_deform_conv2d")
TOLERANCE = META["tolerance"]["max_abs"]
NAMES = ("x", "offset", "mask", "weight", "bias")


def drawn(recipe: dict) -> Tensor:
    if recipe["recipe"] == "values":
        return torch.tensor(recipe["values"], dtype=torch.float64).view(recipe["shape"])
    values = parity.normal_input(recipe["seed"], recipe["shape"])
    return torch.from_numpy(values * recipe.get("mul", 1.0) + recipe.get("add", 0.0))


def close(found: Tensor, key: str) -> None:
    torch.testing.assert_close(found, torch.from_numpy(EXPECTED[key]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", META["input"]["ops"])
def test_parity(name):
    recipe = META["input"]["ops"][name]
    tensors = {key: drawn(recipe[key]).requires_grad_() for key in NAMES if recipe[key]}
    grid = {key: recipe[key] for key in ("stride", "padding", "dilation", "groups", "deform_groups")}
    out = modulated_deform_conv2d(**tensors, **grid)
    close(out.detach(), f"{name}.out")
    for key, found in zip(tensors, torch.autograd.grad(out, tensors.values(), drawn(recipe["grad_out"])), strict=True):
        close(found, f"{name}.grad_{key}")


@pytest.mark.parametrize("name", META["input"]["modules"])
def test_parity_of_the_module(name):
    recipe = dict(META["input"]["modules"][name])
    x, slope = drawn(recipe.pop("x")).requires_grad_(), drawn(recipe.pop("grad_out"))
    published = {key: torch.from_numpy(np.asarray(parity.fill(key, shape))) for key, shape in recipe.pop("state_dict")}
    module = ModulatedDeformConv2d(**recipe).double()
    module.load_state_dict({key.replace("conv_offset", "conv_offset_mask"): v for key, v in published.items()})
    out = module(x)
    close(out.detach(), f"{name}.out")
    out.backward(slope)
    close(x.grad, f"{name}.grad_x")
    for key, parameter in module.named_parameters():
        close(parameter.grad, f"{name}.grad.{key.replace('conv_offset_mask', 'conv_offset')}")
