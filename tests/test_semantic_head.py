"""The semantic head: its outputs, losses by name, labels that are no class, prediction against brute force."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.heads import SemanticHead
from densepred.ops import linear_resize
from densepred.registry import MODELS
from densepred.structures import Features, SegSample

CLASSES = 4
WIDTHS = dict(in_channels=6, level_channels=[], encoder_channels=[3, 5, 7])


def make_head(**options) -> SemanticHead:
    return MODELS.build(dict(type="SemanticHead", **{**WIDTHS, "num_classes": CLASSES, **options})).double().eval()


def make_features(deep: int = 0, embedding: bool = False) -> Features:
    torch.manual_seed(0)
    size, options = (5, 8), dict(dtype=torch.float64)
    return Features(
        pixels=torch.randn(2, 6, *size, **options),
        levels=[],
        encoder=[torch.randn(2, c, 8 - i, 9 - i, **options) for i, c in enumerate((3, 5, 7))],
        deep=[torch.randn(2, 6, *size, **options) for _ in range(deep)],
        embedding=torch.randn(2, 4, *size, **options) if embedding else None,
    )


def make_samples(labels: Tensor) -> list[SegSample]:
    return [SegSample(metainfo=dict(img_path=f"{i}.png"), gt_semantic=x) for i, x in enumerate(labels)]


def make_labels() -> Tensor:
    labels = torch.randint(0, CLASSES, (2, 17, 31), generator=torch.Generator().manual_seed(1))
    labels[:, :3] = 255
    return labels


def metas(pad_shape: tuple, img_shape: tuple, ori_shape: tuple) -> list[dict]:
    return [dict(pad_shape=pad_shape, img_shape=img_shape, ori_shape=ori_shape)] * 2


# Outputs --------------------------------------------------------------------------------------------------------------


def test_classifier_starts_small_and_names_are_the_agreed_ones():
    head = make_head(in_channels=64, num_classes=50, auxiliary=dict(channels=8), deep_channels=[6], kernel_size=3)
    assert head.classifier.weight.shape == (50, 64, 3, 3)
    assert (
        float(head.classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.05) and not head.classifier.bias.any()
    )
    names = {name.rsplit(".", 1)[0] for name in head.state_dict()}
    auxiliary = {"auxiliary.conv.conv", "auxiliary.conv.bn", "auxiliary.classifier"}
    assert names == {"classifier", "deep_classifiers.0"} | auxiliary
    assert "auxiliary.conv.conv.bias" not in head.state_dict()
    assert "auxiliary.conv.conv.bias" in make_head(auxiliary=dict(bias=True)).state_dict()
    assert "classifier.bias" not in make_head(bias=False).state_dict()


def test_auxiliary_head_is_conv_norm_leaky_relu_classifier_on_one_map_of_the_encoder():
    head, features = make_head(auxiliary=dict(index=1, channels=8, bias=True, negative_slope=0.01)), make_features()
    state = {name.removeprefix("auxiliary."): value for name, value in head.state_dict().items()}
    x = F.conv2d(features.encoder[1], state["conv.conv.weight"], state["conv.conv.bias"], padding=1)
    norm = [state[f"conv.bn.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    x = F.leaky_relu(F.batch_norm(x, *norm), 0.01)
    expected = F.conv2d(x, state["classifier.weight"], state["classifier.bias"])
    assert torch.allclose(head(features)["aux_logits"], expected)
    assert set(head(features, deep_supervision=False)) == {"sem_logits"}


def test_pruned_networks_take_the_classifier_of_their_last_map():
    head = make_head(deep_channels=[6, 6])
    full = make_features(deep=2)
    outputs = head(full)
    for depth in range(3):
        maps = [*full.deep, full.pixels]
        pruned = head(Features(maps[depth], [], full.encoder, deep=maps[:depth]))
        assert torch.equal(pruned["sem_logits"], [*outputs["deep_logits"], outputs["sem_logits"]][depth])
        assert len(pruned.get("deep_logits", [])) == depth


def test_dropout_zeroes_channels_in_training_only():
    head, features = make_head(dropout=0.5).train(), make_features()
    seen = []
    head.classifier.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    head(features)
    dropped = seen[0].abs().amax((2, 3)) == 0
    assert dropped.any() and not dropped.all()
    assert torch.equal(seen[0][~dropped], 2 * features.pixels[~dropped])
    assert torch.equal(head.eval()(features)["sem_logits"], head.classifier(features.pixels))


def test_binary_head_has_one_channel_and_two_logits():
    head, features = make_head(num_classes=2, binary=True, auxiliary={}), make_features()
    outputs = head(features)
    z = head.classifier(features.pixels)
    assert z.shape[1] == 1 and outputs["aux_logits"].shape[1] == 2
    assert torch.allclose(outputs["sem_logits"].softmax(1)[:, 1:], z.sigmoid())
    found = head.predict(outputs, metas((5, 8), (5, 8), (5, 8)))
    assert torch.equal(torch.stack([x["pred_semantic"] for x in found]), (z[:, 0] > 0).long())


# Losses ---------------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.interpolate(logits, labels.shape[1:], mode="bilinear"), labels, ignore_index=255)


def test_losses_by_name_and_weight():
    head = make_head(
        deep_channels=[6, 6],
        deep_weights=[0.25, 0.5],
        losses=[dict(type="CrossEntropyLoss", loss_weight=2.0), dict(type="DiceLoss"), dict(type="CrossEntropyLoss")],
        auxiliary=dict(weight=0.3),
    )
    features, labels = make_features(deep=2), make_labels()
    outputs = head(features)
    found = head.loss(outputs, make_samples(labels))
    names = {f"{prefix}loss_{name}" for prefix in ("", "deep0_", "deep1_") for name in ("ce", "dice")}
    assert set(found) == names | {"aux_loss_ce", "acc_seg"}
    expected = {
        "loss_ce": 3 * cross_entropy(outputs["sem_logits"], labels),  # two of one name are added
        "deep0_loss_ce": 0.25 * 3 * cross_entropy(outputs["deep_logits"][0], labels),
        "deep1_loss_ce": 0.5 * 3 * cross_entropy(outputs["deep_logits"][1], labels),
        "aux_loss_ce": 0.3 * cross_entropy(outputs["aux_logits"], labels),  # plain whatever the main losses are
    }
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-7), name
    large = F.interpolate(outputs["sem_logits"], labels.shape[1:], mode="bilinear")
    right = (large.argmax(1) == labels)[labels != 255].double().mean()
    assert float(found["acc_seg"]) == pytest.approx(100 * float(right), abs=1e-4)


def test_every_parameter_learns():
    head = make_head(
        deep_channels=[6],
        auxiliary=dict(losses=[dict(type="DiceLoss")]),
        embedding_loss=dict(type="CategoryConsistentLoss"),
    ).train()
    features = make_features(deep=1, embedding=True)
    features.embedding.requires_grad_()
    found = head.loss(head(features), make_samples(make_labels()))
    assert {"loss_embedding_var", "loss_embedding_dis", "loss_embedding_reg", "aux_loss_dice"} <= set(found)
    sum(value for name, value in found.items() if "loss" in name).backward()
    for name, parameter in [*head.named_parameters(), ("embedding", features.embedding)]:
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_all_ignored_crops_train_nothing_and_break_nothing():
    head = make_head(deep_channels=[6], auxiliary={}, losses=[dict(type="OHEMCrossEntropyLoss"), dict(type="DiceLoss")])
    found = head.loss(head(make_features(deep=1)), make_samples(torch.full((2, 17, 31), 255)))
    assert all(value == 0 for value in found.values())
    sum(value for name, value in found.items() if "loss" in name).backward()
    assert all(not p.grad.any() for p in head.parameters())


def test_half_precision_learns_in_full():
    head, labels = make_head(), make_labels()
    outputs = head(make_features())
    single = head.loss(dict(sem_logits=outputs["sem_logits"].bfloat16().float()), make_samples(labels))["loss_ce"]
    half = head.loss(dict(sem_logits=outputs["sem_logits"].bfloat16()), make_samples(labels))["loss_ce"]
    assert half.dtype == torch.float32 and half == single


# Input that is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(binary=True), "binary means two classes, but num_classes is 4"),
        (dict(auxiliary=dict(index=3)), r"index is 3, but the encoder has 3 maps: choose -3..2"),
        (dict(auxiliary=dict(indx=1)), "no key 'indx'; did you mean 'index'"),
        (dict(deep_channels=[6], deep_weights=[1, 2]), "deep_weights has 2 values, but the decoder has 1 deep maps"),
        (
            dict(losses=[dict(type="CrossEntropyLos")]),
            "no loss is named 'CrossEntropyLos'; did you mean 'CrossEntropyLoss'",
        ),
        (dict(losses=[dict(type="LovaszLoss", class_weight=[1.0])]), "class_weight has 1 values, but the head has 4"),
        (dict(losses=[dict(type="CategoryConsistentLoss")]), r"goes to head\.embedding_loss"),
        (dict(auxiliary=dict(losses=[dict(type="CategoryConsistentLoss")])), r"goes to head\.embedding_loss"),
    ],
)
def test_configs_that_mean_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        make_head(**options)


def test_labels_that_are_no_class_name_file_value_and_count():
    head, labels = make_head(), make_labels()
    outputs = head(make_features())
    labels[1, 5, :3] = 7
    labels[1, 6, 0] = CLASSES
    with pytest.raises(ValueError, match=r"1\.png: 4 pixels .* up to 7; num_classes is 4, so labels are 0\.\.3 or 255"):
        head.loss(outputs, make_samples(labels))
    labels[(labels > 3) & (labels != 255)] = -1
    with pytest.raises(ValueError, match=r"1\.png: 4 pixels .* up to -1"):
        head.loss(outputs, make_samples(labels))


def test_elsewhere_than_on_a_cpu_wrong_labels_are_found_a_step_late(monkeypatch):
    head, labels = make_head(), make_labels()
    outputs = head(make_features())
    wrong, ignored = labels.clone(), labels.clone()
    wrong[0, 9, 9], ignored[0, 9, 9] = 99, 255
    expected = head.loss(outputs, make_samples(ignored))["loss_ce"]
    monkeypatch.setattr("densepred.heads.semantic.ASKS_AT_ONCE", ())
    assert torch.equal(head.loss(outputs, make_samples(wrong))["loss_ce"], expected)
    copy.deepcopy(head)  # as averaged models do between steps
    with pytest.raises(ValueError, match=r"0\.png: 1 pixels have labels .* up to 99"):
        head.loss(outputs, make_samples(labels))
    assert head.loss(outputs, make_samples(labels))["loss_ce"] > 0


def test_samples_without_labels_and_models_without_embedding():
    head = make_head(embedding_loss=dict(type="CategoryConsistentLoss"))
    outputs = head(make_features())
    with pytest.raises(ValueError, match=r"a\.png has no gt_semantic.*LoadSemantic"):
        head.loss(outputs, [SegSample(metainfo=dict(img_path="a.png"))])
    with pytest.raises(ValueError, match="embedding_loss needs a decoder that returns an embedding"):
        head.loss(outputs, make_samples(make_labels()))


# Prediction -----------------------------------------------------------------------------------------------------------


def brute_force(logits: Tensor, meta: dict, align_corners: bool) -> Tensor:
    height, width = meta["img_shape"]
    x = F.interpolate(logits, meta["pad_shape"], mode="bilinear", align_corners=align_corners)[..., :height, :width]
    return F.interpolate(x, meta["ori_shape"], mode="bilinear", align_corners=align_corners).argmax(1)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("band_bytes", [1, 3000, 1 << 24])
@pytest.mark.parametrize(
    "pad_shape,img_shape,ori_shape",
    [
        ((20, 32), (19, 27), (43, 58)),
        ((20, 32), (20, 32), (20, 32)),
        ((20, 32), (17, 31), (17, 31)),
        ((5, 8), (5, 7), (3, 40)),
        ((33, 47), (33, 1), (1, 9)),
        ((4, 5), (4, 5), (1, 1)),
    ],
)
def test_prediction_is_two_resizes_and_an_arg_max(
    monkeypatch, align_corners, band_bytes, pad_shape, img_shape, ori_shape
):
    monkeypatch.setattr(linear_resize, "CPU_BAND_BYTES", band_bytes)
    head = make_head(align_corners=align_corners)
    logits = torch.randn(2, CLASSES, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = head.predict(dict(sem_logits=logits), metas(pad_shape, img_shape, ori_shape))
    expected = brute_force(logits, metas(pad_shape, img_shape, ori_shape)[0], align_corners)
    for image, wanted in zip(found, expected, strict=True):
        assert image["pred_semantic"].dtype == torch.int64
        assert torch.equal(image["pred_semantic"], wanted)


@pytest.mark.parametrize("binary", [False, True])
def test_deep_supervision_averages_probabilities(binary):
    options = dict(num_classes=2, binary=True) if binary else {}
    head, features = make_head(deep_channels=[6, 6], average_deep=True, **options), make_features(deep=2)
    torch.nn.init.normal_(head.classifier.weight)
    for classifier in head.deep_classifiers:
        torch.nn.init.normal_(classifier.weight)
    outputs = head(features, deep_supervision=False)
    probs = torch.stack([x.softmax(1) for x in (*outputs["deep_logits"], outputs["sem_logits"])]).mean(0)
    assert torch.allclose(head.class_logits(outputs, (5, 8)).exp(), probs)
    larger = F.interpolate(probs.log(), (11, 9), mode="bilinear")
    assert torch.allclose(head.class_logits(outputs, (11, 9)), larger)
    labels = torch.stack([x["pred_semantic"] for x in head.predict(outputs, metas((5, 8), (5, 8), (5, 8)))])
    assert torch.equal(labels, probs.argmax(1))
    assert not torch.equal(labels, outputs["sem_logits"].argmax(1))
    final = dict(sem_logits=head.class_logits(outputs, (11, 9)))  # what sliding windows hand back
    assert torch.equal(head.class_logits(final, (11, 9)), final["sem_logits"])


def test_without_averaging_the_last_classifier_decides():
    head, features = make_head(deep_channels=[6]), make_features(deep=1)
    outputs = head(features, deep_supervision=False)
    assert set(outputs) == {"sem_logits"}
    assert torch.equal(head.class_logits(outputs, (5, 8)), outputs["sem_logits"])
