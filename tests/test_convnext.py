"""ConvNeXt as the semantic models have it: norms on its maps, mmpretrain's names, sizes below the stride."""

import re

import numpy as np
import pytest
import torch

from densepred.encoders import ConvNeXt, convnext
from densepred.engine.mapping_mmsegmentation import backbone_to_official, backbone_to_ours
from tests import parity


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(convnext.ARCHS, "tiny", ((1, 1, 2, 1), (8, 16, 24, 32)))
    return lambda **options: ConvNeXt("tiny", **options).double().eval()


def test_reproduces_the_maps_of_mmcls():
    meta, expected = parity.case(parity.CASES / "vwformer_convnext_t_ade20k")
    with torch.device("meta"):  # no time for initial values that are overwritten
        model = ConvNeXt("tiny", output_norm=True, downsample_norm_eps=1e-5)
    keys = [key.removeprefix("backbone.") for key, _ in meta["state_dict"] if key.startswith("backbone.")]
    assert {backbone_to_ours(key) for key in keys} == model.state_dict().keys()
    assert [backbone_to_official(backbone_to_ours(key)) for key in keys] == keys
    # Two stages tell all kinds of layers apart; the rest takes its time.
    first = re.compile(r"backbone\.(downsample_layers\.|stages\.|norm)[01]\.")
    meta["state_dict"] = [(key, shape) for key, shape in meta["state_dict"] if first.match(key)]
    filled = {key.removeprefix("backbone."): value for key, value in parity.filled_state(meta).items()}
    model.to_empty(device="cpu").double().eval()
    model.load_state_dict({backbone_to_ours(k): torch.from_numpy(v) for k, v in filled.items()}, strict=False)
    with torch.no_grad():
        maps = model(torch.from_numpy(parity.image_batch(meta)), num_maps=2)
    for i, found in enumerate(maps):
        wanted = expected[f"feat_{i}"]
        error = np.abs(parity.thin(found.numpy(), meta["outputs"][f"feat_{i}"]) - wanted).max()
        assert error <= 1e-13 * np.abs(wanted).max(), i


def test_output_norms_sit_on_the_maps_handed_on_and_nowhere_else(small):
    torch.manual_seed(0)
    model = small(out_features=("stem", "res3", "res5"), output_norm=True)
    assert [name for name, _ in model.named_children() if "norm" in name] == ["norm1", "norm3"]
    plain = small(out_features=("stem", "res3", "res5"))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("norm")})
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    raw, normed = plain(image), model(image)
    assert torch.equal(raw[0], normed[0])
    for x, found in zip(raw[1:], normed[1:], strict=True):
        centred = x - x.mean(1, keepdim=True)
        wanted = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert len(model(image, num_maps=2)) == 2


@pytest.mark.parametrize("size", [(1, 1), (31, 70), (33, 20)])
def test_images_below_the_stride_are_filled_with_zeros(size, small):
    torch.manual_seed(0)
    model, image = small(output_norm=True), torch.randn(2, 3, *size, dtype=torch.float64)
    filled = torch.zeros(2, 3, max(size[0], 32), max(size[1], 32), dtype=torch.float64)
    filled[..., : size[0], : size[1]] = image
    for found, wanted, stride in zip(model(image), model(filled), model.strides, strict=True):
        assert torch.equal(found, wanted) and found.shape[-2:] == tuple(n // stride for n in filled.shape[-2:])


@pytest.mark.parametrize("start", [1.0, 1e-6])
def test_layer_scales_start_where_asked(start, small):
    model = small(layer_scale_init=start).float()
    scales = [p for name, p in model.named_parameters() if name.endswith("gamma")]
    assert len(scales) == 5 and all((p == torch.tensor(start)).all() for p in scales)


def test_the_xl_size_is_the_published_one():
    with torch.device("meta"):
        model = ConvNeXt("xlarge")
    # 350,196,968 with the classifier of 1000 classes and the norm before it
    assert sum(p.numel() for p in model.parameters()) == 350_196_968 - 2049 * 1000 - 2 * 2048
    assert model.channels == [256, 512, 1024, 2048]
