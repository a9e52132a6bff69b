"""The kernel of k-means attention against the eager form in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densepred.ops import kmeans_attention
from tests.oracle import DEVICE, DTYPES, RANDOM_SHAPES, check_kernel, poison_new_tensors

kernels = pytest.importorskip("densepred.ops.kernels.kmeans_attention", exc_type=ImportError)


def inputs(batch: int, depth: int, queries: int, size: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pixel values, and mask logits of which many tie."""
    rng = torch.Generator().manual_seed(seed)
    value = torch.randn(batch, depth, *size, generator=rng)
    return value, (4 * torch.randn(batch, queries, *size, generator=rng)).round() / 4


def by_kernel(patch: pytest.MonkeyPatch, value: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    patch.setenv("DENSEPRED_OPS", "triton")
    poison_new_tensors(patch)
    return kmeans_attention(value.to(DEVICE), logits.to(DEVICE))


@pytest.fixture(params=[1 << 14, 0], ids=["assigned in the product", "assigned before"])
def fused(request, monkeypatch):
    monkeypatch.setattr(kernels, "FUSED_PIXELS", request.param)


@RANDOM_SHAPES
@given(
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 13), st.integers(1, 13)),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    swapped=st.booleans(),
    fused=st.booleans(),
)
def test_random_shapes(sizes, channels, dtype, swapped, fused):
    batch, *size = sizes
    value, logits = inputs(batch, *channels, size)
    if swapped:
        value, logits = value.transpose(2, 3), logits.transpose(2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "FUSED_PIXELS", (1 << 14) * fused)
        check_kernel(lambda *arguments: kmeans_attention(*arguments)[0], (value, logits), (0,), dtype)
        expected = kmeans_attention(value.to(dtype), logits.to(dtype))[1]
        assert torch.equal(by_kernel(patch, value.to(dtype), logits.to(dtype))[1].cpu(), expected)


@pytest.mark.parametrize("batch, depth, queries, pixels", [(4, 256, 128, 33), (1, 300, 256, 40), (1, 5, 300, 70)])
def test_wide_shapes(batch, depth, queries, pixels, fused):
    """All block sizes: all channels at once, two blocks of channels, two blocks of queries."""
    check_kernel(
        lambda *a: kmeans_attention(*a)[0], inputs(batch, depth, queries, (pixels,)), (0,), torch.float32, 1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_what_is_no_number(dtype, fused, monkeypatch):
    value, logits = inputs(1, 4, 40, (7,))
    infinity, nan = float("inf"), float("nan")
    logits[0, :, 0] = 0
    logits[0, 5:, 1] = infinity
    logits[0, :, 2] = -infinity
    logits[0, [11, 30], 3] = nan
    logits[0, 2, 4], logits[0, 17, 4] = infinity, nan
    logits[0, :, 5] = -0.0
    logits[0, 3, 5] = 0.0
    logits[0, :, 6] = nan
    expected = kmeans_attention(value, logits.to(dtype))[1]
    assert expected.tolist() == [[0, 5, 0, 11, 17, 0, 0]]
    assert by_kernel(monkeypatch, value, logits.to(dtype))[1].tolist() == expected.tolist()


def test_values_that_are_no_number_stay_in_their_channel(monkeypatch):
    value, logits = inputs(2, 6, 9, (11, 5))
    broken = value.clone()
    broken[1, 2, 3, 3], broken[0, 5, 0, 0] = float("nan"), float("inf")
    whole = torch.ones(2, 6, dtype=torch.bool)
    whole[1, 2] = whole[0, 5] = False
    sums = by_kernel(monkeypatch, broken, logits)[0].cpu()
    assert torch.equal(sums[whole], by_kernel(monkeypatch, value, logits)[0].cpu()[whole])
    assert not sums[~whole].isfinite().all()


def test_sums_are_exact_where_float32_is(monkeypatch):
    """A value's 24 bits all arrive: one pixel a query."""
    value = torch.randn(1, 16, 20, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-20, 20, 2)
    logits = torch.eye(20)[None]
    assert torch.equal(by_kernel(monkeypatch, value, logits)[0].cpu(), value)


def test_equal_runs_and_several_runs_of_an_image(fused, monkeypatch):
    value, logits = inputs(1, 8, 6, (30, 40))
    first, second = (by_kernel(monkeypatch, value, logits) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected = kmeans_attention(value.double(), logits)
    torch.testing.assert_close(first[0].cpu().double(), expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(first[1].cpu(), expected[1])


def test_mixed_types(monkeypatch):
    value, logits = inputs(1, 8, 6, (5, 5))
    sums, assignment = by_kernel(monkeypatch, value.bfloat16(), logits.half())
    expected = kmeans_attention(value.bfloat16().double(), logits.half())
    torch.testing.assert_close(sums.cpu().double(), expected[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(assignment.cpu(), expected[1])


def test_opcheck(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    value, logits = (tensor.to(DEVICE) for tensor in inputs(2, 3, 6, (4, 5)))
    torch.library.opcheck(torch.ops.densepred.kmeans_attention, (value.requires_grad_(), logits))


def test_images_beyond_32_bits_run_eager(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    huge = torch.zeros(1, 1, 1, device=DEVICE).expand(1, 2**15, 2**16)
    with pytest.raises(ValueError, match=r"2\^31"):
        kmeans_attention(huge, huge)
