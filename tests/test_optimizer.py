"""Parameter groups and the learning rate schedule against the published rules."""

from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

import densepred
from densepred.encoders import ConvNeXt, MixVisionTransformer, ResNet, SwinTransformer
from densepred.engine.optimizer import DecayGroupsConstructor, LayerDecayConstructor, WarmupPolyLR
from densepred.errors import ConfigError
from densepred.registry import OPTIM_WRAPPER_CONSTRUCTORS

CONFIGS = Path(__file__).parents[1] / "configs"
TABLES = ["cluster_centers", "query_positions", "key_positions", "value_positions"]
PARAMWISE = dict(lr_mult=dict(encoder=0.1), no_decay=TABLES)


def constructor(**paramwise) -> DecayGroupsConstructor:
    optimizer = dict(type="AdamW", lr=5e-4, weight_decay=0.05)
    return DecayGroupsConstructor(dict(type="OptimWrapper", optimizer=optimizer), paramwise)


@pytest.mark.parametrize("config", ["kmax_r50_coco.py", "kmax_convnext_t_coco.py"])
def test_groups_of_the_published_models(config):
    with torch.device("meta"):
        model = densepred.build_model(CONFIGS / config)
    groups = {
        id(p): (g["lr"], g["weight_decay"]) for g in constructor(**PARAMWISE).param_groups(model) for p in g["params"]
    }
    assert len(groups) == len(list(model.parameters()))
    for module_name, module in model.named_modules():
        norm = "Norm" in type(module).__name__ and "Conv" not in type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            rate, decay = groups[id(parameter)]
            full = f"{module_name}.{name}".lstrip(".")
            assert rate == pytest.approx(5e-5 if full.startswith("encoder.") else 5e-4), full
            free = norm or name == "bias" or name == "gamma" or name in TABLES
            assert decay == (0.0 if free else 0.05), full


def test_few_groups_and_frozen_parameters_left_out():
    model = nn.ModuleDict({"encoder": nn.Linear(2, 3), "head": nn.Linear(3, 4)})
    model["head"].bias.requires_grad_(False)
    wrapper = constructor(lr_mult=dict(encoder=0.1))(model)
    assert isinstance(wrapper, OptimWrapper)
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in wrapper.optimizer.param_groups] == [
        (1, pytest.approx(5e-5), 0.05),
        (1, pytest.approx(5e-5), 0.0),
        (1, 5e-4, 0.05),
    ]


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        (dict(lr_multi={}), "lr_multi: unknown key; did you mean 'lr_mult'"),
        (dict(lr_mult=dict(backbone=0.1)), "lr_mult names 'backbone', which no parameter"),
        (dict(no_decay=["wieght"]), "no_decay names 'wieght'.*did you mean 'weight'"),
    ],
)
def test_wrong_names_are_errors(paramwise, message):
    with pytest.raises(ConfigError, match=message):
        constructor(**paramwise)(nn.ModuleDict({"encoder": nn.Linear(2, 2)}))


def test_schedule_is_the_published_one():
    parameter = nn.Parameter(torch.zeros(1))
    groups = [dict(params=[parameter], lr=5e-4), dict(params=[nn.Parameter(torch.zeros(1))], lr=5e-5)]
    wrapper = OptimWrapper(torch.optim.SGD(groups, lr=5e-4))
    scheduler = WarmupPolyLR(wrapper, warmup_iters=50, end=1500)
    rates = []
    for _ in range(1500):
        rates.append([group["lr"] for group in wrapper.optimizer.param_groups])
        wrapper.step()
        scheduler.step()
    assert rates[0][0] == pytest.approx(5e-7)
    assert rates[25][0] == pytest.approx(5e-4 * (0.001 + 0.999 / 2))
    assert rates[49][0] == pytest.approx(5e-4 * (0.001 + 0.999 * 0.98))
    assert rates[50][0] == pytest.approx(5e-4 * (1 - 50 / 1500) ** 0.9), "t counts from 0, so the rate drops here"
    assert rates[1499][0] == pytest.approx(5e-4 * (1 / 1500) ** 0.9)
    assert all(slow == pytest.approx(fast / 10) for fast, slow in rates)


def test_schedule_resumes():
    def fresh() -> WarmupPolyLR:
        return WarmupPolyLR(OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)), 3, end=10)

    first, second = fresh(), fresh()
    for _ in range(5):
        first.optimizer.step()
        first.step()
    second.load_state_dict(first.state_dict())
    for scheduler in (first, second):
        scheduler.optimizer.step()
        scheduler.step()
    assert second.get_last_value() == first.get_last_value() == [pytest.approx(0.4**0.9)]


def test_prolonged_run_follows_the_new_end():
    wrapper = OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    stored = WarmupPolyLR(wrapper, 0, end=4)
    for _ in range(4):
        wrapper.optimizer.step()
        stored.step()
    longer = WarmupPolyLR(OptimWrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)), 0, end=10)
    longer.load_state_dict(stored.state_dict())
    longer.optimizer.step()
    longer.step()
    assert longer.get_last_value() == [pytest.approx(0.5**0.9)]


def test_biases_may_decay_but_norms_and_named_tables_do_not():
    model = nn.ModuleDict(
        {
            "head": nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)),
            "decoder": nn.Linear(2, 2),
            "other": nn.GroupNorm(1, 2),
        }
    )
    model["head"].register_parameter("level_embed", nn.Parameter(torch.zeros(3, 2)))
    model["decoder"].register_parameter("level_embed", nn.Parameter(torch.zeros(3, 2)))
    groups = constructor(no_decay=["head.level_embed"], decay_biases=True).param_groups(model)
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    free = {name for name, p in model.named_parameters() if decay[id(p)] == 0}
    assert free == {"head.level_embed", "head.1.weight", "head.1.bias", "other.weight", "other.bias"}


def layer_decay(**paramwise) -> LayerDecayConstructor:
    optimizer = dict(type="AdamW", lr=1e-4, weight_decay=0.05)
    return LayerDecayConstructor(dict(type="OptimWrapper", optimizer=optimizer), paramwise)


def rates_by_name(model: nn.Module, **paramwise) -> dict[str, tuple[float, float]]:
    groups = layer_decay(**paramwise).param_groups(model)
    found = {id(p): (group["lr"] / 1e-4, group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def meta_model(encoder, **options) -> nn.Module:
    with torch.device("meta"):
        decoder = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        return nn.ModuleDict({"encoder": encoder(**options), "decoder": decoder, "head": nn.Conv2d(2, 2, 1)})


@pytest.mark.parametrize("num_layers", [6, 12])
def test_convnext_learns_by_stages(num_layers):
    model = meta_model(ConvNeXt, arch="tiny", output_norm=True)
    rates = rates_by_name(model, decay_rate=0.9, num_layers=num_layers)
    # 0.9 to the powers 7, 6, 5, 4, 3 and 0, and six layers more in the larger models
    more = {6: 1.0, 12: 0.531441}[num_layers]
    for name, factor in {
        "downsample_layers.0.0.weight": 0.4782969 * more,
        "downsample_layers.3.1.weight": 0.4782969 * more,
        "stages.0.2.dwconv.weight": 0.531441 * more,
        "stages.1.0.pwconv1.weight": 0.59049 * more,
        "stages.2.8.pwconv2.weight": 0.6561 * more,
        "stages.3.0.dwconv.weight": 0.729 * more,
    }.items():
        assert rates[f"encoder.{name}"] == (pytest.approx(factor), 0.05), name
    assert rates["encoder.stages.2.0.gamma"] == (pytest.approx(0.6561 * more), 0)
    assert rates["encoder.downsample_layers.0.1.weight"] == (pytest.approx(0.4782969 * more), 0)
    assert rates["encoder.norm0.weight"] == rates["decoder.1.weight"] == rates["head.bias"] == (1, 0)
    assert rates["decoder.0.weight"] == rates["head.weight"] == (1, 0.05)


def test_swin_learns_by_layers():
    rates = rates_by_name(
        meta_model(SwinTransformer, depths=(2, 2, 18, 2), window_size=12), decay_rate=0.85, num_layers=12
    )
    for name, layer in {
        "patch_embed.proj.weight": 0,
        "layers.0.blocks.1.attn.qkv.weight": 1,
        "layers.0.downsample.reduction.weight": 1,
        "layers.1.blocks.0.mlp.fc1.weight": 2,
        "layers.1.downsample.reduction.weight": 2,
        "layers.2.downsample.reduction.weight": 3,
        "layers.2.blocks.1.mlp.fc2.weight": 3,
        "layers.2.blocks.2.mlp.fc2.weight": 4,
        "layers.2.blocks.17.attn.proj.weight": 11,
        "layers.3.blocks.0.attn.relative_position_bias_table": 12,
    }.items():
        assert rates[f"encoder.{name}"] == (pytest.approx(0.85 ** (13 - layer)), 0.05), name
    assert rates["encoder.patch_embed.proj.bias"] == (pytest.approx(0.12090549), 0)  # 0.85 ** 13
    assert rates["encoder.layers.3.blocks.1.norm1.weight"] == (pytest.approx(0.85), 0)
    assert rates["encoder.norm3.weight"] == (1, 0) and rates["head.weight"] == (1, 0.05)


def test_layer_decay_is_registered_and_leaves_frozen_parameters_out():
    model = meta_model(ConvNeXt)
    model["encoder"].downsample_layers.requires_grad_(False)
    wrapper = OPTIM_WRAPPER_CONSTRUCTORS.build(
        dict(
            type="LayerDecayConstructor",
            optim_wrapper_cfg=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1)),
            paramwise_cfg=dict(decay_rate=0.5, num_layers=6),
        )
    )(model)
    assert isinstance(wrapper, OptimWrapper)
    assert sorted({group["lr"] for group in wrapper.optimizer.param_groups}) == [2**-6, 2**-5, 2**-4, 2**-3, 1]
    found = sum(len(group["params"]) for group in wrapper.optimizer.param_groups)
    assert found == sum(p.requires_grad for p in model.parameters()) < len(list(model.parameters()))


@pytest.mark.parametrize(
    ("encoder", "paramwise", "message"),
    [
        (ConvNeXt, dict(decay_rat=0.9, num_layers=6), "decay_rat: unknown key; did you mean 'decay_rate'"),
        (ConvNeXt, dict(decay_rate=0.9), "needs decay_rate in .* and num_layers"),
        (ConvNeXt, dict(decay_rate=1.5, num_layers=6), "needs decay_rate in "),
        (ConvNeXt, dict(decay_rate=0.9, num_layers=3), r"num_layers=3: encoder\.stages\.3\..* is in layer 4"),
        (SwinTransformer, dict(decay_rate=0.9, num_layers=4), r"num_layers=4: encoder\.layers\.2\..* is in layer 5"),
        (
            ResNet,
            dict(decay_rate=0.9, num_layers=6),
            "model.encoder is ResNet, and only the layers of ConvNeXt or Swin",
        ),
    ],
)
def test_wrong_layer_decay_is_named(encoder, paramwise, message):
    with pytest.raises(ConfigError, match=message):
        layer_decay(**paramwise).param_groups(meta_model(encoder))


def test_segformer_s_recipe_decays_biases_but_no_norm_and_learns_faster_outside_the_encoder():
    with torch.device("meta"):
        head = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
        model = nn.ModuleDict({"encoder": MixVisionTransformer("b0"), "decoder": head, "head": nn.Conv2d(2, 2, 1)})
    groups = constructor(lr_mult=dict(decoder=10.0, head=10.0), decay_biases=True).param_groups(model)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    rates = {name: found[id(parameter)] for name, parameter in model.named_parameters()}
    for name in ("0.0.norm.weight", "1.1.0.attn.norm.bias", "2.1.0.norm2.weight", "3.2.bias"):
        assert rates[f"encoder.layers.{name}"] == (5e-4, 0), name
    assert rates["encoder.layers.0.1.0.attn.attn.in_proj_bias"] == (5e-4, 0.05)
    assert rates["decoder.1.weight"] == (pytest.approx(5e-3), 0)
    assert rates["head.bias"] == rates["decoder.0.weight"] == (pytest.approx(5e-3), 0.05)


def test_without_a_constructor_everything_decays_alike():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=5e-4)
    wrapper = build_optim_wrapper(model, dict(type="OptimWrapper", optimizer=optimizer))
    (group,) = wrapper.optimizer.param_groups
    assert len(group["params"]) == 4 and (group["lr"], group["weight_decay"]) == (0.01, 5e-4)
