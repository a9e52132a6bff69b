"""A training step of every family calls our operators: seen by the dispatcher, forward and backward."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from densepred.engine.benchmark_switches import prepared, training_data
from tests.small import CONFIGS, small_recipe

EXPECTED = {
    "kmax_r18_shapes": {"kmeans_attention"},
    "ccnet_r18_shapes": {"criss_cross_attention", "criss_cross_attention_backward"},
    "vwformer_effnetlite0_camvid": {"varying_window_attention", "varying_window_attention_backward"},
    "centerpoly_resdcn18_cityscapes": {"modulated_deform_conv2d", "modulated_deform_conv2d_backward"},
    "centerpoly_r18_shapes": {"polygon_areas"},
    "mask2former_r18_shapes": {
        "ms_deform_attn_fused",
        "ms_deform_attn_fused_backward",
        "point_matching_costs",
        "sample_points",
        "sample_points_backward",
        "point_mask_losses",
        "point_mask_losses_backward",
    },
    "fpn_biformer_s_ade20k": {"bilevel_routing_attention", "bilevel_routing_attention_backward"},
}


class Calls(TorchDispatchMode):
    """The names of our operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "densepred":
            self.names.add(func._schema.name.removeprefix("densepred::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_training_step_calls_them(name):
    options = small_recipe(CONFIGS / f"{name}.py", data_root="nowhere")
    with training_data(CONFIGS / f"{name}.py", options) as cfg:
        (model,), images, samples = prepared(cfg, 2, "cpu", [()])
    with Calls() as calls:
        losses = model.train()(images, samples, mode="loss")
        sum(value for key, value in losses.items() if "loss" in key).backward()
    assert calls.names >= EXPECTED[name]
