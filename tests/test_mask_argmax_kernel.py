"""The kernels of mask_argmax and mask_owner against the eager forms in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densepred.heads.resizing import resize_to_file
from densepred.ops import Taps, linear_taps, mask_argmax, mask_owner
from densepred.ops.linear_resize import resized
from tests.oracle import DEVICE, DTYPES, RANDOM_SHAPES, poison_new_tensors

kernels = pytest.importorskip("densepred.ops.kernels.mask_argmax", exc_type=ImportError)
GAP = 1e-5
"""Of scores relative to the best: what lies nearer may be taken for it."""


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def by_kernel(op: Callable, *arguments: Tensor | Taps) -> Tensor | tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DENSEPRED_OPS", "triton")
        poison_new_tensors(patch)
        return op(*arguments)


def probabilities(logits: Tensor, resizes: tuple[Taps, Taps]) -> Tensor:
    """Return (H, W, Q) in float64."""
    logits = logits.cpu().double()
    rows, columns = (taps.on(logits) for taps in resizes)
    return resized(logits, rows, columns).sigmoid().transpose(0, 1)


def check_choice(found: Tensor, scores: Tensor) -> None:
    """Check that the scores (H, W, N) of a choice (H, W) are the largest, and that it is the first of those."""
    best = scores.amax(-1)
    assert found.min() >= 0 and found.max() < scores.shape[-1]
    assert (scores.gather(-1, found[..., None])[..., 0] >= best * (1 - GAP)).all()
    alone = (scores >= best[..., None] * (1 - GAP)).sum(-1) == 1
    assert torch.equal(found[alone], scores.argmax(-1)[alone])


def check_owners(ids: Tensor, areas: Tensor, probs: Tensor, scores: Tensor) -> None:
    ids, areas = ids.cpu(), areas.cpu()
    products, strong = probs * scores.cpu().double(), probs >= 0.5
    owner = products.argmax(-1)
    largest = products.topk(min(2, len(scores)), -1).values
    clear = (largest[..., 0] - largest[..., -1] > GAP * largest[..., 0]) | (len(scores) == 1)
    clear &= ((probs - 0.5).abs() > GAP).all(-1)
    written = torch.where(strong.gather(-1, owner[..., None])[..., 0], owner + 1, 0)
    assert torch.equal(ids[clear], written[clear].int())
    doubtful = int((~clear).sum())
    assert areas[:, 0].sum() == ids.numel()
    assert torch.equal(areas[:, 1], ids.flatten().bincount(minlength=len(scores) + 1)[1:])
    for column, expected in ((0, owner.flatten().bincount(minlength=len(scores))), (2, strong.sum((0, 1)))):
        assert (areas[:, column] - expected).abs().max() <= doubtful


@RANDOM_SHAPES
@given(
    small=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    image=st.tuples(st.integers(1, 20), st.integers(1, 36)),
    file=st.none() | st.tuples(st.integers(1, 11), st.integers(1, 40)),
    numbers=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_shapes(small, image, file, numbers, dtype, strided, seed):
    queries, classes = numbers
    random = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(queries, *small, generator=random)).to(dtype)
    if strided:
        logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
    probs = torch.rand(queries, classes, generator=random).to(dtype)
    padded = tuple(4 * side for side in small)
    shown = tuple(min(a, b) for a, b in zip(image, padded, strict=True))
    logits, probs = on_device(logits, probs)
    resizes = resize_to_file(logits, padded, shown, file or shown)
    exact = probabilities(logits, resizes)
    check_choice(by_kernel(mask_argmax, logits, probs, *resizes).cpu(), exact @ probs.cpu().double())
    check_owners(*by_kernel(mask_owner, logits, probs[:, 0], *resizes), exact, probs[:, 0])


@pytest.mark.parametrize("queries, classes", [(5, 133), (3, 200), (2, 256), (2, 300), (33, 16)])
def test_many_classes(queries, classes):
    """All ways to cut the classes into blocks, the last one of one class and of all."""
    random = torch.Generator().manual_seed(classes)
    logits, probs = on_device(
        torch.randn(queries, 2, 8, generator=random), torch.rand(queries, classes, generator=random)
    )
    for last in (0, 1):
        probs[:, -1] = last
        resizes = linear_taps(2, 4), linear_taps(8, 32)
        found = by_kernel(mask_argmax, logits, probs, *resizes).cpu()
        check_choice(found, probabilities(logits, resizes) @ probs.cpu().double())
    assert (found == classes - 1).all()


def test_ties_go_to_the_first():
    logits, scores = on_device(torch.zeros(40, 2, 3), torch.full((40,), 0.1))
    scores[[17, 30]] = 0.7
    same = linear_taps(2, 4), linear_taps(3, 6)
    for classes in (20, 133, 300):
        assert not by_kernel(mask_argmax, logits, torch.full((40, classes), 0.5, device=DEVICE), *same).any()
    ids, areas = by_kernel(mask_owner, logits, scores, *same)
    assert (ids == 18).all() and areas.sum(0).tolist() == [24, 24, 40 * 24] and areas[17].tolist() == [24, 24, 24]


def test_products_keep_24_bits():
    """Class 1 leads by the last bits of its probabilities, which TF32 does not hold."""
    probs = torch.full((16, 4), 0.3)
    probs[:, 1] = 0.3 * (1 + 2e-6)
    logits, probs = on_device(torch.full((16, 2, 2), 3.0), probs)
    assert (by_kernel(mask_argmax, logits, probs, linear_taps(2, 4), linear_taps(2, 4)) == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number(dtype):
    """A pixel whose tap is NaN has no score; infinite logits are probabilities 0 and 1."""
    logits = torch.zeros(3, 2, 4)
    logits[1, 0, 0], logits[1, :, 3], logits[2, :, 3] = float("nan"), -float("inf"), float("inf")
    logits, probs = on_device(logits.to(dtype), torch.eye(3))
    same = linear_taps(2, 2), linear_taps(4, 4)
    scores = torch.tensor([0.3, 0.2, 0.4], device=DEVICE)
    found, (ids, areas) = by_kernel(mask_argmax, logits, probs, *same), by_kernel(mask_owner, logits, scores, *same)
    assert torch.equal(found, mask_argmax(logits.float(), probs, *same)) and found[1].tolist() == [0, 0, 0, 2]
    expected = mask_owner(logits.float(), scores, *same)
    assert torch.equal(ids, expected[0]) and torch.equal(areas, expected[1])


def test_resizes_that_reach_too_far_stay_inside():
    """On a GPU nobody looks at the indices: the nearest row and column are read."""
    logits, probs = on_device(torch.randn(3, 4, 5), torch.rand(3, 4))
    far = Taps(torch.tensor([[900_000], [-900_000]]), torch.ones(2, 1))
    near_rows, near_columns = (Taps(torch.tensor([[last], [0]]), torch.ones(2, 1)) for last in (3, 4))
    rows, columns, near_rows, near_columns = (taps.on(logits) for taps in (far, far, near_rows, near_columns))
    found = kernels.argmax(logits, probs, rows, columns)
    assert torch.equal(found, kernels.argmax(logits, probs, near_rows, near_columns))


def test_two_runs_are_equal():
    logits, probs = on_device(torch.randn(20, 5, 9), torch.rand(20, 7))
    resizes = linear_taps(5, 20), linear_taps(9, 36)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [(by_kernel(mask_argmax, logits, probs, *resizes),) for _ in range(2)]
        runs = [(*run, *by_kernel(mask_owner, logits, probs[:, 0], *resizes)) for run in runs]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_opcheck(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    logits, probs = on_device(torch.randn(3, 4, 5), torch.rand(3, 4))
    rows, columns = (taps.on(logits) for taps in (linear_taps(4, 7), linear_taps(5, 9)))
    resizes = (rows.indices, rows.weights, columns.indices, columns.weights)
    torch.library.opcheck(torch.ops.densepred.mask_argmax, (logits, probs, *resizes))
    torch.library.opcheck(torch.ops.densepred.mask_owner, (logits, probs[:, 0].contiguous(), *resizes))


def test_maps_beyond_32_bits_run_eager(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    huge = torch.zeros(1, 1, 1, device=DEVICE).expand(2**11, 2**10, 2**10)
    with pytest.raises(ValueError, match=r"2\^31"):
        mask_argmax(huge, torch.rand(2**11, 1, device=DEVICE), linear_taps(2**10, 1), linear_taps(2**10, 1))
