"""The ops of the mask losses on sampled points, in their eager forms."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from densepred.engine.benchmark_ops import measure
from densepred.engine.op_cases import point_sample_mask_loss as cases
from densepred.ops import point_mask_losses, point_matching_costs, sample_points, uncertain_points
from densepred.ops import point_sample_mask_loss as ops


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


POINTS = 1.4 * uniform(0, 3, 9, 2) - 0.2
"""Of three rows; some lie outside."""


@pytest.mark.parametrize("rows", [None, torch.tensor([4, -1, 0])])
@pytest.mark.parametrize("chunk", [2**20, 25])
def test_samples_have_their_values_and_gradients(rows, chunk, monkeypatch):
    monkeypatch.setitem(ops.CHUNK, "cpu", chunk)
    maps = normal(1, *((1, 3) if rows is None else (2, 3)), 4, 5).requires_grad_()
    chosen = maps.flatten(0, 1)[[0, 1, 2] if rows is None else rows.clamp(min=0)]
    expected = F.grid_sample(chosen[:, None], 2 * POINTS[:, :, None] - 1, align_corners=False)[:, 0, :, 0]
    assert torch.equal(sample_points(maps, POINTS, rows), expected)
    weight = torch.tensor([1.0, float(rows is None), 1.0], dtype=torch.float64)[:, None]  # row -1 gives no gradient
    (found,) = torch.autograd.grad((sample_points(maps, POINTS, rows) ** 2).sum(), maps)
    (exact,) = torch.autograd.grad((expected**2 * weight).sum(), maps)
    assert torch.allclose(found, exact, rtol=0, atol=1e-12) and exact.abs().max() > 0.1


def test_one_row_of_points_serves_all_maps():
    maps = normal(2, 3, 4, 5).requires_grad_()
    shared = sample_points(maps, POINTS[:1])
    each = sample_points(maps, POINTS[:1].expand(3, -1, -1))
    assert torch.equal(shared, each)
    found, expected = (torch.autograd.grad((out**2).sum(), maps, retain_graph=True)[0] for out in (shared, each))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.bfloat16])
def test_samples_are_float32_of_the_rounded_maps(dtype):
    maps = (5 * uniform(3, 3, 8, 8)).to(dtype)
    found = sample_points(maps, POINTS.float())
    assert found.dtype == torch.float32
    assert torch.equal(found, sample_points(maps.float(), POINTS.float()))
    assert sample_points(maps, POINTS).dtype == torch.float64


@pytest.mark.parametrize("rows", [None, torch.tensor([4, -1, 0])])
def test_the_ordered_backward_pass_is_the_same(rows):
    shape = (1, 3, 4, 5) if rows is None else (2, 3, 4, 5)
    for points in (POINTS, POINTS.clone().fill_(torch.nan), POINTS + 0.5):
        arguments = normal(4, 3, 9), points, rows, shape, torch.float64
        found, expected = ops._sample_backward_in_order(*arguments), ops._sample_backward(*arguments)
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)


def test_nothing_to_sample():
    maps = normal(5, 0, 4, 5).requires_grad_()
    assert sample_points(maps, POINTS[:1]).shape == (0, 9)
    none = torch.empty(0, dtype=torch.int64)
    found = sample_points(normal(5, 2, 4, 5).requires_grad_(), POINTS[:0], none)
    assert found.shape == (0, 9)
    found.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uncertain_points_have_the_smallest_logits(dtype):
    logits = normal(6, 5, 40, dtype=dtype)
    points = torch.stack([logits, torch.arange(40.0, dtype=dtype).expand(5, -1)], -1)
    kept = uncertain_points(logits, points, 12)
    assert torch.equal(kept[..., 0].abs().sort().values, logits.abs().sort().values[:, :12])
    assert torch.equal(logits.gather(1, kept[..., 1].long()), kept[..., 0])


def test_losses_have_their_values_and_gradients():
    logits, targets = normal(7, 2, 3, 11).requires_grad_(), uniform(8, 2, 3, 11)
    bce, dice = point_mask_losses(logits, targets)
    s = logits.sigmoid()
    expected = 1 - (2 * (s * targets).sum(2) + 1) / ((s + targets).sum(2) + 1)
    assert torch.allclose(dice, expected, rtol=1e-14)
    assert torch.allclose(bce, F.binary_cross_entropy(s, targets, reduction="none").mean(2), rtol=1e-12)
    assert torch.autograd.gradcheck(lambda x: point_mask_losses(x, targets), logits)


@pytest.mark.parametrize("count", [5, 64, 200])
def test_costs_equal_the_losses_of_all_pairs(count):
    masks = [50 * normal(9 + s, 2, 7, 5, 6) for s in range(2)]
    targets = [uniform(11, n, 10, 12) < 0.5 for n in (3, 0)]
    points = uniform(12, 2, 2, count, 2)
    bce, dice = point_matching_costs(masks, targets, points)
    assert bce.shape == dice.shape == (2, 3, 7)
    for s in range(2):
        x, y = sample_points(masks[s][0], points[0, s][None]), sample_points(targets[0], points[0, s][None])
        expected = point_mask_losses(x.expand(3, -1, -1).contiguous(), y[:, None].expand(-1, 7, -1).contiguous())
        assert torch.allclose(bce[s], expected[0], rtol=1e-10) and torch.allclose(dice[s], expected[1], rtol=1e-10)


def test_costs_without_any_target():
    targets = [torch.empty(0, 10, 12, dtype=torch.bool)] * 2
    bce, dice = point_matching_costs([normal(13, 2, 7, 5, 6)], targets, uniform(14, 2, 1, 9, 2))
    assert bce.shape == dice.shape == (1, 0, 7)


def test_costs_are_float32_under_autocast():
    masks, points = normal(15, 1, 4, 5, 6, dtype=torch.float32), uniform(16, 1, 1, 99, 2, dtype=torch.float32)
    targets = [uniform(17, 2, 9, 9) < 0.5]
    expected = point_matching_costs([masks], targets, points)
    with torch.autocast("cpu", torch.bfloat16):
        found = point_matching_costs([masks], targets, points)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_opcheck():
    maps, points, rows = normal(18, 2, 3, 4, 5).requires_grad_(), POINTS[:2], torch.tensor([4, 0])
    torch.library.opcheck(torch.ops.densepred.sample_points, (maps, points, rows))
    torch.library.opcheck(torch.ops.densepred.sample_points, (maps, points[:1], None))
    logits, targets = normal(19, 3, 7).requires_grad_(), uniform(20, 3, 7)
    torch.library.opcheck(torch.ops.densepred.point_mask_losses, (logits, targets))
    arguments = [maps.detach()], [uniform(21, n, 6, 6) < 0.5 for n in (2, 1)], points[:, None]
    torch.library.opcheck(torch.ops.densepred.point_matching_costs, arguments)


MAPS = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: sample_points(MAPS[0, 0], POINTS), r"maps \(4, 5\) must be \(M, H, W\) or \(B, Q, H, W\)"),
        (lambda: sample_points(MAPS, POINTS[..., :1]), r"points \(3, 9, 1\)"),
        (lambda: sample_points(MAPS, POINTS), "points for 3 rows, but there are 6: give 6 or 1"),
        (lambda: sample_points(MAPS, POINTS.to("meta"), torch.arange(3)), "points is on meta, maps on cpu: move them"),
        (lambda: point_mask_losses(MAPS, MAPS[0]), r"logits \(2, 3, 4, 5\) and targets \(3, 4, 5\) must both be"),
        (lambda: point_mask_losses(MAPS, MAPS.to("meta")), "targets is on meta, logits on cpu"),
        (lambda: point_matching_costs([MAPS, MAPS[:1]], [MAPS[0]] * 2, POINTS), r"every set must be \(2, Q, h, w\)"),
        (lambda: point_matching_costs([MAPS], [MAPS[0]] * 3, POINTS), r"\[\(2, 3, 4, 5\)\], every set .* \(3, Q"),
        (lambda: point_matching_costs([MAPS], [MAPS[0]] * 2, POINTS), r"points \(3, 9, 2\) must be \(2, 1, P, 2\)"),
        (
            lambda: point_matching_costs([MAPS], [MAPS[0], MAPS[0].to("meta")], POINTS[:2, None]),
            r"targets\[1\] is on meta, masks on cpu",
        ),
    ],
)
def test_inputs_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "case, inputs",
    [
        (cases.CASES[0], partial(cases.one_set_inputs, 3, 4, 32, 6, 200)),
        (cases.CASES[2], partial(cases.criterion_inputs, 2, 3, 4, 32, 6)),
    ],
)
def test_the_published_formulation_computes_the_same(case, inputs):
    for found in measure(replace(case, inputs=inputs), repeats=1):
        assert 0 < max(found.errors) < 1e-5
