"""The UNet++ decoder over any pyramid, the encoders of its original networks, and its weights' formats beyond the cases."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.decoders import UNetPlusPlusDecoder
from densepred.decoders.unetpp import STYLES, fit
from densepred.encoders import UNetEncoder
from densepred.encoders.unet import ConvUnit, InstanceNorm
from densepred.engine.conversion import convert_state_dict, detect_source, to_official
from densepred.registry import MODELS

PYRAMIDS = [(1, 2), (2, 4, 8, 16, 32), (4, 8, 16, 32), (4, 8, 8, 8), (1, 2, 4, 8, 16, 32), (4, 4, 16)]
SMP_FEATURES = ("conv1", "res2", "res3", "res4", "res5")


def pyramid(strides, size=(19, 26), channels=2, floor=False) -> list[Tensor]:
    torch.manual_seed(0)
    shrink = (lambda n, s: max(n // s, 1)) if floor else (lambda n, s: -(-n // s))
    return [torch.randn(2, channels + i, *(shrink(n, s) for n in size)) for i, s in enumerate(strides)]


def decoder_for(maps, strides, **options) -> UNetPlusPlusDecoder:
    options = dict(decoder_channels=(9, 8, 7, 6, 5)) | options
    return UNetPlusPlusDecoder([x.shape[1] for x in maps], strides, **options).eval()


def smp_model(depth=18, features=SMP_FEATURES, num_classes=2, **decoder):
    return MODELS.build(
        dict(
            type="Segmentor",
            encoder=dict(type="ResNet", depth=depth, out_features=features),
            decoder=dict(type="UNetPlusPlusDecoder", **decoder),
            head=dict(type="SemanticHead", num_classes=num_classes, kernel_size=3),
        )
    )


def unet_model(style, widths=None, deep_supervision=True):
    return MODELS.build(
        dict(
            type="Segmentor",
            encoder=dict(type="UNetEncoder", style=style, widths=widths, image_channels=1),
            decoder=dict(type="UNetPlusPlusDecoder", style=style, deep_supervision=deep_supervision),
            head=dict(type="SemanticHead", num_classes=2, binary=True, bias=style == "keras"),
        )
    )


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("strides", "floor"), [*((strides, False) for strides in PYRAMIDS), ((4, 8, 16, 32), True)])
def test_any_pyramid_of_any_size(style, strides, floor):
    maps = pyramid(strides, floor=floor)
    decoder = decoder_for(maps, strides, style=style, deep_supervision=True)
    features = decoder(maps)
    side = 2 if style == "smp" and strides[0] == 2 else 1
    size = [side * n for n in maps[0].shape[-2:]]
    assert features.pixels.shape == (2, decoder.channels, *size)
    assert [x.shape[1] for x in features.deep] == decoder.deep_channels and len(features.deep) == len(strides) - 2
    assert [x.shape[1] for x in features.levels] == decoder.level_channels
    assert [x.shape[-2:] for x in features.levels] == [x.shape[-2:] for x in maps[::-1][:3]]
    assert all(a is b for a, b in zip(features.encoder, maps, strict=True))
    sum(x.square().sum() for x in [features.pixels, *features.deep]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


@pytest.mark.parametrize("style", STYLES)
def test_maps_of_one_row_or_one_pixel(style):
    for size in ((1, 20), (1, 1)):
        maps = pyramid((2, 4, 8, 16), size)
        features = decoder_for(maps, (2, 4, 8, 16), style=style)(maps)
        assert features.pixels.isfinite().all() and features.deep == []


@pytest.mark.parametrize("style", STYLES)
def test_nodes_follow_the_formula(style):
    """Every node by the formula of the paper, written out again, on sides that are not even."""
    strides, maps = (2, 4, 8, 8), pyramid((2, 4, 8, 8), (19, 26))
    decoder = decoder_for(maps, strides, style=style, deep_supervision=True)

    def x(i, j):
        if j == 0:
            return maps[i]
        node, below, row = decoder.nodes[f"x{i}_{j}"], x(i + 1, j - 1), [x(i, k) for k in range(j)]
        h, w = maps[i].shape[-2:]
        if style == "smp":
            ys, xs = (torch.arange(n) * m // n for n, m in zip((h, w), below.shape[-2:], strict=True))
            up = below[:, :, ys][:, :, :, xs]
        else:
            up = node.up(below)[:, :, :h, :w]
        order = {"smp": [up, *reversed(row)], "keras": [up, *row], "nnunet": [*row, up]}[style]
        return node.block(torch.cat(order, 1))

    features = decoder(maps)
    for j, found in enumerate(features.deep, start=1):
        assert torch.equal(found, x(0, j))
    last = x(0, 3)
    if style == "smp":
        last = decoder.final(last.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(features.pixels, last)


def test_a_map_is_cut_or_its_edge_repeated():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert fit(x, (1, 2)).tolist() == [[[[0, 1]]]]
    assert fit(x, (3, 2)).tolist() == [[[[0, 1], [3, 4], [3, 4]]]]
    assert fit(x, (2, 4)).tolist() == [[[[0, 1, 2, 2], [3, 4, 5, 5]]]]


def test_widths_of_the_last_nodes_go_by_stride():
    def widths(strides, **options):
        decoder = UNetPlusPlusDecoder([8] * len(strides), strides, **options)
        ends = [decoder.widths[i, decoder.depth - i] for i in range(decoder.depth)]
        return ends, decoder.channels, decoder.deep_channels

    assert widths((2, 4, 8, 16, 32), deep_supervision=True) == ([32, 64, 128, 256], 16, [8, 8, 8])
    assert widths((4, 8, 16, 32)) == ([64, 128, 256], 64, [])
    assert widths((4, 8, 8, 8)) == ([64, 128, 128], 64, [])
    assert widths((1, 2, 4)) == ([16, 32], 16, [])
    assert widths((2, 4, 8), decoder_channels=(7, 6, 5)) == ([6, 7], 5, [])
    assert widths((1, 2, 4), style="keras") == ([8, 8], 8, [])
    with pytest.raises(ValueError, match=r"\(7, 6\): there is a node at stride 4, .* for strides 2 to 1; give 3"):
        widths((2, 4, 8), decoder_channels=(7, 6))


@pytest.mark.parametrize(
    ("channels", "strides", "options", "message"),
    [
        ([8, 8], [2, 4], dict(style="ssmp"), "did you mean 'smp'"),
        ([8], [2], {}, "1 encoder maps .* takes 2 to 6"),
        ([8] * 7, [2**i for i in range(7)], {}, "7 encoder maps"),
        ([8] * 3, [2, 4], {}, "3 encoder maps with 2 strides"),
        ([8, 8], [8, 16], {}, r"strides \[8, 16\]: .* from stride 1, 2 or 4"),
        ([8, 8], [4, 2], {}, r"strides \[4, 2\]"),
        ([8, 8, 8], [2, 4, 8], dict(prune=1), r"prune=1: .* deep_supervision=True"),
        ([8, 8, 8], [2, 4, 8], dict(prune=3, deep_supervision=True), "prune=3: with 3 encoder maps it is 1 to 2"),
        ([8, 8, 8], [2, 4, 8], dict(prune=0, deep_supervision=True), "prune=0"),
    ],
)
def test_what_cannot_be_built(channels, strides, options, message):
    with pytest.raises(ValueError, match=message):
        UNetPlusPlusDecoder(channels, strides, **options)


@pytest.mark.parametrize("style", STYLES)
def test_pruning_keeps_weights_and_numbers(style):
    maps = pyramid((2, 4, 8, 16))
    decoder = decoder_for(maps, (2, 4, 8, 16), style=style, deep_supervision=True)
    keys, whole = list(decoder.state_dict()), decoder(maps)
    assert decoder.num_maps is None
    for j in (1, 2, 3):
        decoder.prune = j
        assert decoder.num_maps == j + 1 and list(decoder.state_dict()) == keys
        features = decoder(maps[: j + 1])
        expected = [*whole.deep, whole.pixels][: j + 1]
        found = [*features.deep, features.pixels]
        assert len(found) == j and all(torch.equal(a, b) for a, b in zip(found, expected, strict=False))
        assert [x.shape[1] for x in features.levels] == decoder.level_channels
        assert features.levels[0] is maps[j]
    with pytest.raises(ValueError, match="prune=4"):
        decoder.prune = 4
    assert decoder.prune == 3


def test_a_pruned_segmentor_learns_in_its_triangle_only():
    model = smp_model(deep_supervision=True, prune=2)
    features = model.features(torch.randn(2, 3, 32, 32), None)
    outputs = model.head(features)
    assert len(features.encoder) == 3 and len(outputs["deep_logits"]) == 1
    (outputs["sem_logits"].mean() + outputs["deep_logits"][0].mean()).backward()
    trained = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None and ".nodes." in name}
    assert trained == {"x0_1", "x1_1", "x0_2"}
    stages = {name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None and "encoder" in name}
    assert stages == {"stem", "res2", "res3"}
    heads = {name for name, p in model.named_parameters() if p.grad is not None and "head" in name}
    assert heads == {f"head.deep_classifiers.{i}.{name}" for i in range(2) for name in ("weight", "bias")}


# Encoders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["keras", "nnunet"])
def test_encoder_maps(style):
    encoder = UNetEncoder(style, widths=(4, 8, 12), image_channels=2).eval()
    ran = []
    for i in range(3):
        getattr(encoder, f"level{i}").register_forward_hook(lambda *_, i=i: ran.append(i))
    maps = encoder(torch.randn(2, 2, 21, 1))
    assert [tuple(x.shape) for x in maps] == [(2, 4, 21, 1), (2, 8, 11, 1), (2, 12, 6, 1)]
    assert encoder.channels == [4, 8, 12] and encoder.strides == [1, 2, 4]
    ran.clear()
    assert len(encoder(torch.randn(1, 2, 8, 8), num_maps=2)) == 2 and ran == [0, 1]


def test_encoder_is_refused():
    with pytest.raises(ValueError, match=r"style='kera': .* did you mean 'keras'"):
        UNetEncoder("kera")
    with pytest.raises(ValueError, match=r"widths=\(\)"):
        UNetEncoder(widths=())


def test_keras_drops_half_while_training_only():
    unit = ConvUnit("keras", 1, 64)
    nn.init.ones_(unit.conv.bias)
    x = torch.zeros(1, 1, 20, 20)
    assert torch.equal(unit.eval()(x), torch.ones(1, 64, 20, 20))
    found = unit.train()(x)
    assert set(found.unique().tolist()) == {0, 2} and 0.45 < (found == 0).double().mean() < 0.55


def test_instance_norm_is_pytorch_s_and_takes_one_pixel():
    norm = InstanceNorm(3)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 3, 1, 5)
    torch.testing.assert_close(norm(x), F.instance_norm(x, weight=norm.weight, bias=norm.bias))
    pixel = torch.randn(2, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    norm.double()
    for mode in (True, False):
        found = norm.train(mode)(pixel)
        torch.testing.assert_close(found, norm.bias[None, :, None, None].expand(2, 3, 1, 1))
    found.sum().backward()
    assert pixel.grad.abs().max() < 1e-9 and norm.bias.grad.eq(2).all()


def test_initial_weights():
    std = dict(smp=(2 / 576) ** 0.5, keras=0.8796 * (2 / 576) ** 0.5, nnunet=(2 / 1.0001 / 576) ** 0.5)
    for style, expected in std.items():
        conv = ConvUnit(style, 64, 64).conv
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert (conv.bias is None) == (style == "smp") and (style == "smp" or not conv.bias.any())


# Published sizes and formats -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: smp_model(34, num_classes=1), 26_078_609),
        (lambda: smp_model(50, num_classes=8), 48_986_760),
        (lambda: unet_model("keras", deep_supervision=False), 9_041_601),
        (lambda: unet_model("keras"), 9_041_700),
    ],
    ids=["resnet34", "resnet50", "keras", "keras-deep"],
)
def test_published_numbers_of_parameters(build, expected):
    with torch.device("meta"):
        assert count(build()) == expected


@pytest.mark.parametrize("features", [SMP_FEATURES[:n] for n in (3, 4, 5)])
def test_smp_of_any_depth_goes_there_and_back(features):
    with torch.device("meta"):
        model = smp_model(features=features)
    state = model.state_dict()
    official = to_official(state, "smp")
    depth = len(features) - 1
    nodes = {f"x_{d}_{l}" for l in range(depth) for d in range(l + 1)} | {f"x_0_{depth}"}
    assert {key.split(".")[2] for key in official if key.startswith("decoder.")} == nodes
    assert official["decoder.blocks.x_0_0.conv1.0.weight"].shape[1] == sum(model.encoder.channels[-2:])
    assert detect_source(official) == "smp"
    back = convert_state_dict(official, "smp", model)
    assert list(back) == list(state) and all(back[key] is state[key] for key in state)


@pytest.mark.parametrize(
    ("model", "source", "message"),
    [
        (
            lambda: smp_model(deep_supervision=True),
            "smp",
            r"has no place for head\.deep_classifiers\.0\.weight, 6 such",
        ),
        (lambda: smp_model(features=SMP_FEATURES[1:]), "smp", r"needs decoder\.blocks\.x_0_3\.\*"),
        (lambda: unet_model("nnunet", (4, 4, 4, 4, 4)), "unetpp-nnunet", r"needs conv_blocks_context\.5\.0"),
        (lambda: unet_model("nnunet", (4,) * 6, False), "unetpp-nnunet", r"needs seg_outputs\.4\.\*"),
        (lambda: unet_model("keras", (4,) * 4, False), "unetpp-keras", r"needs conv15_1\.\*"),
    ],
    ids=["deep", "stride-4", "five-levels", "one-head", "four-levels"],
)
def test_a_network_that_the_code_cannot_build_is_not_exported(model, source, message):
    with torch.device("meta"):
        state = model().state_dict()
    with pytest.raises(ValueError, match=message):
        to_official(state, source)


def test_formats_are_strict():
    with torch.device("meta"):
        model, plain = unet_model("keras"), unet_model("keras", deep_supervision=False)
    official = to_official(model.state_dict(), "unetpp-keras")
    with pytest.raises(ValueError, match=r"6 unknown to the model: head\.deep_classifiers"):
        convert_state_dict(official, "unetpp-keras", plain)
    del official["up24.bias"]
    with pytest.raises(ValueError, match=r"1 missing from the file: decoder\.nodes\.x1_3\.up\.bias"):
        convert_state_dict(official, "unetpp-keras", model)
    single = to_official(plain.state_dict(), "unetpp-keras")
    assert [key for key in single if key.startswith("output")] == ["output_4.weight", "output_4.bias"]
    assert list(convert_state_dict(single, "unetpp-keras", plain)) == list(plain.state_dict())


def test_a_decoder_is_pickled_whole():
    maps = pyramid((1, 2))
    decoder = decoder_for(maps, (1, 2), style="nnunet")
    assert torch.equal(pickle.loads(pickle.dumps(decoder))(maps).pixels, decoder(maps).pixels)
