"""The semantic losses: mmsegmentation's, CCNet's and UNet++'s numbers, other implementations, the borders of the inputs."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.heads import SemanticHead
from densepred.losses.boundary import signed_distances
from densepred.losses.ohem import kept_below, kept_largest, zoomed_threshold
from densepred.losses.semantic import (
    EPSILON,
    binary_cross_entropy_map,
    cross_entropy,
    cross_entropy_map,
    dice_loss,
    focal_map,
    lovasz_hinge,
    mean_over_entries,
    one_hot,
)
from densepred.registry import MODELS
from densepred.structures import SegSample
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "mmseg_losses")
RUNS = META["config"]["runs"]
C = META["config"]["num_classes"]
EVERY_LOSS = {
    "ce": dict(type="CrossEntropyLoss"),
    "ce_weights": dict(type="CrossEntropyLoss", class_weight=[1.0, 2.0, 3.0, 4.0, 5.0]),
    "ce_all": dict(type="CrossEntropyLoss", average="all"),
    "bce": dict(type="CrossEntropyLoss", sigmoid=True),
    "dice": dict(type="DiceLoss"),
    "dice_squared": dict(type="DiceLoss", sigmoid=True, batch=False, per_class=False, squared=True, smooth=1e-3),
    "lovasz": dict(type="LovaszLoss"),
    "lovasz_all": dict(type="LovaszLoss", classes="all", per_image=True),
    "focal": dict(type="FocalLoss"),
    "focal_softmax": dict(type="FocalLoss", sigmoid=False),
    "ohem": dict(type="OHEMCrossEntropyLoss"),
    "ohem_pidnet": dict(type="OHEMCrossEntropyLoss", variant="pidnet", class_weight=[1.0, 2.0, 3.0, 4.0, 5.0]),
    "ohem_mmseg": dict(type="OHEMCrossEntropyLoss", variant="mmseg"),
    "ohem_topk": dict(type="OHEMCrossEntropyLoss", variant="mmseg", thresh=None, average="valid"),
    "boundary": dict(type="BoundaryLoss"),
}


def recipe_input(name: str) -> Tensor:
    recipe = META["input"][name]
    return torch.from_numpy(recipe["mul"] * parity.normal_input(recipe["seed"], recipe["shape"]))


def labels_of(name: str) -> Tensor:
    if name in EXPECTED:
        return torch.from_numpy(EXPECTED[name]).long()
    labels = labels_of("labels")
    if name == "labels_no4":
        return torch.where(labels == 4, 1, labels)
    return torch.where(labels == 255, 255, (labels == 1).long())  # labels_binary


def reduced(losses: Tensor, spec: dict, call: dict) -> Tensor:
    """The reductions that only tests ask for."""
    if "avg_factor" in call:
        return losses.sum() / (call["avg_factor"] + EPSILON)
    return losses.sum() if spec.get("reduction") == "sum" else losses


def published_cross_entropy(spec: dict, call: dict, logits: Tensor, labels: Tensor) -> Tensor:
    weights, average = spec.get("class_weight"), "valid" if spec.get("avg_non_ignore") else "all"
    if spec.get("use_sigmoid"):
        losses = binary_cross_entropy_map(logits, labels, weights and weights * C)
        return mean_over_entries(losses, labels, average)
    if "reduction" in spec or call.keys() & {"reduction_override", "avg_factor"}:
        return reduced(cross_entropy_map(logits, labels, weights), spec, call)
    pixels = torch.from_numpy(np.random.RandomState(7153).random_sample(labels.shape)) if "weight" in call else None
    return cross_entropy(logits, labels, weights, pixels, average, call["ignore_index"])


def published_dice(spec: dict, call: dict, logits: Tensor, labels: Tensor) -> Tensor:
    probs = logits.sigmoid() if spec.get("use_sigmoid", True) else logits.softmax(1)
    first = 1 if spec.get("ignore_index") == 0 else 0
    naive = spec.get("naive_dice", False)
    # Ignored pixels count as predictions there.
    losses = dice_loss(
        probs[:, first:], one_hot(labels, C, logits)[:, first:], False, False, not naive, spec.get("eps", 1e-3)
    )[:, 0]
    return losses if spec.get("reduction") == "none" else losses.mean()


def published_lovasz(spec: dict, call: dict, logits: Tensor, labels: Tensor) -> Tensor:
    if spec.get("loss_type") == "binary":
        return lovasz_hinge(logits, labels)
    ours = {key: spec[key] for key in ("classes", "class_weight", "per_image") if key in spec}
    return MODELS.build(dict(type="LovaszLoss", **ours))(logits, labels)


def published_focal(spec: dict, call: dict, logits: Tensor, labels: Tensor) -> Tensor:
    if "reduction" in spec or "avg_factor" in call:
        weights = torch.tensor(spec.get("class_weight", [1.0] * C), dtype=torch.float64).view(-1, 1, 1)
        losses = focal_map(logits, labels, 2.0, 0.5) * weights
        return reduced(losses, spec, call)
    ours = {key: spec[key] for key in ("gamma", "alpha") if key in spec}
    return MODELS.build(dict(type="FocalLoss", average="all", **ours))(logits, labels)


def published_pidnet(spec: dict, call: dict, logits: Tensor, labels: Tensor) -> Tensor:
    ours = dict(
        variant="pidnet", thresh=spec["thres"], min_kept=spec["min_kept"], class_weight=spec.get("class_weight")
    )
    return MODELS.build(dict(type="OHEMCrossEntropyLoss", **ours))(logits, labels)


PUBLISHED = {
    "CrossEntropyLoss": published_cross_entropy,
    "DiceLoss": published_dice,
    "LovaszLoss": published_lovasz,
    "FocalLoss": published_focal,
    "OhemCrossEntropy": published_pidnet,
}


def check(found: Tensor, name: str) -> None:
    np.testing.assert_allclose(found.detach().numpy(), EXPECTED[name], rtol=0, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if "loss" in run])
def test_parity_with_mmsegmentation(name):
    run = RUNS[name]
    logits = recipe_input("logits")
    logits = (logits[:, 0] if name == "lovasz_hinge" else logits).requires_grad_()
    spec = run["loss"]
    value = spec.get("loss_weight", 1.0) * PUBLISHED[spec["type"]](spec, run["call"], logits, labels_of(run["labels"]))
    check(value, name)
    check(torch.autograd.grad(value.sum(), logits)[0], f"{name}_grad")


def our_head_losses(run: dict) -> list[dict]:
    """mmsegmentation's losses and sampler as our configs."""
    given = run["loss_decode"] if isinstance(run["loss_decode"], list) else [run["loss_decode"]]
    sampler = dict(run["sampler"] or {}, type="OHEMCrossEntropyLoss", variant="mmseg", name="ce")
    sampler.setdefault("thresh", None)
    dice = dict(sigmoid=True, batch=False, per_class=False, squared=True, smooth=1e-3)
    losses = []
    for spec in given:
        average = "valid" if spec.get("avg_non_ignore") else "all"
        if spec["type"] == "CrossEntropyLoss":
            losses.append(dict(sampler if run["sampler"] else dict(type="CrossEntropyLoss"), average=average))
        elif spec["type"] == "DiceLoss":
            losses.append(dict(type="DiceLoss", loss_weight=spec["loss_weight"], **dice))
        else:
            losses.append(dict(type="LovaszLoss"))
    return losses


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if "head" in run])
def test_parity_with_mmsegmentations_heads(name):
    run, logits = RUNS[name]["head"], recipe_input("low_logits").requires_grad_()
    losses = our_head_losses(run)
    if name == "head_ce_dice":  # there ignored pixels count in Dice as predictions
        labels = labels_of("labels")
        large = F.interpolate(logits, labels.shape[1:], mode="bilinear")
        dice = 3 * dice_loss(large.sigmoid(), one_hot(labels, C, large), False, False, True, 1e-3).mean()
        check(dice, "head_ce_dice_loss_dice")
        losses = losses[:1]
    head = SemanticHead(8, [], [8], C, losses=losses, align_corners=run["align_corners"])
    samples = [SegSample(metainfo=dict(img_path="a.png"), gt_semantic=x) for x in labels_of(RUNS[name]["labels"])]
    found = head.loss(dict(sem_logits=logits), samples)
    for key, value in found.items():
        if key == "acc_seg":
            assert abs(float(value) - EXPECTED[f"{name}_acc_seg"].item()) < 1e-4
        else:
            check(value, f"{name}_{key}")
    total = sum(value for key, value in found.items() if "loss" in key)
    total = total + dice if name == "head_ce_dice" else total
    check(torch.autograd.grad(total, logits)[0], f"{name}_grad")


@pytest.mark.parametrize("name", [name for name in EXPECTED if name.endswith("_weights")])
def test_parity_of_the_sampled_pixels(name):
    run = RUNS[name.removesuffix("_weights")]
    labels, sampler = labels_of(run["labels"]), run["head"]["sampler"]
    logits = F.interpolate(recipe_input("low_logits"), labels.shape[1:], mode="bilinear")
    losses, count = cross_entropy_map(logits, labels), sampler["min_kept"] * len(labels)
    if "thresh" in sampler:
        kept = kept_below((-losses).exp(), labels, sampler["thresh"], count)
    else:
        kept = kept_largest(losses, labels, count)
    assert torch.equal(kept.double(), torch.from_numpy(EXPECTED[name]).double())


def test_class_weights_with_ignored_pixels_divide_by_the_weights_of_valid_labels():
    logits, labels = recipe_input("logits"), labels_of("labels")
    weights = META["config"]["class_weight"]
    expected = F.cross_entropy(logits, labels, torch.tensor(weights).double(), ignore_index=255)
    for average in ("valid", "all"):
        assert torch.allclose(cross_entropy(logits, labels, weights, average=average), expected, rtol=1e-8)


# CCNet's OHEM ---------------------------------------------------------------------------------------------------------


def scipy_threshold(logits: Tensor, labels: Tensor, thresh: float, min_kept: int) -> float:
    probs = scipy.ndimage.zoom(logits.softmax(1).numpy(), (1, 1, 1 / 8, 1 / 8), order=1)
    small = scipy.ndimage.zoom(labels.numpy(), (1, 1 / 8, 1 / 8), order=0).ravel()
    valid, k = small != 255, min_kept // 64
    if k >= valid.sum():
        return 1.0
    true = np.moveaxis(probs, 1, 0).reshape(probs.shape[1], -1)[small[valid], np.flatnonzero(valid)]
    return max(thresh, np.sort(true)[k - 1]) if k else thresh


@pytest.mark.parametrize("size", [(64, 97), (63, 50), (109, 480), (8, 13), (12, 5), (5, 5)])
@pytest.mark.parametrize("thresh,min_kept", [(0.7, 100000), (0.05, 2000), (0.02, 700), (0.3, 0)])
def test_ccnets_threshold_is_scipys(size, thresh, min_kept):
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(2, 6, *size, dtype=torch.float64), torch.randint(0, 6, (2, *size))
    labels[torch.rand(labels.shape) < 0.3] = 255
    expected = scipy_threshold(logits, labels, thresh, min_kept)
    assert abs(float(zoomed_threshold(logits, labels, thresh, min_kept)) - expected) < 1e-12


def test_parity_with_ccnets_losses():
    meta, expected = parity.case(parity.CASES / "ccnet_r101_cityscapes")
    recipe = meta["input"]["labels"]
    labels = np.random.RandomState(recipe["seed"]).randint(0, 19, recipe["shape"])
    labels[np.random.RandomState(recipe["seed"] + 1).random_sample(recipe["shape"]) < 0.1] = 255
    labels = torch.from_numpy(labels).long()
    main, aux = (
        F.interpolate(torch.from_numpy(expected[name]), labels.shape[1:], mode="bilinear", align_corners=True)
        for name in ("logits", "aux_logits")
    )
    rest = 0.4 * cross_entropy(aux, labels)
    found = {"loss_dsn": cross_entropy(main, labels)}
    for name, thresh, min_kept in (("default", 0.7, 100000), ("small", 0.3, 4000), ("kth", 1e-12, 12000)):
        loss = MODELS.build(dict(type="OHEMCrossEntropyLoss", thresh=thresh, min_kept=min_kept))
        found[f"loss_ohem_{name}"] = loss(main, labels)
    for name, value in found.items():
        assert abs(float(value + rest) - float(expected[name])) < 1e-8, name


# UNet++'s losses ------------------------------------------------------------------------------------------------------


def test_parity_with_the_keras_loss_of_unetpp():
    meta, expected = parity.case(parity.CASES / "unetpp_keras_original")
    target = meta["input"]["target"]
    labels = torch.from_numpy(parity.normal_input(target["seed"], target["shape"]) > 0.5).long()[:, 0]
    losses = [
        MODELS.build(dict(type="CrossEntropyLoss", loss_weight=0.5)),
        MODELS.build(dict(type="DiceLoss", smooth=1.0, include_background=False)),
    ]
    for j in range(1, 5):
        z = torch.from_numpy(expected[f"output_{j}"]).logit()
        logits = torch.cat([torch.zeros_like(z), z], 1)
        value = sum(loss(logits, labels) for loss in losses) - 1  # theirs is minus Dice
        assert (
            abs(float(value) - float(expected[f"bce_dice_{j}"])) < 1e-7
        )  # their cross entropy is exact to float32 only


@pytest.mark.parametrize("batch", [True, False])
def test_dice_is_nnunets(batch):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 9, 7, dtype=torch.float64), torch.randint(0, 3, (2, 9, 7))
    probs, targets = logits.softmax(1), F.one_hot(labels, 3).movedim(-1, 1)
    axes = (0, 2, 3) if batch else (2, 3)
    tp, fp, fn = (x.sum(axes) for x in (probs * targets, probs * (1 - targets), (1 - probs) * targets))
    dice = ((2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5 + 1e-8))[..., 1:].mean()
    loss = MODELS.build(dict(type="DiceLoss", batch=batch, include_background=False))
    assert torch.allclose(loss(logits, labels), 1 - dice, atol=1e-9)


# Boundary loss --------------------------------------------------------------------------------------------------------


def test_signed_distances_are_those_to_the_nearest_pixel():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (7, 9))
    labels[rng.random(labels.shape) < 0.2] = 255
    places = np.argwhere(np.ones_like(labels))
    expected = np.zeros((4, *labels.shape))  # class 3 is absent
    for c in range(3):
        for y, x in np.argwhere(labels != 255):
            inside = labels[y, x] == c
            wanted = (labels != c) & (labels != 255) if inside else labels == c
            nearest = np.sqrt(((places[wanted.ravel()] - (y, x)) ** 2).sum(1).min())
            expected[c, y, x] = 1 - nearest if inside else nearest
    np.testing.assert_allclose(signed_distances(labels, 4), expected, atol=1e-6)


def test_boundary_loss_grows_with_the_distance_of_a_mistake():
    labels = torch.zeros(1, 9, 9, dtype=torch.int64)
    labels[:, :3] = 1
    loss = MODELS.build(dict(type="BoundaryLoss", include_background=False, loss_weight=1.0))

    def predicted(rows: list[int]) -> float:
        logits = torch.zeros(1, 2, 9, 9)
        logits[:, 0] = 30
        logits[:, 1, rows] = 60
        return float(loss(logits, labels))

    assert predicted([0, 1, 2]) < predicted([2]) < predicted([2, 3]) < predicted([2, 7])
    assert predicted([7]) == pytest.approx(5 * 9 / 81)  # five pixels away, in nine of 81 pixels
    assert not signed_distances(np.zeros((3, 3), np.int64), 2).any()  # no boundary


# Borders of the inputs ------------------------------------------------------------------------------------------------


@pytest.fixture(params=EVERY_LOSS)
def loss(request):
    return MODELS.build(EVERY_LOSS[request.param])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ignored_is_zero_with_zero_gradients(loss, dtype):
    logits = torch.randn(2, C, 9, 11, dtype=dtype, requires_grad=True)
    value = loss(logits, torch.full((2, 9, 11), 255))
    assert value == 0 and value.dtype == torch.float32
    assert torch.equal(torch.autograd.grad(value, logits)[0], torch.zeros_like(logits))


def test_one_valid_pixel_has_finite_gradients_there_only(loss):
    logits = (5 * torch.randn(2, C, 16, 8)).requires_grad_()
    labels = torch.full((2, 16, 8), 255)
    labels[1, 2, 3] = 4
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all()
    gradient[1, :, 2, 3] = 0
    assert not gradient.any()


def test_ignored_pixels_and_padding_of_the_logits_change_nothing(loss):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, C, 16, 24), torch.randint(0, C, (2, 16, 24))
    labels[:, 5:9] = 255
    labels[0, 0, 0] = 255
    other = torch.where((labels == 255)[:, None], 9 * torch.randn_like(logits), logits)
    assert torch.equal(loss(logits, labels), loss(other, labels))
    assert loss(logits, labels) != loss(logits.roll(1, 1), labels)


def test_a_perfect_prediction_is_best(loss):
    labels = torch.randint(0, C, (2, 16, 8))
    right = 20 * F.one_hot(labels, C).movedim(-1, 1).float() - 10
    assert loss(right, labels) < loss(0.1 * right, labels) < loss(-0.1 * right, labels)


def test_two_class_logits_give_the_sigmoid_forms():
    z, labels = torch.randn(2, 1, 6, 7, dtype=torch.float64), torch.randint(0, 2, (2, 6, 7))
    labels[0, 0] = 255
    logits = torch.cat([torch.zeros_like(z), z], 1)
    truth = torch.where(labels == 255, 255, 1 - labels)  # z as the one class that there is: label 0

    def both(type: str, softmax: dict, sigmoid: dict) -> tuple[Tensor, Tensor]:
        return MODELS.build(dict(type=type, **softmax))(logits, labels), MODELS.build(dict(type=type, **sigmoid))(
            z, truth
        )

    torch.testing.assert_close(*both("CrossEntropyLoss", {}, dict(sigmoid=True)))
    torch.testing.assert_close(*both("DiceLoss", dict(include_background=False), dict(sigmoid=True)))
    focal = dict(sigmoid=False, alpha=[0.7, 0.3])
    torch.testing.assert_close(*both("FocalLoss", focal, dict(alpha=0.3)))


def test_the_hinge_reads_the_difference_of_two_logits():
    logits, labels = torch.randn(1, 2, 6, 7), torch.randint(0, 2, (1, 6, 7))
    hinge = MODELS.build(dict(type="LovaszLoss", hinge=True))
    assert torch.equal(hinge(logits, labels), lovasz_hinge(logits[:, 1] - logits[:, 0], labels))
    with pytest.raises(ValueError, match="hinge=True needs two classes, the logits have 3"):
        hinge(torch.randn(1, 3, 6, 7), labels)


@pytest.mark.parametrize(
    "config,message",
    [
        (dict(type="CrossEntropyLoss", average="mean"), "average='mean': a semantic loss knows 'valid' and 'all'"),
        (dict(type="LovaszLoss", classes="some"), "give 'present', 'all' or a list"),
        (dict(type="FocalLoss", gamma=0.5), "gamma=0.5: give 0 or at least 1"),
        (dict(type="FocalLoss", sigmoid=False, class_weight=[1.0]), "by a list as alpha"),
        (dict(type="OHEMCrossEntropyLoss", variant="stdc"), "variant='stdc': choose one of ccnet, pidnet, mmseg"),
        (dict(type="OHEMCrossEntropyLoss", thresh=None), "variant='ccnet' needs thresh"),
        (dict(type="OHEMCrossEntropyLoss", average="mean"), "average='mean': choose"),
    ],
)
def test_configs_that_mean_nothing(config, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build(config)
