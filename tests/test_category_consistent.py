"""The category consistent loss: published formulas in numbers, a loop over pixels, its edges."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.losses.category_consistent import CategoryConsistentLoss, category_consistent_loss
from densepred.registry import MODELS
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "category_consistent_loss")
TOLERANCE = META["tolerance"]["max_abs"]


def published(name: str) -> tuple[Tensor, Tensor]:
    case = META["input"][name]
    recipe = case["labels"]
    generator = np.random.RandomState(recipe["seed"])
    labels = np.array(recipe["classes"])[generator.randint(0, len(recipe["classes"]), recipe["shape"])]
    labels[generator.random_sample(recipe["shape"]) < recipe["ignore_fraction"]] = 255
    if "then" in recipe:
        labels[labels == 9] = 255
        labels[0, 2, 3] = 9
    recipe = case["features"]
    features = parity.normal_input(recipe["seed"], recipe["shape"]) * recipe["times"]
    if "plus" in recipe:
        table = parity.normal_input(recipe["plus"]["seed"], recipe["plus"]["shape"]) * recipe["plus"]["times"]
        features = features + np.moveaxis(table[labels], -1, 1)
    return torch.from_numpy(features).requires_grad_(), torch.from_numpy(labels)


@pytest.mark.parametrize("name", META["input"])
def test_parity(name):
    features, labels = published(name)
    terms = CategoryConsistentLoss()(features, labels)
    total = sum(terms.values())
    (grad,) = torch.autograd.grad(total, features)
    found = {f"l_{key}": value for key, value in terms.items()} | dict(total=total, grad=grad)
    found["l_reg"] = found["l_reg"] / META["config"]["gamma"]
    for key, value in found.items():
        expected = torch.as_tensor(EXPECTED[f"{name}.{key}"])
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=TOLERANCE, msg=lambda m, k=key: f"{k}: {m}")


def pixel_by_pixel(features: Tensor, labels: Tensor, delta_v: float, delta_d: float) -> tuple[float, float, float]:
    vectors = features.movedim(1, -1)
    groups = {c: vectors[labels == c] for c in labels.unique().tolist() if c != 255}
    means = {c: group.mean(0) for c, group in groups.items()}

    def pull(d: float) -> float:
        if d <= delta_v:
            return 0.0
        return (d - delta_v) ** 2 if d <= delta_d else d - delta_d + (delta_d - delta_v) ** 2

    var = [np.mean([pull(float((h - means[c]).norm())) for h in group]) for c, group in groups.items()]
    dis = [max(0.0, 2 * delta_d - float((a - b).norm())) ** 2 for a, b in itertools.permutations(means.values(), 2)]
    return float(np.mean(var)), float(np.mean(dis)), float(np.mean([m.norm() for m in means.values()]))


@pytest.mark.parametrize(("delta_v", "delta_d"), [(0.5, 1.5), (2.0, 2.5), (0.0, 4.0)])
def test_equals_a_loop_over_pixels(delta_v, delta_d):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 4, 6, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 3, 254, 255])[torch.randint(0, 4, (2, 4, 6), generator=generator)]
    terms = category_consistent_loss(features, labels, delta_v, delta_d)
    assert [float(term) for term in terms] == pytest.approx(pixel_by_pixel(features, labels, delta_v, delta_d))
    weighted = CategoryConsistentLoss(delta_v, delta_d, alpha=2, beta=3, gamma=4, loss_weight=0.5)(features, labels)
    for (name, value), term, weight in zip(weighted.items(), terms, (1, 1.5, 2), strict=True):
        torch.testing.assert_close(value, weight * term, msg=name)


@pytest.mark.parametrize("labels", [[[3, 3]], [[0, 1]], [[255, 255]], [[255, 7]]])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_distances_of_zero_have_finite_gradients(labels, value):
    features = torch.full((1, 4, 1, 2), value, requires_grad=True)
    terms = category_consistent_loss(features, torch.tensor([labels]))
    (grad,) = torch.autograd.grad(sum(terms), features)
    classes = {c for c in labels[0] if c != 255}
    assert [term.item() for term in terms] == [0, 9.0 if len(classes) == 2 else 0, 2 * value if classes else 0]
    assert torch.isfinite(grad).all() and bool(grad.any()) == (bool(classes) and value > 0)


def test_ignored_pixels_may_hold_anything():
    features, labels = published("mixed")
    wild = torch.where(labels[:, None] == 255, torch.inf, features.detach()).requires_grad_()
    found, expected = (category_consistent_loss(x, labels) for x in (wild, features))
    assert [x.item() for x in found] == [x.item() for x in expected]
    assert torch.isfinite(torch.autograd.grad(sum(found), wild)[0]).all()


def test_half_precision_is_computed_in_float32():
    features, labels = published("mixed")
    low = features.detach().half()
    terms = category_consistent_loss(low, labels)
    assert all(term.dtype == torch.float32 for term in terms)
    torch.testing.assert_close(
        [t.double() for t in terms], list(category_consistent_loss(low.double(), labels)), rtol=1e-5, atol=1e-6
    )


def test_labels_are_read_at_the_centres_of_the_features():
    loss = MODELS.build(dict(type="CategoryConsistentLoss"))
    features = torch.randn(1, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    small = torch.tensor([[[0, 1, 255], [254, 1, 0]]])
    large = small.repeat_interleave(8, 1).repeat_interleave(8, 2)
    large[:, :, ::8] = 5  # off the centres
    assert loss(features, large) == loss(features, small) != loss(features, torch.zeros_like(small))
