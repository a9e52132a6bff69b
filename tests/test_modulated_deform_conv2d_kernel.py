"""The Triton kernels of the modulated deformable convolution against its eager form in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densepred.ops import modulated_deform_conv2d
from tests.oracle import DEVICE, DTYPES, RANDOM_SHAPES, check_kernel, relative_error, results

kernels = pytest.importorskip("densepred.ops.kernels.modulated_deform_conv2d")
TIGHT = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Largest relative errors. The interpreter cuts bfloat16 off where a GPU rounds."""
ALL = (0, 1, 2, 3, 4)
LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "columns first": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "part of a larger one": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}


def problem(
    size: tuple[int, int],
    channels: int,
    outputs: int,
    kernel: tuple[int, int] = (1, 1),
    *,
    batch: int = 1,
    seed: int = 0,
    **grid,
) -> list[Tensor]:
    """Arguments whose offsets are multiples of 1/4: a quarter of them, where taps meet pixels and borders, whole."""
    random = torch.Generator().manual_seed(seed)
    grid = dict(stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1, deform_groups=1) | grid
    sides = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, grid["stride"], grid["padding"], grid["dilation"], strict=True)
    ]
    taps = grid["deform_groups"] * math.prod(kernel)
    offset = torch.randint(-12, 13, (batch, 2 * taps, *sides), generator=random) / 4
    return [
        torch.randn(batch, channels, *size, generator=random),
        offset,
        torch.randn(batch, taps, *sides, generator=random),
        torch.randn(outputs, channels // grid["groups"], *kernel, generator=random),
        torch.randn(outputs, generator=random),
    ]


@st.composite
def problems(draw) -> tuple[list[Tensor], dict]:
    """Arguments and grids of all kinds, small ones: maps of one pixel to two tiles, cells of 1 to 9 channels."""
    groups, deform_groups = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2)]))
    cells = math.lcm(groups, deform_groups)
    kernel = draw(st.sampled_from([(1, 1), (1, 2), (2, 1)]))
    near, far = st.integers(1, 2), st.integers(0, 1)
    grid = dict(stride=(draw(near), draw(near)), padding=(draw(far), draw(far)), dilation=(draw(near), draw(near)))
    size = draw(st.permutations([draw(st.integers(1, 10)), draw(st.integers(1, 3))]))
    size = [
        max(n, d * (k - 1) + 1 - 2 * p)
        for n, d, k, p in zip(size, grid["dilation"], kernel, grid["padding"], strict=True)
    ]
    channels, outputs = cells * draw(st.integers(1, 9 // cells)), groups * draw(st.integers(1, 5))
    grid |= dict(groups=groups, deform_groups=deform_groups)
    tensors = problem(size, channels, outputs, kernel, batch=draw(st.sampled_from([1, 1, 2])), **grid)
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    return [*map(layout, tensors[:4]), tensors[4]], grid


@RANDOM_SHAPES
@given(problems(), st.sampled_from(DTYPES), st.sampled_from([1, 12]))
def test_equals_the_eager_form(drawn, dtype, programs):
    tensors, grid = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "PROGRAMS", programs)  # 12: sums are split among programs
        check_kernel(lambda *leaves: modulated_deform_conv2d(*leaves, **grid), tensors, ALL, dtype, TIGHT[dtype])


@pytest.mark.parametrize(
    ("dtype", "channels", "outputs", "size", "grid"),
    [
        (torch.float32, 72, 70, (9, 3), {}),
        (torch.bfloat16, 136, 130, (3, 9), {}),
        (torch.float16, 80, 34, (8, 8), dict(groups=2, deform_groups=2)),
        (torch.float32, 12, 4, (2, 3), dict(groups=2, deform_groups=3)),
        (torch.bfloat16, 12, 6, (3, 2), dict(groups=3, deform_groups=2)),
    ],
    ids=str,
)
def test_several_tiles_along_every_axis(monkeypatch, dtype, channels, outputs, size, grid):
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    tensors = problem(size, channels, outputs, (1, 2), **grid)
    check_kernel(lambda *leaves: modulated_deform_conv2d(*leaves, **grid), tensors, ALL, dtype, TIGHT[dtype])


def test_long_sums_stay_exact(monkeypatch):
    """A tile's product is added outside of the tensor cores, which truncate: seen on a GPU alone."""
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    tensors = problem((4, 4), 384, 16, (1, 2))
    check_kernel(modulated_deform_conv2d, tensors, ALL, torch.float32, 2e-6)


@pytest.mark.parametrize("far", [math.nan, math.inf, -math.inf, 1e30, -1e30, 2.0**31])
def test_taps_that_lie_nowhere_read_and_write_nothing(monkeypatch, far):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    x, offset, mask, weight, bias = (tensor.to(DEVICE) for tensor in problem((5, 4), 3, 2, deform_groups=1))
    around = torch.full((3, *x.permute(0, 2, 3, 1).shape), math.nan, device=DEVICE)
    around[1] = x.permute(0, 2, 3, 1)
    x = around[1].permute(0, 3, 1, 2)  # a read beside it is not a number
    offset[:, 0, :, ::2] = far
    offset[:, 1, ::2] = far
    slope = torch.ones(1, 2, 5, 4, device=DEVICE)
    found = results(modulated_deform_conv2d, (x, offset, mask, weight, bias), ALL, slope)
    gone = offset.nan_to_num(100, 100, 100).abs().amax(1) >= 100
    offset[:] = torch.where(gone, -50.0, offset)
    expected = results(modulated_deform_conv2d, (x, offset, mask, weight, bias), ALL, slope)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert gone.any() and not gone.all() and not found[2][gone[:, None].expand(-1, 2, -1, -1)].any()
    assert all(tensor.isfinite().all() for tensor in found)


def test_what_float32_rounds_to_a_whole_pixel_lies_beside_it():
    """Line 4 less 1e-9 is line 4 in float32, with another slope: that of the pixels above."""
    tensors = problem((6, 5), 3, 2)
    tensors[1] = torch.where(tensors[1] < 0, -1e-9, 1e-9)
    check_kernel(modulated_deform_conv2d, tensors, ALL, torch.float32, 2e-6)


def test_types_may_differ(monkeypatch):
    """As under autocast: maps and offsets of half precision, parameters of float32."""
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    types = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32, torch.float32)
    tensors = [t.to(DEVICE, dtype) for t, dtype in zip(problem((6, 5), 7, 4, (1, 2)), types, strict=True)]
    doubled = [tensor.double() for tensor in tensors]
    slope = torch.linspace(-1, 1, 96, device=DEVICE).view(1, 4, 6, 4).bfloat16()
    found = results(modulated_deform_conv2d, tensors, ALL, slope)
    expected = results(modulated_deform_conv2d, doubled, ALL, slope)
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, *types]
    assert max(map(relative_error, found, expected)) < 1e-2


def test_maps_of_more_numbers_than_int32_counts(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    height, width, channels = 8193, 16385, 16
    assert height * width * channels > 2**31
    maps = torch.empty(
        1, height, width, channels, dtype=torch.bfloat16, device=DEVICE
    )  # 4.3 GB, of which pages are read
    corners = torch.randn(1, 2, 2, channels).to(maps)
    maps[:, :: height - 1, :: width - 1] = corners
    weight = torch.randn(3, channels, 1, 1).to(maps)
    still, whole = (torch.full((1, n, 2, 2), float(n == 1)).to(maps) for n in (2, 1))
    x = maps.permute(0, 3, 1, 2)
    out = modulated_deform_conv2d(x, still, whole, weight, stride=(height - 1, width - 1))
    exact = torch.einsum("byxc,oc->boyx", corners.double(), weight[..., 0, 0].double())
    assert relative_error(out, exact) < 1e-2


@pytest.mark.parametrize(("dtype", "bias"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_opcheck(monkeypatch, dtype, bias):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    *maps, last = (tensor.to(DEVICE, dtype) for tensor in problem((1, 2), 2, 2, deform_groups=2))
    grid, ops = ((1, 1), (0, 0), (1, 1), 1, 2), torch.ops.densepred
    leaves = [tensor.clone().requires_grad_() for tensor in maps]
    torch.library.opcheck(ops.modulated_deform_conv2d, (*leaves, last if bias else None, *grid))
    slope = torch.ones_like(ops.modulated_deform_conv2d(*maps, None, *grid))
    torch.library.opcheck(ops.modulated_deform_conv2d_backward, (slope, *maps, *grid))


def test_a_fixed_order_on_demand(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    tensors = [tensor.to(DEVICE) for tensor in problem((6, 5), 3, 2, (1, 2))]
    slope = torch.linspace(-1, 1, 48, device=DEVICE).view(1, 2, 6, 4)
    usual = results(modulated_deform_conv2d, tensors, ALL, slope)
    monkeypatch.setattr(kernels, "backward", lambda *_: pytest.fail("atomic additions"))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(modulated_deform_conv2d, tensors, ALL, slope) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first[0], usual[0], rtol=0, atol=0)  # the kernel's forward
    assert max(map(relative_error, usual, first)) < 2e-6


def test_the_forward_and_all_gradients_but_that_of_the_maps_repeat(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    monkeypatch.setattr(kernels, "PROGRAMS", 12)
    tensors = [tensor.to(DEVICE) for tensor in problem((10, 4), 18, 2, (1, 2))]
    slope = torch.linspace(-1, 1, 60, device=DEVICE).view(1, 2, 10, 3)
    runs = [results(modulated_deform_conv2d, tensors, ALL, slope) for _ in range(2)]
    for first, second in zip(*(run[:1] + run[2:] for run in runs), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
