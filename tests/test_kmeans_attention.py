"""The k-means attention op: against the published numbers, plain maths, autograd, and the compilers."""

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.ops.kmeans_attention import kmeans_attention
from tests import parity


def one_hot_reference(pixel_value: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The textbook form, with the (B, Q, P) matrix that the op avoids."""
    winner = mask_logits.flatten(2).argmax(1)
    hot = torch.nn.functional.one_hot(winner, mask_logits.shape[1]).to(pixel_value.dtype)  # (B, P, Q)
    return torch.einsum("bdp,bpq->bdq", pixel_value.flatten(2), hot), winner.view(-1, *mask_logits.shape[2:])


def test_ties_go_to_the_lowest_query():
    meta, expected = parity.case(parity.CASES / "kmeans_attention")
    tie = meta["input"]["tie"]["pixel_value"]
    value = torch.from_numpy(parity.normal_input(tie["seed"], tie["shape"]))
    logits = torch.from_numpy(np.round(parity.normal_input(45, (1, 6, 4, 5))))
    assert (logits == logits.amax(1, keepdim=True)).sum(1).max() > 1, "the case has no tie"
    sums, assignment = kmeans_attention(value, logits)
    np.testing.assert_array_equal(assignment.numpy(), expected["tie.assignment"])
    np.testing.assert_allclose(sums.numpy(), expected["tie.kmeans_sum"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries", [1, 7, 300])
def test_all_logits_equal_goes_to_query_zero(queries):
    value = torch.randn(2, 3, 70, 40, dtype=torch.float64)
    sums, assignment = kmeans_attention(value, torch.zeros(2, queries, 70, 40))
    assert assignment.max() == 0
    torch.testing.assert_close(sums[..., 0], value.sum((2, 3)))
    assert not sums[..., 1:].any(), "a query without pixels must keep a zero sum"


@pytest.mark.parametrize("shape", [(5, 6), (1, 1), (33,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_one_hot_matrix(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 4, *shape, generator=generator).to(dtype)
    logits = torch.randn(2, 9, *shape, generator=generator).to(dtype)
    sums, assignment = kmeans_attention(value, logits)
    expected, winner = one_hot_reference(value.double(), logits)
    assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(sums.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(assignment, winner)


def test_gradient_reaches_only_the_values():
    value = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 6, dtype=torch.float64)
    sums, assignment = kmeans_attention(value, logits)
    assert not assignment.requires_grad
    got, none = torch.autograd.grad((sums * weight).sum(), (value, logits), allow_unused=True)
    expected = torch.autograd.grad((one_hot_reference(value, logits)[0] * weight).sum(), value)[0]
    assert none is None
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_gradcheck():
    value = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(1, 5, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: kmeans_attention(v, logits)[0], value)
    assert torch.autograd.gradgradcheck(lambda v: kmeans_attention(v, logits)[0], value)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (torch.randn(2, 3, 4, 5, dtype=dtype, requires_grad=True), torch.randn(2, 6, 4, 5, dtype=dtype))
        torch.library.opcheck(torch.ops.densepred.kmeans_attention, arguments)


class Step(torch.nn.Module):
    def forward(self, value: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        sums, assignment = kmeans_attention(value.relu(), logits)
        return sums * 2, assignment


def test_compiles_without_a_graph_break():
    value, logits = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 6, 4, 5)
    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
    sums, assignment = compiled(value, logits)
    torch.testing.assert_close(sums, Step()(value, logits)[0])
    assert torch.equal(assignment, Step()(value, logits)[1])
    (gradient,) = torch.autograd.grad(sums.sum(), value)
    torch.testing.assert_close(gradient, 2.0 * (value > 0))


def test_exports_with_free_sizes():
    free = {2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(
        Step(), (torch.randn(1, 3, 4, 5), torch.randn(1, 6, 4, 5)), dynamic_shapes=(free, free)
    )
    value, logits = torch.randn(1, 3, 9, 7), torch.randn(1, 6, 9, 7)
    torch.testing.assert_close(program.module()(value, logits), Step()(value, logits))


def test_memory_holds_no_one_hot_matrix():
    """The (B, Q, P) float32 matrix would take 8 MiB here; the op may allocate the index and the sums only."""
    value, logits = torch.randn(1, 16, 128, 128), torch.randn(1, 128, 128, 128)
    with torch.profiler.profile(profile_memory=True) as profile:
        kmeans_attention(value, logits)
    allocated = max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0)
    assert 0 < allocated < logits.numel() * 4 / 8, f"{allocated} bytes in one allocation"


def test_errors_name_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 5\).*\(1, 6, 5, 4\)"):
        kmeans_attention(torch.randn(1, 3, 4, 5), torch.randn(1, 6, 5, 4))
