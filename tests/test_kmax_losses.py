"""The criterion of kMaX-DeepLab against the numbers of the official code, and at the borders of its inputs."""

import numpy as np
import pytest
import torch

from densepred.losses import kmax
from densepred.losses.kmax import KMaXCriterion
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "kmax_losses")
B, Q, C, H, W = (META["input"]["shapes"][k] for k in "BQCHW")
RECTANGLES = META["input"]["targets"]["rectangles"]
WEIGHTS = {k: META["config"]["weights"][k] for k in META["config"]["weights"]}
SEEDS = {"loss_pixel_insdis": 500, "loss_aux_semantic": 501, **{f"loss_pixel_insdis_{i}": 510 + i for i in range(6)}}


def paint(rectangles, hiding=True):
    """One image's targets from rectangles [class, y0, y1, x0, x1]."""
    masks = torch.zeros(len(rectangles), H, W, dtype=torch.bool)
    semantic = torch.full((H, W), -1)
    for i, (label, y0, y1, x0, x1) in enumerate(rectangles):
        if hiding:
            masks[:, y0:y1, x0:x1] = False
        masks[i, y0:y1, x0:x1] = True
        semantic[y0:y1, x0:x1] = label
    labels = torch.tensor([r[0] for r in rectangles], dtype=torch.int64)
    return dict(masks=masks, labels=labels, semantic=semantic)


def prediction(i):
    """Output i of the case (0 = final), as leaves of the gradients."""
    logits = 2 * parity.normal_input(100 + i, (B, Q, C + 1))
    masks = parity.normal_input(200 + i, (B, Q, H, W))
    for b, queries in enumerate(META["input"]["boosted_queries"]):
        target = paint(RECTANGLES[b])
        for j, q in enumerate(queries):
            if q >= 0:
                logits[b, q, target["labels"][j]] += 2 + j
                masks[b, q] += (3 + 0.5 * j) * target["masks"][j].numpy()
    feature = parity.normal_input(300 + i, (B, 128, H, W))
    feature /= np.linalg.norm(feature, axis=1, keepdims=True)
    leaves = dict(pred_logits=logits, pred_masks=masks, pixel_feature=feature)
    return {k: torch.from_numpy(v).requires_grad_() for k, v in leaves.items()}


def case_outputs(num_aux=0):
    semantic = torch.from_numpy(2 * parity.normal_input(400, (B, C + 1, H, W))).requires_grad_()
    return prediction(0) | dict(aux_outputs=[prediction(i + 1) for i in range(num_aux)], aux_semantic_pred=semantic)


def case_noise(**seeds):
    return lambda name, shape: torch.from_numpy(np.random.RandomState((SEEDS | seeds)[name]).random_sample(shape))


def criterion(**changed):
    return KMaXCriterion(C, **dict(insdis_sample_k=512, aux_semantic_sample_k=512) | changed)


def relative_error(value, expected):
    return np.abs(value - expected).max() / max(np.abs(expected).max(), 1e-300)


def assert_terms(losses, prefix=""):
    """Every expected term is there, within the tolerance of the case, and no other."""
    names = {n.removeprefix(prefix) for n in EXPECTED if n.startswith(prefix + "loss_")}
    assert set(losses) == names
    for name, loss in losses.items():
        weight = WEIGHTS["_".join(p for p in name.split("_") if not p.isdigit())]
        assert relative_error(loss.item() / weight, EXPECTED[prefix + name]) < 1e-9, name


def matched_case():
    final, targets = prediction(0), [paint(r) for r in RECTANGLES]
    masks = [t["masks"].flatten(1).double() for t in targets]
    labels = [t["labels"] for t in targets]
    return final, masks, labels, kmax.match_targets(final["pred_logits"], final["pred_masks"].flatten(2), masks, labels)


# Parity ---------------------------------------------------------------------------------------------------------------


def test_matching_of_the_case():
    final, masks, labels, _ = matched_case()
    for i in range(B):
        logits, probs = final["pred_logits"][i], final["pred_masks"][i].flatten(1).softmax(0)
        match = kmax.match_image(logits, probs, masks[i], labels[i])
        found = dict(
            target=match.target,
            query=match.query,
            dice=match.dice,
            class_prob=match.class_prob,
            mask_similarity=kmax.mask_similarity(probs, masks[i]),
            class_similarity=kmax.class_similarity(logits, labels[i]),
        )
        for name, value in found.items():
            assert relative_error(value.detach().numpy(), EXPECTED[f"match.{name}{i}"]) < 1e-9, name


def test_targets_of_the_case():
    matched = matched_case()[-1]
    mask_weight = torch.zeros(B, Q, dtype=torch.float64).scatter_add(1, matched.query, matched.mask_weight)
    found = dict(
        labels=matched.labels,
        class_weight=matched.class_weight,
        mask_weight=mask_weight,
        void=matched.void.unflatten(1, (H, W)),
        inverse_area=matched.inverse_area.unflatten(1, (H, W)),
    )
    for name, value in found.items():
        assert relative_error(value.numpy().astype(float), EXPECTED[f"gt.{name}"]) < 1e-9, name


def test_terms_and_gradients_of_the_case():
    outputs = case_outputs(num_aux=6)
    losses = criterion()(outputs, [paint(r) for r in RECTANGLES], case_noise())
    assert_terms(losses)
    total = sum(losses.values())
    assert relative_error(total.item(), EXPECTED["total"]) < 1e-9
    total.backward()
    leaves = {k: outputs[k] for k in ("pred_logits", "pred_masks", "pixel_feature", "aux_semantic_pred")}
    for i, aux in enumerate(outputs["aux_outputs"]):
        leaves |= {f"aux{i}.{k}": v for k, v in aux.items()}
    for name, leaf in leaves.items():
        output = META["outputs"][f"grad.{name}"]
        error = np.abs(parity.thin(leaf.grad.numpy(), output) - EXPECTED[f"grad.{name}"]).max()
        assert error < 1e-9 * output["absmax"], name


def test_sampled_pixels_of_the_case():
    matched = matched_case()[-1]
    for name in SEEDS:
        temperature = 2.0 if "semantic" in name else 1.5
        uniforms = case_noise()(name, (B, H * W))
        index = kmax.sample_pixels(matched.inverse_area, matched.void, 512, temperature, uniforms)
        np.testing.assert_array_equal(index.sort(1).values, EXPECTED[f"sampled.{name}"])


def test_every_output_matched_for_itself():
    outputs = case_outputs(num_aux=6)
    losses = criterion(share_final_matching=False)(outputs, [paint(r) for r in RECTANGLES], case_noise())
    assert_terms(losses, "unshared.")


@pytest.mark.parametrize(
    "prefix, changed, seeds, low_res",
    [
        ("void_kept.", dict(masking_void_pixel=False), {}, False),
        ("all_pixels.", dict(insdis_sample_k=H * W, aux_semantic_sample_k=H * W), {}, False),
        ("low_res_semantic.", dict(aux_semantic_sample_k=0), {}, True),
        ("low_res_sampled.", dict(aux_semantic_sample_k=40), dict(loss_aux_semantic=502), True),
        ("empty_image.", {}, {}, False),
        ("overlap.", {}, {}, False),
    ],
)
def test_branches_of_the_case(prefix, changed, seeds, low_res):
    outputs, targets = case_outputs(), [paint(r) for r in RECTANGLES]
    if low_res:
        outputs["aux_semantic_pred"] = torch.from_numpy(2 * parity.normal_input(401, (B, C, 9, 11)))
    if prefix == "empty_image.":
        targets[1] = paint([])
    if prefix == "overlap.":
        targets = [paint(r, hiding=False) for r in META["input"]["variants"]["overlap"]["rectangles"]]
        outputs["aux_semantic_pred"] = None
    assert_terms(criterion(**changed)(outputs, targets, case_noise(**seeds)), prefix)


# Borders --------------------------------------------------------------------------------------------------------------


def small_outputs(batch=1, queries=4, size=(3, 5), num_aux=1, dtype=torch.float32, low=(3, 5)):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape, normalise=False):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        x = x / x.norm(dim=1, keepdim=True) if normalise else x
        return x.to(dtype).requires_grad_()

    def output():
        feature = leaf(batch, 8, *size, normalise=True)
        return dict(pred_logits=leaf(batch, queries, 4), pred_masks=leaf(batch, queries, *size), pixel_feature=feature)

    return output() | dict(aux_outputs=[output() for _ in range(num_aux)], aux_semantic_pred=leaf(batch, 4, *low))


def small_target(segments, size=(3, 5)):
    """One image whose rows belong to the classes given, from the top; -1 = void, the same class = the same segment."""
    rows = torch.full(size, -1)
    for y, label in enumerate(segments):
        rows[y] = label
    labels = torch.tensor(sorted({s for s in segments if s >= 0}), dtype=torch.int64)
    return dict(masks=rows == labels[:, None, None], labels=labels, semantic=rows)


def leaves_of(outputs):
    outputs = [{k: v for k, v in outputs.items() if k != "aux_outputs"}, *outputs["aux_outputs"]]
    return [(k, v) for output in outputs for k, v in output.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "rows, size, queries",
    [
        ([[-1, -1, -1]], (3, 5), 4),  # no target
        ([[0, 1, -1], [-1, -1, -1]], (3, 5), 4),  # one image of two without
        ([[0]], (1, 1), 4),  # one pixel
        ([[-1]], (1, 1), 1),  # one void pixel, one query
        ([[0, 1, 2]], (3, 5), 2),  # more targets than queries
    ],
)
def test_finite_with_a_gradient_for_every_output(rows, size, queries, dtype):
    outputs = small_outputs(len(rows), queries, size, dtype=dtype, low=size)
    targets = [small_target(r, size) for r in rows]
    losses = KMaXCriterion(3, insdis_sample_k=6, aux_semantic_sample_k=6)(outputs, targets)
    assert all(v.dtype == torch.float32 and v.isfinite() and v >= -1e-6 for v in losses.values())
    sum(losses.values()).backward()
    for name, leaf in leaves_of(outputs):
        assert leaf.grad is not None and leaf.grad.isfinite().all(), name


def test_unmatched_targets_become_void():
    matched = kmax.match_targets(
        torch.tensor([[[0.0, 9.0, 0.0, 0.0]]]),
        torch.zeros(1, 1, 6),
        [torch.eye(2).repeat(1, 3)],
        [torch.tensor([0, 1])],
    )
    assert matched.labels.tolist() == [[1]]
    assert matched.void.tolist() == [[True, False] * 3]
    assert matched.inverse_area.tolist() == [[6.0, 2.0] * 3]


def test_no_target_leaves_only_the_class_term():
    outputs = small_outputs()
    losses = KMaXCriterion(3)(outputs, [small_target([-1] * 3)])
    assert {k for k, v in losses.items() if v != 0} == {"loss_ce", "loss_ce_0"}


def test_float64_stays_and_autocast_changes_nothing():
    outputs, targets = small_outputs(dtype=torch.float64), [small_target([0, 1, 1])]
    plain = KMaXCriterion(3)(outputs, targets)
    with torch.autocast("cpu", torch.bfloat16):
        cast = KMaXCriterion(3)(outputs, targets)
    assert all(v.dtype == torch.float64 and torch.equal(v, cast[k]) for k, v in plain.items())


def test_fewer_pixels_than_samples_uses_all_without_noise():
    outputs, targets = small_outputs(), [small_target([0, 1, 1])]
    many, all_pixels = (
        KMaXCriterion(3, insdis_sample_k=k, aux_semantic_sample_k=k)(outputs, targets, noise=None) for k in (4096, 15)
    )
    assert all(torch.equal(v, all_pixels[k]) for k, v in many.items())


def test_sampling_favours_small_segments_and_avoids_void():
    inverse_area = torch.tensor([[20.0] * 5 + [100 / 70] * 70 + [100.0] * 25]).expand(200, -1)
    void = torch.arange(100).expand(200, -1) >= 75
    uniforms = torch.rand(200, 100, generator=torch.Generator().manual_seed(1))
    uniforms[0, :3] = torch.tensor([0.0, 1.0, 0.5])  # the ends of the range break no logarithm
    index = kmax.sample_pixels(inverse_area, void, 10, 1.0, uniforms)
    assert (index < 75).all() and all(len(set(row)) == 10 for row in index.tolist())
    assert (index < 5).float().mean() > 3 * 5 / 75
    exhausted = kmax.sample_pixels(inverse_area, void, 80, 1.0, uniforms)
    assert ((exhausted < 75).sum(1) == 75).all()


def test_instance_discrimination_equals_its_definition():
    generator = torch.Generator().manual_seed(2)
    feature = torch.randn(2, 6, 9, generator=generator, dtype=torch.float64)
    masks = torch.rand(2, 3, 9, generator=generator, dtype=torch.float64) * (torch.arange(9) < 7)
    same = masks.transpose(1, 2) @ masks
    target = same / same.sum(1, keepdim=True).clamp(min=1)
    logits = feature.transpose(1, 2) @ feature / 0.3
    direct = -(target * logits.log_softmax(1)).sum(1)[:, :7].mean()
    assert torch.isclose(kmax.instance_discrimination_loss(feature, masks), direct, rtol=1e-12)
    feature.requires_grad_()
    assert torch.autograd.gradcheck(lambda f: kmax.instance_discrimination_loss(f, masks), feature)


@pytest.mark.parametrize(
    "target, pred, stride",
    [
        ((33, 41), (9, 11), 4),
        ((257, 513), (33, 65), 8),
        ((16, 32), (2, 4), None),
        ((5, 5), (5, 5), 1),
        ((8, 8), (1, 1), 8),
    ],
)
def test_target_stride(target, pred, stride):
    if stride:
        assert kmax.target_stride(target, pred) == stride
    else:
        with pytest.raises(ValueError, match="prediction of 2x4 pixels does not lie on the target of 16x32"):
            kmax.target_stride(target, pred)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(labels=torch.tensor([0, 3])), r"labels of image 0 are \[0, 3\]; with num_classes 3"),
        (dict(masks=torch.zeros(2, 6, 10)), r"target masks of image 0 has size \(6, 10\), pred_masks \(3, 5\)"),
        (dict(semantic=torch.zeros(3, 6)), r"target semantic of image 0 has size \(3, 6\)"),
    ],
)
def test_targets_that_do_not_fit(changed, message):
    with pytest.raises(ValueError, match=message):
        KMaXCriterion(3)(small_outputs(), [small_target([0, 1, 1]) | changed])


def test_head_of_another_class_count():
    with pytest.raises(ValueError, match="pred_logits has 4 columns; num_classes 5 needs 6"):
        KMaXCriterion(5)(small_outputs(), [small_target([0, 1, 1])])
