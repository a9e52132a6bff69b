"""MobileNetV2: mmsegmentation's features, published sizes, and what the dilated network changes."""

import numpy as np
import pytest
import torch
from torch import nn

from densepred.encoders.mobilenet_v2 import MAPS, MobileNetV2
from densepred.engine.conversion import convert_state_dict, to_official
from densepred.engine.sources import detect_source
from tests import parity

D8 = dict(strides=(1, 2, 2, 1, 1, 1, 1), dilations=(1, 1, 1, 2, 2, 4, 4))


def test_reproduces_the_official_features():
    meta, expected = parity.case(parity.CASES / "mmseg_deeplabv3_mobilenet_v2_d8")
    meta["state_dict"] = [(key, shape) for key, shape in meta["state_dict"] if key.startswith("backbone.")]
    state = {key.removeprefix("backbone."): value for key, value in parity.filled_state(meta).items()}
    model = MobileNetV2(**D8).double().eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()})
    with torch.no_grad():
        maps = model(torch.from_numpy(parity.image_batch(meta)))
    for i, found in enumerate(maps):
        wanted = expected[f"feat_{i}"]
        error = np.abs(parity.thin(found.numpy(), meta["outputs"][f"feat_{i}"]) - wanted).max()
        assert error <= 1e-12 * np.abs(wanted).max(), i


def test_parameter_count_is_the_published_one():
    with torch.device("meta"):
        found = sum(p.numel() for p in MobileNetV2().parameters())
    classifier, last_convolution = 1281 * 1000, 320 * 1280 + 2 * 1280
    assert found == 3_504_872 - classifier - last_convolution


def _torchvision_names():
    """The keys of torchvision's MobileNetV2, in its order."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    keys = ["features.0.0.weight", *(f"features.0.1.{k}" for k in norm)]
    for block in range(1, 18):
        units = 1 if block == 1 else 2
        for i in range(units):
            keys += [f"features.{block}.conv.{i}.0.weight", *(f"features.{block}.conv.{i}.1.{k}" for k in norm)]
        keys += [f"features.{block}.conv.{units}.weight", *(f"features.{block}.conv.{units + 1}.{k}" for k in norm)]
    return keys


def test_torchvisions_weights_load_strictly_and_go_back():
    model = MobileNetV2()
    own = model.state_dict()
    # Both list a network's tensors in the order in which they are computed.
    official = dict(zip(_torchvision_names(), own.values(), strict=True))
    dropped = {"features.18.0.weight": torch.zeros(1280, 320, 1, 1), "classifier.1.bias": torch.zeros(1000)}
    assert detect_source(official | dropped) == "torchvision-mobilenet-v2"
    ours = convert_state_dict(official | dropped, "torchvision-mobilenet-v2", model)
    assert list(ours) == list(own) and all(torch.equal(ours[k], v) for k, v in own.items())
    back = to_official(ours, "torchvision-mobilenet-v2")
    assert list(back) == list(official) and all(torch.equal(back[k], v) for k, v in official.items())
    with pytest.raises(ValueError, match="1 missing from the file: layer7"):
        convert_state_dict(
            {k: v for k, v in official.items() if "17.conv.3.bias" not in k}, "torchvision-mobilenet-v2", model
        )


@pytest.mark.parametrize("size", [(33, 65), (47, 62), (1, 2)])
def test_maps_have_the_stated_channels_and_ceil_of_size_by_stride(size):
    for model, strides in (
        (MobileNetV2(MAPS), [2, 2, 4, 8, 16, 16, 32, 32]),
        (MobileNetV2(MAPS, **D8), [2, 2, 4] + [8] * 5),
    ):
        assert model.strides == strides and model.channels == [32, 16, 24, 32, 64, 96, 160, 320]
        with torch.no_grad():
            maps = model.eval()(torch.randn(1, 3, *size))
        assert [m.shape for m in maps] == [
            (1, channels, *(-(-n // stride) for n in size))
            for channels, stride in zip(model.channels, strides, strict=True)
        ]


def test_only_the_first_block_of_a_stage_is_dilated():
    with torch.device("meta"):
        model = MobileNetV2(**D8)
    found = {k: m.dilation[0] for k, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.dilation[0] > 1}
    assert found == {f"layer{i}.0.conv.1.conv": d for i, d in ((4, 2), (5, 2), (6, 4), (7, 4))}


def test_fewer_maps_compute_nothing_behind():
    model, called = MobileNetV2().eval(), []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    image = torch.randn(1, 3, 32, 32)
    first, second = model(image, num_maps=2)
    assert called == ["conv1", "layer1", "layer2", "layer3"]
    assert torch.equal(first, model(image)[0]) and torch.equal(second, model(image)[1])


def test_every_parameter_gets_a_finite_gradient_under_autocast():
    torch.manual_seed(0)
    model = MobileNetV2(**D8).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = model(torch.randn(2, 3, 65, 65))
    sum(m.float().square().mean() for m in maps).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(out_features=("layer8",)), "no map 'layer8'; did you mean 'layer"),
        (dict(strides=(1, 2, 2, 2)), "strides=(1, 2, 2, 2): MobileNetV2 has seven stages"),
        (dict(dilations=(1,)), "dilations=(1,): MobileNetV2 has seven stages"),
    ],
)
def test_unknown_options_are_named(options, message):
    with torch.device("meta"), pytest.raises(ValueError) as error:
        MobileNetV2(**options)
    assert message in str(error.value)
