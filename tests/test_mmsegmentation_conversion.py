"""Checkpoints of mmsegmentation and of mmpretrain under our names, and back: each encoder, each decoder, each value."""

import json
import re

import pytest
import torch
import torch.nn.functional as F

from densepred.encoders import convnext, mit
from densepred.encoders.swin import PatchMerging
from densepred.engine.build import build_model
from densepred.engine.checkpoint import write_checkpoint
from densepred.engine.conversion import SOURCES, convert_state_dict, detect_source, load_weights, to_official
from densepred.engine.mapping_mmsegmentation import channel_by_channel, token_by_token
from densepred.registry import MODELS
from tests import parity
from tests.small import CONFIGS

# The parity cases, which hold mmsegmentation's own key lists, and our recipes of the same models.
PUBLISHED = {
    "mmseg_ccnet_r50_d8_cityscapes": "ccnet_r50_cityscapes",
    "mmseg_deeplabv3_mobilenet_v2_d8": "deeplabv3_mobilenet_v2_cityscapes",
    "mmseg_segformer_mit_b0_ade20k": "segformer_mit_b0_ade20k",
    "mmseg_upernet_swin_t_ade20k": "upernet_swin_t_ade20k",
}
ENCODERS = {
    "ResNet V1c": dict(type="ResNet", depth=18, stem="v1c"),
    "ResNet V1b": dict(type="ResNet", depth=18),
    "Swin": dict(type="SwinTransformer", embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=4),
    "ConvNeXt": dict(type="ConvNeXt", arch="tiny", output_norm=True),
    "MiT": dict(type="MixVisionTransformer", arch="b1"),
    "MobileNetV2": dict(type="MobileNetV2"),
}


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch):
    monkeypatch.setitem(convnext.ARCHS, "tiny", ((1, 1, 2, 1), (8, 16, 24, 32)))
    monkeypatch.setitem(mit.ARCHS, "b1", (8, (1, 1, 2, 1)))


def build(encoder, decoder="FCNDecoder", **options):
    decoder = dict(type=decoder, channels=16, **options)
    head = dict(type="SemanticHead", num_classes=5, auxiliary=dict(index=2, channels=8))
    return MODELS.build(dict(type="Segmentor", encoder=encoder, decoder=decoder, head=head))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("case", PUBLISHED)
def test_every_published_key_has_a_place_and_goes_back(case):
    meta = json.loads((parity.CASES / case / "meta.json").read_text())
    official = {key: torch.empty(shape, device="meta") for key, shape in meta["state_dict"]}
    with torch.device("meta"):
        model = build_model(CONFIGS / f"{PUBLISHED[case]}.py")
    assert detect_source(official) == "mmsegmentation"
    ours = convert_state_dict(official, "mmsegmentation", model)
    assert list(ours) == list(model.state_dict())
    kept = {k: v.shape for k, v in official.items() if not re.fullmatch(SOURCES["mmsegmentation"].dropped, k)}
    assert official.keys() - kept.keys() == set(meta.get("not_filled", ()))
    assert {k: v.shape for k, v in to_official(ours, "mmsegmentation").items()} == kept


@pytest.mark.parametrize("name", ENCODERS)
def test_round_trip_gives_the_same_weights(name):
    model = build(ENCODERS[name])
    state = model.state_dict()
    official = to_official(state, "mmsegmentation")
    assert detect_source(official) == "mmsegmentation"
    assert {key.split(".")[0] for key in official} == {"backbone", "decode_head", "auxiliary_head"}
    ours = convert_state_dict(official, "mmsegmentation", model)
    assert_same(ours, state)
    assert_same(to_official(ours, "mmsegmentation"), official)
    # The encoder by itself takes its part.
    assert_same(convert_state_dict(official, "mmsegmentation", model.encoder), model.encoder.state_dict())


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("ResNet V1c", "stem.3.weight", "stem.conv2.weight"),
        ("ResNet V1c", "stem.7.running_var", "stem.conv3.norm.running_var"),
        ("ResNet V1c", "layer2.1.bn2.bias", "res3.1.conv2.norm.bias"),
        ("ResNet V1c", "layer2.0.downsample.1.weight", "res3.0.shortcut.norm.weight"),
        ("ResNet V1b", "conv1.weight", "stem.conv1.weight"),
        ("ResNet V1b", "bn1.running_mean", "stem.conv1.norm.running_mean"),
        ("ResNet V1b", "layer4.0.downsample.0.weight", "res5.0.shortcut.weight"),
        ("Swin", "patch_embed.projection.bias", "patch_embed.proj.bias"),
        ("Swin", "stages.1.blocks.1.attn.w_msa.qkv.weight", "layers.1.blocks.1.attn.qkv.weight"),
        ("Swin", "stages.2.blocks.0.ffn.layers.0.0.weight", "layers.2.blocks.0.mlp.fc1.weight"),
        ("Swin", "stages.2.blocks.0.ffn.layers.1.weight", "layers.2.blocks.0.mlp.fc2.weight"),
        ("ConvNeXt", "stages.3.0.depthwise_conv.weight", "stages.3.0.dwconv.weight"),
        ("ConvNeXt", "stages.0.0.pointwise_conv2.bias", "stages.0.0.pwconv2.bias"),
        ("ConvNeXt", "downsample_layers.2.1.weight", "downsample_layers.2.1.weight"),
        ("MiT", "layers.1.1.0.attn.attn.in_proj_weight", "layers.1.1.0.attn.attn.in_proj_weight"),
        ("MobileNetV2", "layer3.1.conv.1.conv.weight", "layer3.1.conv.1.conv.weight"),
    ],
)
def test_weights_land_where_they_belong(name, theirs, ours):
    with torch.device("meta"):
        state = build(ENCODERS[name]).state_dict()
    assert to_official(state, "mmsegmentation")[f"backbone.{theirs}"] is state[f"encoder.{ours}"]


def test_heads_land_where_they_belong():
    state = build(ENCODERS["ResNet V1b"], "CCNetDecoder").state_dict()
    torch.nn.init.normal_(state["decoder.cca.gamma"])
    official = to_official(state, "mmsegmentation")
    for theirs, ours in {
        "decode_head.conv_seg.bias": "head.classifier.bias",
        "auxiliary_head.conv_seg.weight": "head.auxiliary.classifier.weight",
        "auxiliary_head.convs.0.bn.running_var": "head.auxiliary.conv.bn.running_var",
        "decode_head.conv_cat.conv.weight": "decoder.conv_cat.conv.weight",
        "decode_head.cca.query_conv.weight": "decoder.cca.query_conv.weight",
    }.items():
        assert official[theirs] is state[ours]
    scale = official["decode_head.cca.gamma.scale"]
    assert scale.shape == () and scale == state["decoder.cca.gamma"][0]


def test_patch_merging_computes_the_same_in_both_orders():
    torch.manual_seed(0)
    ours = PatchMerging(3).double()
    torch.nn.init.normal_(ours.norm.weight)
    torch.nn.init.normal_(ours.norm.bias)
    weight, *norm = (channel_by_channel(p) for p in (ours.reduction.weight, ours.norm.weight, ours.norm.bias))
    assert torch.equal(token_by_token(weight), ours.reduction.weight)
    x = torch.randn(2, 6, 8, 3, dtype=torch.float64)
    # Their form: the map unfolded channel by channel, normed, reduced.
    unfolded = F.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)  # (B, h * w, 4C)
    theirs = F.linear(F.layer_norm(unfolded, (12,), *norm), weight).view(2, 3, 4, 6)
    torch.testing.assert_close(ours(x), theirs, rtol=0, atol=1e-13)


def spoil(official, name):
    """Return official weights with one fault, and what the error must say of it."""
    key = "backbone.stages.0.downsample.reduction.weight"
    if name == "missing":
        return {k: v for k, v in official.items() if k != key}, "1 missing from the file: encoder.layers.0.downsample"
    if name == "unknown":
        return official | {"decode_head.extra.conv.weight": torch.ones(1)}, "unknown to the model: decoder.extra.conv"
    return official | {key: torch.ones(24, 47)}, "1 of another shape: encoder.layers.0.downsample.reduction.weight"


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape"])
def test_every_key_is_used_and_none_is_missing(fault):
    model = build(ENCODERS["Swin"])
    official, message = spoil(to_official(model.state_dict(), "mmsegmentation"), fault)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert_state_dict(official, "mmsegmentation", model)


def test_a_file_of_another_encoder_is_refused():
    swin, resnet = build(ENCODERS["Swin"]), build(ENCODERS["ResNet V1b"])
    official = to_official(swin.state_dict(), "mmsegmentation")
    with pytest.raises(ValueError, match="does not fit Segmentor as configured"):
        convert_state_dict(official, "mmsegmentation", resnet)


PRETRAINED = [("mmpretrain", name) for name in ENCODERS if name != "MiT"] + [
    ("mmsegmentation-encoder", name) for name in ("ResNet V1c", "Swin")
]


def classifier_of(encoder, source):
    """Return a classifier's checkpoint with the encoder's weights, as mmpretrain or the recipes' files hold them."""
    official = to_official(encoder.state_dict(), source)
    official = {k: v for k, v in official.items() if not re.match(r"backbone\.norm[012]\.|norm\d\.", k)}
    bare = source == "mmsegmentation-encoder"
    prefix, classifier = ("", "fc.") if bare else ("backbone.", "head.fc.")
    if "Swin" in type(encoder).__name__:
        official[f"{prefix}stages.0.blocks.0.attn.w_msa.relative_position_index"] = torch.zeros(16, 16)
        if bare:  # the authors' file, renamed
            leftovers = ("stages.1.blocks.1.attn_mask", "norm.weight", "norm.bias")
            official |= {key: torch.zeros(8) for key in leftovers}
    if type(encoder).__name__ == "MobileNetV2":
        official["backbone.conv2.conv.weight"] = torch.zeros(1280, 320, 1, 1)
    return official | {f"{classifier}weight": torch.zeros(10, 8), f"{classifier}bias": torch.zeros(10)}


@pytest.mark.parametrize(("source", "name"), PRETRAINED)
def test_a_classifier_fills_an_encoder(source, name, tmp_path):
    trained, fresh = MODELS.build(ENCODERS[name]), MODELS.build(ENCODERS[name])
    official = classifier_of(trained, source)
    assert detect_source(official) == source
    write_checkpoint({"state_dict": official}, tmp_path / "encoder.pth")
    report = load_weights(fresh, tmp_path / "encoder.pth")
    assert "dropped by rule: " in report
    assert ("kept as initialised: norm0.weight" in report) == (name in ("Swin", "ConvNeXt"))
    assert_same(fresh.state_dict(), trained.state_dict())


def test_a_norm_before_the_classifier_may_have_no_place():
    norm = {"backbone.norm3.weight": torch.ones(32), "backbone.norm3.bias": torch.zeros(32)}
    trained = MODELS.build(dict(ENCODERS["ConvNeXt"], output_norm=False))
    official = classifier_of(trained, "mmpretrain") | norm
    assert_same(convert_state_dict(official, "mmpretrain", trained), trained.state_dict())
    segmentor = build(dict(ENCODERS["ConvNeXt"], out_features=("res2", "res3", "res4")))
    converted = convert_state_dict(official, "mmpretrain", segmentor)
    assert list(converted) == [key for key in segmentor.state_dict() if key.startswith("encoder.")]
    with pytest.raises(ValueError, match="2 unknown to the model: norm4"):
        wrong = {key.replace("norm3", "norm4"): value for key, value in norm.items()}
        convert_state_dict(official | wrong, "mmpretrain", trained)
