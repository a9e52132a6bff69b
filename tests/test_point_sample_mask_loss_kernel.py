"""The kernels of the mask losses on sampled points against their eager forms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from densepred.losses.mask2former import Mask2FormerCriterion
from densepred.ops import point_mask_losses, point_matching_costs, sample_points
from densepred.ops.kernels import point_sample_mask_loss as kernels
from densepred.ops.precision import upcast
from tests.oracle import DEVICE, DTYPES, RANDOM_SHAPES, check_kernel, poison_new_tensors, relative_error, results

SIDE = st.integers(1, 9)
SEED = st.integers(0, 2**20)


def random_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def points_of(*shape: int, random: torch.Generator) -> torch.Tensor:
    """A third of them outside."""
    return 1.5 * torch.rand(*shape, 2, generator=random) - 0.25


def sample(maps: torch.Tensor, points: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    return sample_points(maps, upcast(points), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@RANDOM_SHAPES
@given(
    batch=st.integers(1, 2), queries=st.integers(1, 2), height=SIDE, width=SIDE, points=st.integers(1, 40), seed=SEED
)
def test_samples_of_all_maps(dtype, batch, queries, height, width, points, seed):
    random = random_of(seed)
    maps = torch.randn(batch, queries, height, width, generator=random)
    rows = 1 if seed % 2 else batch * queries
    check_kernel(sample, (maps, points_of(rows, points, random=random), None), (0,), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@RANDOM_SHAPES
@given(maps=st.integers(1, 5), height=SIDE, width=SIDE, points=st.integers(1, 40), seed=SEED)
def test_samples_of_some_maps(dtype, maps, height, width, points, seed):
    random = random_of(seed)
    chosen = torch.randperm(maps, generator=random)[: seed % maps + 1]
    rows = torch.cat([chosen, torch.tensor([-1])]).to(DEVICE)
    arguments = (torch.randn(maps, height, width, generator=random), points_of(len(rows), points, random=random), rows)
    check_kernel(sample, arguments, (0,), dtype)


def test_more_points_than_a_program_takes():
    random = random_of(0)
    maps = torch.randn(2, 3, 20, 30, generator=random)
    check_kernel(sample, (maps, points_of(6, 1300, random=random), None), (0,), torch.float32)


@pytest.mark.parametrize("layout", ["queries last", "rotated", "one map for all"])
def test_maps_in_any_layout(layout, monkeypatch):
    random = random_of(1)
    maps = {
        "queries last": torch.randn(2, 5, 6, 3, generator=random).permute(0, 3, 1, 2),
        "rotated": torch.randn(2, 3, 6, 5, generator=random).mT,
        "one map for all": torch.randn(1, 1, 5, 6, generator=random).expand(2, 3, 5, 6),
    }[layout].to(DEVICE)
    points = points_of(6, 12, random=random).to(DEVICE)
    monkeypatch.setenv("DENSEPRED_OPS", "eager")
    expected = sample_points(maps, points)
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    assert torch.allclose(sample_points(maps, points), expected, atol=1e-5)


def test_points_at_any_place_in_memory(monkeypatch):
    """Two points are read as one number, which must not start in the middle of another."""
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    maps, numbers = torch.randn(1, 4, 4, generator=random_of(13)).to(DEVICE), torch.rand(21).to(DEVICE)
    for points in (numbers[1:].view(1, 10, 2), numbers[1:].view(1, 2, 10).mT, numbers[:20].view(1, 10, 2).flip(2)):
        exact = sample_points(maps.double(), points.double())
        assert relative_error(sample_points(maps, points), exact) < 1e-6


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8])
def test_samples_of_whole_numbers(kind, monkeypatch):
    random = random_of(2)
    maps = (torch.randint(0, 2 if kind == torch.bool else 255, (3, 9, 7), generator=random)).to(DEVICE, kind)
    points = points_of(1, 33, random=random).to(DEVICE)
    monkeypatch.setenv("DENSEPRED_OPS", "eager")
    expected = sample_points(maps.float(), points.double())
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    found = sample_points(maps, points)
    assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-6


def test_locations_that_are_no_places(monkeypatch):
    """They, and what lies far outside, read nothing; half a pixel outside of the first pixel there is half of it."""
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    maps = torch.full((1, 4, 4), torch.inf, device=DEVICE)
    bad = torch.tensor([[torch.nan, 0.5], [torch.inf, 0.5], [0.5, -torch.inf], [1e30, 0.5], [-7.0, 2.0]], device=DEVICE)
    assert (sample_points(maps, bad[None]) == 0).all()
    edge = sample_points(torch.ones(1, 4, 4, device=DEVICE), torch.tensor([[[0.0, 0.5]]], device=DEVICE))
    assert edge.item() == 0.5


def test_a_map_that_is_no_number_spoils_only_its_own_samples(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    maps = torch.ones(3, 4, 4, device=DEVICE)
    maps[1] = torch.nan
    found = sample_points(maps, torch.rand(1, 20, 2, generator=random_of(3)).to(DEVICE))
    assert found.isnan().all(1).tolist() == [False, True, False] and found[[0, 2]].isfinite().all()


def test_maps_beyond_int32(monkeypatch):
    """4 GiB that nobody touches but for the last map."""
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    maps = torch.empty(2**31 // 64**2 + 2, 64, 64, dtype=torch.float16, device=DEVICE)
    maps[-1] = torch.randn(64, 64, generator=random_of(11))
    points = torch.rand(1, 20, 2, generator=random_of(12)).to(DEVICE)
    found = sample_points(maps, points, torch.tensor([len(maps) - 1], device=DEVICE))
    assert relative_error(found, sample_points(maps[-1:].double(), points.double())) < 1e-5


def test_a_wide_map_loses_no_digits(monkeypatch):
    """Whether a location is multiplied exactly is for the GPU to say: the interpreter has no fused multiply-add."""
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    random = random_of(4)
    maps = torch.randn(1, 1, 1 << 12, generator=random).to(DEVICE)
    points = torch.rand(1, 500, 2, generator=random).to(DEVICE)
    points[..., 1] = 0.5
    error = relative_error(sample_points(maps, points), sample_points(maps.double(), points.double()))
    assert error < (1e-6 if DEVICE.type == "cuda" else 2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@RANDOM_SHAPES
@given(
    masks=st.integers(1, 4),
    sets=st.integers(1, 3),
    points=st.integers(1, 70),
    scale=st.sampled_from([1, 30]),
    seed=SEED,
)
def test_losses(dtype, masks, sets, points, scale, seed):
    random = random_of(seed)
    logits = scale * torch.randn(masks, sets, points, generator=random)
    targets = torch.rand(masks, sets, points, generator=random)
    check_kernel(lambda x, y: torch.stack(point_mask_losses(x, y)), (logits, targets), (0,), dtype)


def test_losses_over_many_steps():
    random = random_of(5)
    arguments = torch.randn(2, 2500, generator=random), torch.rand(2, 2500, generator=random)
    check_kernel(lambda x, y: torch.stack(point_mask_losses(x, y)), arguments, (0,), torch.float32)


def test_losses_of_a_sure_prediction_keep_their_digits(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    logits = torch.linspace(4, 60, 50, device=DEVICE)[:, None]
    bce, _ = point_mask_losses(logits, torch.ones_like(logits))
    exact = torch.nn.functional.softplus(-logits.double())[:, 0]
    kept = exact > 1e-6  # beyond, the float32 logit itself leaves nothing
    assert ((bce.double() - exact).abs() <= 4e-6 + 1e-6 * exact).all() and kept.sum() > 5


def transposed_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.stack(point_mask_losses(logits.mT, targets))


def test_losses_of_any_layout():
    random = random_of(6)
    arguments = torch.randn(2, 30, 3, generator=random), torch.rand(3, 30, generator=random).expand(2, 3, 30)
    check_kernel(transposed_losses, arguments, (0,), torch.float32)


def costs_of(masks: torch.Tensor, targets: list[torch.Tensor], points: torch.Tensor) -> torch.Tensor:
    return torch.stack(point_matching_costs(masks.unbind(), targets, upcast(points)))


@RANDOM_SHAPES
@given(
    dtype=st.sampled_from(DTYPES),
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    queries=st.integers(1, 6),
    points=st.integers(1, 100),
    height=SIDE,
    width=SIDE,
    seed=SEED,
)
def test_costs(dtype, counts, queries, points, height, width, seed):
    random = random_of(seed)
    sets = 1 + seed % 2
    masks = (3 * torch.randn(sets, len(counts), queries, height, width, generator=random)).to(DEVICE, dtype)
    sizes = [(3 * height + image, 2 * width) for image in range(len(counts))]
    targets = [torch.rand(n, *size, generator=random) < 0.5 for n, size in zip(counts, sizes, strict=True)]
    targets = [target.to(DEVICE) for target in targets]
    shared = points_of(len(counts), sets, points, random=random).to(DEVICE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSEPRED_OPS", "eager")
        expected = costs_of(masks.double(), targets, shared.double())
        patch.setenv("DENSEPRED_OPS", "triton")
        poison_new_tensors(patch)
        found = costs_of(masks, targets, shared)
    assert found.shape == expected.shape == (2, sets, sum(counts), queries)
    assert relative_error(found, expected) < 1e-5


def test_costs_of_many_targets_and_points(monkeypatch):
    """Several tiles of targets and queries, several programs for the points of each."""
    random = random_of(7)
    masks = torch.randn(1, 1, 34, 3, 4, generator=random).to(DEVICE)
    targets = [(torch.rand(70, 6, 5, generator=random) < 0.5).to(DEVICE)]
    shared = torch.rand(1, 1, 600, 2, generator=random).to(DEVICE)
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    found = costs_of(masks, targets, shared)
    assert relative_error(found, costs_of(masks.double(), targets, shared.double())) < 1e-5


def test_backward_passes_are_repeatable_on_demand(monkeypatch):
    """The atomic kernel is left alone, and two runs are equal bit for bit."""
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    random = random_of(8)
    maps = torch.randn(2, 3, 8, 8, generator=random).to(DEVICE)
    arguments = maps, torch.rand(3, 900, 2, generator=random).to(DEVICE), torch.tensor([4, -1, 2], device=DEVICE)
    slope = torch.randn(3, 900, generator=random).to(DEVICE)
    expected = results(sample_points, arguments, (0,), slope)[1]
    launched = []
    monkeypatch.setattr(kernels, "_scatter", lambda *arguments: launched.append(arguments))
    torch.use_deterministic_algorithms(True)
    try:
        found = [results(sample_points, arguments, (0,), slope)[1] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*found) and not launched and relative_error(found[0], expected) < 1e-5


def test_opcheck(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    random = random_of(9)
    maps = torch.randn(1, 3, 4, 5, generator=random).to(DEVICE).requires_grad_()
    points = torch.rand(2, 7, 2, generator=random).to(DEVICE)
    rows = torch.tensor([2, 0], device=DEVICE)
    logits, goals = (torch.rand(2, 7, generator=random).to(DEVICE) for _ in range(2))
    targets = [torch.rand(n, 6, 6, generator=random).to(DEVICE) < 0.5 for n in (2,)]
    ops = torch.ops.densepred
    torch.library.opcheck(ops.sample_points, (maps, points, rows))
    torch.library.opcheck(ops.sample_points, (maps, points[:1], None))
    torch.library.opcheck(ops.point_mask_losses, (logits.requires_grad_(), goals))
    torch.library.opcheck(ops.point_matching_costs, ([maps.detach()], targets, points[None, :1]))


def test_the_criterion_by_kernels(monkeypatch):
    random = random_of(10)
    shapes = dict(pred_logits=(2, 5, 4), pred_masks=(2, 5, 6, 7))
    sets = [
        {name: torch.randn(shape, generator=random).to(DEVICE).requires_grad_() for name, shape in shapes.items()}
        for _ in range(2)
    ]
    leaves = [leaf for output in sets for leaf in output.values()]
    masks = (torch.rand(4, 12, 14, generator=random) < 0.4).to(DEVICE)
    labels = torch.tensor([1, 0, 2, 2], device=DEVICE)
    targets = [dict(labels=labels[part], masks=masks[part]) for part in (slice(0, 1), slice(1, 4))]

    def points(name: str, number: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.rand(shape, generator=random_of(number)).to(DEVICE)

    found = {}
    for backend in ("eager", "triton"):
        monkeypatch.setenv("DENSEPRED_OPS", backend)
        losses = Mask2FormerCriterion(3, num_points=64)(sets[0] | {"aux_outputs": sets[1:]}, targets, points)
        found[backend] = [torch.stack(list(losses.values())), *torch.autograd.grad(sum(losses.values()), leaves)]
    for kernel, eager in zip(found["triton"], found["eager"], strict=True):
        assert relative_error(kernel.detach(), eager.detach()) < 1e-5
