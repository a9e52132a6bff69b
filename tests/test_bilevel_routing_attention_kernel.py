import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densepred.ops import bilevel_routing_attention
from tests.oracle import DEVICE, DTYPES, RANDOM_SHAPES, check_kernel, relative_error

kernels = pytest.importorskip("densepred.ops.kernels.bilevel_routing_attention")


def inputs(
    batch: int = 1,
    regions: int = 3,
    queries: int = 5,
    keys: int = 4,
    topk: int = 2,
    heads: int = 2,
    d: int = 8,
    c: int = 8,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, float]:
    random = torch.Generator().manual_seed(0)
    sizes = ((queries, d), (keys, d), (keys, c))
    q, k, v = (torch.randn(batch, regions, n, heads * width, generator=random) for n, width in sizes)
    table = torch.randint(regions, (batch, regions, topk), generator=random)
    return q, k, v, table, heads, d**-0.5


def on_device(arguments: tuple) -> list:
    return [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]


def check(arguments: tuple, dtype: torch.dtype = torch.float32) -> None:
    check_kernel(bilevel_routing_attention, arguments, (0, 1, 2), dtype)


def expected_output(q: Tensor, k: Tensor, v: Tensor, table: Tensor, heads: int, scale: float) -> Tensor:
    """The gather form in float64, a region at a time."""
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device)
    for image, region in torch.cartesian_prod(*map(torch.arange, q.shape[:2])).tolist():
        chosen = table[image, region]
        split = (x.double().unflatten(-1, (heads, -1)) for x in (q[image, region], *(x[image, chosen] for x in (k, v))))
        query, key, value = (x.flatten(0, -3) for x in split)
        weights = (torch.einsum("thd,shd->hts", query, key) * scale).softmax(-1)
        out[image, region] = torch.einsum("hts,shc->thc", weights, value).flatten(1)
    return out


@RANDOM_SHAPES
@given(
    dtype=st.sampled_from(DTYPES),
    batch=st.integers(1, 2),
    regions=st.integers(1, 3),
    queries=st.integers(1, 40),
    keys=st.integers(1, 40),
    topk=st.integers(1, 6),
    heads=st.integers(1, 2),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_random_shapes(dtype, batch, regions, queries, keys, topk, heads, widths):
    check(inputs(batch, regions, queries, keys, topk, heads, *widths), dtype)


@pytest.mark.parametrize(
    "shape",
    [
        dict(queries=64, keys=64, d=32, c=32),  # full tiles of one region
        dict(queries=16, keys=16, topk=4, d=32, c=32),  # full tiles of several
        dict(queries=70, keys=130, d=16, c=16),  # several tiles a region
        dict(queries=3, keys=20, d=70, c=24),  # wide heads
        dict(queries=20, keys=3, d=24, c=130),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ways_to_tile(shape, dtype):
    check(inputs(regions=2, heads=1, **shape), dtype)


def test_table_of_several_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "TABLE_BLOCK", 4)
    check(inputs(batch=2, regions=3, topk=3, heads=1))


def test_output_is_that_of_the_gather_form(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    arguments = on_device(inputs(batch=2))
    assert relative_error(bilevel_routing_attention(*arguments), expected_output(*arguments)) < 1e-6


def test_slices_of_one_projection_and_mixed_layouts():
    *_, table, heads, scale = inputs(batch=2)
    random = torch.Generator().manual_seed(1)
    projected = torch.randn(2, 3, 5, 48, generator=random)
    q, k, v = projected.split(16, dim=-1)
    assert not q.is_contiguous() and kernels._matrices(q)[0].data_ptr() == q.data_ptr(), "no copy"
    check((q, k, v, table, heads, scale))
    backwards = (q.transpose(2, 3).contiguous().transpose(2, 3), k.flip(2).flip(2)[:, :, ::2], v[:, :, ::2])
    check((*backwards, table.transpose(1, 2).contiguous().transpose(1, 2), heads, scale))


@pytest.mark.parametrize("scale", [-1.5, 0.0, 8.0])
def test_scales_of_either_sign_and_large_logits(scale):
    check((*inputs(regions=2, heads=1, keys=20)[:-1], scale))


def test_inputs_of_different_dtypes(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    q, k, v, *rest = on_device(inputs())
    mixed = [q.bfloat16().requires_grad_(), k.half().requires_grad_(), v.requires_grad_()]
    out = bilevel_routing_attention(*mixed, *rest)
    assert out.dtype == torch.float32 and relative_error(out.detach(), expected_output(*mixed, *rest).detach()) < 1e-6
    assert [g.dtype for g in torch.autograd.grad(out.sum(), mixed)] == [torch.bfloat16, torch.float16, torch.float32]


def test_one_region_read_by_all_and_others_by_none(monkeypatch):
    q, k, v, table, *rest = inputs(regions=4, topk=2, heads=1)
    table = torch.full_like(table, 2)
    check((q, k, v, table, *rest))
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    leaves = [x.requires_grad_() for x in on_device((q, k, v))]
    grads = torch.autograd.grad(bilevel_routing_attention(*leaves, table.to(DEVICE), *rest).sum(), leaves[1:])
    for grad in grads:
        assert not grad[0, [0, 1, 3]].any()


@pytest.mark.parametrize("keys", [4, 64])
def test_regions_out_of_range_are_not_read_and_show(keys):
    q, k, v, table, *rest = on_device(inputs(regions=4, heads=1, keys=keys))
    right, log_sum = kernels.forward(q, k, v, table, *rest)
    wrong = table.clone()
    wrong[0, 1, 1], wrong[0, 3, 0] = 2**40, -(2**40)
    out, _ = kernels.forward(q, k, v, wrong, *rest)
    assert out[0, [1, 3]].isnan().all() and torch.equal(out[0, [0, 2]], right[0, [0, 2]])
    grads = kernels.backward(
        torch.ones_like(out), q, k, v, wrong, right, log_sum, *rest
    )  # inverts the table: in bounds
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_its_readers_only(monkeypatch, number):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    q, k, v, _, *rest = on_device(inputs())
    table = torch.tensor([[[0, 1], [1, 0], [0, 0]]], device=DEVICE)
    k[0, 1] = number
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = bilevel_routing_attention(*leaves, table, *rest)
    assert out[0, :2].isnan().all() and out[0, 2].isfinite().all()
    assert torch.autograd.grad(out.sum(), leaves)[2][0, 2].eq(0).all()


def test_the_same_bits_in_every_run(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    leaves = [x.requires_grad_() for x in on_device(inputs(regions=4, heads=1)[:3])]
    rest = on_device(inputs(regions=4, heads=1)[3:])
    torch.use_deterministic_algorithms(True)
    try:
        runs = [torch.autograd.grad(bilevel_routing_attention(*leaves, *rest).sum(), leaves) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("shape", [dict(batch=0), dict(regions=1, queries=0, topk=1)])
def test_nothing_to_do(shape):
    q, k, v, _, *rest = on_device(inputs(**shape | dict(batch=1)))
    q, k, v = (x[: shape.get("batch", 1)] for x in (q, k, v))
    table = torch.zeros(*q.shape[:2], 2, dtype=torch.int64, device=DEVICE)
    out, log_sum = kernels.forward(q, k, v, table, *rest)
    assert out.shape == (*q.shape[:3], v.shape[3]) and not out.numel()
    dq, dk, dv = kernels.backward(out, q, k, v, table, out, log_sum, *rest)
    assert dq.shape == q.shape and not dk.any() and not dv.any()


def test_tokens_that_lie_further_than_int32_reaches():
    q, _, v, table, heads, scale = inputs(regions=3, queries=1, keys=1)
    stride = 2**30 + 16
    k = torch.empty(2 * stride + 16, dtype=torch.bfloat16, device=DEVICE)  # 4 GiB of address space, hardly any written
    k = k.as_strided((1, 3, 1, 16), (3 * stride, stride, stride, 1))
    k.copy_(torch.randn(k.shape, generator=torch.Generator().manual_seed(2)))
    assert kernels._matrices(k)[0].data_ptr() == k.data_ptr(), "no copy"
    check((q, k, v, table, heads, scale), torch.bfloat16)


def test_operator_contract(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    q, k, v, *rest = on_device(inputs())
    arguments = (*(x.requires_grad_() for x in (q, k, v)), *rest)
    torch.library.opcheck(torch.ops.densepred.bilevel_routing_attention, arguments)
