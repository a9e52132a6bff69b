"""DLA-34 and its way up: the official network written out, any size, and its number of parameters."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densepred.decoders import DLAUp
from densepred.encoders import DLA34
from densepred.encoders.dla import WIDTHS
from densepred.ops.modulated_deform_conv2d import ModulatedDeformConv2d
from densepred.registry import MODELS


def scrambled(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value of its own: deformable convolutions start with no offsets."""
    generator = torch.Generator().manual_seed(0)
    for value in module.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) - (0 if value.ndim == 1 else 0.5))
            value.div_(1 if value.ndim == 1 else value[0].numel() ** 0.5)
    return module.double().eval()


@pytest.fixture(scope="module")
def encoder() -> DLA34:
    return scrambled(DLA34(tuple(f"level{i}" for i in range(6))))


def conv_norm(weights: dict[str, Tensor], conv: str, norm: str, x: Tensor, stride: int = 1) -> Tensor:
    kernel = weights[f"{conv}.weight"]
    x = F.conv2d(x, kernel, stride=stride, padding=kernel.shape[-1] // 2)
    statistics = (weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, *statistics)


def block(weights: dict[str, Tensor], at: str, x: Tensor, residual: Tensor, stride: int = 1) -> Tensor:
    y = conv_norm(weights, f"{at}.conv1", f"{at}.bn1", x, stride).relu()
    return (conv_norm(weights, f"{at}.conv2", f"{at}.bn2", y) + residual).relu()


def root(weights: dict[str, Tensor], at: str, *maps: Tensor) -> Tensor:
    return conv_norm(weights, f"{at}.root.conv", f"{at}.root.bn", torch.cat(maps, 1)).relu()


def pair(weights: dict[str, Tensor], at: str, x: Tensor, residual: Tensor, stride: int, *finished: Tensor) -> Tensor:
    """Two blocks and the root above them."""
    first = block(weights, f"{at}.tree1", x, residual, stride)
    second = block(weights, f"{at}.tree2", first, first)
    return root(weights, at, second, first, *finished)


def test_the_trees_written_out(encoder):
    weights = encoder.state_dict()
    image = torch.randn(1, 3, 64, 32, dtype=torch.float64)
    x = conv_norm(weights, "base_layer.0", "base_layer.1", image).relu()
    maps = [conv_norm(weights, "level0.0", "level0.1", x).relu()]
    maps.append(conv_norm(weights, "level1.0", "level1.1", maps[-1], 2).relu())
    for level in range(2, 6):
        at, x = f"level{level}", maps[-1]
        pooled, merged = F.max_pool2d(x, 2), () if level == 2 else (F.max_pool2d(x, 2),)
        if level in (2, 5):
            maps.append(
                pair(weights, at, x, conv_norm(weights, f"{at}.project.0", f"{at}.project.1", pooled), 2, *merged)
            )
        else:
            projected = conv_norm(weights, f"{at}.tree1.project.0", f"{at}.tree1.project.1", pooled)
            left = pair(weights, f"{at}.tree1", x, projected, 2)
            maps.append(pair(weights, f"{at}.tree2", left, left, 1, pooled, left))
    with torch.no_grad():
        found = encoder(image)
    for i, (ours, theirs) in enumerate(zip(found, maps, strict=True)):
        assert ours.shape == (1, WIDTHS[i], 64 >> i, 32 >> i)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_way_up_written_out():
    widths = (4, 6, 8, 10)
    decoder = scrambled(DLAUp(widths, (4, 8, 16, 32)))
    x4, x8, x16, x32 = (
        torch.randn(1, c, 16 >> i, 24 >> i, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        for i, c in enumerate(widths)
    )

    def merge(at: str, i: int, coarse: Tensor, fine: Tensor) -> Tensor:
        part = decoder.get_submodule(at)
        up = part.get_submodule(f"up_{i}")(part.get_submodule(f"proj_{i}")(coarse))
        return part.get_submodule(f"node_{i}")(up + fine)

    with torch.no_grad():
        a16 = merge("dla_up.ida_0", 1, x32, x16)
        b8 = merge("dla_up.ida_1", 1, x16, x8)
        a8 = merge("dla_up.ida_1", 2, a16, b8)
        b4 = merge("dla_up.ida_2", 1, x8, x4)
        c4 = merge("dla_up.ida_2", 2, b8, b4)
        a4 = merge("dla_up.ida_2", 3, a8, c4)
        last = merge("ida_up", 2, a16, merge("ida_up", 1, a8, a4))
        features = decoder([x4, x8, x16, x32])
    torch.testing.assert_close(features.pixels, last, rtol=0, atol=0)
    assert isinstance(decoder.ida_up.proj_1.conv, ModulatedDeformConv2d)
    assert features.levels == [] and [x.shape[1] for x in features.encoder] == list(widths)


def test_upsampling_starts_bilinear():
    decoder = DLAUp((2, 3, 4), (4, 8, 32))
    for name, factor in (("dla_up.ida_1.up_1", 2), ("dla_up.ida_0.up_1", 4)):
        up = decoder.get_submodule(name)
        x = torch.randn(1, up.in_channels, 5, 6)
        expected = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        inner = (..., slice(factor, -factor), slice(factor, -factor))  # at the border a convolution sees zeros
        torch.testing.assert_close(up(x)[inner], expected[inner])


def test_any_side_trains():
    size = (43, 38)
    model = nn.ModuleList([DLA34(), DLAUp(WIDTHS[2:], (4, 8, 16, 32))]).train()
    maps = model[0](torch.randn(2, 3, *size))
    assert [x.shape[-2:] for x in maps] == [tuple(-(-n // s) for n in size) for s in model[0].strides]
    pixels = model[1](maps).pixels
    assert pixels.shape == (2, 64, *maps[0].shape[-2:])
    pixels.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_maps_behind_those_needed_are_not_computed(encoder):
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    all_maps = encoder(images)
    handle = encoder.level3.register_forward_hook(lambda *_: pytest.fail("computed"))
    found = encoder(images, num_maps=3)
    handle.remove()
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, all_maps, strict=False))


def test_a_pyramid_of_equal_strides_and_of_two_maps():
    decoder = DLAUp((4, 6, 6), (8, 16, 16))
    assert isinstance(decoder.dla_up.ida_0.up_1, nn.Identity)
    maps = [torch.randn(2, 4, 6, 6), torch.randn(2, 6, 3, 3), torch.randn(2, 6, 3, 3)]
    assert decoder(maps).pixels.shape == (2, 4, 6, 6)
    floored = [torch.randn(2, 4, 7, 5), torch.randn(2, 6, 3, 2)]  # of an encoder that rounds down
    assert DLAUp((4, 6), (8, 16))(floored).pixels.shape == (2, 4, 7, 5)


def test_published_number_of_parameters():
    model = dict(encoder=dict(type="DLA34"), decoder=dict(type="DLAUp"), head=dict(type="PolygonHead", num_classes=8))
    with torch.device("meta"):
        model = MODELS.build(dict(type="Segmentor", **model))
    unread = (64 * 128 + 2 * 128) + (128 * 256 + 2 * 256)  # level3.project and level4.project of the official code
    assert sum(p.numel() for p in model.parameters()) + unread == 19_813_067


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"no map 'level6'.*did you mean 'level"):
        DLA34(("level6",))
    for strides in ((4,), (4, 6), (8, 4)):
        with pytest.raises(ValueError, match=r"strides \[.*two or more, each a multiple"):
            DLAUp([8] * len(strides), strides)
