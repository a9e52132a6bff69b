"""SegFormer's decoder against the plain form, mmsegmentation's numbers, and NVIDIA's names."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from densepred.decoders import SegFormerDecoder
from densepred.encoders import mit
from densepred.engine.build import build_model
from densepred.engine.conversion import convert_state_dict, detect_source, to_official
from densepred.registry import MODELS
from tests import parity
from tests.small import CONFIGS

META, EXPECTED = parity.case(parity.CASES / "mmseg_segformer_mit_b0_ade20k")
PYRAMIDS = {
    "plain": [(13, 9), (7, 5), (4, 3), (2, 2)],
    "dilated": [(13, 9), (7, 5), (7, 5), (7, 5)],
    "one pixel": [(3, 1), (2, 1), (1, 1), (1, 1)],
    "five maps": [(25, 17), (13, 9), (7, 5), (4, 3), (2, 2)],
    "two maps": [(7, 5), (4, 3)],
}


def pyramid_of(kind):
    torch.manual_seed(1)
    return [torch.randn(2, 4 + 2 * i, *size, dtype=torch.float64) for i, size in enumerate(PYRAMIDS[kind])]


def decoder_for(pyramid, **options):
    """A decoder in float64 and evaluation whose norms and biases are all in play."""
    torch.manual_seed(0)
    strides = [4 * 2**i for i in range(len(pyramid))]
    decoder = SegFormerDecoder([x.shape[1] for x in pyramid], strides, channels=6, **options).double().eval()
    for name, value in decoder.state_dict().items():
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 1.5) if name.endswith("running_var") else nn.init.normal_(value)
    return decoder


def plain(state, maps, form, align_corners):
    """Project, resize, concatenate, fuse: in the order of the published code."""

    def norm(x, name):
        values = (state[f"{name}.bn.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(x, *values))

    parts = []
    for i, x in enumerate(maps):
        if form == "nvidia":
            weight, bias = (state[f"linear_c{i + 1}.proj.{key}"] for key in ("weight", "bias"))
            x = (
                F.linear(x.flatten(2).transpose(1, 2), weight, bias)
                .transpose(1, 2)
                .reshape(*x.shape[:1], 6, *x.shape[2:])
            )
        else:
            x = norm(F.conv2d(x, state[f"convs.{i}.conv.weight"]), f"convs.{i}")
        parts.append(F.interpolate(x, size=maps[0].shape[-2:], mode="bilinear", align_corners=align_corners))
    fuse = "linear_fuse" if form == "nvidia" else "fusion_conv"
    joined = torch.cat(parts[::-1] if form == "nvidia" else parts, dim=1)
    return norm(F.conv2d(joined, state[f"{fuse}.conv.weight"]), fuse)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("form", ["mmsegmentation", "nvidia"])
@pytest.mark.parametrize("kind", PYRAMIDS)
def test_decoder_equals_the_plain_form(kind, form, align_corners):
    pyramid = pyramid_of(kind)
    decoder = decoder_for(pyramid, form=form, align_corners=align_corners)
    features = decoder(pyramid)
    wanted = plain(decoder.state_dict(), pyramid[-4:], form, align_corners)
    torch.testing.assert_close(features.pixels, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))
    assert features.encoder is pyramid and features.levels == decoder.level_channels == []
    assert features.pixels.shape[1] == decoder.channels == 6


@pytest.mark.parametrize("form", ["mmsegmentation", "nvidia"])
def test_gradients_and_statistics_are_those_of_the_plain_form(form):
    pyramid = pyramid_of("plain")
    decoder = decoder_for(pyramid, form=form)
    parameters = dict(decoder.named_parameters())
    buffers = dict(decoder.named_buffers())
    results = (decoder(pyramid).pixels, plain(parameters | buffers, pyramid, form, False))
    found, wanted = (torch.autograd.grad(x.square().sum(), list(parameters.values())) for x in results)
    for name, a, b in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=name)
    decoder.train()(pyramid)
    assert not [name for name, value in decoder.named_buffers() if name.endswith("tracked") and value != 1]


def test_unknown_forms_are_named():
    with pytest.raises(ValueError, match="form='mlp': SegFormerDecoder knows mmsegmentation, nvidia"):
        SegFormerDecoder([4], [4], form="mlp")


@pytest.fixture(scope="module")
def outputs():
    """What the case names, of mmsegmentation's weights through the converter, which gives them back unchanged."""
    with torch.device("meta"):  # no time for initial values that are overwritten
        model = build_model(CONFIGS / "segformer_mit_b0_ade20k.py")
    model.to_empty(device="cpu").double().eval()
    official = {key: torch.from_numpy(value) for key, value in parity.filled_state(META).items()}
    weights = convert_state_dict(official, "mmsegmentation", model)
    back = to_official(weights, "mmsegmentation")
    assert back.keys() == official.keys() and all(torch.equal(back[key], value) for key, value in official.items())
    model.load_state_dict(weights)
    images = torch.from_numpy(parity.image_batch(META))
    with torch.no_grad():
        features = model.decoder(model.encoder(images))
        logits = model.head(features, deep_supervision=False)["sem_logits"]
    full = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
    found = {f"feat_{i}": x for i, x in enumerate(features.encoder)}
    return found | dict(head_feat=features.pixels, logits=logits, full_logits=full)


@pytest.mark.parametrize("name", META["outputs"])
def test_parity(outputs, name):
    array, wanted = parity.thin(outputs[name].numpy(), META["outputs"][name]), EXPECTED[name]
    np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-13 * np.abs(wanted).max(), err_msg=name)


# mmsegmentation 1.2.2 (measured) and NVIDIA's code with 150 and 19 classes, in millions.
@pytest.mark.parametrize(
    ("config", "form", "channels", "millions"),
    [
        ("segformer_mit_b0_ade20k", "mmsegmentation", 256, 3.75),
        ("segformer_mit_b2_cityscapes", "mmsegmentation", 256, 24.73),
        ("segformer_mit_b2_ade20k", "nvidia", 768, 27.5),
    ],
)
def test_parameter_counts_are_the_published_ones(config, form, channels, millions):
    options = {"model.decoder.form": form, "model.decoder.channels": channels}
    with torch.device("meta"):
        model = build_model(CONFIGS / f"{config}.py", cfg_options=options)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_nvidia_s_checkpoints_have_a_place_for_every_key(monkeypatch):
    monkeypatch.setitem(mit.ARCHS, "b0", (4, (1, 2, 1, 1)))
    model = MODELS.build(
        dict(
            type="Segmentor",
            encoder=dict(type="MixVisionTransformer", arch="b0", reduction_norm_eps=1e-5),
            decoder=dict(type="SegFormerDecoder", channels=8, form="nvidia"),
            head=dict(type="SemanticHead", num_classes=5),
        )
    )
    state = model.state_dict()
    official = to_official(state, "segformer")
    assert detect_source(official) == "segformer"
    for theirs, ours in {
        "backbone.patch_embed2.proj.weight": "encoder.layers.1.0.projection.weight",
        "backbone.block2.1.attn.sr.weight": "encoder.layers.1.1.1.attn.sr.weight",
        "decode_head.linear_c4.proj.weight": "decoder.linear_c4.proj.weight",
        "decode_head.linear_fuse.bn.running_var": "decoder.linear_fuse.bn.running_var",
        "decode_head.linear_pred.bias": "head.classifier.bias",
    }.items():
        assert official[theirs] is state[ours]
    assert official["backbone.block1.0.mlp.fc1.weight"].shape == (16, 4)
    unused = {"decode_head.conv_seg.weight": torch.ones(5, 128, 1, 1), "decode_head.conv_seg.bias": torch.ones(5)}
    assert detect_source(official | unused) == "segformer"
    ours = convert_state_dict(official | unused, "segformer", model)
    assert list(ours) == list(state) and all(torch.equal(ours[key], value) for key, value in state.items())
    back = to_official(ours, "segformer")
    assert back.keys() == official.keys() and all(torch.equal(back[key], value) for key, value in official.items())
