"""VWFormer's published forms: their keys through the converter and back, and their numbers in float64."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from densepred.decoders import VWFormerDecoder, vwformer
from densepred.encoders import convnext
from densepred.engine.conversion import convert_state_dict, detect_source, to_official
from densepred.registry import MODELS
from tests import parity
from tests.test_varying_window_attention import contexts

CONVNEXT = dict(type="ConvNeXt", arch="tiny", output_norm=True, downsample_norm_eps=1e-5)
MIT = dict(type="MixVisionTransformer", arch="b0", reduction_norm_eps=1e-5)
SEGMENTORS = {
    "vwformer_convnext_t_ade20k": (CONVNEXT, dict(variant="ade20k"), 150),
    "vwformer_city_convnext_t": (CONVNEXT, dict(variant="cityscapes"), 19),
    "vwformer_mit_b0_ade20k": (MIT, dict(variant="ade20k", channels=128), 150),
}
PIXEL_DECODERS = {
    "mask2former_vw_pixel_decoder": "mask2former",
    "mask2former_vw_deform_pixel_decoder": "mask2former_deform",
}
PREFIX = "sem_seg_head.pixel_decoder."
SWIN = dict(type="SwinTransformer", embed_dim=12, depths=(1, 2, 1, 1), num_heads=(1, 2, 2, 4), window_size=4)


def segmentor(encoder: dict, decoder: dict, num_classes: int) -> nn.Module:
    head = dict(type="SemanticHead", num_classes=num_classes)
    return MODELS.build(
        dict(type="Segmentor", encoder=encoder, decoder=dict(type="VWFormerDecoder", **decoder), head=head)
    )


class Alone(nn.Module):
    """A decoder without anything around it, as the converter takes a whole model."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.encoder = nn.Identity()
        self.decoder = VWFormerDecoder((96, 192, 384, 768), (4, 8, 16, 32), variant=variant)


def noted(decoder: VWFormerDecoder, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Return a dict that a pass of the decoder fills with what its layers gave, by the cases' names."""
    found, names = {}, {layer: name for name, layer in decoder.named_modules()}

    def noting(function):
        def run(layer, *arguments):
            found[names[layer]] = result = function(layer, *arguments)
            return result

        return run

    def attended(ratio: int):
        def note(_, inputs: tuple, y: Tensor) -> None:
            found[f"attn_{ratio}"] = y
            found[f"branch_{ratio}"] = y + inputs[0] if decoder.variant.shortcut else y

        return note

    for function in ("fuse", "embed_patches"):
        monkeypatch.setattr(vwformer, function, noting(getattr(vwformer, function)))
    for ratio, attention in zip(decoder.ratios, decoder.attn, strict=True):
        attention.register_forward_hook(attended(ratio))
    return found


def windowed(x: Tensor) -> Tensor:
    """Return (B, C, h, w) as (B * windows, P, C)."""
    return x.unflatten(3, (8, -1)).unflatten(2, (8, -1)).permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2)


def named(found: dict[str, Tensor], sequence_first: bool) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the layers' results by the cases' names, contexts in every layout that the cases have."""
    for name, theirs in (
        ("linear_fuse", "fuse"),
        ("short_path", "short_path_0"),
        ("image_pool.1", "image_pool"),
        ("cat", "cat_0"),
    ):
        if name in found:
            yield from (
                (key, found[name]) for key in {name, theirs, theirs.replace("_0", ""), name.replace(".1", "_0")}
            )
    for i, ratio in enumerate((2, 4, 8)):
        embedded = found[f"ds.{i}"]
        tokens = contexts(embedded, (ratio, ratio), (8, 8))  # (B, 8, 8, p, p, C)
        flat = tokens.flatten(3, 4).flatten(0, 2)  # (B * windows, P, C)
        yield f"ds_{ratio}", embedded
        yield f"context_{ratio}", flat.transpose(0, 1) if sequence_first else flat
        yield f"context_map_{ratio}", tokens.flatten(0, 2).permute(0, 3, 1, 2)
        yield f"branch_{ratio}", found[f"branch_{ratio}"]
        yield f"attn_{ratio}", windowed(found[f"attn_{ratio}"])


def check(outputs: dict[str, Tensor], meta: dict, expected: dict) -> None:
    assert set(meta["outputs"]) <= set(outputs)
    for name, output in meta["outputs"].items():
        value = outputs[name]
        assert list(value.shape) == output["shape"], name
        array = parity.thin(value.numpy(), output)
        np.testing.assert_allclose(
            array, expected[name], rtol=0, atol=1e-11 * np.abs(expected[name]).max(), err_msg=name
        )


@torch.no_grad()
@pytest.mark.parametrize("case", SEGMENTORS)
def test_published_segmentors(case, monkeypatch):
    meta, expected = parity.case(parity.CASES / case)
    official = {key: torch.from_numpy(value) for key, value in parity.filled_state(meta).items()}
    assert detect_source(official) == "vwformer"
    with torch.device("meta"):
        model = segmentor(*SEGMENTORS[case])
    model.to_empty(device="cpu").double().eval()
    weights = convert_state_dict(official, "vwformer", model)
    model.load_state_dict(weights)
    back = to_official(model.state_dict(), "vwformer")
    assert back.keys() == official.keys() and all(torch.equal(back[k], v) for k, v in official.items())
    found = noted(model.decoder, monkeypatch)
    features = model.decoder(model.encoder(torch.from_numpy(parity.image_batch(meta))))
    outputs = dict(named(found, sequence_first="city" in case))
    if "city" not in case:  # its attention is a convolution, whose context is a map
        outputs |= {f"context_{r}": outputs[f"context_map_{r}"] for r in (2, 4, 8)}
    outputs |= {f"feat_{i}": x for i, x in enumerate(features.encoder)}
    outputs |= dict(low_level_fuse=features.pixels, logits=model.head(features)["sem_logits"])
    check(outputs, meta, expected)


@torch.no_grad()
@pytest.mark.parametrize("case", PIXEL_DECODERS)
def test_published_pixel_decoders(case, monkeypatch):
    meta, expected = parity.case(parity.CASES / case)
    official = {PREFIX + key: torch.from_numpy(value) for key, value in parity.filled_state(meta).items()}
    with torch.device("meta"):
        model = Alone(PIXEL_DECODERS[case])
    model.to_empty(device="cpu").double().eval()
    model.load_state_dict(convert_state_dict(official, "mask2former-vwformer", model))
    back = to_official(model.state_dict(), "mask2former-vwformer")
    assert back.keys() == official.keys() and all(torch.equal(back[k], v) for k, v in official.items())
    maps = [torch.from_numpy(parity.normal_input(m["seed"], m["shape"])) for m in meta["input"].values()]
    found = noted(model.decoder, monkeypatch)
    features = model.decoder(maps)
    outputs = dict(named(found, sequence_first=False)) | dict(mask_features=features.pixels)
    outputs |= {f"multi_scale_{i}": x for i, x in enumerate(features.levels)}
    check(outputs, meta, expected)


@pytest.mark.parametrize("variant", PIXEL_DECODERS.values())
@pytest.mark.parametrize("encoder", [SWIN, dict(type="ResNet", depth=18)], ids=["swin", "resnet"])
def test_whole_mask2former_round_trip(encoder, variant):
    head = dict(
        type="Mask2FormerHead", num_classes=4, embed_dim=32, num_heads=2, ffn_dim=24, num_layers=2, num_queries=5
    )
    decoder = dict(type="VWFormerDecoder", variant=variant, channels=64, mask_dim=32)
    model = MODELS.build(
        dict(type="Segmentor", encoder=encoder, decoder=decoder, head=head | dict(thing_classes=(0, 1)))
    )
    state = model.state_dict()
    official = to_official(state, "mask2former-vwformer")
    assert detect_source(official) == "mask2former-vwformer"
    assert {key.split(".")[0] for key in official} == {"backbone", "sem_seg_head"}
    ours = convert_state_dict(official, "mask2former-vwformer", model)
    assert list(ours) == list(state) and all(torch.equal(ours[k], v) for k, v in state.items())


@pytest.mark.parametrize("encoder", [CONVNEXT, SWIN, MIT], ids=["convnext", "swin", "mit"])
def test_whole_segmentor_round_trip(encoder, monkeypatch):
    monkeypatch.setitem(convnext.ARCHS, "tiny", ((1, 1, 2, 1), (8, 16, 24, 32)))
    model = segmentor(encoder, dict(variant="cityscapes", channels=64), 3)
    state = model.state_dict()
    official = to_official(state, "vwformer")
    assert detect_source(official) == "vwformer"
    assert {key.split(".")[0] for key in official} == {"backbone", "decode_head"}
    ours = convert_state_dict(official, "vwformer", model)
    assert list(ours) == list(state) and all(torch.equal(ours[k], v) for k, v in state.items())


def test_another_form_is_refused():
    with torch.device("meta"):
        city, ade = (segmentor(CONVNEXT, dict(variant=variant), 19) for variant in ("cityscapes", "ade20k"))
    with pytest.raises(ValueError, match="does not fit Segmentor as configured"):
        convert_state_dict(to_official(city.state_dict(), "vwformer"), "vwformer", ade)
