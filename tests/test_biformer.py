"""The BiFormer encoder: the published numbers, counts and names, any size, and the recipes' learning rates."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from densepred.encoders import BiFormer
from densepred.encoders.biformer import Attention, BiLevelRoutingAttention, Block
from densepred.engine.build import build_model
from densepred.engine.config import load_linked_config
from densepred.engine.conversion import convert_state_dict, detect_source, load_weights, to_official
from tests import parity
from tests.small import CONFIGS

SMALL = dict(embed_dim=32, depths=(1, 2, 1, 2))
PUBLISHED = {  # with the classifier of ImageNet, and the encoder of a dense model
    "T": (dict(embed_dim=64, depths=(2, 2, 8, 2)), 13_142_760, 12_630_656),
    "S": (dict(embed_dim=64, depths=(4, 4, 18, 4)), 25_536_232, 25_024_128),
    "B": (dict(embed_dim=96, depths=(4, 4, 18, 4)), 56_804_968, None),
}
CASE = "biformer_t"


def small(**options) -> BiFormer:
    """A small encoder in float64 whose norms and biases are all in play."""
    torch.manual_seed(0)
    model = BiFormer(**SMALL | options).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def official_weights() -> tuple[dict, dict, dict]:
    meta, expected = parity.case(parity.CASES / CASE)
    return meta, expected, {key: torch.from_numpy(value) for key, value in parity.filled_state(meta).items()}


def test_reproduces_the_official_maps():
    meta, expected, official = official_weights()
    with torch.device("meta"):  # no time for initial values that are overwritten
        model = BiFormer()
    model.to_empty(device="cpu").double().eval()
    model.load_state_dict(convert_state_dict(official, "biformer", model))
    for image, prefix in (("image", ""), ("image_padded", "padded.")):
        images = torch.from_numpy(parity.normal_input(meta["input"][image]["seed"], meta["input"][image]["shape"]))
        with torch.no_grad():
            maps = model(images)
        assert model.channels == [x.shape[1] for x in maps]
        for i, x in enumerate(maps):
            name = f"{prefix}feat_{i}"
            assert list(x.shape) == meta["outputs"][name]["shape"]
            found = parity.thin(x.numpy(), meta["outputs"][name])
            assert abs(found - expected[name].reshape(found.shape)).max() <= 1e-12, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    options, classifier, dense = PUBLISHED[name]
    with torch.device("meta"):
        model = BiFormer(**options)
    count = sum(p.numel() for p in model.parameters())
    assert dense in (count, None)
    width, norms = model.channels[-1], sum(p.numel() for p in model.extra_norms.parameters())
    assert count - norms + 2 * width + 1000 * (width + 1) == classifier


def test_stages_differ_as_the_published_weights_need():
    model = BiFormer()
    routed = [m for m in model.modules() if isinstance(m, BiLevelRoutingAttention)]
    assert [(m.heads, m.topk, m.scale) for m in routed[::2]][:3] == [(2, 1, 1 / 8), (4, 4, 128**-0.5), (8, 16, 1 / 16)]
    assert all(m.qkv.bias is not None for m in routed)
    last = [m for m in model.modules() if isinstance(m, Attention)]
    assert len(routed) == 12 and len(last) == 2
    assert all(m.qkv.bias is None and m.proj.bias is not None for m in last)


@pytest.mark.parametrize("size", [(37, 50), (64, 32), (9, 53), (1, 3)])
def test_takes_any_size(size):
    model, images = small(), torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        maps = model(images)
        alone = model(images[1:])
    for stride, x, y in zip(model.strides, maps, alone, strict=True):
        assert x.shape[-2:] == tuple(-(-n // stride) for n in size)
        assert x.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(x[1:], y, rtol=0, atol=1e-10)  # images do not see each other


def test_the_next_stage_reads_the_map_before_its_norm():
    model, images = small(), torch.randn(1, 3, 40, 56, dtype=torch.float64)
    before = model(images)
    nn.init.zeros_(model.extra_norms["1"].weight)
    after = model(images)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True]


def test_padding_is_attended_to():
    """Tokens outside the map have the projection's biases as keys: without these the output changes, at no border alone."""
    attn, x = BiLevelRoutingAttention(32, 1, 4, 16).double(), torch.randn(1, 13, 16, 32, dtype=torch.float64)
    nn.init.ones_(attn.qkv.bias)
    nn.init.zeros_(attn.lepe.weight)
    found = attn(x)
    q, k, v = attn.qkv(torch.cat([x, x.new_zeros(1, 3, 16, 32)], dim=1)).flatten(1, 2).chunk(3, dim=2)
    y = ((q @ k.transpose(1, 2) * 32**-0.5).softmax(2) @ v).view(1, 16, 16, 32)[:, :13]
    torch.testing.assert_close(found, attn.wo(y + attn.lepe.bias), rtol=0, atol=1e-12)


def test_weights_fit_any_number_of_regions():
    state, images = small().state_dict(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    maps = []
    for regions_per_side in (4, 7, 8):
        model = small(regions_per_side=regions_per_side)
        model.load_state_dict(state)
        maps.append(model(images)[-1])
    assert not torch.equal(maps[0], maps[1]) and not torch.equal(maps[1], maps[2])


def test_only_the_maps_asked_for_are_computed():
    model = small(out_features=("res3", "res2"))
    images = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    whole = small()
    whole.load_state_dict(model.state_dict(), strict=False)
    expected = whole(images)
    model.stages[2] = model.stages[3] = None
    for found, wanted in zip(model(images), (expected[1], expected[0]), strict=True):
        assert torch.equal(found, wanted)
    assert sorted(model.extra_norms) == ["0", "1"]
    model.stages[1] = None
    model.out_features = ("res2", "res3")
    assert torch.equal(model(images, num_maps=1)[0], expected[0])


def test_drop_path_rises_linearly_and_is_off_in_evaluation():
    rates = [m.drop_path_rate for m in small(drop_path_rate=0.5).modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0.1 * i for i in range(6)])
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    dropping, plain = small(drop_path_rate=0.9), small(drop_path_rate=0.0)
    assert torch.equal(dropping(image)[-1], plain(image)[-1])
    assert not torch.equal(dropping.train()(image)[-1], plain.train()(image)[-1])


def test_initial_weights_are_the_official_ones():
    torch.manual_seed(0)
    state = BiFormer().state_dict()
    for name in ("stages.0.0.attn.qkv.weight", "stages.2.3.mlp.3.weight", "stages.3.1.attn.proj.weight"):
        assert state[name].std().item() == pytest.approx(0.02, rel=0.06), name
    bound = (64 * 9) ** -0.5  # convolutions start as PyTorch's do
    assert state["downsample_layers.1.0.weight"].abs().max().item() == pytest.approx(bound, rel=0.01)
    linear = [
        k for k in state if k.endswith("bias") and k.split(".")[-2] in ("qkv", "wo", "proj", "0", "3") and ".mlp." in k
    ]
    assert linear and not any(state[key].any() for key in linear)


@pytest.mark.parametrize("cast", ["autocast", "bfloat16"])
def test_half_precision_stays_near(cast):
    torch.manual_seed(0)
    model, image = BiFormer(**SMALL).eval(), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        wanted = model(image)
    if cast == "bfloat16":
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast("cpu") if cast == "autocast" else nullcontext():
        found = model(image)
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b).norm() < 0.03 * b.norm()
    sum((m.float() * w).sum() for m, w in zip(found, wanted, strict=True)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_exports_with_another_size():
    model = small(
        depths=(1, 1, 1, 1), regions_per_side=4, out_features=("res2", "res3")
    ).float()  # tracing takes its time
    free = {i: 32 * torch.export.Dim(name, min=2, max=32) for i, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(model, (torch.randn(1, 3, 160, 192),), dynamic_shapes=(free,), strict=False)
    other = torch.randn(1, 3, 128, 224)
    with torch.no_grad():
        for found, wanted in zip(program.module()(other), model(other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_classifier_goes_in_and_leaves_its_head(tmp_path):
    _, _, official = official_weights()
    classifier = {k: v for k, v in official.items() if not k.startswith("extra_norms.")}
    classifier |= {"norm.weight": torch.ones(512), "head.weight": torch.ones(1000, 512), "head.bias": torch.ones(1000)}
    assert detect_source(classifier) == "biformer"
    torch.save({"model": classifier, "epoch": 299}, tmp_path / "biformer_tiny.pth")
    model = BiFormer(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "biformer_tiny.pth"))).double()
    model.init_weights()
    assert torch.equal(model.stages[2][5].attn.qkv.weight, official["stages.2.5.attn.qkv.qkv.weight"])
    assert torch.equal(model.stages[3][1].attn.qkv.weight, official["stages.3.1.attn.qkv.weight"])
    assert (model.extra_norms["2"].weight == 1).all()
    report = load_weights(model, tmp_path / "biformer_tiny.pth")
    assert "dropped by rule: norm.weight, head.weight, head.bias" in report
    assert "not in files of this kind, kept as initialised: extra_norms.0.weight" in report
    del classifier["stages.1.1.attn.lepe.bias"]
    with pytest.raises(ValueError, match=r"stages\.1\.1\.attn\.lepe\.bias"):
        convert_state_dict(classifier, "biformer", model)


def test_the_case_s_keys_go_back_as_they_were():
    official = official_weights()[2]
    with torch.device("meta"):
        model = BiFormer()
        part = BiFormer(out_features=("res4",))
    back = to_official(convert_state_dict(official, "biformer", model), "biformer")
    assert back.keys() == official.keys() and all(torch.equal(back[k], v) for k, v in official.items())
    assert sorted(convert_state_dict(official, "biformer", part)) == sorted(part.state_dict())


@pytest.mark.parametrize("config", ["upernet_biformer_s_ade20k", "fpn_biformer_s_ade20k"])
def test_whole_models_go_to_official_names_and_back(config):
    with torch.device("meta"):
        model = build_model(CONFIGS / f"{config}.py", {"model.encoder.depths": (2, 2, 8, 2)})
    state = model.state_dict()
    official = to_official(state, "biformer-segmentation")
    assert detect_source(official) == "biformer-segmentation"
    keys = {key.removeprefix("backbone.") for key in official if key.startswith("backbone.")}
    assert keys == {key for key, _ in json.loads((parity.CASES / CASE / "meta.json").read_text())["state_dict"]}
    parts = {key.split(".")[0] for key in official}
    assert parts == {"backbone", "decode_head", *(["neck"] if "fpn_" in config else ["auxiliary_head"])}
    pyramid = official["neck.fpn_convs.3.conv.bias" if "fpn_" in config else "decode_head.fpn_convs.2.bn.bias"]
    assert pyramid is state["decoder.fpn_convs.3.conv.bias" if "fpn_" in config else "decoder.fpn_convs.2.bn.bias"]
    assert official["decode_head.conv_seg.weight"] is state["head.classifier.weight"]
    back = convert_state_dict(official, "biformer-segmentation", model)
    assert list(back) == list(state) and all(back[key] is value for key, value in state.items())
    # The encoder by itself takes its part.
    assert list(convert_state_dict(official, "biformer-segmentation", model.encoder)) == list(
        model.encoder.state_dict()
    )


def test_semantic_fpn_learns_at_the_published_rates():
    """MMCV's cosine from the first step, times a warm-up from a tenth over 1,000 steps (here 1 of 100 of both)."""
    cfg = load_linked_config(CONFIGS / "fpn_biformer_s_ade20k.py")
    assert (cfg.warmup_iters, cfg.train_cfg.max_iters) == (1000, 80_000)
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    ends = {"${warmup_iters}": 10, "${train_cfg.max_iters}": 800}
    schedulers = [
        PARAM_SCHEDULERS.build(dict(s, end=ends[s["end"]]), default_args=dict(optimizer=optimizer))
        for s in cfg.param_scheduler
    ]
    for step in range(800):
        rate = 1e-4 * (1 + math.cos(math.pi * step / 800)) + 1e-12
        # MMEngine's warm-up ends a step earlier than MMCV's.
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * min(1, 0.1 + step * 0.9 / 9), rel=1e-4)
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(depths=(2, 2, 8)), "depths=(2, 2, 8): BiFormer has four stages"),
        (dict(embed_dim=48), "embed_dim=48: a head has 32 channels"),
        (dict(regions_per_side=3), "regions_per_side=3: a region attends to 16 others, choose 4 or more"),
        (dict(out_features=("res2", "res1")), "no map 'res1'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        BiFormer(**options)
    assert message in str(error.value)
