"""Checkpoints of CenterPoly and CenterNet under our names and back: every family, stacks, strictness."""

import json

import pytest
import torch

from densepred.encoders import DLA34, Hourglass
from densepred.engine.checkpoint import state_dict_of
from densepred.engine.conversion import convert_file, convert_state_dict, detect_source, load_weights, to_official
from densepred.registry import MODELS
from tests import parity
from tests.test_conversion import torchvision_shapes

WIDTHS = dict(widths=(8, 12, 12), blocks=(1, 1, 2))


def build(encoder: dict, decoder: str, head_channels: int = 8) -> torch.nn.Module:
    head = dict(type="PolygonHead", num_classes=8, head_channels=head_channels)
    return MODELS.build(dict(type="Segmentor", encoder=encoder, decoder=dict(type=decoder), head=head))


def hourglass(stacks: int = 1) -> torch.nn.Module:
    return build(dict(type="Hourglass", num_stacks=stacks, **WIDTHS), "StackedMaps")


def resdcn(depth: int) -> torch.nn.Module:
    with torch.device("meta"):
        return build(dict(type="ResNet", depth=depth), "DeconvDecoder", 64)


def dla() -> torch.nn.Module:
    with torch.device("meta"):
        return build(dict(type="DLA34"), "DLAUp", 256)


def empty(shapes: dict[str, tuple]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def published(case: str) -> dict[str, tuple]:
    return {k: tuple(s) for k, s in json.loads((parity.CASES / case / "meta.json").read_text())["state_dict"]}


def resdcn_shapes(depth: int) -> dict[str, tuple]:
    """Return key -> shape of the official networks: torchvision's trunk under what the case of ResNet-18 lists."""
    shapes = {k: s for k, s in torchvision_shapes(depth).items() if not k.startswith("fc.")}
    width = 512 if depth < 50 else 2048
    for key, shape in published("centerpoly_resdcn18").items():
        if not key.startswith(("conv1.", "bn1.", "layer")):
            shapes[key] = (shape[0], width, *shape[2:]) if key.startswith("deconv_layers.0.") and shape[2:] else shape
    return shapes


def dla_shapes() -> dict[str, tuple]:
    """Return key -> shape of the official ``dla_34``, by the rules of its code."""
    shapes = {}

    def norm(at: str, width: int) -> None:
        names = ("weight", "bias", "running_mean", "running_var")
        shapes.update({f"{at}.{name}": (width,) for name in names} | {f"{at}.num_batches_tracked": ()})

    def conv(at: str, normed: str, before: int, width: int, kernel: int) -> None:
        shapes[f"{at}.weight"] = (width, before, kernel, kernel)
        norm(normed, width)

    def tree(at: str, before: int, width: int, merged: int) -> None:
        for i, channels in ((1, before), (2, width)):
            conv(f"{at}.tree{i}.conv1", f"{at}.tree{i}.bn1", channels, width, 3)
            conv(f"{at}.tree{i}.conv2", f"{at}.tree{i}.bn2", width, width, 3)
        conv(f"{at}.root.conv", f"{at}.root.bn", 2 * width + merged, width, 1)
        if before != width:
            conv(f"{at}.project.0", f"{at}.project.1", before, width, 1)

    def unit(at: str, before: int, width: int) -> None:
        shapes[f"{at}.conv.weight"], shapes[f"{at}.conv.bias"] = (width, before, 3, 3), (width,)
        shapes[f"{at}.conv.conv_offset_mask.weight"], shapes[f"{at}.conv.conv_offset_mask.bias"] = (
            (27, before, 3, 3),
            (27,),
        )
        norm(f"{at}.actf.0", width)

    def aggregation(at: str, width: int, coarser: list[tuple[int, int]]) -> None:
        for i, (before, factor) in enumerate(coarser, start=1):
            unit(f"{at}.proj_{i}", before, width)
            unit(f"{at}.node_{i}", width, width)
            shapes[f"{at}.up_{i}.weight"] = (width, 1, 2 * factor, 2 * factor)

    conv("base.base_layer.0", "base.base_layer.1", 3, 16, 7)
    conv("base.level0.0", "base.level0.1", 16, 16, 3)
    conv("base.level1.0", "base.level1.1", 16, 32, 3)
    tree("base.level2", 32, 64, 0)
    for level, width in ((3, 128), (4, 256)):
        tree(f"base.level{level}.tree1", width // 2, width, 0)
        tree(f"base.level{level}.tree2", width, width, width // 2 + width)
        conv(f"base.level{level}.project.0", f"base.level{level}.project.1", width // 2, width, 1)
    tree("base.level5", 256, 512, 256)
    aggregation("dla_up.ida_0", 256, [(512, 2)])
    aggregation("dla_up.ida_1", 128, [(256, 2), (256, 2)])
    aggregation("dla_up.ida_2", 64, [(128, 2), (128, 2), (128, 2)])
    aggregation("ida_up", 64, [(128, 2), (256, 4)])
    for name, width in (("hm", 8), ("poly", 32), ("pseudo_depth", 1), ("reg", 2)):
        shapes |= {f"{name}.0.weight": (256, 64, 3, 3), f"{name}.0.bias": (256,)}
        shapes |= {f"{name}.2.weight": (width, 256, 1, 1), f"{name}.2.bias": (width,)}
    return shapes


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_every_resnet_is_recognised_and_goes_back(depth):
    official, model = empty(resdcn_shapes(depth)), resdcn(depth)
    assert detect_source(official) == "centerpoly"
    ours = convert_state_dict(official, "centerpoly", model)
    back = to_official(ours, "centerpoly")
    assert set(back) == set(official) and all(
        back[key] is official[key] for key in official if "num_batches" not in key
    )
    assert ours["decoder.layers.9.weight"] is official["deconv_layers.9.weight"]
    assert ours["head.offset.2.bias"] is official["reg.2.bias"]


def test_dla_goes_back_but_for_what_nothing_reads():
    official, model = empty(dla_shapes() | {"base.fc.weight": (1000, 512, 1, 1), "base.fc.bias": (1000,)}), dla()
    assert detect_source(official) == "centerpoly"
    ours = convert_state_dict(official, "centerpoly", model)
    back = to_official(ours, "centerpoly")
    assert {key.rpartition(".")[0] for key in set(official) - set(back)} == {
        *(f"base.level{level}.project.{i}" for level in (3, 4) for i in (0, 1)),
        "base.fc",
    }
    assert all(back[key] is official[key] for key in back if "num_batches" not in key)
    assert ours["encoder.level4.tree2.root.conv.weight"] is official["base.level4.tree2.root.conv.weight"]
    assert ours["decoder.ida_up.up_2.weight"] is official["ida_up.up_2.weight"]


@pytest.mark.parametrize("stacks", [1, 2, 3])
def test_stacks_keep_their_branches(stacks):
    model = hourglass(stacks)
    official = to_official(model.state_dict(), "centerpoly")
    assert detect_source(official) == "centerpoly"
    assert {key.split(".")[1] for key in official if key.startswith("poly.")} == {str(i) for i in range(stacks)}
    state = model.state_dict()
    assert torch.equal(official[f"hm.{stacks - 1}.0.conv.weight"], state["head.heatmap.0.weight"])
    for i in range(stacks - 1):
        assert torch.equal(official[f"reg.{i}.1.weight"], state[f"head.deep.{i}.offset.2.weight"])
    ours = convert_state_dict(official, "centerpoly", hourglass(stacks))
    assert list(ours) == list(state) and all(torch.equal(ours[key], state[key]) for key in state)


def test_later_stacks_are_left_out_with_a_report(tmp_path):
    two = hourglass(2)
    official = to_official(two.state_dict(), "centerpoly")
    one = hourglass()
    ours = convert_state_dict(official, "centerpoly", one)
    assert torch.equal(ours["head.heatmap.0.weight"], official["hm.0.0.conv.weight"])  # of the stack that is kept
    assert not torch.equal(ours["head.heatmap.0.weight"], two.state_dict()["head.heatmap.0.weight"])
    assert not [key for key in to_official(ours, "centerpoly") if key not in official]
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in official.items()}}, tmp_path / "model.pth")
    report = convert_file(tmp_path / "model.pth", tmp_path / "ours.pth", "centerpoly", one)
    left = len(official) - len(to_official(one.state_dict(), "centerpoly"))
    assert "not in this model, left out: " in report and f"and {left - 6} more" in report
    written = state_dict_of(torch.load(tmp_path / "ours.pth"))
    assert list(written) == list(one.state_dict())
    # Two of three stacks: the layers after the second go with the third.
    three = to_official(hourglass(3).state_dict(), "centerpoly")
    kept = to_official(convert_state_dict(three, "centerpoly", two), "centerpoly")
    assert set(kept) == set(official) and torch.equal(kept["inters.0.conv1.weight"], three["inters.0.conv1.weight"])


def test_an_encoder_starts_from_centernet():
    official = to_official(hourglass(2).state_dict(), "centerpoly")
    centernet = {key: value for key, value in official.items() if not key.startswith(("poly.", "pseudo_depth."))}
    centernet |= {f"wh.{i}.1.weight": torch.zeros(2, 8, 1, 1) for i in range(2)}
    centernet |= {f"hm.{i}.1.weight": torch.zeros(80, 8, 1, 1) for i in range(2)}  # COCO's classes
    assert detect_source(centernet) == "centerpoly"
    encoder = Hourglass(1, **WIDTHS)
    ours = convert_state_dict(centernet, "centerpoly", encoder)
    assert list(ours) == list(encoder.state_dict())
    assert torch.equal(ours["kps.0.low3.0.conv2.weight"], official["kps.0.low3.0.conv2.weight"])


def test_what_does_not_fit_is_refused():
    official = to_official(hourglass().state_dict(), "centerpoly")
    with pytest.raises(ValueError, match=r"missing from the file: encoder\.kps\.1\."):
        convert_state_dict(official, "centerpoly", hourglass(2))
    with pytest.raises(ValueError, match=r"1 unknown to the model: extra\.weight"):
        convert_state_dict(official | {"extra.weight": torch.zeros(1)}, "centerpoly", hourglass())
    del official["poly.0.1.bias"]
    with pytest.raises(ValueError, match=r"1 missing from the file: head\.polygon\.2\.bias"):
        convert_state_dict(official, "centerpoly", hourglass())


def test_imagenet_dla(tmp_path):
    official = {k.removeprefix("base."): v for k, v in dla_shapes().items() if k.startswith("base.")}
    official |= {"fc.weight": (1000, 512, 1, 1), "fc.bias": (1000,)}
    weights = {key: torch.full(shape, float(i % 7)) for i, (key, shape) in enumerate(official.items())}
    assert detect_source(weights) == "dla"
    torch.save(weights, tmp_path / "dla34.pth")
    encoder = DLA34()
    report = load_weights(encoder, tmp_path / "dla34.pth")
    assert "dropped by rule: level3.project.0.weight" in report
    state = encoder.state_dict()
    assert torch.equal(state["level3.tree2.root.bn.weight"], weights["level3.tree2.root.bn.weight"])
    unread = ("fc.", "level3.project", "level4.project")
    assert set(to_official(state, "dla")) == {key for key in weights if not key.startswith(unread)}
