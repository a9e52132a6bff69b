"""The criterion of Mask2Former against the official numbers, a plain re-creation, and at the borders of its inputs."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch.utils._python_dispatch import TorchDispatchMode

from densepred.losses import mask2former
from densepred.losses.mask2former import Mask2FormerCriterion
from densepred.ops import point_matching_costs
from densepred.registry import MODELS
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "mask2former_r50_losses")
SETS = META["config"]["sets"]
C = META["config"]["num_classes"]
Q = META["input"]["pred_logits"]["shape"][1]


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
    """Unweighted terms of one set. The points of a pair are those of its target's row."""
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
    counts = [len(t["labels"]) for t in targets]
    rows = target + torch.tensor([0, *counts]).cumsum(0)[image]
    labels = torch.full(logits.shape[:2], num_classes)
    for b, q, t in pairs.tolist():
        labels[b, q] = targets[b]["labels"][t]
    weight = torch.ones(num_classes + 1, dtype=logits.dtype)
    weight[-1] = 0.1
    ce = F.cross_entropy(logits.transpose(1, 2), labels, weight)

    x = masks[image, query]
    y = torch.stack([targets[b]["masks"][t] for b, _, t in pairs.tolist()]).to(x.dtype)
    with torch.no_grad():
        candidates = points("candidates", number, (sum(counts), 3 * num_points, 2))[rows]
        index = (-sample(x, candidates).abs()).topk(num_points * 3 // 4, dim=1).indices
        kept = candidates.gather(1, index[..., None].expand(-1, -1, 2))
        chosen = torch.cat([kept, points("random", number, (sum(counts), num_points // 4, 2))[rows]], 1)
        y = sample(y, chosen)
    x = sample(x, chosen)
    count = max(1, sum(counts))
    s = x.sigmoid()
    dice = 1 - (2 * (s * y).sum(1) + 1) / (s.sum(1) + y.sum(1) + 1)
    bce = F.binary_cross_entropy_with_logits(x, y, reduction="none").mean(1)
    return ce, bce.sum() / count, dice.sum() / count


def oracle(outputs, targets, points, num_points=12544, num_classes=C):
    losses = {}
    for s, output in enumerate([outputs, *outputs["aux_outputs"]]):
        suffix = f"_{s - 1}" if s else ""
        ce, mask, dice = oracle_set(output, targets, points, s, num_points, num_classes)
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
    """Outputs with their gradients, the losses, and the matching's rows."""
    outputs, rows = case_outputs(), []
    with pytest.MonkeyPatch.context() as patch:
        match = mask2former.match_sets
        patch.setattr(mask2former, "match_sets", lambda *arguments: rows.append(match(*arguments)) or rows[0])
        losses = Mask2FormerCriterion(C)(outputs, case_targets(), case_points)
    sum(losses.values()).backward()
    return outputs, losses, rows[0]


def test_losses_of_the_case(case):
    _, losses, _ = case
    assert {"total", *losses} == {"total"} | {name for name in EXPECTED if name.startswith("loss_")}
    weights = META["config"]["weights"]
    for name, loss in losses.items():
        unweighted = loss.item() / weights["_".join(name.split("_")[:2])]
        assert abs(unweighted - EXPECTED[name].item()) < 1e-11, name
    assert abs(sum(losses.values()).item() - EXPECTED["total"].item()) < 1e-10


def test_gradients_of_the_case(case):
    outputs, _, _ = case
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
        bce, dice = (cost[0] for cost in point_matching_costs([masks[None]], [target["masks"]], points[None, None]))
        logits = outputs["pred_logits"].detach()[None, image : image + 1]
        classes = mask2former.class_costs(logits, [target["labels"]])[0]
        found = dict(cost_mask=bce, cost_dice=dice, cost_class=classes, cost=5 * bce + 5 * dice + 2 * classes)
        for name, cost in found.items():
            assert np.abs(cost.T.numpy() - EXPECTED[f"{name}_{image}"]).max() < 1e-12, name


def test_assignments_of_the_case(case):
    _, _, rows = case
    first = torch.tensor([0] * 5 + [5])  # of the image's targets
    for s, row in enumerate(rows):
        found = torch.stack([row // Q, row % Q, torch.arange(6) - first], 1)[row.argsort()]
        assert found.tolist() == expected_match(s).tolist(), s


# Against the re-creation ----------------------------------------------------------------------------------------------


def small_outputs(batch=2, queries=4, classes=3, size=(6, 9), num_aux=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()

    def output():
        return dict(pred_logits=leaf(batch, queries, classes + 1), pred_masks=leaf(batch, queries, *size))

    return output() | dict(aux_outputs=[output() for _ in range(num_aux)])


def small_target(labels, size=(24, 36)):
    """One image with a rectangle for each label, all of them overlapping in the first pixels."""
    masks = torch.zeros(len(labels), *size, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[: 3 + 4 * i, : size[1] - 5 * i] = True
    return dict(labels=torch.tensor(labels, dtype=torch.int64), masks=masks)


def seeded_points(dtype):
    def points(name, number, shape):
        seed = 10 * number + ["matching", "candidates", "random"].index(name)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

    return points


def leaves_of(outputs):
    return [s[name] for s in (outputs, *outputs["aux_outputs"]) for name in ("pred_logits", "pred_masks")]


def run(loss, outputs):
    """Losses, and the gradients of their sum in the outputs."""
    losses = loss(outputs)
    return losses, torch.autograd.grad(sum(losses.values()), leaves_of(outputs))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("labels", [[[2, 0], [1]], [[], [0, 0, 1]], [[0, 1, 2, 0, 1, 2], [1]]])
def test_equals_the_plain_loop(labels, dtype, tolerance):
    targets, points = [small_target(image) for image in labels], seeded_points(dtype)
    criterion = Mask2FormerCriterion(3, num_points=300)
    outputs = small_outputs(dtype=dtype)
    losses, grads = run(lambda o: criterion(o, targets, points), outputs)
    expected, expected_grads = run(lambda o: oracle(o, targets, points, 300, 3), outputs)
    assert set(losses) == set(expected) == {f"loss_{n}{s}" for n in ("ce", "mask", "dice") for s in ("", "_0")}
    for name, loss in losses.items():
        assert loss.dtype == dtype and abs(loss - expected[name]) < tolerance * 10, name
    assert all(torch.allclose(g, e, rtol=0, atol=tolerance) for g, e in zip(grads, expected_grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    half = small_outputs(dtype=dtype)
    targets, points = [small_target([2, 0]), small_target([1])], seeded_points(torch.float32)
    full = [{k: v.detach().float().requires_grad_() for k, v in s.items()} for s in (small_sets(half))]
    criterion = Mask2FormerCriterion(3, num_points=300)
    with torch.autocast("cpu", torch.bfloat16):
        losses, grads = run(lambda o: criterion(o, targets, points), half)
    expected, expected_grads = run(lambda o: criterion(o, targets, points), full[0] | dict(aux_outputs=full[1:]))
    assert all(loss.dtype == torch.float32 and loss == expected[name] for name, loss in losses.items())
    assert all(torch.equal(g, e.to(dtype)) for g, e in zip(grads, expected_grads, strict=True))


def small_sets(outputs):
    return [{k: s[k] for k in ("pred_logits", "pred_masks")} for s in (outputs, *outputs["aux_outputs"])]


# Borders --------------------------------------------------------------------------------------------------------------


def test_points_are_drawn_in_the_stated_order():
    drawn = []

    def points(*request):
        drawn.append(request)
        return torch.rand(request[2])

    criterion = Mask2FormerCriterion(3, num_points=8)
    criterion(small_outputs(), [small_target([0, 1]), small_target([2])], points)
    expected = [("matching", s, (2, 8, 2)) for s in (0, 1)]
    for s in (0, 1):
        expected += [("candidates", s, (3, 24, 2)), ("random", s, (3, 2, 2))]
    assert drawn == expected


def test_the_seed_repeats_the_losses():
    criterion, targets = Mask2FormerCriterion(3, num_points=8), [small_target([0, 1]), small_target([2])]
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(sum(criterion(small_outputs(), targets).values()))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_target_at_all_leaves_the_class_term_and_every_gradient(dtype):
    outputs = small_outputs(dtype=dtype)
    losses = Mask2FormerCriterion(3)(outputs, [small_target([]), small_target([])])
    assert {name for name, loss in losses.items() if loss == 0} == {
        f"loss_{n}{s}" for n in ("mask", "dice") for s in ("", "_0")
    }
    sum(losses.values()).backward()
    for output in small_sets(outputs):
        assert (output["pred_masks"].grad == 0).all() and output["pred_logits"].grad.abs().sum() > 0


def test_more_targets_than_queries():
    outputs = small_outputs(batch=1, queries=2, num_aux=0)
    losses = Mask2FormerCriterion(3, num_points=64)(outputs, [small_target([0, 1, 2, 0, 1])])
    sum(losses.values()).backward()
    assert (outputs["pred_masks"].grad.abs().sum((2, 3)) > 0).all()  # both queries have a target


def test_targets_that_vanish_at_the_stride_of_the_masks():
    target = small_target([0, 1], size=(256, 256))
    target["masks"][:] = False
    target["masks"][0, 101, 77] = True  # the other one is empty
    outputs = small_outputs(batch=1)
    losses = Mask2FormerCriterion(3)(outputs, [target])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(leaf.grad.isfinite().all() for leaf in leaves_of(outputs))


def test_divisor_is_averaged_over_processes_and_at_least_one(monkeypatch):
    outputs, targets = small_outputs(), [small_target([0, 1]), small_target([2])]
    found = []
    for scale in (1, 4, 0.01):
        monkeypatch.setattr(mask2former, "all_reduce", lambda data, op, s=scale: op == "mean" and data.mul_(s))
        losses = Mask2FormerCriterion(3, num_points=64)(outputs, targets, seeded_points(torch.float32))
        found.append((losses["loss_mask"], losses["loss_dice"], losses["loss_ce"]))
    for one, four, least in list(zip(*found, strict=True))[:2]:
        assert torch.isclose(one, 4 * four) and torch.isclose(3 * one, least)
    assert found[0][2] == found[1][2]


@pytest.mark.parametrize("number, name", [(0, "last layer"), (3, r"aux_outputs\[2\]")])
@pytest.mark.parametrize("key, value", [("pred_masks", "nan"), ("pred_masks", "inf"), ("pred_logits", "nan")])
def test_names_the_prediction_that_is_not_finite(number, name, key, value):
    outputs = small_outputs(num_aux=3)
    output = [outputs, *outputs["aux_outputs"]][number]
    output[key] = output[key].detach().clone()
    output[key][1, 2] = float(value)
    message = rf"\({name}, image 1\): 2 of 8 values are not finite.*query 2, target 0.*lower the learning rate"
    with pytest.raises(FloatingPointError, match=message):
        Mask2FormerCriterion(3, num_points=8)(outputs, [small_target([1]), small_target([0, 1])])


@pytest.mark.parametrize("label", [3, 255, -1])
def test_label_out_of_range(label):
    message = rf"target 1 of image 1 has label {label}, but num_classes 3 allows 0..2: set the head's num_classes"
    with pytest.raises(ValueError, match=message):
        Mask2FormerCriterion(3, num_points=8)(small_outputs(), [small_target([0]), small_target([0, label])])


@pytest.mark.parametrize(
    "classes, targets, message",
    [
        (3, [[0], [0]], r"masks of image 1 have size \(5, 7\), those of image 0 \(24, 36\): pad all"),
        (3, [[0]], "1 targets for a batch of 2 images"),
        (5, [[0], [0]], "pred_logits has 4 columns; num_classes 5 needs 6"),
    ],
)
def test_outputs_and_targets_that_do_not_fit(classes, targets, message):
    targets = [small_target(labels, size) for labels, size in zip(targets, [(24, 36), (5, 7)], strict=False)]
    with pytest.raises(ValueError, match=message):
        Mask2FormerCriterion(classes)(small_outputs(), targets)


def test_masks_without_labels():
    target = small_target([0, 1]) | dict(labels=torch.tensor([0]))
    with pytest.raises(ValueError, match="image 0 has 2 target masks but 1 labels"):
        Mask2FormerCriterion(3)(small_outputs(batch=1), [target])


class HostReads(TorchDispatchMode):
    """Lets copies from the meta device to the CPU pass, as zeros, and counts them; other reads of it raise by themselves."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            self.shapes.append(tuple(args[0].shape))
            return torch.zeros(args[0].shape, dtype=args[0].dtype)
        return func(*args, **kwargs)


def step_inputs(device, sets=3):
    """Leaves, outputs and targets of a batch of 2 on a device."""
    outputs = small_outputs(num_aux=sets - 1)
    leaves = [leaf.detach().to(device).requires_grad_() for leaf in leaves_of(outputs)]
    pairs = [dict(zip(("pred_logits", "pred_masks"), leaves[i : i + 2], strict=True)) for i in range(0, 2 * sets, 2)]
    targets = [small_target([0, 1]), small_target([2, 0, 1])]
    targets = [{name: value.to(device) for name, value in target.items()} for target in targets]
    return leaves, pairs[0] | dict(aux_outputs=pairs[1:]), targets


def test_a_step_reads_the_device_once(monkeypatch):
    """On the meta device, which has no values: whoever looks at one, or at how many there are, fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know the device
    leaves, outputs, targets = step_inputs("meta")
    with HostReads() as reads:
        losses = Mask2FormerCriterion(3, num_points=16)(outputs, targets)
        grads = torch.autograd.grad(sum(losses.values()), leaves)
    assert reads.shapes == [(3 * 5 * 4 + 5,)]  # costs (S, T, Q) and labels (T,)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    with HostReads() as reads, pytest.raises(RuntimeError, match="meta"):
        leaves[0].sum().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_the_gpu_once(dtype):
    leaves, outputs, targets = step_inputs("cuda")
    sets = [{name: value.to(dtype) for name, value in pair.items()} for pair in small_sets(outputs)]
    criterion = Mask2FormerCriterion(3, num_points=4096)

    def step():
        losses = criterion(sets[0] | dict(aux_outputs=sets[1:]), targets)
        torch.autograd.grad(sum(losses.values()), leaves, retain_graph=True)

    step()  # compiles
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert len(waits) == 1, waits


def test_is_built_by_name_with_the_published_numbers():
    criterion = MODELS.build(dict(type="Mask2FormerCriterion", num_classes=C))
    config = META["config"]
    assert (criterion.num_points, criterion.no_object_weight) == (config["num_points"], config["eos_coef"])
    assert (criterion.num_candidates, criterion.num_uncertain) == (37632, 9408)
    assert not criterion.state_dict()
