"""The encoders: published numbers, published sizes, and the arithmetic that differs between families."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densepred.encoders.convnext import ARCHS, Block, ConvNeXt, LayerNorm, drop_path
from densepred.encoders.resnet import BLOCKS, ConvNorm, ResNet
from tests import parity

ALL = ("stem", "res2", "res3", "res4", "res5")
D8 = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))


@pytest.fixture
def small_convnext(monkeypatch):
    """ConvNeXt "tiny" with few blocks and channels, its layer scales away from their start value of 1e-6."""
    monkeypatch.setitem(ARCHS, "tiny", ((1, 2, 1, 1), (8, 16, 24, 32)))

    def build(**kwargs):
        torch.manual_seed(0)
        model = ConvNeXt("tiny", **kwargs).double().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    return build


def test_resnet50_reproduces_the_official_features():
    meta, expected = parity.case(parity.CASES / "kmax_r50_coco_panoptic")
    state = parity.filled_state(meta)
    model = ResNet(50, norm_eps=meta["config"]["norm"]["eps"]).double().eval()
    model.load_state_dict(
        {k.removeprefix("backbone."): torch.from_numpy(v) for k, v in state.items() if k.startswith("backbone.")}
    )
    with torch.no_grad():
        maps = model(torch.from_numpy(parity.image_batch(meta)))
    for name, found in zip(model.out_features, maps, strict=True):
        error = np.abs(parity.thin(found.numpy(), meta["outputs"][name]) - expected[name]).max()
        assert error <= meta["tolerance"]["relative_to_absmax"] * np.abs(expected[name]).max(), name


# Published totals less the classifier (fc of 1000 classes; ConvNeXt's last norm too).
@pytest.mark.parametrize(
    ("build", "parameters"),
    [
        (lambda: ResNet(18), 11_689_512 - 513_000),
        (lambda: ResNet(34), 21_797_672 - 513_000),
        (lambda: ResNet(50), 25_557_032 - 2_049_000),
        (lambda: ResNet(101), 44_549_160 - 2_049_000),
        (lambda: ResNet(152), 60_192_808 - 2_049_000),
        (lambda: ConvNeXt("tiny"), 28_589_128 - 769_000 - 1_536),
        (lambda: ConvNeXt("small"), 50_223_688 - 769_000 - 1_536),
        (lambda: ConvNeXt("base"), 88_591_464 - 1_025_000 - 2_048),
        (lambda: ConvNeXt("large"), 197_767_336 - 1_537_000 - 3_072),
    ],
)
def test_parameter_counts_are_the_published_ones(build, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == parameters


@pytest.mark.parametrize("size", [(33, 65), (47, 61), (64, 96)])
@pytest.mark.parametrize("family", ["resnet", "deep stem", "convnext"])
def test_maps_have_the_stated_channels_and_ceil_of_size_by_stride(family, size, small_convnext):
    models = {
        "resnet": lambda: ResNet(18, ALL).eval(),
        "deep stem": lambda: ResNet(18, ALL, stem="deep").eval(),
        "convnext": lambda: small_convnext(out_features=ALL, kmax_padding=True).float(),
    }
    model = models[family]()
    maps = model(torch.randn(1, 3, *size))
    assert model.strides == [4, 4, 8, 16, 32]
    for found, channels, stride in zip(maps, model.channels, model.strides, strict=True):
        assert found.shape == (1, channels, *(-(-n // stride) for n in size))
    assert model.channels[0] == {"resnet": 64, "deep stem": 128, "convnext": 8}[family]


def test_maps_come_in_the_order_of_out_features():
    torch.manual_seed(0)
    # kMaX-DeepLab on Cityscapes sorts its decoder by this order, with res2 before the stem of equal stride.
    model = ResNet(18, ("res2", "stem", "res5")).eval()
    image = torch.randn(1, 3, 33, 33)
    res2, stem, res5 = model(image)
    assert (model.channels, model.strides) == ([64, 64, 512], [4, 4, 32])
    assert torch.equal(model.res2(stem), res2) and torch.equal(model.stem(image), stem) and res5.shape[1] == 512


@pytest.mark.parametrize(("in_1x1", "strides"), [(False, (1, 2)), (True, (2, 1))])
def test_stride_sits_where_the_option_says(in_1x1, strides):
    with torch.device("meta"):
        block = ResNet(50, stride_in_1x1=in_1x1).res3[0]
    assert (block.conv1.stride[0], block.conv2.stride[0]) == strides


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize(("contract", "firsts"), [(False, {4: 2, 5: 4}), (True, {5: 2})])
def test_dilation_sits_where_the_published_networks_have_it(depth, contract, firsts):
    with torch.device("meta"):
        model = ResNet(depth, **D8, contract_dilation=contract)
    found = {k: (m.dilation[0], m.padding[0]) for k, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    conv = 1 if depth == 18 else 2  # a basic block's second convolution is never dilated
    wanted = {f"res{i}.0.conv{conv}": d for i, d in firsts.items()}
    wanted |= {f"res{i}.{j}.conv{conv}": d for i, d in ((4, 2), (5, 4)) for j in range(1, BLOCKS[depth][i - 2])}
    assert {k: v for k, v in found.items() if v[0] > 1} == {k: (d, d) for k, d in wanted.items()}
    assert model.strides == [4, 8, 8, 8]


@pytest.mark.parametrize("depth", [18, 50])
def test_dilated_stage_sees_the_pixels_of_the_strided_one(depth):
    torch.manual_seed(0)
    plain = ResNet(depth).double().eval()
    dilated = ResNet(depth, strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), contract_dilation=True).double().eval()
    dilated.load_state_dict(plain.state_dict())
    image = torch.randn(1, 3, 65, 97, dtype=torch.float64)
    with torch.no_grad():
        (*_, coarse), (*_, res4, fine) = plain(image), dilated(image)
        # A basic block's second convolution is not dilated, so only what is before it agrees.
        if depth == 18:
            coarse, fine = plain.res5[0].conv1(res4), dilated.res5[0].conv1(res4)
    assert (tuple(coarse.shape[-2:]), tuple(fine.shape[-2:])) == ((3, 4), (5, 7))
    torch.testing.assert_close(fine[..., ::2, ::2], coarse, rtol=0, atol=1e-12 * float(coarse.abs().max()))


def test_max_pool_rounds_up_on_request():
    up, down = ResNet(18, ALL, **D8, ceil_mode=True).eval(), ResNet(18, ALL, **D8).eval()
    up.load_state_dict(down.state_dict())
    with torch.no_grad():
        for sides, wanted in (((64, 33), ((17, 9), (9, 5))), ((66, 35), ((17, 10), (9, 5)))):
            maps, floored = up(torch.zeros(1, 3, *sides)), down(torch.zeros(1, 3, *sides))
            assert [m.shape[-2:] for m in maps] == [wanted[0]] * 2 + [wanted[1]] * 3
            assert floored[0].shape[-2:] == tuple(-(-n // 4) for n in sides)
        image = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(
            up(image)[0][..., :16, :16], down(image)[0]
        )  # a row and a column more, the rest the same


@pytest.mark.parametrize("stem", ["7x7", "deep", "v1c"])
def test_conv1_is_the_map_before_the_max_pool(stem):
    torch.manual_seed(0)
    model = ResNet(18, ("conv1", "stem", "res2"), stem=stem).eval()
    conv1, pooled, _ = model(torch.randn(1, 3, 47, 62))
    assert (model.strides, model.channels) == ([2, 4, 4], [128 if stem == "deep" else 64] * 2 + [64])
    assert conv1.shape[-2:] == (24, 31) and conv1.min() == 0  # after the ReLU
    assert torch.equal(F.max_pool2d(conv1, 3, 2, 1), pooled)


def test_v1c_stem_has_half_the_deep_ones_width():
    with torch.device("meta"):
        stem = ResNet(18, stem="v1c").stem
    assert [m.out_channels for m in stem.children()] == [32, 32, 64]


@pytest.mark.parametrize(
    ("names", "num_maps", "computed"),
    [
        (("conv1", "res2", "res5"), 1, {"stem"}),
        (("conv1", "res2", "res5"), 2, {"stem", "res2"}),
        (("res4", "res2", "res5"), 1, {"stem", "res2", "res3", "res4"}),
        (("stem", "res3"), None, {"stem", "res2", "res3"}),
    ],
)
def test_fewer_maps_compute_nothing_behind(names, num_maps, computed):
    model, called = ResNet(18, names).eval(), set()
    for name, module in model.named_modules():
        if isinstance(module, ConvNorm):
            module.register_forward_hook(lambda *_, name=name: called.add(name.split(".")[0]))
    image = torch.randn(1, 3, 33, 33)
    maps = model(image, num_maps=num_maps)
    assert called == computed
    assert all(torch.equal(a, b) for a, b in zip(maps, model(image), strict=num_maps is None))


def test_every_parameter_of_a_dilated_resnet_gets_a_gradient():
    torch.manual_seed(0)
    model = ResNet(50, stem="v1c", **D8, contract_dilation=True, ceil_mode=True).train()
    sum(m.square().mean() for m in model(torch.randn(2, 3, 33, 34))).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_residual_makes_blocks_pass_their_input_on(depth):
    model = ResNet(depth, zero_init_residual=True).eval()
    x = torch.rand(1, model.channels[0], 5, 5)
    assert torch.equal(model.res2[1](x), x)


def test_norm_options_reach_every_batch_norm():
    with torch.device("meta"):
        model = ResNet(18, norm_eps=1e-3, norm_momentum=0.01)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == sum(isinstance(m, ConvNorm) for m in model.modules()) == 20
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}


def _channel_norm(x, weight, bias):
    mean, variance = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]


def _reference_convnext(state, x, blocks, kmax_padding):
    """ConvNeXt written down again, channels first throughout, from its state dict."""
    outputs = []
    for i, count in enumerate(blocks):
        first, second = ([state[f"downsample_layers.{i}.{j}.{p}"] for p in ("weight", "bias")] for j in (0, 1))
        if kmax_padding:
            x = F.pad(x, (1, 2, 1, 2) if i == 0 else (0, 1, 0, 1))
        if i == 0:
            x = _channel_norm(F.conv2d(x, *first, stride=4), *second)
            outputs.append(x)
        else:
            x = F.conv2d(_channel_norm(x, *first), *second, stride=2)
        for j in range(count):
            w = {k.removeprefix(f"stages.{i}.{j}."): v for k, v in state.items() if k.startswith(f"stages.{i}.{j}.")}
            y = F.conv2d(x, w["dwconv.weight"], w["dwconv.bias"], padding=3, groups=x.shape[1])
            y = _channel_norm(y, w["norm.weight"], w["norm.bias"])
            y = F.gelu(F.conv2d(y, w["pwconv1.weight"][:, :, None, None], w["pwconv1.bias"]))
            y = F.conv2d(y, w["pwconv2.weight"][:, :, None, None], w["pwconv2.bias"])
            x = x + y * w["gamma"][:, None, None]
        outputs.append(x)
    return outputs


@pytest.mark.parametrize("kmax_padding", [True, False])
def test_convnext_equals_a_second_derivation(kmax_padding, small_convnext):
    model = small_convnext(out_features=ALL, kmax_padding=kmax_padding)
    image = torch.randn(2, 3, 65, 97, dtype=torch.float64)
    expected = _reference_convnext(model.state_dict(), image, ARCHS["tiny"][0], kmax_padding)
    for found, wanted in zip(model(image), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_drop_path_drops_samples_at_a_linear_rate(small_convnext):
    rates = [m.drop_path_rate for m in small_convnext(drop_path_rate=0.4).modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 2, 3), 0.25).flatten(1)
    assert torch.equal(dropped.amin(1), dropped.amax(1))  # a sample goes as a whole
    assert sorted(set(dropped[:, 0].tolist())) == pytest.approx([0, 1 / 0.75])
    assert dropped.mean() == pytest.approx(1, abs=0.05)


def test_drop_path_is_off_in_evaluation(small_convnext):
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    dropping, plain = small_convnext(drop_path_rate=0.9), small_convnext()
    assert torch.equal(dropping(image)[-1], plain(image)[-1])
    assert not torch.equal(dropping.train()(image)[-1], plain(image)[-1])


def test_layer_norm_of_half_precision_is_computed_in_float32():
    x = torch.randn(4, 96).bfloat16()
    norm = LayerNorm(96)
    assert torch.equal(norm(x), F.layer_norm(x.float(), (96,), eps=1e-6).bfloat16())
    assert norm.double()(x.double()).dtype == torch.float64


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_every_parameter_gets_a_finite_gradient_under_autocast(family, small_convnext):
    model = ResNet(18) if family == "resnet" else small_convnext(kmax_padding=True).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model.train()(torch.randn(2, 3, 65, 65))
    sum(m.float().square().mean() for m in maps).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("family", ["resnet", "convnext"])
def test_exports_with_another_size(family, small_convnext):
    model = ResNet(18).eval() if family == "resnet" else small_convnext(kmax_padding=True).float()
    sides = {2: torch.export.Dim("height", min=64, max=512), 3: torch.export.Dim("width", min=64, max=512)}
    program = torch.export.export(model, (torch.randn(1, 3, 65, 97),), dynamic_shapes=(sides,), strict=False)
    other = torch.randn(1, 3, 81, 64)
    with torch.no_grad():
        for found, wanted in zip(program.module()(other), model(other), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ResNet(51), "depth=51: ResNet knows 18, 34, 50, 101, 152"),
        (lambda: ResNet(18, stem="7×7"), "ResNet knows 7x7, deep, v1c"),
        (lambda: ResNet(18, strides=(1, 2)), "strides=(1, 2): ResNet has four stages and takes a number for each"),
        (lambda: ResNet(18, dilations=(2,)), "dilations=(2,): ResNet has four stages"),
        (lambda: ResNet(18, ("res2", "res6")), "no map 'res6'; did you mean 'res"),
        (lambda: ResNet(18, frozen_norm=True, zero_init_residual=True), "blocks would stay zero; drop one of the two"),
        (lambda: ConvNeXt("huge"), "arch='huge': ConvNeXt knows tiny, small, base, large"),
        (lambda: ConvNeXt("tiny", ("layer1",)), "no map 'layer1'; known: res2, res3, res4, res5, stem"),
    ],
)
def test_unknown_options_are_named_with_the_known_ones(build, message):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        build()
    assert message in str(error.value)


def test_depth_table_is_the_papers():
    # A layer count is the stem, the convolutions of all blocks, and the classifier.
    assert {d: 2 + sum(b) * (2 if d < 50 else 3) for d, b in BLOCKS.items()} == {d: d for d in BLOCKS}


def test_frozen_norms_reproduce_the_official_features():
    meta, expected = parity.case(parity.CASES / "mask2former_r50_coco_panoptic")
    state = {k.removeprefix("backbone."): v for k, v in parity.filled_state(meta).items() if k.startswith("backbone.")}
    model = ResNet(50, frozen_norm=True).double()  # in training mode, where it must not matter
    model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    with torch.no_grad():
        maps = model(torch.from_numpy(parity.image_batch(meta)))
    for name, found in zip(model.out_features, maps, strict=True):
        error = np.abs(parity.thin(found.numpy(), meta["outputs"][name]) - expected[name]).max()
        assert error <= 1e-12 * np.abs(expected[name]).max(), name


@pytest.mark.parametrize("stem", ["7x7", "deep"])
def test_frozen_norms_are_batch_norms_in_evaluation(stem):
    torch.manual_seed(0)
    plain, frozen = (ResNet(18, stem=stem, norm_eps=1e-2, frozen_norm=f).double() for f in (False, True))
    for buffer in plain.state_dict().values():
        if buffer.ndim == 1:
            nn.init.uniform_(buffer, 0.5, 1.5)
    frozen.load_state_dict({k: v for k, v in plain.state_dict().items() if not k.endswith("num_batches_tracked")})
    images = torch.randn(2, 3, 49, 61, dtype=torch.float64)
    for a, b in zip(frozen.train()(images), plain.eval()(images), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.detach().abs().max()))
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64)
    torch.testing.assert_close(frozen.res2[0].conv1.norm(x), plain.res2[0].conv1.norm(x))


def test_frozen_norms_neither_learn_nor_count():
    torch.manual_seed(0)
    model = ResNet(18, frozen_norm=True).train()
    before = {k: v.clone() for k, v in model.named_buffers()}
    assert not [k for k, _ in model.named_parameters() if ".norm." in k]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    sum(m.square().mean() for m in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    optimizer.step()
    after = dict(model.named_buffers())
    assert len(after) == 4 * 20 and all(torch.equal(after[k], v) for k, v in before.items())
