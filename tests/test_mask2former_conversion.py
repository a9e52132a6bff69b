"""Published weights of Mask2Former, ECO-M2F and Swin under our names, and back."""

import json
import pickle
import re

import pytest
import torch

from densepred.engine.checkpoint import read_checkpoint, write_checkpoint
from densepred.engine.conversion import (
    SOURCES,
    convert_file,
    convert_state_dict,
    detect_source,
    fitting_weights,
    load_weights,
    to_official,
)
from densepred.registry import MODELS
from tests import parity

SWIN = dict(type="SwinTransformer", embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=4)
RESNET = dict(type="ResNet", depth=18, frozen_norm=True)
DECODER = dict(type="DeformablePixelDecoder", embed_dim=32, mask_dim=16, num_layers=3, num_heads=2, ffn_dim=24)
HEAD = dict(type="Mask2FormerHead", embed_dim=16, num_heads=2, ffn_dim=24, num_layers=2, num_queries=5)
CASES = {"mask2former": "mask2former_r50_coco_panoptic", "eco-m2f": "eco_m2f_swin_t_coco"}


def build(encoder, adaptive=False, decoder=DECODER, head=HEAD, num_classes=4):
    decoder = dict(type="AdaptiveExit", decoder=decoder) if adaptive else decoder
    head = dict(head, num_classes=num_classes, thing_classes=(0, 1))
    return MODELS.build(dict(type="Segmentor", encoder=encoder, decoder=decoder, head=head))


def published(source):
    """Return the official key -> empty tensor of a published model, and ours of the same size; both without memory."""
    meta = json.loads((parity.CASES / CASES[source] / "meta.json").read_text())
    shapes = dict.fromkeys(meta["not_filled"], ()) | dict(meta["state_dict"])
    official = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    encoder = dict(RESNET, depth=50) if source == "mask2former" else dict(type="SwinTransformer")
    with torch.device("meta"):
        model = build(
            encoder, source == "eco-m2f", dict(type=DECODER["type"]), dict(type=HEAD["type"]), num_classes=133
        )
    return official, model


def assert_same(found, expected):
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.fixture
def plain():
    return build(SWIN)


@pytest.fixture
def adaptive():
    return build(SWIN, adaptive=True)


@pytest.mark.parametrize("source", CASES)
def test_every_published_key_has_a_place_and_goes_back(source):
    official, model = published(source)
    assert detect_source(official) == source
    ours = convert_state_dict(official, source, model)
    assert list(ours) == list(model.state_dict())
    kept = {k: v for k, v in official.items() if not re.fullmatch(SOURCES[source].dropped, k)}
    assert len(official) - len(kept) == (1 if source == "mask2former" else 13)  # criterion, Swin-T's twelve indices
    back = to_official(ours, source)
    assert set(back) == set(kept) and all(back[key] is kept[key] for key in kept)


def test_weights_land_where_they_belong():
    official, model = published("eco-m2f")
    ours = convert_state_dict(official, "eco-m2f", model)
    predictor, pixel_decoder = "sem_seg_head.predictor.", "sem_seg_head.pixel_decoder."
    for key, theirs in {
        "encoder.layers.2.blocks.5.attn.qkv.weight": "backbone.layers.2.blocks.5.attn.qkv.weight",
        "decoder.gate.weight": pixel_decoder + "transformer.encoder.gt.head.weight",
        "decoder.decoder.layers.4.norm2.bias": pixel_decoder + "transformer.encoder.layers.4.norm2.bias",
        "decoder.decoder.lateral.norm.weight": pixel_decoder + "adapter_1.norm.weight",
        "decoder.decoder.output.weight": pixel_decoder + "layer_1.weight",
        "head.layers.7.cross_attention.attn.in_proj_bias": predictor
        + "transformer_cross_attention_layers.7.multihead_attn.in_proj_bias",
        "head.layers.8.self_attention.norm.weight": predictor + "transformer_self_attention_layers.8.norm.weight",
        "head.layers.0.ffn.linear2.weight": predictor + "transformer_ffn_layers.0.linear2.weight",
        "head.query_embed": predictor + "query_embed.weight",
    }.items():
        assert ours[key] is official[theirs]


def test_early_checkpoints_are_renamed():
    official, model = published("mask2former")
    early = {
        key.replace("sem_seg_head.pixel_decoder.", "sem_seg_head.").replace("query_feat", "static_query"): value
        for key, value in official.items()
    }
    assert len(set(early) - set(official)) == 118 and detect_source(early) == "mask2former"
    ours, expected = (convert_state_dict(keys, "mask2former", model) for keys in (early, official))
    assert all(ours[key] is expected[key] for key in expected)


@pytest.mark.parametrize("source", ["mask2former", "eco-m2f", "transformers"])
@pytest.mark.parametrize("encoder", [SWIN, RESNET], ids=["swin", "resnet"])
def test_round_trip_gives_the_same_weights(source, encoder):
    model = build(encoder, adaptive=source == "eco-m2f")
    official = to_official(model.state_dict(), source)
    assert detect_source(official) == source
    assert not [key for key in official if key.startswith(("encoder.", "decoder.", "head.")) or "[" in key]
    ours = convert_state_dict(official, source, model)
    assert_same(ours, model.state_dict())
    assert_same(to_official(ours, source), official)


def test_fused_projections_are_split_in_the_order_query_key_value(plain):
    state = plain.state_dict()
    theirs = to_official(state, "transformers")
    for ours, at in (
        ("encoder.layers.1.blocks.1.attn.qkv.bias", "model.pixel_level_module.encoder.encoder.layers.1.blocks.1."),
        ("head.layers.1.self_attention.attn.in_proj_bias", "model.transformer_module.decoder.layers.1."),
    ):
        names = "self_attn.{}_proj" if ours.startswith("head") else "attention.self.{}"
        words = "qkv" if ours.startswith("head") else ("query", "key", "value")
        parts = [theirs[f"{at}{names.format(word)}.bias"] for word in words]
        assert torch.equal(torch.cat(parts), state[ours])


def test_an_encoder_takes_its_part_of_a_whole_file(plain):
    for source in ("mask2former", "transformers"):
        official = to_official(plain.state_dict(), source)
        assert_same(convert_state_dict(official, source, plain.encoder), plain.encoder.state_dict())


def test_a_plain_file_starts_an_adaptive_model_with_the_gate_as_it_is(plain, adaptive, tmp_path):
    gate = adaptive.decoder.gate.weight.clone()
    for source in ("mask2former", "transformers"):
        path = tmp_path / f"{source}.pth"
        write_checkpoint({"model": to_official(plain.state_dict(), source)}, path)
        report = load_weights(adaptive, path)
        assert "not in files of this kind, kept as initialised: decoder.gate.weight, decoder.gate.bias" in report
        assert torch.equal(adaptive.decoder.gate.weight, gate)
        assert_same(adaptive.decoder.decoder.state_dict(), plain.decoder.state_dict())
        assert_same(to_official(adaptive.state_dict(), source), to_official(plain.state_dict(), source))
        with pytest.raises(ValueError, match=r"files of '.*' have no decoder\.gate\.weight, .* Train the model"):
            fitting_weights(adaptive, read_checkpoint(path)["model"], whole=True)


def test_the_gate_is_never_lost_or_invented(plain, adaptive):
    gated, ungated = to_official(adaptive.state_dict(), "eco-m2f"), to_official(plain.state_dict(), "mask2former")
    with pytest.raises(ValueError, match=r"2 unknown to the model: decoder\.gate\.weight, decoder\.gate\.bias"):
        convert_state_dict(gated, "eco-m2f", plain)
    with pytest.raises(ValueError, match=r"looks like 'mask2former'(?s:.)*2 missing from the file: decoder\.gate\."):
        convert_state_dict(ungated, "eco-m2f", adaptive)


def classifier_of(swin, source):
    """Return a classification checkpoint that holds the weights of our encoder, as the source would."""
    official = {
        k: v for k, v in to_official(swin.state_dict(), source).items() if not re.search(r"norm\d\.|stage\d", k)
    }
    official |= {k: v for k, v in to_official(swin.state_dict(), source).items() if ".blocks." in k}
    index = "attn.relative_position_index" if source == "swin" else "attention.self.relative_position_index"
    prefix, head = ("", "head") if source == "swin" else ("swin.encoder.", "classifier")
    official[f"{prefix}layers.0.blocks.0.{index}"] = torch.zeros(16, 16, dtype=torch.int64)
    norm = "norm" if source == "swin" else "swin.layernorm"
    return official | {f"{norm}.weight": torch.ones(96), f"{norm}.bias": torch.ones(96), f"{head}.bias": torch.ones(10)}


@pytest.mark.parametrize("source", ["swin", "transformers-swin"])
def test_a_classification_swin_fills_an_encoder_but_for_its_output_norms(source, tmp_path):
    trained, fresh = MODELS.build(SWIN), MODELS.build(SWIN)
    torch.nn.init.ones_(trained.norm2.bias)
    official = classifier_of(trained, source)
    if source == "swin":
        official["layers.1.blocks.1.attn_mask"] = torch.zeros(1, 16, 16)
    assert detect_source(official) == source
    write_checkpoint({"model": official}, tmp_path / "swin.pth")
    report = load_weights(fresh, tmp_path / "swin.pth")
    assert (
        "kept as initialised: norm0.weight, norm0.bias, norm1.weight" in report and "norm2.bias, and 2 more" in report
    )
    assert "dropped by rule: " in report and "relative_position_index" in report
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key]) == (key != "norm2.bias"), key


def test_a_classification_swin_starts_a_segmentor_and_cannot_be_evaluated(plain):
    official = classifier_of(plain.encoder, "swin")
    weights, _ = fitting_weights(plain, official)
    assert list(weights) == [key for key in plain.state_dict() if key.startswith("encoder.")]
    with pytest.raises(ValueError, match="missing from the file: decoder"):
        fitting_weights(plain, official, whole=True)
    del official["layers.0.blocks.0.norm1.bias"]
    with pytest.raises(ValueError, match=r"1 missing from the file: encoder\.layers\.0\.blocks\.0\.norm1\.bias\n"):
        convert_state_dict(official, "swin", plain)


def test_counters_of_steps_go_where_norms_count_and_nowhere_else():
    counting, frozen = MODELS.build(dict(type="ResNet", depth=18)), MODELS.build(RESNET)
    official = to_official(counting.state_dict(), "torchvision-resnet")
    weights, report = fitting_weights(frozen, official)
    assert_same(weights, {k: v for k, v in counting.state_dict().items() if not k.endswith("num_batches_tracked")})
    assert report.endswith("; 20 step counters left out: the norms are frozen")
    official["layer9.num_batches_tracked"] = torch.zeros(())
    with pytest.raises(ValueError, match=r"1 unknown to the model: layer9\.num_batches_tracked"):
        fitting_weights(frozen, official)


def test_the_zoo_s_pickled_arrays_convert(plain, tmp_path):
    arrays = {k: v.numpy() for k, v in to_official(plain.state_dict(), "mask2former").items()}
    arrays |= {"criterion.empty_weight": arrays["sem_seg_head.predictor.class_embed.bias"]}
    record = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps(record))
    report = convert_file(tmp_path / "model_final.pkl", tmp_path / "ours.safetensors", "mask2former", plain)
    assert f"from {len(arrays)} keys of mask2former; dropped by rule: criterion.empty_weight -> " in report
    found = read_checkpoint(tmp_path / "ours.safetensors")
    assert all(torch.equal(found[key], value) for key, value in plain.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda s: s.pop("model.transformer_module.queries_features.weight"),
            "1 missing from the file: head.query_feat",
        ),
        (lambda s: s.update(extra=torch.ones(1)), "1 unknown to the model: extra"),
        (
            lambda s: s.update({"class_predictor.bias": torch.ones(9)}),
            "1 of another shape: head.class_embed.bias (file (9,), model (5,))",
        ),
        (
            lambda s: s.pop("model.transformer_module.decoder.layers.0.self_attn.k_proj.bias"),
            "2 unknown to the model: head.layers.0.self_attention.attn.in_proj_bias[q], ",
        ),
        (
            lambda s: s.update({"model.transformer_module.decoder.layers.0.self_attn.v_proj.bias": torch.ones(3)}),
            "3 unknown to the model: head.layers.0.self_attention.attn.in_proj_bias[q], ",
        ),
    ],
)
def test_every_key_is_used_and_none_is_missing(plain, spoil, message):
    official = to_official(plain.state_dict(), "transformers")
    spoil(official)
    with pytest.raises(ValueError) as error:
        convert_state_dict(official, "transformers", plain)
    assert message in str(error.value)


def test_a_wrong_source_says_what_the_file_looks_like(plain):
    for source, wrong in (("mask2former", "transformers"), ("transformers", "mask2former"), ("mask2former", "swin")):
        with pytest.raises(ValueError, match=f"read as '{wrong}'.*; it looks like '{source}'"):
            convert_state_dict(to_official(plain.state_dict(), source), wrong, plain)


def test_our_own_weights_are_no_published_format(plain):
    assert detect_source(plain.state_dict()) is None
    kmax = ["backbone.stem.conv1.weight", "sem_seg_head.pixel_decoder._in_norms.0.weight", "sem_seg_head.predictor._x"]
    assert detect_source(kmax) == "kmax-deeplab"
