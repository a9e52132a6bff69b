"""Parameter groups and the learning rate schedule against the published rules."""

from pathlib import Path

import pytest
import torch
from mmengine.optim import OptimWrapper
from torch import nn

import densepred
from densepred.engine.optimizer import DecayGroupsConstructor, WarmupPolyLR
from densepred.errors import ConfigError

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
