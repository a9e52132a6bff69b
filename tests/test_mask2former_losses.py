"""The criterion of Mask2Former against the official numbers, a plain re-creation, and at the borders of its inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from densepred.losses import mask2former
from densepred.losses.mask2former import Mask2FormerCriterion
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "mask2former_r50_losses")
SETS = META["config"]["sets"]
C = META["config"]["num_classes"]
Q = META["input"]["pred_logits"]["shape"][1]
WEIGHTS = dict(class_weight=2.0, mask_weight=5.0, dice_weight=5.0)


# A plain re-creation: a loop over sets and images, `grid_sample` on NCHW floats ---------------------------------------


def sample(masks, points):
    """Sample (M, h, w) at (M, P, 2)."""
    return F.grid_sample(masks[:, None], 2 * points[:, :, None] - 1, align_corners=False)[:, 0, :, 0]


def oracle_cost(logits, masks, labels, targets, points):
    """Costs (Q, N) of one image: class, cross entropy, dice."""
    points = points[None]
    x = sample(masks, points.expand(len(masks), -1, -1))
    y = sample(targets.to(x.dtype), points.expand(len(targets), -1, -1))
    positive = F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none")
    negative = F.binary_cross_entropy_with_logits(x, torch.zeros_like(x), reduction="none")
    bce = (positive @ y.T + negative @ (1 - y).T) / x.shape[1]
    s = x.sigmoid()
    dice = 1 - (2 * s @ y.T + 1) / (s.sum(1)[:, None] + y.sum(1) + 1)
    return -logits.softmax(-1)[:, labels], bce, dice


def oracle_set(output, targets, points, number, num_points, num_classes):
    """Unweighted terms of one set, and its pairs (image, query, target), queries ascending within an image."""
    logits, masks = output["pred_logits"], output["pred_masks"]
    shared = points("matching", number, (len(targets), num_points, 2))
    pairs = []
    with torch.no_grad():
        for b, target in enumerate(targets):
            c = oracle_cost(logits[b], masks[b], target["labels"], target["masks"], shared[b])
            cost = 2 * c[0] + 5 * c[1] + 5 * c[2]
            pairs += [(b, q, t) for q, t in zip(*linear_sum_assignment(cost.numpy()), strict=True)]
    pairs = torch.tensor(np.array(pairs, dtype=np.int64).reshape(-1, 3))
    image, query, target = pairs.T
    labels = torch.full(logits.shape[:2], num_classes)
    for b, q, t in pairs.tolist():
        labels[b, q] = targets[b]["labels"][t]
    weight = torch.ones(num_classes + 1, dtype=logits.dtype)
    weight[-1] = 0.1
    ce = F.cross_entropy(logits.transpose(1, 2), labels, weight)

    x = masks[image, query]
    y = torch.stack([targets[b]["masks"][t] for b, _, t in pairs.tolist()]).to(x.dtype)
    with torch.no_grad():
        candidates = points("candidates", number, (len(pairs), 3 * num_points, 2))
        index = (-sample(x, candidates).abs()).topk(num_points * 3 // 4, dim=1).indices
        kept = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        chosen = torch.cat([kept, points("random", number, (len(pairs), num_points // 4, 2))], 1)
        y = sample(y, chosen)
    x = sample(x, chosen)
    count = max(1, sum(len(t["labels"]) for t in targets))
    s = x.sigmoid()
    dice = 1 - (2 * (s * y).sum(1) + 1) / (s.sum(1) + y.sum(1) + 1)
    bce = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1)
    return (ce, bce.sum() / count, dice.sum() / count), pairs


def oracle(outputs, targets, points, num_points=12544, num_classes=C):
    losses = {}
    for s, output in enumerate([outputs, *outputs["aux_outputs"]]):
        suffix = f"_{s - 1}" if s else ""
        (ce, mask, dice), _ = oracle_set(output, targets, points, s, num_points, num_classes)
        losses |= {"loss_ce" + suffix: 2 * ce, "loss_mask" + suffix: 5 * mask, "loss_dice" + suffix: 5 * dice}
    return losses


# Parity ---------------------------------------------------------------------------------------------------------------


def case_outputs():
    """The case's sets, the last layer first, as leaves of the gradients."""
    shapes = {name: META["input"][name]["shape"] for name in ("pred_logits", "pred_masks")}
    sets = [
        dict(
            pred_logits=torch.from_numpy(2 * parity.normal_input(500 + 2 * s, shapes["pred_logits"])).requires_grad_(),
            pred_masks=torch.from_numpy(3 * parity.normal_input(501 + 2 * s, shapes["pred_masks"])).requires_grad_(),
        )
        for s in range(SETS)
    ]
    return sets[0] | dict(aux_outputs=sets[1:])


def case_targets():
    targets = []
    for image in META["input"]["targets"]:
        masks = torch.zeros(len(image["labels"]), *META["input"]["target_size"], dtype=torch.bool)
        for mask, (y0, x0, y1, x1) in zip(masks, image["rects_y0_x0_y1_x1"], strict=True):
            mask[y0:y1, x0:x1] = True
        targets.append(dict(labels=torch.tensor(image["labels"], dtype=torch.int64), masks=masks))
    return targets


def uniform(seed, shape):
    return torch.from_numpy(np.random.RandomState(seed).random_sample(shape))


def case_points(name, number, shape):
    """The case's points. Its rows run by (image, query), ours by (image, target)."""
    seed = 20000 + 100 * number
    if name == "matching":
        return torch.cat([uniform(seed + image, (1, *shape[1:])) for image in range(shape[0])])
    image, _, target = expected_match(number).T
    return uniform(seed + dict(candidates=50, random=51)[name], shape)[np.lexsort((target, image))]


def expected_match(number):
    return EXPECTED["match_last" if number == 0 else f"match_aux{number - 1}"]


@pytest.fixture(scope="module")
def case():
    outputs = case_outputs()
    losses = Mask2FormerCriterion(C)(outputs, case_targets(), case_points)
    sum(losses.values()).backward()
    return outputs, losses


def test_losses_of_the_case(case):
    _, losses = case
    assert {"total", *losses} == {"total"} | {name for name in EXPECTED if name.startswith("loss_")}
    weights = META["config"]["weights"]
    for name, loss in losses.items():
        unweighted = loss.item() / weights["_".join(name.split("_")[:2])]
        assert abs(unweighted - EXPECTED[name].item()) < 1e-11, name
    assert abs(sum(losses.values()).item() - EXPECTED["total"].item()) < 1e-10


def test_gradients_of_the_case(case):
    outputs, _ = case
    aux = outputs["aux_outputs"][4]
    found = dict(
        grad_last_logits=outputs["pred_logits"].grad,
        grad_last_masks=outputs["pred_masks"].grad,
        grad_last_masks_matched=outputs["pred_masks"].grad[0, expected_match(0)[:5, 1]],
        grad_aux4_logits=aux["pred_logits"].grad,
    )
    for name, grad in found.items():
        expected = EXPECTED[name]
        thinned = parity.thin(grad.numpy(), META["outputs"][name])
        assert np.abs(expected).max() > 1e-4 and np.abs(thinned - expected).max() < 1e-12, name


def test_matching_costs_of_the_case():
    outputs, targets = case_outputs(), case_targets()
    for image, target in enumerate(targets[:2]):
        points = case_points("matching", 0, (2, 12544, 2))[image]
        masks = outputs["pred_masks"].detach()[image]
        bce, dice = (cost[0] for cost in mask2former.image_mask_costs([masks], target["masks"], points[None]))
        classes = mask2former.class_cost(outputs["pred_logits"].detach()[image], target["labels"])
        found = dict(cost_mask=bce, cost_dice=dice, cost_class=classes, cost=5 * bce + 5 * dice + 2 * classes)
        for name, cost in found.items():
            assert np.abs(cost.numpy() - EXPECTED[f"{name}_{image}"]).max() < 1e-12, name


def test_assignments_of_the_case():
    outputs, targets = case_outputs(), case_targets()
    sets = [outputs, *outputs["aux_outputs"]]
    logits = torch.stack([output["pred_logits"] for output in sets]).detach()
    rows = Mask2FormerCriterion(C)._match(logits, sets, targets, case_points)
    first = torch.tensor([0] * 5 + [5])  # of the image's targets
    for s, row in enumerate(rows):
        found = torch.stack([row // Q, row % Q, torch.arange(6) - first], 1)[row.argsort()]
        assert found.tolist() == expected_match(s).tolist(), s
