"""The MiT encoder: both published forms, a second derivation, any size, and NVIDIA's names."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densepred.encoders import MixVisionTransformer, mit
from densepred.encoders.mit import Block
from densepred.engine.conversion import convert_state_dict, detect_source, to_official
from densepred.engine.mapping_segformer import nvidia_to_ours, ours_to_nvidia
from tests import parity

CASES = {  # the one in mmsegmentation's form, the other with NVIDIA's code
    "mmseg_segformer_mit_b0_ade20k": ("mmsegmentation", 1e-6),
    "vwformer_mit_b0_ade20k": ("mit", 1e-5),
}


@pytest.fixture
def small(monkeypatch):
    """A small MiT in float64 whose norms and biases are all in play."""
    monkeypatch.setitem(mit.ARCHS, "b0", (4, (2, 1, 2, 1)))

    def build(**kwargs):
        torch.manual_seed(0)
        model = MixVisionTransformer("b0", **kwargs).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    return build


def official_of(case):
    """Return the case's expected arrays, its input, and its weights as the file of its source has them."""
    meta, expected = parity.case(parity.CASES / case)
    weights = {key: torch.from_numpy(value) for key, value in parity.filled_state(meta).items()}
    if CASES[case][0] == "mit":  # an encoder's file, of which the composed case is a part
        weights = {k.removeprefix("backbone."): v for k, v in weights.items() if k.startswith("backbone.")}
    return meta, expected, weights


@pytest.mark.parametrize("case", CASES)
def test_reproduces_the_official_features(case):
    source, eps = CASES[case]
    meta, expected, official = official_of(case)
    assert detect_source(official) == source
    images = torch.from_numpy(parity.image_batch(meta))

    def error(eps, num_maps):
        """Return the largest difference of the first maps, relative to a map's largest value."""
        with torch.device("meta"):  # no time for initial values that are overwritten
            model = MixVisionTransformer("b0", reduction_norm_eps=eps)
        model.to_empty(device="cpu").double().eval()
        model.load_state_dict(convert_state_dict(official, source, model))
        with torch.no_grad():
            maps = model(images, num_maps)
        wanted = [expected[f"feat_{i}"] for i in range(num_maps)]
        found = [parity.thin(x.numpy(), meta["outputs"][f"feat_{i}"]) for i, x in enumerate(maps)]
        return max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted, strict=True))

    assert error(eps, num_maps=4) <= 1e-13
    assert error({1e-5: 1e-6, 1e-6: 1e-5}[eps], num_maps=1) > 1e-8  # the other form's norms are told apart


def test_nvidia_s_file_goes_back_as_it_was():
    official = official_of("vwformer_mit_b0_ade20k")[2]
    with torch.device("meta"):
        model = MixVisionTransformer("b0")
    ours = convert_state_dict(official | {"head.weight": torch.ones(1000, 256)}, "mit", model)
    back = to_official(ours, "mit")
    assert back.keys() == official.keys() and all(torch.equal(back[k], v) for k, v in official.items())
    weight = ours["layers.2.1.1.attn.attn.in_proj_weight"]
    assert torch.equal(weight[:160], official["block3.1.attn.q.weight"])
    assert torch.equal(weight[160:], official["block3.1.attn.kv.weight"])
    assert ours["layers.0.1.0.ffn.layers.4.weight"].shape == (32, 128, 1, 1)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("patch_embed1.proj.weight", "layers.0.0.projection.weight"),
        ("patch_embed4.norm.bias", "layers.3.0.norm.bias"),
        ("block2.1.attn.sr.bias", "layers.1.1.1.attn.sr.bias"),
        ("block2.1.attn.norm.weight", "layers.1.1.1.attn.norm.weight"),
        ("block3.17.attn.proj.weight", "layers.2.1.17.attn.attn.out_proj.weight"),
        ("block3.0.mlp.dwconv.dwconv.weight", "layers.2.1.0.ffn.layers.1.weight"),
        ("block1.0.norm2.weight", "layers.0.1.0.norm2.weight"),
        ("norm3.bias", "layers.2.2.bias"),
    ],
)
def test_names_of_nvidia(theirs, ours):
    assert (nvidia_to_ours(theirs), ours_to_nvidia(ours)) == (ours, theirs)


def test_a_query_without_its_key_and_value_is_named(small):
    official = to_official(small().state_dict(), "mit")
    del official["block1.0.attn.kv.weight"]
    with pytest.raises(ValueError, match=r"unknown to the model: layers\.0\.1\.0\.attn\.q\.weight"):
        convert_state_dict(official, "mit", small())


def _reference(state, images, head_dim, depths):
    """MiT written down again from its state dict: windows cut by ``unfold``, PyTorch's own attention."""

    def norm(x, name, eps=1e-6):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def conv(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    x, maps = images, []
    for stage, depth in enumerate(depths):
        name, (kernel, stride) = f"layers.{stage}", (3, 2) if stage else (7, 4)
        x = conv(x, f"{name}.0.projection", stride=stride, padding=kernel // 2).permute(0, 2, 3, 1)  # (B, H, W, C)
        x = norm(x, f"{name}.0.norm")
        heads, ratio = (1, 2, 5, 8)[stage], (8, 4, 2, 1)[stage]
        batch, height, width, channels = x.shape
        for block in range(depth):
            at = f"{name}.1.{block}"
            y = norm(x, f"{at}.norm1")
            query = context = y.flatten(1, 2).transpose(0, 1)  # (N, B, C)
            if ratio > 1:
                missing = (max(ratio - width, 0), max(ratio - height, 0))
                padded = F.pad(y.permute(0, 3, 1, 2), (0, missing[0], 0, missing[1]))
                patches = F.unfold(padded, ratio, stride=ratio).transpose(1, 2)  # (B, M, C * ratio ** 2)
                context = F.linear(patches, state[f"{at}.attn.sr.weight"].flatten(1), state[f"{at}.attn.sr.bias"])
                context = norm(context, f"{at}.attn.norm").transpose(0, 1)
            inside = {k: state[f"{at}.attn.attn.{k}"] for k in ("in_proj_weight", "in_proj_bias")}
            y, _ = F.multi_head_attention_forward(
                *(query, context, context, channels, heads, inside["in_proj_weight"], inside["in_proj_bias"]),
                *(None, None, False, 0.0),
                *(state[f"{at}.attn.attn.out_proj.weight"], state[f"{at}.attn.attn.out_proj.bias"]),
            )
            x = x + y.transpose(0, 1).reshape(batch, height, width, channels)
            y = conv(norm(x, f"{at}.norm2").permute(0, 3, 1, 2), f"{at}.ffn.layers.0")
            y = F.gelu(conv(y, f"{at}.ffn.layers.1", padding=1, groups=y.shape[1]))
            x = x + conv(y, f"{at}.ffn.layers.4").permute(0, 2, 3, 1)
        x = norm(x, f"{name}.2").permute(0, 3, 1, 2)
        maps.append(x)
    return maps


@pytest.mark.parametrize("size", [(37, 50), (64, 32), (9, 53), (1, 3)])
def test_equals_a_second_derivation_at_any_size(size, small):
    model, images = small(), torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        for stride, a, b in zip(
            model.strides, model(images), _reference(model.state_dict(), images, *mit.ARCHS["b0"]), strict=True
        ):
            assert a.shape[-2:] == tuple(-(-n // stride) for n in size)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_gradients_are_those_of_the_derivation(small):
    model, images = small(), torch.randn(2, 3, 41, 30, dtype=torch.float64, requires_grad=True)
    parameters = dict(model.named_parameters())
    wanted = _reference(parameters, images, *mit.ARCHS["b0"])
    weights = [torch.randn_like(m) for m in wanted]
    leaves = [images, *parameters.values()]
    gradients = [
        torch.autograd.grad(sum((w * m).sum() for w, m in zip(weights, maps, strict=True)), leaves)
        for maps in (model(images), wanted)
    ]
    for name, a, b in zip(["images", *parameters], *gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * max(1, float(b.abs().max())), msg=name)


# The encoders of table 1 of the paper, in millions.
@pytest.mark.parametrize(
    ("arch", "millions"), [("b0", 3.4), ("b1", 13.1), ("b2", 24.2), ("b3", 44.0), ("b4", 60.8), ("b5", 81.4)]
)
def test_parameter_counts_are_the_published_ones(arch, millions):
    with torch.device("meta"):
        model = MixVisionTransformer(arch)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.11)
    width = 32 if arch == "b0" else 64
    assert (model.channels, model.strides) == ([width, 2 * width, 5 * width, 8 * width], [4, 8, 16, 32])


def test_only_the_maps_asked_for_are_computed(small):
    model = small(out_features=("res3", "res2"))
    images = torch.randn(1, 3, 40, 56, dtype=torch.float64)
    whole = small()(images)
    model.layers[2] = model.layers[3] = None
    for found, wanted in zip(model(images), (whole[1], whole[0]), strict=True):
        assert torch.equal(found, wanted)
    model.layers[1] = None
    other = small(out_features=("res2", "res5"))
    other.layers[1] = None
    assert torch.equal(other(images, num_maps=1)[0], whole[0])


def test_drop_path_rises_linearly_and_is_off_in_evaluation(small):
    rates = [m.drop_path_rate for m in small(drop_path_rate=0.5).modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0.1 * i for i in range(6)])
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    dropping, plain = small(drop_path_rate=0.9), small(drop_path_rate=0.0)
    assert torch.equal(dropping(image)[-1], plain(image)[-1])
    assert not torch.equal(dropping.train()(image)[-1], plain(image)[-1])


def test_initial_weights_are_the_official_ones():
    torch.manual_seed(0)
    state = MixVisionTransformer("b0").state_dict()
    for name, std in {
        "layers.0.0.projection.weight": (2 / (32 * 49)) ** 0.5,
        "layers.1.1.0.attn.sr.weight": (2 / (64 * 16)) ** 0.5,
        "layers.2.1.0.ffn.layers.1.weight": (2 / 9) ** 0.5,  # depthwise
        "layers.3.1.1.ffn.layers.4.weight": (2 / 256) ** 0.5,
        "layers.3.1.1.attn.attn.in_proj_weight": 0.02,
        "layers.3.1.1.attn.attn.out_proj.weight": 0.02,
    }.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.06), name
    assert not any(value.any() for name, value in state.items() if name.endswith("bias"))


@pytest.mark.parametrize("cast", ["autocast", "bfloat16"])
def test_half_precision_stays_near(cast, small):
    model, image = small().float(), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        wanted = model(image)
    if cast == "bfloat16":
        model, image = model.bfloat16(), image.bfloat16()
    with torch.autocast("cpu") if cast == "autocast" else nullcontext():
        found = model(image)
    for a, b in zip(found, wanted, strict=True):
        assert (a.float() - b).abs().max() < 0.1 * b.abs().max()
    sum(m.float().square().mean() for m in found).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_exports_with_another_size(small):
    model = small().float()
    sides = {i: 32 * torch.export.Dim(name, min=2, max=32) for i, name in ((2, "height"), (3, "width"))}
    program = torch.export.export(model, (torch.randn(1, 3, 96, 128),), dynamic_shapes=(sides,), strict=False)
    other = torch.randn(1, 3, 64, 160)
    with torch.no_grad():
        for found, wanted in zip(program.module()(other), model(other), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(arch="b6"), "arch='b6': MixVisionTransformer knows b0, b1, b2, b3, b4, b5"),
        (dict(out_features=("res2", "res1")), "no map 'res1'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        MixVisionTransformer(**options)
    assert message in str(error.value)
