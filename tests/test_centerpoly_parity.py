"""CenterPoly's published networks: keys through the converter and back, published maps and detections in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.engine.conversion import convert_state_dict, detect_source, to_official
from densepred.heads.polygon_inference import decode
from densepred.registry import MODELS
from densepred.segmentor import Segmentor
from tests import parity

HOURGLASS = dict(encoder=dict(type="Hourglass"), decoder=dict(type="StackedMaps"))
RESDCN = dict(encoder=dict(type="ResNet", depth=18), decoder=dict(type="DeconvDecoder"))
BRANCHES = {"hm": "heatmap_logits", "poly": "polygon", "pseudo_depth": "pseudo_depth", "reg": "offset"}


def network(folder: str, parts: dict, **head) -> tuple[dict, dict[str, Tensor], Segmentor]:
    """Return a case's recipe, its official weights, and our model with these."""
    meta, _ = parity.case(parity.CASES / folder)
    official = {key: torch.from_numpy(value) for key, value in parity.filled_state(meta).items()}
    head = dict(type="PolygonHead", num_classes=8, **head)
    with torch.device("meta"):
        model = MODELS.build(dict(type="Segmentor", head=head, **parts)).eval()
    # Ours are the official tensors, not copies: the hourglass alone takes 770 MB.
    model.load_state_dict(convert_state_dict(official, "centerpoly", model), assign=True)
    return meta, official, model


def run(meta: dict, model: Segmentor) -> dict[str, Tensor]:
    """Return what one pass over the case's image gave: the published maps by their names, and ours between the parts."""
    with torch.no_grad():
        maps = model.encoder(torch.from_numpy(parity.image_batch(meta)))
        features = model.decoder(maps)
        outputs = model.head(features)
    return {name: outputs[ours] for name, ours in BRANCHES.items()} | dict(last=maps[-1], pixels=features.pixels)


def check(folder: str, found: dict[str, Tensor]) -> None:
    meta, expected = parity.case(parity.CASES / folder)
    for name, value in found.items():
        array, want = parity.thin(value.numpy(), meta["outputs"][name]), expected[name]
        np.testing.assert_allclose(array, want, rtol=0, atol=1e-11 * np.abs(want).max(), err_msg=name)


def detections(found: dict[str, Tensor], k: int, coordinates: str) -> Tensor:
    """Return the official rows: x1, y1, x2, y2, score, class, vertices, depth."""
    best = decode(found["hm"].sigmoid(), found["reg"], found["poly"], found["pseudo_depth"], k, coordinates)
    boxes = torch.cat([best.polygons.amin(2), best.polygons.amax(2)], dim=-1)  # (B, K, 4)
    columns = (best.scores, best.labels.double(), best.polygons.flatten(2), best.depths)
    return torch.cat([boxes, *(x if x.ndim == 3 else x[..., None] for x in columns)], dim=-1)  # (B, K, 39)


def assert_goes_back(official: dict[str, Tensor], model: Segmentor) -> None:
    back = to_official(model.state_dict(), "centerpoly")
    assert sorted(back) == sorted(official)
    assert all(torch.equal(back[key].double(), value) for key, value in official.items())


def test_small_hourglass():
    folder = "centerpoly_v2_hourglass_cityscapes"
    meta, official, model = network(folder, HOURGLASS)
    assert detect_source(official) == "centerpoly"
    assert sum(p.numel() for p in model.parameters()) == 96_034_219
    found = run(meta, model)
    assert found["last"] is found["pixels"]
    rows = {f"dets_{coordinates}": detections(found, 128, coordinates) for coordinates in ("cartesian", "polar")}
    check(folder, rows | {"cnv": found["pixels"]} | {name: found[name] for name in BRANCHES})
    assert_goes_back(official, model)


def test_resnet_18_with_deformable_convolutions():
    folder = "centerpoly_resdcn18"
    meta, official, model = network(folder, RESDCN, head_channels=64)
    assert detect_source(official) == "centerpoly"
    assert sum(p.numel() for p in model.parameters()) == 14_471_612
    first = []
    model.decoder.layers[0].register_forward_hook(lambda _, __, x: first.append(x))
    found = run(meta, model)
    published = dict(layer4=found["last"], dcn0=first[0], deconv=found["pixels"])
    published["dets_cartesian"] = detections(found, 64, "cartesian")
    check(folder, published | {name: found[name] for name in BRANCHES})
    assert_goes_back(official, model)


@pytest.mark.parametrize(("depth", "millions"), [(18, 14.5), (34, 24.6), (50, 30.7), (101, 49.7)])
def test_published_number_of_parameters_over_resnets(depth, millions):
    parts = dict(RESDCN, encoder=dict(RESDCN["encoder"], depth=depth))
    with torch.device("meta"):
        model = MODELS.build(
            dict(type="Segmentor", head=dict(type="PolygonHead", num_classes=8, head_channels=64), **parts)
        )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions
