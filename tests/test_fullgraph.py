"""Encoder, decoder and head of every family are one graph to `torch.compile`: nothing in them falls back to Python."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from densepred import build_model
from tests.small import CONFIGS, small_recipe

FAMILIES = (
    "kmax_r18_shapes",
    "kmax_convnext_t_coco",
    "mask2former_r18_shapes",
    "mask2former_swin_t_coco",
    "mask2former_vw_swin_t_ade20k",
    "ccnet_r18_shapes",
    "vwformer_effnetlite0_camvid",
    "vwformer_mit_b0_ade20k",
    "unetpp_dsb2018",
    "unetpp_r34_camvid",
    "segformer_mit_b0_ade20k",
    "pspnet_r50_cityscapes",
    "centerpoly_r18_shapes",
    "centerpoly_resdcn18_cityscapes",
    "centerpoly_dla34_cityscapes",
)
"""A recipe of every family."""


def outputs(model: Callable[[Tensor], dict], images: Tensor) -> list:
    torch.manual_seed(1)  # of the dropout
    return tree_leaves(model(images))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_forward_is_one_graph(name):
    config = CONFIGS / f"{name}.py"
    torch.manual_seed(0)
    model = build_model(config, small_recipe(config)).train()
    images = torch.randn(2, 3, 64, 96)
    expected = outputs(model, images)
    torch._dynamo.reset()
    found = outputs(torch.compile(model, fullgraph=True, backend="eager"), images)
    tensors = [(a, b) for a, b in zip(found, expected, strict=True) if isinstance(b, Tensor)]
    assert tensors
    for a, b in tensors:
        torch.testing.assert_close(a, b)
