"""Published weights: names written down from the publishers, strictness both ways, and the way back."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from torch import nn

from densepred.encoders.convnext import ARCHS, ConvNeXt
from densepred.encoders.resnet import BLOCKS, ResNet
from densepred.engine.build import build_model
from densepred.engine.checkpoint import read_checkpoint, write_checkpoint
from densepred.engine.conversion import (
    SOURCES,
    convert_file,
    convert_state_dict,
    detect_source,
    load_weights,
    to_official,
)
from densepred.registry import MODELS
from tests import parity

CONFIGS = Path(__file__).parents[1] / "configs"
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Whole(nn.Module):
    """The outline of a segmentor."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(2, 2)


def torchvision_shapes(depth):
    """Return key -> shape of torchvision's ResNet, in its own order and by its own rules."""
    shapes, channels, expansion = {}, 64, 1 if depth < 50 else 4

    def conv_norm(conv, norm, shape):
        shapes[f"{conv}.weight"] = shape
        shapes.update({f"{norm}.{n}": () if n == NORM[-1] else shape[:1] for n in NORM})

    conv_norm("conv1", "bn1", (64, 3, 7, 7))
    for layer, blocks in enumerate(BLOCKS[depth], start=1):
        for block in range(blocks):
            at, width = f"layer{layer}.{block}", 32 * 2**layer
            kernels = (3, 3) if depth < 50 else (1, 3, 1)
            widths = [channels, *[width] * (len(kernels) - 1), width * expansion]
            for i, kernel in enumerate(kernels):
                conv_norm(f"{at}.conv{i + 1}", f"{at}.bn{i + 1}", (widths[i + 1], widths[i], kernel, kernel))
            if channels != widths[-1]:
                conv_norm(f"{at}.downsample.0", f"{at}.downsample.1", (widths[-1], channels, 1, 1))
            channels = widths[-1]
    return shapes | {"fc.weight": (1000, channels), "fc.bias": (1000,)}


def timm_convnext_shapes(blocks, dims):
    """Return key -> shape of timm's ConvNeXt."""
    shapes = {"stem.0.weight": (dims[0], 3, 4, 4), "stem.1.weight": dims[:1]}
    for i, (count, dim) in enumerate(zip(blocks, dims, strict=True)):
        if i > 0:
            shapes[f"stages.{i}.downsample.0.weight"] = (dims[i - 1],)
            shapes[f"stages.{i}.downsample.1.weight"] = (dim, dims[i - 1], 2, 2)
        for j in range(count):
            at = f"stages.{i}.blocks.{j}"
            shapes |= {f"{at}.conv_dw.weight": (dim, 1, 7, 7), f"{at}.norm.weight": (dim,)}
            shapes |= {f"{at}.mlp.fc1.weight": (4 * dim, dim), f"{at}.mlp.fc2.weight": (dim, 4 * dim)}
    biases = {k.replace("weight", "bias"): s[:1] for k, s in shapes.items() if ".downsample.0." not in k}
    biases |= {f"stages.{i}.downsample.0.bias": (dims[i - 1],) for i in range(1, 4)}
    gammas = {f"stages.{i}.blocks.{j}.gamma": (dims[i],) for i in range(4) for j in range(blocks[i])}
    head = {
        "head.norm.weight": dims[3:],
        "head.norm.bias": dims[3:],
        "head.fc.weight": (10, dims[3]),
        "head.fc.bias": (10,),
    }
    return shapes | biases | gammas | head


def filled(shapes):
    return {k: torch.from_numpy(np.asarray(parity.fill(k, s))) for k, s in shapes.items()}


@pytest.fixture
def convnext(monkeypatch):
    """A ConvNeXt with few blocks and channels."""
    monkeypatch.setitem(ARCHS, "tiny", ((1, 2, 1, 1), (8, 16, 24, 32)))
    return ConvNeXt("tiny")


@pytest.fixture(scope="module")
def resnet18():
    return filled(torchvision_shapes(18))


@pytest.mark.parametrize("depth", BLOCKS)
def test_torchvision_names_are_covered(depth):
    with torch.device("meta"):
        model = ResNet(depth)
    shapes = torchvision_shapes(depth)
    converted = convert_state_dict(
        {k: torch.empty(s, device="meta") for k, s in shapes.items()}, "torchvision-resnet", model
    )
    assert list(converted) == list(model.state_dict())
    assert set(to_official(converted, "torchvision-resnet")) == {k for k in shapes if not k.startswith("fc.")}


def test_torchvision_weights_land_where_they_belong(resnet18):
    found = convert_state_dict(resnet18, "torchvision-resnet", ResNet(18))
    for ours, official in {
        "stem.conv1.weight": "conv1.weight",
        "stem.conv1.norm.running_var": "bn1.running_var",
        "res2.1.conv2.norm.bias": "layer1.1.bn2.bias",
        "res5.0.shortcut.weight": "layer4.0.downsample.0.weight",
        "res3.0.shortcut.norm.weight": "layer2.0.downsample.1.weight",
    }.items():
        assert torch.equal(found[ours], resnet18[official]) and found[ours].dtype == torch.float64
    assert found["res2.0.conv1.norm.num_batches_tracked"].dtype == torch.int64


def test_deep_stem_names_are_covered():
    model = ResNet(18, stem="deep")
    official = to_official(model.state_dict(), "torchvision-resnet")
    assert {"conv1.weight", "conv3.weight", "bn3.running_mean"} <= set(official)
    assert list(convert_state_dict(official, "torchvision-resnet", model)) == list(model.state_dict())


def test_timm_convnext_lands_where_it_belongs(convnext):
    official = filled(timm_convnext_shapes(*ARCHS["tiny"]))
    found = convert_state_dict(official, "timm-convnext", convnext)
    for ours, theirs in {
        "downsample_layers.0.0.weight": "stem.0.weight",
        "downsample_layers.2.1.bias": "stages.2.downsample.1.bias",
        "stages.1.1.dwconv.weight": "stages.1.blocks.1.conv_dw.weight",
        "stages.1.1.pwconv2.weight": "stages.1.blocks.1.mlp.fc2.weight",
        "stages.3.0.gamma": "stages.3.blocks.0.gamma",
        "stages.3.0.norm.bias": "stages.3.blocks.0.norm.bias",
    }.items():
        assert torch.equal(found[ours], official[theirs])


def test_kmax_names_go_to_ours_and_back():
    meta, _ = parity.case(parity.CASES / "kmax_r50_coco_panoptic")
    official = {key: torch.empty(shape, device="meta") for key, shape in meta["state_dict"]}
    ours = {SOURCES["kmax-deeplab"].to_ours(key): value for key, value in official.items()}
    assert len(ours) == len(official) == 1417
    assert {key.partition(".")[0] for key in ours} == {"encoder", "decoder", "head"}
    assert not [key for key in ours if "._" in key]  # the official code's private names
    assert list(to_official(ours, "kmax-deeplab")) == list(official)


def test_an_encoder_takes_its_part_of_a_kmax_checkpoint():
    meta, _ = parity.case(parity.CASES / "kmax_r50_coco_panoptic")
    official = {key: np.empty(shape, np.float32) for key, shape in meta["state_dict"]}
    official |= {"criterion.empty_weight": np.ones(134), "pixel_mean": np.ones((3, 1, 1))}
    with torch.device("meta"):
        model = ResNet(50)
    assert list(convert_state_dict(official, "kmax-deeplab", model)) == list(model.state_dict())


@pytest.mark.parametrize("source", [s for s in SOURCES if "resnet" in s or "convnext" in s])
def test_round_trip_gives_the_same_weights(source, convnext):
    encoder = convnext if "convnext" in source else ResNet(18)
    for model, prefix in ((encoder, ""), (Whole(encoder), "encoder.")):
        official = to_official(model.state_dict(), source)
        assert detect_source(official) in (source, "torchvision-resnet" if source == "timm-resnet" else source)
        assert not any(key.startswith(("encoder.", "head.")) for key in official)
        back = convert_state_dict(official, source, model)
        assert list(back) == [k for k in model.state_dict() if k.startswith(prefix)]
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.items())


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("kmax_*.py")), ids=lambda path: path.stem)
def test_whole_models_go_to_official_names_and_back(config):
    with torch.device("meta"):
        model = build_model(config)
    state = model.state_dict()
    official = to_official(state, "kmax-deeplab")
    assert len(official) == len(state) and detect_source(official) == "kmax-deeplab"
    assert all(key.startswith(("backbone.", "sem_seg_head.p")) for key in official)
    back = convert_state_dict(official, "kmax-deeplab", model)
    assert list(back) == list(state) and all(back[key] is state[key] for key in state)


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "fc.bias"], "torchvision-resnet"),
        (["stem.conv1.weight", "res2.0.conv1.norm.weight"], "detectron2-resnet"),
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"], "convnext"),
        (["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"], "timm-convnext"),
        (["encoder.stem.conv1.weight", "encoder.res2.0.conv1.norm.weight"], None),
        ([], None),
    ],
)
def test_sources_are_recognised_by_their_keys(keys, source):
    assert detect_source(keys) == source


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("layer3.1.conv2.weight"), "1 missing from the file: res4.1.conv2.weight"),
        (lambda s: s.update(extra=torch.ones(1)), "1 unknown to the model: extra"),
        (
            lambda s: s.update({"bn1.bias": torch.ones(65)}),
            "1 of another shape: stem.conv1.norm.bias (file (65,), model (64,))",
        ),
        (
            lambda s: s.update({"stem.conv1.weight": torch.ones(1)}),
            "the keys conv1.weight and stem.conv1.weight both mean",
        ),
    ],
)
def test_every_key_is_used_and_none_is_missing(resnet18, spoil, message):
    state = dict(resnet18)
    spoil(state)
    with pytest.raises(ValueError) as error:
        convert_state_dict(state, "torchvision-resnet", ResNet(18))
    assert message in str(error.value)


def test_a_wrong_source_or_depth_says_what_the_file_looks_like(resnet18):
    with pytest.raises(ValueError) as error:
        convert_state_dict(resnet18, "detectron2-resnet", ResNet(18))
    message = str(error.value)
    assert "(122 keys, read as 'detectron2-resnet'" in message and "looks like 'torchvision-resnet'" in message
    with pytest.raises(ValueError, match=r"does not fit ResNet as configured \(216 keys\)"):
        convert_state_dict(resnet18, "torchvision-resnet", ResNet(34))
    with pytest.raises(ValueError, match="did you mean 'torchvision-resnet'"):
        convert_state_dict(resnet18, "torchvison-resnet", ResNet(18))
    with pytest.raises(ValueError, match="unknown published format"):
        to_official(resnet18, "pytorch")


def test_files_of_every_kind_convert_with_a_report(tmp_path, resnet18):
    old = {k: v.float() for k, v in resnet18.items() if not k.endswith(NORM[-1])}
    torch.save(old, tmp_path / "torchvision.pth")
    # As detectron2's conversion script writes it: NumPy arrays, a classifier under "stem.".
    arrays = {k: v.numpy() for k, v in convert_state_dict(old, "torchvision-resnet", ResNet(18)).items() if v.ndim}
    arrays["stem.fc.weight"] = old["fc.weight"].numpy()
    (tmp_path / "R-18.pkl").write_bytes(pickle.dumps({"model": arrays, "matching_heuristics": True}))
    for name, source, dropped in (
        ("torchvision.pth", "torchvision-resnet", "fc.weight, fc.bias"),
        ("R-18.pkl", "detectron2-resnet", "stem.fc.weight"),
    ):
        report = convert_file(tmp_path / name, tmp_path / "ours.safetensors", source, ResNet(18))
        assert f"{name}: 120 tensors, 11.2 M values, from 1" in report
        assert f"dropped by rule: {dropped}; 20 absent step counters set to 0 -> " in report
        found = read_checkpoint(tmp_path / "ours.safetensors")
        assert torch.equal(found["res5.1.conv2.weight"], old["layer4.1.conv2.weight"])


def test_a_file_that_does_not_fit_is_named_and_writes_nothing(tmp_path, resnet18):
    write_checkpoint({"state_dict": resnet18}, tmp_path / "r18.pth")
    with pytest.raises(ValueError, match=r"^.*r18\.pth: the file \(122 keys") as error:
        convert_file(tmp_path / "r18.pth", tmp_path / "ours.pth", "torchvision-resnet", ResNet(50))
    assert str(error.value).count("r18.pth") == 1 and not (tmp_path / "ours.pth").exists()


def _pretrained(path):
    config = dict(type="ResNet", depth=18, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    return MODELS.build(config)


@pytest.mark.parametrize("scope", [None, "densepred", "mmengine"])
def test_init_cfg_reads_official_files(tmp_path, resnet18, scope):
    torch.save({k: v.float() for k, v in resnet18.items()}, tmp_path / "r18.pth")
    encoder = _pretrained(tmp_path / "r18.pth")
    model = Whole(encoder)
    with DefaultScope.overwrite_default_scope(scope):
        encoder.init_weights()
    assert torch.equal(model.encoder.res2[0].conv1.weight, resnet18["layer1.0.conv1.weight"].float())


def test_init_cfg_stops_at_a_file_that_does_not_fit(tmp_path, resnet18):
    torch.save({k: v for k, v in resnet18.items() if k != "bn1.bias"}, tmp_path / "r18.pth")
    with pytest.raises(
        ValueError, match=r"r18\.pth: the file (?s:.)*1 missing from the file: stem\.conv1\.norm\.bias\n"
    ):
        _pretrained(tmp_path / "r18.pth").init_weights()
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        _pretrained(tmp_path / "none.pth").init_weights()


def test_our_own_files_load_into_segmentor_and_encoder(tmp_path):
    trained, path = Whole(ResNet(18)), tmp_path / "iter_9.pth"
    write_checkpoint({"state_dict": trained.state_dict()}, path)
    for model in (Whole(ResNet(18)), ResNet(18)):
        assert "of our own" in load_weights(model, path)
        encoder = getattr(model, "encoder", model)
        assert torch.equal(encoder.res5[1].conv2.weight, trained.encoder.res5[1].conv2.weight)
    with pytest.raises(ValueError, match=r"iter_9\.pth: the checkpoint belongs to another architecture than Whole"):
        load_weights(Whole(ResNet(34)), path)


def test_an_encoder_file_fills_a_segmentor_s_encoder_only(tmp_path, resnet18):
    torch.save({"state_dict": resnet18}, tmp_path / "r18.pth")
    model = Whole(ResNet(18))
    head = model.head.weight.clone()
    load_weights(model, tmp_path / "r18.pth")
    assert torch.equal(model.encoder.stem.conv1.weight, resnet18["conv1.weight"].float())
    assert torch.equal(model.head.weight, head)
